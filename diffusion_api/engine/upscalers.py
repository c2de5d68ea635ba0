"""Upscaling models of every kind that spandrel knows, run in tiles so that memory does not grow with the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
from torch import Tensor

from diffusion_api.canvas import LANCZOS
from diffusion_api.engine.denoise import Asks, Run
from diffusion_api.engine.devices import Device
from diffusion_api.engine.families.base import read_weights
from diffusion_api.errors import ModelUnreadable

TILE = 192
"""Side in pixels of what is kept of a tile, before it is enlarged."""

MARGIN = 32
"""Pixels around a tile that the model sees and that are thrown away: what it makes of an edge is no good."""

MOST_PASSES = 3


@dataclass(frozen=True)
class Upscaler:
    """A loaded upscaling model. ``scale`` is its factor."""

    descriptor: ImageModelDescriptor[Any]
    device: Device

    @classmethod
    def read(cls, path: Path, device: Device) -> Upscaler:
        """From a .safetensors, .pth, .pt or .bin file; no code in it is run. Raises ModelUnreadable."""
        try:
            model = ModelLoader().load_from_state_dict(read_weights(path))
        except UnsupportedModelError as error:
            raise ModelUnreadable(f"upscaler {path.stem!r} is of no kind that is known: {path.name}") from error
        except Exception as error:  # torch, pickle and spandrel raise anything at all on a damaged file
            reason = str(error).partition("\n")[0]
            raise ModelUnreadable(
                f"upscaler {path.stem!r} cannot be read: {path.name} is damaged ({reason})"
            ) from error
        if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
            raise ModelUnreadable(f"upscaler {path.stem!r} does not turn one colour picture into another: {path.name}")
        dtype = device.dtype if device.dtype != torch.float16 or model.supports_half else torch.float32
        return cls(model.to(device.place, dtype).eval(), device)

    @property
    def scale(self) -> int:
        """The factor by which it enlarges; 1 for one that only restores."""
        return int(self.descriptor.scale)

    def enlarged(self, pixels: Tensor) -> Tensor:
        """(1, 3, h, w) → (1, 3, scale * h, scale * w), 0 to 1, on the CPU."""
        result: Tensor = self.descriptor(pixels.to(self.descriptor.device, self.descriptor.dtype))
        return result.float().clamp(0, 1).cpu()


@dataclass(frozen=True)
class Tile:
    """A part of a picture by its rows and columns: what the model sees, and of that what is kept."""

    seen: tuple[slice, slice]
    place: tuple[slice, slice]


def tiles(width: int, height: int, *, side: int = TILE, margin: int = MARGIN) -> Iterator[Tile]:
    """The tiles of a picture, row by row; together their ``place`` covers it once. Pixels, before enlarging."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows, columns = _stretch(top, side, margin, height), _stretch(left, side, margin, width)
            yield Tile((rows[0], columns[0]), (rows[1], columns[1]))


def _stretch(begin: int, side: int, margin: int, limit: int) -> tuple[slice, slice]:
    end = min(begin + side, limit)
    return slice(max(begin - margin, 0), min(end + margin, limit)), slice(begin, end)


def enlarged(image: Image.Image, width: int, height: int, upscaler: Upscaler, told: Callable[[float], None]) -> Asks:
    """The picture with ``width`` x ``height`` pixels: as many passes of the model as it takes, and Lanczos to the very size.

    A job's generator; each tile is one :class:`Run`. ``told`` hears the share that is done, 0 to 1. What is larger than the
    picture that was asked for is never held whole.
    """
    passes = _passes(image.size, (width, height), upscaler.scale)
    for number in range(passes):

        def told_of_all(share: float, before: int = number) -> None:
            told((before + share) / passes)

        size = image.width * upscaler.scale, image.height * upscaler.scale
        if number + 1 == passes:
            size = max(width, image.width), max(height, image.height)
        image = yield from _once(image, size, upscaler, told_of_all)
    return image if image.size == (width, height) else image.resize((width, height), LANCZOS)


def _passes(size: tuple[int, int], wanted: tuple[int, int], scale: int) -> int:
    """A model that only restores is run once, also where nothing is to be enlarged."""
    if scale == 1:
        return 1
    passes, reached = 0, 1
    while passes < MOST_PASSES and (size[0] * reached < wanted[0] or size[1] * reached < wanted[1]):
        passes, reached = passes + 1, reached * scale
    return passes


def _once(image: Image.Image, size: tuple[int, int], upscaler: Upscaler, told: Callable[[float], None]) -> Asks:
    """One pass of the model, each of its tiles brought to what it is of a picture of that size."""
    pixels, result = np.asarray(image), Image.new("RGB", size)
    across, down = size[0] / image.width, size[1] / image.height
    parts = list(tiles(image.width, image.height))
    for number, tile in enumerate(parts):
        seen = torch.from_numpy(pixels[tile.seen].copy()).permute(2, 0, 1)[None].float().div(255)
        large: Tensor = yield Run(partial(upscaler.enlarged, seen))
        levels = large[0].permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
        (top, bottom, *rows), (left, right, *columns) = (
            _fitted(place, seen_of, factor, upscaler.scale)
            for place, seen_of, factor in zip(tile.place, tile.seen, (down, across), strict=True)
        )
        box = columns[0], rows[0], columns[1], rows[1]
        part = Image.fromarray(levels).resize((right - left, bottom - top), LANCZOS, box=box)
        result.paste(part, (left, top))
        told((number + 1) / len(parts))
    return result


def _fitted(place: slice, seen: slice, factor: float, scale: int) -> tuple[int, int, float, float]:
    """Where a stretch of the picture comes to lie in the larger one, and where that is in what the model made of it.

    Neighbours are seen by the filter as well: the margin is larger than its reach, so that no seam shows.
    """
    begin, end = round(place.start * factor), round(place.stop * factor)
    longest = (seen.stop - seen.start) * scale
    first, last = ((edge / factor - seen.start) * scale for edge in (begin, end))
    return begin, end, max(first, 0.0), min(last, float(longest))
