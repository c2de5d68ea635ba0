"""One job as a generator that asks for model evaluations. Guidance and conditioning live here.

The job yields :class:`Evaluate` and is sent one raw prediction for each conditioning, or :class:`Run` and is sent the
work's value. What it never does is touch the model itself: who answers may answer several jobs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_api.engine.base import Finished, Pixels
from diffusion_api.engine.plan import Pass, plan
from diffusion_api.engine.samplers import SAMPLERS
from diffusion_api.engine.samplers.sigmas import NoiseLevels, spacing
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.request import Request

Report = Callable[[Progress], None]


class Lane(Protocol):
    """A loaded model of some family: how it encodes words, predicts noise and decodes latents."""

    @property
    def levels(self) -> NoiseLevels:
        """The noise levels that the model was trained at."""

    @property
    def model_hash(self) -> str | None:
        """The first 10 hex digits of the checkpoint's SHA-256, None for a folder."""

    def encode(self, prompts: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Conditionings of equal length, (1, tokens, width) each."""

    def predict(self, latents: Tensor, timestep: float, conditionings: Tensor) -> Tensor:
        """Epsilon for (rows, 4, h, w) latents of unit variance at one timestep; (rows, tokens, width) conditionings."""

    def decode(self, latents: Tensor) -> Pixels:
        """(1, 4, h, w) clean latents → a picture of 8 times that size."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Shape of the latents of a picture of that size in pixels."""

    @property
    def device(self) -> torch.device:
        """Where latents live."""


@dataclass(frozen=True)
class Evaluate:
    """Please: the model's raw prediction for these latents, once for each conditioning; (conditionings, c, h, w)."""

    lane: Lane
    latents: Tensor
    timestep: float
    conditionings: tuple[Tensor, ...]


@dataclass(frozen=True)
class Run:
    """Please: anything else that needs the device."""

    work: Callable[[], Any]


Asks = Generator[Evaluate | Run, Any, Any]


def job(request: Request, *, load: Callable[[str], Lane], memory: Callable[[], float], report: Report) -> Asks:
    """The whole of one job; its value is Finished."""
    before = memory()
    report(Progress(state=State.LOADING, phase="loading"))
    lane: Lane = yield Run(lambda: load(request.model))
    images: list[Pixels] = []
    for stage in plan(request):
        report(_progress(stage, 0))
        latents = yield from denoised(lane, stage, report)
        images.append((yield Run(partial(lane.decode, latents))))
    return Finished(
        images=tuple(images),
        seeds=request.seeds,
        model_hash=lane.model_hash,
        memory_before_mb=before,
        memory_after_mb=memory(),
    )


def denoised(lane: Lane, stage: Pass, report: Report) -> Generator[Evaluate | Run, Any, Tensor]:
    """One sampling pass: noise from the image's own generator, then the sampler; clean latents."""
    guided = stage.guidance_scale != 1
    prompts = (stage.negative_prompt, stage.prompt) if guided else (stage.prompt,)
    conditionings: tuple[Tensor, ...] = yield Run(lambda: lane.encode(prompts))
    generator = torch.Generator("cpu").manual_seed(stage.seed)
    shape = lane.latent_shape(stage.width, stage.height)

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(lane.device)

    evaluations = 0

    def denoise(x: Tensor, sigma: float) -> Generator[Evaluate, Tensor, Tensor]:
        nonlocal evaluations
        scaled = x * (1 / math.sqrt(sigma**2 + 1))
        predicted = yield Evaluate(lane, scaled, lane.levels.timestep(sigma), conditionings)
        evaluations += 1
        report(_progress(stage, evaluations))
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + (with_prompt - without) * stage.guidance_scale
        return x - predicted * sigma

    sigmas = spacing(lane.levels, stage.sampler, stage.schedule, stage.steps)
    start = math.sqrt(1 + sigmas[0] ** 2) if stage.sampler == "ddim" else sigmas[0]
    x: Tensor = yield from SAMPLERS[stage.sampler](denoise, noise() * start, sigmas, noise)
    return x * (1 / math.sqrt(1 + sigmas[-1] ** 2))


def _progress(stage: Pass, evaluations: int) -> Progress:
    share = min(evaluations / stage.evaluations, 1.0)
    return Progress(
        state=State.PROCESSING,
        fraction=stage.begins + (stage.ends - stage.begins) * share,
        phase=stage.phase,
        step=min(math.ceil(share * stage.steps), stage.steps),
        steps=stage.steps,
    )


def to_pixels(decoded: Tensor) -> Pixels:
    """(1, 3, h, w) in -1 to 1 → (h, w, 3) uint8, rounded to nearest."""
    levels = decoded[0].float().add(1).mul(127.5).round_().clamp_(0, 255)
    return np.ascontiguousarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
