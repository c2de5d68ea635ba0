"""Prompts as chunks of 75 tokens, with CLIP's own tokenizer as the package ships it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from diffusion_api.engine import text
from diffusion_api.settings import DATA

START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DATA / "clip", local_files_only=True)


def test_the_shipped_vocabulary_has_clips_ids(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("a photo of a cat").input_ids == [START, 320, 1125, 539, 320, 2368, END]


def test_a_short_prompt_is_one_padded_row(tokenizer: CLIPTokenizer) -> None:
    (row,) = text.chunks(tokenizer, "a cat")
    assert row == [START, 320, 2368, *[END] * 74]


def test_an_empty_prompt_is_one_row(tokenizer: CLIPTokenizer) -> None:
    assert text.chunks(tokenizer, "") == [[START, *[END] * 76]]


@pytest.mark.parametrize(("words", "rows"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_long_prompt_loses_no_token(tokenizer: CLIPTokenizer, words: int, rows: int) -> None:
    chunks = text.chunks(tokenizer, "cat " * words)
    assert len(chunks) == rows
    assert all(len(chunk) == 77 for chunk in chunks)
    assert sum(chunk.count(2368) for chunk in chunks) == words


def test_conditionings_are_as_long_as_the_longest_and_each_chunk_is_encoded_alone(tokenizer: CLIPTokenizer) -> None:
    seen: list[Tensor] = []

    def encoder(ids: Tensor) -> Tensor:
        seen.append(ids)
        return ids[..., None].float()

    short, long = text.encode(tokenizer, encoder, ("", "cat " * 80))
    assert short.shape == long.shape == (1, 154, 1)
    assert all(ids.shape == (1, 77) for ids in seen)
    assert torch.equal(short[0, 77:, 0], torch.tensor([START, *[END] * 76]).float())
