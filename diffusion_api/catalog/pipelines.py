"""What the publishers of models that diffusers' own pipelines draw with recommend, by the class of the pipeline."""

from __future__ import annotations

from pathlib import Path

from diffusion_api.catalog.detect import index_of, read_config
from diffusion_api.catalog.labels import Profile

RECOMMENDED = {
    "ChromaPipeline": (35, 5.0),
    "Flux2KleinPipeline": (50, 4.0),
    "Flux2Pipeline": (50, 4.0),
    "FluxPipeline": (28, 3.5),
    "QwenImagePipeline": (50, 4.0),
    "StableDiffusion3Pipeline": (28, 3.5),
    "UniDiffuserPipeline": (20, 8.0),
    "ZImagePipeline": (9, 1.0),  # Z-Image-Turbo; nothing in its files tells it from Z-Image
}
"""Steps and guidance scale, as in the cards of the models."""

DISTILLED = (4, 1.0)
"""FLUX.1 schnell and FLUX.2 klein: made for few steps, without guidance."""

OTHERS = (30, 4.5)


def recommended(folder: Path, pipeline: str) -> Profile:
    """The defaults of requests for a model in the diffusers layout. Raises Unrecognised when its files cannot be read."""
    classic = pipeline.replace("Modular", "")
    steps, guidance = DISTILLED if _is_distilled(folder, classic) else RECOMMENDED.get(classic, OTHERS)
    return Profile(steps=steps, guidance_scale=guidance, sampler="Euler")


def _is_distilled(folder: Path, pipeline: str) -> bool:
    if pipeline == "FluxPipeline":
        return read_config(folder / "transformer").get("guidance_embeds") is False
    return bool(read_config(folder, index_of(folder).name).get("is_distilled"))
