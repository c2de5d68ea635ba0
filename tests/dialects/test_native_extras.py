"""LoRAs and VAEs as callers ask for them, and what they are told; by the stub engine and by a real one."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import lora_zoo as zoo
import pytest
import torch
from fake_models import checkpoint
from PIL import Image
from safetensors.torch import save_file
from serving import Program, eventually, serving

from diffusion_api.catalog.library import Library
from diffusion_api.infotext import asked, parse
from diffusion_api.settings import DATA

TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
BIG = "LoRA 'big' may not be compatible with 'shapes'. Check if the LoRA was trained for the same model architecture."
STAR = "a large yellow star on a purple background"


def infotext_of(status: dict[str, str]) -> str:
    return str(Image.open(io.BytesIO(base64.b64decode(status["image"]))).info["parameters"])


def test_a_real_service_applies_what_fits_and_tells_of_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "stable_diffusion" / "loras"
    zoo.write(folder / "noisy.safetensors", zoo.kohya(TO_K, (128, 128), zoo.Maker()))
    zoo.write(folder / "big.safetensors", zoo.kohya(TO_K, (128, 77), zoo.Maker()))
    with serving(tmp_path, engine="diffusers", device="cpu", shipped_models=True) as server:
        fields = {"model": "shapes", "steps": 2, "width": 64, "height": 64, "seed": 1, "fileType": "png"}
        uses = [{"path": "stable_diffusion/loras/noisy.safetensors", "scale": 0.5}, "big", "nix"]
        answer = server.post(prompt=f"<lora:shapes-ink:0.5:1>{STAR}", loras=uses, **fields).json()
        unknown = "LoRA 'nix' was skipped: it is not installed"
        assert answer["warnings"] == [unknown]
        done = server.wait(answer["job_id"])
        assert done["loras_applied"] == [
            {"name": "noisy", "scale": 0.5, "text_scale": 0.5},
            {"name": "shapes-ink", "scale": 1.0, "text_scale": 0.5},
        ]
        reason = (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight is 128x77 there and 128x128 in the model"
        )
        assert done["loras_skipped"] == [
            {"name": "big", "reason": reason},
            {"name": "nix", "reason": "it is not installed"},
        ]
        assert done["warnings"] == [unknown, f"{BIG} It was skipped: {reason}."]
        said = parse(infotext_of(done))
        assert str(said.fields["Lora hashes"]).count(": ") == 2
        assert said.prompt.startswith("<lora:shapes-ink:0.5:1>")
        again = server.result(image=done["image"], fileType="png")
        assert again["image"] == done["image"]
        plain = server.result(prompt=STAR, **fields)
        assert plain["image"] != done["image"]
        assert "loras_applied" not in plain


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"loras": ["one"]}, "LoRAs: one:1"),
        ({"loras": [{"path": "one", "scale": 0.25}]}, "LoRAs: one:0.25"),
        ({"loras": [{"name": "one", "scale": 0.5, "text_scale": 1}, "two"]}, "LoRAs: one:1:0.5, two:1"),
        ({"loras": [{"name": "one", "scale": "-0.5"}]}, "LoRAs: one:-0.5"),
    ],
)
def test_the_infotext_says_which_loras_were_asked_for(stub_server: Program, field: object, said: str) -> None:
    assert isinstance(field, dict)
    text = infotext_of(stub_server.result(model="small", steps=1, fileType="png", **field))
    assert said in text.replace('"', "")
    again = infotext_of(stub_server.result(model="small", fileType="png", infotext=text))
    assert asked(parse(again))[0]["loras"] == asked(parse(text))[0]["loras"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vae": "nix"}, ["vae 'nix' is not installed; one of Automatic, None"]),
        ({"vae": "../vae/white"}, ["vae '../vae/white' is not installed"]),
        ({"sd_vae": 5}, ["sd_vae is 5"]),
        ({"loras": [{"name": "one", "scale": "inf"}]}, ["loras.0.scale is 'inf'", "equal to 100"]),
        ({"prompt": "<lora:x>" * 65}, ["the job asks for 65 LoRAs; at most 64 are allowed"]),
        ({"prompt": "<lora:x>" * 32, "loras": ["x"] * 33}, ["the job asks for 65 LoRAs"]),
    ],
)
def test_what_no_job_can_mean_is_refused(stub_server: Program, fields: dict[str, object], words: list[str]) -> None:
    answer = stub_server.post(model="small", steps=1, **fields)
    assert 400 <= answer.status_code < 500
    for word in words:
        assert word in answer.json()["error"]


@pytest.mark.parametrize("vae", [None, "Automatic", "automatic", "None", "none"])
def test_a_model_needs_no_vae_beside_its_own(stub_server: Program, vae: str | None) -> None:
    answer = stub_server.post(model="small", steps=1, vae=vae)
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])


def test_a_vae_is_asked_for_by_its_name(stub_server: Program) -> None:
    folder = stub_server.home / "stable_diffusion" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, folder / "white.safetensors")

    def taken() -> bool:
        return stub_server.post(model="small", steps=1, vae="white").status_code == 200

    eventually(taken, "the VAE to be seen")
    (folder / "white.safetensors").unlink()


def test_shipped_loras_are_listed_beside_the_users(tmp_path: Path) -> None:
    checkpoint(tmp_path / "stable_diffusion" / "loras" / "mine.safetensors", {f"{TO_K}.lora_down.weight": [4, 8]})
    rows = Library(tmp_path, tmp_path / "stable_diffusion" / "models", DATA / "models").assets("lora")
    assert [(row.name, row.shown_path) for row in rows] == [
        ("mine", "stable_diffusion/loras/mine.safetensors"),
        ("shapes-ink", "shipped/loras/shapes-ink.safetensors"),
        ("shapes-xl-ink", "shipped/loras/shapes-xl-ink.safetensors"),
    ]
