"""What a file of weights is, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusion_api.catalog.detect import Tensor
from diffusion_api.catalog.layouts import Kind

LORA = re.compile(
    r"\.lora_(up|down)\.|\.lora\.(up|down)\.|\.lora_[AB]\b|_lora\.(up|down)\.|lora_linear_layer"
    r"|\.hada_w\d|\.lokr_w\d|\.oft_(blocks|diag)|\.dora_scale$|^lora_(unet|te\d?)_.*\.diff(_b)?$"
)
UPSCALER = re.compile(r"(params(_ema)?\.)?(conv_first\.weight|model\.1\.sub\.0\..*)$")
ATTENDED = re.compile(r"attn2[._]to_[kv]\b.*\.lora(_down|\.down|_A)\b")
MODEL = ("model.diffusion_model.", "conditioner.embedders.", "cond_stage_model.")
VAE = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")

WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Family by the width of what a UNet attends to."""


def kind_of(tensors: Mapping[str, Tensor]) -> Kind | None:
    """The kind of a file, None where its tensors do not tell."""
    if any(name.startswith(MODEL) for name in tensors):
        return "model"
    if any(LORA.search(name) for name in tensors):
        return "lora"
    if any(name in tensors for name in VAE):
        return "vae"
    if any(UPSCALER.match(name) for name in tensors):
        return "upscaler"
    return "embedding" if _is_embedding(tensors) else None


def family_of(kind: Kind, tensors: Mapping[str, Tensor]) -> str | None:
    """The family that a LoRA or an embedding was made for, None where its tensors do not tell."""
    if kind == "lora":
        return _lora_family(tensors)
    if kind == "embedding":
        if {"clip_l", "clip_g"} <= set(tensors):
            return "sdxl"
        return next((WIDTHS.get(tensor.shape[-1]) for tensor in tensors.values() if tensor.shape), None)
    return None


def _is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    if {"clip_l", "clip_g"} <= set(tensors) or "emb_params" in tensors:
        return True
    return len(tensors) == 1 and all(re.fullmatch(r"<.+>|\*", name) for name in tensors)


def _lora_family(tensors: Mapping[str, Tensor]) -> str | None:
    """By structure: only SDXL has a second text encoder, several blocks in one attention, and none beside its first."""
    names = [re.sub(r"[./]", "_", name) for name in tensors]
    if any("double_blocks" in name or "single_transformer_blocks" in name for name in names):
        return "flux"
    if any(re.match(r"lora_te2_|text_encoder_2_", name) for name in names):
        return "sdxl"
    unet = [name for name in names if "down_blocks_" in name or "up_blocks_" in name or "put_blocks_" in name]
    if any(re.search(r"transformer_blocks_[1-9]", name) for name in unet):
        return "sdxl"
    for name, tensor in tensors.items():
        if ATTENDED.search(name) and tensor.shape and tensor.shape[-1] in WIDTHS:
            return WIDTHS[tensor.shape[-1]]
    if any(re.search(r"down_blocks_0_attentions|input_blocks_[12]_1_", name) for name in unet):
        return "sd1"
    return None
