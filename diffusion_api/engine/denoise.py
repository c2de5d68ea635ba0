"""One job as a generator that asks for model evaluations. Guidance and conditioning live here.

The job yields :class:`Evaluate` and is sent one raw prediction for each conditioning, or :class:`Run` and is sent the
work's value. What it never does is touch the model itself: who answers may answer several jobs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor

from diffusion_api.catalog import samplers
from diffusion_api.engine import text
from diffusion_api.engine.base import Embeddings, Preview, Stop, StopAsked
from diffusion_api.engine.loras import Patches
from diffusion_api.engine.noise import SOURCES, streams
from diffusion_api.engine.pixels import previewed
from diffusion_api.engine.plan import Pass
from diffusion_api.engine.samplers import SAMPLERS, Options
from diffusion_api.engine.samplers.brownian import Brownian
from diffusion_api.engine.samplers.sigmas import Ends, NoiseLevels, spacing
from diffusion_api.engine.text import Conditioning
from diffusion_api.prompt import Part, parse, parse_negative
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.request import Caption, Embed, Emphasis

Report = Callable[[Progress | Preview], None]


class Loaded(Protocol):
    """A model in memory, of whatever family."""

    @property
    def patches(self) -> Patches:
        """What stands in place of the model's own weights."""

    @property
    def words(self) -> Mapping[str, text.Words]:
        """Its text encoders' words, by part."""


class Lane(Loaded, Protocol):
    """A loaded model of some family: how it encodes words, predicts noise and decodes latents."""

    @property
    def levels(self) -> NoiseLevels:
        """The noise levels that the model was trained at."""

    def encode(
        self, texts: tuple[str, ...], *, negative: bool = False, clip_skip: int = 1, emphasis: Emphasis = "original"
    ) -> tuple[Conditioning, ...]:
        """Conditionings of equal length, of the texts that one prompt has over its steps.

        ``clip_skip`` counts the text encoder's layers from the last one, 1; one that has fewer gives its first.
        """

    def blank(self, width: int, height: int) -> Tensor | None:
        """What :meth:`masked` gives for a picture that is masked everywhere."""

    def masked(self, pixels: Tensor, mask: Tensor) -> Tensor | None:
        """What an inpainting model reads of a picture, (1, 3, h, w), -1 to 1, that is to be drawn anew where the mask,
        (1, 1, h, w), is 1, and not where it is 0: (1, n, h/8, w/8). None for any other model.
        """

    def predict(
        self, latents: Tensor, timestep: float, conditionings: Sequence[Conditioning], extra: Tensor | None = None
    ) -> Tensor:
        """The raw prediction, as ``levels.prediction`` says, for (rows, c, h, w) latents of unit variance at one timestep.

        A conditioning for each row; ``extra``, (1, n, h, w), is what an inpainting model reads beside the latents.
        """

    def latents_of(self, pixels: Tensor) -> Tensor:
        """(1, 3, h, w), -1 to 1, sides multiples of 8 → the latents that decode to about that."""

    def decode(self, latents: Tensor, *, precise: bool = False) -> Tensor:
        """(1, c, h, w) clean latents → (1, 3, 8h, 8w), -1 to 1; ``precise``: computed in float32."""

    def wrap(self, edges: bool) -> None:
        """Have the edges of pictures fit each other from now on, or not."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Shape of the latents of a picture of that size in pixels."""

    @property
    def device(self) -> torch.device:
        """Where latents live."""


@dataclass(frozen=True)
class Painted:
    """A whole picture: ``values`` are (1, 3, height, width), -1 to 1; ``infotext`` holds fields by A1111's keys.

    ``broken_off`` is the step at which it was broken off, None for a finished one.
    """

    values: Tensor
    broken_off: int | None = None
    warnings: tuple[str, ...] = ()
    infotext: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Painter(Loaded, Protocol):
    """A loaded model of a family that has no lane: it makes each picture whole, and alone."""

    def paint(self, stage: Pass, stepped: Callable[[float], bool]) -> Painted | None:
        """The picture of a pass. ``stepped`` is told after each step how much is done, 0 to 1, and says whether that is
        to be all; None when it is and there is nothing to show. Raises InvalidRequest, and what ``stepped`` raises.
        """


