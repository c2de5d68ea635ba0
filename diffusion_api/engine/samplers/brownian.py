"""Brownian motion over sigma: the noise of the SDE samplers, which depends on where a step lies and not on how many were."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Draw = Callable[[Sequence[int]], Tensor]
"""Standard normal noise, from each seed its own, (seeds, 1, c, h, w) float32 on the CPU."""

Values = NDArray[np.float64]
"""A motion, a number for each of the latents; double, as it is the sum of two dozen parts."""

Singles = NDArray[np.float32]
Words = NDArray[np.uint32]

DIGITS = 6
POOL_SIZE = 24
DEPTH = 24
"""Halvings to a point, about."""
TOGETHER = 2**18
"""Numbers that may be drawn at a time, for several points."""
SHARED = 12
"""Halvings whose motion is kept for the next point; further down the two hardly ever lie in one half."""


class Span(NamedTuple):
    """A part of the way that halving gives: its ends and its middle, its place among those of its length, and how often
    the way was halved.
    """

    start: float
    middle: float
    end: float
    place: int
    depth: int

    @classmethod
    def between(cls, start: float, end: float, place: int = 0, depth: int = 0) -> Span:
        """With the middle that belongs to these ends."""
        return cls(start, round((start + end) / 2, DIGITS), end, place, depth)

    def half(self, sigma: float) -> Span:
        """The half that ``sigma`` lies in."""
        if sigma < self.middle:
            return Span.between(self.start, self.middle, 2 * self.place, self.depth + 1)
        return Span.between(self.middle, self.end, 2 * self.place + 1, self.depth + 1)


class Brownian:
    """A path that is refined by halving (Lévy's construction), each half with the noise of its own seed.

    The same motion as torchsde's BrownianTree (Li et al. 2020, arXiv:2001.01328, section 4) with this entropy, which
    k-diffusion and A1111 use: same halves, same seeds, times rounded to 6 digits. A point takes some two dozen halvings,
    whose noise is drawn together; those at the top are kept from one point to the next.
    """

    def __init__(self, low: float, high: float, seed: int, draw: Draw, ahead: Sequence[float] = ()) -> None:
        self._seeds, self._draw = Seeds(seed), draw
        whole = Span.between(round(low, DIGITS), round(high, DIGITS))
        drawn = draw(self._seeds([()]))[0]
        self._shape = drawn.shape
        change = drawn.numpy().ravel().astype(np.float64) * math.sqrt(high - low)
        self._known: dict[float, Values] = {whole.start: change * 0, whole.end: change}
        self._ahead = [
            sigma for sigma in dict.fromkeys(round(sigma, DIGITS) for sigma in ahead) if sigma not in self._known
        ]
        self._spans, self._motions = [whole], [(self._known[whole.start], change)]
        """Each half of the one before, and of each the motion up to it and on it."""

    def __call__(self, sigma: float, following: float) -> Tensor:
        """The motion from ``sigma`` down to ``following``, as standard normal noise, (1, c, h, w) float32."""
        change = self._at(round(following, DIGITS)) - self._at(round(sigma, DIGITS))
        return torch.from_numpy((change / math.sqrt(abs(sigma - following))).astype(np.float32)).reshape(self._shape)

    def _at(self, sigma: float) -> Values:
        if sigma not in self._known:
            points = [sigma]
            if sigma in self._ahead:
                size = max(TOGETHER // (math.prod(self._shape) * DEPTH), 1)
                place = self._ahead.index(sigma)
                points, self._ahead = self._ahead[place : place + size], self._ahead[place + size :]
            self._find(points)
        return self._known[sigma]

    def _find(self, points: Sequence[float]) -> None:
        """Come to know the motion up to each of the points; the noise on all ways there is drawn at once."""
        ways = [self._way(point) for point in points]
        keys = [(span.place, span.depth) for _, way in ways for span in way[:-1]]
        noises = self._draw(self._seeds(keys)).numpy().reshape(len(keys), -1) if keys else np.empty((0, 0), np.float32)
        for point, (shared, way) in zip(points, ways, strict=True):
            del self._motions[shared:]
            before, change = (values.copy() for values in self._motions[-1])
            steps = np.array([_step(span, half) for span, half in pairwise(way)]).reshape(-1, 3)
            kept = sum(half.depth <= SHARED for half in way[1:])
            motions = np.empty((kept, 2, len(before)))
            _descend(before, change, noises[: len(steps)], steps, motions)
            noises = noises[len(steps) :]
            self._motions += [(up, on) for up, on in motions.copy()]
            self._known[point] = before

    def _way(self, sigma: float) -> tuple[int, list[Span]]:
        """How many of the spans of the way before lead to a point too, and the way on from the last of these."""
        whole = self._spans[0]
        sigma = min(max(sigma, whole.start), whole.end)
        while not self._spans[-1].start <= sigma < self._spans[-1].end:
            self._spans.pop()
        shared, span = len(self._spans), self._spans[-1]
        way = [span]
        while sigma != span.start:
            span = span.half(sigma)
            way.append(span)
        self._spans += [half for half in way[1:] if half.depth <= SHARED]
        return shared, way


def _step(span: Span, half: Span) -> tuple[float, float, bool]:
    """What leads from a span to one of its halves: the first half's share of the way, how far its noise goes, which it is."""
    left, right, length = span.middle - span.start, span.end - span.middle, span.end - span.start
    return left / length, math.sqrt(left * right / length), half.start == span.middle


@njit()
def _descend(before: Values, change: Values, noises: Singles, steps: Values, motions: Values) -> None:
    """Go from half to half, and change the motion up to each and on it in place; those of the first halves also go into
    ``motions``, (halves kept, 2, numbers).
    """
    for depth in range(len(noises)):
        share, spread, second = steps[depth]
        for place in range(len(before)):
            first = change[place] * share + noises[depth, place] * spread
            if second:
                before[place] += first
                change[place] -= first
            else:
                change[place] = first
        if depth < len(motions):
            for place in range(len(before)):
                motions[depth, 0, place], motions[depth, 1, place] = before[place], change[place]


class Seeds:
    """Seeds out of a seed and keys: the first word of numpy's SeedSequence with that spawn_key, of many keys at once.

    What the seed does to its pool (O'Neill 2015, "Developing a seed_seq alternative") is done once for all keys, and what
    a key does only to the word that is asked for.
    """

    def __init__(self, seed: int) -> None:
        self._pool = np.random.SeedSequence(seed, pool_size=POOL_SIZE).pool[:1]

    def __call__(self, keys: Sequence[tuple[int, ...]]) -> list[int]:
        """The seed of each of the keys, which are as long as each other; numbers below 2**32."""
        pool = self._pool
        for words, factors in zip(np.array(keys, np.uint32).T, FACTORS, strict=False):
            pool = LEFT * pool - RIGHT * _hashed(words, *factors)
            pool ^= pool >> HALF
        seeds: list[int] = _hashed(pool, *LAST_FACTORS).tolist()
        return seeds


HALF, LEFT, RIGHT = np.uint32(16), np.uint32(0xCA01F9DD), np.uint32(0x4973F715)

LAST_FACTORS = np.uint32(0x8B51F9DD), np.uint32(0x8B51F9DD * 0x58F38DED % 2**32)


def _factors(words: int) -> tuple[np.uint32, np.uint32]:
    """What a word is hashed with after so many others; each takes as many factors as the pool has words."""
    first, second = (0x43B0D7E5 * pow(0x931E8875, words * POOL_SIZE + i, 2**32) % 2**32 for i in range(2))
    return np.uint32(first), np.uint32(second)


FACTORS = _factors(POOL_SIZE), _factors(POOL_SIZE + 1)
"""Of the two words of a key; before them come those of the seed, filled up to the size of the pool."""


def _hashed(words: Words, first: np.uint32, second: np.uint32) -> Words:
    hashed = (words ^ first) * second
    return hashed ^ (hashed >> HALF)
