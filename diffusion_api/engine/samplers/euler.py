"""Samplers of one step at a time along dx/dsigma = (x - denoised) / sigma: Euler, Heun, DDIM, and Restart over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Options, Steps, ancestral, churned
from diffusion_api.engine.samplers.sigmas import karras_ramp


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Karras et al. 2022, algorithm 2 without its second order."""
    for sigma, following in pairwise(sigmas):
        x, raised = churned(x, sigma, len(sigmas) - 1, noise, options)
        denoised = yield from denoise(x, raised)
        x = x + (x - denoised) * ((following - raised) / raised)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Euler down to a lower level than asked, then fresh noise back up to it."""
    eta = options.eta_or(1)
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        down, up = ancestral(sigma, following, eta)
        x = x + (x - denoised) * ((down - sigma) / sigma)
        if following > 0:
            x = x + noise(sigma, following) * (options.s_noise * up)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Karras et al. 2022, algorithm 2: Euler as predictor, the mean of both slopes as corrector; plain Euler into 0."""
    for sigma, following in pairwise(sigmas):
        x, raised = churned(x, sigma, len(sigmas) - 1, noise, options)
        x = yield from _heun_step(denoise, x, raised, following)
    return x


def _heun_step(denoise: Denoise, x: Tensor, sigma: float, following: float) -> Steps:
    denoised = yield from denoise(x, sigma)
    slope = (x - denoised) / sigma
    predicted = x + slope * (following - sigma)
    if following > 0:
        denoised = yield from denoise(predicted, following)
        slope = (slope + (predicted - denoised) / following) / 2
        predicted = x + slope * (following - sigma)
    return predicted


def ddim(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Song et al. 2021 (arXiv:2010.02502), Eq. 12.

    Divided by sqrt(alpha_bar), a DDIM step is an ancestral Euler step over sigma. What makes it DDIM is its spacing, which
    ends at the model's lowest noise level and not at 0, and an eta of 0.
    """
    eta = options.eta_or(0)
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        x = _ddim_step(denoised, (x - denoised) / sigma, sigma, following, eta, noise)
    return x


def ddim_cfgpp(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2): DDIM that goes on along what is noise without guidance."""
    eta = options.eta_or(0)
    for sigma, following in pairwise(sigmas):
        denoised, unguided = yield from denoise.both(x, sigma)
        x = _ddim_step(denoised, (x - unguided) / sigma, sigma, following, eta, noise)
    return x


def _ddim_step(denoised: Tensor, direction: Tensor, sigma: float, following: float, eta: float, noise: Noise) -> Tensor:
    down, up = ancestral(sigma, following, eta)
    x = denoised + direction * down
    return x + noise(sigma, following) * up if eta else x


def restart(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Xu et al. 2023 (arXiv:2306.14878), algorithm 1, with Heun steps and A1111's choice of what is done again.

    From 20 steps on, some of them go from 2 down to 0.1 again, after noise has led back up; below, this is Heun.
    """
    last = math.inf
    for sigma, following in restarted(sigmas):
        if sigma > last:
            x = x + noise(last, sigma) * (options.s_noise * math.sqrt(sigma**2 - last**2))
        x = yield from _heun_step(denoise, x, sigma, following)
        last = following
    return x


RESTART_LOW, RESTART_HIGH = 0.1, 2.0


def restarted(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """The steps of Restart, as many as those of ``sigmas``: a Karras spacing of fewer, and the ones that are done again."""
    steps = len(sigmas) - 1
    if steps < 20:
        return list(pairwise(sigmas))
    again, times = (9, 1) if steps < 36 else (steps // 4, 2)
    down = [*karras_ramp(sigmas[-2], sigmas[0], steps - again * times), 0.0]
    bottom, top = (min(range(len(down)), key=lambda i: abs(down[i] - level)) for level in (RESTART_LOW, RESTART_HIGH))
    forth = list(pairwise(down))
    if top == bottom:
        return forth
    between = karras_ramp(down[bottom], down[top], again + 1)[1:-1]
    return [*forth[:bottom], *list(pairwise([down[top], *between, down[bottom]])) * times, *forth[bottom:]]
