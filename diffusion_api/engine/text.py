"""Words → embeddings: tokens in chunks of 75, each encoded alone, and weighed as A1111 weighs them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffusion_api.prompt import Piece, emphasis
from diffusion_api.schema.request import Emphasis

CHUNK = 75

BACKTRACK = 20
"""Tokens at the end of a full chunk among which a comma is looked for."""

KEPT = 128
"""Read texts and encoded chunks that are kept, the latter 0.2 MB each with Stable Diffusion 1.x in float32."""


@dataclass(frozen=True)
class Conditioning:
    """What words mean to a model: ``hidden``, (1, tokens, width), and ``pooled``, (1, width), where it reads both.

    ``negative``: as the negative prompt, which some models read otherwise.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    negative: bool = False


class Encoded(NamedTuple):
    """What a text encoder makes of a chunk: (1, 77, width), and (1, width) of the whole where it has that."""

    hidden: Tensor
    pooled: Tensor | None = None


class Tokenizer(Protocol):
    """What is used of a transformers CLIPTokenizer."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> object:
        """Token ids under ``input_ids``."""


class Chunk(NamedTuple):
    """77 token ids: start, up to 75 tokens, end, padding; and the weight of each. Ids below 0 are learned vectors."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Last(Generic[Key, Value]):
    """What was made last, so that it need not be made again."""

    def __init__(self) -> None:
        self._made: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        value = self._made.pop(key) if key in self._made else make()
        self._made[key] = value
        if len(self._made) > KEPT:
            self._made.popitem(last=False)
        return value

    def clear(self) -> None:
        self._made.clear()


