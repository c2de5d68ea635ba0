"""Noise levels and their spacings, against published numbers."""

from __future__ import annotations

import itertools

import pytest

from diffusion_api.engine.samplers.sigmas import NoiseLevels, spacing

CONFIG: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = NoiseLevels.from_config(CONFIG)
COMBINATIONS = [(s, k) for s in ("euler", "ddim") for k in ("default", "karras")]


def test_the_levels_of_stable_diffusion_are_the_published_ones() -> None:
    assert LEVELS.lowest == pytest.approx(0.029167, abs=1e-6)
    assert LEVELS.highest == pytest.approx(14.6146, abs=1e-4)


def test_timestep_is_the_inverse_of_sigma() -> None:
    for timestep in (0.0, 0.25, 1.0, 17.5, 500.0, 998.75, 999.0):
        assert LEVELS.timestep(LEVELS.sigma(timestep)) == pytest.approx(timestep, abs=1e-6)


def test_levels_beyond_the_trained_ones_are_clamped() -> None:
    assert LEVELS.timestep(0.001) == 0
    assert LEVELS.timestep(1000.0) == 999


@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_every_spacing_falls_strictly(sampler: str, schedule: str) -> None:
    for steps in (1, 2, 3, 10, 20, 30, 50, 150):
        sigmas = spacing(LEVELS, sampler, schedule, steps)
        assert all(a > b for a, b in itertools.pairwise(sigmas)), (steps, sigmas)
        assert sigmas[0] <= LEVELS.highest * (1 + 1e-12)


@pytest.mark.parametrize("schedule", ["default", "karras"])
def test_a_spacing_begins_at_the_highest_level_and_ends_with_nothing(schedule: str) -> None:
    sigmas = spacing(LEVELS, "euler", schedule, 20)
    assert len(sigmas) == 21
    assert sigmas[0] == pytest.approx(LEVELS.highest)
    assert sigmas[-2] == pytest.approx(LEVELS.lowest)
    assert sigmas[-1] == 0


def test_karras_is_linear_in_the_seventh_root() -> None:
    roots = [sigma ** (1 / 7) for sigma in spacing(LEVELS, "euler", "karras", 12)[:-1]]
    gaps = [a - b for a, b in itertools.pairwise(roots)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))


def test_default_is_linear_in_time() -> None:
    times = [LEVELS.timestep(sigma) for sigma in spacing(LEVELS, "euler", "default", 12)[:-1]]
    gaps = [a - b for a, b in itertools.pairwise(times)]
    assert gaps == pytest.approx([999 / 11] * 11, abs=1e-4)


def test_ddim_takes_every_nth_timestep_one_up_and_ends_at_the_lowest_level() -> None:
    sigmas = spacing(LEVELS, "ddim", "default", 20)
    assert [round(LEVELS.timestep(s)) for s in sigmas[:-1]] == list(range(951, 0, -50))
    assert sigmas[-1] == LEVELS.lowest


def test_an_unknown_beta_schedule_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'cosine' is not known; one of scaled_linear, linear"):
        NoiseLevels.from_config({"beta_schedule": "cosine"})
