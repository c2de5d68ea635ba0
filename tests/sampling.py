"""Samplers driven by hand, and by k-diffusion, on a model whose best guess is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from references import Guess, Noises, k_diffusion
from torch import Tensor

from diffusion_api.engine.samplers import SAMPLERS, Options
from diffusion_api.engine.samplers.sigmas import NoiseLevels

CONFIG: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = NoiseLevels.from_config(CONFIG)
"""Those of Stable Diffusion."""

STANDARD = Options()


def two_clouds(x: Tensor, sigma: float) -> Tensor:
    """The best guess where each number is -1 or 1, give or take 0.3: not linear, and its slope is steep in between."""
    spread, variance = 0.09, 0.09 + sigma**2
    return (spread * x + sigma**2 * torch.tanh(x / variance)) / variance


class Model:
    """Answers the samplers' questions; counts them."""

    def __init__(self, guess: Guess, unguided: Guess | None = None, levels: NoiseLevels = LEVELS) -> None:
        self._guess, self._unguided, self.levels = guess, unguided or guess, levels
        self.asked: list[tuple[float, float | None]] = []

    def __call__(self, x: Tensor, sigma: float, timestep: float | None = None) -> Generator[Any, Any, Tensor]:
        self.asked.append((sigma, timestep))
        yield
        return self._guess(x, sigma)

    def both(self, x: Tensor, sigma: float) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
        self.asked.append((sigma, None))
        yield
        return self._guess(x, sigma), self._unguided(x, sigma)


def sample(
    name: str, model: Model, x: Tensor, sigmas: Sequence[float], options: Options = STANDARD, seed: int = 7
) -> Tensor:
    """What the sampler makes of ``x``."""
    steps = SAMPLERS[name](model, x, sigmas, Noises(x, seed), options)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: Tensor = end.value
        return result


THEIRS = {
    "euler": "sample_euler",
    "euler_a": "sample_euler_ancestral",
    "heun": "sample_heun",
    "dpm_2": "sample_dpm_2",
    "dpm_2_a": "sample_dpm_2_ancestral",
    "lms": "sample_lms",
    "dpm_fast": "sample_dpm_fast",
    "dpm_adaptive": "sample_dpm_adaptive",
    "dpmpp_2s_a": "sample_dpmpp_2s_ancestral",
    "dpmpp_sde": "sample_dpmpp_sde",
    "dpmpp_2m": "sample_dpmpp_2m",
    "dpmpp_2m_sde": "sample_dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "sample_dpmpp_2m_sde",
    "dpmpp_3m_sde": "sample_dpmpp_3m_sde",
}
"""k-diffusion's functions by our names."""

STOCHASTIC = {n for n in THEIRS if n.endswith("_a") or "sde" in n or n in ("dpm_fast", "dpm_adaptive")}
"""Those that are given noise."""


def theirs(
    name: str,
    guess: Guess,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """What k-diffusion makes of ``x``, with the same noise as :func:`sample` or another one."""
    function = getattr(k_diffusion(), THEIRS[name])

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return guess(x, sigma.flatten()[0].item())

    if name in STOCHASTIC:
        options["noise_sampler"] = noise or Noises(x)
    if name == "dpmpp_2m_sde_heun":
        options["solver_type"] = "heun"
    levels: tuple[Any, ...] = (torch.tensor(sigmas, dtype=x.dtype),)
    if name in ("dpm_fast", "dpm_adaptive"):
        levels = (sigmas[-1], sigmas[0])
        x = x.float()  # it makes its times in single precision
    if name == "dpm_fast":
        levels = (*levels, len(sigmas) - 1)
    result: Tensor = function(model, x, *levels, disable=True, **options)
    return result


def psnr(one: Tensor, other: Tensor, peak: float = 2.0) -> float:
    """Decibels; 2 is the distance of the darkest from the brightest value."""
    return 10 * math.log10(peak**2 / max((one - other).double().square().mean().item(), 1e-30))
