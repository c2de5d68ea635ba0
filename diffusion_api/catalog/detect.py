"""The family of a model, from the structure of its files and never from its name."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json

from diffusion_api.catalog import pickles

MAX_HEADER = 64 * 2**20

SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
SDXL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")

PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""What a diffusers folder must hold beside the UNet, where its index names it."""

INDEXES = ("model_index.json", "modular_model_index.json")
"""What says of which pipeline a folder is; families without a classic one have the second alone."""

UNIDIFFUSER = "UniDiffuserPipeline"
"""The family that draws pictures of words, and tells of pictures."""

LIBRARIES = ("diffusers", "transformers")
"""Whose code a pipeline may be made of."""

WITHIN = {"unidiffuser": "diffusers"}
"""Folders of a library by which models name their parts instead of by the library."""

NO_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "Guidance")
"""How classes are called whose folders hold no weights."""

UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"

TEXT_ENCODERS = {
    "conditioner.embedders.1.": ("sdxl", 1024),
    "conditioner.embedders.0.model.": ("sdxl-refiner", 1024),
    "cond_stage_model.model.": ("sd2", 768),
    "cond_stage_model.transformer.": ("sd1", 512),
}
"""Family and native size of a single file, by the prefix of its text encoder; the first that it has."""

INPAINTING = 9
CHANNELS = (4, INPAINTING)
"""What a UNet may read: latents, and for inpainting a mask and the masked picture's latents beside them."""

CHANGING = ("Fill", "Edit", "Inpaint")
"""Words in the names of pipelines that change pictures, and cannot begin with words alone."""

PREDICTIONS = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
"""What files say that a model predicts, and diffusers' word for it."""

VARIANTS = ("", "fp16")
"""Which of several sets of the same weights is read: the first of these that is there, else any."""

_WEIGHTS = re.compile(r"[^.]+?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-(?P<count>\d+))?\.safetensors")


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
    if not isinstance(pipeline, str) or pipeline not in (*SD, *SDXL):
        return _pipeline(folder, index, pipeline)
    unet = _json(folder / "unet" / "config.json")
    if pipeline in SDXL:
        family = "sdxl-refiner" if index.get("text_encoder") == [None, None] else "sdxl"
    else:
        family = "sd2" if unet.get("use_linear_projection") else "sd1"
    _check_channels(unet.get("in_channels", 4))
    weight_files(folder / "unet")
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


def inpaints(path: Path) -> bool:
    """Whether a model, a folder or a single file, was made to change pictures. Raises Unrecognised."""
    if path.is_dir():
        pipeline = str(_json(index_of(path)).get("_class_name"))
        other = pipeline not in (*SD, *SDXL) and any(word in pipeline for word in CHANGING)
        return other or read_config(path / "unet").get("in_channels") == INPAINTING
    return contents(path)[FIRST].shape[1] == INPAINTING


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
        if WITHIN.get(str(library), library) not in LIBRARIES:
            raise Unrecognised(f"its index names {library}.{name}, and only code of {' and '.join(LIBRARIES)} is run")
        if not str(name).endswith(NO_WEIGHTS):
            _check_network(folder / part)
    return pipeline, _native_size(folder)


def _check_network(folder: Path) -> None:
    """Raises Unrecognised for a network whose files are missing or damaged."""
    if not any(path.is_file() for path in folder.glob("*.gguf")):
        weight_files(folder)


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
        weight_files(folder)


def _check_channels(channels: object) -> None:
    if channels not in CHANNELS:
        raise Unrecognised(f"its UNet reads {channels} channels; only 4, or 9 for inpainting, are known")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a part of a diffusers folder: one, or all of its shards.

    Of several variants (``model.fp16.safetensors``) one is taken. Raises Unrecognised when one is missing or damaged.
    """
    variants: dict[tuple[bool, str, str], list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if found := _WEIGHTS.fullmatch(path.name):
            variant = found["variant"] or ""
            variants.setdefault((variant not in VARIANTS, variant, found["count"] or ""), []).append(path)
    if not variants:
        other = ", only .bin, which can run code when loaded; convert them" if any(folder.glob("*.bin")) else ""
        raise Unrecognised(f"its {folder.name}/ holds no safetensors weights{other}")
    (_, _, count), files = min(variants.items())
    if count and len(files) != int(count):
        raise Unrecognised(f"its {folder.name}/ holds {len(files)} of {int(count)} files (an unfinished download?)")
    for path in files:
        safetensors_header(path)
    return files


def file_family(path: Path) -> tuple[str, int]:
    """Family and native size of a single file in the original key layout. Raises Unrecognised."""
    header = contents(path)
    if FIRST not in header:
        raise Unrecognised("it is no checkpoint: it holds no model.diffusion_model tensors (a LoRA, VAE or embedding?)")
    _check_channels(dict(enumerate(header[FIRST].shape)).get(1))
    prefix = next((prefix for prefix in TEXT_ENCODERS if any(name.startswith(prefix) for name in header)), None)
    if prefix is None:
        raise Unrecognised(
            "it holds no text encoder (cond_stage_model.* or conditioner.*); use a checkpoint that has one"
        )
    if not any(name.startswith("first_stage_model.") for name in header):
        raise Unrecognised("it holds no autoencoder (first_stage_model.*); use a checkpoint that has one")
    if prefix.startswith("cond_stage_model.") and f"{UNET}label_emb.0.0.weight" in header:
        raise Unrecognised("its UNet reads more than words (label_emb), as unCLIP models do, which are not known")
    if any(name.endswith(".scale_weight") for name in header):
        raise Unrecognised(
            "its 8-bit weights are scaled (scale_weight), which is not known here; use 8 bits without scales"
        )
    return TEXT_ENCODERS[prefix]


def file_schedule(path: Path) -> dict[str, object]:
    """What a single file says of how its model predicts, in the words of a diffusers scheduler config; all or nothing of
    ``prediction_type`` and ``rescale_betas_zero_snr``.

    Keys of tensors go before metadata (https://github.com/Stability-AI/ModelSpec). Raises Unrecognised.
    """
    header = contents(path)
    told = {} if path.suffix.lower() in pickles.SUFFIXES else safetensors_metadata(path)
    schedule: dict[str, object] = {}
    said = told.get("modelspec.prediction_type", told.get("modelspec.predict_key", ""))
    if kind := "v_prediction" if "v_pred" in header else PREDICTIONS.get(said.lower()):
        schedule["prediction_type"] = kind
    if "ztsnr" in header:
        schedule["rescale_betas_zero_snr"] = True
    return schedule


def contents(path: Path) -> dict[str, Tensor]:
    """What a file of weights holds, by name of the tensor; of one in a format that can hold code, names and shapes alone, and
    only if it holds data alone. Raises Unrecognised.
    """
    if path.suffix.lower() not in pickles.SUFFIXES:
        return safetensors_header(path)
    try:
        return {name: Tensor("", shape, (0, 0)) for name, shape in pickles.shapes(path).items()}
    except OSError as error:
        raise Unrecognised(f"{_shown(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Unrecognised(f"{_shown(path)} cannot be used: {error}") from error


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
            raise Unrecognised(
                f"{_shown(path)} is no safetensors file: the length of its header is wrong (a web page or a pickle?)"
            )
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
