"""The whole of one job: the passes of each picture, what lies between them, and the picture at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_api.canvas import LANCZOS, Canvas
from diffusion_api.catalog.upscalers import INTERNAL, LATENT
from diffusion_api.engine.base import Attached, Embeddings, Finished, Pixels, Stop, StopAsked
from diffusion_api.engine.denoise import (
    Asks,
    Lane,
    Loaded,
    Painter,
    Point,
    Report,
    Run,
    Seat,
    Start,
    Teller,
    denoised,
    progress_of,
)
from diffusion_api.engine.guard import NONE_INSTALLED, Applied, enforced, shown, unseen
from diffusion_api.engine.noise import streams
from diffusion_api.engine.pixels import OVERFLOWED, developed, finite, to_mask, to_pixels, to_tensor
from diffusion_api.engine.plan import Pass, plan
from diffusion_api.engine.safety import Checker
from diffusion_api.engine.upscalers import Upscaler, enlarged
from diffusion_api.errors import Interrupted, InvalidRequest, NoChecker, NotFinite
from diffusion_api.schema.job import Progress, Safety, State
from diffusion_api.schema.request import Caption, Embed, Img2Img, Policy, Reading, Request, Sampling, Upscale


@dataclass(frozen=True)
class Loaders:
    """Where a job gets its models from, by their names in the catalog. They raise what reading a file raises."""

    model: Callable[[str], Lane | Painter]
    upscaler: Callable[[str], Upscaler]
    attach: Callable[[Loaded, Sampling], Attached]
    checker: Callable[[], Checker | None]
    """The safety checker, where one is installed."""


@dataclass(frozen=True)
class Picture:
    """One picture of a job, and what its infotext is to say."""

    image: Pixels
    infotext: Mapping[str, str] = field(default_factory=dict)
    flagged: bool = False


@dataclass(frozen=True)
class Told:
    """What a model told of a picture."""

    caption: str | None = None
    embeddings: Embeddings | None = None


@dataclass
class _Job:
    """What the passes of a job share. ``encoded`` is the canvas as the models have it that have read it by now."""

    canvas: Canvas | None
    loaders: Loaders
    report: Report
    stop: StopAsked
    attached: list[Attached] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    encoded: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


def job(
    request: Request,
    canvas: Canvas | None,
    *,
    loaders: Loaders,
    memory: Callable[[], float],
    report: Report,
    stop: StopAsked,
    policy: Policy = "off",
) -> Asks:
    """The whole of one job; its value is Finished. Raises Interrupted, NotFinite, InvalidRequest, UnsafePicture, NoChecker and
    what the loaders raise.

    ``canvas`` is what the request brings along. Of ``stop`` only WITH_PICTURE is looked at here; who drives the job ends it at
    NOW.
    """
    before = memory()
    report(Progress(state=State.LOADING, phase="loading"))
    shared = _Job(canvas, loaders, report, stop)
    applied, notes = yield Run(partial(enforced, policy, loaders.checker), Point.LOAD)
    drawn, more = unseen(request, applied)
    shared.warnings += notes + more
    made: list[Picture] = []
    broken_off: int | None = None
    told = Told()
    if isinstance(request, Upscale):
        made.append((yield from _shown((yield from _upscaled(request, shared)), applied, loaders)))
    elif isinstance(request, Reading):
        told = yield from _told(request, shared)
    latents: Tensor | None = None
    for stage in plan(drawn):
        if stop() is Stop.WITH_PICTURE and latents is None:
            broken_off = 0
            break
        latents, broken_off, picture = yield from _passed(stage, latents, shared)
        if picture:
            made.append((yield from _shown(picture, applied, loaders)))
        if broken_off is not None:
            break
    if not made and told == Told():
        raise Interrupted("stopped before there was a picture")
    attached = reduce(Attached.and_then, shared.attached, Attached())
    return Finished(
        images=tuple(picture.image for picture in made),
        seeds=request.seeds[: len(made)],
        caption=told.caption,
        embeddings=told.embeddings,
        partial=broken_off,
        memory_before_mb=before,
        memory_after_mb=memory(),
        warnings=tuple(dict.fromkeys([*attached.warnings, *shared.warnings])),
        loras_applied=attached.applied,
        loras_skipped=attached.skipped,
        safety=Safety(applied=applied, flagged=tuple(one.flagged for one in made) if applied != "off" else ()),
        infotext=reduce(or_, (dict(one.infotext) for one in made), attached.infotext),
    )


def _shown(picture: Picture, applied: Applied, loaders: Loaders) -> Generator[Run, Any, Picture]:
    """A picture as it may be seen. Raises UnsafePicture, and NoChecker where that was taken away meanwhile."""
    if applied == "off":
        return picture

    def looked_at() -> bool:
        checker = loaders.checker()  # again, as it may have made room for the model
        if checker is None:
            raise NoChecker(NONE_INSTALLED)
        return checker.flags(picture.image)

    flagged: bool = yield Run(looked_at)
    return replace(picture, image=shown(picture.image, flagged, applied), flagged=flagged)


def _passed(
    stage: Pass, before: Tensor | None, shared: _Job
) -> Generator[Any, Any, tuple[Tensor | None, int | None, Picture | None]]:
    """One pass over the latents of the one before it: its own latents or, if it is the last, its picture.

    The number is the step at which it was broken off, None for a whole one.
    """
    model = yield from _loaded(stage.model, stage, shared)
    shared.report(progress_of(stage, 0))
    if isinstance(model, Painter):
        painted: tuple[int | None, Picture | None] = yield Run(partial(_painted, model, stage, shared), Point.PAINT)
        return None, *painted
    start = yield from _begun(model, stage, before, shared)
    seat = Seat(model, partial(_refiner, stage, shared))
    del model  # a refiner may need its place
    latents, broken_off = yield from denoised(seat, stage, shared.report, shared.stop, start)
    if not stage.last and broken_off is None:
        return latents, None, None
    pixels = yield from _developed(seat.lane, latents, shared)
    if shared.canvas:
        pixels = np.asarray(shared.canvas.pasted(Image.fromarray(pixels)))
    return None, broken_off, Picture(pixels)


def _loaded(name: str, stage: Pass, shared: _Job) -> Generator[Run, Any, Lane | Painter]:
    """A model, with what the request attaches to it and the words of this pass name."""
    model: Lane | Painter = yield Run(partial(shared.loaders.model, name), Point.LOAD)
    own = {"model": name, "prompt": stage.prompt, "negative_prompt": stage.negative_prompt}
    request = stage.request.model_copy(update=own)
    shared.attached.append((yield Run(partial(shared.loaders.attach, model, request))))
    if not isinstance(model, Painter):
        model.wrap(request.tiling)
    return model


def _refiner(stage: Pass, shared: _Job) -> Generator[Run, Any, Lane]:
    """The model that refines a pass. Raises InvalidRequest where that is a pipeline."""
    name = stage.refiner.model if stage.refiner else stage.model
    model = yield from _loaded(name, stage, shared)
    if isinstance(model, Painter):
        raise InvalidRequest(f"refiner {name!r} is no SDXL model", field="refiner")
    return model


def _begun(lane: Lane, stage: Pass, before: Tensor | None, shared: _Job) -> Generator[Any, Any, Start | None]:
    """What a pass begins with, beside noise."""
    if stage.upscaler and before is not None:
        return Start((yield from _larger(lane, stage, before, shared)))
    canvas, request = shared.canvas, stage.request
    if canvas is None:
        return None
    if not isinstance(request, Img2Img):
        raise TypeError(f"a picture was brought along for {type(request).__name__}")
    if stage.model not in shared.encoded:
        shared.encoded[stage.model] = yield from _encoded(lane, stage, canvas)
    latents, extra = shared.encoded[stage.model]
    if canvas.mask is None or request.mask is None:
        return Start(latents, request.noise_multiplier)
    shape = lane.latent_shape(stage.width, stage.height)
    mask = to_mask(canvas.mask.resize((shape[3], shape[2]))).to(lane.device)
    if request.mask.fill == "latent noise":
        noise, _ = streams(stage, lane.latent_shape)
        latents = latents * (1 - mask) + noise.to(lane.device) * mask
    elif request.mask.fill == "latent nothing":
        latents = latents * (1 - mask)
    return Start(latents, request.noise_multiplier, mask, extra)


def _encoded(lane: Lane, stage: Pass, canvas: Canvas) -> Generator[Run, Any, tuple[Tensor, Tensor | None]]:
    """The canvas as latents, and what an inpainting model reads of it; the same for each picture of a job."""
    shape = lane.latent_shape(stage.width, stage.height)
    pixels, extra = to_tensor(canvas.picture), None
    latents: Tensor = yield Run(partial(lane.latents_of, pixels), Point.ENCODE)
    if latents.shape != shape:  # resize_mode "latent"
        latents = interpolate(latents, shape[2:], mode="bilinear")
    if canvas.mask is not None:
        whole = to_mask(canvas.mask.resize(canvas.picture.size))
        extra = yield Run(partial(lane.masked, pixels, whole), Point.ENCODE)
    return latents, extra if extra is None else interpolate(extra, shape[2:])


def _developed(lane: Lane, latents: Tensor, shared: _Job) -> Generator[Run, Any, Pixels]:
    found: tuple[Pixels, tuple[str, ...]] = yield Run(partial(developed, lane, latents), Point.DECODE)
    shared.warnings += found[1]
    return found[0]


def _larger(lane: Lane, stage: Pass, latents: Tensor, shared: _Job) -> Generator[Any, Any, Tensor]:
    """Latents of the size of a pass, made of smaller ones: they fill it, and what stands out is cut off."""
    height, width = latents.shape[2:]
    wanted = lane.latent_shape(stage.width, stage.height)[2:]
    scale = max(wanted[0] / height, wanted[1] / width)
    covering = max(round(height * scale), wanted[0]), max(round(width * scale), wanted[1])
    if stage.upscaler in LATENT:
        mode, antialias = LATENT[stage.upscaler]
        latents = interpolate(latents, covering, mode=mode, antialias=antialias)
    else:
        pixels = yield from _developed(lane, latents, shared)
        size = covering[1] * stage.width // wanted[1], covering[0] * stage.height // wanted[0]
        image = yield from _larger_picture(Image.fromarray(pixels), size, str(stage.upscaler), shared.loaders)
        latents = yield Run(partial(lane.latents_of, to_tensor(image)), Point.ENCODE)
    top, left = (covering[0] - wanted[0]) // 2, (covering[1] - wanted[1]) // 2
    return latents[:, :, top : top + wanted[0], left : left + wanted[1]]


def _larger_picture(
    image: Image.Image,
    size: tuple[int, int],
    name: str,
    loaders: Loaders,
    told: Callable[[float], None] = lambda share: None,
) -> Generator[Any, Any, Image.Image]:
    if name in INTERNAL:
        return image.resize(size, Image.Resampling.NEAREST if name == "Nearest" else LANCZOS)
    upscaler = yield Run(partial(loaders.upscaler, name), Point.LOAD)
    larger: Image.Image = yield from enlarged(image, *size, upscaler, told)
    return larger


def _upscaled(request: Upscale, shared: _Job) -> Generator[Any, Any, Picture]:
    """The picture of a job that only enlarges one. Raises Interrupted: half of it is nothing to show."""
    if shared.canvas is None:
        raise TypeError("no picture was brought along")

    def told(share: float) -> None:
        shared.report(Progress(state=State.PROCESSING, fraction=share, phase="upscaling", step=int(share), steps=1))
        if shared.stop():
            raise Interrupted("stopped while it ran")

    told(0)
    size = request.width, request.height
    image = yield from _larger_picture(shared.canvas.picture, size, request.upscaler, shared.loaders, told)
    told(1)
    return Picture(np.asarray(image))


def _told(request: Caption | Embed, shared: _Job) -> Generator[Any, Any, Told]:
    """What a model tells of the picture that a job brings along. Raises InvalidRequest for a model that tells nothing."""
    if shared.canvas is None:
        raise TypeError("no picture was brought along")
    model: Lane | Painter | Teller = yield Run(partial(shared.loaders.model, request.model), Point.LOAD)
    if not isinstance(model, Teller):
        raise InvalidRequest(f"model {request.model!r} tells nothing of pictures", field="model")
    model.patches.detach()  # what another job attached
    picture = shared.canvas.picture
    if isinstance(request, Embed):
        shared.report(Progress(state=State.PROCESSING, phase="embedding", steps=1))
        found: Embeddings = yield Run(partial(model.embeddings, picture, request), Point.ENCODE)
        if not (np.isfinite(found.clip).all() and np.isfinite(found.vae).all()):
            raise NotFinite(OVERFLOWED)
        return Told(embeddings=found)

    def report(share: float) -> None:
        step = round(share * request.steps)
        shared.report(
            Progress(state=State.PROCESSING, fraction=share, phase="captioning", step=step, steps=request.steps)
        )

    def stepped(share: float) -> bool:
        report(share)
        return bool(shared.stop())  # half of a caption is nothing to show

    report(0)
    return Told(caption=(yield Run(partial(model.caption, picture, request, stepped), Point.PAINT)))


def _painted(painter: Painter, stage: Pass, shared: _Job) -> tuple[int | None, Picture | None]:
    """What a painter makes of a pass, with a word on each step, and the step at which it was broken off.

    Raises Interrupted, NotFinite and what the painter raises.
    """

    def stepped(share: float) -> bool:
        shared.report(progress_of(stage, share))
        if (asked := shared.stop()) is Stop.NOW:
            raise Interrupted("stopped while it ran")
        return asked is Stop.WITH_PICTURE

    found = painter.paint(stage, stepped)
    if found is None:
        return 0, None
    if not finite(found.values):
        raise NotFinite(OVERFLOWED)
    shared.warnings += found.warnings
    return found.broken_off, Picture(to_pixels(found.values), found.infotext)
