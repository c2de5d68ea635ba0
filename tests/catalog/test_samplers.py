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


def test_rows_are_found_by_their_canonical_names() -> None:
    assert [samplers.sampler(row.name) for row in samplers.SAMPLERS] == list(samplers.SAMPLERS)
    assert [samplers.schedule(row.name) for row in samplers.SCHEDULES] == list(samplers.SCHEDULES)
