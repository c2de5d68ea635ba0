"""Samplers and schedules by every name they go by."""

from __future__ import annotations

import pytest

from diffusion_api.catalog import samplers
from diffusion_api.errors import UnknownSampler


@pytest.mark.parametrize(
    ("sampler_name", "scheduler_type", "sampler", "schedule"),
    [
        # A schedule that is left out is karras, except for DDIM, which has its own spacing.
        ("Euler", None, "euler", "karras"),
        ("Euler a", None, "euler_a", "karras"),
        ("Heun", None, "heun", "karras"),
        ("DPM++ 2M", None, "dpmpp_2m", "karras"),
        ("DDIM", None, "ddim", "default"),
        # One that is given counts.
        ("Euler", "default", "euler", "default"),
        ("Euler", "uniform", "euler", "default"),
        ("Euler", "Uniform", "euler", "default"),
        ("Euler", "karras", "euler", "karras"),
        ("DPM++ 2M", "default", "dpmpp_2m", "default"),
        ("DDIM", "karras", "ddim", "karras"),
        # Automatic is what A1111 would choose.
        ("Euler", "automatic", "euler", "default"),
        ("Euler a", "Automatic", "euler_a", "default"),
        ("DPM++ 2M", "automatic", "dpmpp_2m", "karras"),
        ("DDIM", "automatic", "ddim", "default"),
        # One at the end of the sampler's name beats all.
        ("DPM++ 2M Karras", None, "dpmpp_2m", "karras"),
        ("DPM++ 2M Karras", "default", "dpmpp_2m", "karras"),
        ("DPM++ 2M Uniform", "karras", "dpmpp_2m", "default"),
        ("Euler a Karras", "automatic", "euler_a", "karras"),
        ("DDIM Karras", None, "ddim", "karras"),
        ("k_euler_a karras", "default", "euler_a", "karras"),
        # Other programs' names, any case, any white space.
        ("k_euler", None, "euler", "karras"),
        ("k_euler_a", None, "euler_a", "karras"),
        ("k_euler_ancestral", None, "euler_a", "karras"),
        ("euler_ancestral", None, "euler_a", "karras"),
        ("k_heun", None, "heun", "karras"),
        ("k_dpmpp_2m", None, "dpmpp_2m", "karras"),
        ("dpmpp_2m", None, "dpmpp_2m", "karras"),
        ("EULER A", "KARRAS", "euler_a", "karras"),
        ("  dpm++   2m  karras ", " Default ", "dpmpp_2m", "karras"),
        ("ddim", "default", "ddim", "default"),
        # A1111's old combined names, and names that it gets wrong.
        ("DPM++ 2M SDE Karras", None, "dpmpp_2m_sde", "karras"),
        ("DPM++ 2M SDE Exponential", "karras", "dpmpp_2m_sde", "exponential"),
        ("DPM++ 2M SDE Heun Karras", None, "dpmpp_2m_sde_heun", "karras"),
        ("DPM++ 2M SDE Heun", "automatic", "dpmpp_2m_sde_heun", "exponential"),
        ("DPM++ 3M SDE Exponential", None, "dpmpp_3m_sde", "exponential"),
        ("DPM++ 2S a Karras", None, "dpmpp_2s_a", "karras"),
        ("DPM2 a Karras", "automatic", "dpm_2_a", "karras"),
        ("LMS Karras", None, "lms", "karras"),
        ("Euler SGM Uniform", "karras", "euler", "sgm_uniform"),
        ("Euler SGMUniform", None, "euler", "sgm_uniform"),
        ("Euler KL Optimal", None, "euler", "kl_optimal"),
        ("Euler Align Your Steps", None, "euler", "align_your_steps"),
        ("Euler DDIM", None, "euler", "ddim"),
        ("DPM++ SDE Automatic", "default", "dpmpp_sde", "karras"),
        # What A1111 would choose, and what is left out.
        ("DPM++ SDE", "automatic", "dpmpp_sde", "karras"),
        ("DPM++ 3M SDE", "automatic", "dpmpp_3m_sde", "exponential"),
        ("Restart", "automatic", "restart", "karras"),
        ("LMS", "automatic", "lms", "default"),
        ("LCM", "automatic", "lcm", "default"),
        ("PLMS", None, "plms", "default"),
        ("UniPC", None, "unipc", "default"),
        ("DDIM CFG++", None, "ddim_cfgpp", "default"),
        ("LCM", None, "lcm", "karras"),
        ("UniPC karras", None, "unipc", "karras"),
        # Of other programs.
        ("plms", "pndm", "plms", "pndm"),
        ("k-lms", None, "lms", "karras"),
        ("uni_pc", None, "unipc", "default"),
        ("k_dpm_ad", None, "dpm_adaptive", "karras"),
        ("DDIM", "ddim_uniform", "ddim", "ddim"),
    ],
)
def test_a_name_means(sampler_name: str, scheduler_type: str | None, sampler: str, schedule: str) -> None:
    found = samplers.resolve(sampler_name, scheduler_type)
    assert (found[0].name, found[1].name) == (sampler, schedule)