@runtime_checkable
class Teller(Loaded, Protocol):
    """A loaded model that tells of pictures."""

    def caption(self, picture: Image, asked: Caption, stepped: Callable[[float], bool]) -> str | None:
        """Words for a picture of the size that was asked for. ``stepped`` as in :meth:`Painter.paint`; None when it ends it."""

    def embeddings(self, picture: Image, asked: Embed) -> Embeddings:
        """Such a picture in numbers."""


class Point(StrEnum):
    """What a job needs the device for."""

    LOAD = "load"
    ENCODE = "encode"
    EVALUATE = "evaluate"
    DECODE = "decode"
    PAINT = "paint"
    """All of them."""
    OTHER = "other"


@dataclass(frozen=True)
class Evaluate:
    """Please: the model's raw prediction for these latents, once for each conditioning; (conditionings, c, h, w)."""

    lane: Lane
    latents: Tensor
    timestep: float
    conditionings: tuple[Conditioning, ...]
    extra: Tensor | None = None
    point: Point = field(default=Point.EVALUATE, init=False)


@dataclass(frozen=True)
class Run:
    """Please: anything else that needs the device. It may be run again when memory runs out in it."""

    work: Callable[[], Any]
    point: Point = Point.OTHER


Asks = Generator[Evaluate | Run, Any, Any]


@dataclass(frozen=True)
class Schedule:
    """What a text is at each evaluation: conditionings of equal length, each with the last one at which it holds."""

    lasts: tuple[int, ...]
    conditionings: tuple[Conditioning, ...]

    def at(self, evaluation: int) -> Conditioning:
        """Evaluations count from 0 and steps from 1, so that the first text holds once more than its number says: A1111's way.

        Its way too: beyond the last one the first text comes back.
        """
        pairs = zip(self.lasts, self.conditionings, strict=True)
        return next((conditioning for last, conditioning in pairs if evaluation <= last), self.conditionings[0])


@dataclass(frozen=True)
class Predicted:
    """The prediction of the negative prompt alone, and what leads from it to that of each prompt, with the prompt's weight."""

    unguided: Tensor
    directions: tuple[tuple[Tensor, float], ...] = ()

    def guided(self, scale: float) -> Tensor:
        """The prediction with so much guidance; 1 is that of the prompts as they are."""
        prediction = self.unguided
        for direction, weight in self.directions:
            prediction = prediction + direction * (weight * scale)
        return prediction


@dataclass(frozen=True)
class Guidance:
    """The prompts joined by AND, each with its weight, and the negative one; None where it would change nothing."""

    prompts: tuple[Schedule, ...]
    weights: tuple[float, ...]
    negative: Schedule | None
    scale: float

    def predicted(
        self, evaluation: int, evaluate: Callable[[tuple[Conditioning, ...]], Evaluate]
    ) -> Generator[Evaluate, Tensor, Predicted]:
        """The predictions for one evaluation, all the same where there is no negative prompt.

        A negative prompt of another length than the prompts is asked for apart.
        """
        conditionings = text.as_long([prompt.at(evaluation) for prompt in self.prompts])
        if self.negative is None:
            prediction = yield evaluate(conditionings)
            return Predicted(prediction)
        negative = self.negative.at(evaluation)
        if negative.hidden.shape == conditionings[0].hidden.shape:
            both = yield evaluate((negative, *conditionings))
            without, predictions = both[:1], both[1:]
        else:
            without = yield evaluate((negative,))
            predictions = yield evaluate(conditionings)
        return Predicted(
            without, tuple((each - without, weight) for each, weight in zip(predictions, self.weights, strict=True))
        )


def rescaled(x: Tensor, sigma: float, guided: Tensor, plain: Tensor, share: float) -> Tensor:
    """The guided estimate of the picture in ``x``, brought towards the spread of the plain one (Lin et al. 2024,
    arXiv:2305.08891, 3.4).

    The spread is that of v, which the paper's model predicts; scaling epsilon would leave noise in the picture.
    """
    middle = x / (sigma**2 + 1)  # v is the distance from it, in units that do not matter here
    wide, narrow = middle - guided, middle - plain
    return middle - wide * (share * (narrow.std() / wide.std()) + 1 - share)


