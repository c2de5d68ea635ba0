"""Noise levels: a model's own table of sigmas, and the spacings over it (``a1111.md`` 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v"]
"""What a model predicts: the noise, or v (Salimans and Ho 2022, arXiv:2202.00512)."""


class NoiseLevels:
    """The discrete noise levels of a trained model.

    ``sigmas`` rise, (timesteps,) float64: sqrt((1 - alpha_bar) / alpha_bar). ``prediction`` is what the model says of a level.
    """

    def __init__(self, betas: Tensor, *, prediction: Prediction = "epsilon") -> None:
        alphas = torch.cumprod(1 - betas.double(), 0)
        self.sigmas = ((1 - alphas) / alphas).sqrt()
        self.prediction = prediction
        self._logs = self.sigmas.log()

    @classmethod
    def from_config(cls, config: dict[str, object]) -> NoiseLevels:
        """From a diffusers scheduler config. Raises ValueError for a beta schedule that is not known."""
        start, end = float(str(config.get("beta_start", 0.0001))), float(str(config.get("beta_end", 0.02)))
        count, kind = int(str(config.get("num_train_timesteps", 1000))), config.get("beta_schedule", "linear")
        if kind == "scaled_linear":
            return cls(torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2)
        if kind == "linear":
            return cls(torch.linspace(start, end, count, dtype=torch.float32))
        raise ValueError(f"beta_schedule {kind!r} is not known; one of scaled_linear, linear")

    def sigma(self, timestep: float) -> float:
        """The level at a fractional timestep, log-linear between the trained ones."""
        low = min(int(timestep), len(self._logs) - 2)
        part = timestep - low
        return math.exp((1 - part) * self._logs[low].item() + part * self._logs[low + 1].item())

    def timestep(self, sigma: float) -> float:
        """The fractional timestep of a level; the inverse of :meth:`sigma`, clamped to the trained range."""
        log = math.log(sigma)
        high = int(torch.searchsorted(self._logs, torch.tensor(log, dtype=torch.float64)).clamp(1, len(self._logs) - 1))
        below, above = self._logs[high - 1].item(), self._logs[high].item()
        part = min(max((log - below) / (above - below), 0.0), 1.0)
        return high - 1 + part

    def estimate(self, x: Tensor, sigma: float, prediction: Tensor) -> Tensor:
        """The clean picture in ``x`` = clean + sigma * noise, from the model's raw prediction for x / sqrt(sigma^2 + 1)."""
        if self.prediction == "v":
            return x / (sigma**2 + 1) - prediction * (sigma / math.sqrt(sigma**2 + 1))
        return x - prediction * sigma

    @property
    def lowest(self) -> float:
        """The smallest trained level."""
        return self.sigmas[0].item()

    @property
    def highest(self) -> float:
        """The largest trained level."""
        return self.sigmas[-1].item()


def default(levels: NoiseLevels, steps: int) -> list[float]:
    """Timesteps evenly spaced from last to first, both used (A1111's Uniform)."""
    last = len(levels.sigmas) - 1
    times = [last - last * i / (steps - 1) for i in range(steps)] if steps > 1 else [float(last)]
    return [*map(levels.sigma, times), 0.0]


def karras(levels: NoiseLevels, steps: int) -> list[float]:
    """Karras et al. 2022, Eq. 5, rho 7."""
    rho = 7.0
    top, bottom = levels.highest ** (1 / rho), levels.lowest ** (1 / rho)
    return [*((top + (bottom - top) * (i / max(steps - 1, 1))) ** rho for i in range(steps)), 0.0]


def ddim_default(levels: NoiseLevels, steps: int) -> list[float]:
    """A1111's DDIM spacing: every (1000 // steps)-th timestep, one up, down to the model's lowest level."""
    count = len(levels.sigmas)
    times = sorted({min(t + 1, count - 1) for t in range(0, count, max(count // steps, 1))}, reverse=True)
    return [*(levels.sigmas[t].item() for t in times), levels.lowest]


SCHEDULES: dict[str, Callable[[NoiseLevels, int], list[float]]] = {"default": default, "karras": karras}
"""By the names of :mod:`diffusion_api.catalog.samplers`."""


def spacing(levels: NoiseLevels, sampler: str, schedule: str, steps: int) -> list[float]:
    """The sigmas that ``steps`` steps of this sampler go through, highest first."""
    if sampler == "ddim" and schedule == "default":
        return ddim_default(levels, steps)
    return SCHEDULES[schedule](levels, steps)
