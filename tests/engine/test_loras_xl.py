"""LoRAs and embeddings for SDXL, on a small model of its structure with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_zoo as zoo
import pytest
import tiny
import torch
from asking import request
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_api.catalog.library import Library
from diffusion_api.engine import devices
from diffusion_api.engine.extras import Extras
from diffusion_api.engine.families.sdxl import SDXL
from diffusion_api.settings import DATA

BLOCK = "input_blocks_3_1_transformer_blocks_1"
"""Kohya names SDXL's layers as the original checkpoints do."""

OWN = "down_blocks.1.attentions.0.transformer_blocks.1"
FILE = {
    f"lora_unet_{BLOCK}_attn2_to_k": f"unet.{OWN}.attn2.to_k.weight",
    f"lora_unet_{BLOCK}_attn1_to_out_0": f"unet.{OWN}.attn1.to_out.0.weight",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder.encoder.layers.0.self_attn.q_proj.weight",
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": "text_encoder.encoder.layers.0.self_attn.out_proj.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.encoder.layers.0.mlp.fc1.weight",
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": "text_encoder_2.encoder.layers.0.self_attn.out_proj.weight",
}


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    return tiny.pipeline("sdxl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pipeline: DiffusionPipeline) -> Path:
    home = tmp_path_factory.mktemp("xl")
    tiny.save(pipeline, home / "stable_diffusion" / "models" / "small-xl")
    return home


@pytest.fixture(scope="module")
def lane(home: Path) -> SDXL:
    with torch.inference_mode():
        return SDXL.from_folder(home / "stable_diffusion" / "models" / "small-xl", devices.choose("cpu"))


@pytest.fixture
def attach(home: Path, lane: SDXL) -> Iterator[Callable[..., Any]]:
    extras = Extras(Library(home, home / "stable_diffusion" / "models", DATA / "models"))

    def attached(prompt: str) -> Any:
        with torch.inference_mode():
            return extras.attach(lane, request(prompt, model="small-xl"))

    yield attached
    with torch.inference_mode():
        lane.patches.detach()


def weights(lane: SDXL) -> dict[str, Tensor]:
    """By part and name, without the step that some releases of transformers have in between."""
    networks = {"unet": lane.unet, "text_encoder": lane.text_encoder, "text_encoder_2": lane.text_encoder_2}
    return {
        f"{part}.{name}".replace(".text_model.", "."): p.detach().clone()
        for part, n in networks.items()
        for name, p in n.named_parameters()
    }


@pytest.mark.parametrize("layout", zoo.WITH_TEXT_ENCODERS)
def test_each_layout_reaches_the_unet_and_both_text_encoders(
    home: Path, lane: SDXL, attach: Callable[..., Any], layout: str
) -> None:
    before, draw, make = weights(lane), zoo.Maker(), zoo.LAYOUTS[layout]
    files = {layer: make("x", tuple(before[name].shape), draw) for layer, name in FILE.items()}
    tensors = {f"{layer}{name[1:]}": tensor for layer, found in files.items() for name, tensor in found.items()}
    zoo.write(home / "stable_diffusion" / "loras" / f"{layout}.safetensors", tensors)
    done = attach(f"<lora:{layout}:0.4:0.7>a circle")
    assert done.warnings == ()
    after = weights(lane)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(FILE.values())
    for layer, name in FILE.items():
        strength = 0.7 if name.startswith("unet") else 0.4
        expected = zoo.changed(before[name], {n[2:]: t for n, t in files[layer].items()}, strength)
        assert abs(after[name].double().numpy() - expected).max() < 1e-5
    attach("a circle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(lane).items())


def test_diffusers_draws_the_same(
    home: Path, lane: SDXL, pipeline: DiffusionPipeline, attach: Callable[..., Any]
) -> None:
    draw, before = zoo.Maker(3), weights(lane)
    tensors: zoo.Tensors = {}
    for layer, name in FILE.items():
        tensors |= zoo.kohya(layer, tuple(before[name].shape), draw)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    zoo.write(home / "stable_diffusion" / "loras" / "both.safetensors", tensors)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = pipeline.tokenizer("a red star", padding="max_length", max_length=77, return_tensors="pt").input_ids

    def drawn(model: Any) -> Tensor:
        states = [encoder(ids, output_hidden_states=True) for encoder in (model.text_encoder, model.text_encoder_2)]
        hidden = torch.cat([state.hidden_states[-2] for state in states], -1)
        added = {"text_embeds": states[1].text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        return model.unet(x, 500, hidden, added_cond_kwargs=added).sample

    with torch.inference_mode():
        plain = drawn(lane)
        assert torch.allclose(drawn(pipeline), plain, atol=1e-5)
        pipeline.load_lora_weights(tensors)
        theirs = drawn(pipeline)
        pipeline.unload_lora_weights()
        assert not torch.allclose(theirs, plain, atol=1e-3)
        assert attach("<lora:both:1>").warnings == ()
        assert torch.allclose(drawn(lane), theirs, atol=1e-4)


def test_the_lora_for_shapes_is_skipped_in_the_words_of_the_original(attach: Callable[..., Any]) -> None:
    done = attach("<lora:shapes-ink:1>a circle")
    assert [lora.name for lora in done.skipped] == ["shapes-ink"]
    assert done.warnings[0].startswith(
        "LoRA 'shapes-ink' appears to be designed for SD 1.5 models, but you're using an SDXL model. "
        "Try using a standard SD base model. It was skipped: "
    )


def test_an_embedding_teaches_both_text_encoders(home: Path, lane: SDXL, attach: Callable[..., Any]) -> None:
    folder = home / "stable_diffusion" / "models" / "small-xl"
    (ids,) = lane.words["text_encoder"].chunks("red star")
    found = {}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        tensors = load_file(folder / part / "model.safetensors")
        (table,) = (tensor for key, tensor in tensors.items() if key.endswith("token_embedding.weight"))
        found[name] = table[list(ids.ids[1:3])].float()
    (home / "stable_diffusion" / "embeddings").mkdir()
    save_file(found, home / "stable_diffusion" / "embeddings" / "zorb.safetensors")
    attach("a zorb")
    with torch.inference_mode():
        (learned,), (words,) = lane.encode(("a zorb",)), lane.encode(("a red star",))
        assert torch.equal(learned.hidden, words.hidden)
        assert learned.pooled is not None
        assert words.pooled is not None
        assert torch.equal(learned.pooled, words.pooled)
