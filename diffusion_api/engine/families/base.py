"""What the families share: files of weights, the networks that are filled with them, and the lane of those with a UNet."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin, no_init_weights
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_api.catalog.detect import file_family, file_schedule, safetensors_header, weight_files
from diffusion_api.engine import fitting, text
from diffusion_api.engine.devices import Device
from diffusion_api.engine.fitting import Tensors
from diffusion_api.engine.loras import Patches
from diffusion_api.engine.pixels import finite
from diffusion_api.engine.samplers.sigmas import NoiseLevels
from diffusion_api.schema.request import Emphasis

NOISE_SCHEDULE: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Of a single file, where it does not say otherwise."""

AS_FOUND: Mapping[str, object] = MappingProxyType({})

LOADED = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
"""Tensors of a single file that are read. The others are averages for training on (EMA), schedules and marks."""


def read_tensors(path: Path) -> Tensors:
    """What a safetensors file holds, once its header has been checked. Raises Unrecognised."""
    safetensors_header(path)
    # Mapped, a file that is cut short while it is read would crash the process; and safetensors 0.8 leaks 64 bytes for each
    # tensor that it maps.
    return load_file(path, backend="pread")


def read_checkpoint(path: Path, device: Device) -> Tensors:
    """The tensors of a single file that make a model, those in 8 bits as the device computes. Raises Unrecognised."""
    file_family(path)
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt", backend="pread") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(LOADED)}  # noqa: SIM118
    else:
        held = read_weights(path)
        found = held.get("state_dict", held).items()
        tensors = {name: t for name, t in found if isinstance(t, Tensor) and name.startswith(LOADED)}
    eight_bits = (torch.float8_e4m3fn, torch.float8_e5m2)
    return {name: t.to(device.dtype) if t.dtype in eight_bits else t for name, t in tensors.items()}


def read_json(path: Path) -> dict[str, Any]:
    """What a config file says. Raises anything at all when it is broken."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def read_weights(path: Path) -> Any:
    """What a file of any format holds: tensors by their names; a pickle's may be nested. Raises anything at all.

    A pickle is read as data: numbers, texts and tensors, and nothing that could run.
    """
    if path.suffix.lower() == ".safetensors":
        return read_tensors(path)
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):  # the first embeddings were saved as one
        return torch.load(path, map_location="cpu", weights_only=True)


def read_network(kind: Any, folder: Path, device: Device) -> Any:
    """A network of diffusers from its part of a pipeline's folder. Raises anything at all when that is broken."""
    config = kind.load_config(folder, local_files_only=True)
    return network(kind, config, read_parts(folder), device)


def read_parts(folder: Path) -> Tensors:
    """The weights of a part of a pipeline's folder, from all of its files. Raises Unrecognised."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_tensors(path).items()}


def read_text(kind: Any, folder: Path, device: Device) -> Any:
    """A text encoder from its part of a pipeline's folder. Raises anything at all when that is broken."""
    return text_network(kind, read_json(folder / "config.json"), read_parts(folder), device)


