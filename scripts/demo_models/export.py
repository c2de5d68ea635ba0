"""The diffusers folder of a trained model, fp16, with the tensor names that the published folders have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from demo_models.models import DemoModel, Text
from demo_models.network import Network
from demo_models.tokenizer import Tables, save_tokenizer


def export(folder: Path, network: Network, vae: AutoencoderKL, tables: Tables) -> None:
    """Write the folder; the models are fp16 and on the CPU afterwards."""
    model = network.model
    vae.register_to_config(force_upcast=model.force_upcast)
    for name, part in (("unet", network.parts["unet"]), ("vae", vae)):
        part.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(folder / name)
    for text in model.texts:
        save_tokenizer(folder / text.tokenizer, tables, text.padding)
        _export_text(folder / text.folder, text, network.parts[text.key])
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(model.scheduler, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(_index(model), indent=2, sort_keys=True) + "\n")


def _export_text(folder: Path, text: Text, encoder: nn.Module) -> None:
    """transformers 5 leaves ``text_model.`` out of the names it has in memory; the published files have it."""
    published = ("text_model.", "text_projection.")
    weights = {
        name if name.startswith(published) else f"text_model.{name}": tensor.half().contiguous().cpu()
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**encoder.config.to_dict(), "architectures": [text.kind], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _index(model: DemoModel) -> dict[str, object]:
    parts = {
        "scheduler": ["diffusers", model.scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for text in model.texts:
        parts[text.folder] = ["transformers", text.kind]
        parts[text.tokenizer] = ["transformers", "CLIPTokenizer"]
    return {**model.index, **parts, "_diffusers_version": "0.42.0"}
