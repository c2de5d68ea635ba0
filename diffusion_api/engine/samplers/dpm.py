"""DPM-Solver (Lu et al. 2022, arXiv:2206.00927) and Karras et al.'s relative of it, in t = -log(sigma)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_api.engine.samplers.base import Denoise, Noise, Options, Steps, ancestral, churned


def dpm_2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """Midpoint steps: the slope at the geometric mean of both levels counts; plain Euler into 0."""
    for sigma, following in pairwise(sigmas):
        x, raised = churned(x, sigma, len(sigmas) - 1, noise, options)
        x = yield from _midpoint_step(denoise, x, raised, following)
    return x


def dpm_2_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """A midpoint step down to a lower level than asked, then fresh noise back up to it."""
    eta = options.eta_or(1)
    for sigma, following in pairwise(sigmas):
        down, up = ancestral(sigma, following, eta)
        x = yield from _midpoint_step(denoise, x, sigma, down)
        if down > 0:
            x = x + noise(sigma, following) * (options.s_noise * up)
    return x


def _midpoint_step(denoise: Denoise, x: Tensor, sigma: float, following: float) -> Steps:
    denoised = yield from denoise(x, sigma)
    slope = (x - denoised) / sigma
    if following > 0:
        middle = math.sqrt(sigma * following)
        between = x + slope * (middle - sigma)
        denoised = yield from denoise(between, middle)
        slope = (between - denoised) / middle
    return x + slope * (following - sigma)


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """DPM-Solver-fast (section 3.4): third-order steps of equal length, and lower orders at the end.

    Each of ``sigmas`` but the last pays for one evaluation; else only the first and the last, which is above 0, count.
    """
    eta, calls = options.eta_or(1), len(sigmas) - 1
    count = calls // 3 + 1
    begin, end = -math.log(sigmas[0]), -math.log(sigmas[-1])
    times = [begin + (end - begin) * i / count for i in range(count + 1)]
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    for order, (t, following) in zip(orders, pairwise(times), strict=True):
        down, up = _ancestral_times(t, following, end, eta)
        eps = yield from _eps(denoise, x, t)
        if order == 1:
            stepped = _first(x, eps, t, down)
        else:
            ratio = 1 / order
            between = yield from _eps(denoise, _first(x, eps, t, t + ratio * (down - t)), t + ratio * (down - t))
            if order == 2:
                stepped = _second(x, eps, between, t, down, ratio)
            else:
                stepped = yield from _third(denoise, x, eps, between, t, down)
        x = stepped
        if eta:
            x = x + noise(math.exp(-t), math.exp(-following)) * (options.s_noise * up)
    return x


TOLERANCE, ABSOLUTE = 0.05, 0.0078
FIRST_STEP, ACCEPTED = 0.05, 0.81
CLOSE = 1e-5


def dpm_adaptive(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, options: Options) -> Steps:
    """DPM-Solver-23 (appendix C): steps as long as the second and the third order agree.

    Only the first and the last of ``sigmas`` count, which is above 0. Numbers that overflowed end it, as no step would ever
    be accepted.
    """
    eta = options.eta_or(1)
    t, end = -math.log(sigmas[0]), -math.log(sigmas[-1])
    before, length = x, FIRST_STEP
    while t < end - CLOSE:
        following = min(end, t + length)
        down, up = _ancestral_times(t, following, end, eta)
        eps = yield from _eps(denoise, x, t)
        third = t + (down - t) / 3
        between = yield from _eps(denoise, _first(x, eps, t, third), third)
        low = _second(x, eps, between, t, down, 1 / 3)
        high = yield from _third(denoise, x, eps, between, t, down)
        allowed = (low.abs().maximum(before.abs()) * TOLERANCE).clamp(min=ABSOLUTE)
        error = ((low - high) / allowed).square().mean().sqrt().item()
        if not math.isfinite(error):
            return high
        factor = 1 + math.atan((error + 1e-8) ** (-1 / (1.5 if eta else 3)) - 1)
        if factor >= ACCEPTED:
            before, x = low, high
            if eta:
                x = x + noise(math.exp(-t), math.exp(-following)) * (options.s_noise * up)
            t = following
        length *= factor
    return x


def _ancestral_times(t: float, following: float, end: float, eta: float) -> tuple[float, float]:
    """The time to step to, never beyond ``end``, and the noise that leads back from there."""
    if not eta:
        return following, 0.0
    sigma = math.exp(-following)
    down = min(end, -math.log(ancestral(math.exp(-t), sigma, eta)[0]))
    return down, math.sqrt(max(sigma**2 - math.exp(-2 * down), 0))


def _eps(denoise: Denoise, x: Tensor, t: float) -> Steps:
    sigma = math.exp(-t)
    denoised = yield from denoise(x, sigma)
    return (x - denoised) / sigma


def _first(x: Tensor, eps: Tensor, t: float, to: float) -> Tensor:
    return x - eps * (math.exp(-to) * math.expm1(to - t))


def _second(x: Tensor, eps: Tensor, between: Tensor, t: float, to: float, ratio: float) -> Tensor:
    """``between`` is the noise predicted at that share of the way."""
    return _first(x, eps, t, to) - (between - eps) * (math.exp(-to) * math.expm1(to - t) / (2 * ratio))


def _third(denoise: Denoise, x: Tensor, eps: Tensor, between: Tensor, t: float, to: float) -> Steps:
    """``between`` is the noise predicted after a third of the way; asks once more, after two thirds."""
    step = to - t
    later = t + step * 2 / 3
    bend = (between - eps) * (2 * math.exp(-later) * (math.expm1(later - t) / (later - t) - 1))
    last = yield from _eps(denoise, _first(x, eps, t, later) - bend, later)
    return _first(x, eps, t, to) - (last - eps) * (1.5 * math.exp(-to) * (math.expm1(step) / step - 1))
