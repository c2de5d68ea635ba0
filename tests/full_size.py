"""Models as large as the published ones, with random weights, as diffusers folders; made on a card that takes seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_api.settings import DATA

SHAPES = DATA / "models" / "shapes"

UNETS: dict[str, dict[str, Any]] = {
    "sd15": dict(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    ),
    "sdxl": dict(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
CLIP_L: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
CLIP_G: dict[str, Any] = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
)  # fmt: skip
VOCABULARY: dict[str, Any] = dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
FLUX: dict[str, Any] = dict(
    in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
FLUX_VAE = VAE | dict(
    latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159,
    scaling_factor=0.3611,
)  # fmt: skip
T5: dict[str, Any] = dict(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)

Q4_0 = 32, 18
"""Numbers of a block of that kind, and its bytes: a scale in half precision, and four bits for each number."""


def stable_diffusion(folder: Path, size: str, device: str) -> Path:
    """``sd15`` or ``sdxl``, in half precision."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with _on(device, torch.float16):
        _saved(UNet2DConditionModel(**UNETS[size]), folder / "unet")
        _saved(AutoencoderKL(**VAE), folder / "vae")
        _saved(CLIPTextModel(CLIPTextConfig(**CLIP_L, **VOCABULARY)), folder / "text_encoder")
        if size == "sdxl":
            _saved(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **VOCABULARY)), folder / "text_encoder_2")
    shutil.copytree(SHAPES / "scheduler", folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2")[: 1 + (size == "sdxl")]:
        shutil.copytree(DATA / "clip", folder / name)
    index = json.loads((SHAPES / "model_index.json").read_text())
    if size == "sdxl":
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def flux(folder: Path, device: str) -> Path:
    """FLUX.1 dev, in bfloat16; its tokenizers know letters."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from tiny_pipelines import t5_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    words = t5_tokenizer()
    with _on(device, torch.bfloat16):
        _saved(FluxTransformer2DModel(**FLUX), folder / "transformer")
        _saved(T5EncoderModel(T5Config(vocab_size=32128, **T5)), folder / "text_encoder_2")
        _saved(CLIPTextModel(CLIPTextConfig(**CLIP_L, **VOCABULARY)), folder / "text_encoder")
        _saved(AutoencoderKL(**FLUX_VAE), folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).save_pretrained(folder / "scheduler")
    shutil.copytree(DATA / "clip", folder / "tokenizer")
    words.save_pretrained(folder / "tokenizer_2")
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def smaller(whole: Path, folder: Path, form: str) -> Path:
    """The same FLUX with a transformer of random numbers in ``fp8`` or as ``gguf`` (Q4_0); all else is linked."""
    folder.mkdir()
    for part in whole.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    own = folder / "transformer"
    own.mkdir()
    shutil.copy(whole / "transformer" / "config.json", own)
    (_packed if form == "gguf" else _eighths)(_tensors(whole / "transformer"), own)
    return folder


def _eighths(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    small = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim > 1 else tensor for name, tensor in tensors}
    save_file(small, folder / "diffusion_pytorch_model.safetensors")


def _packed(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    import gguf

    numbers, size = Q4_0
    writer = gguf.GGUFWriter(folder / "flux1-dev-Q4_0.gguf", "flux")
    for name, tensor in tensors:
        if tensor.ndim > 1 and tensor.shape[-1] % numbers == 0:
            blocks = torch.randint(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // numbers, size), dtype=torch.uint8)
            scale = torch.full((1,), 0.002, dtype=torch.float16)
            blocks[..., :2] = scale.view(torch.uint8)
            writer.add_tensor(name, blocks.flatten(-2).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


@contextmanager
def _on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within, networks are made there, the same ones each time."""
    before = torch.get_default_dtype()
    torch.manual_seed(1)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _saved(network: nn.Module, folder: Path) -> None:
    network.save_pretrained(folder)  # type: ignore[operator]
