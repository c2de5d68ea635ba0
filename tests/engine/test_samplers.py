"""Samplers against an exact solution.

For clean data that is normal with mean M and deviation S the best denoiser is known, and the path of the probability-flow
equation too: (x - M) / sqrt(S^2 + sigma^2) is constant. So a sampler's error can be measured and must fall with the order
that its paper proves.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from diffusion_api.catalog import samplers as catalog
from diffusion_api.engine.samplers import SAMPLERS
from diffusion_api.engine.samplers.sigmas import SCHEDULES

MEAN, DEVIATION = 0.7, 0.5
TOP = 10.0


def geometric(steps: int, end: float) -> list[float]:
    return [TOP * (end / TOP) ** (i / steps) for i in range(steps + 1)]


def sample(name: str, sigmas: list[float], x: Tensor, seed: int = 0) -> tuple[Tensor, int]:
    """The sampler's result with the exact denoiser, and how often it asked."""
    generator = torch.Generator().manual_seed(seed)
    asked = 0

    def denoise(x: Tensor, sigma: float) -> Generator[tuple[Tensor, float], Tensor, Tensor]:
        return (yield x, sigma)

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    run = SAMPLERS[name](denoise, x, sigmas, noise)
    answer = None
    try:
        while True:
            latents, sigma = run.send(answer)
            asked += 1
            answer = (DEVIATION**2 * latents + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
    except StopIteration as end:
        return end.value, asked


def error(name: str, steps: int) -> float:
    x = torch.tensor([[[[MEAN + 1.3 * math.hypot(DEVIATION, TOP)]]]], dtype=torch.float64)
    end = 0.05
    result, _ = sample(name, geometric(steps, end), x)
    return abs(result.item() - (MEAN + 1.3 * math.hypot(DEVIATION, end)))


def test_the_catalog_and_the_engine_know_the_same_names() -> None:
    assert set(SAMPLERS) == {s.name for s in catalog.SAMPLERS}
    assert set(SCHEDULES) == {s.name for s in catalog.SCHEDULES}


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_method(name: str, order: int) -> None:
    ratio = error(name, 40) / error(name, 80)
    assert ratio == pytest.approx(2**order, rel=0.2)


def test_higher_orders_are_closer() -> None:
    assert error("heun", 40) < error("euler", 40) / 5
    assert error("dpmpp_2m", 40) < error("euler", 40) / 5


def test_euler_ancestral_draws_from_the_data() -> None:
    start = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * TOP
    result, _ = sample("euler_a", [*geometric(60, 0.05), 0.0], start)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(DEVIATION, abs=0.03)


def test_euler_ancestral_uses_its_noise() -> None:
    x = torch.full((1, 1, 1, 1), 3.0)
    one, _ = sample("euler_a", [*geometric(10, 0.05), 0.0], x, seed=1)
    other, _ = sample("euler_a", [*geometric(10, 0.05), 0.0], x, seed=2)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("row", catalog.SAMPLERS, ids=lambda row: row.name)
def test_the_catalog_tells_how_often_a_sampler_asks(row: catalog.Sampler) -> None:
    _, asked = sample(row.name, [*geometric(9, 0.05), 0.0], torch.ones(1, 1, 1, 1))
    assert asked == 10 * row.evaluations - (row.evaluations - 1)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_last_step_into_zero_is_the_denoised_picture(name: str) -> None:
    result, _ = sample(name, [2.0, 0.0], torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64))
    assert result.item() == pytest.approx((DEVIATION**2 * 1.5 + 4 * MEAN) / (DEVIATION**2 + 4))
