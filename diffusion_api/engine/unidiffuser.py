"""UniDiffuser: a pipeline of diffusers that draws pictures of words, and finds words and numbers for pictures.

diffusers keeps it and works on it no more, so nothing else of the project rests on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UniDiffuserTextDecoder
from PIL.Image import Image
from torch import Tensor

from diffusion_api.engine.base import Embeddings
from diffusion_api.engine.denoise import Painted
from diffusion_api.engine.devices import Device
from diffusion_api.engine.families.base import network, read_parts
from diffusion_api.engine.families.generic import Enough, Generic, watched
from diffusion_api.engine.pixels import OVERFLOWED, finite
from diffusion_api.engine.plan import Pass
from diffusion_api.errors import InvalidRequest, NotFinite
from diffusion_api.schema.request import Caption, Embed

TIED = ("transformer.transformer.wte.weight", "transformer.lm_head.weight")
"""One tensor of the text decoder by its two names; files of safetensors hold it once."""


class UniDiffuser(Generic):
    """A loaded UniDiffuser; satisfies :class:`diffusion_api.engine.denoise.Painter` and ``Teller``."""

    @staticmethod
    def part(folder: Path, told: Any, device: Device) -> Any:
        """One entry of its index, as :meth:`Generic.part`."""
        if not (isinstance(told, list) and told[1] == UniDiffuserTextDecoder.__name__):
            return Generic.part(folder, told, device)
        tensors = read_parts(folder)
        for name, other in (TIED, TIED[::-1]):
            if other in tensors:
                tensors.setdefault(name, tensors[other])
        return network(UniDiffuserTextDecoder, UniDiffuserTextDecoder.load_config(folder), tensors, device)

    def paint(self, stage: Pass, stepped: Callable[[float], bool]) -> Painted | None:
        """The picture of a pass, as :meth:`Generic.paint`. Raises InvalidRequest for a size that the model was not made for."""
        side = self.pipeline.unet_resolution * self.pipeline.vae_scale_factor
        if (stage.width, stage.height) != (side, side):
            size = f"{stage.width}x{stage.height}"
            raise InvalidRequest(f"width x height is {size}; {stage.model!r} makes {side}x{side} alone", field="width")
        painted = super().paint(replace(stage, negative_prompt=""), stepped)
        if painted is None or not stage.negative_prompt:
            return painted
        note = "the negative prompt is not used: UniDiffuser is guided away from any words, not from some"
        return replace(painted, warnings=(*painted.warnings, note))

    def caption(self, picture: Image, asked: Caption, stepped: Callable[[float], bool]) -> str | None:
        """Words for a picture. ``stepped`` is told after each step how much is done, and whether that is to be all; None when
        it is. Raises NotFinite.
        """

        def looked_at(step: int, timestep: int, latents: Tensor) -> None:
            if step == asked.steps - 1 and not finite(latents):
                raise NotFinite(OVERFLOWED)

        try:
            with watched(self.pipeline, stepped):
                found = self.pipeline(
                    image=picture,
                    num_inference_steps=asked.steps,
                    guidance_scale=asked.guidance_scale,
                    generator=torch.Generator().manual_seed(asked.seed),
                    callback=looked_at,
                )
        except Enough:
            return None
        text: str = found.text[0]
        return text.strip()

    @torch.no_grad()
    def embeddings(self, picture: Image, asked: Embed) -> Embeddings:
        """A picture in numbers, as the pipeline reads it: scaled to -1 to 1 for the VAE, as CLIP was trained for CLIP."""
        pipeline, device = self.pipeline, self.pipeline._execution_device
        vae = pipeline.encode_image_vae_latents(
            image=pipeline.image_processor.preprocess(picture), batch_size=1, num_prompts_per_image=1,
            dtype=pipeline.vae.dtype, device=device, do_classifier_free_guidance=False,
            generator=torch.Generator().manual_seed(asked.seed),
        )  # fmt: skip
        clip = pipeline.encode_image_clip_latents(
            image=picture, batch_size=1, num_prompts_per_image=1, dtype=pipeline.image_encoder.dtype, device=device
        )
        return Embeddings(clip=clip[0].float().cpu().numpy(), vae=vae[0].float().cpu().numpy())
