"""LoRAs of every layout with random weights, and what each does to a weight, worked out by itself in float64.

The arithmetic here follows the papers and shares nothing with the package; slow loops are fine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Array = NDArray[np.float64]

RANK = 3
ALPHA = 1.5


class Maker:
    """Draws tensors, as float16 files have them."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * 0.2).half()


def kohya(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    out, inner, *kernel = shape
    return {
        f"{name}.lora_down.weight": draw(RANK, inner, *kernel),
        f"{name}.lora_up.weight": draw(out, RANK, *[1] * len(kernel)),
        f"{name}.alpha": torch.tensor(ALPHA).half(),
    }


def dora_of_inputs(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    """LyCORIS's and kohya's: a length for each input."""
    _, inner, *kernel = shape
    return kohya(name, shape, draw) | {f"{name}.dora_scale": draw(1, inner, *[1] * len(kernel)).abs() + 0.5}


def dora_of_outputs(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    out, _, *kernel = shape
    return kohya(name, shape, draw) | {f"{name}.dora_scale": draw(out, 1, *[1] * len(kernel)).abs() + 0.5}


def locon_with_core(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    out, inner, *kernel = shape
    if not kernel:
        return kohya(name, shape, draw)
    return {
        f"{name}.lora_down.weight": draw(RANK, inner, 1, 1),
        f"{name}.lora_mid.weight": draw(RANK, RANK, *kernel),
        f"{name}.lora_up.weight": draw(out, RANK, 1, 1),
        f"{name}.alpha": torch.tensor(ALPHA).half(),
    }


def loha(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    out, *rest = shape
    sides = {"a": (out, RANK), "b": (RANK, int(np.prod(rest)))}
    found = {f"{name}.hada_w{n}_{side}": draw(*sides[side]) for n in (1, 2) for side in "ab"}
    return found | {f"{name}.alpha": torch.tensor(ALPHA).half()}


def loha_with_core(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    out, inner, *kernel = shape
    if not kernel:
        return loha(name, shape, draw)
    found = {f"{name}.hada_t{n}": draw(RANK, RANK, *kernel) for n in (1, 2)}
    found |= {f"{name}.hada_w{n}_a": draw(RANK, out) for n in (1, 2)}
    found |= {f"{name}.hada_w{n}_b": draw(RANK, inner) for n in (1, 2)}
    return found | {f"{name}.alpha": torch.tensor(ALPHA).half()}


def lokr(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    out, inner, *kernel = shape
    return {
        f"{name}.lokr_w1": draw(4, 4),
        f"{name}.lokr_w2_a": draw(out // 4, RANK),
        f"{name}.lokr_w2_b": draw(RANK, inner // 4 * int(np.prod(kernel))),
        f"{name}.alpha": torch.tensor(ALPHA).half(),
    }


def lokr_whole(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    """Both factors whole: alpha means nothing."""
    out, inner, *kernel = shape
    return {
        f"{name}.lokr_w1": draw(4, 4),
        f"{name}.lokr_w2": draw(out // 4, inner // 4, *kernel),
        f"{name}.alpha": torch.tensor(1e4).half(),
    }


def whole(name: str, shape: tuple[int, ...], draw: Maker) -> Tensors:
    return {f"{name}.diff": draw(*shape)}


LAYOUTS: dict[str, Callable[[str, tuple[int, ...], Maker], Tensors]] = {
    "LoRA, LoCon": kohya,
    "LoCon with a core": locon_with_core,
    "LoHa": loha,
    "LoHa with a core": loha_with_core,
    "LoKr": lokr,
    "LoKr, whole": lokr_whole,
    "DoRA by inputs": dora_of_inputs,
    "DoRA by outputs": dora_of_outputs,
    "differences": whole,
}


WITH_TEXT_ENCODERS = ("LoRA, LoCon", "LoHa", "LoKr", "DoRA by inputs", "DoRA by outputs")
"""Those that are also tried with the keys of SDXL's two text encoders (``te1``, ``te2``)."""


def changed(weight: Tensor, tensors: Mapping[str, Tensor], strength: float) -> Array:
    """The weight of one layer with its part of a LoRA; names without the layer's."""
    own = weight.detach().double().numpy()
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    alpha = float(t.get("alpha", np.array(1.0)))
    if "lora_mid.weight" in t:
        up, mid, down = (t[f"lora_{part}.weight"] for part in ("up", "mid", "down"))
        difference = np.zeros_like(own)
        for y in range(own.shape[2]):
            for x in range(own.shape[3]):
                difference[:, :, y, x] = up[:, :, 0, 0] @ mid[:, :, y, x] @ down[:, :, 0, 0] * alpha / RANK
    elif "lora_up.weight" in t:
        difference = _matrix(t["lora_up.weight"]) @ _matrix(t["lora_down.weight"]) * alpha / RANK
    elif "hada_t1" in t:
        parts = []
        for n in (1, 2):
            part = np.zeros_like(own)
            for y in range(own.shape[2]):
                for x in range(own.shape[3]):
                    part[:, :, y, x] = t[f"hada_w{n}_a"].T @ t[f"hada_t{n}"][:, :, y, x] @ t[f"hada_w{n}_b"]
            parts.append(part)
        difference = parts[0] * parts[1] * alpha / RANK
    elif "hada_w1_a" in t:
        difference = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * alpha / RANK
    elif "lokr_w2" in t:
        difference = np.kron(t["lokr_w1"], _matrix(t["lokr_w2"]))
    elif "lokr_w1" in t:
        difference = np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) * alpha / RANK
    else:
        difference = t["diff"]
    goal = own + difference.reshape(own.shape)
    if "dora_scale" in t:
        goal = goal.copy()
        lengths = t["dora_scale"].ravel()
        if t["dora_scale"].shape[0] == own.shape[0]:
            for output in range(own.shape[0]):
                goal[output] *= lengths[output] / np.sqrt((goal[output] ** 2).sum())
        else:
            for column in range(own.shape[1]):
                goal[:, column] *= lengths[column] / np.sqrt((goal[:, column] ** 2).sum())
    return own + strength * (goal - own)


def _matrix(array: Array) -> Array:
    return array.reshape(len(array), -1)


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