class Words:
    """A model's tokenizer and text encoder, and what they made of the last chunks.

    ``encoder`` gets (1, 77) ids and a clip skip: every chunk is encoded alone, so that its embedding never depends on what it
    was batched with. ``table`` is where the encoder looks up the vectors of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: Callable[[Tensor, int], Encoded], table: nn.Embedding) -> None:
        self._tokenizer, self._encoder, self._table = tokenizer, encoder, table
        self._comma = self._ids(",")
        self._learned: dict[tuple[int, ...], range] = {}
        self._vectors: list[Tensor] = []
        self._lesson: Hashable = ()
        self._read: _Last[tuple[bool, str], list[Chunk]] = _Last()
        self._kept: _Last[tuple[int, tuple[int, ...]], Encoded] = _Last()

    @property
    def width(self) -> int:
        """How many numbers the vector of a token has."""
        return self._table.embedding_dim

    def learn(self, lesson: Hashable, embeddings: Mapping[str, Tensor]) -> None:
        """From now on these words, and no others, mean these vectors: (vectors, width) each. ``lesson`` says which they are.

        A word is found by its tokens, so case does not matter, and only whole words are found.
        """
        if lesson == self._lesson:
            return
        self._lesson, self._learned, self._vectors = lesson, {}, []
        for word, vectors in embeddings.items():
            known = len(self._vectors)
            self._learned[tuple(self._ids(word))] = range(-1 - known, -1 - known - len(vectors), -1)
            self._vectors += vectors
        self._read.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of what was encoded: the encoder has other weights now."""
        self._kept.clear()

    def encode(self, texts: Sequence[str], *, clip_skip: int = 1, mode: Emphasis = "original") -> tuple[Tensor, ...]:
        """A conditioning for each text, (1, 77 * chunks, width), all as long as the longest; the short ones get empty chunks.

        Weights are those of :func:`diffusion_api.prompt.emphasis`, unless the ``mode`` is "none": then brackets are words.
        Vectors are multiplied by them, unless it is "ignore". What that does to the mean of a chunk is undone, over the
        chunks at the same place of all texts together, unless it is "no norm".
        """
        chunks = {text: self.chunks(text, mode) for text in texts}
        longest = max(map(len, chunks.values()))
        (empty,) = self.chunks("")
        columns = zip(*([*row, *[empty] * (longest - len(row))] for row in chunks.values()), strict=True)
        counts = Counter(texts)
        weighed = [self._weighed(column, [counts[text] for text in chunks], clip_skip, mode) for column in columns]
        conditionings = dict(zip(chunks, (torch.cat(row, 1) for row in zip(*weighed, strict=True)), strict=True))
        return tuple(conditionings[text] for text in texts)

    def pooled(self, text: str, mode: Emphasis = "original") -> Tensor | None:
        """What the encoder makes of the first chunk of a text as a whole, (1, width); weights do nothing to it."""
        return self._encoded(self.chunks(text, mode)[0].ids, 1).pooled

    def chunks(self, text: str, mode: Emphasis = "original") -> list[Chunk]:
        """The chunks of a text, at least one. What follows a comma near the end of a full chunk moves to the next one."""
        literal = mode == "none"
        return self._read.get((literal, text), lambda: self._cut(((Piece(text, 1.0),),) if literal else emphasis(text)))

    def _cut(self, sections: Iterable[Iterable[Piece]]) -> list[Chunk]:
        rows: list[list[tuple[int, float]]] = []
        for section in sections:
            rows.append([])
            for words, weight in section:
                for tokens in self._tokens(words):
                    if len(tokens) > 1 and len(rows[-1]) + len(tokens) > CHUNK:
                        rows.append([])
                    elif len(rows[-1]) == CHUNK:
                        rows.append(self._moved(rows[-1], tokens[0]))
                    rows[-1] += ((token, weight) for token in tokens)
        if len(rows) > 1 and not rows[-1]:
            rows.pop()
        return [self._padded(row) for row in rows]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[index]
        return ids

    def _tokens(self, text: str) -> Iterator[Sequence[int]]:
        """The tokens of a text, those that belong together in one piece: the vectors of a learned word."""
        ids = self._ids(text)
        place = 0
        while place < len(ids):
            fitting = [word for word in self._learned if tuple(ids[place : place + len(word)]) == word]
            word = max(fitting, key=len, default=(ids[place],))
            yield self._learned.get(word, word)
            place += len(word)

    def _moved(self, row: list[tuple[int, float]], following: int) -> list[tuple[int, float]]:
        """What leaves a full row before a token that has no place in it."""
        commas = [place for place, (token, _) in enumerate(row) if [token] == self._comma]
        if [following] == self._comma or not commas or len(row) - commas[-1] > BACKTRACK:
            return []
        moved = row[commas[-1] + 1 :]
        del row[commas[-1] + 1 :]
        return moved

    def _padded(self, row: list[tuple[int, float]]) -> Chunk:
        start, end, padding = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        left = CHUNK - len(row)
        ids = (start, *(token for token, _ in row), end, *[padding] * left)
        return Chunk(ids, (1.0, *(weight for _, weight in row), 1.0, *[1.0] * left))

    def _weighed(self, chunks: Sequence[Chunk], counts: list[int], clip_skip: int, mode: Emphasis) -> list[Tensor]:
        """The embeddings of chunks that stand at one place, each in so many texts."""
        plain = [self._encoded(chunk.ids, clip_skip).hidden for chunk in chunks]
        if mode == "ignore" or all(weight == 1 for chunk in chunks for weight in chunk.weights):
            return plain
        weighed = [
            hidden * hidden.new_tensor(chunk.weights)[:, None] for hidden, chunk in zip(plain, chunks, strict=True)
        ]
        if mode == "no norm":
            return weighed
        restored = _mean(plain, counts) / _mean(weighed, counts)
        return [hidden * restored.to(hidden.dtype) for hidden in weighed]

    def _encoded(self, ids: tuple[int, ...], clip_skip: int) -> Encoded:
        vectors = {place: self._vectors[-1 - token] for place, token in enumerate(ids) if token < 0}

        def encode() -> Encoded:
            with _looked_up(self._table, vectors):
                return self._encoder(torch.tensor([[max(token, 0) for token in ids]]), clip_skip)

        return self._kept.get((clip_skip, ids), encode)


@contextmanager
def _looked_up(table: nn.Embedding, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Within, the table has these vectors at these places of the text, whatever their tokens are."""

    def replaced(_: nn.Module, __: object, found: Tensor) -> Tensor:
        found = found.clone()
        for place, vector in vectors.items():
            found[:, place] = vector
        return found

    hook = table.register_forward_hook(replaced) if vectors else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def as_long(conditionings: Sequence[Conditioning]) -> tuple[Conditioning, ...]:
    """All as long as the longest; the short ones repeat their last vector."""
    longest = max(conditioning.hidden.shape[1] for conditioning in conditionings)
    return tuple(
        replace(conditioning, hidden=_stretched(conditioning.hidden, longest)) for conditioning in conditionings
    )


def _stretched(hidden: Tensor, length: int) -> Tensor:
    missing = length - hidden.shape[1]
    return torch.cat([hidden, hidden[:, -1:].expand(-1, missing, -1)], 1) if missing else hidden


def _mean(tensors: Sequence[Tensor], counts: list[int]) -> Tensor:
    """The mean of all numbers, where each tensor counts so many times."""
    return sum((tensor.float().mean() * n for tensor, n in zip(tensors, counts, strict=True)), torch.tensor(0.0)) / sum(
        counts
    )
