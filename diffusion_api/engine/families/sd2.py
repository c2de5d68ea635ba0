"""Stable Diffusion 2.x: OpenCLIP's ViT-H without its last layer as text encoder; predicts epsilon, or v at 768 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPTextModel

from diffusion_api.engine import fitting, text
from diffusion_api.engine.families.base import Part, UNetLane
from diffusion_api.engine.fitting import Tensors

PROBE = 32
"""Side of the latents that the probe looks at."""


@dataclass(frozen=True, kw_only=True)
class SD2(UNetLane):
    """A loaded model of the family; satisfies :class:`diffusion_api.engine.denoise.Lane`."""

    PARTS: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part(CLIPTextModel, "cond_stage_model.model.", fitting.open_clip)
    }
    PADDING: ClassVar[Mapping[str, str]] = {"text_encoder": "!"}

    @classmethod
    def _fit_text(cls, part: Part, tensors: Tensors) -> tuple[fitting.Config, Tensors]:
        """Without the last layer: single files have it, and it is never read."""
        config, weights = part.fit(tensors, part.prefix)
        last = config["num_hidden_layers"] - 1
        unread = (f"text_model.encoder.layers.{last}.", "text_projection.")
        return config | {"num_hidden_layers": last}, {n: t for n, t in weights.items() if not n.startswith(unread)}

    @staticmethod
    def read_words(model: Any, ids: Tensor, clip_skip: int) -> text.Encoded:
        """The output of the last layer after the final layer norm. As in A1111, no layer can be skipped."""
        return text.Encoded(model(ids.to(model.device)).last_hidden_state)

    def _probed(self) -> dict[str, object]:
        """Both kinds have the same shapes, so a prediction has to tell: for pure noise, epsilon is that noise, v is not."""
        noise = torch.randn(1, 4, PROBE, PROBE, generator=torch.Generator().manual_seed(0)).to(self.device)
        extra = self.blank(8 * PROBE, 8 * PROBE)
        with torch.inference_mode():
            predicted = self.predict(noise, len(self.levels.sigmas) - 1, self.encode(("",)), extra)
        likeness = torch.nn.functional.cosine_similarity(predicted.flatten(), noise.flatten(), dim=0)
        return {"prediction_type": "epsilon" if likeness > 0.5 else "v_prediction"}
