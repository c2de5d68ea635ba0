"""``GET /capabilities``: what it says is what a POST then does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_models import diffusers_folder
from serving import Program, serving

from diffusion_api.dialects.native.bodies import Img2ImgBody, Txt2ImgBody, UpscaleBody
from diffusion_api.dialects.native.examples import PICTURE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with tight limits, and defaults of its own for its model."""
    home = tmp_path_factory.mktemp("capable")
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / "small", sample_size=8)
    (models.parent / "models.toml").write_text('[small]\nsteps = 7\nguidance_scale = 4.5\nsampler = "Euler a"\n')
    with serving(home, max_steps=40, max_batch=3, max_pixels=2**20, model="small") as program:
        yield program


def capabilities(server: Program, **query: str) -> dict[str, Any]:
    answer = server.get("/capabilities", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_every_field_of_every_body_is_there(server: Program) -> None:
    parameters = capabilities(server)["parameters"]
    bodies = {"/txt2img": Txt2ImgBody, "/img2img": Img2ImgBody, "/inpaint": Img2ImgBody, "/upscale": UpscaleBody}
    assert {route: set(fields) for route, fields in parameters.items()} == {
        route: set(body.model_fields) for route, body in bodies.items()
    }
    assert parameters["/txt2img"]["hires"]["fields"]["denoising_strength"]["maximum"] == 1
    assert parameters["/img2img"]["resize_mode"]["choices"][:2] == ["just resize", "crop and resize"]


def test_the_defaults_are_those_of_the_model(server: Program) -> None:
    found = capabilities(server)
    fields = found["parameters"]["/txt2img"]
    said = {name: fields[name]["default"] for name in ("steps", "cfg_scale", "sampler_name", "width", "n", "fileType")}
    assert said == {"steps": 7, "cfg_scale": 4.5, "sampler_name": "Euler a", "width": 64, "n": 1, "fileType": "jpg"}
    assert found["parameters"]["/img2img"]["denoising_strength"]["default"] == 0.75
    assert found["parameters"]["/inpaint"]["mask_padding"]["default"] == 32
    assert found["parameters"]["/upscale"]["upscaler"]["default"] == "Lanczos"
    assert found["model"] | {"label": ""} == {
        "name": "small", "label": "", "type": "standard", "family": "sd1", "native_size": 64, "width": 64, "height": 64,
        "multiple": 8,
    }  # fmt: skip
    assert found == capabilities(server, model="SMALL")


def test_a_body_of_all_the_defaults_is_taken_and_says_nothing_new(server: Program) -> None:
    for route, beside in (
        ("/txt2img", {}),
        ("/img2img", {"image": PICTURE, "prompt": "x"}),
        ("/inpaint", {"image": PICTURE, "mask": PICTURE, "prompt": "x"}),
        ("/upscale", {"image": PICTURE}),
    ):
        fields = capabilities(server)["parameters"][route]
        body = {name: field["default"] for name, field in fields.items()} | beside | {"dry_run": True, "seed": 1}
        short = server.request("POST", route, json=beside | {"dry_run": True, "seed": 1})
        told = server.request("POST", route, json=body)
        assert (told.status_code, told.json()) == (200, short.json()), route


def test_the_limits_are_those_that_refuse(server: Program) -> None:
    found = capabilities(server)
    assert found["limits"]["max_steps"] == 40
    fields = found["parameters"]["/txt2img"]
    for name in ("steps", "n", "cfg_scale", "jpeg_quality", "clip_skip", "variation_strength"):
        highest = fields[name]["maximum"]
        steps = {} if name == "steps" else {"steps": 1}
        assert server.post(dry_run=True, **steps | {name: highest}).status_code == 200, name
        assert server.post(dry_run=True, **steps | {name: highest + 1}).status_code in (400, 413), name


def test_the_names_are_taken(server: Program) -> None:
    found = capabilities(server)
    for field, names in (
        ("sampler_name", "sampling_methods"), ("scheduler_type", "scheduler_types"), ("fileType", "file_types"),
        ("vae", "vaes"),
    ):  # fmt: skip
        for name in found[names]:
            assert server.post(dry_run=True, **{field: name}).status_code == 200, name


def test_the_features_are_those_that_work(server: Program) -> None:
    assert capabilities(server)["features"] == ["txt2img", "img2img", "inpaint", "hires"]


def test_an_unknown_model_is_refused_as_by_a_post(server: Program) -> None:
    answer = server.get("/capabilities", params={"model": "nope"})
    assert answer.status_code == 400
    assert answer.json() == server.post(model="nope").json()
