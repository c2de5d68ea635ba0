"""``diffusion-api info`` and ``test-metadata``: what pictures say of themselves, as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion_api import __version__, images, infotext
from diffusion_api.errors import InvalidImage
from diffusion_api.outputs import SUFFIX

WIDTH = 80
MAX_PIXELS = 2**28
STEM = "test_image_with_metadata"

SAMPLE = infotext.render(
    "a beautiful landscape with mountains and trees, masterpiece, best quality\nein Café im Wald, 森の中 🌲",
    "blurry, low quality, distorted",
    infotext.ordered(
        {
            "Steps": 30,
            "Sampler": "Euler a",
            "Schedule type": "Karras",
            "CFG scale": 7.0,
            "Seed": 123456789,
            "Size": "64x48",
            "Model hash": "a1b2c3d4e5",
            "Model": "stable-diffusion-v1-5",
            "VAE hash": "f6e5d4c3b2",
            "VAE": "vae-ft-mse-840000-ema-pruned",
            "Denoising strength": 0.75,
            "Clip skip": 2,
            "Face restoration": "CodeFormer",
            "LoRAs": "anime_style:0.8, detail_enhancer:0.6",
            "Memory before": "2048.5 MB",
            "Memory after": "3072.1 MB",
            "Generation time": "12.34s",
            "User": "test_user",
            "Version": f"DiffusionAPI v{__version__}",
        }
    ),
)
"""All that an infotext may have to carry: lines, quotes, any letters."""

WEBUI = """\
a castle on a hill, (stormy sky:1.2) <lora:epic:0.7>
Negative prompt: fog, text
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: Latent, \
Lora hashes: "epic: 0123456789ab", Version: v1.10.1"""


def info(path: Path) -> tuple[str, bool]:
    """What the picture in a file says of itself, for people; and whether it has an infotext. Raises InvalidImage, TooLarge."""
    try:
        found = images.read_metadata(path.read_bytes())
    except InvalidImage as error:
        raise InvalidImage(f"{path}: {error}") from error
    lines = [f"{path}: {found.format}, {found.width}x{found.height}", ""]
    lines += (
        [_harmless(found.infotext), "", *_fields(found.infotext)] if found.infotext else ["There is no infotext in it."]
    )
    if found.items:
        lines += [
            "",
            "Other texts",
            *(f"  {_harmless(key)}: {len(text)} characters" for key, text in found.items.items()),
        ]
    return "\n".join(lines), found.infotext is not None


def compared(before: Path, now: Path) -> tuple[str, bool]:
    """Whether two pictures have the same pixels, for people; and whether that is well: what loses something may differ."""
    one, other = (_pixels(path) for path in (before, now))
    if one.shape != other.shape:
        return f"not the same: {one.shape[1]}x{one.shape[0]} before, {other.shape[1]}x{other.shape[0]} now", False
    apart = np.abs(one - other)
    if not apart.any():
        return "the pixels are the same", True
    share = 100 * float(apart.any(axis=2).mean())
    told = f"{share:.1f} % of the pixels differ, by {apart.mean():.2f} of 255 on average and {apart.max()} at most"
    format = images.read_metadata(before.read_bytes()).format
    if format == "png":
        return f"not the same: {told}", False
    return f"{told}; a {format} loses something when it is written", True


def _pixels(path: Path) -> NDArray[np.int16]:
    image = images.decode(path.read_bytes(), max_pixels=MAX_PIXELS)
    return np.asarray(image.convert("RGB")).astype(np.int16)


def unmade(image: Path) -> str | None:
    """Why a picture cannot be made again from what it says of itself; None if it can. Raises InvalidImage."""
    text = images.read_infotext(image.read_bytes())
    if text is None:
        return "it does not say how it was made"
    began = infotext.began_with(infotext.parse(text))
    return began and f"it was {began}: the picture that it began with is not in it"


def test(folder: Path) -> tuple[str, bool]:
    """Write a picture of each format into a folder and read it back: what came of it, and whether all was well."""
    pixels = np.indices((48, 64)).sum(0).astype(np.uint8)[..., None].repeat(3, 2)
    lines, well = [f"Metadata test: pictures in {folder.resolve()}", "=" * WIDTH], True
    for format, suffix in SUFFIX.items():
        path = folder / f"{STEM}.{suffix}"
        path.write_bytes(images.encode(pixels, format=format, quality=85, infotext=SAMPLE))
        same = images.read_infotext(path.read_bytes()) == SAMPLE
        well &= same
        lines.append(f"{'✓' if same else '✗'} {path.name}: " + ("read back as written" if same else "NOT read back"))
    lines += ["", "The text", "-" * WIDTH, SAMPLE, "", "Taken apart", "-" * WIDTH, *_fields(SAMPLE)]
    lines += ["", "A text of the Stable Diffusion web UI, taken apart", "-" * WIDTH, *_fields(WEBUI)]
    return "\n".join(lines), well


def _fields(text: str) -> Iterator[str]:
    told = infotext.parse(text)
    yield f"  prompt: {told.prompt!r}"
    yield f"  negative_prompt: {told.negative_prompt!r}"
    yield from (f"  {key}: {_harmless(str(value))}" for key, value in told.fields.items())


def _harmless(text: str) -> str:
    """Without what a terminal would obey: the text is somebody else's."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
