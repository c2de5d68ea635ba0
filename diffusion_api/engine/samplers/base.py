"""What a sampler is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from torch import Tensor

Steps = Generator[Any, Any, Tensor]
"""Asks of the model; the generator's value is the tensor that comes of it."""


class Denoise(Protocol):
    """The model's guess of the clean picture in ``x`` at noise level ``sigma``."""

    def __call__(self, x: Tensor, sigma: float) -> Steps:
        """Ask; the value is a tensor like ``x``."""


Noise = Callable[[], Tensor]
"""Draws standard normal noise like ``x`` from the image's own generator."""

Sampler = Callable[[Denoise, Tensor, Sequence[float], Noise], Steps]
"""See :mod:`diffusion_api.engine.samplers`."""
