"""``diffusion-api list-models`` and ``list-available-models-loras``: what is installed, and by which names, as text."""

from __future__ import annotations

from collections.abc import Iterator

from diffusion_api.catalog.library import Library

WIDTH = 80


def labels(library: Library) -> str:
    """The labels that may stand for models, with the names that they stand for."""
    return "\n".join(_labels(library))


def available(library: Library) -> str:
    """The installed models and LoRAs, and how many pairs they make."""
    return "\n".join(_available(library))


def _labels(library: Library) -> Iterator[str]:
    installed = {model.name for model in library.models()}
    yield from ("Available models", "=" * WIDTH)
    for name, label in library.labels():
        yield f"{label:20} -> {name}" + (" (installed)" if name in installed else "")
    yield from ("", 'Write a label wherever a model is asked for: {"prompt": "...", "model": "Pastel Mix"}')


def _available(library: Library) -> Iterator[str]:
    models, loras = library.models(), library.assets("lora")
    yield from (f"MODELS ({len(models)} found)", "=" * WIDTH)
    for number, model in enumerate(models, 1):
        yield from (f"{number:3}. {model.label}", f"     Name: {model.name}", f"     Path: {model.shown_path}")
    yield from ("", f"LoRAs ({len(loras)} found)", "=" * WIDTH)
    for number, lora in enumerate(loras, 1):
        yield from (f"{number:3}. {lora.name}", f"     File: {lora.shown_path}", f"     Type: {lora.path.suffix}")
    yield from ("", "SUMMARY", "=" * WIDTH, f"Models: {len(models)}", f"LoRAs: {len(loras)}")
    if models and loras:
        yield f"Combinations: {len(models)} x {len(loras)} = {len(models) * len(loras)}"
        yield "Which of them go together: python test_lora_compatibility.py"
    else:
        yield "No combinations: that takes a model in stable_diffusion/models and a LoRA in stable_diffusion/loras"
