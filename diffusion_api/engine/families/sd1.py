"""Stable Diffusion 1.x: one CLIP text encoder, a UNet that predicts epsilon, an 8x autoencoder (arXiv:2112.10752)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_api.engine import text
from diffusion_api.engine.devices import Device
from diffusion_api.engine.families.base import Tensors, complete, network, read_network, read_tensors, read_tokenizer
from diffusion_api.engine.loras import Patches
from diffusion_api.engine.samplers.sigmas import NoiseLevels
from diffusion_api.schema.request import Emphasis

NOISE_SCHEDULE: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
HEADS = 8
PARTS = {
    "model.diffusion_model.": "UNet",
    "first_stage_model.": "autoencoder",
    "cond_stage_model.transformer.": "text encoder",
}
"""What a single file must hold, by the prefixes of its tensors."""


@dataclass(frozen=True)
class SD1:
    """A loaded model of the family; satisfies :class:`diffusion_api.engine.denoise.Lane`."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    levels: NoiseLevels
    device: torch.device
    model_hash: str | None = None

    @classmethod
    def from_folder(cls, folder: Path, device: Device, model_hash: str | None) -> SD1:
        """From a diffusers folder. Raises anything at all when the folder is broken."""
        prediction = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        if (kind := prediction.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(f"prediction_type {kind!r} is not supported yet; only epsilon is")
        return cls(
            tokenizer=read_tokenizer(folder / "tokenizer"),
            text_encoder=read_text(folder / "text_encoder", device),
            unet=read_network(UNet2DConditionModel, folder / "unet", device),
            vae=read_network(AutoencoderKL, folder / "vae", device),
            levels=NoiseLevels.from_config(prediction),
            device=device.place,
            model_hash=model_hash,
        )

    @classmethod
    def from_checkpoint(cls, tensors: Tensors, tokenizer: Path, device: Device, model_hash: str | None) -> SD1:
        """From the tensors of a single file in the original key layout; the configs are fitted to the tensors.

        ``tokenizer`` is a folder with CLIP's own vocabulary. Raises anything at all when tensors are missing.
        """
        for prefix, part in PARTS.items():
            if not any(key.startswith(prefix) for key in tensors):
                raise ValueError(f"it holds no {part} ({prefix}*)")
        unet, vae = fit_unet(tensors), fit_vae(tensors)
        text_encoder = CLIPTextModel(CLIPTextConfig(**fit_text(tensors)))
        load_text(text_encoder, tensors)
        return cls(
            tokenizer=read_tokenizer(tokenizer),
            text_encoder=text_encoder.to(device.home, device.dtype).eval(),
            unet=network(UNet2DConditionModel, unet, convert_ldm_unet_checkpoint(dict(tensors), unet), device),
            vae=network(AutoencoderKL, vae, convert_ldm_vae_checkpoint(dict(tensors), vae), device),
            levels=NoiseLevels.from_config(NOISE_SCHEDULE),
            device=device.place,
            model_hash=model_hash,
        )

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """One picture's latents: 4 channels, an eighth of each side."""
        return 1, 4, height // 8, width // 8

    def encode(
        self, texts: tuple[str, ...], *, negative: bool = False, clip_skip: int = 1, emphasis: Emphasis = "original"
    ) -> tuple[text.Conditioning, ...]:
        """Hidden states of the last layer, or an earlier one, final layer norm included; equal lengths."""
        hidden = self._words.encode(texts, clip_skip=clip_skip, mode=emphasis)
        return tuple(text.Conditioning(rows, negative=negative) for rows in hidden)

    def blank(self, width: int, height: int) -> None:
        """It reads no picture."""

    @cached_property
    def patches(self) -> Patches:
        """What stands in place of the model's own weights."""
        return Patches({"unet": self.unet, "text_encoder": self.text_encoder, "vae": self.vae})

    @property
    def words(self) -> dict[str, text.Words]:
        """The text encoder's words."""
        return {"text_encoder": self._words}

    @cached_property
    def _words(self) -> text.Words:
        text_encoder = (
            self.text_encoder
        )  # not self: a model that refers to itself would stay in memory when it is dropped

        def encoder(ids: Tensor, clip_skip: int) -> text.Encoded:
            found = text_encoder(ids.to(text_encoder.device), output_hidden_states=True)
            layers = found.hidden_states[1:]  # before them: the vectors of the tokens
            return text.Encoded(text_encoder.final_layer_norm(layers[-min(clip_skip, len(layers))]))

        return text.Words(self.tokenizer, encoder, text_encoder.get_input_embeddings())

    def predict(
        self, latents: Tensor, timestep: float, conditionings: Sequence[text.Conditioning], extra: Tensor | None = None
    ) -> Tensor:
        """The UNet's output, float32, for (rows, 4, h, w) latents, with a conditioning for each row."""
        time = torch.tensor(timestep, dtype=torch.float32, device=self.device)
        hidden = torch.cat([conditioning.hidden for conditioning in conditionings])
        predicted: Tensor = self.unet(latents.to(self.unet.dtype), time, hidden.to(self.unet.dtype), return_dict=False)[
            0
        ]
        return predicted.float()

    def latents_of(self, pixels: Tensor) -> Tensor:
        """(1, 3, h, w), -1 to 1 → (1, 4, h/8, w/8), float32: the middle of what the autoencoder takes it for."""
        found: Tensor = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode()
        return (found * self.vae.config.scaling_factor).float()

    def decode(self, latents: Tensor, *, precise: bool = False) -> Tensor:
        """(1, 4, h, w) → (1, 3, 8h, 8w), -1 to 1."""
        with in_float32(self.vae) if precise else nullcontext():
            scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            decoded: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return decoded


@contextmanager
def in_float32(model: ModelMixin) -> Iterator[None]:
    """Within, the model computes in float32; half-precision weights survive the way there and back unchanged."""
    dtype = model.dtype
    model.float()
    try:
        yield
    finally:
        model.to(dtype)


def fit_unet(tensors: Tensors) -> dict[str, object]:
    """The UNet config that these tensors belong to: levels, widths and depth are read off, the structure is SD 1's.

    An LDM UNet's ``input_blocks`` are: the first convolution, then for each level its residual blocks and, but for the last,
    a downsampler (``.op``).
    """
    prefix = "model.diffusion_model."
    blocks = 1 + max(int(k.split(".")[3]) for k in tensors if k.startswith(prefix + "input_blocks."))
    widths: list[int] = []
    depth = 0
    attended: list[bool] = []
    level: list[int] = []
    for block in range(1, blocks + 1):
        base = f"{prefix}input_blocks.{block}."
        if block == blocks or base + "0.op.weight" in tensors:
            widths.append(tensors[f"{prefix}input_blocks.{level[-1]}.0.out_layers.3.weight"].shape[0])
            attended.append(f"{prefix}input_blocks.{level[-1]}.1.proj_in.weight" in tensors)
            depth = max(depth, len(level))
            level = []
        else:
            level.append(block)
    attention = next(k for k in tensors if k.startswith(prefix) and k.endswith("attn2.to_k.weight"))
    return {
        "sample_size": 64,
        "in_channels": tensors[prefix + "input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors[prefix + "out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": depth,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "cross_attention_dim": tensors[attention].shape[1],
        "attention_head_dim": HEADS,
        "norm_num_groups": min(32, _groups(widths[0])),
    }


def fit_vae(tensors: Tensors) -> dict[str, object]:
    """The autoencoder config that these tensors belong to."""
    prefix = "first_stage_model.encoder.down."
    levels = 1 + max(int(k.split(".")[3]) for k in tensors if k.startswith(prefix))
    depth = 1 + max(int(k.split(".")[5]) for k in tensors if k.startswith(prefix + "0.block."))
    widths = [tensors[f"{prefix}{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": tensors["first_stage_model.post_quant_conv.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": depth,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": min(32, _groups(widths[0])),
        "scaling_factor": 0.18215,
        "sample_size": 512,
    }


def _groups(width: int) -> int:
    """Group count of the norms, which leaves no trace in the tensors: 32 in the published widths, 4 or 2 channels a group
    in the small models that ship here (64 → 16, 16 → 8)."""
    return 32 if width >= 128 else (16 if width >= 64 else 8)


def fit_text(tensors: Tensors) -> dict[str, object]:
    """The CLIP text config that these tensors belong to. Heads are 64 wide as in CLIP, 4 where the width is too small."""
    prefix = "cond_stage_model.transformer.text_model."
    vocabulary, width = tensors[prefix + "embeddings.token_embedding.weight"].shape
    layers = 1 + max(int(k.split(".")[5]) for k in tensors if k.startswith(prefix + "encoder.layers."))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[prefix + "encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64 if width >= 256 else 4,
        "max_position_embeddings": tensors[prefix + "embeddings.position_embedding.weight"].shape[0],
        "projection_dim": width,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def read_text(folder: Path, device: Device) -> CLIPTextModel:
    """The text encoder of a diffusers folder. Raises anything at all when that is broken."""
    model, found = CLIPTextModel.from_pretrained(
        None,
        config=CLIPTextConfig.from_dict(json.loads((folder / "config.json").read_text())),
        state_dict=read_tensors(folder / "model.safetensors"),
        dtype=device.dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    complete(CLIPTextModel, found["missing_keys"])
    return model.to(device.home).eval()


def load_text(model: CLIPTextModel, tensors: Tensors) -> None:
    """Fill a text encoder from ``cond_stage_model.transformer.*``."""
    prefix = "cond_stage_model.transformer."
    wanted = model.state_dict().keys()
    nested = any(k.startswith("text_model.") for k in wanted)
    found = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix) and not key.endswith("position_ids"):
            name = key.removeprefix(prefix)
            found[name if nested else name.removeprefix("text_model.")] = tensor
    model.load_state_dict(found)
