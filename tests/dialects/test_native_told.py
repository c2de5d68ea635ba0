"""The files that an infotext names, found again: by hash, then by name, and told of when they are not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import (
    ESRGAN_KEYS,
    LORA_KEYS,
    REFINER_KEYS,
    SD1_KEYS,
    SDXL_KEYS,
    VAE_KEYS,
    checkpoint,
    diffusers_folder,
)

from diffusion_api import infotext
from diffusion_api.catalog.library import Library
from diffusion_api.dialects.native.bodies import Txt2ImgBody
from diffusion_api.dialects.native.requests import txt2img
from diffusion_api.engine.stub import StubEngine
from diffusion_api.errors import InvalidRequest
from diffusion_api.outputs import Outputs
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.request import Txt2Img
from diffusion_api.service import Service
from diffusion_api.settings import Settings

FILES = {
    "model": ("models/one.safetensors", SD1_KEYS),
    "other": ("models/two.safetensors", SD1_KEYS | {"more": [1]}),
    "xl": ("models/xl.safetensors", SDXL_KEYS),
    "refiner": ("models/refine.safetensors", REFINER_KEYS),
    "lora": ("loras/style.safetensors", LORA_KEYS),
    "vae": ("vae/white.safetensors", VAE_KEYS),
    "upscaler": ("upscalers/sharp.safetensors", ESRGAN_KEYS),
}
FIELDS = "Steps: 12, Sampler: DPM++ 2M, CFG scale: 5.5, Seed: 99, Size: 256x192"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a file of each kind and the folder ``folder``, a model."""
    home = tmp_path_factory.mktemp("home")
    for name, shapes in FILES.values():
        checkpoint(home / "stable_diffusion" / name, shapes)
    diffusers_folder(home / "stable_diffusion" / "models" / "folder")
    return home


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Service]:
    settings = Settings(home=home)
    settings.create_folders()
    queue = MemoryQueue()
    yield Service(settings, Library(home, settings.models_dir), queue, Outputs(settings.outputs_dir), StubEngine())
    queue.close()


def digest(home: Path, kind: str) -> str:
    return hashlib.sha256((home / "stable_diffusion" / FILES[kind][0]).read_bytes()).hexdigest()


def meant(service: Service, text: str, **fields: Any) -> tuple[Txt2Img, list[str]]:
    found = txt2img(Txt2ImgBody(infotext=text, **fields), service)
    return found.request, found.warnings


