"""The whole of one job: the passes of each picture, what lies between them, and the picture at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_api.canvas import LANCZOS, Canvas
from diffusion_api.catalog.upscalers import INTERNAL, LATENT
from diffusion_api.engine.base import Attached, Finished, Pixels, Stop, StopAsked
from diffusion_api.engine.denoise import Asks, Lane, Point, Report, Run, Start, denoised, progress_of
from diffusion_api.engine.noise import streams
from diffusion_api.engine.plan import Pass, plan
from diffusion_api.engine.upscalers import Upscaler, enlarged
from diffusion_api.errors import Interrupted, NotFinite
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.request import Img2Img, Request

DECODED_AGAIN = "the picture overflowed while it was decoded, and was decoded again in float32"


@dataclass(frozen=True)
class Loaders:
    """Where a job gets its models from, by their names in the catalog. They raise what reading a file raises."""

    lane: Callable[[str], Lane]
    upscaler: Callable[[str], Upscaler]
    attach: Callable[[Lane, Request], Attached]


def job(
    request: Request,
    canvas: Canvas | None,
    *,
    loaders: Loaders,
    memory: Callable[[], float],
    report: Report,
    stop: StopAsked,
) -> Asks:
    """The whole of one job; its value is Finished. Raises Interrupted, NotFinite and what the loaders raise.

    ``canvas`` is what the request brings along. Of ``stop`` only WITH_PICTURE is looked at here; who drives the job ends it at
    NOW.
    """
    before = memory()
    report(Progress(state=State.LOADING, phase="loading"))
    images: list[Pixels] = []
    found: list[Attached] = []
    warnings: dict[str, None] = {}
    latents: Tensor | None = None
    broken_off: int | None = None
    for stage in plan(request):
        lane, extras = yield from loaded(stage, loaders)
        found.append(extras)
        if stop() is Stop.WITH_PICTURE and latents is None:
            broken_off = 0
            break
        report(progress_of(stage, 0))
        start = yield from begun(lane, stage, canvas, latents, loaders)
        latents, broken_off = yield from denoised(lane, stage, report, stop, start)
        if stage.last or broken_off is not None:
            image, warning = yield Run(partial(developed, lane, latents), Point.DECODE)
            images.append(_pasted(image, canvas))
            warnings |= dict.fromkeys(warning)
            latents = None
        if broken_off is not None:
            break
    if not images:
        raise Interrupted("stopped before there was a picture")
    first = found[0]
    return Finished(
        images=tuple(images),
        seeds=request.seeds[: len(images)],
        partial=broken_off,
        model_hash=lane.model_hash,
        memory_before_mb=before,
        memory_after_mb=memory(),
        warnings=(*dict.fromkeys(text for extras in found for text in extras.warnings), *warnings),
        loras_applied=first.applied,
        loras_skipped=first.skipped,
        infotext=first.infotext,
    )


def loaded(stage: Pass, loaders: Loaders) -> Generator[Run, Any, tuple[Lane, Attached]]:
    """The model of a pass, with what the request attaches to it."""
    lane: Lane = yield Run(partial(loaders.lane, stage.model), Point.LOAD)
    request = stage.request.model_copy(update={"model": stage.model})
    extras: Attached = yield Run(partial(loaders.attach, lane, request))
    return lane, extras


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
        raise TypeError(f"a picture was brought along for {request.kind}")
    shape = lane.latent_shape(stage.width, stage.height)
    if latents.shape != shape:  # resize_mode "latent"
        latents = interpolate(latents, shape[2:], mode="bilinear")
    if canvas.mask is None or request.mask is None:
        return Start(latents, request.noise_multiplier)
    small = canvas.mask.resize((shape[3], shape[2]))
    mask = torch.from_numpy(np.asarray(small).copy()).float().div(255).round()[None, None].to(lane.device)
    if request.mask.fill == "latent noise":
        noise, _ = streams(stage, lane.latent_shape)
        latents = latents * (1 - mask) + noise.to(lane.device) * mask
    elif request.mask.fill == "latent nothing":
        latents = latents * (1 - mask)
    return Start(latents, request.noise_multiplier, mask)


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


def _pasted(pixels: Pixels, canvas: Canvas | None) -> Pixels:
    return pixels if canvas is None else np.asarray(canvas.pasted(Image.fromarray(pixels)))


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
    raise NotFinite(
        "the model's numbers overflowed (NaN), so there is no picture: try another sampler, a lower guidance_scale or "
        "another size; if every picture of this model fails, its file is damaged or it needs float32"
    )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def to_pixels(decoded: Tensor) -> Pixels:
    """(1, 3, h, w) in -1 to 1 → (h, w, 3) uint8, rounded to nearest."""
    levels = decoded[0].float().add(1).mul(127.5).round_().clamp_(0, 255)
    return np.ascontiguousarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture → (1, 3, h, w), -1 to 1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
