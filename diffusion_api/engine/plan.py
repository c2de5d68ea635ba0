"""Request → the passes that make its picture. Pure, torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion_api.catalog import samplers
from diffusion_api.schema.request import Request


@dataclass(frozen=True)
class Pass:
    """One sampling pass, and its share of the job's progress (0 to 1). What is the same in all is in ``request``."""

    request: Request
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
    phase: str = "generation"
    begins: float = 0.0
    ends: float = 1.0

    @property
    def evaluations(self) -> int:
        """Model calls the pass is expected to need; a corrector's last step needs one fewer."""
        row = samplers.sampler(self.sampler)
        return row.adaptive or max(self.steps * row.evaluations - (row.evaluations - 1), 1)


def plan(request: Request) -> tuple[Pass, ...]:
    """The passes, in order; each makes one picture."""
    return tuple(
        Pass(
            request=request,
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
            begins=number / request.count,
            ends=(number + 1) / request.count,
        )
        for number, (seed, variation_seed) in enumerate(zip(request.seeds, request.variation_seeds, strict=True))
    )