def guided(lane: Lane, stage: Pass) -> Generator[Run, Any, Guidance]:
    """The words of a pass, encoded for all of its evaluations."""
    row = samplers.sampler(stage.sampler)
    steps = stage.steps * row.evaluations
    scale = stage.guidance_scale / row.guidance_divisor

    def encoded(part: Part, *, negative: bool = False) -> Generator[Run, Any, Schedule]:
        lasts, texts = zip(*part.schedule(steps, stage.done), strict=True)
        request = stage.request
        work = partial(lane.encode, texts, negative=negative, clip_skip=request.clip_skip, emphasis=request.emphasis)
        return Schedule(lasts, (yield Run(work, Point.ENCODE)))

    parts = parse(stage.prompt).parts
    weights = tuple(part.weight for part in parts)
    negative = None
    if len(parts) > 1 or weights[0] * scale != 1 or row.guidance_divisor != 1:
        negative = yield from encoded(parse_negative(stage.negative_prompt), negative=True)
    prompts = []
    for part in parts:
        prompts.append((yield from encoded(part)))
    return Guidance(tuple(prompts), weights, negative, scale)


class _Enough(Exception):
    """Unwinds the sampler of a job that was told to stop with its picture as it is."""

    def __init__(self, estimate: Tensor, step: int) -> None:
        super().__init__()
        self.estimate, self.step = estimate, step


@dataclass(frozen=True)
class Start:
    """Latents that a pass begins with, (1, c, h, w).

    ``noise`` scales the noise that is added. ``mask``, (1, 1, h, w), is 1 where they are drawn anew, and ``extra`` what an
    inpainting model reads of them.
    """

    latents: Tensor
    noise: float = 1.0
    mask: Tensor | None = None
    extra: Tensor | None = None

    def kept(self, latents: Tensor) -> Tensor:
        """Other latents where these are drawn anew, and these elsewhere."""
        return latents if self.mask is None else self.mask * latents + (1 - self.mask) * self.latents


@dataclass
class Seat:
    """Where the model of a pass is held, and how the one is loaded that refines it.

    Whoever else holds on to a model keeps it in memory when the refiner takes its place.
    """

    lane: Lane
    refine: Callable[[], Generator[Run, Any, Lane]] | None = None


@dataclass
class _Denoise:
    """What the sampler of a pass asks; see :class:`diffusion_api.engine.samplers.base.Denoise`."""

    seat: Seat
    stage: Pass
    guidance: Guidance
    extra: Tensor | None
    start: Start | None
    sigmas: Sequence[float]
    report: Report
    stop: StopAsked
    evaluations: int = 0
    share: float = 0
    shown: int = 0

    @property
    def levels(self) -> NoiseLevels:
        return self.seat.lane.levels

    def __call__(self, x: Tensor, sigma: float, timestep: float | None = None) -> Generator[Any, Any, Tensor]:
        return (yield from self._asked(x, sigma, timestep))[0]

    def both(self, x: Tensor, sigma: float) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
        estimate, predicted = yield from self._asked(x, sigma, None)
        return estimate, self.levels.estimate(x, sigma, predicted.unguided)

    def _asked(self, x: Tensor, sigma: float, timestep: float | None) -> Generator[Any, Any, tuple[Tensor, Predicted]]:
        refiner = self.stage.refiner
        if refiner and self.seat.refine and self._done >= refiner.switch_at:
            yield from self._refined(self.seat.refine)
        scaled = x * (1 / math.sqrt(sigma**2 + 1))
        if timestep is None:
            timestep = self.levels.timestep(sigma)
        asked = self.stage.request
        predicted = yield from self.guidance.predicted(
            self.evaluations, partial(Evaluate, self.seat.lane, scaled, timestep, extra=self.extra)
        )
        self.evaluations += 1
        self.share = self._share(sigma)
        progress = progress_of(self.stage, self.share)
        self.report(progress)
        estimate = self.levels.estimate(x, sigma, predicted.guided(self.guidance.scale))
        if share := asked.guidance_rescale:
            estimate = rescaled(x, sigma, estimate, self.levels.estimate(x, sigma, predicted.guided(1)), share)
        if self.start:
            estimate = self.start.kept(estimate)
        if (every := asked.preview_every) and progress.step >= self.shown + every:
            self.shown = progress.step
            self.report(Preview((yield Run(partial(previewed, self.seat.lane, estimate), Point.DECODE))))
        if self.stop() is Stop.WITH_PICTURE:
            raise _Enough(estimate, progress.step)
        return estimate, predicted

    @property
    def _done(self) -> float:
        """The share of the steps that are behind, 0 to 1."""
        row = samplers.sampler(self.stage.sampler)
        return self.share if row.adaptive else self.evaluations // row.evaluations / self.stage.run

    def _refined(self, refine: Callable[[], Generator[Run, Any, Lane]]) -> Generator[Run, Any, None]:
        """Have the refiner draw from now on, with its own reading of the words."""
        del self.seat.lane
        self.seat.lane = lane = yield from refine()
        self.seat.refine = None
        self.guidance = yield from guided(lane, self.stage)
        blank = yield Run(partial(lane.blank, self.stage.width, self.stage.height), Point.ENCODE)
        self.extra = self.extra if blank is not None and self.extra is not None else blank

    def _share(self, sigma: float) -> float:
        """How far the pass is, 0 to 1; told from sigma where the number of evaluations is not known beforehand."""
        if not samplers.sampler(self.stage.sampler).adaptive:
            return min(self.evaluations / self.stage.evaluations, 1.0)
        first, last = self.sigmas[0], self.sigmas[-1]
        return max(self.share, min(math.log(first / sigma) / math.log(first / last), 1.0))


