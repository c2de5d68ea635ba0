"""Models of real size, with random weights, on a card that is capped. What is measured is printed (``pytest -s``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import finished, request

from diffusion_api.catalog.library import Library
from diffusion_api.engine.executor import Budget, Executor
from diffusion_api.settings import DATA

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]

GIB = 2**30
SHAPES = DATA / "models" / "shapes"
UNET: dict[str, Any] = dict(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
)
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
    bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of Stable Diffusion 1.5's size."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    home = tmp_path_factory.mktemp("home")
    folder = home / "models" / "sd15"
    torch.manual_seed(1)
    with torch.device("cuda"):
        parts = {
            "unet": UNet2DConditionModel(**UNET),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        }
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    for name in ("model_index.json", "scheduler"):
        (shutil.copytree if name == "scheduler" else shutil.copy)(SHAPES / name, folder / name)
    shutil.copytree(DATA / "clip", folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    shutil.copytree(folder, home / "models" / "other")
    return home


def engine(home: Path, gib: float | None) -> Executor:
    budget = Budget(max_vram=int(gib * GIB) if gib else None)
    made = Executor(Library(home, home / "models"), device="cuda", tokenizer=DATA / "clip", budget=budget)
    made.start()
    made.wait()
    return made


@pytest.fixture(autouse=True)
def uncapped() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("gib", "side"), [(4, 512), (2, 512), (1.2, 512), (4, 1024)])
def test_sd15_draws_on_a_capped_card_what_it_draws_on_a_whole_one(home: Path, gib: float, side: int) -> None:
    asked = request(model="sd15", steps=4, width=side, height=side, sampler="euler")
    whole = engine(home, None)
    expected = finished(whole, asked)
    whole.close()
    torch.cuda.reset_peak_memory_stats()
    capped = engine(home, gib)
    made = finished(capped, asked)
    capped.close()
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"\nSD 1.5, {side} px, {gib} GiB: peak {peak:.2f} GiB, {made.memory_steps}")
    assert peak <= gib
    far = np.abs(made.images[0].astype(int) - expected.images[0].astype(int)).mean()
    assert far < (8 if any("tiling" in step for step in made.memory_steps) else 0.5)


def test_a_model_that_waited_in_ram_draws_the_same_bits(home: Path) -> None:
    asked = request(model="sd15", steps=4, width=512, height=512, sampler="euler")
    capped = engine(home, 4.5)
    before = finished(capped, asked).images[0]
    finished(capped, asked.model_copy(update={"model": "other"}))
    report = capped.report()
    assert report
    assert {held.name: held.where for held in report.models} == {"sd15": "ram", "other": "device"}
    again = finished(capped, asked)
    capped.close()
    assert again.model_cached
    assert np.array_equal(again.images[0], before)


def test_memory_that_runs_out_on_the_card_is_met_and_given_back(home: Path) -> None:
    made = engine(home, 3)
    asked = request(model="sd15", steps=2, width=512, height=512, sampler="euler")
    finished(made, asked)
    before = torch.cuda.memory_allocated()
    hog = torch.empty(GIB // 2, dtype=torch.uint8, device="cuda")  # another program would do the same
    large = finished(made, asked.model_copy(update={"width": 1024, "height": 1024}))
    print("\n", large.memory_steps)
    del hog
    finished(made, asked)
    made.close()
    assert torch.cuda.memory_allocated() <= before * 1.05
