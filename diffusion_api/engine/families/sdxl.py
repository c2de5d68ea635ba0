"""Stable Diffusion XL, base and refiner (arXiv:2307.01952): the UNet also reads a text as a whole, and sizes or scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusion_api.engine import fitting, text
from diffusion_api.engine.families.base import Part, UNetLane
from diffusion_api.engine.fitting import Tensors
from diffusion_api.schema.request import Emphasis

SCORE, NEGATIVE_SCORE = 6.0, 2.5
"""How beautiful a picture is to be that the refiner draws, and how beautiful one that it is led away from."""


@dataclass(frozen=True, kw_only=True)
class SDXL(UNetLane):
    """A loaded base model; satisfies :class:`diffusion_api.engine.denoise.Lane`."""

    PARTS: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part(CLIPTextModel, "conditioner.embedders.0.transformer.", fitting.clip),
        "text_encoder_2": Part(CLIPTextModelWithProjection, "conditioner.embedders.1.model.", fitting.open_clip),
    }
    PADDING: ClassVar[Mapping[str, str]] = {"text_encoder_2": "!"}
    SCALING: ClassVar[float] = 0.13025
    ZEROED: ClassVar[bool] = True
    XL: ClassVar[bool] = True
    NUMBERS: ClassVar[int] = 6
    """How many numbers the UNet reads of each picture."""

    @classmethod
    def _fit_unet(cls, tensors: Tensors) -> fitting.Config:
        pooled = tensors[f"{cls.PARTS['text_encoder_2'].prefix}text_projection"].shape[1]
        return fitting.unet(tensors) | fitting.text_and_time(tensors, pooled=pooled, numbers=cls.NUMBERS)

    @staticmethod
    def read_words(model: Any, ids: Tensor, clip_skip: int) -> text.Encoded:
        """The output of the layer before the last one, without a norm. As in A1111, no more layers can be skipped."""
        found = model(ids.to(model.device), output_hidden_states=True)
        return text.Encoded(found.hidden_states[-2], getattr(found, "text_embeds", None))

    def _pooled(self, said: str, emphasis: Emphasis) -> Tensor | None:
        return self.words["text_encoder_2"].pooled(said, emphasis)

    def _added(self, latents: Tensor, conditionings: Sequence[text.Conditioning]) -> dict[str, Tensor]:
        height, width = (8 * side for side in latents.shape[2:])
        pooled = [conditioning.pooled for conditioning in conditionings if conditioning.pooled is not None]
        numbers = [self._numbers(height, width, conditioning.negative) for conditioning in conditionings]
        return {
            "text_embeds": torch.cat(pooled).to(self.unet.dtype),
            "time_ids": torch.tensor(numbers, device=self.device, dtype=self.unet.dtype),
        }

    def _numbers(self, height: float, width: float, negative: bool) -> tuple[float, ...]:
        """The picture's size before and after it was cropped, and where that was: nowhere."""
        return height, width, 0, 0, height, width


@dataclass(frozen=True, kw_only=True)
class SDXLRefiner(SDXL):
    """A loaded refiner, which draws what is left of a picture's noise and has the second text encoder alone."""

    PARTS: ClassVar[Mapping[str, Part]] = {
        "text_encoder_2": Part(CLIPTextModelWithProjection, "conditioner.embedders.0.model.", fitting.open_clip)
    }
    NUMBERS: ClassVar[int] = 5

    def _numbers(self, height: float, width: float, negative: bool) -> tuple[float, ...]:
        """The picture's size, where it was cropped, and its score."""
        return height, width, 0, 0, NEGATIVE_SCORE if negative else SCORE
