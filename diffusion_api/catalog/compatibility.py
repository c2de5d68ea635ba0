"""Whether a LoRA fits a model, from the names and shapes of their tensors.

A LoRA names the layers that it changes as kohya does (``lora_unet_down_blocks_0_…``), as diffusers and PEFT do
(``unet.down_blocks.0.…``), or as the original checkpoints do (``input_blocks.1.1.…``), each with dots or underscores. All of
them are looked up here in one table of the model's layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from diffusion_api.catalog.detect import safetensors_header, weight_files

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Sequence[int]]
"""The shape of each tensor, by its name."""

DENOISERS = ("unet", "transformer")
"""Parts of a model that a LoRA may mean by ``unet``; a model has one of them."""

ADVICE = {
    ("sdxl", "standard"): "appears to be designed for SDXL models, but you're using a standard SD model. "
    "Try using an SDXL base model.",
    ("standard", "sdxl"): "appears to be designed for SD 1.5 models, but you're using an SDXL model. "
    "Try using a standard SD base model.",
}
STANDARD = {"sd1": "standard", "sd2": "standard", "sdxl": "sdxl", "sdxl-refiner": "sdxl"}

_PREFIXES = (
    ("lora_unet_", "unet"), ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"),
    ("unet.", "unet"), ("text_encoder.", "text_encoder"), ("text_encoder_2.", "text_encoder_2"), ("transformer.", "unet"),
    ("diffusion_model.", "unet"), ("lycoris_", "unet"), ("", "unet"),
)  # fmt: skip
_ROLES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha", "dora_scale": "magnitude",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude", "diff": "diff",
} | {
    role: role for role in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )
}  # fmt: skip
"""What a tensor is in its layer, by the end of its name."""

_TENSOR = re.compile(rf"(?P<layer>.+)\.(?P<role>{'|'.join(map(re.escape, sorted(_ROLES, key=len, reverse=True)))})")
_PROCESSOR = re.compile(r"(?P<layer>.+)\.processor\.to_(?P<what>q|k|v|out)_lora\.(?P<role>down|up)\.weight")

_RESNET = {
    "in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
    "in_layers.0": "norm1", "out_layers.0": "norm2",
}  # fmt: skip
_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


@dataclass(frozen=True)
class Layer:
    """A weight of the model that a LoRA may change: its part, its name there, its shape."""

    part: str
    name: str
    shape: Shape


Layers: TypeAlias = Mapping[tuple[str, str], Layer]
"""A model's layers by every name that a LoRA may use: the part, and the path with underscores."""


@dataclass(frozen=True)
class Change:
    """What a LoRA has for one layer: the names of its tensors by their role."""

    layer: Layer
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Fit:
    """How a LoRA and a model go together.

    ``misfits`` says of each layer that has another shape how it differs; ``unknown`` are the LoRA's tensors for layers
    that the model does not have, or of a kind that is not known.
    """

    changes: tuple[Change, ...]
    misfits: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def applies(self) -> bool:
        """True when it can be applied, if only in part."""
        return bool(self.changes) and not self.misfits


def layers(parts: Mapping[str, Shapes]) -> Layers:
    """The table of a model's layers; names within a part are diffusers', transformers' or those of a checkpoint."""
    table: dict[tuple[str, str], Layer] = {}
    for part, shapes in parts.items():
        weights = [name for name in shapes if name.endswith(".weight")]
        other_names = _translation(weights) if part == "unet" else {}
        for name in weights:
            path = name.removesuffix(".weight")
            layer = Layer(part, name, tuple(shapes[name]))
            for alias in (path, *_translated(path, other_names)):
                table[_slot(part), _flat(alias)] = layer
    return table


