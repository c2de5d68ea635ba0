"""Pictures and masks as tensors, and tensors as pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_api.engine.base import Pixels


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
