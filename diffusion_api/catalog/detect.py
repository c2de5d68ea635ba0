"""The family of a model, from the structure of its files and never from its name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

MAX_HEADER = 64 * 2**20

PIPELINES = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionImg2ImgPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
}
SD1_WIDTH, SD2_WIDTH, SDXL_WIDTH = 768, 1024, 2048


class Unrecognised(ValueError):
    """The files are no model of a known kind; the text says why."""


def folder_family(folder: Path) -> tuple[str, int]:
    """Family and native size in pixels of a diffusers folder. Raises Unrecognised."""
    index = _json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    family = PIPELINES.get(pipeline)
    if family is None:
        raise Unrecognised(f"pipeline {pipeline} has no lane yet")
    unet = _json(folder / "unet" / "config.json")
    if family == "sd1" and unet.get("cross_attention_dim") == SD2_WIDTH:
        family = "sd2"
    if not any((folder / "unet").glob("diffusion_pytorch_model*.safetensors")):
        raise Unrecognised("its unet/ holds no safetensors weights")
    size = unet.get("sample_size")
    return family, (size if isinstance(size, int) else 64) * 8


def file_family(path: Path) -> tuple[str, int]:
    """Family and native size of a single file in the original key layout. Raises Unrecognised."""
    header = safetensors_header(path)
    if "model.diffusion_model.input_blocks.0.0.weight" not in header:
        raise Unrecognised("it is no checkpoint: it holds no model.diffusion_model tensors (a LoRA, VAE or embedding?)")
    if any(k.startswith("conditioner.embedders.") for k in header):
        return "sdxl", 1024
    if "cond_stage_model.model.transformer.resblocks.0.ln_1.weight" in header:
        return "sd2", 768
    channels = header["model.diffusion_model.input_blocks.0.0.weight"]["shape"][1]
    if channels != 4:
        return "sd1-inpainting", 512
    return "sd1", 512


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, its length checked before it is read. Raises Unrecognised."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise Unrecognised("it is no safetensors file: its header length is wrong (an unfinished download?)")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        if isinstance(error, Unrecognised):
            raise
        raise Unrecognised(f"its header cannot be read: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise Unrecognised("its header is no JSON object")
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Unrecognised(f"{path.parent.name}/{path.name} cannot be read") from error
    if not isinstance(content, dict):
        raise Unrecognised(f"{path.parent.name}/{path.name} is no JSON object")
    return content