def fit(lora: Shapes, table: Layers) -> Fit:
    """How a LoRA's tensors go with a model's layers."""
    found: dict[Layer, dict[str, str]] = {}
    unknown: list[str] = []
    for name in lora:
        place = _place(name)
        layer = place and table.get(place[:2])
        if place and layer:
            found.setdefault(layer, {})[place[2]] = name
        else:
            unknown.append(name)
    changes: list[Change] = []
    misfits: list[str] = []
    for layer, tensors in found.items():
        shapes = {role: tuple(lora[name]) for role, name in tensors.items()}
        shape = _shape_of(shapes)
        if shape is None or ("magnitude" in shapes and math.prod(shapes["magnitude"]) not in shape[:2]):
            unknown += tensors.values()
        elif shape[0] != layer.shape[0] or math.prod(shape) != math.prod(layer.shape):
            misfits.append(f"{layer.name} is {_sides(shape)} there and {_sides(layer.shape)} in the model")
        else:
            changes.append(Change(layer, tensors))
    return Fit(tuple(changes), tuple(misfits), tuple(unknown))


def advice(lora: str, model: str, *, made_for: str | None, family: str) -> str:
    """What a caller is told of a LoRA that does not fit a model; families as the catalog has them."""
    pair = STANDARD.get(made_for or ""), STANDARD.get(family, family)
    general = f"may not be compatible with '{model}'. Check if the LoRA was trained for the same model architecture."
    return f"LoRA '{lora}' {ADVICE.get((pair[0] or '', pair[1]), general)}"


def reason(found: Fit) -> str:
    """Why a LoRA does not apply, in a sentence without its end."""
    if found.misfits:
        others = len(found.misfits) - 1
        return found.misfits[0] + (
            f", and {others} other layer{'s differ' if others > 1 else ' differs'}" if others else ""
        )
    return f"none of its {len(found.unknown)} tensors belongs to a layer of the model"


def model_shapes(path: Path, stamp: int) -> Mapping[str, Shapes]:
    """The shapes in a model's files by part, read from their headers. Raises Unrecognised."""
    return _folder_shapes(path, stamp) if path.is_dir() else _file_shapes(path, stamp)


@lru_cache(maxsize=64)
def _folder_shapes(path: Path, stamp: int) -> Mapping[str, Shapes]:
    parts: dict[str, Shapes] = {}
    for part in (*DENOISERS, "text_encoder", "text_encoder_2"):
        shapes: dict[str, Sequence[int]] = {}
        for file in weight_files(path / part) if (path / part).is_dir() else ():
            shapes |= {name: tensor.shape for name, tensor in safetensors_header(file).items()}
        if shapes:
            parts[part] = shapes
    return parts


@lru_cache(maxsize=64)
def _file_shapes(path: Path, stamp: int) -> Mapping[str, Shapes]:
    parts: dict[str, dict[str, Sequence[int]]] = {}
    header = safetensors_header(path)
    second = "conditioner.embedders.1." if any(k.startswith("conditioner.embedders.1.") for k in header) else None
    prefixes = {
        "model.diffusion_model.": "unet",
        "cond_stage_model.transformer.": "text_encoder",
        "cond_stage_model.": "text_encoder",
        "conditioner.embedders.0.transformer.": "text_encoder",
        "conditioner.embedders.0.": "text_encoder" if second else "text_encoder_2",
        "conditioner.embedders.1.": "text_encoder_2",
    }
    for name, tensor in header.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix:
            for own, shape in _open_clip(name.removeprefix(prefix), tensor.shape):
                parts.setdefault(prefixes[prefix], {})[own] = shape
    return parts


