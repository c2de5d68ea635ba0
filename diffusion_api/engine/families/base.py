"""What the families share: files of weights, and the networks that are filled with them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from diffusion_api.catalog.detect import safetensors_header
from diffusion_api.engine.devices import Device

Tensors = dict[str, Tensor]


def read_tensors(path: Path) -> Tensors:
    """What a safetensors file holds, once its header has been checked. Raises Unrecognised."""
    safetensors_header(path)
    # Mapped, a file that is cut short while it is read would crash the process; and safetensors 0.8 leaks 64 bytes for each
    # tensor that it maps.
    return load_file(path, backend="pread")


def read_weights(path: Path) -> Any:
    """What a file of any format holds: tensors by their names; a pickle's may be nested. Raises anything at all.

    A pickle is read as data: numbers, texts and tensors, and nothing that could run.
    """
    if path.suffix.lower() == ".safetensors":
        return read_tensors(path)
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):  # the first embeddings were saved as one
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a model in a single file of either format. Raises anything at all when that is broken."""
    held = read_weights(path)
    held = held.get("state_dict", held)
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def read_network(kind: Any, folder: Path, device: Device) -> Any:
    """A network of diffusers from its part of a pipeline's folder. Raises anything at all when that is broken."""
    config = kind.load_config(folder, local_files_only=True)
    return network(kind, config, read_tensors(folder / "diffusion_pytorch_model.safetensors"), device)


def network(kind: Any, config: Any, tensors: Tensors, device: Device) -> Any:
    """A network of diffusers with these weights, on the device. Raises ValueError when it needs others."""
    with torch.device("meta"):  # no memory, and no time for random numbers that are replaced anyway
        model = kind.from_config(config)
    model._fix_state_dict_keys_on_load(tensors)  # names that attention had until diffusers 0.15
    complete(kind, model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    return model.to(device.home, device.dtype).eval()


def complete(kind: type, missing: Collection[str]) -> None:
    """Raises ValueError when tensors are missing: the libraries would go on with random numbers in their place."""
    if missing:
        others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise ValueError(f"its {kind.__name__} lacks {min(missing)}{others}")


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder with a vocabulary of CLIP's kind. Raises anything at all when that is broken."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers puts a method into the backend that refers to the backend: a circle through Rust, where no collector
    # looks. Each load would leak its vocabulary, 6.5 MB of SD 1.5's.
    del tokenizer.backend_tokenizer.decode
    return tokenizer
