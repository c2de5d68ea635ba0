"""The safety checker of Stable Diffusion: tells which pictures not everybody shall see. What is done about them is no
matter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from diffusion_api.catalog.checkers import CheckerFiles
from diffusion_api.catalog.detect import safetensors_header, weight_files
from diffusion_api.engine.base import Pixels
from diffusion_api.engine.families.base import complete, read_json, read_parts

DTYPE = torch.float32
"""On every device: a checker that overflows would flag nothing."""


def size_of(files: CheckerFiles) -> int:
    """Bytes of a checker's weights in memory. Raises Unrecognised."""
    tensors = [t for path in weight_files(files.folder) for t in safetensors_header(path).values()]
    return sum(prod(tensor.shape) for tensor in tensors) * DTYPE.itemsize


@dataclass(frozen=True)
class Checker:
    """A loaded safety checker, ``size`` bytes of weights at ``place``."""

    network: Any
    processor: Any
    place: torch.device
    size: int

    @classmethod
    def read(cls, files: CheckerFiles, place: torch.device) -> Checker:
        """From its files. Raises anything at all when they are broken."""
        network, found = StableDiffusionSafetyChecker.from_pretrained(
            None,
            config=CLIPConfig.from_dict(read_json(files.folder / "config.json")),
            state_dict=read_parts(files.folder),
            dtype=DTYPE,
            local_files_only=True,
            output_loading_info=True,
        )
        complete(StableDiffusionSafetyChecker, found["missing_keys"])
        if not all(bool(torch.isfinite(weights).all()) for weights in network.parameters()):
            raise ValueError("some of its weights are no finite numbers")
        processor = CLIPImageProcessor.from_dict(read_json(files.processor))
        return cls(network.to(place).eval(), processor, place, size_of(files))

    def flags(self, pixels: Pixels) -> bool:
        """Whether a picture is one of those. Each is looked at alone, so that it does not matter which others there are."""
        seen = self.processor(Image.fromarray(pixels), return_tensors="pt").pixel_values.to(self.place, DTYPE)
        in_its_place = [np.zeros(1)]  # what is flagged is blackened, and that is not for the network to decide
        _, (flagged,) = self.network(clip_input=seen, images=in_its_place)
        return bool(flagged)