@pytest.mark.parametrize("row", samplers.SAMPLERS, ids=lambda row: row.name)
def test_every_name_of_a_sampler_is_known_in_any_case(row: samplers.Sampler) -> None:
    for name in (row.name, row.label, *row.aliases):
        for written in (name, name.upper(), name.lower(), f" {name} "):
            assert samplers.resolve(written, None)[0] is row
            for schedule in samplers.SCHEDULES:
                assert samplers.resolve(f"{written} {schedule.label}", None) == (row, schedule)


@pytest.mark.parametrize("row", samplers.SCHEDULES, ids=lambda row: row.name)
def test_every_name_of_a_schedule_is_known_in_any_case(row: samplers.Schedule) -> None:
    for name in (row.name, row.label, *row.aliases):
        for written in (name, name.upper(), name.lower(), f" {name} "):
            assert samplers.resolve("Euler", written)[1] is row


def test_no_name_has_two_meanings() -> None:
    for rows in (samplers.SAMPLERS, samplers.SCHEDULES):
        names = [name for row in rows for name in {row.name, row.label.lower(), *row.aliases}]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["", " ", "Karras", "Eulerr", "Euler b", "Euler Karras Karras", "EulerKarras", "../x"])
def test_an_unknown_sampler_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UnknownSampler) as caught:
        samplers.resolve(name, None)
    assert caught.value.field == "sampler_name"
    assert repr(name) in str(caught.value)
    for choice in samplers.sampling_methods():
        assert choice in str(caught.value)


@pytest.mark.parametrize("sampler_name", ["Euler", "DPM++ 2M Karras", "DDIM"])
@pytest.mark.parametrize("name", ["", "nope", "karras2"])
def test_an_unknown_schedule_is_refused_with_the_choices(sampler_name: str, name: str) -> None:
    with pytest.raises(UnknownSampler) as caught:
        samplers.resolve(sampler_name, name)
    assert caught.value.field == "scheduler_type"
    assert repr(name) in str(caught.value)
    for choice in samplers.scheduler_types():
        assert choice in str(caught.value)


def test_every_name_that_is_offered_is_known() -> None:
    for name in samplers.sampling_methods():
        for schedule in samplers.scheduler_types():
            samplers.resolve(name, schedule)


def test_the_names_of_the_manual_come_first() -> None:
    assert samplers.sampling_methods()[:16] == [
        "Euler", "Euler a", "Heun", "DPM2", "DPM++ 2S a", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ SDE", "DPM++ SDE Karras",
        "DPM fast", "DPM adaptive", "LMS", "LMS Karras", "DDIM", "PLMS", "UniPC",
    ]  # fmt: skip
    assert samplers.scheduler_types()[:5] == ["default", "karras", "exponential", "ddim", "pndm"]


def test_every_sampler_and_schedule_of_a1111_is_there() -> None:
    labels = {row.label for row in samplers.SAMPLERS}
    assert labels >= {"DPM2 a", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "Restart", "DDIM CFG++", "LCM"}
    assert {row.label for row in samplers.SCHEDULES} >= {
        "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Align Your Steps", "Simple",
        "Normal", "DDIM", "Beta",
    }  # fmt: skip


def test_rows_are_found_by_their_canonical_names() -> None:
    assert [samplers.sampler(row.name) for row in samplers.SAMPLERS] == list(samplers.SAMPLERS)
    assert [samplers.schedule(row.name) for row in samplers.SCHEDULES] == list(samplers.SCHEDULES)
