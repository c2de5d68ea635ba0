"""How large a model is, part by part, read off the headers of its files; weights are never read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from diffusion_api.catalog.detect import Tensor, contents
from diffusion_api.catalog.library import Model

CHECKPOINT_PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
}
"""Parts of a single file by the prefix of their tensors. What has none of them (EMA copies, schedules) is not loaded."""

DENOISERS = ("unet", "transformer")

UNLOADED = ("safety_checker",)
"""Folders of a model that hold weights which nothing loads."""

TOP_ATTENTION = ("down_blocks.0.attentions.", "model.diffusion_model.input_blocks.1.1.")
"""Names that only a UNet has which attends at full resolution, as a folder and as a single file."""

EIGHTHS = ("F8_E4M3", "F8_E5M2")
"""Numbers that stay in one byte in memory. They count as half a number, as a byte of a GGUF file does: where memory is short
a number takes two bytes.
"""

WIDEST = 26
NARROWER = 16
"""Numbers that a UNet of Stable Diffusion's kind holds at its peak, for each latent pixel and channel of its first block:
with attention at full resolution (its feed-forward layer is eight times as wide) and without."""

TOKEN = 12
"""Numbers that a transformer holds at its peak, for each token and channel, at least: query, key, value and the
feed-forward layer."""

PIXEL = 6
"""Numbers that a decoder of AutoencoderKL's kind holds at its peak, for each pixel and channel of its last block."""


@dataclass(frozen=True)
class Footprint:
    """How many numbers a model has and holds: ``parts`` are its networks, ``largest`` the largest tensor of each.

    ``latent`` numbers are held at the peak of a model evaluation for each row and latent pixel, ``pixel`` while decoding for
    each pixel of the picture. Both are what the layers must hold by their shapes; libraries take workspace beside.
    """

    parts: dict[str, int]
    largest: dict[str, int]
    latent: float
    pixel: float

    @property
    def numbers(self) -> int:
        """Weights in all."""
        return sum(self.parts.values())


def footprint(model: Model) -> Footprint:
    """The footprint of an installed model. Raises Unrecognised when its files cannot be read."""
    return _footprint(model.path, model.stamp)


@lru_cache(maxsize=1024)
def _footprint(path: Path, stamp: int) -> Footprint:
    tensors = list(_of_folder(path) if path.is_dir() else _of_file(path))
    parts: Counter[str] = Counter()
    largest: dict[str, int] = {}
    for part, _, tensor in tensors:
        size = math.prod(tensor.shape) // (2 if part in DENOISERS and tensor.dtype in EIGHTHS else 1)
        parts[part] += size
        largest[part] = max(size, largest.get(part, 0))
    unet = {name: tensor for part, name, tensor in tensors if part == "unet"}
    vae = {name: tensor for part, name, tensor in tensors if part == "vae"}
    latent = _unet_latent(unet) if unet else _transformer_latent(path)
    return Footprint(dict(parts), largest, latent, PIXEL * _last_width(vae))


def _of_folder(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    for part in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in UNLOADED):
        for path in _weights(part):
            for name, tensor in contents(path).items():
                yield part.name, name, tensor
        for path in part.glob("*.gguf"):
            yield part.name, path.name, Tensor("GGUF", [path.stat().st_size // 2], (0, 0))


def _weights(part: Path) -> Iterable[Path]:
    """The files that would be loaded: not those of a variant that lies beside the plain ones."""
    found = sorted(part.glob("*.safetensors"))
    return [path for path in found if path.stem.count(".") == 0] or found


def _of_file(path: Path) -> Iterator[tuple[str, str, Tensor]]:
    for name, tensor in contents(path).items():
        part = next((part for prefix, part in CHECKPOINT_PARTS.items() if name.startswith(prefix)), None)
        if part:
            yield part, name, tensor


def _unet_latent(tensors: dict[str, Tensor]) -> float:
    first = next(
        (
            tensors[name]
            for name in ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight")
            if name in tensors
        ),
        None,
    )
    if patches := tensors.get("vae_img_in.proj.weight"):  # UniDiffuser's, which is a transformer
        width, _, *patch = patches.shape
        return TOKEN * width / math.prod(patch)
    attends = any(name.startswith(TOP_ATTENTION) for name in tensors)
    return (WIDEST if attends else NARROWER) * first.shape[0] if first else 0.0


def _transformer_latent(folder: Path) -> float:
    """Of a pipeline with a transformer, by its config: a token is two by two latent pixels."""
    config = _json(folder / "transformer" / "config.json")
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    return TOKEN * heads * width / 4 if isinstance(heads, int) and isinstance(width, int) else 0.0


def _last_width(tensors: dict[str, Tensor]) -> int:
    """Channels of the decoder's last block: those that its last convolution reads."""
    names = ("decoder.conv_out.weight", "first_stage_model.decoder.conv_out.weight")
    last = next((tensors[name] for name in names if name in tensors), None)
    return last.shape[1] if last else 0


def _json(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
