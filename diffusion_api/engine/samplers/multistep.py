"""Linear multistep samplers: slopes of earlier steps are used again (LMS, PLMS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Options, Steps

ORDER = 4


def lms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Adams and Bashforth's method for steps of any length, up to the fourth order."""
    slopes: list[Tensor] = []
    for step, (sigma, _) in enumerate(pairwise(sigmas)):
        denoised = yield from denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: ORDER - 1]]
        for back, slope in enumerate(slopes):
            x = x + slope * _weight(sigmas, step, back, len(slopes))
    return x


def _weight(sigmas: Sequence[float], step: int, back: int, order: int) -> float:
    """The integral over the step of Lagrange's polynomial that is 1 at the slope so far back and 0 at the others.

    Gauss's two points are exact for polynomials up to the third degree.
    """
    middle, half = (sigmas[step] + sigmas[step + 1]) / 2, (sigmas[step + 1] - sigmas[step]) / 2

    def basis(at: float) -> float:
        own = sigmas[step - back]
        others = [sigmas[step - other] for other in range(order) if other != back]
        return math.prod((at - other) / (own - other) for other in others)

    return half * (basis(middle - half / math.sqrt(3)) + basis(middle + half / math.sqrt(3)))


WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
"""Adams and Bashforth's, for steps of equal length."""


def plms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Liu et al. 2022 (arXiv:2202.09778), Eqs. 9 to 12: DDIM steps with the noise of up to four steps; the first asks twice."""
    slopes: list[Tensor] = []
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: ORDER - 1]]
        slope = slopes[0]
        if len(slopes) > 1:
            slope = sum(
                (older * weight for older, weight in zip(slopes[1:], WEIGHTS[len(slopes)][1:], strict=True)),
                slope * WEIGHTS[len(slopes)][0],
            )
        elif following > 0:
            predicted = x + slope * (following - sigma)
            denoised = yield from denoise(predicted, following)
            slope = (slope + (predicted - denoised) / following) / 2
        x = x + slope * (following - sigma)
    return x
