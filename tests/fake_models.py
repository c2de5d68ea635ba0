"""Files that a scan takes for models, and that hold no weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

UNET = "model.diffusion_model.input_blocks.0.0.weight"
VAE = {"first_stage_model.post_quant_conv.weight": [4, 4, 1, 1]}
SD1_KEYS = VAE | {
    UNET: [8, 4, 3, 3],
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": [8],
}
SD2_KEYS = VAE | {
    UNET: [8, 4, 3, 3],
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": [8],
}
SDXL_KEYS = VAE | {
    UNET: [8, 4, 3, 3],
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [8],
    "conditioner.embedders.1.model.ln_final.weight": [8],
}
REFINER_KEYS = VAE | {UNET: [8, 4, 3, 3], "conditioner.embedders.0.model.ln_final.weight": [8]}
INPAINTING_KEYS = SD1_KEYS | {UNET: [8, 9, 3, 3]}
LORA_KEYS = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": [4, 8]}
VAE_KEYS = {"decoder.conv_in.weight": [8, 4, 3, 3]}
ESRGAN_KEYS = {"conv_first.weight": [8, 3, 3, 3]}
EMBEDDING_KEYS = {"emb_params": [2, 768]}


def checkpoint(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    """A whole safetensors file of zeros in float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def diffusers_folder(
    path: Path,
    *,
    pipeline: str = "StableDiffusionPipeline",
    sample_size: int = 64,
    unet: dict[str, object] | None = None,
    index: dict[str, object] | None = None,
) -> Path:
    """A diffusers folder whose UNet holds no tensor."""
    checkpoint(path / "unet" / "diffusion_pytorch_model.safetensors", {})
    (path / "unet" / "config.json").write_text(json.dumps({"sample_size": sample_size} | (unet or {})))
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | (index or {})))
    return path


def transformer_folder(path: Path, *, pipeline: str = "FluxPipeline", **config: Any) -> Path:
    """A diffusers folder of a pipeline with a transformer, which holds no tensor; ``config`` is the transformer's."""
    checkpoint(path / "transformer" / "diffusion_pytorch_model.safetensors", {})
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    index = {"_class_name": pipeline, "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path
