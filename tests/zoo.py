"""Files as people have them. Checkpoints have every key of the published ones, with few numbers behind each; random, in half
precision: layers are as many as in the real models, their widths are not. Beside those that draw, files that cannot, each with
what is said of it. LoRAs are ``lora_zoo``'s.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ldm_layout
import lora_zoo
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ldm_layout import original
from safetensors.torch import save, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

Tensors = Mapping[str, Tensor]

DEPTH = 2
XL_HEADS = (2, 4, 6, 6)
UNETS: dict[str, dict[str, Any]] = {
    "sd1": dict(levels=4, attended=(1, 1, 1, 0), cross_attention_dim=32, attention_head_dim=8),
    "sd2": dict(
        levels=4, attended=(1, 1, 1, 0), cross_attention_dim=64, use_linear_projection=True, attention_head_dim=XL_HEADS
    ),
    "sdxl": dict(
        levels=3, attended=(0, 2, 10), cross_attention_dim=96, use_linear_projection=True,
        attention_head_dim=XL_HEADS[:3], addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=64 + 6 * 256,
    ),
    "sdxl-refiner": dict(
        levels=4, attended=(0, 4, 4, 0), cross_attention_dim=64, use_linear_projection=True,
        attention_head_dim=XL_HEADS, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=64 + 5 * 256,
    ),
}  # fmt: skip
LAYERS = {
    "sd1": {"text_encoder": 12},
    "sd2": {"text_encoder": 23},
    "sdxl": {"text_encoder": 12, "text_encoder_2": 32},
} | {"sdxl-refiner": {"text_encoder_2": 32}}
KEYS = {
    "sd1": {"model.": 686, "first_stage_model.": 248, "cond_stage_model.": 197},
    "sd2": {"model.": 686, "first_stage_model.": 248, "cond_stage_model.": 294},
    "sdxl": {
        "model.": 1680,
        "first_stage_model.": 248,
        "conditioner.embedders.0.": 197,
        "conditioner.embedders.1.": 390,
    },
}
"""How many tensors the published checkpoints have: v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0."""


@cache
def checkpoint(family: str, channels: int = 4) -> Tensors:
    """The tensors of a single file of that family, whose UNet reads so many channels."""
    torch.manual_seed(0)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"unet": _unet(family, channels), "vae": _vae()}
        for part, layers in LAYERS[family].items():
            width = 32 if part == "text_encoder" and family != "sd2" else 64
            parts[part] = _text(width, layers)
    filled = {part: _filled(network) for part, network in parts.items()}
    for part, tensors in filled.items():
        if part == "text_encoder":
            del tensors["text_projection.weight"]
    return original(filled, family, DEPTH)


def _unet(family: str, channels: int) -> UNet2DConditionModel:
    options = dict(UNETS[family])
    attended = options.pop("attended")
    down = ["CrossAttnDownBlock2D" if count else "DownBlock2D" for count in attended]
    up = ["CrossAttnUpBlock2D" if count else "UpBlock2D" for count in reversed(attended)]
    middle = attended[-1] or attended[-2]
    return UNet2DConditionModel(
        in_channels=channels, block_out_channels=[32, 64, 96, 96][: options.pop("levels")], layers_per_block=DEPTH,
        down_block_types=down, up_block_types=up, norm_num_groups=8,
        transformer_layers_per_block=[*(max(count, 1) for count in attended[:-1]), middle], **options,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 48), layers_per_block=2, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip


def _text(width: int, layers: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, projection_dim=width,
        )
    )  # fmt: skip


def _filled(network: nn.Module) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return {name: (torch.randn(shape) * 0.05).half() for name, shape in shapes.items() if "position_ids" not in name}


@dataclass(frozen=True)
class Animal:
    """A file that draws: what it holds, and how it is read."""

    family: str
    tensors: Callable[[], Tensors]
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False
    metadata: Mapping[str, str] | None = None

    def write(self, path: Path) -> None:
        """As a checkpoint."""
        save_file(dict(self.tensors()), path, dict(self.metadata) if self.metadata else None)


def _marked(*marks: str) -> Tensors:
    return {**checkpoint("sdxl"), **{mark: torch.zeros(0) for mark in marks}}


def _with_averages() -> Tensors:
    """As ``sd-v1-4-full-ema``: each tensor of the UNet once more, under a name without points; they are not to be read."""
    whole = checkpoint("sd1")
    unet = {name: tensor for name, tensor in whole.items() if name.startswith("model.diffusion_model.")}
    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): t * torch.nan for n, t in unet.items()}
    return {**whole, **averages, "model_ema.decay": torch.zeros(1), "model_ema.num_updates": torch.zeros(1)}


def _in_eight_bits(family: str) -> Tensors:
    return {n: t.to(torch.float8_e4m3fn) if t.dtype == torch.half else t for n, t in checkpoint(family).items()}


def _unprefixed() -> Tensors:
    """As some old files: transformers' names without ``text_model.``."""
    return {n.replace(".transformer.text_model.", ".transformer."): t for n, t in checkpoint("sd1").items()}


DRAWS = {
    "sd15": Animal("sd1", lambda: checkpoint("sd1")),
    "sd15-ema": Animal("sd1", _with_averages),
    "sd15-fp8": Animal("sd1", lambda: _in_eight_bits("sd1")),
    "sd15-old-names": Animal("sd1", _unprefixed),
    "sd15-inpainting": Animal("sd1", lambda: checkpoint("sd1", 9)),
    "sd21-v": Animal("sd2", lambda: checkpoint("sd2"), "v"),
    "sd21-base": Animal("sd2", lambda: checkpoint("sd2"), metadata={"modelspec.prediction_type": "epsilon"}),
    "sdxl": Animal("sdxl", lambda: checkpoint("sdxl")),
    "sdxl-fp8": Animal("sdxl", lambda: _in_eight_bits("sdxl")),
    "sdxl-v-by-metadata": Animal("sdxl", lambda: checkpoint("sdxl"), "v", metadata={"modelspec.prediction_type": "v"}),
    "noobai-vpred": Animal("sdxl", lambda: _marked("v_pred", "ztsnr"), "v", True),
    "refiner": Animal("sdxl-refiner", lambda: checkpoint("sdxl-refiner")),
}

