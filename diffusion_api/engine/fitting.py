"""What networks the tensors of a single file make: configs are read off the tensors, so that any width loads.

In the original key layout (LDM, SGM) a UNet's ``input_blocks`` are: the first convolution, then for each level its residual
blocks and, but for the last, a downsampler (``.op``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]
Config: TypeAlias = dict[str, Any]

UNET = "model.diffusion_model."
OPEN_CLIP_TOP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip

PUBLISHED = 128
"""Widths from which on a UNet has what the published ones have where no tensor tells: norms of 32 groups, heads 64 wide."""


def unet(tensors: Tensors) -> Config:
    """The config of the UNet: levels, widths, depth and attention."""
    own = {name.removeprefix(UNET): tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    blocks = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("input_blocks."))
    widths: list[int] = []
    attended: list[int] = []
    depth = 0
    level: list[int] = []
    for block in range(1, blocks + 1):
        base = f"input_blocks.{block}."
        if block == blocks or base + "0.op.weight" in own:
            widths.append(own[f"input_blocks.{level[-1]}.0.out_layers.3.weight"].shape[0])
            attended.append(_count(own, f"input_blocks.{level[-1]}.1.transformer_blocks."))
            depth = max(depth, len(level))
            level = []
        else:
            level.append(block)
    middle = "middle_block.1."
    linear = own[middle + "proj_in.weight"].dim() == 2
    return {
        "sample_size": 64,
        "in_channels": own["input_blocks.0.0.weight"].shape[1],
        "out_channels": own["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": depth,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "transformer_layers_per_block": [
            *(max(count, 1) for count in attended[:-1]),
            _count(own, middle + "transformer_blocks."),
        ],
        "cross_attention_dim": own[middle + "transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": linear,
        # diffusers has the number of heads under this name: 8 in SD 1, heads of one width in the models after it.
        "attention_head_dim": [width // _head(widths[0]) for width in widths] if linear else 8,
        "norm_num_groups": _groups(widths[0]),
    }


def text_and_time(tensors: Tensors, *, pooled: int, numbers: int) -> Config:
    """What the config of a UNet has more that also reads a text as a whole, ``pooled`` wide, and some ``numbers``."""
    width = tensors[f"{UNET}label_emb.0.0.weight"].shape[1]
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // numbers,
        "projection_class_embeddings_input_dim": width,
    }


def vae(tensors: Tensors) -> Config:
    """The config of the autoencoder."""
    prefix = "first_stage_model.encoder.down."
    levels = _count(tensors, prefix)
    widths = [tensors[f"{prefix}{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": tensors["first_stage_model.post_quant_conv.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": _count(tensors, prefix + "0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": _groups(widths[0]),
        "sample_size": 512,
    }


Text: TypeAlias = Callable[[Tensors, str], tuple[Config, Tensors]]
"""Config and weights, by their names in transformers, of the text encoder whose tensors have a prefix."""


def clip(tensors: Tensors, prefix: str) -> tuple[Config, Tensors]:
    """A text encoder as transformers names it; old files leave out ``text_model.``."""
    stem = f"{prefix}text_model."
    weights = {
        "text_model." + name.removeprefix(stem).removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    return _text_config(weights, "quick_gelu"), weights


def open_clip(tensors: Tensors, prefix: str) -> tuple[Config, Tensors]:
    """A text encoder as OpenCLIP names it."""
    weights: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            weights |= _from_open_clip(name.removeprefix(prefix), tensor)
    return _text_config(weights, "gelu"), weights


def _from_open_clip(name: str, tensor: Tensor) -> Tensors:
    """A tensor of OpenCLIP by its names in transformers, where three are what is one here."""
    if name == "text_projection":  # multiplied from the other side
        return {"text_projection.weight": tensor.T.contiguous()}
    if name in OPEN_CLIP_TOP:
        return {f"text_model.{OPEN_CLIP_TOP[name]}": tensor}
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
    if not found:
        return {}  # logit_scale and the like, which only training needs
    number, part, what = found.groups()
    layer = f"text_model.encoder.layers.{number}."
    if part == "attn.in_proj":
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return {f"{layer}self_attn.{which}.{what}": rows.contiguous() for which, rows in parts}
    return {f"{layer}{OPEN_CLIP_LAYER.get(part, part)}.{what}": tensor}


def _text_config(weights: Mapping[str, Tensor], activation: str) -> Config:
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    projection = weights.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(weights, "text_model.encoder.layers."),
        "num_attention_heads": width // 64 if width >= 256 else 4,
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow the prefix, counted from 0."""
    place = prefix.count(".")
    return 1 + max((int(name.split(".")[place]) for name in tensors if name.startswith(prefix)), default=-1)


def _groups(width: int) -> int:
    """Group count of the norms: 4 or 2 channels a group in the small models that ship here (64 → 16, 16 → 8)."""
    return 32 if width >= PUBLISHED else (16 if width >= 64 else 8)


def _head(width: int) -> int:
    """Width of a UNet's heads: 16 in the small models that ship here."""
    return 64 if width >= PUBLISHED else 16
