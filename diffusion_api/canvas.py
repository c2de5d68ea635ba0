"""Pictures and masks on the way into a pass and out of it: resizing, blurring, filling, cutting out and pasting back.

Pictures are PIL images of mode RGB, masks of mode L, where white is to be painted anew. What A1111 does is in ``a1111.md``
5.3 and 5.4 of the project's specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, ImageOps

from diffusion_api.schema.request import Caption, Embed, Img2Img, Reading, ResizeMode, Upscale

LANCZOS = Image.Resampling.LANCZOS
WHITE = (255, 255, 255)
OPAQUE_ENOUGH = 128
ACROSS = 4
"""Pictures in a row of a grid, at most."""
FILLING = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radius in pixels of a blur of the surroundings, and how often it is laid over; the sharper ones last."""


def flattened(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def resized(image: Image.Image, width: int, height: int, mode: ResizeMode) -> Image.Image:
    """The picture, or mask, with ``width`` x ``height`` pixels.

    ``just resize`` and ``latent`` stretch, ``crop and resize`` covers the size and cuts what stands out, ``resize and fill``
    fits into it and repeats the edges.
    """
    if mode in ("just resize", "latent"):
        return image.resize((width, height), LANCZOS)
    wider = width * image.height > image.width * height  # than the picture is
    across = wider == (mode == "crop and resize")  # the side that sets the scale
    scaled = (
        (width, max(1, image.height * width // image.width))
        if across
        else (max(1, image.width * height // image.height), height)
    )
    inner = image.resize(scaled, LANCZOS)
    left, top = width // 2 - scaled[0] // 2, height // 2 - scaled[1] // 2
    if mode == "crop and resize":
        return inner.crop((-left, -top, width - left, height - top))
    return _edges_repeated(inner, left, top, width, height)


def _edges_repeated(inner: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    pixels = np.asarray(inner)
    around = ((top, height - inner.height - top), (left, width - inner.width - left))
    return Image.fromarray(np.pad(pixels, (*around, (0, 0))[: pixels.ndim], mode="edge"))


def mask_of(image: Image.Image, *, invert: bool, blur: float) -> Image.Image:
    """The mask in a picture: where it is opaque if it has transparent parts, else how bright it is; then blurred."""
    rgba = image.convert("RGBA") if image.has_transparency_data else None
    if rgba is not None and rgba.getextrema()[-1] != (255, 255):
        mask = rgba.getchannel("A").point(lambda alpha: 255 if alpha > OPAQUE_ENOUGH else 0)
    else:
        mask = image.convert("L")
    return blurred(ImageOps.invert(mask) if invert else mask, blur)


def blurred(mask: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur of a mask with a kernel of 2 * int(2.5 * sigma + 0.5) + 1 pixels, mirrored at the edges."""
    if sigma <= 0:
        return mask
    reach = int(2.5 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    values = np.asarray(mask, np.float64)
    for axis in (0, 1):
        values = _convolved(values, kernel / kernel.sum(), reach, axis)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _convolved(values: NDArray[np.float64], kernel: NDArray[np.float64], reach: int, axis: int) -> NDArray[np.float64]:
    around = [(0, 0), (0, 0)]
    around[axis] = (reach, reach)
    padded = np.pad(values, around, mode="reflect" if values.shape[axis] > 1 else "edge")
    length = values.shape[axis]
    return sum(
        (weight * padded.take(range(i, i + length), axis) for i, weight in enumerate(kernel)), np.zeros_like(values)
    )


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what the mask covers replaced by its blurred surroundings."""
    rest = Image.new("RGBa", image.size)
    rest.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    result = Image.new("RGBA", image.size)
    for radius, times in FILLING:
        layer = rest.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(layer)
    return result.convert("RGB")


@dataclass(frozen=True)
class Box:
    """A part of a picture, in pixels; right and bottom are outside of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """As PIL wants them."""
        return self.left, self.top, self.right, self.bottom


def painted(mask: Image.Image, *, padding: int, width: int, height: int) -> Box | None:
    """What of a picture is looked at when only what is masked is painted; None for a blank mask.

    The box around the mask and ``padding`` pixels more, made as wide or as high as ``width`` : ``height`` as far as the
    picture allows.
    """
    found = mask.getbbox()
    if found is None:
        return None
    left, top = max(found[0] - padding, 0), max(found[1] - padding, 0)
    right, bottom = min(found[2] + padding, mask.width), min(found[3] + padding, mask.height)
    if (right - left) * height > width * (bottom - top):
        top, bottom = _widened(top, bottom, (right - left) * height // width, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * width // height, mask.width)
    return Box(left, top, right, bottom)


def _widened(low: int, high: int, wanted: int, limit: int) -> tuple[int, int]:
    """A range made ``wanted`` long, from its middle, inside 0 to ``limit``."""
    missing = min(wanted, limit) - (high - low)
    if missing <= 0:
        return low, high
    low = min(max(low - missing // 2, 0), limit - (high - low + missing))
    return low, low + min(wanted, limit)


def composed(painted_anew: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The new picture where the mask is white, the original one, pixel for pixel, where it is black."""
    return Image.composite(painted_anew, original, mask)


def widened(mask: Image.Image) -> Image.Image:
    """A blurred mask with all its values doubled: the new picture reaches to the outer half of the blur."""
    return ImageChops.add(mask, mask)


@dataclass(frozen=True)
class Canvas:
    """What a pass begins with: a picture, and where it is painted anew; and the way back into the picture it came from.

    ``picture`` has the size of the request, but with ``resize_mode`` ``latent`` its own, in multiples of 8; one that is to be
    enlarged has its own as well.
    """

    picture: Image.Image
    mask: Image.Image | None = None
    original: Image.Image | None = None
    overlay: Image.Image | None = None
    box: Box | None = None

    def pasted(self, image: Image.Image) -> Image.Image:
        """The picture that was made, put back where the mask allows it."""
        if self.original is None or self.overlay is None:
            return image
        if self.box:
            whole = self.original.copy()
            whole.paste(image.resize(self.box.size, LANCZOS), self.box.corners)
            image = whole
        return composed(image, self.original, self.overlay)


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, at least one, side by side in as few rows of at most four as hold them, the rows as even as can
    be: five are 3 + 2. What is left over is black.
    """
    width, height = pictures[0].size
    rows = -(-len(pictures) // ACROSS)
    columns = -(-len(pictures) // rows)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet


def prepared(request: Img2Img | Upscale | Caption | Embed, read: Callable[[str], Image.Image]) -> Canvas:
    """The canvas of a request; ``read`` gives the pictures that it names."""
    if isinstance(request, Upscale):
        return Canvas(flattened(read(request.image)))
    if isinstance(request, Reading):
        return Canvas(resized(flattened(read(request.image)), request.width, request.height, "just resize"))
    width, height, mode = request.width, request.height, request.resize_mode
    picture = flattened(read(request.image))
    if request.mask is None:
        if mode == "latent":
            width, height = (max(8, round(side / 8) * 8) for side in picture.size)
        return Canvas(resized(picture, width, height, mode))
    asked = request.mask
    shape = read(asked.image)
    if shape.size != picture.size:
        shape = shape.resize(picture.size, LANCZOS)
    mask = mask_of(shape, invert=asked.invert, blur=asked.blur)
    box = painted(mask, padding=asked.padding, width=width, height=height) if asked.only_masked else None
    if asked.only_masked and box is None:
        return Canvas(resized(picture, width, height, mode))
    if box:
        original, overlay = picture, mask
        picture, mask = (part.crop(box.corners).resize((width, height), LANCZOS) for part in (picture, mask))
    else:
        picture, mask = (resized(part, width, height, mode) for part in (picture, mask))
        original, overlay = picture, widened(mask)
    return Canvas(picture if asked.fill == "original" else filled(picture, mask), mask, original, overlay, box)
