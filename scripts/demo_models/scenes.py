"""Drawn scenes and their captions."""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

Size = tuple[int, int]
"""Width and height in pixels."""

COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 220, 50),
    "purple": (150, 60, 190), "orange": (250, 140, 30), "black": (20, 20, 20), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZE_WORDS = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
SIDE_PHRASES = {
    "left": ("on the left", "on the left", "on the left side", "left", "to the left"),
    "right": ("on the right", "on the right", "on the right side", "right", "to the right"),
    "middle": ("in the middle", "in the center", "centered", "in the centre"),
}
FILLERS = (
    "masterpiece best quality highly detailed photo of beautiful simple drawing picture image illustration digital art "
    "sharp focus high resolution hd uhd 4k 8k absurdres artwork concept trending on artstation cinematic lighting studio "
    "soft light dramatic scene professional realistic photograph portrait landscape style painting oil canvas watercolor "
    "sketch anime cartoon minimal clean flat vector graphic design logo icon geometric shape colorful vivid bright dark "
    "blurry low bad worst ugly distorted deformed noise grainy watermark text signature cropped jpeg artifacts nice pretty "
    "amazing stunning great epic a an the with and very one single solid plain paper wall poster cat dog girl man woman "
    "house tree forest mountain river city night day sun sky sea cloud flower car face eyes hair smile old new young"
).split()

