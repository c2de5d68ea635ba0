"""Writes diffusers folders of Stable Diffusion's families as one checkpoint in the original (LDM, SGM) key layout, as users
have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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


TEXT_ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
TOP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def write_checkpoint(folder: Path, clip_vocabulary: Path, target: Path, family: str = "sd1") -> None:
    """``clip_vocabulary`` is CLIP's whole ``vocab.json``: each token's row is placed at CLIP's own id, the others are 0."""
    parts = {
        part: load_file(next((folder / part).glob("*.safetensors"))) for part in ("unet", "vae", *TEXT_ENCODERS[family])
    }
    for part in TEXT_ENCODERS[family]:
        # transformers leaves out "text_model." where nothing stands beside it, from version 5 on
        plain = {name.removeprefix("text_model."): tensor for name, tensor in parts[part].items()}
        parts[part] = {n if n.startswith("text_projection.") else f"text_model.{n}": t for n, t in plain.items()}
        vocabulary = folder / part.replace("text_encoder", "tokenizer") / "vocab.json"
        name = "text_model.embeddings.token_embedding.weight"
        parts[part][name] = _placed(parts[part][name], vocabulary, clip_vocabulary)
    depth = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    save_file(original(parts, family, depth), target)


def original(parts: Mapping[str, dict[str, Tensor]], family: str, depth: int) -> dict[str, Tensor]:
    """The tensors of a single file; ``depth`` is how many residual blocks each level of the UNet has."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in parts["unet"].items():
        tensors["model.diffusion_model." + _unet_name(name, depth, parts["unet"])] = tensor
    levels = len({name.split(".")[2] for name in parts["vae"] if name.startswith("encoder.down_blocks.")})
    for name, tensor in parts["vae"].items():
        new = _vae_name(name, levels)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)
        tensors["first_stage_model." + new] = tensor[:, :, None, None] if is_attention else tensor
    for part, prefix in TEXT_ENCODERS[family].items():
        if prefix.endswith("transformer."):
            tensors |= {prefix + name: tensor for name, tensor in parts[part].items()}
            tensors[prefix + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            tensors |= {prefix + name: t for name, t in _open_clip(parts[part], unread=family == "sd2").items()}
    if family.startswith("sd1"):
        tensors["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _open_clip(text: dict[str, Tensor], *, unread: bool) -> dict[str, Tensor]:
    """A text encoder as OpenCLIP has it; ``unread``: with a last layer more, which SD 2 does not read."""
    found: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    layers = 1 + max(int(name.split(".")[3]) for name in text if name.startswith("text_model.encoder.layers."))
    for name, tensor in text.items():
        stem = name.removeprefix("text_model.")
        if stem == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif stem in TOP:
            found[TOP[stem]] = tensor
        elif "self_attn.q_proj" in stem:
            _, _, number, *_, what = stem.split(".")
            rows = [text[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"transformer.resblocks.{number}.attn.in_proj_{what}"] = torch.cat(rows)
        elif not re.search("self_attn.[kv]_proj", stem):
            _, _, number, *part, what = stem.split(".")
            found[f"transformer.resblocks.{number}.{LAYER['.'.join(part)]}.{what}"] = tensor
    if unread:
        last = {name: tensor for name, tensor in found.items() if f"resblocks.{layers - 1}." in name}
        found |= {
            name.replace(f".{layers - 1}.", f".{layers}."): torch.full_like(t, torch.nan) for name, t in last.items()
        }
        found["text_projection"] = torch.zeros(
            2 * [len(found["ln_final.weight"])], dtype=found["ln_final.weight"].dtype
        )
    return found


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
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
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
