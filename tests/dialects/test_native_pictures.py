"""Jobs that bring pictures along: what they become, how large, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_models import diffusers_folder
from PIL import Image
from serving import Program, eventually, serving

from diffusion_api.blobs import name_of
from diffusion_api.schema.job import loads


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def grey(width: int = 64, height: int = 64, level: int = 128) -> str:
    """A picture of one grey, in base64."""
    return b64(file_of(Image.new("RGB", (width, height), (level,) * 3)))


def ask(server: Program, path: str, **fields: Any) -> httpx.Response:
    return server.request("POST", path, json={"prompt": "a lighthouse", "model": "small", "steps": 2} | fields)


def told(server: Program, path: str, **fields: Any) -> dict[str, Any]:
    """The answer to a job that must be taken."""
    answer = ask(server, path, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def result(server: Program, path: str, **fields: Any) -> dict[str, Any]:
    return server.wait(told(server, path, **fields)["job_id"])


def refused(server: Program, path: str, status: int = 400, **fields: Any) -> str:
    """What is refused, and that it was not stored."""
    before = {path.name for path in (server.home / "queue" / "inputs").iterdir()}
    answer = ask(server, path, **fields)
    assert answer.status_code == status, answer.text
    assert {path.name for path in (server.home / "queue" / "inputs").iterdir()} == before
    message: str = answer.json()["detail"]
    assert answer.json() == {"status": "error", "detail": message, "error": message}
    return message


def size_of(status: dict[str, Any]) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(status["image"]))) as image:
        assert image.size == (status["width"], status["height"])
        return image.size


# What a job with a picture becomes


@pytest.mark.parametrize("spelling", ["{}", "data:image/png;base64,{}", " {}\n", "DATA:image/PNG;base64,{}"])
def test_a_picture_becomes_a_job(stub_server: Program, spelling: str) -> None:
    status = result(stub_server, "/img2img", image=spelling.format(grey()), seed=7, denoising_strength=0.5)
    assert size_of(status) == (64, 64)
    assert status["payload"]["image"] == f"[BASE64_IMAGE_DATA_{len(spelling.format(grey()))}_chars]"
    assert (status["denoising_strength"], status["resize_mode"], status["seed"]) == (0.5, "just resize", 7)


def test_the_picture_lies_beside_the_job_once_and_not_in_it(stub_server: Program) -> None:
    data = file_of(Image.effect_noise((64, 64), 50))
    ids = [result(stub_server, "/img2img", image=b64(data), seed=seed)["job_id"] for seed in (1, 2)]
    assert (stub_server.home / "queue" / "inputs" / name_of(data)).read_bytes() == data
    for job_id in ids:
        record = (stub_server.home / "queue" / "done" / f"{job_id}.json").read_bytes()
        assert loads(record).request.inputs == (name_of(data),)
        assert b64(data)[:60] not in record.decode()
    assert b64(data)[:60] not in stub_server.log


def test_not_even_a_tiny_picture_is_in_the_record(stub_server: Program) -> None:
    tiny = b64(file_of(Image.new("L", (8, 8)), "GIF"))
    assert len(tiny) < 100
    status = result(stub_server, "/img2img", image=tiny)
    assert status["payload"]["image"] == f"[BASE64_IMAGE_DATA_{len(tiny)}_chars]"


def test_every_kind_of_picture_is_taken(stub_server: Program) -> None:
    image = Image.new("RGB", (72, 64), "red")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "AVIF"):
        assert size_of(result(stub_server, "/img2img", image=b64(file_of(image, kind)))) == (72, 64), kind
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        picture = b64(file_of(Image.new(mode, (72, 64))))
        assert size_of(result(stub_server, "/img2img", image=picture)) == (72, 64), mode


def test_a_picture_that_lies_on_its_side_is_taken_upright(stub_server: Program) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = b64(file_of(Image.new("RGB", (96, 64)), "JPEG", exif=exif))
    assert size_of(result(stub_server, "/img2img", image=photo)) == (64, 96)


SIZES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "none at all": ({}, (96, 64)),
    "a mode alone": ({"resize_mode": "crop and resize"}, (96, 64)),
    "width and height": ({"width": 128, "height": 128}, (128, 128)),
    "a width": ({"width": 192}, (192, 128)),
    "a height": ({"height": "32"}, (48, 32)),
    "resize_to": ({"resize_to": {"width": 128, "height": 72}}, (128, 72)),
    "one side of resize_to": ({"resize_to": {"width": 48}}, (48, 32)),
    "resize_by": ({"resize_by": 2}, (192, 128)),
    "resize_by in words": ({"resize_by": "1.5"}, (144, 96)),
    "resize_by for each side": ({"resize_by": {"width": 2, "height": 3}}, (192, 192)),
    "resize_by for one side": ({"resize_by": {"height": 2}}, (96, 128)),
    "resized_by": ({"resized_by": {"width": 2.5, "height": 2.5}}, (240, 160)),
    "all of them": (
        {"resize_to": {"width": 64, "height": 64}, "resize_by": 2, "width": 128, "height": 128},
        (64, 64),
    ),
    "resize_by and a size": ({"resize_by": 2, "width": 128, "height": 128}, (192, 128)),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_what_was_asked_for_or_that_of_the_picture(stub_server: Program, name: str) -> None:
    fields, expected = SIZES[name]
    answer = told(stub_server, "/img2img", image=grey(96, 64), **fields)
    assert answer["warnings"] == []
    assert size_of(stub_server.wait(answer["job_id"])) == expected


def test_a_size_that_no_model_makes_is_rounded_and_told(stub_server: Program) -> None:
    answer = told(stub_server, "/img2img", image=grey(70, 65))
    assert answer["warnings"] == [
        "image's width 70 was rounded to 72, a multiple of 8",
        "image's height 65 was rounded to 64, a multiple of 8",
    ]
    assert size_of(stub_server.wait(answer["job_id"])) == (72, 64)


REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "what is left out": ({}, {"strength": 0.75, "resize_mode": "just resize", "noise_multiplier": 1.0, "mask": None}),
    "other names": ({"strength": "0.3"}, {"strength": 0.3}),
    "a number for a mode": ({"resize_mode": 2}, {"resize_mode": "resize and fill"}),
    "a mode": ({"resize_mode": "Latent", "initial_noise_multiplier": 1.1}, {"resize_mode": "latent", "noise_multiplier": 1.1}),
    "many": ({"n": 3, "sampler_name": "Euler a", "clip_skip": 2}, {"count": 3, "sampler": "euler_a", "clip_skip": 2}),
    "tiling": ({"tiling": True, "preview_every": 5}, {"tiling": True, "preview_every": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_body_means_what_it_says(stub_server: Program, name: str) -> None:
    fields, expected = REQUESTS[name]
    job_id = result(stub_server, "/img2img", image=grey(), **fields)["job_id"]
    record = loads((stub_server.home / "queue" / "done" / f"{job_id}.json").read_bytes())
    assert expected.items() <= record.request.model_dump().items()


MASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "what is left out": (
        {},
        {"blur": 4.0, "invert": False, "fill": "fill", "only_masked": False, "padding": 32},
    ),
    "all of it": (
        {"mask_blur": 0, "mask_invert": True, "mask_fill": "Latent noise", "only_masked": True, "mask_padding": 8},
        {"blur": 0.0, "invert": True, "fill": "latent noise", "only_masked": True, "padding": 8},
    ),
    "as A1111 has it": (
        {"inpainting_mask_invert": 1, "inpainting_fill": 3, "inpaint_full_res": True, "inpaint_full_res_padding": 16},
        {"invert": True, "fill": "latent nothing", "only_masked": True, "padding": 16},
    ),
}


@pytest.mark.parametrize("path", ["/inpaint", "/img2img"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_means_what_it_says(stub_server: Program, name: str, path: str) -> None:
    fields, expected = MASKS[name]
    mask = grey(level=255)
    job_id = result(stub_server, path, image=grey(), mask=mask, **fields)["job_id"]
    record = loads((stub_server.home / "queue" / "done" / f"{job_id}.json").read_bytes())
    assert expected.items() <= record.request.model_dump()["mask"].items()
    assert record.request.inputs == (name_of(base64.b64decode(grey())), name_of(base64.b64decode(mask)))
    assert record.payload["mask"] == f"[BASE64_IMAGE_DATA_{len(mask)}_chars]"


LORAS = {"loras": ["style"], "prompt": "a lighthouse <lora:style:0.5>"}


@pytest.mark.parametrize(
    ("path", "fields", "applied"),
    [
        ("/img2img", {}, 0),
        ("/img2img", {"apply_loras": False}, 0),
        ("/img2img", {"apply_loras": True}, 1),
        ("/inpaint", {"mask": grey()}, 1),
    ],
)
def test_loras_beside_the_prompt_are_ignored_on_img2img_alone(
    stub_server: Program, path: str, fields: dict[str, Any], applied: int
) -> None:
    answer = told(stub_server, path, image=grey(), **LORAS, **fields)
    status = stub_server.wait(answer["job_id"])
    record = loads((stub_server.home / "queue" / "done" / f"{answer['job_id']}.json").read_bytes())
    assert len(record.request.model_dump()["loras"]) == applied
    assert "<lora:style:0.5>" in record.request.prompts[0]
    assert any("loras is ignored on /img2img" in text for text in answer["warnings"]) is not bool(applied)
    assert status["payload"]["loras"] == ["style"]


UPSCALED: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "what is left out": ({}, (96, 64)),
    "a factor": ({"scale": "1.5", "upscaler": "nearest"}, (72, 48)),
    "a size": ({"width": 50, "height": 77}, (50, 77)),
    "a side": ({"height": 64, "scale": 4}, (96, 64)),
    "as A1111 has it": ({"upscaling_resize": 3, "upscaler_1": "None"}, (144, 96)),
}


@pytest.mark.parametrize("name", UPSCALED)
def test_a_picture_is_upscaled_by_a_factor_or_to_a_size(stub_server: Program, name: str) -> None:
    fields, expected = UPSCALED[name]
    answer = stub_server.request("POST", "/upscale", json={"image": grey(48, 32)} | fields)
    assert (answer.status_code, answer.json().get("seed", "none")) == (200, None), answer.text
    assert answer.json()["warnings"] == []
    status = stub_server.wait(answer.json()["job_id"])
    assert size_of(status) == expected
    assert status["seed"] is None


@pytest.mark.parametrize("path", ["/img2img", "/inpaint", "/upscale"])
def test_a_dry_run_says_what_the_job_would_be_and_stores_nothing(stub_server: Program, path: str) -> None:
    picture = b64(file_of(Image.new("RGB", (40, 24), "teal")))
    answer = told(stub_server, path, image=picture, mask=picture, dry_run=True, denoising_strength=0.5, steps=10)
    assert answer["dry_run"] is True
    if path == "/upscale":
        assert (answer["upscaler"], answer["width"], answer["height"]) == ("Lanczos", 80, 48)
    else:
        (one,) = answer["passes"]
        assert (one["width"], one["height"], one["steps"]) == (40, 24, 6)
    assert not (stub_server.home / "queue" / "inputs" / name_of(base64.b64decode(picture))).exists()


def test_a_job_that_is_sent_again_is_one_job(stub_server: Program) -> None:
    bodies = [{"image": grey(level=level), "prompt": "a lighthouse", "model": "small", "steps": 2} for level in (1, 2)]
    for path in ("/img2img", "/upscale"):
        key = {"Idempotency-Key": f"picture {path}".replace(" ", "-")}
        first, again = (stub_server.request("POST", path, json=bodies[0], headers=key) for _ in range(2))
        assert first.json()["job_id"] == again.json()["job_id"], first.text
        other = stub_server.request("POST", path, json=bodies[1], headers=key)
        assert other.status_code == 422


# What is refused


PAGE = b"<!DOCTYPE html><html><body>Not found</body></html>"
NO_PICTURES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "Image field is required"),
    "an empty text": ("", "Image field is required"),
    "no base64": ("not base64!", "image is 'not base64!': neither base64 nor a data URL"),
    "a URL": ("https://example.org/cat.png", "image is a URL, and the operator of this service allows no hosts"),
    "a page": (PAGE.decode(), "image is '<!DOCTYPE html><html><body>Not found<...': neither base64 nor a data URL"),
    "a page in base64": (
        b64(PAGE),
        "image: not a picture that can be read: it begins with b'<!DOCTYPE html><htm'; send PNG",
    ),
    "a page as a picture": (f"data:image/png;base64,{b64(PAGE)}", "image: not a picture"),
    "a data URL without base64": ("data:image/png,abc", "image: a data URL must be"),
    "nothing in base64": ("data:image/png;base64,", "image: there is no picture in it"),
    "a picture cut short": (b64(file_of(Image.effect_noise((64, 64), 50))[:2000]), "image: the PNG picture is damaged"),
    "a list": ([grey()], "image is "),
    "a number": (7, "image is 7"),
    "too small a picture": (grey(3, 3), "image's width is 3; it may be 8 to 65536"),
}


@pytest.mark.parametrize("path", ["/img2img", "/inpaint", "/upscale"])
@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused(stub_server: Program, name: str, path: str) -> None:
    value, reason = NO_PICTURES[name]
    if name == "too small a picture" and path == "/upscale":
        return
    message = refused(stub_server, path, image=value, mask=grey(3, 3) if "small" in name else grey())
    assert reason in message
    assert len(message) < 500


@pytest.mark.parametrize("side", [8000, 40_000])
def test_a_picture_too_large_is_refused_before_it_is_decoded(stub_server: Program, side: int) -> None:
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    bomb = b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 100) + b"IDAT"
    message = refused(stub_server, "/img2img", 413, image=b64(bomb))
    assert message.startswith("image: the picture has ")
    assert side > 8000 or "8000x8000 pixels; at most 33554432" in message


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompt": ("/img2img", {"image": grey(), "prompt": ""}, "Prompt field is required"),
    "no mask": ("/inpaint", {"image": grey()}, "Mask field is required"),
    "a mask that is none": ("/inpaint", {"image": grey(), "mask": "x!"}, "mask is 'x!': neither base64"),
    "a mask of another size": (
        "/inpaint",
        {"image": grey(), "mask": grey(32, 64)},
        "mask has 32x64 pixels and image 64x64: they must have the same size",
    ),
    "a strength": ("/img2img", {"image": grey(), "denoising_strength": 1.5}, "denoising_strength is 1.5"),
    "a strength by its other name": ("/img2img", {"image": grey(), "strength": -1}, "strength is -1"),
    "a mode": ("/img2img", {"image": grey(), "resize_mode": "stretch"}, "resize_mode is 'stretch': Input should be 'just"),
    "a fill": ("/inpaint", {"image": grey(), "mask": grey(), "mask_fill": 4}, "mask_fill is 4: Input should be 'fill'"),
    "a factor": ("/img2img", {"image": grey(), "resize_by": 0}, "resize_by is 0"),
    "a size": ("/img2img", {"image": grey(), "resize_to": {"width": -8}}, "resize_to.width is -8; it may be 8 to 65536"),
    "too many pixels": ("/img2img", {"image": grey(512, 512), "resize_by": 16}, "at most 4194304 are allowed"),
    "a latent upscaler": ("/upscale", {"image": grey(), "upscaler": "Latent"}, "upscaler is 'Latent', which enlarges what"),
    "an unknown upscaler": (
        "/upscale",
        {"image": grey(), "upscaler": "x"},
        "upscaler 'x' is not installed (External upscaler model not found); one of Lanczos, Nearest,",
    ),
    "a webhook": ("/img2img", {"image": grey(level=9), "webhook": "https://example.org"}, "webhook is refused"),
    "too large an upscaling": ("/upscale", {"image": grey(512, 512), "width": 60000}, "pixels; at most"),
    "a side of nothing": ("/upscale", {"image": grey(), "width": -1}, "width would be -1 pixels; it may be 1 to 65536"),
    "a side beyond all codecs": ("/upscale", {"image": grey(), "width": 70000, "height": 1}, "width would be 70000"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_request_is_refused_with_field_and_value(stub_server: Program, name: str) -> None:
    path, fields, reason = REFUSED[name]
    assert reason in refused(stub_server, path, **fields)


def test_what_has_no_effect_is_told(stub_server: Program) -> None:
    (warning,) = told(stub_server, "/img2img", image=grey(), image_guidance_scale=1.8)["warnings"]
    assert warning.startswith("image_guidance_scale has no effect")


def test_a_field_that_is_not_known_is_told_with_the_nearest_one(stub_server: Program) -> None:
    assert told(stub_server, "/inpaint", image=grey(), mask=grey(), mask_blurr=3)["warnings"] == [
        "unknown field 'mask_blurr' was ignored; did you mean 'mask_blur'?"
    ]
    assert told(stub_server, "/upscale", image=grey(), scales=3)["warnings"][-1] == (
        "unknown field 'scales' was ignored; did you mean 'scale'?"
    )


# What happens to the stored picture


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


def test_a_picture_outlives_a_kill_and_one_that_is_lost_fails_its_own_job(home: Path) -> None:
    with serving(home, "--no-worker") as server:
        whole, lost, damaged = (told(server, "/img2img", image=grey(level=level))["job_id"] for level in (1, 2, 3))
        server.kill()
    inputs = {level: home / "queue" / "inputs" / name_of(base64.b64decode(grey(level=level))) for level in (1, 2, 3)}
    inputs[2].unlink()
    inputs[3].write_bytes(b"")
    os.sync()
    with serving(home) as server:
        assert size_of(server.wait(whole)) == (64, 64)
        for job_id, why in ((lost, "is gone"), (damaged, "was damaged on the disk")):
            status = server.wait(job_id, "error")
            assert re.fullmatch(
                rf"the picture \w+ that the job brought along {why}: send the job again with it", status["error"]
            )
        again = told(server, "/img2img", image=grey(level=3))["job_id"]
        assert server.wait(again)["state"] == "done"
        eventually(lambda: json.loads((home / "queue" / "done" / f"{again}.json").read_text())["attempts"] == 1)