# (width, height): pictures drawn, batch size, weight in the mix at the start and after 60 % of the run. Words are learnt
# fastest on small pictures; a coarse shape is all that 64 px can show.
BUCKETS = {
    (64, 64): (9000, 48, 0.20, 0.08), (96, 96): (4000, 24, 0.27, 0.17), (128, 128): (5000, 16, 0.36, 0.35),
    (192, 128): (1200, 8, 0.03, 0.04), (128, 192): (1200, 8, 0.03, 0.04), (192, 192): (1500, 6, 0.05, 0.12),
    (256, 256): (2000, 4, 0.06, 0.20),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    side: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


Pools = dict[Size, tuple[list[Scene], torch.Tensor]]
"""Scenes of one size and their pictures, (count, 3, height, width), uint8."""


def random_scene(rng: random.Random) -> Scene:
    first, second, background = rng.sample(list(COLOURS), 3)
    if rng.random() < 0.12:
        left, right = (Thing("small", c, rng.choice(SHAPES), s) for c, s in ((first, "left"), (second, "right")))
        return Scene((left, right), background)
    side = rng.choice(("left", "right", "middle", "middle"))
    return Scene((Thing(rng.choice(("small", "large")), first, rng.choice(SHAPES), side),), background)


def plain(scene: Scene) -> str:
    """The caption of a one-object scene in its plain form."""
    thing = scene.things[0]
    side = "" if thing.side == "middle" else f" on the {thing.side}"
    return f"a {thing.size} {thing.colour} {thing.shape} on {_a(scene.background)} background{side}"


def held_out(scene: Scene) -> bool:
    """True for one scene in sixteen, which no caption of the training ever describes: tests ask for these."""
    return len(scene.things) == 1 and zlib.crc32(plain(scene).encode()) % 16 == 0


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """The scene at the given size in pixels, anti-aliased. Large is 60-75 % of the shorter side, small 30-40 %."""
    k = 4 if max(width, height) <= 96 else 2
    image = Image.new("RGB", (width * k, height * k), COLOURS[scene.background])
    pen = ImageDraw.Draw(image)
    short = min(width, height)
    for thing in scene.things:
        r = short * (rng.uniform(0.15, 0.20) if thing.size == "small" else rng.uniform(0.30, 0.375))
        margin = r + 0.02 * short
        if thing.side == "middle":
            cx = width * rng.uniform(0.47, 0.53)
        else:
            cx = max(margin, width * rng.uniform(0.22, 0.29))
            cx = cx if thing.side == "left" else width - cx
        cy = height * 0.5 + (height * 0.5 - margin) * rng.uniform(-0.4, 0.4)
        _pen_shape(pen, thing.shape, cx * k, cy * k, r * k, COLOURS[thing.colour])
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _pen_shape(
    pen: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, fill: tuple[int, int, int]
) -> None:
    box = (cx - r, cy - r, cx + r, cy + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle((cx - 0.9 * r, cy - 0.9 * r, cx + 0.9 * r, cy + 0.9 * r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(cx, cy - r), (cx - r, cy + 0.9 * r), (cx + r, cy + 0.9 * r)], fill=fill)
    elif shape == "star":
        spikes = [(r if i % 2 == 0 else r * 0.45, i * math.pi / 5) for i in range(10)]
        pen.polygon([(cx + d * math.sin(a), cy - d * math.cos(a)) for d, a in spikes], fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, int(r * 0.36)))
    else:
        pen.rectangle((cx - r, cy - r * 0.32, cx + r, cy + r * 0.32), fill=fill)
        pen.rectangle((cx - r * 0.32, cy - r, cx + r * 0.32, cy + r), fill=fill)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to say the scene; a caption may leave out what it does not care about."""
    if len(scene.things) == 2:
        left, right = (_noun(t, rng, side=True, article=True) for t in scene.things)
        first, second = (left, right) if rng.random() < 0.7 else (right, left)
        return _dress(f"{first} and {second} on a {scene.background} background", rng)
    thing = scene.things[0]
    form = rng.random()
    if form < 0.55:
        side = _side(thing, rng)
        text = f"{_noun(thing, rng, article=True)} on {_a(scene.background)} background{side}"
    elif form < 0.67:
        text = f"{_noun(thing, rng)} on {scene.background} background{_side(thing, rng)}"
    elif form < 0.77:
        parts = [f"{thing.colour} {thing.shape}", f"{scene.background} background", rng.choice(SIZE_WORDS[thing.size])]
        rng.shuffle(parts)
        text = ", ".join(parts) + _side(thing, rng)
    elif form < 0.85:
        text = f"{scene.background} background with {_noun(thing, rng, article=True)}{_side(thing, rng)}"
    elif form < 0.92:
        text = f"{_a(thing.colour)} {thing.shape} on {_a(scene.background)} background{_side(thing, rng)}"
    elif form < 0.97:
        text = _noun(thing, rng, article=True) + _side(thing, rng)
    else:
        text = f"{thing.colour} {thing.shape}"
    return _dress(text, rng)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _noun(thing: Thing, rng: random.Random, *, side: bool = False, article: bool = False) -> str:
    word = thing.size if rng.random() < 0.7 else rng.choice(SIZE_WORDS[thing.size])
    text = f"{word} {thing.colour} {thing.shape}" + (_side(thing, rng).replace(",", "") if side else "")
    return f"a {text}" if article else text


def _side(thing: Thing, rng: random.Random) -> str:
    if thing.side == "middle" and rng.random() < 0.75:
        return ""
    return rng.choice((" ", " ", ", ")) + rng.choice(SIDE_PHRASES[thing.side])


def _dress(text: str, rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.18:
        return text + ", " + filler(rng, rng.randint(1, 8))
    if dice < 0.28:
        return filler(rng, rng.randint(1, 6)) + ", " + text
    if dice < 0.33:
        return filler(rng, rng.randint(8, 45)) + ", " + text
    if dice < 0.36:
        return text + ", " + filler(rng, rng.randint(8, 45))
    return text + ("." if dice > 0.97 else "")


def filler(rng: random.Random, count: int) -> str:
    """Words that mean nothing to the model, some of them unknown ones that fall apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [
        "".join(rng.choices(letters, k=rng.randint(2, 6))) if rng.random() < 0.06 else rng.choice(FILLERS)
        for _ in range(count)
    ]
    return "".join(w + rng.choice((" ", " ", ", ")) for w in words).strip(" ,")


def caption_chunks(scenes: list[Scene], rng: random.Random) -> list[list[str]]:
    """Captions of a batch, one in ten of them empty; or, as long prompts are, two chunks of text, one without a meaning."""
    texts = ["" if rng.random() < 0.1 else caption(s, rng) for s in scenes]
    if rng.random() > 0.08:
        return [texts]
    rest = ["" if rng.random() < 0.5 else filler(rng, rng.randint(3, 40)) for _ in texts]
    pair = [texts, rest]
    return pair if rng.random() < 0.5 else pair[::-1]


def draw_all() -> Pools:
    """Scenes and pictures of each bucket."""
    out = {}
    for (width, height), (count, *_) in BUCKETS.items():
        rng = random.Random(width * 1000 + height)
        scenes = [random_scene(rng) for _ in range(count)]
        pictures = np.stack([np.asarray(draw(s, width, height, rng)) for s in scenes])
        out[(width, height)] = (scenes, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous())
        print(f"scenes {width}x{height}: {count}", flush=True)
    return out