def denoised(
    seat: Seat, stage: Pass, report: Report, stop: StopAsked, start: Start | None = None
) -> Generator[Evaluate | Run, Any, tuple[Tensor, int | None]]:
    """One sampling pass: the picture's own noise, over ``start`` if there is one, then the sampler; clean latents.

    When told to stop with a picture: the model's present guess of them, and the step at which that was.
    """
    if start and not stage.run:
        return start.latents, None
    guidance = yield from guided(seat.lane, stage)
    extra = start.extra if start else None
    if extra is None:
        extra = yield Run(partial(seat.lane.blank, stage.width, stage.height), Point.ENCODE)
    row, asked = samplers.sampler(stage.sampler), stage.request
    ends = Ends(asked.sigma_min, asked.sigma_max, asked.rho, asked.discard_next_to_last_sigma)
    sigmas = spacing(seat.lane.levels, stage.sampler, stage.schedule, stage.spaced, ends)
    sigmas = sigmas[-(stage.run + 1) :] if start else sigmas
    options = Options(asked.eta, asked.s_churn, asked.s_tmin, asked.s_tmax or math.inf, asked.s_noise)
    first, later = streams(stage, seat.lane.latent_shape)
    device = seat.lane.device
    if row.brownian:
        shape = seat.lane.latent_shape(stage.width, stage.height)
        draw = partial(SOURCES[asked.rng].firsts, shape=shape)
        motion = Brownian(min(s for s in sigmas if s > 0), sigmas[0], stage.seed, draw, sigmas)

    def noise(sigma: float, following: float) -> Tensor:
        return (motion(sigma, following) if row.brownian else later()).to(device)

    if start:
        x = start.latents + first.to(device) * (sigmas[0] * start.noise)
    else:
        x = first.to(device) * (math.sqrt(1 + sigmas[0] ** 2) if row.timesteps else sigmas[0])
    denoise = _Denoise(seat, stage, guidance, extra, start, sigmas, report, stop)
    try:
        x = yield from SAMPLERS[stage.sampler](denoise, x, sigmas, noise, options)
    except _Enough as enough:
        return enough.estimate, enough.step
    x = x * (1 / math.sqrt(1 + sigmas[-1] ** 2)) if row.timesteps else x
    return start.kept(x) if start else x, None


def progress_of(stage: Pass, share: float) -> Progress:
    """What callers are told when that share of a pass is done, 0 to 1."""
    return Progress(
        state=State.PROCESSING,
        fraction=stage.begins + (stage.ends - stage.begins) * share,
        phase=stage.phase,
        step=min(math.ceil(share * stage.run), stage.run),
        steps=stage.run,
    )
