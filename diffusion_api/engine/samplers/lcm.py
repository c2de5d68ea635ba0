"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Options, Steps
from diffusion_api.engine.samplers.sigmas import distilled

DATA_DEVIATION = 0.5
TIMESTEP_SCALING = 10


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Algorithm 1: the guess of the clean picture, made noisy again for the next step.

    The model is told the nearest of the 50 timesteps that such models are distilled at, and its guess is held to what
    stands at the boundary (section 4.1).
    """
    levels = distilled(denoise.levels)
    stride = len(denoise.levels.sigmas) // len(levels.sigmas)
    for sigma, following in pairwise(sigmas):
        timestep = round(levels.timestep(sigma)) * stride + stride - 1
        denoised = yield from denoise(x, sigma, timestep)
        scaled = (timestep * TIMESTEP_SCALING) ** 2
        whole = scaled + DATA_DEVIATION**2
        x = denoised * (scaled / whole) ** 0.5 + x * (DATA_DEVIATION**2 / whole)
        if following > 0:
            x = x + noise(sigma, following) * (options.s_noise * following)
    return x
