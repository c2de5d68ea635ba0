"""Words → embeddings: tokens in chunks of 75 between the tokenizer's own start and end, as the field does for long prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 75


class Tokenizer(Protocol):
    """What is used of a transformers CLIPTokenizer."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> object:
        """Token ids under ``input_ids``."""


def chunks(tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    """Rows of 77 token ids: start, up to 75 tokens, end, padding. An empty prompt is one row."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[index]
    rows = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)] or [[]]
    padding = tokenizer.pad_token_id
    return [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id, *[padding] * (CHUNK - len(row))] for row in rows]


def encode(tokenizer: Tokenizer, encoder: Callable[[Tensor], Tensor], prompts: tuple[str, ...]) -> tuple[Tensor, ...]:
    """A conditioning for each prompt, (1, 77 * chunks, width), all as long as the longest; the short ones get empty chunks.

    ``encoder`` maps (1, 77) ids to (1, 77, width): every chunk is encoded alone, so that its embedding never depends on what
    it was batched with.
    """
    rows = [chunks(tokenizer, prompt) for prompt in prompts]
    longest = max(len(r) for r in rows)
    empty = chunks(tokenizer, "")
    return tuple(torch.cat([encoder(torch.tensor([row])) for row in r + empty * (longest - len(r))], 1) for r in rows)
