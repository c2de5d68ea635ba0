"""Request → the passes that make its picture. Pure, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusion_api.catalog import samplers
from diffusion_api.schema.request import Hires, Img2Img, Refiner, Request, Sampling, Txt2Img

MOST_DRAWN = 0.999
"""Of a picture, by the first of several steps: there is always a trace left of it (a1111.md, 5.2)."""


@dataclass(frozen=True)
class Pass:
    """One sampling pass, and its share of the job's progress (0 to 1). What is the same in all is in ``request``.

    ``strength`` None begins with noise. Otherwise a picture is drawn anew by that much: the one that the request brings, or
    the one of the pass before, enlarged by ``upscaler``. ``exact``: in just ``steps`` steps, and not in a share of them.
    ``last``: there is a picture when it is done. ``done`` are the evaluations that a first pass was planned for, from where
    prompt schedules count on (a1111.md, 4.2). ``refiner`` draws the rest of it.
    """

    request: Sampling
    model: str
    prompt: str
    negative_prompt: str
    seed: int
    variation_seed: int | None
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    strength: float | None = None
    exact: bool = False
    upscaler: str | None = None
    last: bool = True
    done: int = 0
    refiner: Refiner | None = None
    phase: str = "generation"
    begins: float = 0.0
    ends: float = 1.0

    @property
    def spaced(self) -> int:
        """Steps that the noise levels are spaced for; the last :attr:`run` of them are run."""
        if self.exact and self.strength:
            return int(self.steps / min(self.strength, MOST_DRAWN))
        return self.steps

    @property
    def run(self) -> int:
        """Steps that are run; 0 when nothing is to be drawn anew (a1111.md, 5.2)."""
        if self.strength is None or (self.exact and self.strength):
            return self.steps
        return 0 if self.exact else int(min(self.strength, MOST_DRAWN) * self.steps) + 1

    @property
    def evaluations(self) -> int:
        """Model calls the pass is expected to need; a corrector's last step needs one fewer."""
        row = samplers.sampler(self.sampler)
        return row.adaptive or max(self.run * row.evaluations - (row.evaluations - 1), 1)


def plan(request: Request) -> tuple[Pass, ...]:
    """The passes, in order; one or two for each picture that a model draws."""
    if not isinstance(request, Sampling):
        return ()
    passes: list[Pass] = []
    for number, (seed, variation_seed) in enumerate(zip(request.seeds, request.variation_seeds, strict=True)):
        first = Pass(
            request=request,
            model=request.model,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            variation_seed=variation_seed,
            width=request.width,
            height=request.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            sampler=request.sampler,
            schedule=request.schedule,
            strength=request.strength if isinstance(request, Img2Img) else None,
            refiner=request.refiner if request.refiner and request.refiner.switch_at < 1 else None,
            begins=number / request.count,
            ends=(number + 1) / request.count,
        )
        passes += _two(first, request.hires) if isinstance(request, Txt2Img) and request.hires else [first]
    return tuple(passes)


def _two(first: Pass, hires: Hires) -> list[Pass]:
    """The pass in two: as it is, and once more at a larger size; as in A1111 only the second one is refined."""
    middle = (first.begins + first.ends) / 2
    return [
        replace(first, last=False, refiner=None, phase="initial generation", ends=middle),
        replace(
            first,
            model=hires.model,
            prompt=hires.prompt,
            negative_prompt=hires.negative_prompt,
            width=hires.width,
            height=hires.height,
            steps=hires.steps,
            sampler=hires.sampler,
            schedule=hires.schedule,
            strength=hires.strength,
            exact=True,
            upscaler=hires.upscaler,
            done=first.steps * samplers.sampler(first.sampler).evaluations,
            phase="upscaling",
            begins=middle,
        ),
    ]
