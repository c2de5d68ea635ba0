"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) and its stochastic forms, with lambda = -log(sigma)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Options, Steps, ancestral


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """DPM-Solver++(2M), algorithm 2; first order at the start and into 0."""
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
        x = _towards(estimate, x, sigma, following)
        previous = denoised, step
    return x


def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """DPM-Solver++(2S), algorithm 1, down to a lower level than asked, then fresh noise back up to it."""
    eta = options.eta_or(1)
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        down, up = ancestral(sigma, following, eta)
        if down == 0:
            x = denoised
        else:
            middle = math.sqrt(sigma * down)
            denoised = yield from denoise(_towards(denoised, x, sigma, middle), middle)
            x = _towards(denoised, x, sigma, down)
        if following > 0:
            x = x + noise(sigma, following) * (options.s_noise * up)
    return x


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """The stochastic form of 2S: both of its steps are ancestral (k-diffusion's DPM++ SDE)."""
    eta = options.eta_or(1)
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        if following == 0:
            return denoised
        middle = math.sqrt(sigma * following)
        down, up = ancestral(sigma, middle, eta)
        between = _towards(denoised, x, sigma, down) + noise(sigma, middle) * (options.s_noise * up)
        denoised = yield from denoise(between, middle)
        down, up = ancestral(sigma, following, eta)
        x = _towards(denoised, x, sigma, down) + noise(sigma, following) * (options.s_noise * up)
    return x


def _towards(denoised: Tensor, x: Tensor, sigma: float, following: float) -> Tensor:
    """The exact step for a guess that does not change on the way."""
    share = following / sigma
    return x * share + denoised * (1 - share)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """SDE-DPM-Solver++(2M) (section 6); the second order counts as at the middle of the step."""
    return (yield from _multistep_sde(denoise, x, sigmas, noise, options, heun=False))


def dpmpp_2m_sde_heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """SDE-DPM-Solver++(2M); the second order is integrated over the step."""
    return (yield from _multistep_sde(denoise, x, sigmas, noise, options, heun=True))


def _multistep_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options, *, heun: bool
) -> Steps:
    eta = options.eta_or(1)
    previous: tuple[Tensor, float] | None = None
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        if following == 0:
            return denoised
        step = math.log(sigma / following)
        x, whole = _sde_step(x, denoised, step, eta)
        if previous is not None:
            older, older_step = previous
            gain = _phi_2(whole) if heun else -math.expm1(-whole) / 2
            x = x + (denoised - older) * (gain * step / older_step)
        x = _sde_noise(x, sigma, following, noise, options)
        previous = denoised, step
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """SDE-DPM-Solver++ of third order from three guesses (k-diffusion's DPM++ 3M SDE); lower orders at the start."""
    eta = options.eta_or(1)
    previous: list[tuple[Tensor, float]] = []
    for sigma, following in pairwise(sigmas):
        denoised = yield from denoise(x, sigma)
        if following == 0:
            return denoised
        step = math.log(sigma / following)
        x, whole = _sde_step(x, denoised, step, eta)
        if previous:
            older, older_step = previous[-1]
            first = (denoised - older) * (step / older_step)
            if len(previous) == 2:
                oldest, oldest_step = previous[0]
                bend = (first - (older - oldest) * (step / oldest_step)) * (step / (older_step + oldest_step))
                first = first + bend * (older_step / step)
                x = x - bend * (_phi_2(whole) / whole - 0.5)
            x = x + first * _phi_2(whole)
        x = _sde_noise(x, sigma, following, noise, options)
        previous = [*previous[-1:], (denoised, step)]
    return x


def _sde_step(x: Tensor, denoised: Tensor, step: float, eta: float) -> tuple[Tensor, float]:
    """The first order of a step, and the length that it counts for with its noise."""
    whole = step * (1 + eta)
    return x * math.exp(-whole) - denoised * math.expm1(-whole), whole


def _sde_noise(x: Tensor, sigma: float, following: float, noise: Noise, options: Options) -> Tensor:
    eta = options.eta_or(1)
    if not eta:
        return x
    spread = math.sqrt(-math.expm1(-2 * eta * math.log(sigma / following)))
    return x + noise(sigma, following) * (options.s_noise * following * spread)


def _phi_2(length: float) -> float:
    return math.expm1(-length) / length + 1