def text_network(kind: Any, config: fitting.Config, tensors: Tensors, device: Device) -> Any:
    """A text encoder of transformers with these weights, on the device. Raises ValueError when it needs others."""
    model, found = kind.from_pretrained(
        None,
        config=CLIPTextConfig.from_dict(config),
        state_dict=tensors,
        dtype=device.dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    complete(kind, found["missing_keys"])
    return model.to(device.home).eval()


def network(kind: Any, config: Any, tensors: Tensors, device: Device) -> Any:
    """A network of diffusers with these weights, on the device. Raises ValueError when it needs others."""
    with torch.device("meta"), no_init_weights():  # no memory, and no time for numbers that are replaced anyway
        model = kind.from_config(config)
    model._fix_state_dict_keys_on_load(tensors)  # names that attention had until diffusers 0.15
    complete(kind, model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    return model.to(device.home, device.dtype).eval()


def complete(kind: type, missing: Collection[str]) -> None:
    """Raises ValueError when tensors are missing: the libraries would go on with random numbers in their place."""
    if missing:
        others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise ValueError(f"its {kind.__name__} lacks {min(missing)}{others}")


def read_tokenizer(folder: Path, *, padding: str | None = None) -> CLIPTokenizer:
    """The tokenizer of a folder with a vocabulary of CLIP's kind. Raises anything at all when that is broken."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if padding:
        tokenizer.pad_token = padding
    # transformers puts a method into the backend that refers to the backend: a circle through Rust, where no collector
    # looks. Each load would leak its vocabulary, 6.5 MB of SD 1.5's.
    del tokenizer.backend_tokenizer.decode
    return tokenizer


class Part(NamedTuple):
    """A text encoder of a family: its class, and where a single file has it and how."""

    kind: type
    prefix: str
    fit: fitting.Text


@dataclass(frozen=True, kw_only=True)
class UNetLane(ABC):
    """A loaded model whose UNet denoises the latents of an 8x autoencoder (arXiv:2112.10752): what its families share.

    Networks have the names that they have in a diffusers folder; a family has one text encoder or both. ``zeroed``: an empty
    negative prompt is read as zeros.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    levels: NoiseLevels
    device: torch.device
    tokenizer: CLIPTokenizer | None = None
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder: CLIPTextModel | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zeroed: bool = False

    PARTS: ClassVar[Mapping[str, Part]]
    """Its text encoders."""
    PADDING: ClassVar[Mapping[str, str]] = {}
    """Tokens that fill up a chunk where it is not the one that ends it, by text encoder."""
    SCALING: ClassVar[float] = 0.18215
    """Of the latents in a single file."""
    ZEROED: ClassVar[bool] = False
    XL: ClassVar[bool] = False

    @classmethod
    def from_folder(cls, folder: Path, device: Device, schedule: Mapping[str, object] = AS_FOUND) -> Self:
        """From a diffusers folder; ``schedule`` beats what its scheduler config says. Raises anything when it is broken."""
        index = read_json(folder / "model_index.json")
        told = read_json(folder / "scheduler" / "scheduler_config.json")
        parts: dict[str, Any] = {}
        for name, part in cls.PARTS.items():
            parts[_tokenizer(name)] = read_tokenizer(folder / _tokenizer(name))
            parts[name] = read_text(part.kind, folder / name, device)
        return cls(
            **parts,
            unet=read_network(UNet2DConditionModel, folder / "unet", device),
            vae=read_network(AutoencoderKL, folder / "vae", device),
            levels=NoiseLevels.from_config(told | dict(schedule), xl=cls.XL),
            zeroed=bool(index.get("force_zeros_for_empty_prompt", cls.ZEROED)),
            device=device.place,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        tokenizer: Path,
        device: Device,
        schedule: Mapping[str, object] = AS_FOUND,
    ) -> Self:
        """From a single file in the original key layout; the configs are fitted to the tensors.

        ``tokenizer`` is a folder with CLIP's own vocabulary, ``schedule`` beats what the file says. Raises anything at all
        when tensors are missing.
        """
        tensors = read_checkpoint(path, device)
        parts: dict[str, Any] = {}
        for name, part in cls.PARTS.items():
            parts[_tokenizer(name)] = read_tokenizer(tokenizer, padding=cls.PADDING.get(name))
            parts[name] = text_network(part.kind, *cls._fit_text(part, tensors), device)
        unet, vae = cls._fit_unet(tensors), fitting.vae(tensors) | {"scaling_factor": cls.SCALING}
        found = file_schedule(path) | dict(schedule)
        lane = cls(
            **parts,
            unet=network(UNet2DConditionModel, unet, convert_ldm_unet_checkpoint(tensors, unet), device),
            vae=network(AutoencoderKL, vae, convert_ldm_vae_checkpoint(tensors, vae), device),
            levels=NoiseLevels.from_config(NOISE_SCHEDULE | found, xl=cls.XL),
            zeroed=cls.ZEROED,
            device=device.place,
        )
        if "prediction_type" in found:
            return lane
        return replace(lane, levels=NoiseLevels.from_config(NOISE_SCHEDULE | found | lane._probed(), xl=cls.XL))

    @classmethod
    def _fit_unet(cls, tensors: Tensors) -> fitting.Config:
        return fitting.unet(tensors)

    @classmethod
    def _fit_text(cls, part: Part, tensors: Tensors) -> tuple[fitting.Config, Tensors]:
        return part.fit(tensors, part.prefix)

    def _probed(self) -> dict[str, object]:
        """What only the model itself can tell of how it predicts, in the words of a scheduler config."""
        return {}

    @staticmethod
    @abstractmethod
    def read_words(model: Any, ids: Tensor, clip_skip: int) -> text.Encoded:
        """What a text encoder of this family makes of (1, 77) ids."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """One picture's latents: 4 channels, an eighth of each side."""
        return 1, self.unet.config.out_channels, height // 8, width // 8

    @cached_property
    def patches(self) -> Patches:
        """What stands in place of the model's own weights."""
        texts = {name: getattr(self, name) for name in self.PARTS}
        return Patches({"unet": self.unet, "vae": self.vae} | texts, self.words)

    @cached_property
    def words(self) -> Mapping[str, text.Words]:
        """Its text encoders' words."""
        return {name: self._words(getattr(self, name), getattr(self, _tokenizer(name))) for name in self.PARTS}

    def _words(self, model: Any, tokenizer: CLIPTokenizer) -> text.Words:
        # Not self: a model that refers to itself would stay in memory when it is dropped.
        return text.Words(tokenizer, partial(self.read_words, model), model.get_input_embeddings())

    def encode(
        self, texts: tuple[str, ...], *, negative: bool = False, clip_skip: int = 1, emphasis: Emphasis = "original"
    ) -> tuple[text.Conditioning, ...]:
        """Conditionings of equal length; the hidden states of two text encoders side by side."""
        rows = [words.encode(texts, clip_skip=clip_skip, mode=emphasis) for words in self.words.values()]
        found = [
            text.Conditioning(torch.cat(hidden, -1), self._pooled(said, emphasis), negative)
            for said, *hidden in zip(texts, *rows, strict=True)
        ]
        if self.zeroed and negative and not any(texts):
            found = [replace(c, hidden=c.hidden * 0, pooled=None if c.pooled is None else c.pooled * 0) for c in found]
        return tuple(found)

    def _pooled(self, said: str, emphasis: Emphasis) -> Tensor | None:
        """What the UNet reads of a text as a whole."""
        return None

    @property
    def inpaints(self) -> bool:
        """Whether its UNet reads a mask and a picture beside the latents."""
        return bool(self.unet.config.in_channels != self.unet.config.out_channels)

    def blank(self, width: int, height: int) -> Tensor | None:
        """A mask over everything, and a grey picture; as A1111 does."""
        if not self.inpaints:
            return None
        return self.masked(torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width))

    def masked(self, pixels: Tensor, mask: Tensor) -> Tensor | None:
        """The mask at the size of the latents, and the latents of the picture, grey where it is masked."""
        if not self.inpaints:
            return None
        latents = self.latents_of(pixels * (1 - mask))
        return torch.cat([interpolate(mask, latents.shape[2:]).to(latents), latents], 1)

    def predict(
        self,
        latents: Tensor,
        timestep: float,
        conditionings: Sequence[text.Conditioning],
        extra: Tensor | None = None,
    ) -> Tensor:
        """The UNet's output, float32, for (rows, 4, h, w) latents, with a conditioning for each row."""
        time = torch.tensor(timestep, dtype=torch.float32, device=self.device)
        inputs = latents if extra is None else torch.cat([latents, extra.expand(len(latents), -1, -1, -1)], 1)
        hidden = torch.cat([conditioning.hidden for conditioning in conditionings])
        predicted: Tensor = self.unet(
            inputs.to(self.unet.dtype),
            time,
            hidden.to(self.unet.dtype),
            added_cond_kwargs=self._added(latents, conditionings),
            return_dict=False,
        )[0]
        return predicted.float()

    def _added(self, latents: Tensor, conditionings: Sequence[text.Conditioning]) -> dict[str, Tensor] | None:
        """What the UNet reads beside latents and words."""
        return None

    def latents_of(self, pixels: Tensor) -> Tensor:
        """(1, 3, h, w), -1 to 1 → (1, c, h/8, w/8), float32: the middle of what the autoencoder takes it for.

        An encoder that overflows in half precision gets a second try in float32.
        """
        if finite(found := self._read(pixels)):
            return found
        with in_float32(self.vae):
            return self._read(pixels)

    def _read(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mode()
        scaled: Tensor = found * self.vae.config.scaling_factor
        return scaled.float()

    def decode(self, latents: Tensor, *, precise: bool = False) -> Tensor:
        """(1, 4, h, w) → (1, 3, 8h, 8w), -1 to 1."""
        with in_float32(self.vae) if precise else nullcontext():
            scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            decoded: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return decoded

    def wrap(self, edges: bool) -> None:
        """Have convolutions go on at the opposite edge of a picture, or see zeros beyond it."""
        for network in (self.unet, self.vae):
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.padding_mode = "circular" if edges else "zeros"


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


@contextmanager
def in_float32(model: ModelMixin) -> Iterator[None]:
    """Within, the model computes in float32; half-precision weights survive the way there and back unchanged."""
    dtype = model.dtype
    model.float()
    try:
        yield
    finally:
        model.to(dtype)
