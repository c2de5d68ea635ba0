"""Samplers and schedules by every name they go by. What they compute is in :mod:`diffusion_api.engine.samplers`.

Names and aliases: ``a1111.md`` 3.1 and 3.2 of the project's specification, and k-diffusion's function names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffusion_api.errors import UnknownSampler
from diffusion_api.nearest import hint


@dataclass(frozen=True)
class Schedule:
    """A noise spacing. ``label`` is A1111's, for infotext."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """An algorithm. ``automatic`` is the schedule A1111 would choose; ``evaluations`` are model calls for each step.

    ``timesteps``: starts from noise of variance 1 and, left alone, takes the trained timesteps and ends at the lowest of
    them; an omitted schedule is not karras then. ``ends_only``: of a schedule only the first and the last level count.
    ``brownian``: its noise is one motion over sigma. ``discards_next_to_last``: one level more is computed and left out.
    ``adaptive``: model calls in all, about, where they do not follow from steps. ``distilled``: levels are those of latent
    consistency models. ``guidance_divisor``: what A1111 divides the guidance scale by.
    """

    name: str
    label: str
    aliases: tuple[str, ...] = ()
    automatic: str = "default"
    evaluations: int = 1
    timesteps: bool = False
    ends_only: bool = False
    brownian: bool = False
    discards_next_to_last: bool = False
    adaptive: int = 0
    distilled: bool = False
    guidance_divisor: float = 1


SCHEDULES = (
    Schedule("default", "Uniform", ("uniform",)),
    Schedule("karras", "Karras"),
    Schedule("exponential", "Exponential"),
    Schedule("ddim", "DDIM", ("ddim_uniform",)),
    Schedule("pndm", "PNDM"),
    Schedule("polyexponential", "Polyexponential"),
    Schedule("sgm_uniform", "SGM Uniform", ("sgmuniform",)),
    Schedule("kl_optimal", "KL Optimal"),
    Schedule("align_your_steps", "Align Your Steps"),
    Schedule("simple", "Simple"),
    Schedule("normal", "Normal"),
    Schedule("beta", "Beta"),
)

SAMPLERS = (
    Sampler("euler", "Euler", ("k_euler",)),
    Sampler("euler_a", "Euler a", ("k_euler_a", "k_euler_ancestral", "euler_ancestral")),
    Sampler("heun", "Heun", ("k_heun",), evaluations=2),
    Sampler("dpm_2", "DPM2", ("k_dpm_2",), "karras", 2, discards_next_to_last=True),
    Sampler("dpmpp_2s_a", "DPM++ 2S a", ("k_dpmpp_2s_a", "dpmpp_2s_ancestral"), "karras", 2),
    Sampler("dpmpp_2m", "DPM++ 2M", ("k_dpmpp_2m",), "karras"),
    Sampler("dpmpp_sde", "DPM++ SDE", ("k_dpmpp_sde",), "karras", 2, brownian=True),
    Sampler("dpm_fast", "DPM fast", ("k_dpm_fast",), ends_only=True),
    Sampler("dpm_adaptive", "DPM adaptive", ("k_dpm_ad", "k_dpm_adaptive"), ends_only=True, adaptive=90),
    Sampler("lms", "LMS", ("k_lms", "k-lms")),
    Sampler("ddim", "DDIM", timesteps=True),
    Sampler("plms", "PLMS", ("pndm",), timesteps=True),
    Sampler("unipc", "UniPC", ("uni_pc",), timesteps=True),
    Sampler("dpm_2_a", "DPM2 a", ("k_dpm_2_a", "dpm_2_ancestral"), "karras", 2, discards_next_to_last=True),
    Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", ("k_dpmpp_2m_sde",), "exponential", brownian=True),
    Sampler("dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun", ("k_dpmpp_2m_sde_heun",), "exponential", brownian=True),
    Sampler(
        "dpmpp_3m_sde", "DPM++ 3M SDE", ("k_dpmpp_3m_sde",), "exponential", brownian=True, discards_next_to_last=True
    ),
    Sampler("restart", "Restart", (), "karras", 2),
    Sampler("ddim_cfgpp", "DDIM CFG++", timesteps=True, guidance_divisor=12.5),
    Sampler("lcm", "LCM", ("k_lcm",), distilled=True),
)

Row = TypeVar("Row", Sampler, Schedule)

AUTOMATIC = "automatic"
OMITTED_SCHEDULE = "karras"

COMBINED = {"DPM++ 2M": "DPM++ 2M Karras", "DPM++ SDE": "DPM++ SDE Karras", "LMS": "LMS Karras"}
"""Names of a sampler with its schedule that are offered after the sampler alone."""


def sampling_methods() -> list[str]:
    """Names for ``sampler_name`` as users see them."""
    pairs = ((row.label, COMBINED.get(row.label)) for row in SAMPLERS)
    return [name for pair in pairs for name in pair if name]


def scheduler_types() -> list[str]:
    """Names for ``scheduler_type``."""
    return [*(s.name for s in SCHEDULES), AUTOMATIC]


_SAMPLERS = {row.name: row for row in SAMPLERS}
_SCHEDULES = {row.name: row for row in SCHEDULES}


def sampler(name: str) -> Sampler:
    """The row with that canonical name."""
    return _SAMPLERS[name]


def schedule(name: str) -> Schedule:
    """The row with that canonical name."""
    return _SCHEDULES[name]


def resolve(sampler_name: str, scheduler_type: str | None) -> tuple[Sampler, Schedule]:
    """The rows that a caller means. A schedule at the end of the sampler's name beats ``scheduler_type``.

    Raises UnknownSampler with the choices; nothing is ever replaced silently.
    """
    found, suffix = _sampler(sampler_name)
    asked = _schedule(scheduler_type, found)
    return found, _schedule(suffix, found) if suffix else asked


def _sampler(name: str) -> tuple[Sampler, str | None]:
    """A sampler, and the name of the schedule that its name ends with."""
    wanted = _key(name)
    if found := _find(SAMPLERS, wanted):
        return found, None
    for ending in (AUTOMATIC, *(key for row in SCHEDULES for key in _keys(row))):
        if wanted.endswith(" " + ending) and (found := _find(SAMPLERS, wanted.removesuffix(" " + ending))):
            return found, ending
    known = [row.label for row in SAMPLERS]
    raise _unknown(
        "sampler_name", name, sampling_methods(), [*known, *(f"{s} {row.label}" for s in known for row in SCHEDULES)]
    )


def _schedule(name: str | None, sampler: Sampler) -> Schedule:
    if name is None:
        return schedule("default" if sampler.timesteps else OMITTED_SCHEDULE)
    if _key(name) == AUTOMATIC:
        return schedule(sampler.automatic)
    if found := _find(SCHEDULES, _key(name)):
        return found
    raise _unknown("scheduler_type", name, scheduler_types(), scheduler_types())


def _unknown(field: str, name: str, choices: Sequence[str], near: Sequence[str]) -> UnknownSampler:
    meant, among = hint(name, near), ", ".join(choices)
    choice = f"{meant} One of {among}" if meant else f"; one of {among}"
    return UnknownSampler(f"{field} {name!r} is not known{choice}", field=field)


def _key(name: str) -> str:
    return " ".join(name.lower().split())


def _keys(row: Sampler | Schedule) -> tuple[str, ...]:
    return (_key(row.label), row.name, *row.aliases)


def _find(rows: Sequence[Row], key: str) -> Row | None:
    return next((row for row in rows if key in _keys(row)), None)
