"""Samplers and schedules by every name they go by. What they compute is in :mod:`diffusion_api.engine.samplers`.

Names and aliases: ``a1111.md`` 3.1 and 3.2 of the project's specification, and k-diffusion's function names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffusion_api.errors import UnknownSampler


@dataclass(frozen=True)
class Schedule:
    """A noise spacing. ``label`` is A1111's, for infotext."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """An algorithm. ``automatic`` is the schedule A1111 would choose; ``evaluations`` are model calls for each step."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()
    automatic: str = "default"
    evaluations: int = 1
    ignores_omitted_schedule: bool = False


SCHEDULES = (
    Schedule("default", "Uniform", ("uniform",)),
    Schedule("karras", "Karras"),
)

SAMPLERS = (
    Sampler("euler", "Euler", ("k_euler",)),
    Sampler("euler_a", "Euler a", ("k_euler_a", "k_euler_ancestral", "euler_ancestral")),
    Sampler("heun", "Heun", ("k_heun",), evaluations=2),
    Sampler("dpmpp_2m", "DPM++ 2M", ("k_dpmpp_2m",), automatic="karras"),
    Sampler("ddim", "DDIM", ignores_omitted_schedule=True),
)

Row = TypeVar("Row", Sampler, Schedule)

AUTOMATIC = "automatic"
OMITTED_SCHEDULE = "karras"


def sampling_methods() -> list[str]:
    """Names for ``sampler_name`` as users see them; the default sampler's combined name comes with it."""
    names = [s.label for s in SAMPLERS]
    names.insert(names.index("DPM++ 2M") + 1, "DPM++ 2M Karras")
    return names


def scheduler_types() -> list[str]:
    """Names for ``scheduler_type``."""
    return [*(s.name for s in SCHEDULES), AUTOMATIC]


def sampler(name: str) -> Sampler:
    """The row with that canonical name."""
    return next(s for s in SAMPLERS if s.name == name)


def schedule(name: str) -> Schedule:
    """The row with that canonical name."""
    return next(s for s in SCHEDULES if s.name == name)


def resolve(sampler_name: str, scheduler_type: str | None) -> tuple[Sampler, Schedule]:
    """The rows that a caller means. A schedule at the end of the sampler's name beats ``scheduler_type``.

    Raises UnknownSampler with the choices; nothing is ever replaced silently.
    """
    found, suffix = _sampler(sampler_name)
    asked = _schedule(scheduler_type, found)
    return found, suffix or asked


def _sampler(name: str) -> tuple[Sampler, Schedule | None]:
    """A sampler, and the schedule that its name ends with."""
    wanted = _key(name)
    if found := _find(SAMPLERS, wanted):
        return found, None
    for row in SCHEDULES:
        for ending in _keys(row):
            if wanted.endswith(" " + ending) and (found := _find(SAMPLERS, wanted.removesuffix(" " + ending))):
                return found, row
    choices = ", ".join(sampling_methods())
    raise UnknownSampler(f"sampler_name {name!r} is not known; one of {choices}", field="sampler_name")


def _schedule(name: str | None, sampler: Sampler) -> Schedule:
    if name is None:
        return schedule("default" if sampler.ignores_omitted_schedule else OMITTED_SCHEDULE)
    if _key(name) == AUTOMATIC:
        return schedule(sampler.automatic)
    if found := _find(SCHEDULES, _key(name)):
        return found
    choices = ", ".join(scheduler_types())
    raise UnknownSampler(f"scheduler_type {name!r} is not known; one of {choices}", field="scheduler_type")


def _key(name: str) -> str:
    return " ".join(name.lower().split())


def _keys(row: Sampler | Schedule) -> tuple[str, ...]:
    return (_key(row.label), row.name, *row.aliases)


def _find(rows: Sequence[Row], key: str) -> Row | None:
    return next((row for row in rows if key in _keys(row)), None)
