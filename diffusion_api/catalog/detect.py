"""The family of a model, from the structure of its files and never from its name."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json

MAX_HEADER = 64 * 2**20

PIPELINES = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionImg2ImgPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
}
PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""What a diffusers folder must hold beside the UNet, where its index names it."""

INDEXES = ("model_index.json", "modular_model_index.json")
"""What says of which pipeline a folder is; families without a classic one have the second alone."""

LIBRARIES = ("diffusers", "transformers")
"""Whose code a pipeline may be made of."""

NO_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "Guidance")
"""How classes are called whose folders hold no weights."""

SD2_WIDTH = 1024


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header. ``data_offsets`` are bytes from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_TENSORS = TypeAdapter(dict[str, Tensor])


class Unrecognised(ValueError):
    """The files are no model of a known kind; the text says why."""


def folder_family(folder: Path) -> tuple[str, int]:
    """Family and native size in pixels of a diffusers folder. Raises Unrecognised."""
    index = _json(index_of(folder))
    pipeline = index.get("_class_name")
    if not (isinstance(pipeline, str) and pipeline in PIPELINES):
        return _pipeline(folder, index, pipeline)
    family = PIPELINES[pipeline]
    unet = _json(folder / "unet" / "config.json")
    if family == "sd1" and unet.get("cross_attention_dim") == SD2_WIDTH:
        family = "sd2"
    _check_weights(folder / "unet")
    for part in PARTS:
        if isinstance(index.get(part), list) and None not in index[part]:
            _check_part(folder / part)
    size = unet.get("sample_size")
    return family, (size if isinstance(size, int) else 64) * 8


def index_of(folder: Path) -> Path:
    """The file that says which pipeline a folder is of, and of what parts it is made."""
    return next((file for name in INDEXES if (file := folder / name).is_file()), folder / INDEXES[0])


def is_pipeline(family: str) -> bool:
    """Whether models of a family are drawn by diffusers' own pipeline, whose class it is called after."""
    return family.endswith("Pipeline")


def _pipeline(folder: Path, index: dict[str, Any], pipeline: object) -> tuple[str, int]:
    """Family and native size of a folder that any pipeline of diffusers draws with. Raises Unrecognised."""
    if not (isinstance(pipeline, str) and is_pipeline(pipeline)):
        raise Unrecognised(f"its index names {pipeline}, and only pipelines of diffusers are run")
    for part, told in index.items():
        if part.startswith("_") or not isinstance(told, list):
            continue
        library, name = (*told, None, None)[:2]
        if name is None:
            continue
        if library not in LIBRARIES:
            raise Unrecognised(f"its index names {library}.{name}, and only code of {' and '.join(LIBRARIES)} is run")
        if not str(name).endswith(NO_WEIGHTS):
            _check_network(folder / part)
    return pipeline, _native_size(folder)


def _check_network(folder: Path) -> None:
    """Raises Unrecognised for a network whose files are missing or damaged."""
    if not any(path.is_file() for path in folder.glob("*.gguf")):
        _check_weights(folder)


def _native_size(folder: Path) -> int:
    """The side in pixels that a pipeline was trained at: the size of its latents times the autoencoder's factor."""
    network = next((found for part in ("transformer", "unet") if (found := read_config(folder / part))), {})
    vae = read_config(folder / "vae")
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
    size = network.get("sample_size")
    return size * 2 ** (len(levels) - 1) if isinstance(size, int) else 1024


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """What a part of a model says of itself; empty where there is none. Raises Unrecognised when it is damaged."""
    file = folder / name
    return _json(file) if file.is_file() else {}


def _check_part(folder: Path) -> None:
    """Raises Unrecognised for a part of a diffusers folder whose files are missing or damaged."""
    if folder.name.startswith("tokenizer"):
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise Unrecognised(f"its {folder.name}/ holds no vocab.json or tokenizer.json")
    else:
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise Unrecognised(f"its {folder.name}/ holds no safetensors weights")
    for path in weights:
        safetensors_header(path)


def file_family(path: Path) -> tuple[str, int]:
    """Family and native size of a single file in the original key layout. Raises Unrecognised."""
    header = safetensors_header(path)
    if "model.diffusion_model.input_blocks.0.0.weight" not in header:
        raise Unrecognised("it is no checkpoint: it holds no model.diffusion_model tensors (a LoRA, VAE or embedding?)")
    if any(k.startswith("conditioner.embedders.") for k in header):
        return "sdxl", 1024
    if "cond_stage_model.model.transformer.resblocks.0.ln_1.weight" in header:
        return "sd2", 768
    shape = header["model.diffusion_model.input_blocks.0.0.weight"].shape
    return ("sd1" if shape[1:2] == [4] else "sd1-inpainting"), 512


def safetensors_header(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, by name of the tensor; its length is checked. Raises Unrecognised."""
    try:
        size = path.stat().st_size
        header = _header(path, size)
    except OSError as error:
        raise Unrecognised(f"{_shown(path)} cannot be read: {error.strerror}") from error
    try:
        content = from_json(header)
        if isinstance(content, dict):
            content.pop("__metadata__", None)
        tensors = _TENSORS.validate_python(content)
    except ValueError as error:
        raise Unrecognised(f"{_shown(path)} is no safetensors file: its header is damaged") from error
    promised = 8 + len(header) + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if size != promised:
        raise Unrecognised(f"{_shown(path)} has {size} bytes and should have {promised} (an unfinished download?)")
    return tensors


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What the writer of a safetensors file said about it; empty where that cannot be read."""
    try:
        content = from_json(_header(path, path.stat().st_size))
    except (OSError, ValueError):
        return {}
    told = content.get("__metadata__") if isinstance(content, dict) else None
    return {str(key): str(value) for key, value in told.items()} if isinstance(told, dict) else {}


def _header(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise Unrecognised(f"{_shown(path)} is no safetensors file: the length of its header is wrong")
        return file.read(length)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Unrecognised(f"{_shown(path)} cannot be read") from error
    if not isinstance(content, dict):
        raise Unrecognised(f"{_shown(path)} is no JSON object")
    return content


def _shown(path: Path) -> str:
    """A file as it may be told: by its folder too, since every part of a model has a file of the same name."""
    return f"{path.parent.name}/{path.name}"