Bytes = Callable[[bytes], bytes]


def _without(*prefixes: str) -> Bytes:
    return lambda _: save({n: t for n, t in checkpoint("sd1").items() if not n.startswith(prefixes)})


def _zip(_: bytes) -> bytes:
    """As torch.save has written since 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return file.getvalue()


NOT_SAFETENSORS = "{file} is no safetensors file: the length of its header is wrong (a web page or a pickle?)"
DAMAGED: dict[str, tuple[Bytes, str]] = {
    "truncated": (
        lambda whole: whole[:-8],
        "{file} has {cut} bytes and should have {whole} (an unfinished download?)",
    ),
    "empty": (lambda _: b"", NOT_SAFETENSORS),
    "wrong-header": (
        lambda whole: whole[:8] + b"x" + whole[9:],
        "{file} is no safetensors file: its header is damaged",
    ),
    "html": (lambda _: b"<!DOCTYPE html><title>Sign in</title>" * 100, NOT_SAFETENSORS),
    "pickle": (lambda _: pickle.dumps({"state_dict": {}}), NOT_SAFETENSORS),
    "zipped-pickle": (_zip, NOT_SAFETENSORS),
}
"""What becomes of the bytes of a whole .safetensors file of any kind, and what is said of the result."""

REFUSED: dict[str, tuple[Bytes, str]] = {
    "no-text-encoder": (
        _without("cond_stage_model."),
        "it holds no text encoder (cond_stage_model.* or conditioner.*); use a checkpoint that has one",
    ),
    "no-autoencoder": (
        _without("first_stage_model."),
        "it holds no autoencoder (first_stage_model.*); use a checkpoint that has one",
    ),
    "pix2pix": (
        lambda _: save(dict(checkpoint("sd1", 8))),
        "its UNet reads 8 channels; only 4, or 9 for inpainting, are known",
    ),
} | DAMAGED
"""What becomes of a whole checkpoint's bytes, and what is said of the result."""


def said(reason: str, folder: str, name: str, whole: int) -> str:
    """What is said of a file that should have so many bytes."""
    return reason.format(file=f"{folder}/{name}.safetensors", whole=whole, cut=whole - 8)


EMBEDDINGS: dict[str, Callable[[Path, Tensor], None]] = {
    ".pt": lambda path, v: torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "x", "step": 1}, path
    ),
    ".pt of 2022": lambda path, v: torch.save({"string_to_param": torch.nn.ParameterDict({"*": v})}, path),
    ".bin": lambda path, v: torch.save({"<x>": v[0] if len(v) == 1 else v}, path),
    ".safetensors": lambda path, v: save_file({"emb_params": v}, path),
}
"""Embeddings of these vectors, (vectors, width), for a model with one text encoder."""


def esrgan(*, old: bool) -> dict[str, Tensor]:
    """A 4x RRDBNet of one block and eight features, in the keys of ESRGAN's first release or of Real-ESRGAN."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def convolution(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, 3, 3) * 0.05
        state[f"{name}.bias"] = torch.zeros(outputs)

    features, growth = 8, 32
    convolution("model.0" if old else "conv_first", 3, features)
    block = "model.1.sub.0" if old else "body.0"
    for dense in (1, 2, 3):
        for i in range(1, 6):
            name = f"{block}.RDB{dense}.conv{i}.0" if old else f"{block}.rdb{dense}.conv{i}"
            convolution(name, features + (i - 1) * growth, growth if i < 5 else features)
    convolution("model.1.sub.1" if old else "conv_body", features, features)
    rest = ("model.3", "model.6", "model.8") if old else ("conv_up1", "conv_up2", "conv_hr")
    for name in rest:
        convolution(name, features, features)
    convolution("model.10" if old else "conv_last", features, 3)
    return state


UPSCALERS: dict[str, Callable[[Path], None]] = {
    "old.pth": lambda path: torch.save(esrgan(old=True), path),
    "old.safetensors": lambda path: save_file(esrgan(old=True), path),
    "new.pth": lambda path: torch.save({"params_ema": esrgan(old=False)}, path),
    "new.safetensors": lambda path: save_file(esrgan(old=False), path),
}
"""ESRGAN's two key layouts, in both formats."""


def _original_vae(tensors: Tensors) -> Tensors:
    levels = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down_blocks.")})
    renamed = {ldm_layout._vae_name(name, levels): tensor for name, tensor in tensors.items()}
    return {
        name: t[:, :, None, None] if "attn_1" in name and name.endswith("weight") and "norm" not in name else t
        for name, t in renamed.items()
    }


VAES: dict[str, Callable[[Tensors], Tensors]] = {"diffusers": dict, "original": _original_vae}
"""Key layouts of VAE files, from diffusers' own."""

OTHERS: dict[str, Callable[[], Tensors]] = {
    "loras": lambda: lora_zoo.kohya("lora_unet_mid_block_attentions_0_proj_in", (64, 64), lora_zoo.Maker()),
    "embeddings": lambda: {"emb_params": torch.zeros(2, 768)},
    "upscalers": lambda: esrgan(old=False),
    "vae": lambda: _filled(_vae()),
}
"""A whole file of each kind beside checkpoints, by its folder."""
