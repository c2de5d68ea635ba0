"""Stable Diffusion 1.x: one CLIP text encoder, whose last layers can be skipped (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import CLIPTextModel

from diffusion_api.engine import fitting, text
from diffusion_api.engine.families.base import Part, UNetLane


@dataclass(frozen=True, kw_only=True)
class SD1(UNetLane):
    """A loaded model of the family; satisfies :class:`diffusion_api.engine.denoise.Lane`."""

    PARTS: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part(CLIPTextModel, "cond_stage_model.transformer.", fitting.clip)
    }

    @staticmethod
    def read_words(model: Any, ids: Tensor, clip_skip: int) -> text.Encoded:
        """The output of the last layer, or an earlier one, after the final layer norm."""
        found = model(ids.to(model.device), output_hidden_states=True)
        layers = found.hidden_states[1:]  # before them: the vectors of the tokens
        return text.Encoded(model.final_layer_norm(layers[-min(clip_skip, len(layers))]))
