"""LoRAs, VAEs, upscalers and embeddings: found by what their files hold, wherever they lie."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from fake_models import EMBEDDING_KEYS, ESRGAN_KEYS, LORA_KEYS, SD1_KEYS, VAE_KEYS, checkpoint, diffusers_folder

from diffusion_api.catalog import library as catalog
from diffusion_api.catalog.layouts import Kind
from diffusion_api.catalog.library import Library

KINDS: dict[Kind, dict[str, list[int]]] = {
    "lora": LORA_KEYS,
    "vae": VAE_KEYS,
    "upscaler": ESRGAN_KEYS,
    "embedding": EMBEDDING_KEYS,
}
OWN: dict[Kind, str] = {"lora": "loras", "vae": "vae", "upscaler": "upscalers", "embedding": "embeddings"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation's folder with nothing in it."""
    return tmp_path / "home"


def library(home: Path) -> Library:
    return Library(home, home / "stable_diffusion" / "models")


def listed(found: Library, kind: Kind) -> dict[str, str]:
    """Names of that kind with their shown paths."""
    return {row.name: row.shown_path for row in found.assets(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_in_its_own_folder(home: Path, kind: Kind) -> None:
    folder = home / "stable_diffusion" / OWN[kind]
    path = checkpoint(folder / "one.v2.safetensors", KINDS[kind])
    (folder / "two.pt").write_bytes(b"PK\3\4")
    (folder / "readme.txt").touch()
    one, two = library(home).assets(kind)
    assert (one.name, one.kind, one.pickled, one.path) == ("one.v2", kind, False, path)
    assert (two.name, two.kind, two.pickled) == ("two", kind, True)
    assert one.shown_path == f"stable_diffusion/{OWN[kind]}/one.v2.safetensors"
    assert one.hash == hashlib.sha256(path.read_bytes()).hexdigest()[:10]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_what_its_tensors_say_wherever_it_lies(home: Path, kind: Kind) -> None:
    checkpoint(home / "stable_diffusion" / "models" / "stray.safetensors", KINDS[kind])
    checkpoint(home / "stable_diffusion" / "loras" / "model.safetensors", SD1_KEYS)
    found = library(home)
    assert listed(found, kind) == {"stray": "stable_diffusion/models/stray.safetensors"}
    assert [model.name for model in found.models()] == ["model"]


def test_what_the_tensors_leave_open_the_folder_tells(home: Path) -> None:
    checkpoint(home / "stable_diffusion" / "upscalers" / "new.safetensors", {"layers.0.weight": [8]})
    assert list(listed(library(home), "upscaler")) == ["new"]


def test_the_places_of_the_contract_are_searched(home: Path) -> None:
    for path in (
        "stable_diffusion/loras/plain.safetensors",
        "loras/beside.safetensors",
        "loras/by_name/lora.safetensors",
        "models/stable_diffusion_finetune_v1/pytorch_lora_weights.safetensors",
    ):
        checkpoint(home / path, LORA_KEYS)
    pickled = home / "models" / "finetune_v2" / "pytorch_lora_weights.bin"
    pickled.parent.mkdir(parents=True)
    pickled.write_bytes(b"PK\3\4")
    diffusers_folder(home / "models" / "folder")
    checkpoint(home / "models" / "single.safetensors", SD1_KEYS)
    found = library(home)
    assert listed(found, "lora") == {
        "beside": "loras/beside.safetensors",
        "by_name": "loras/by_name/lora.safetensors",
        "finetune_v2": "models/finetune_v2/pytorch_lora_weights.bin",
        "plain": "stable_diffusion/loras/plain.safetensors",
        "stable_diffusion_finetune_v1": "models/stable_diffusion_finetune_v1/pytorch_lora_weights.safetensors",
    }
    assert [model.name for model in found.models()] == ["folder", "single"]


def test_the_second_of_one_name_is_told_apart_by_its_path(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    loras = home / "stable_diffusion" / "loras"
    for path in (loras / "a.safetensors", loras / "sub" / "a.safetensors", home / "loras" / "a.safetensors"):
        checkpoint(path, LORA_KEYS)
    (loras / "a.pt").write_bytes(b"PK\3\4")
    found = library(home)
    assert listed(found, "lora") == {
        "a": "stable_diffusion/loras/a.safetensors",
        "stable_diffusion/loras/a": "stable_diffusion/loras/a.pt",
        "sub/a": "stable_diffusion/loras/sub/a.safetensors",
        "loras/a": "loras/a.safetensors",
    }
    assert "stable_diffusion/loras/sub/a.safetensors is listed as 'sub/a', since 'a' is" in caplog.text


@pytest.mark.parametrize(
    "name", ["fine", "fine.safetensors", "sub/fine", "sub/fine.safetensors", "FINE", "loras/sub/fine"]
)
def test_a_file_is_found_by_name_path_and_with_or_without_extension(home: Path, name: str) -> None:
    checkpoint(home / "stable_diffusion" / "loras" / "sub" / "fine.safetensors", LORA_KEYS)
    row = library(home).find_asset("lora", name)
    assert row is not None
    assert row.name == "fine"


@pytest.mark.parametrize("name", ["", "/", "ine", "../fine", "sub", "fine.pt", "*"])
def test_no_other_name_finds_it(home: Path, name: str) -> None:
    checkpoint(home / "stable_diffusion" / "loras" / "sub" / "fine.safetensors", LORA_KEYS)
    assert library(home).find_asset("lora", name) is None


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": [4, 768]}, "sd1"),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": [4, 1024]}, "sd2"),
        ({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": [4, 2048]}, "sdxl"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj.lora_up.weight": [64, 4]}, "sdxl"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 1280]}, "sdxl"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": [4, 3072]}, "flux"),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": [4, 64]}, "sd1"),
        ({"something.lora_A.weight": [4, 99]}, None),
    ],
)
def test_the_family_of_a_lora_comes_from_its_structure(
    home: Path, keys: dict[str, list[int]], family: str | None
) -> None:
    checkpoint(home / "loras" / "one.safetensors", keys)
    (row,) = library(home).assets("lora")
    assert row.family == family


def test_a_broken_file_is_told_and_the_others_are_listed(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(home / "loras" / "good.safetensors", LORA_KEYS)
    (home / "loras" / "page.safetensors").write_bytes(b"<html>Sign in</html>" + struct.pack("<Q", 0))
    assert list(listed(library(home), "lora")) == ["good"]
    assert "page.safetensors is not listed: loras/page.safetensors is no safetensors file" in caplog.text


def test_a_file_is_read_again_only_when_it_changed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "FRESH", -1000)
    path = checkpoint(home / "loras" / "one.safetensors", LORA_KEYS)
    found = library(home)
    assert list(listed(found, "lora")) == ["one"]
    monkeypatch.setattr(catalog.detect, "safetensors_header", lambda path: pytest.fail("it was read again"))
    assert list(listed(found, "lora")) == ["one"]
    monkeypatch.undo()
    monkeypatch.setattr(catalog, "FRESH", -1000)
    checkpoint(path, VAE_KEYS)
    assert list(listed(found, "lora")) == []
    assert list(listed(found, "vae")) == ["one"]
