"""A demo model's UNet and text encoders, and how captions and sizes reach the UNet."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo_models.models import DemoModel, Text
from demo_models.tokenizer import Tables, save_tokenizer

Conditioning = dict[str, Tensor | dict[str, Tensor]]
"""Arguments of the UNet, beside latents and timesteps."""


class Tokens:
    """Captions → token ids, by text encoder."""

    def __init__(self, model: DemoModel, folder: Path) -> None:
        self._tokenizers = {
            text.key: CLIPTokenizer.from_pretrained(folder / text.tokenizer, local_files_only=True)
            for text in model.texts
        }

    @classmethod
    def new(cls, model: DemoModel, tables: Tables, work: Path) -> Tokens:
        """With tokenizers that are written into the work folder."""
        for text in model.texts:
            save_tokenizer(work / text.tokenizer, tables, text.padding)
        return cls(model, work)

    def ids(self, text: Text, chunks: list[list[str]]) -> Tensor:
        """Chunks of the captions of a batch → (batch, chunks, 77)."""
        tokenizer = self._tokenizers[text.key]
        rows = [
            tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            for texts in chunks
        ]
        return torch.stack(rows, 1)


class Network:
    """The parts of a model by their names in a checkpoint: ``unet``, ``text``, ``text_2``."""

    def __init__(self, model: DemoModel, tokens: Tokens, parts: dict[str, nn.Module]) -> None:
        self.model, self.parts, self._tokens = model, parts, tokens

    @classmethod
    def new(cls, model: DemoModel, tokens: Tokens, vocabulary: list[str], device: str) -> Network:
        """Untrained; the weights are drawn from torch's generator."""
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**model.unet).to(device, memory_format=torch.channels_last)
        }
        for text in model.texts:
            parts[text.key] = new_text_encoder(text, vocabulary).to(device)
        return cls(model, tokens, parts)

    @classmethod
    def read(cls, model: DemoModel, folder: Path) -> Network:
        """As it was published, in float32."""
        how = dict(torch_dtype=torch.float32, local_files_only=True)
        parts: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_pretrained(folder / "unet", **how)}
        for text in model.texts:
            kind = CLIPTextModelWithProjection if text.projected else CLIPTextModel
            parts[text.key] = kind.from_pretrained(folder / text.folder, dtype=torch.float32, local_files_only=True)
        return cls(model, Tokens(model, folder), parts)

    def average(self) -> Network:
        """A copy for the moving average of the weights."""
        return Network(self.model, self._tokens, {k: copy.deepcopy(part).eval() for k, part in self.parts.items()})

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: all parts, or the UNet alone when the text encoders are another model's."""
        return [
            p for k, part in self.parts.items() if k == "unet" or not self.model.texts_of for p in part.parameters()
        ]

    def conditioning(self, chunks: list[list[str]], time_ids: Tensor | None, zeroed: list[bool]) -> Conditioning:
        """The captions of a batch, every chunk encoded alone and then joined: (batch, chunks * 77, width).

        The pooled embedding is the first chunk's. ``time_ids`` is (batch, 5 or 6); a model that has none gets None, and
        nothing of it can be ``zeroed``.
        """
        hidden, pooled = [], None
        for text in self.model.texts:
            encoder = self.parts[text.key]
            ids = self._tokens.ids(text, chunks).to(encoder.device)
            batch, count, length = ids.shape
            out = encoder(ids.reshape(batch * count, length), output_hidden_states=text.penultimate)
            states = out.hidden_states[-2] if text.penultimate else out.last_hidden_state
            hidden.append(states.reshape(batch, count * length, -1))
            if text.projected:
                pooled = out.text_embeds.reshape(batch, count, -1)[:, 0]
        embeddings = hidden[0] if len(hidden) == 1 else torch.cat(hidden, -1)
        if time_ids is None:
            return {"encoder_hidden_states": embeddings}
        kept = 1 - torch.tensor(zeroed, dtype=embeddings.dtype, device=embeddings.device)[:, None]
        added = {"text_embeds": pooled * kept, "time_ids": time_ids.to(embeddings.device)}
        return {"encoder_hidden_states": embeddings * kept[:, :, None], "added_cond_kwargs": added}

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Epsilon for latents (batch, 4, h, w).

        On a CPU the fused attention's backward pass is slow for heads this narrow, until the pictures get large.
        """
        unet = self.parts["unet"]
        plain = torch.is_grad_enabled() and x.device.type == "cpu" and x.shape[2] * x.shape[3] < 32 * 32
        unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
        return unet(x, t, **conditioning).sample

    def state(self, prefix: str = "") -> dict[str, dict]:
        """The weights, as a checkpoint has them."""
        return {prefix + key: part.state_dict() for key, part in self.parts.items()}

    def load(self, state: dict[str, dict], prefix: str = "") -> None:
        """Take the weights from a checkpoint."""
        for key, part in self.parts.items():
            part.load_state_dict(state[prefix + key])


def new_text_encoder(text: Text, vocabulary: list[str]) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Four heads, an inner width of twice the outer."""
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=text.width, intermediate_size=2 * text.width,
        num_hidden_layers=text.layers, num_attention_heads=4, max_position_embeddings=77, projection_dim=text.width,
        hidden_act=text.hidden_act, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
        pad_token_id=vocabulary.index(text.padding),
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if text.projected else CLIPTextModel(config)
