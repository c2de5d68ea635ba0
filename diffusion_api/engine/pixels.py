"""Pictures and masks as tensors, and latents and tensors as pictures."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_api.engine.base import Pixels
from diffusion_api.errors import NotFinite

OVERFLOWED = (
    "the model's numbers overflowed (NaN), so there is no picture: try another sampler, less guidance or "
    "another size; if every picture of this model fails, its file is damaged or it needs float32"
)

DECODED_AGAIN = "the picture overflowed while it was decoded, and was decoded again in float32"

LARGEST_PREVIEW = 32
"""Latent pixels of a preview's longer side: decoding them costs less than a step at the usual sizes."""


class Decoder(Protocol):
    """What makes pictures of latents."""

    def decode(self, latents: Tensor, *, precise: bool = False) -> Tensor:
        """(1, c, h, w) clean latents → (1, 3, 8h, 8w), -1 to 1; ``precise``: computed in float32."""


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


def developed(decoder: Decoder, latents: Tensor) -> tuple[Pixels, tuple[str, ...]]:
    """The picture in clean latents, and what is to be said about it. Raises NotFinite.

    A decoder that overflows in half precision gets a second try in float32. Looked at here, once, since a look at every
    step would make the device wait.
    """
    if finite(latents):
        if finite(values := decoder.decode(latents)):
            return to_pixels(values), ()
        if finite(values := decoder.decode(latents, precise=True)):
            return to_pixels(values), (DECODED_AGAIN,)
    raise NotFinite(OVERFLOWED)


def finite(tensor: Tensor) -> bool:
    """Whether all its numbers are."""
    return bool(torch.isfinite(tensor).all())


def previewed(decoder: Decoder, latents: Tensor) -> Pixels:
    """The picture in clean latents, made smaller before they are decoded. Raises NotFinite."""
    height, width = latents.shape[2:]
    share = min(1.0, LARGEST_PREVIEW / max(height, width))
    size = max(1, round(height * share)), max(1, round(width * share))
    return developed(decoder, interpolate(latents, size, mode="area"))[0]