def _open_clip(name: str, shape: Sequence[int]) -> Iterator[tuple[str, Sequence[int]]]:
    """A tensor of an OpenCLIP text encoder by its names in transformers, which has three for one; any other as it is."""
    found = re.fullmatch(r"model\.transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if not found:
        yield name, shape
        return
    layer = f"encoder.layers.{found[1]}."
    if found[2] == "attn.in_proj":
        for what in "qkv":
            yield f"{layer}self_attn.{what}_proj.{found[3]}", [shape[0] // 3, *shape[1:]]
    else:
        yield f"{layer}{_CLIP.get(found[2], found[2])}.{found[3]}", shape


def _slot(part: str) -> str:
    return "unet" if part in DENOISERS else part


def _flat(path: str) -> str:
    return path.removeprefix("text_model.").replace(".", "_").removeprefix("text_model_")


def _place(name: str) -> tuple[str, str, str] | None:
    """Part, flat path and role of a LoRA's tensor; None for one of no known kind."""
    name = name.removeprefix("base_model.model.").replace(".default.", ".").removesuffix(".default")
    if found := _PROCESSOR.fullmatch(name):
        what = "to_out.0" if found["what"] == "out" else f"to_{found['what']}"
        path, role = f"{found['layer']}.{what}", found["role"]
    elif found := _TENSOR.fullmatch(name):
        path, role = found["layer"], _ROLES[found["role"]]
    else:
        return None
    prefix, part = next((prefix, part) for prefix, part in _PREFIXES if path.startswith(prefix))
    return part, _flat(path.removeprefix(prefix)), role


def _shape_of(tensors: Mapping[str, Shape]) -> Shape | None:
    """The shape of the change that tensors of these roles and shapes make; None when they make none."""
    has = tensors.keys()
    if {"down", "up"} <= has:
        up, down = tensors["up"], tensors["down"]
        if min(len(up), len(down)) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1:
            return None
        kernel = tensors["mid"][2:] if "mid" in has else down[2:]
        return (up[0], down[1], *kernel)
    if "hada_w1_a" in has:
        one, other = (_factor(tensors, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
        return one if one == other else None
    if "diff" in has:
        return tensors["diff"] or None
    one, other = _factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2", "lokr_t2")
    return (one[0] * other[0], one[1] * other[1], *other[2:]) if one and other else None


def _factor(tensors: Mapping[str, Shape], name: str, core: str = "") -> Shape | None:
    """The shape of a factor, itself whole, or a product of two, around a Tucker core if there is one."""
    if name in tensors:
        return tensors[name] if len(tensors[name]) >= 2 else None
    a, b = tensors.get(f"{name}_a", ()), tensors.get(f"{name}_b", ())
    if min(len(a), len(b)) < 2:
        return None
    if core in tensors:
        middle = tensors[core]
        return (a[1], b[1], *middle[2:]) if middle[:2] == (a[0], b[0]) else None
    return (a[0], *b[1:]) if a[1] == b[0] and len(a) == 2 else None


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _translation(names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """For the blocks of a UNet in one naming their names in the other, diffusers' or the original checkpoints'."""
    original = any(name.startswith("input_blocks.") for name in names)
    if original:
        ops = sorted(int(name.split(".")[1]) for name in names if name.endswith(".0.op.weight"))
        levels, depth = len(ops) + 1, (ops[0] if ops else 2) - 1
    else:
        levels = len({name.split(".")[1] for name in names if name.startswith("down_blocks.")})
        depth = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    table: dict[str, list[str]] = {}
    for ours, theirs in _blocks(levels, depth):
        one, other = (theirs, ours) if original else (ours, theirs)
        table.setdefault(one, []).append(other)
    return {name: tuple(others) for name, others in table.items()}


def _blocks(levels: int, depth: int) -> Iterator[tuple[str, str]]:
    """Diffusers' name of each block of a UNet with so many levels and residual blocks in each, and the original one."""
    yield from (
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    )  # fmt: skip
    for level in range(levels):
        for number in range(depth):
            block = 1 + level * (depth + 1) + number
            yield f"down_blocks.{level}.resnets.{number}", f"input_blocks.{block}.0"
            yield f"down_blocks.{level}.attentions.{number}", f"input_blocks.{block}.1"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(level + 1) * (depth + 1)}.0.op"
        for number in range(depth + 1):
            block = level * (depth + 1) + number
            yield f"up_blocks.{level}.resnets.{number}", f"output_blocks.{block}.0"
            yield f"up_blocks.{level}.attentions.{number}", f"output_blocks.{block}.1"
        for place in (1, 2):  # after an attention, if there is one
            block = level * (depth + 1) + depth
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{block}.{place}.conv"


def _translated(path: str, blocks: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The other names of a layer."""
    head, rest = path, ""
    while head and head not in blocks:
        head, _, last = head.rpartition(".")
        rest = f".{last}{rest}"
    if not head:
        return []
    inner = rest.removeprefix(".")
    known = _RESNET | {ours: theirs for theirs, ours in _RESNET.items()}
    rest = f".{known.get(inner, inner)}" if inner else ""
    return [f"{other}{rest}" for other in blocks[head]]
