"""The semantic checker: what a picture of the demo models shows, by pixel statistics.

``seen(pixels)`` names the object's colour, shape, size and side and the background's colour; tests compare it with the prompt.
It knows the colours and shapes of the prompts, and nothing of the model or of its training.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (250, 140, 30),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
DISTINCT = 70
"""RGB distance from the background beyond which a pixel belongs to the object."""

BOX = 96
PROMPT = re.compile(
    r"an? (?P<size>small|large) (?P<colour>\w+) (?P<shape>\w+) on an? (?P<background>\w+) background"
    r"(?: on the (?P<side>left|right))?$"
)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for, or a picture shows. ``side`` is left, middle or right."""

    size: str
    colour: str
    shape: str
    background: str
    side: str

    def agrees(self, other: Scene, *, shape: bool = False) -> bool:
        """Same colours and side, and the same shape where that is asked."""
        same = (self.colour, self.background, self.side) == (other.colour, other.background, other.side)
        return same and (not shape or self.shape == other.shape)


def asked(prompt: str) -> Scene:
    """The scene that a prompt in the plain form asks for."""
    found = PROMPT.match(prompt)
    assert found, prompt
    return Scene(found["size"], found["colour"], found["shape"], found["background"], found["side"] or "middle")


def seen(pixels: NDArray[np.uint8]) -> Scene:
    """What a picture (height, width, 3) shows; a part that cannot be told is ``"none"``."""
    height, width = pixels.shape[:2]
    rim = max(2, min(height, width) // 24)
    border = np.concatenate(
        [
            pixels[:rim].reshape(-1, 3),
            pixels[-rim:].reshape(-1, 3),
            pixels[:, :rim].reshape(-1, 3),
            pixels[:, -rim:].reshape(-1, 3),
        ]
    )
    background = np.median(border, axis=0)
    mask = np.linalg.norm(pixels.astype(float) - background, axis=2) > DISTINCT
    if mask.mean() < 0.01:
        return Scene("none", "none", "none", nearest(background), "none")
    rows, columns = np.nonzero(mask)
    left, right = np.percentile(columns, (1, 99))
    top, bottom = np.percentile(rows, (1, 99))
    centre = (left + right) / 2 / width
    inside = np.median(pixels[_core(mask)], axis=0)
    crop = mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
    extent = max(right - left, bottom - top) / min(height, width)
    side = "left" if centre < 0.43 else "right" if centre > 0.57 else "middle"
    return Scene("large" if extent > 0.46 else "small", nearest(inside), _shape(crop), nearest(background), side)


def nearest(colour: NDArray[np.float64]) -> str:
    """The named colour closest in RGB."""
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], colour))


def _core(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask less its soft edge, or all of it where it is thin."""
    core = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            core &= np.roll(mask, shift, axis)
    return core if core.any() else mask


def _shape(crop: NDArray[np.bool_]) -> str:
    """The reference shape with the largest overlap (intersection over union), both fitted to one box."""
    fitted = np.asarray(Image.fromarray(crop).resize((BOX, BOX)))
    return max(SHAPES, key=lambda shape: _overlap(fitted, _reference(shape)))


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def _reference(shape: str) -> NDArray[np.bool_]:
    image = Image.new("1", (BOX, BOX))
    pen = ImageDraw.Draw(image)
    end, middle = BOX - 1, BOX / 2
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=1)
    elif shape == "square":
        pen.rectangle((0, 0, end, end), fill=1)
    elif shape == "triangle":
        pen.polygon(((middle, 0), (0, end), (end, end)), fill=1)
    elif shape == "ring":
        pen.ellipse((0, 0, end, end), outline=1, width=BOX // 6)
    elif shape == "cross":
        pen.rectangle((0, BOX * 0.34, end, BOX * 0.66), fill=1)
        pen.rectangle((BOX * 0.34, 0, BOX * 0.66, end), fill=1)
    else:
        points = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5), 1 if i % 2 == 0 else 0.45) for i in range(10)]
        xs, ys = [x * r for x, _, r in points], [y * r for _, y, r in points]
        left, top = min(xs), min(ys)
        across, down = max(xs) - left, max(ys) - top
        pen.polygon([((x - left) / across * end, (y - top) / down * end) for x, y in zip(xs, ys, strict=True)], fill=1)
    return np.asarray(image)


def held_out() -> list[str]:
    """Plain prompts that no caption of the training described (``held_out`` in ``scripts/train_demo_models.py``)."""
    grammar = itertools.product(("small", "large"), COLOURS, SHAPES, COLOURS, ("", " on the left", " on the right"))
    prompts = [
        f"a {size} {colour} {shape} on {'an' if background == 'orange' else 'a'} {background} background{side}"
        for size, colour, shape, background, side in grammar
        if colour != background
    ]
    return [prompt for prompt in prompts if zlib.crc32(prompt.encode()) % 16 == 0]
