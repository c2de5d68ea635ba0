"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Steps


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2M), algorithm 2, with lambda = -log(sigma); first order at the start and into 0."""
    previous: tuple[Tensor, float] | None = None
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        if following == 0:
            return denoised
        step = math.log(sigma / following)
        if previous is None:
            estimate = denoised
        else:
            older, older_step = previous
            half = step / (2 * older_step)
            estimate = denoised * (1 + half) - older * half
        x = x * (following / sigma) - estimate * math.expm1(-step)
        previous = denoised, step
    return x
