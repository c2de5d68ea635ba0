"""The whole of one job: the passes of each picture, what lies between them, and the picture at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_api.canvas import LANCZOS, Canvas
from diffusion_api.catalog.upscalers import INTERNAL, LATENT
from diffusion_api.engine.base import Attached, Finished, Pixels, Stop, StopAsked
from diffusion_api.engine.denoise import (
    Asks,
    Lane,
    Loaded,
    Painter,
    Point,
    Report,
    Run,
    Start,
    denoised,
    progress_of,
)
from diffusion_api.engine.noise import streams
from diffusion_api.engine.plan import Pass, plan
from diffusion_api.engine.upscalers import Upscaler, enlarged
from diffusion_api.errors import Interrupted, NotFinite
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.request import Img2Img, Request, Sampling

OVERFLOWED = (
    "the model's numbers overflowed (NaN), so there is no picture: try another sampler, less guidance or "
    "another size; if every picture of this model fails, its file is damaged or it needs float32"
)

DECODED_AGAIN = "the picture overflowed while it was decoded, and was decoded again in float32"


@dataclass(frozen=True)
class Loaders:
    """Where a job gets its models from, by their names in the catalog. They raise what reading a file raises."""

    model: Callable[[str], Lane | Painter]
    upscaler: Callable[[str], Upscaler]
    attach: Callable[[Loaded, Sampling], Attached]


@dataclass(frozen=True)
class Picture:
    """One picture of a job, the step at which it was broken off if it was, and what is to be said about it."""

    image: Pixels
    broken_off: int | None
    warnings: tuple[str, ...]
    infotext: Mapping[str, str] = field(default_factory=dict)


def job(
    request: Request,
    canvas: Canvas | None,
    *,
    loaders: Loaders,
    memory: Callable[[], float],
    report: Report,
    stop: StopAsked,
) -> Asks:
    """The whole of one job; its value is Finished. Raises Interrupted, NotFinite, InvalidRequest and what the loaders raise.

    ``canvas`` is what the request brings along. Of ``stop`` only WITH_PICTURE is looked at here; who drives the job ends it at
    NOW.
    """
    before = memory()
    report(Progress(state=State.LOADING, phase="loading"))
    made: list[Picture] = []
    found: list[Attached] = []
    latents: Tensor | None = None
    broken_off: int | None = None
    for stage in plan(request):
        model, extras = yield from loaded(stage, loaders)
        found.append(extras)
        if stop() is Stop.WITH_PICTURE and latents is None:
            broken_off = 0
            break
        report(progress_of(stage, 0))
        picture: Picture | None
        if isinstance(model, Painter):
            picture = yield Run(partial(painted, model, stage, report, stop), Point.PAINT)
            broken_off = 0 if picture is None else picture.broken_off
        else:
            start = yield from begun(model, stage, canvas, latents, loaders)
            latents, broken_off = yield from denoised(model, stage, report, stop, start)
            picture = None
            if stage.last or broken_off is not None:
                picture = yield from developed_on(model, latents, broken_off, canvas)
                latents = None
        if picture:
            made.append(picture)
        if broken_off is not None:
            break
    if not made:
        raise Interrupted("stopped before there was a picture")
    attached = reduce(Attached.and_then, found, Attached())
    told = [*attached.warnings, *(text for one in made for text in one.warnings)]
    return Finished(
        images=tuple(picture.image for picture in made),
        seeds=request.seeds[: len(made)],
        partial=broken_off,
        memory_before_mb=before,
        memory_after_mb=memory(),
        warnings=tuple(dict.fromkeys(told)),
        loras_applied=attached.applied,
        loras_skipped=attached.skipped,
        infotext=reduce(or_, (dict(one.infotext) for one in made), attached.infotext),
    )


def loaded(stage: Pass, loaders: Loaders) -> Generator[Run, Any, tuple[Lane | Painter, Attached]]:
    """The model of a pass, with what the request attaches to it and the words of this pass name."""
    model: Lane | Painter = yield Run(partial(loaders.model, stage.model), Point.LOAD)
    own = {"model": stage.model, "prompt": stage.prompt, "negative_prompt": stage.negative_prompt}
    request = stage.request.model_copy(update=own)
    extras: Attached = yield Run(partial(loaders.attach, model, request))
    return model, extras


def begun(
    lane: Lane, stage: Pass, canvas: Canvas | None, before: Tensor | None, loaders: Loaders
) -> Generator[Any, Any, Start | None]:
    """What a pass begins with, beside noise."""
    if stage.upscaler and before is not None:
        return Start((yield from _larger(lane, stage, before, loaders)))
    if canvas is None:
        return None
    latents: Tensor = yield Run(partial(lane.latents_of, to_tensor(canvas.picture)), Point.ENCODE)
    request = stage.request
    if not isinstance(request, Img2Img):
        raise TypeError(f"a picture was brought along for {type(request).__name__}")
    shape = lane.latent_shape(stage.width, stage.height)
    if latents.shape != shape:  # resize_mode "latent"
        latents = interpolate(latents, shape[2:], mode="bilinear")
    if canvas.mask is None or request.mask is None:
        return Start(latents, request.noise_multiplier)
    mask = to_mask(canvas.mask.resize((shape[3], shape[2]))).to(lane.device)
    if request.mask.fill == "latent noise":
        noise, _ = streams(stage, lane.latent_shape)
        latents = latents * (1 - mask) + noise.to(lane.device) * mask
    elif request.mask.fill == "latent nothing":
        latents = latents * (1 - mask)
    whole = to_mask(canvas.mask.resize(canvas.picture.size))
    extra = yield Run(partial(lane.masked, to_tensor(canvas.picture), whole), Point.ENCODE)
    if extra is not None:
        extra = interpolate(extra, shape[2:])
    return Start(latents, request.noise_multiplier, mask, extra)


def _larger(lane: Lane, stage: Pass, latents: Tensor, loaders: Loaders) -> Generator[Any, Any, Tensor]:
    """Latents of the size of a pass, made of smaller ones: they fill it, and what stands out is cut off."""
    height, width = latents.shape[2:]
    wanted = lane.latent_shape(stage.width, stage.height)[2:]
    scale = max(wanted[0] / height, wanted[1] / width)
    covering = max(round(height * scale), wanted[0]), max(round(width * scale), wanted[1])
    if stage.upscaler in LATENT:
        mode, antialias = LATENT[stage.upscaler]
        latents = interpolate(latents, covering, mode=mode, antialias=antialias)
    else:
        pixels, _ = yield Run(partial(developed, lane, latents), Point.DECODE)
        size = covering[1] * stage.width // wanted[1], covering[0] * stage.height // wanted[0]
        image = yield from _larger_picture(Image.fromarray(pixels), size, stage, loaders)
        latents = yield Run(partial(lane.latents_of, to_tensor(image)), Point.ENCODE)
    top, left = (covering[0] - wanted[0]) // 2, (covering[1] - wanted[1]) // 2
    return latents[:, :, top : top + wanted[0], left : left + wanted[1]]


def _larger_picture(
    image: Image.Image, size: tuple[int, int], stage: Pass, loaders: Loaders
) -> Generator[Any, Any, Image.Image]:
    if stage.upscaler in INTERNAL:
        return image.resize(size, Image.Resampling.NEAREST if stage.upscaler == "Nearest" else LANCZOS)
    upscaler = yield Run(partial(loaders.upscaler, str(stage.upscaler)), Point.LOAD)
    larger: Image.Image = yield from enlarged(image, *size, upscaler, lambda share: None)
    return larger


def developed_on(
    lane: Lane, latents: Tensor, broken_off: int | None, canvas: Canvas | None
) -> Generator[Run, Any, Picture]:
    """The picture in clean latents, put back into the one it came from."""
    pixels, warnings = yield Run(partial(developed, lane, latents), Point.DECODE)
    if canvas:
        pixels = np.asarray(canvas.pasted(Image.fromarray(pixels)))
    return Picture(pixels, broken_off, warnings)


def painted(painter: Painter, stage: Pass, report: Report, stop: StopAsked) -> Picture | None:
    """What a painter makes of a pass, with a word on each step. Raises Interrupted, NotFinite and what the painter raises."""

    def stepped(share: float) -> bool:
        report(progress_of(stage, share))
        if (asked := stop()) is Stop.NOW:
            raise Interrupted("stopped while it ran")
        return asked is Stop.WITH_PICTURE

    found = painter.paint(stage, stepped)
    if found is None:
        return None
    if not _finite(found.values):
        raise NotFinite(OVERFLOWED)
    return Picture(to_pixels(found.values), found.broken_off, found.warnings, found.infotext)


def developed(lane: Lane, latents: Tensor) -> tuple[Pixels, tuple[str, ...]]:
    """The picture in clean latents, and what is to be said about it. Raises NotFinite.

    A decoder that overflows in half precision gets a second try in float32. Looked at here, once, since a look at every
    step would make the device wait.
    """
    if _finite(latents):
        if _finite(values := lane.decode(latents)):
            return to_pixels(values), ()
        if _finite(values := lane.decode(latents, precise=True)):
            return to_pixels(values), (DECODED_AGAIN,)
    raise NotFinite(OVERFLOWED)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def to_pixels(decoded: Tensor) -> Pixels:
    """(1, 3, h, w) in -1 to 1 → (h, w, 3) uint8, rounded to nearest."""
    levels = decoded[0].float().add(1).mul(127.5).round_().clamp_(0, 255)
    return np.ascontiguousarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture → (1, 3, h, w), -1 to 1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)


def to_mask(image: Image.Image) -> Tensor:
    """A mask of mode L → (1, 1, h, w), 0 or 1."""
    return torch.from_numpy(np.asarray(image).copy()).float().div(255).round()[None, None]
