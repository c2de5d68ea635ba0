"""What pictures say of themselves, over HTTP: file types, what is read from a picture, and pictures made again."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_models import diffusers_folder
from numpy.typing import NDArray
from serving import Program, serving

from diffusion_api import images, infotext

FILE_TYPES = ["jpg", "png", "webp", "avif", "gif"]
PROMPT = 'a „lighthouse“ 🦀, "quoted": yes\n中文, <b>'


def data_of(status: dict[str, Any]) -> bytes:
    return base64.b64decode(status["image"])


def pixels_of(status: dict[str, Any]) -> NDArray[np.uint8]:
    return np.asarray(images.decode(data_of(status), max_pixels=2**20).convert("RGB"))


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_says_what_was_asked_whatever_the_letters(stub_server: Program, file_type: str) -> None:
    status = stub_server.result(
        prompt=PROMPT, negative_prompt="fog", model="small", steps=1, seed=7, fileType=file_type
    )
    parameters = infotext.parse(images.read_infotext(data_of(status)) or "")
    assert (parameters.prompt, parameters.negative_prompt, parameters.fields["Seed"]) == (PROMPT, "fog", 7)


def test_a_lossless_webp_has_the_pixels_of_a_png(stub_server: Program) -> None:
    asked: dict[str, Any] = {"model": "small", "steps": 1, "seed": 7}
    png, webp, lossy = (
        stub_server.result(**asked, **how)
        for how in ({"fileType": "png"}, {"fileType": "webp", "lossless": True}, {"fileType": "webp", "quality": 30})
    )
    assert np.array_equal(pixels_of(png), pixels_of(webp))
    assert not np.array_equal(pixels_of(png), pixels_of(lossy))
    assert (webp["jpeg_quality"], lossy["jpeg_quality"]) == (None, 30)
    assert len(data_of(lossy)) < len(data_of(webp))


# What is read from a picture


def picture(text: str | None = None, format: images.Format = "png") -> str:
    data = images.encode(np.zeros((48, 64, 3), np.uint8), format=format, quality=85, infotext=text)
    return base64.b64encode(data).decode()


WEBUI = """a "castle", (stone:1.2)
on a hill
Negative prompt: fog,
rain
Steps: 30, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 123456789, Size: 512x768, Model hash: 0123456789, \
Model: dream, Lora hashes: "epic: 0123456789ab", LoRAs: "anime_style:0.8, detail_enhancer:0.6", Version: v1.10.1"""


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "avif", "gif"])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_what_a_picture_says_is_told_raw_and_taken_apart(
    stub_server: Program, format: images.Format, head: str
) -> None:
    answer = stub_server.request("POST", "/img-info", json={"image": head + picture(WEBUI, format)})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["status"], body["info"], body["items"]) == ("success", WEBUI, {})
    assert (body["format"], body["width"], body["height"]) == (format, 64, 48)
    assert body["parameters"] == {
        "prompt": 'a "castle", (stone:1.2)\non a hill',
        "negative_prompt": "fog,\nrain",
        "Steps": 30,
        "Sampler": "Euler a",
        "Schedule type": "Karras",
        "CFG scale": 7.5,
        "Seed": 123456789,
        "Size": "512x768",
        "Model hash": "0123456789",
        "Model": "dream",
        "Lora hashes": "epic: 0123456789ab",
        "LoRAs": "anime_style:0.8, detail_enhancer:0.6",
        "Version": "v1.10.1",
    }


def test_a_picture_that_says_nothing_is_no_error(stub_server: Program) -> None:
    body = stub_server.request("POST", "/img-info", json={"image": picture()}).json()
    assert (body["status"], body["info"], body["items"], body["parameters"]) == ("success", "", {}, {})


def test_a_picture_of_ours_says_what_was_asked(stub_server: Program) -> None:
    status = stub_server.result(prompt=PROMPT, model="small", steps=1, seed=7, fileType="avif")
    body = stub_server.request("POST", "/img-info", json={"image": status["image"]}).json()
    assert (body["parameters"]["prompt"], body["parameters"]["Seed"], body["format"]) == (PROMPT, 7, "avif")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "No image data provided"),
        ({"image": None}, "No image data provided"),
        ({"image": " "}, "No image data provided"),
        ({"image": "invalid_base64_data"}, "Invalid base64 image data: image"),
        ({"image": "data:image/png,abc"}, "Invalid base64 image data: image"),
        ({"image": "AAAA"}, "Failed to load image: not a picture that can be read: it begins with"),
        ({"image": "iVBORw0KGgo="}, "Failed to load image"),
        ({"image": 5}, "image is 5"),
    ],
)
def test_what_is_no_picture_is_refused(stub_server: Program, fields: dict[str, Any], said: str) -> None:
    answer = stub_server.request("POST", "/img-info", json=fields)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(said)
    assert answer.json()["error"] == answer.json()["detail"]


# Pictures made again


def test_a_picture_that_is_posted_makes_the_same_one(stub_server: Program) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "model": "small", "steps": 3, "n": 2, "seed": 7, "rng": "cpu"}
    first = stub_server.result(**asked, fileType="webp", lossless=True)
    second = stub_server.result(image=f"data:image/webp;base64,{first['images'][1]}", fileType="png")
    assert np.array_equal(pixels_of(second), images.decode(base64.b64decode(first["images"][1]), max_pixels=2**20))
    assert second["payload"] == {
        "image": f"[BASE64_IMAGE_DATA_{23 + len(first['images'][1])}_chars]",
        "fileType": "png",
    }


def test_what_the_body_says_goes_before_its_picture(stub_server: Program) -> None:
    first = stub_server.result(prompt=PROMPT, model="small", steps=3, seed=7)
    second = stub_server.result(image=first["image"], seed=8)
    assert (second["seed"], infotext.parse(images.read_infotext(data_of(second)) or "").prompt) == (8, PROMPT)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": picture()}, "image has no infotext in it"),
        ({"image": picture(WEBUI), "infotext": WEBUI}, "image and infotext are both there"),
        ({"image": "AAAA"}, "not a picture that can be read"),
        ({"image": "?"}, "image is '?': neither base64 nor a data URL"),
        ({"image": picture(WEBUI)}, "infotext: model 'dream' is not installed"),
    ],
)
def test_a_picture_that_cannot_be_made_again_is_refused(
    stub_server: Program, fields: dict[str, Any], said: str
) -> None:
    answer = stub_server.post(**fields)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(said)


def reproduced(server: Program, job_id: str) -> dict[str, Any]:
    answer = server.request("POST", f"/queue/{job_id}/reproduce")
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "queued"
    status: dict[str, Any] = server.wait(answer.json()["job_id"])
    return status


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_job_is_made_again_and_says_that_it_matched(stub_server: Program, file_type: str) -> None:
    first = stub_server.result(prompt=PROMPT, model="small", steps=3, n=2, fileType=file_type)
    (stub_server.home / first["output_path"]).unlink()  # what was made is known without it
    again = reproduced(stub_server, first["job_id"])
    assert again["job_id"] != first["job_id"]
    assert again["reproduces"] == {"job_id": first["job_id"], "matched": True, "differences": []}
    assert again["images"] == first["images"]
    assert again["payload"] == first["payload"]
    assert "reproduces" not in first


def test_a_picture_that_came_out_otherwise_is_told_with_what_was_not_the_same(tmp_path: Path) -> None:
    home = tmp_path / "home"
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home) as server:
        first = server.result(prompt=PROMPT, steps=3)
        (record,) = (home / "queue" / "done").glob("*.json")
        told = json.loads(record.read_text())
        told["result"]["made_with"] |= {"device": "NVIDIA A1", "torch": "1.0"}
        told["result"]["images"][0] |= {
            "pixels": "0" * 64,
            "infotext": told["result"]["images"][0]["infotext"].replace(
                "Model: small", "Model hash: 0123456789, Model: small"
            ),
        }
        record.write_text(json.dumps(told))
        again = reproduced(server, first["job_id"])
    assert again["reproduces"]["matched"] is False
    assert again["reproduces"]["differences"] == [
        "device: NVIDIA A1 before, stub now",
        "torch: 1.0 before, nothing now",
        "Model hash: 0123456789 before, nothing now",
    ]


def test_whether_it_matched_is_not_known_before_the_end(stub_server: Program) -> None:
    first = stub_server.result(prompt="stub:seconds=0.05", model="small", steps=20)
    answer = stub_server.request("POST", f"/queue/{first['job_id']}/reproduce").json()
    running = stub_server.status(answer["job_id"])
    assert running["state"] != "done"
    assert running["reproduces"] == {"job_id": first["job_id"], "matched": None, "differences": []}
    assert stub_server.wait(answer["job_id"])["reproduces"]["matched"] is True


def test_a_job_that_is_not_done_cannot_be_made_again(stub_server: Program) -> None:
    failed = stub_server.submit(prompt="stub:fail", model="small", steps=2)
    stub_server.wait(failed, "error")
    answer = stub_server.request("POST", f"/queue/{failed}/reproduce")
    assert (answer.status_code, answer.json()["detail"]) == (
        409,
        f"job {failed} has no whole picture that could be made again: its state is error",
    )
    unknown = stub_server.request("POST", "/queue/242d6f93-ea2d-4d5e-b820-0b61468558be/reproduce")
    assert unknown.status_code == 404


def test_a_reproduction_that_is_asked_for_twice_with_one_key_is_one(stub_server: Program) -> None:
    first = stub_server.result(prompt=PROMPT, model="small", steps=1)
    path, headers = f"/queue/{first['job_id']}/reproduce", {"Idempotency-Key": first["job_id"]}
    once, twice = (stub_server.request("POST", path, headers=headers) for _ in range(2))
    assert once.json()["job_id"] == twice.json()["job_id"]
    assert ("Idempotency-Replayed" in once.headers, "Idempotency-Replayed" in twice.headers) == (False, True)


def test_a_picture_from_a_picture_is_made_again_with_what_it_brought_along(stub_server: Program) -> None:
    body = {"prompt": PROMPT, "image": picture(), "model": "small", "steps": 2}
    first = stub_server.request("POST", "/img2img", json=body).json()
    stub_server.wait(first["job_id"])
    assert reproduced(stub_server, first["job_id"])["reproduces"]["matched"] is True
