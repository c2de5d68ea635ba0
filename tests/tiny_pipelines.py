"""Folders of pipelines in diffusers' layout: the structure of the published models, a few thousand random numbers each."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniDiffuserModel,
    UniDiffuserPipeline,
    UniDiffuserTextDecoder,
    ZImageModularPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Tokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
WIDTH = 32
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> CLIPTokenizer:
    """One token a letter, as CLIP has them: within a word and at its end."""
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """One token a letter, as T5 has them."""
    words = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5Tokenizer(vocab=[(word, 0.0 if word.startswith("<") else -1.0) for word in words], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and Qwen's marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gpt2_tokenizer() -> GPT2Tokenizer:
    """One token a byte, and the mark of an end."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), "<|EOS|>"]
    return GPT2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], eos_token="<|EOS|>")


def clip(kind: Any, tokenizer: CLIPTokenizer) -> Any:
    """A text encoder of CLIP's kind."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=4, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """A text encoder of T5's kind."""
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    )


def qwen(kind: Any, tokenizer: Qwen2Tokenizer, layers: int) -> Any:
    """A text encoder of Qwen's kind, 16 wide."""
    return kind(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip


def vae(channels: int, **config: Any) -> AutoencoderKL:
    """An autoencoder that is 8 times smaller, with that many channels."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5, mid_block_add_attention=False, **config,
    )  # fmt: skip


def flux(**config: Any) -> FluxPipeline:
    """FLUX.1; dev's guidance is an input of the transformer."""
    words, others = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        **{"guidance_embeds": True} | config,
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae(4), clip(CLIPTextModel, words), words,
        t5(others, WIDTH), others, transformer,
    )  # fmt: skip


def klein() -> Flux2KleinPipeline:
    """FLUX.2 klein, which reads the hidden states of layers 9, 18 and 27."""
    words = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 16, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
    )  # fmt: skip
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, autoencoder, qwen(Qwen3ForCausalLM, words, 28), words, transformer)


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5."""
    words, others = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=32, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(4), clip(CLIPTextModelWithProjection, words), words,
        clip(CLIPTextModelWithProjection, words), words, t5(others, 2 * WIDTH), others,
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    """Z-Image."""
    words = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16), qwen(Qwen3Model, words, 2), words, transformer
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image."""
    words = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    marks = {"bos_token_id": 256, "eos_token_id": 256, "vision_token_id": 256}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
                "bos_token_id": 256, "eos_token_id": 256,
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
            **marks,
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, autoencoder, encoder, words, transformer)


def unidiffuser() -> UniDiffuserPipeline:
    """UniDiffuser v1, whose pictures have 512 x 512 pixels and whose CLIP embedding has 512 numbers."""
    words, letters = clip_tokenizer(), gpt2_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=37, projection_dim=512, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    captions = UniDiffuserTextDecoder(
        prefix_length=77, prefix_inner_dim=WIDTH, prefix_hidden_dim=16, vocab_size=len(letters), n_positions=256,
        n_embd=16, n_layer=1, n_head=2,
    )  # fmt: skip
    unet = UniDiffuserModel(
        text_dim=16, clip_img_dim=512, num_text_tokens=77, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, num_layers=3, sample_size=64, patch_size=2, activation_fn="gelu", norm_type="layer_norm",
        block_type="unidiffuser", pre_layer_norm=False, use_timestep_embedding=False, use_data_type_embedding=True,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=3
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return UniDiffuserPipeline(
        vae(4), clip(CLIPTextModel, words), CLIPVisionModelWithProjection(vision), processor, words, captions, letters,
        unet, scheduler,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux2-klein": klein,
    "sd35": sd3,
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Fill a pipeline with random numbers, large enough that every word and step shows in the picture, and write it."""
    generator = torch.Generator().manual_seed(0)
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            for name, weight in network.named_parameters():
                spread = 0.02 if weight.ndim == 1 else weight[0].numel() ** -0.5
                noise = torch.randn(weight.shape, generator=generator) * spread
                weight.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
        if isinstance(
            network, UniDiffuserTextDecoder
        ):  # its output layer is its input layer, which no file holds twice
            gpt = network.transformer
            gpt.lm_head.weight = nn.Parameter(gpt.transformer.wte.weight.detach().clone())
    pipeline.save_pretrained(folder)


def save_modular(classic: Path, folder: Path) -> None:
    """The same Z-Image as a modular pipeline, which names its parts in another index."""
    parts = ZImagePipeline.from_pretrained(classic, local_files_only=True, use_safetensors=True).components
    modular = ZImageModularPipeline()
    modular.update_components(**{name: part for name, part in parts.items() if name in modular.component_names})
    modular.save_pretrained(str(folder), overwrite_modular_index=True)
    for part in parts:
        shutil.copytree(classic / part, folder / part, dirs_exist_ok=True)
