"""What programs written for the original API send and expect, as its own test files and examples have it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import diffusers_folder
from PIL import Image
from serving import Program, serving

PASTEL = "models--mirroring--pastel-mix"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with the default model of the original, one that has a label, and one for SDXL."""
    home = tmp_path_factory.mktemp("original")
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / "stable-diffusion-v1-5")
    diffusers_folder(models / PASTEL, sample_size=8)
    diffusers_folder(models / "sdxl", pipeline="StableDiffusionXLPipeline", sample_size=16)
    with serving(home, log_prompts=True, max_pixels=1536 * 1536) as program:
        yield program


def png(side: int, colour: tuple[int, int, int] = (128, 128, 128)) -> str:
    """A square of one colour, in bare base64."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def posted(server: Program, path: str, **fields: Any) -> str:
    """The id of a job, taken as the original takes it."""
    answer = server.request("POST", path, json=fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["status"] == "queued"
    assert isinstance(body["seed"], int)
    return str(body["job_id"])


def done(server: Program, path: str, **fields: Any) -> dict[str, Any]:
    status = server.wait(posted(server, path, **fields))
    assert status["status"] == "success"
    with Image.open(io.BytesIO(base64.b64decode(status["image"], validate=True))) as image:
        assert image.size == (status["width"], status["height"])
    return status


CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    # of test_img2img
    "a gradient": (512, {"denoising_strength": 0.75, "steps": 20, "cfg_scale": 7.0, "fileType": "png"}, 512),
    "just resize to a size": (256, {"resize_mode": "just resize", "width": 512, "height": 512}, 512),
    # of test_img2img_fix
    "no mode": (256, {}, 256),
    "just resize": (256, {"resize_mode": "just resize"}, 256),
    "crop and resize": (256, {"resize_mode": "crop and resize"}, 256),
    "resize and fill": (256, {"resize_mode": "resize and fill"}, 256),
    "resize_to": (256, {"resize_to": {"width": 512, "height": 512}}, 512),
    # of test_resize_by
    "resize_by in two": (512, {"resize_by": {"width": 3.0, "height": 3.0}}, 1536),
    "resize_by": (512, {"resize_by": 2.0}, 1024),
    "resized_by in two": (512, {"resized_by": {"width": 2.5, "height": 2.5}}, 1280),
    "resize_by and a half": (512, {"resize_by": 1.5}, 768),
    # of test_img2img_no_loras, test_single_img2img, test_image_preservation
    "no loras": (256, {"loras": [], "width": 512, "height": 512}, 512),
    "twice as large": (512, {"resize_by": {"width": 2.0, "height": 2.0}}, 1024),
    "nearly as it was": (512, {"denoising_strength": 0.05, "steps": 25}, 512),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_becomes_one_of_the_size_that_the_original_tests_expect(server: Program, name: str) -> None:
    side, fields, expected = CASES[name]
    asked = {"prompt": "a landscape", "denoising_strength": 0.5, "steps": 5} | fields
    status = done(server, "/img2img", image=png(side), **asked)
    assert (status["width"], status["height"]) == (expected, expected)
    assert status["generation_time_sec"] >= 0
    assert (status["state"], status["current_phase"], status["progress"], status["error"]) == (
        "done",
        "done",
        100,
        None,
    )


def test_a_picture_as_a_data_url_is_taken(server: Program) -> None:
    image = f"data:image/png;base64,{png(256, (0, 0, 255))}"
    assert done(server, "/img2img", image=image, prompt="blue", steps=3)["payload"]["prompt"] == "blue"


def test_guidance_changes_the_picture(server: Program) -> None:
    asked = {"image": png(64), "prompt": "a tree", "denoising_strength": 0.3, "steps": 5, "seed": 1, "fileType": "png"}
    pictures = {done(server, "/img2img", cfg_scale=cfg, **asked)["image"] for cfg in (2.0, 3.0, 7.0)}
    assert len(pictures) == 3


REFINERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "none": ("sdxl", {}, ""),
    "one": ("sdxl", {"refiner_checkpoint": "sdxl", "refiner_switch_at": 0.8}, ""),
    "one that does not fit": (
        "stable-diffusion-v1-5",
        {"refiner_checkpoint": "sdxl", "refiner_switch_at": 0.8},
        "refiner_checkpoint is ignored",
    ),
}


@pytest.mark.parametrize("name", REFINERS)
def test_a_picture_is_made_with_and_without_a_refiner(server: Program, name: str) -> None:
    model, fields, warning = REFINERS[name]
    status = done(server, "/img2img", image=png(64), prompt="a tree", model=model, steps=5, **fields)
    assert [text.partition(":")[0] for text in status.get("warnings", [])] == ([warning] if warning else [])


MODELS = {"stable-diffusion-v1-5": "standard", PASTEL: "standard", "sdxl": "sdxl"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_either_type_draws_from_words_and_from_a_picture(server: Program, name: str) -> None:
    """Of test_img2img_refactor, whose table has the pipeline for each type and kind of job."""
    (row,) = (row for row in server.get("/models").json()["models"] if row["name"] == name)
    assert row["type"] == MODELS[name]
    for path, fields in (("/txt2img", {"width": 64, "height": 64}), ("/img2img", {"image": png(64)})):
        status = done(server, path, prompt="a tree", model=name, steps=2, **fields)
        assert (status["width"], status["height"]) == (64, 64)


def test_what_is_missing_is_told_in_the_words_of_the_original(server: Program) -> None:
    for fields, words in (
        ({}, "Image field is required"),
        ({"image": "", "prompt": ""}, "Image field is required"),
        ({"image": png(64)}, "Prompt field is required"),
        ({"image": png(64), "prompt": ""}, "Prompt field is required"),
    ):
        answer = server.request("POST", "/img2img", json=fields)
        assert (answer.status_code, answer.json()["detail"]) == (400, words)
    answer = server.get("/queue/unknown")
    assert (answer.status_code, answer.json()["detail"]) == (404, "Job unknown not found")


@pytest.mark.parametrize("written", ["Pastel Mix", "pastel_mix", "PASTEL-MIX", PASTEL])
def test_a_label_is_heard_however_it_is_written(server: Program, written: str) -> None:
    status = done(server, "/txt2img", prompt="x", model=written, steps=1, seed=-1, fileType="jpg")
    assert status["payload"]["model"] == written
    assert (status["width"], status["height"]) == (64, 64)
    assert isinstance(status["seed"], int)
    assert status["seed"] >= 0
    assert status["output_path"].endswith(".jpg")


def test_the_labels_are_seven_in_order(server: Program) -> None:
    labels = [model["label"] for model in server.get("/models/aliases").json()["models"]]
    assert len(labels) == 7
    assert labels == sorted(labels)


def test_missing_loras_are_skipped_however_they_are_written(server: Program) -> None:
    status = done(server, "/txt2img", prompt="x", steps=1, model=PASTEL, loras=["one", {"name": "two", "scale": 0.8}])
    assert [text.partition(":")[0] for text in status["warnings"]] == [
        "LoRA 'one' was skipped",
        "LoRA 'two' was skipped",
    ]


def test_no_picture_is_in_the_log_or_in_the_record(server: Program) -> None:
    image = f"data:image/png;base64,{png(128, (1, 2, 3))}"
    words = "a prompt that shows"
    for path, fields in (("/img2img", {"image": image}), ("/txt2img", {"reference_image": image})):
        job_id = posted(server, path, prompt=words, model=PASTEL, steps=2, **fields)
        server.wait(job_id)
        (record,) = Path(server.home / "queue" / "done").rglob(f"*{job_id}*.json")
        (field,) = fields
        assert f'"{field}":"[BASE64_IMAGE_DATA_{len(image)}_chars]"' in record.read_text()
        assert words in record.read_text()
    assert words in server.log
    assert not re.search(r"[A-Za-z0-9+/]{120}", server.log)


def test_a_job_is_polled_as_some_of_the_originals_programs_do(stub_server: Program) -> None:
    """Of test_img2img_refiner: it asks ``/status/{id}`` until that is "completed" or "error"."""
    job_id = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=10, fileType="png")
    seen = [polled(stub_server, job_id)]
    while seen[-1]["status"] not in ("completed", "error"):
        seen.append(polled(stub_server, job_id))
    assert [each["progress"] for each in seen] == sorted(each["progress"] for each in seen)
    assert seen[-1] == {
        "job_id": job_id, "status": "completed", "progress": 1.0, "phase": "done", "output": f"outputs/{job_id}.png",
        "detail": None,
    }  # fmt: skip
    failed = stub_server.submit(prompt="stub:fail=no", model="small")
    stub_server.wait(failed, "error")
    assert polled(stub_server, failed)["status"] == "error"
    assert polled(stub_server, failed)["detail"]
    assert stub_server.get("/status/nobody").status_code == 404


def polled(server: Program, job_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = server.get(f"/status/{job_id}").json()
    return answer
