"""Small safety checkers in the layouts of the real ones, made to flag pictures that look like a given one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor

from diffusion_api.engine.base import Pixels

SIDE, WIDTH, PROJECTED = 32, 32, 16
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 8, "projection_dim": PROJECTED,
}  # fmt: skip
CONFIG: Mapping[str, object] = {
    "architectures": ["SafetyChecker"], "model_type": "clip", "projection_dim": PROJECTED,
    "vision_config": {"model_type": "clip_vision_model", **VISION}, "vision_config_dict": VISION,
    "text_config": {"hidden_size": WIDTH}, "text_config_dict": {"hidden_size": WIDTH},
}  # fmt: skip
"""As the checker of CompVis has it, with fewer numbers."""
PROCESSOR: Mapping[str, object] = {
    "crop_size": SIDE, "size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
NONE = 2.0
"""A threshold that no picture is beyond: cosines are at most 1."""


def checker(flagged: Pixels, spared: Sequence[Pixels]) -> StableDiffusionSafetyChecker:
    """One that flags the first picture and none of the others; the same each time.

    Its first concept is the first picture itself, with a threshold just above the one of the others that is most like it.
    """
    torch.manual_seed(0)
    made = StableDiffusionSafetyChecker(CLIPConfig.from_dict(dict(CONFIG))).eval()
    with torch.no_grad():
        for network in (made.vision_model, made.visual_projection):
            for weights in network.parameters():
                if weights.ndim > 1:
                    weights.normal_(0, 0.2)  # as they are made, pictures all look alike to it
        wanted, *others = (_embedded(made, pixels) for pixels in (flagged, *spared))
        likeness = max(float(torch.cosine_similarity(wanted, other, 0)) for other in others)
        assert likeness < 0.99, likeness
        made.concept_embeds[0] = wanted
        made.concept_embeds_weights[:] = NONE
        made.special_care_embeds_weights[:] = NONE
        made.concept_embeds_weights[0] = likeness + (1 - likeness) / 5
    return made


def _embedded(made: StableDiffusionSafetyChecker, pixels: Pixels) -> torch.Tensor:
    seen = CLIPImageProcessor.from_dict(dict(PROCESSOR))(Image.fromarray(np.asarray(pixels)), return_tensors="pt")
    found: torch.Tensor = made.visual_projection(made.vision_model(seen.pixel_values)[1])[0]
    return found


def save(made: StableDiffusionSafetyChecker, folder: Path, *, processor: Path | None = None) -> Path:
    """Its files as CompVis published them, with the names that tensors had then; the processor's in a folder of its own."""
    folder.mkdir(parents=True)
    (processor or folder).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    ((processor or folder) / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tensors = {name.replace("vision_model.", "vision_model.vision_model."): t for name, t in made.state_dict().items()}
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange((SIDE // 8) ** 2 + 1)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