def refusal(service: Service, text: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        meant(service, text)
    assert caught.value.field == "infotext"
    return str(caught.value)


@pytest.mark.parametrize("named", ["Model: renamed, ", "Model: two, ", ""])
def test_a_model_is_found_by_its_hash_whatever_it_is_called_now(service: Service, home: Path, named: str) -> None:
    request, notes = meant(service, f"a\n{FIELDS}, {named}Model hash: {digest(home, 'model')[:10]}")
    assert (request.model, notes) == ("one", [])


def test_a_model_with_another_hash_is_taken_by_its_name_and_told(service: Service) -> None:
    request, notes = meant(service, f"a\n{FIELDS}, Model hash: 0123456789, Model: one")
    assert request.model == "one"
    assert notes == ["infotext: model 'one' is another file here: no installed one has the hash 0123456789"]
    assert meant(service, f"a\n{FIELDS}, Model hash: 0123456789, Model: folder")[1] == []


def test_a_model_that_is_absent_is_told_with_name_hash_and_choices(service: Service) -> None:
    said = refusal(service, f"a\n{FIELDS}, Model hash: 0123456789, Model: dream")
    for word in ("infotext: ", "model 'dream' is not installed", "0123456789", "one of folder, one, "):
        assert word in said


def test_another_model_may_be_named_beside_the_text(service: Service) -> None:
    request, notes = meant(service, f"a\n{FIELDS}, Model hash: 0123456789, Model: dream", model="two")
    assert (request.model, request.steps, notes) == ("two", 12, [])


def test_civitais_hashes_are_read(service: Service, home: Path) -> None:
    hashes = f'Hashes: {{"model": "{digest(home, "model")[:10]}", "lora:old name": "{digest(home, "lora")[:10]}"}}'
    request, _ = meant(service, f"a <lora:old name:0.5>\n{FIELDS}, Model: gone, {hashes}")
    assert (request.model, request.prompt) == ("one", "a <lora:style:0.5>")


def test_a_lora_is_found_by_its_hash_in_both_prompts_and_in_the_field(service: Service, home: Path) -> None:
    hashes = f'Lora hashes: "old.name+: {digest(home, "lora")[:12]}", LoRAs: old.name+:0.7'
    again = "Denoising strength: 0.5, Hires upscale: 2, Hires prompt: <lora:old.name+:1>, Hires upscaler: Latent"
    request, notes = meant(service, f"a <lora:old.name+:0.5:1> <lora:old:1>\n{FIELDS}, Model: one, {hashes}, {again}")
    assert request.prompt == "a <lora:style:0.5:1> <lora:old:1>"
    assert request.hires is not None
    assert request.hires.prompt == "<lora:style:1>"
    assert [(use.name, use.scale) for use in request.loras] == [("style", 0.7)]
    assert notes == ["LoRA 'old' was skipped: it is not installed"]


def test_a_lora_that_was_applied_and_is_absent_is_told_with_name_hash_and_choices(service: Service) -> None:
    text = f'a <lora:epic:1>\n{FIELDS}, Model: one, Lora hashes: "epic: 0123456789ab"'
    said = refusal(service, text)
    assert said == "infotext: lora 'epic' is not installed, and no file has its hash 0123456789ab; one of style"
    assert meant(service, text, prompt="a")[0].prompt == "a"


def test_a_lora_keeps_the_name_that_the_prompt_gives_it_where_that_is_right(service: Service, home: Path) -> None:
    text = f'a <lora:STYLE:1>\n{FIELDS}, Model: one, Lora hashes: "STYLE: {digest(home, "lora")[:12]}"'
    request, notes = meant(service, text)
    assert (request.prompt, notes) == ("a <lora:STYLE:1>", [])


@pytest.mark.parametrize("told", ["VAE: gone.pt, VAE hash: {}", 'VAE: gone.pt, Hashes: {{"vae": "{}"}}'])
def test_a_vae_is_found_by_its_hash(service: Service, home: Path, told: str) -> None:
    request, notes = meant(service, f"a\n{FIELDS}, Model: one, {told.format(digest(home, 'vae')[:10])}")
    assert (request.vae, notes) == ("white", [])


@pytest.mark.parametrize("name", ["None", "Automatic"])
def test_a_text_may_say_that_there_was_no_vae(service: Service, name: str) -> None:
    assert meant(service, f"a\n{FIELDS}, Model: one, VAE: {name}")[0].vae == (None if name == "Automatic" else "None")


def test_a_vae_that_is_absent_is_told(service: Service) -> None:
    said = refusal(service, f"a\n{FIELDS}, Model: one, VAE: blue.pt, VAE hash: 0123456789")
    assert said == "infotext: vae 'blue.pt' is not installed, and no file has its hash 0123456789; one of white"


def test_the_second_passes_model_and_upscaler_are_found_by_their_hashes(service: Service, home: Path) -> None:
    again = (
        f"Denoising strength: 0.5, Hires checkpoint: gone [{digest(home, 'other')[:10]}], Hires upscale: 2, "
        f'Hires upscaler: R-SHARP, Hashes: {{"upscaler:R-SHARP": "{digest(home, "upscaler")[:10]}"}}'
    )
    request, notes = meant(service, f"a\n{FIELDS}, Model: one, {again}")
    assert request.hires is not None
    assert (request.hires.model, request.hires.upscaler, notes) == ("two", "sharp", [])


def test_an_upscaler_that_is_absent_is_told(service: Service) -> None:
    said = refusal(service, f"a\n{FIELDS}, Model: one, Hires upscale: 2, Hires upscaler: R-SHARP")
    assert said == "infotext: upscaler 'R-SHARP' is not installed; one of sharp"


def test_all_that_a_request_names_is_asked_for_again(service: Service, home: Path) -> None:
    body = Txt2ImgBody.model_validate(
        {
            "prompt": "a <lora:style:0.5>",
            "model": "xl",
            "vae": "white",
            "refiner_checkpoint": "refine",
            "refiner_switch_at": 0.65,
            "tiling": True,
            "seed": 5,
            "loras": ["style", {"name": "style", "scale": -0.5, "text_scale": 0.25}],
            "hires": {"enabled": True, "model": "xl", "upscaler": "sharp", "prompt": "b <lora:style:1>"},
        }
    )
    request = txt2img(body, service).request
    text = infotext.for_request(
        request,
        sampler_label="DPM++ 2M",
        schedule_label="Karras",
        model_name="xl",
        model_hash=digest(home, "xl")[:10],
        known={
            "VAE hash": digest(home, "vae")[:10],
            "VAE": "white.safetensors",
            "Lora hashes": f"style: {digest(home, 'lora')[:12]}",
        },
        version="DiffusionAPI v0.1.0",
    )
    assert request.refiner
    assert request.hires
    for_another = "LoRA 'style' appears to be designed for SD 1.5 models, but you're using an SDXL model. "
    assert meant(service, text) == (request, [f"{for_another}Try using a standard SD base model."])
