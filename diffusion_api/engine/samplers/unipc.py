"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a predictor and a corrector of any order that share their evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Options, Steps

ORDER = 3


def unipc(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """UniPC-3 with B1(h) = h on guesses of the clean picture, lower orders at both ends, no corrector after the last step."""
    steps = len(sigmas) - 1
    denoised = yield from denoise(x, sigmas[0])
    guesses = [(sigmas[0], denoised)]
    for step in range(steps):
        order, following = min(ORDER, step + 1, steps - step), sigmas[step + 1]
        sigma, denoised = guesses[0]
        if following == 0:
            return denoised
        length = math.log(sigma / following)
        share = following / sigma
        plain = x * share + denoised * (1 - share)
        earlier = [(math.log(sigma / level) / length, guess - denoised) for level, guess in guesses[1:order]]
        predicted = plain
        for (ratio, change), weight in zip(earlier, _weights([r for r, _ in earlier], length), strict=True):
            predicted = predicted + change * (length * weight / ratio)
        if step == steps - 1:
            return predicted
        guess = yield from denoise(predicted, following)
        changes = [*earlier, (1.0, guess - denoised)]
        x = plain
        for (ratio, change), weight in zip(changes, _weights([r for r, _ in changes], length), strict=True):
            x = x + change * (length * weight / ratio)
        guesses = [(following, guess), *guesses[: ORDER - 1]]
    return x


def _weights(ratios: list[float], length: float) -> list[float]:
    """The solution of Eq. 8 for a step of that length: one weight for each guess at a ratio of it.

    A single one weighs 1/2, as the paper has it.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi = math.expm1(-length) / -length - 1
    rows, right = [], []
    for power in range(len(ratios)):
        factorial = math.factorial(power + 1)
        rows.append([ratio**power for ratio in ratios])
        right.append(phi * factorial / -length)
        phi = phi / -length - 1 / math.factorial(power + 2)
    solved: list[float] = np.linalg.solve(np.array(rows), np.array(right)).tolist()
    return solved
