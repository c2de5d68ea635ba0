"""Euler, Euler ancestral, Heun and DDIM: first-order steps along dx/dsigma = (x - denoised) / sigma, and one corrector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Steps


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Karras et al. 2022, algorithm 1 with Euler steps and no churn."""
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        x = x + (x - denoised) * ((following - sigma) / sigma)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Euler down to a lower level than asked, then fresh noise back up to it (k-diffusion's ancestral step, eta 1)."""
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        down = (following**2 - up**2) ** 0.5
        x = x + (x - denoised) * ((down - sigma) / sigma)
        if following > 0:
            x = x + noise() * up
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Karras et al. 2022, algorithm 1: Euler as predictor, the mean of both slopes as corrector; plain Euler into 0."""
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        slope = (x - denoised) / sigma
        predicted = x + slope * (following - sigma)
        if following > 0:
            denoised = yield from denoise(predicted, following)
            slope = (slope + (predicted - denoised) / following) / 2
            predicted = x + slope * (following - sigma)
        x = predicted
    return x


def ddim(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Song et al. 2021 (arXiv:2010.02502), Eq. 12 with eta 0.

    Divided by sqrt(alpha_bar), a DDIM step is an Euler step over sigma. What makes it DDIM is its spacing, which ends at the
    model's lowest noise level and not at 0.
    """
    return (yield from euler(denoise, x, sigmas, noise))
