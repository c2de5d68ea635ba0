"""Writes a diffusers folder of the SD 1 family as one checkpoint in the original (LDM) key layout, as users have them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def write_checkpoint(folder: Path, clip_vocabulary: Path, target: Path) -> None:
    """``clip_vocabulary`` is CLIP's whole ``vocab.json``: each token's row is placed at CLIP's own id, the others are 0."""
    unet = load_file(next((folder / "unet").glob("*.safetensors")))
    vae = load_file(next((folder / "vae").glob("*.safetensors")))
    text = load_file(next((folder / "text_encoder").glob("*.safetensors")))
    depth = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    tensors: dict[str, Tensor] = {}
    for name, tensor in unet.items():
        tensors["model.diffusion_model." + _unet_name(name, depth, unet)] = tensor
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    for name, tensor in vae.items():
        new = _vae_name(name, levels)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)
        tensors["first_stage_model." + new] = tensor[:, :, None, None] if is_attention else tensor
    for name, tensor in text.items():
        tensors["cond_stage_model.transformer." + name] = tensor
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    tensors[embedding] = _placed(tensors[embedding], folder / "tokenizer" / "vocab.json", clip_vocabulary)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    save_file({k: v.contiguous() for k, v in tensors.items()}, target)


def _placed(rows: Tensor, own: Path, clip: Path) -> Tensor:
    ids, clip_ids = json.loads(own.read_text("utf-8")), json.loads(clip.read_text("utf-8"))
    table = torch.zeros(len(clip_ids), rows.shape[1], dtype=rows.dtype)
    for token, row in ids.items():
        table[clip_ids[token]] = rows[row]
    return table


def _unet_name(name: str, depth: int, unet: dict[str, Tensor]) -> str:
    head = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    stem, leaf = name.rsplit(".", 1)
    if stem in head:
        return f"{head[stem]}.{leaf}"
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        block = 1 + int(found[1]) * (depth + 1) + int(found[3])
        return f"input_blocks.{block}." + _part(found[2], found[4])
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(found[1]) + 1) * (depth + 1)}.0.op.{found[2]}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        place = {"resnets": 2 * int(found[2]), "attentions": 1}[found[1]]
        return f"middle_block.{place}." + _part(found[1], found[3]).split(".", 1)[1]
    if found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        return f"output_blocks.{int(found[1]) * (depth + 1) + int(found[3])}." + _part(found[2], found[4])
    found = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name)
    assert found, name
    attended = any(k.startswith(f"up_blocks.{found[1]}.attentions.") for k in unet)
    return f"output_blocks.{int(found[1]) * (depth + 1) + depth}.{2 if attended else 1}.conv.{found[2]}"


def _part(kind: str, rest: str) -> str:
    if kind == "attentions":
        return "1." + rest
    part, leaf = rest.rsplit(".", 1)
    return f"0.{RESNET[part]}.{leaf}"


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(
        r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)",
        lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}",
        name,
    )
    name = re.sub(
        r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample", name
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name
