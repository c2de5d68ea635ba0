"""Small models of each family with random weights, as diffusers folders: structure and sizes of the real ones, few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_api.settings import DATA

SHAPES = DATA / "models" / "shapes"
VOCABULARY = 967
NUMBERS = {"sdxl": 6, "sdxl-refiner": 5}


def pipeline(family: str, *, inpainting: bool = False, **scheduler: Any) -> DiffusionPipeline:
    """A pipeline of diffusers for that family; the same one each time. Its autoencoder is that of the shipped model."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(SHAPES / "vae", local_files_only=True, low_cpu_mem_usage=False)
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        steps_offset=1,
        **scheduler,
    )
    parts: dict[str, Any] = {"vae": vae, "scheduler": schedule}
    small, large = _text(CLIPTextModel, 32, "gelu" if family == "sd2" else "quick_gelu"), None
    if family in NUMBERS:
        large = _text(CLIPTextModelWithProjection, 64, "gelu")
        parts |= {"text_encoder_2": large, "tokenizer_2": _tokenizer("!")}
    if family != "sdxl-refiner":
        parts |= {"text_encoder": small, "tokenizer": _tokenizer("!" if family == "sd2" else "<|endoftext|>")}
    parts["unet"] = _unet(family, inpainting)
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    if family == "sdxl-refiner":
        return StableDiffusionXLImg2ImgPipeline(
            **parts,
            text_encoder=None,
            tokenizer=None,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    kind = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save(made: DiffusionPipeline, folder: Path) -> Path:
    """The folder of a pipeline, its tokenizers in the files that every program reads."""
    made.save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):
            (tokenizer / name).write_bytes((SHAPES / "tokenizer" / name).read_bytes())
    return folder


def _tokenizer(padding: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(SHAPES / "tokenizer", local_files_only=True, pad_token=padding)


def _text(kind: Any, width: int, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=width, hidden_act=activation,
        bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1,
    )  # fmt: skip
    return kind(config).eval()


def _unet(family: str, inpainting: bool) -> UNet2DConditionModel:
    read = {"sd1": 32, "sd2": 32, "sdxl": 96, "sdxl-refiner": 64}[family]
    xl: dict[str, Any] = {}
    if family in NUMBERS:
        xl = dict(
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64 + 8 * NUMBERS[family], transformer_layers_per_block=[1, 2],
        )  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, in_channels=9 if inpainting else 4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D" if xl else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if xl else "CrossAttnUpBlock2D"),
        cross_attention_dim=read, norm_num_groups=8, use_linear_projection=family != "sd1",
        attention_head_dim=8 if family == "sd1" else (2, 4), **xl,
    ).eval()  # fmt: skip
