"""What a sampler is, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from diffusion_api.engine.samplers.sigmas import NoiseLevels

Steps = Generator[Any, Any, Tensor]
"""Asks of the model; the generator's value is the tensor that comes of it."""

Pair = Generator[Any, Any, tuple[Tensor, Tensor]]


class Denoise(Protocol):
    """The model's guess of the clean picture in ``x`` at noise level ``sigma``."""

    @property
    def levels(self) -> NoiseLevels:
        """The noise levels that the model was trained at."""

    def __call__(self, x: Tensor, sigma: float, timestep: float | None = None) -> Steps:
        """Ask; the value is a tensor like ``x``. The model is told the timestep of ``sigma``, or another one."""

    def both(self, x: Tensor, sigma: float) -> Pair:
        """Ask; the values are the guess, and the one that the negative prompt alone would give."""


class Noise(Protocol):
    """Standard normal noise like ``x`` from the image's own source."""

    def __call__(self, sigma: float, following: float) -> Tensor:
        """What is added on the way from one level to another; only Brownian noise depends on them."""


@dataclass(frozen=True)
class Options:
    """What a caller may change of a sampler.

    ``eta``: the share of noise that is drawn anew; None is the sampler's own. ``s_churn``, ``s_tmin``, ``s_tmax``: how much
    noise is added before a step and between which levels; ``s_noise``: its standard deviation, in every sampler that adds some
    (Karras et al. 2022, algorithm 2).
    """

    eta: float | None = None
    s_churn: float = 0
    s_tmin: float = 0
    s_tmax: float = math.inf
    s_noise: float = 1

    def eta_or(self, own: float) -> float:
        """The caller's eta, or the sampler's own."""
        return own if self.eta is None else self.eta


Sampler = Callable[[Denoise, Tensor, Sequence[float], Noise, Options], Steps]
"""See :mod:`diffusion_api.engine.samplers`."""


def ancestral(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """The level to step down to, and the noise that leads from there up to ``following`` (Song et al. 2021, Eq. 16)."""
    up = min(following, eta * following * math.sqrt(max(1 - (following / sigma) ** 2, 0)))
    return math.sqrt(following**2 - up**2), up


def churned(x: Tensor, sigma: float, steps: int, noise: Noise, options: Options) -> tuple[Tensor, float]:
    """``x`` at a higher level than ``sigma``, and that level (Karras et al. 2022, algorithm 2, lines 4 to 6).

    Noise is drawn at every step of a sampler that churns, also outside of ``s_tmin`` to ``s_tmax``, as k-diffusion does.
    """
    if options.s_churn == 0:
        return x, sigma
    drawn = noise(sigma, sigma) * options.s_noise
    if not options.s_tmin <= sigma <= options.s_tmax:
        return x, sigma
    raised = sigma * (1 + min(options.s_churn / steps, math.sqrt(2) - 1))
    return x + drawn * math.sqrt(raised**2 - sigma**2), raised
