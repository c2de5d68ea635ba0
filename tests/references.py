"""References for samplers: k-diffusion's own, loaded alone, and for what it lacks ones written from the papers.

Those run in other terms than ours: alpha_bar instead of sigma, integrals instead of solved weights, k-diffusion's parts.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Guess = Callable[[Tensor, float], Tensor]
"""The clean picture in ``x`` at a level."""

SPACED = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) ** -1 - 1)
"""The levels of Stable Diffusion."""


class Noises:
    """The same noise in the same order for whoever asks."""

    def __init__(self, like: Tensor, seed: int = 7) -> None:
        self._like, self._generator = like, torch.Generator().manual_seed(seed)

    def __call__(self, *_: object) -> Tensor:
        return torch.randn(self._like.shape, generator=self._generator, dtype=self._like.dtype)


@cache
def k_diffusion() -> Any:
    """Its module ``sampling``; the package itself would import what only its training needs."""
    found = importlib.util.find_spec("k_diffusion")
    assert found
    assert found.submodule_search_locations
    package, parts = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations)
    package.utils = parts  # type: ignore[attr-defined]
    parts.append_dims = _append_dims  # type: ignore[attr-defined]
    names = {"k_diffusion": package, "k_diffusion.utils": parts}
    sys.modules |= names
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in (*names, "k_diffusion.sampling"):
            sys.modules.pop(name, None)


def _append_dims(x: Tensor, dimensions: int) -> Tensor:
    return x.reshape(*x.shape, *[1] * (dimensions - x.ndim))


def _bars(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """alpha_bar before and after each step."""
    return list(pairwise(1 / (1 + sigma**2) for sigma in sigmas))


def ddim(
    guess: Guess,
    unguided: Guess,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noises,
    eta: float = 0,
    *,
    cfgpp: bool = False,
) -> Tensor:
    """Song et al. 2021, Eqs. 12 and 16; CFG++ with another noise for the direction."""
    x = x / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, (now, then) in zip(sigmas, _bars(sigmas), strict=False):
        direction = unguided if cfgpp else guess
        clean, away = guess(x / now**0.5, sigma), direction(x / now**0.5, sigma)
        eps = (x - now**0.5 * away) / (1 - now) ** 0.5
        deviation = eta * ((1 - then) / (1 - now)) ** 0.5 * (1 - now / then) ** 0.5
        x = then**0.5 * clean + (1 - then - deviation**2) ** 0.5 * eps + deviation * noise()
    return x * math.sqrt(1 + sigmas[-1] ** 2)


def ddim_cfgpp(
    guess: Guess, unguided: Guess, x: Tensor, sigmas: Sequence[float], noise: Noises, eta: float = 0
) -> Tensor:
    return ddim(guess, unguided, x, sigmas, noise, eta, cfgpp=True)


def plms(guess: Guess, unguided: Guess, x: Tensor, sigmas: Sequence[float], noise: Noises) -> Tensor:
    """Liu et al. 2022, Eq. 11 as the step, Eq. 12 for its noise; the first one by improved Euler."""
    x = x / math.sqrt(1 + sigmas[0] ** 2)
    known: list[Tensor] = []

    def eps(x: Tensor, sigma: float, bar: float) -> Tensor:
        return (x - bar**0.5 * guess(x / bar**0.5, sigma)) / (1 - bar) ** 0.5

    def moved(x: Tensor, eps: Tensor, now: float, then: float) -> Tensor:
        share = (then - now) / (now**0.5 * (((1 - then) * now) ** 0.5 + ((1 - now) * then) ** 0.5))
        return (then / now) ** 0.5 * x - share * eps

    for (sigma, following), (now, then) in zip(pairwise(sigmas), _bars(sigmas), strict=True):
        known.append(eps(x, sigma, now))
        if len(known) == 1:
            ahead = moved(x, known[0], now, then)
            mixed = known[0] if following == 0 else (known[0] + eps(ahead, following, then)) / 2
        elif len(known) == 2:
            mixed = (3 * known[-1] - known[-2]) / 2
        elif len(known) == 3:
            mixed = (23 * known[-1] - 16 * known[-2] + 5 * known[-3]) / 12
        else:
            mixed = (55 * known[-1] - 59 * known[-2] + 37 * known[-3] - 9 * known[-4]) / 24
        x = moved(x, mixed, now, then)
    return x * math.sqrt(1 + sigmas[-1] ** 2)


def unipc(guess: Guess, unguided: Guess, x: Tensor, sigmas: Sequence[float], noise: Noises) -> Tensor:
    """Zhao et al. 2023: the integral over the step of the polynomial through the guesses; half of the step for two of them.

    Predicted from three guesses or fewer, corrected with one more.
    """
    steps = len(sigmas) - 1
    guesses = [(sigmas[0], guess(x, sigmas[0]))]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        if following == 0:
            return guesses[-1][1]
        length = math.log(sigma / following)
        kernel = length * np.exp(-length * (1 - (nodes + 1) / 2)) * weights / 2

        def integral(
            points: list[tuple[float, Tensor]],
            start: Tensor = x,
            sigma: float = sigma,
            following: float = following,
            length: float = length,
            kernel: Any = kernel,
        ) -> Tensor:
            places = [math.log(sigma / level) / length for level, _ in points]
            result = start * (following / sigma)
            if len(points) == 2:
                other = next(i for i, place in enumerate(places) if abs(place) > 1e-9)
                base = points[1 - other][1]
                slope = (points[other][1] - base) / places[other]
                return result - math.expm1(-length) * base + length / 2 * slope
            for i, (_, value) in enumerate(points):
                basis = np.ones_like(nodes)
                for j, place in enumerate(places):
                    if j != i:
                        basis = basis * ((nodes + 1) / 2 - place) / (places[i] - place)
                result = result + float((kernel * basis).sum()) * value
            return result

        order = min(3, step + 1, steps - step)
        used = guesses[-order:]
        ahead = integral(used)
        if step == steps - 1:
            return ahead
        arrived = (following, guess(ahead, following))
        x = integral([*used, arrived])
        guesses.append(arrived)
    raise AssertionError("no steps")


def lcm(guess: Guess, unguided: Guess, x: Tensor, sigmas: Sequence[float], noise: Noises) -> Tensor:
    """Luo et al. 2023, algorithm 1, with the boundary functions of its section 4.1 at the nearest of 50 timesteps."""
    for sigma, following in pairwise(sigmas):
        time = min(range(19, 1000, 20), key=lambda t: abs(math.log(SPACED[t] / sigma)))
        skip, out = 0.25 / ((10 * time) ** 2 + 0.25), 10 * time / math.sqrt((10 * time) ** 2 + 0.25)
        clean = skip * x + out * guess(x, sigma)
        bar = 1 / (1 + following**2)
        x = (bar**0.5 * clean + (1 - bar) ** 0.5 * noise()) / bar**0.5
    return x


def restart(guess: Guess, unguided: Guess, x: Tensor, sigmas: Sequence[float], noise: Noises) -> Tensor:
    """Xu et al. 2023, algorithm 1, put together from k-diffusion's Heun and Karras spacing."""
    theirs = k_diffusion()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return guess(x, sigma.item())

    def heun(x: Tensor, levels: Tensor) -> Tensor:
        result: Tensor = theirs.sample_heun(model, x, levels, disable=True)
        return result

    steps = len(sigmas) - 1
    if steps < 20:
        return heun(x, torch.tensor(sigmas, dtype=x.dtype))
    again, times = (9, 1) if steps < 36 else (steps // 4, 2)
    down = theirs.get_sigmas_karras(steps - again * times, sigmas[-2], sigmas[0]).double()
    bottom, top = (down - 0.1).abs().argmin(), (down - 2).abs().argmin()
    x = heun(x, down[: bottom + 1])
    for _ in range(times):
        x = x + noise() * (down[top] ** 2 - down[bottom] ** 2).sqrt()
        x = heun(x, theirs.get_sigmas_karras(again + 1, down[bottom].item(), down[top].item())[:-1].double())
    return heun(x, down[bottom:])


PAPERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim, "ddim_cfgpp": ddim_cfgpp, "plms": plms, "unipc": unipc, "lcm": lcm, "restart": restart,
}  # fmt: skip
"""By our names."""
