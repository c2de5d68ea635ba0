"""Noise levels and their spacings, against published numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from references import k_diffusion

from diffusion_api.catalog import samplers
from diffusion_api.engine.samplers.sigmas import Ends, NoiseLevels, Span, beta_quantile, distilled, spacing

CONFIG: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = NoiseLevels.from_config(CONFIG)
SCHEDULES = [row.name for row in samplers.SCHEDULES]
COMBINATIONS = [(s, k) for s in ("euler", "ddim", "unipc", "lcm", "dpm_2", "dpm_fast") for k in SCHEDULES]


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
        assert sigmas[0] <= LEVELS.highest * 1.0001
        assert sigmas[-1] >= 0


@pytest.mark.parametrize("schedule", ["default", "karras", "exponential", "polyexponential", "normal", "beta"])
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


@pytest.mark.parametrize("schedule", ["karras", "exponential", "polyexponential"])
@pytest.mark.parametrize("rho", [0, 3.0])
def test_spacings_are_those_of_k_diffusion(schedule: str, rho: float) -> None:
    function = getattr(k_diffusion(), f"get_sigmas_{schedule}")
    asked = {} if not rho or schedule == "exponential" else {"rho": rho}
    theirs = function(20, 0.1, 10.0, **asked).tolist()
    ours = spacing(LEVELS, "euler", schedule, 20, Ends(sigma_min=0.1, sigma_max=10, rho=rho))
    assert ours == pytest.approx(theirs, rel=1e-5)


def times(schedule: str, steps: int, sampler: str = "euler") -> list[float]:
    return [LEVELS.timestep(sigma) for sigma in spacing(LEVELS, sampler, schedule, steps) if sigma > 0]


def test_sgm_uniform_leaves_the_last_timestep_out() -> None:
    assert times("sgm_uniform", 20) == pytest.approx([999 * (1 - i / 20) for i in range(20)], abs=1e-6)


def test_normal_keeps_to_the_ends_it_is_given() -> None:
    sigmas = spacing(LEVELS, "euler", "normal", 20, Ends(sigma_min=0.1, sigma_max=10))
    assert (sigmas[0], sigmas[-2]) == pytest.approx((10, 0.1))
    assert spacing(LEVELS, "euler", "normal", 20) == pytest.approx(spacing(LEVELS, "euler", "default", 20))


def test_simple_takes_every_nth_timestep_from_the_last() -> None:
    assert times("simple", 20) == pytest.approx(range(999, 0, -50), abs=1e-6)
    assert len(times("simple", 1500)) == 1000
    assert times("simple", 30) == pytest.approx([999 - int(i * 1000 / 30) for i in range(30)], abs=1e-6)


def test_ddim_and_leading_spacing_differ_in_what_the_division_leaves() -> None:
    assert times("ddim", 20) == pytest.approx(range(951, 0, -50), abs=1e-6)
    assert times("pndm", 20) == pytest.approx(range(951, 0, -50), abs=1e-6)
    assert times("ddim", 30) == pytest.approx(range(991, 0, -33), abs=1e-6)
    assert times("pndm", 30) == pytest.approx(range(958, 0, -33), abs=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_cfgpp", "plms"])
@pytest.mark.parametrize("schedule", ["default", "ddim", "pndm"])
def test_samplers_of_trained_timesteps_end_at_the_lowest(sampler: str, schedule: str) -> None:
    assert times(schedule, 20, sampler) == pytest.approx([*range(951, 0, -50), 0], abs=1e-6)


@pytest.mark.parametrize("sampler", ["unipc", "dpm_fast", "dpm_adaptive"])
def test_samplers_of_both_ends_run_evenly_in_time_to_the_lowest(sampler: str) -> None:
    assert times("default", 20, sampler) == pytest.approx([999 * (1 - i / 20) for i in range(21)], abs=1e-6)
    assert times("default", 1, sampler) == pytest.approx([999, 0], abs=1e-6)


def test_kl_optimal_is_linear_in_the_arc_tangent_and_ends_at_the_lowest() -> None:
    sigmas = torch.tensor(spacing(LEVELS, "euler", "kl_optimal", 20))
    assert sigmas[[0, -1]].tolist() == pytest.approx([LEVELS.highest, LEVELS.lowest])
    gaps = sigmas.atan().diff()
    assert gaps.tolist() == pytest.approx([gaps[0].item()] * 20, rel=1e-4)


def test_align_your_steps_is_the_published_table_for_ten_steps_and_another_one_for_sdxl() -> None:
    table = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029, 0]
    assert spacing(LEVELS, "euler", "align_your_steps", 11) == pytest.approx(table)
    between = spacing(LEVELS, "euler", "align_your_steps", 21)
    assert between[:21:2] == pytest.approx(table[:-1])
    assert between[1] == pytest.approx((14.615 * 6.475) ** 0.5)
    xl = NoiseLevels(LEVELS.sigmas, xl=True)
    assert spacing(xl, "euler", "align_your_steps", 11)[1:3] == pytest.approx([6.315, 3.771])


def test_beta_takes_quantiles() -> None:
    from scipy.stats import beta

    shares = [i / 50 for i in range(51)]
    assert [beta_quantile(share) for share in shares] == pytest.approx(beta.ppf(shares, 0.6, 0.6), abs=1e-12)
    ends = LEVELS.lowest, LEVELS.highest
    assert spacing(LEVELS, "euler", "beta", 3)[:3] == pytest.approx([ends[1], sum(ends) / 2, ends[0]])


@pytest.mark.parametrize("sampler", ["dpm_2", "dpm_2_a", "dpmpp_3m_sde"])
def test_the_next_to_last_level_is_left_out_where_a1111_does(sampler: str) -> None:
    longer = spacing(LEVELS, "euler", "karras", 21)
    assert spacing(LEVELS, sampler, "karras", 20) == [*longer[:-2], 0]


def test_a_caller_may_leave_the_next_to_last_level_out() -> None:
    longer = spacing(LEVELS, "euler", "karras", 21)
    discarding = Ends(discard_next_to_last_sigma=True)
    assert spacing(LEVELS, "euler", "karras", 20, discarding) == [*longer[:-2], 0]
    assert spacing(LEVELS, "dpm_2", "karras", 20, discarding) == [*longer[:-2], 0]
    assert spacing(LEVELS, "ddim", "default", 20, discarding) == spacing(LEVELS, "ddim", "default", 20)


def test_consistency_models_have_fifty_levels() -> None:
    few = distilled(LEVELS)
    assert [round(LEVELS.timestep(s)) for s in few.sigmas.tolist()] == list(range(19, 1000, 20))
    assert times("default", 4, "lcm")[0] == pytest.approx(999, abs=1e-6)
    assert times("default", 4, "lcm")[-1] == pytest.approx(19, abs=1e-6)
    assert spacing(LEVELS, "lcm", "karras", 4)[3] == pytest.approx(few.lowest)


def test_a_span_is_walked_in_time() -> None:
    assert Span(LEVELS, LEVELS.sigma(100), LEVELS.sigma(900)).over_time([0, 0.5, 1]) == pytest.approx(
        [LEVELS.sigma(900), LEVELS.sigma(500), LEVELS.sigma(100)]
    )


def test_an_unknown_beta_schedule_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'cosine' is not known; one of scaled_linear, linear"):
        NoiseLevels.from_config({"beta_schedule": "cosine"})
