"""Brownian motion over sigma: the noise of the SDE samplers, which depends on where a step lies and not on how many were."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

Draw = Callable[[int], Tensor]
"""Standard normal noise from a seed of its own, (1, c, h, w)."""

DIGITS = 6
POOL_SIZE = 24


class Brownian:
    """A path that is refined by halving (Lévy's construction), each half with the noise of its own seed.

    The same motion as torchsde's BrownianTree (Li et al. 2020, arXiv:2001.01328, section 4) with this entropy, which
    k-diffusion and A1111 use: same halves, same seeds, times rounded to 6 digits.
    """

    def __init__(self, low: float, high: float, seed: int, draw: Draw) -> None:
        self._start, self._end, self._seed, self._draw = round(low, DIGITS), round(high, DIGITS), seed, draw
        self._whole = self._noise(()) * math.sqrt(high - low)
        self._known: dict[float, Tensor] = {self._start: self._whole * 0, self._end: self._whole}

    def __call__(self, sigma: float, following: float) -> Tensor:
        """The motion from ``sigma`` down to ``following``, as standard normal noise, (1, c, h, w) float32."""
        change = self._at(round(following, DIGITS)) - self._at(round(sigma, DIGITS))
        return (change / math.sqrt(abs(sigma - following))).float()

    def _at(self, sigma: float) -> Tensor:
        if sigma not in self._known:
            self._known[sigma] = self._found(min(max(sigma, self._start), self._end))
        return self._known[sigma]

    def _found(self, sigma: float) -> Tensor:
        start, end, place, depth = self._start, self._end, 0, 0
        before, change = self._known[start], self._whole
        while sigma not in (start, end):
            middle = round((start + end) / 2, DIGITS)
            left, right = middle - start, end - middle
            spread = math.sqrt(left * right / (end - start))
            first = change * (left / (end - start)) + self._noise((place, depth)) * spread
            place, depth = 2 * place, depth + 1
            if sigma < middle:
                end, change = middle, first
            else:
                start, place, before, change = middle, place + 1, before + first, change - first
        return before if sigma == start else before + change

    def _noise(self, key: tuple[int, ...]) -> Tensor:
        seeds = np.random.SeedSequence(self._seed, spawn_key=key, pool_size=POOL_SIZE)
        return self._draw(int(seeds.generate_state(1)[0])).double()
