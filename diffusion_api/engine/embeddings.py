"""Textual inversion (arXiv:2208.01618): vectors that stand for a word, out of the files that programs write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffusion_api.engine.families.base import read_weights
from diffusion_api.engine.text import CHUNK

SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""The parts that the vectors of an SDXL embedding are for, by their names in the file."""


def read_embedding(path: Path, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The vectors for each text encoder of a model, (vectors, width). ``widths`` are the model's, by part.

    Raises ValueError with the reason when the file is for another model, and anything at all when it is broken.
    """
    found = _vectors(read_weights(path))
    if len(found) == 1 and len(widths) == 1 and "" in found:
        found = dict.fromkeys(widths, found[""])
    if found.keys() == set(SDXL.values()) and widths.keys() < found.keys() and "text_encoder" not in widths:
        found = {part: found[part] for part in widths}  # the refiner has the second encoder alone
    for part, width in widths.items():
        if part not in found or found.keys() > widths.keys():
            raise ValueError(f"it was made for {_encoders(len(found))}, and the model has {_encoders(len(widths))}")
        if found[part].shape[1] != width:
            raise ValueError(f"its vectors have {found[part].shape[1]} numbers, and the model's {width}")
        if not 0 < len(found[part]) <= CHUNK:
            raise ValueError(f"it has {len(found[part])} vectors; it may have 1 to {CHUNK}")
    if len({len(rows) for rows in found.values()}) > 1:
        raise ValueError("it has another number of vectors for each text encoder")
    return found


def _vectors(content: object) -> dict[str, Tensor]:
    """The vectors in a file, by part; under "" where it does not say which. Raises ValueError."""
    if not isinstance(content, Mapping):
        raise ValueError("it is no embedding")
    named = content.get("string_to_param", content)  # A1111's .pt; others have their tensors at the top
    if not isinstance(named, Mapping) and hasattr(named, "items"):
        named = dict(named.items())
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if SDXL.keys() <= tensors.keys():
        return {part: _rows(tensors[name]) for name, part in SDXL.items()}
    if len(tensors) != 1:
        raise ValueError(f"it is no embedding: it holds {len(tensors)} tensors and should hold one")
    return {"": _rows(next(iter(tensors.values())))}


def _rows(vectors: Tensor) -> Tensor:
    if vectors.dim() not in (1, 2):
        raise ValueError(f"it is no embedding: its tensor has {vectors.dim()} dimensions")
    return vectors.detach().float().reshape(-1, vectors.shape[-1])


def _encoders(count: int) -> str:
    return "one text encoder" if count == 1 else "two text encoders"
