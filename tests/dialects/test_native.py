"""The project's own API over HTTP, with the engine that needs no model."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_models import LORA_KEYS, checkpoint, diffusers_folder, transformer_folder
from PIL import Image
from serving import Program, eventually, serving

from diffusion_api import images, infotext
from diffusion_api.schema.job import loads

STATUS_KEYS = {"status", "job_id", "progress", "current_phase", "state", "error"}
FINISHED_KEYS = {
    *("payload", "image", "image_url", "output_path", "width", "height", "file_type", "jpeg_quality"),
    *("generation_time_sec", "memory_before_mb", "memory_after_mb", "seed", "safety"),
}


def picture(encoded: str) -> Image.Image:
    return images.decode(base64.b64decode(encoded), max_pixels=2**24)


def said(encoded: str) -> infotext.Parameters:
    text = images.read_infotext(base64.b64decode(encoded))
    assert text
    return infotext.parse(text)


def active_jobs(server: Program) -> int:
    count: int = server.get("/health").json()["queue"]["active_jobs"]
    return count


def records(server: Program) -> set[str]:
    return {path.name for path in (server.home / "queue").rglob("*.json")}


def refused(server: Program, fields: Any, status: int = 400) -> str:
    """What a body is refused with, after a check that the refusal has its shape and that nothing was stored."""
    eventually(lambda: active_jobs(server) == 0, "all jobs to end")
    before = records(server)
    answer = server.request(
        "POST", "/txt2img", content=json.dumps(fields), headers={"Content-Type": "application/json"}
    )
    assert records(server) == before
    return refusal(answer, status)


def refusal(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body == {"status": "error", "detail": body["detail"], "error": body["detail"]}
    message: str = body["detail"]
    return message


# A job's life


def test_a_prompt_becomes_a_job(stub_server: Program) -> None:
    answer = stub_server.post(prompt="a lighthouse")
    assert answer.status_code == 200
    body = answer.json()
    assert uuid.UUID(body["job_id"]).version == 4
    assert body["status"] == "queued"
    assert 0 <= body["seed"] < 2**32
    assert body["warnings"] == []


def test_a_done_job_has_every_field_of_the_contract(stub_server: Program) -> None:
    status = stub_server.result(prompt="a lighthouse", negative_prompt="fog", model="small", seed=5)
    assert status.keys() == STATUS_KEYS | FINISHED_KEYS
    assert status["status"] == "success"
    assert (status["state"], status["current_phase"], status["progress"]) == ("done", "done", 100)
    assert status["error"] is None
    assert status["payload"] == {"prompt": "a lighthouse", "negative_prompt": "fog", "model": "small", "seed": 5}
    assert (status["width"], status["height"], status["seed"]) == (64, 64, 5)
    assert (status["file_type"], status["jpeg_quality"]) == ("jpg", 85)
    assert status["output_path"] == f"outputs/{status['job_id']}.jpg"
    for key in ("generation_time_sec", "memory_before_mb", "memory_after_mb"):
        assert isinstance(status[key], float)
        assert status[key] >= 0
    decoded = picture(status["image"])
    assert decoded.size == (64, 64)
    assert base64.b64decode(status["image"]) == (stub_server.home / status["output_path"]).read_bytes()


def test_what_is_left_out_is_what_the_readmes_say(stub_server: Program) -> None:
    status = stub_server.result(prompt="a lighthouse")
    fields = said(status["image"]).fields
    assert (fields["Steps"], fields["CFG scale"], fields["Size"]) == (30, 7, "512x512")
    assert (fields["Sampler"], fields["Schedule type"]) == ("DPM++ 2M", "Karras")
    assert fields["Model"] == "stable-diffusion-v1-5"
    assert (status["width"], status["height"]) == (512, 512)
    with Image.open(io.BytesIO(base64.b64decode(status["image"]))) as image:
        assert image.format == "JPEG"


def test_the_picture_says_what_was_asked(stub_server: Program) -> None:
    status = stub_server.result(
        prompt="a lighthouse, at night",
        negative_prompt="fog: thick",
        steps=5,
        cfg_scale=5.5,
        width=72,
        height=64,
        model="small",
        sampler_name="Euler a",
        scheduler_type="default",
        seed=123,
        fileType="png",
    )
    parameters = said(status["image"])
    assert parameters.prompt == "a lighthouse, at night"
    assert parameters.negative_prompt == "fog: thick"
    assert parameters.fields["Version"] == "DiffusionAPI v" + stub_server.get("/health").json()["version"]
    expected = {
        "Steps": 5,
        "Sampler": "Euler a",
        "Schedule type": "Uniform",
        "CFG scale": 5.5,
        "Seed": 123,
        "Size": "72x64",
        "Model": "small",
    }
    assert expected.items() <= parameters.fields.items()


def test_a_size_that_is_left_out_is_the_models_own(stub_server: Program) -> None:
    status = stub_server.result(model="small", width=128)
    assert (status["width"], status["height"]) == (128, 64)


@pytest.mark.parametrize(("asked", "made"), [(60, 64), (67, 64), (68, 72), (71, 72), (8, 8), (11, 8), (12, 16)])
def test_sizes_are_rounded_half_up_to_eights(stub_server: Program, asked: int, made: int) -> None:
    answer = stub_server.post(model="small", width=asked, steps=1).json()
    note = [f"width {asked} was rounded to {made}, a multiple of 8"] if asked != made else []
    assert answer["warnings"] == note
    status = stub_server.wait(answer["job_id"])
    assert status["width"] == made
    assert status.get("warnings", []) == note
    assert picture(status["image"]).size == (made, 64)


@pytest.mark.parametrize("fields", [{}, {"seed": None}, {"seed": -1}, {"seed": "-1"}])
def test_a_seed_that_was_not_chosen_is_drawn(stub_server: Program, fields: dict[str, Any]) -> None:
    seeds = [stub_server.post(model="small", steps=1, **fields).json()["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 42, "42", 2**32 - 1])
def test_a_chosen_seed_is_used(stub_server: Program, seed: int | str) -> None:
    answer = stub_server.post(model="small", steps=1, seed=seed).json()
    status = stub_server.wait(answer["job_id"])
    assert answer["seed"] == status["seed"] == said(status["image"]).fields["Seed"] == int(seed)


def test_numbers_may_come_as_text(stub_server: Program) -> None:
    status = stub_server.result(
        model="small", steps="3", cfg_scale="6.5", width="72", height="80", n="1", jpeg_quality="90"
    )
    fields = said(status["image"]).fields
    assert (fields["Steps"], fields["CFG scale"], fields["Size"]) == (3, 6.5, "72x80")
    assert status["jpeg_quality"] == 90


@pytest.mark.parametrize(
    ("asked", "file_type", "kind"),
    [
        ("jpg", "jpg", "JPEG"),
        ("JPG", "jpg", "JPEG"),
        ("Jpeg", "jpg", "JPEG"),
        ("png", "png", "PNG"),
        ("PnG", "png", "PNG"),
        ("webp", "webp", "WEBP"),
        ("avif", "avif", "AVIF"),
        ("GIF", "gif", "GIF"),
    ],
)
def test_files_are_of_the_type_that_was_asked_for(stub_server: Program, asked: str, file_type: str, kind: str) -> None:
    status = stub_server.result(model="small", steps=1, fileType=asked)
    assert status["file_type"] == file_type
    assert status["jpeg_quality"] == (85 if file_type in ("jpg", "webp", "avif") else None)
    assert status["output_path"].endswith(f".{file_type}")
    assert status["payload"]["fileType"] == asked
    with Image.open(io.BytesIO(base64.b64decode(status["image"]))) as image:
        assert image.format == kind


def test_jpeg_quality_is_heeded(stub_server: Program) -> None:
    small, large = (len(stub_server.result(model="small", steps=1, seed=1, jpeg_quality=q)["image"]) for q in (10, 95))
    assert small < large


def test_n_pictures_have_following_seeds(stub_server: Program) -> None:
    status = stub_server.result(model="small", steps=1, n=3, seed=2**32 - 2, fileType="png")
    assert len(status["images"]) == len(status["output_paths"]) == 3
    assert status["image"] == status["images"][0]
    assert status["output_path"] == status["output_paths"][0]
    assert [said(image).fields["Seed"] for image in status["images"]] == [2**32 - 2, 2**32 - 1, 0]
    alone = stub_server.result(model="small", steps=1, seed=2**32 - 1, fileType="png")
    assert picture(alone["image"]).tobytes() == picture(status["images"][1]).tobytes()


def test_the_same_request_makes_the_same_pixels(stub_server: Program) -> None:
    asked: dict[str, Any] = {"prompt": "a", "model": "small", "steps": 2, "seed": 9, "fileType": "png"}
    first, second = (picture(stub_server.result(**asked)["image"]).tobytes() for _ in range(2))
    assert first == second
    assert picture(stub_server.result(**asked | {"seed": 10})["image"]).tobytes() != first


def test_progress_rises_from_queued_to_done(stub_server: Program) -> None:
    blocker = stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=6)
    job_id = stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=12)
    seen = []

    def ended() -> bool:
        seen.append(stub_server.status(job_id))
        return bool(seen[-1]["state"] == "done")

    eventually(ended, "the job to be done")
    states = list(dict.fromkeys(status["state"] for status in seen))
    order = ["queued", "loading", "processing", "done"]
    assert states == [state for state in order if state in states]  # those between two looks are not seen
    assert len(states) > 1
    progress = [status["progress"] for status in seen]
    assert progress == sorted(progress)
    assert progress[0] == 0
    assert progress[-1] == 100
    assert len({p for p in progress if 0 < p < 100}) > 3
    phases = {(status["state"], status["current_phase"]) for status in seen}
    assert phases <= {
        *(("queued", "queued"), ("loading", "loading"), ("processing", "generation"), ("done", "done")),
    }
    assert all(status.keys() - {"position"} == STATUS_KEYS | {"eta_seconds"} for status in seen[:-1])
    assert stub_server.status(blocker)["state"] == "done"


def test_a_waiting_job_tells_its_position(stub_server: Program) -> None:
    eventually(lambda: active_jobs(stub_server) == 0, "all jobs to end")
    ids = [stub_server.submit(prompt="stub:seconds=0.5", model="small", steps=4) for _ in range(4)]

    def waiting() -> list[tuple[str, int]]:
        found = [stub_server.status(job_id) for job_id in ids[2:]]
        return [(status["state"], status["position"]) for status in found]

    eventually(lambda: waiting() == [("queued", 0), ("queued", 1)], "two jobs in hand and two that wait")
    for job_id in ids:
        stub_server.wait(job_id)


def test_who_waits_for_a_job_is_answered_when_it_ends(stub_server: Program) -> None:
    job_id = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=8)
    began = time.monotonic()
    waited = stub_server.get(f"/queue/{job_id}?wait=60")
    assert time.monotonic() - began < 45
    assert waited.status_code == 200
    assert waited.json()["state"] == "done"
    assert waited.json() == stub_server.status(job_id)
    assert waited.json() == stub_server.get(f"/queue/{job_id}?wait=60").json()


def test_who_waits_for_too_short_a_time_gets_the_job_as_it_stands(stub_server: Program) -> None:
    job_id = stub_server.submit(prompt="stub:seconds=0.2", model="small", steps=10)
    began = time.monotonic()
    status = stub_server.get(f"/queue/{job_id}?wait=0.5").json()
    assert time.monotonic() - began >= 0.5
    assert status["state"] in ("queued", "loading", "processing")
    assert status.keys() == stub_server.status(job_id).keys()
    stub_server.wait(job_id)


@pytest.mark.parametrize(
    ("wait", "words"), [("61", "less than or equal to 60"), ("-1", "greater than"), ("nan", "finite"), ("x", "number")]
)
def test_waiting_has_its_limits(stub_server: Program, wait: str, words: str) -> None:
    message = refusal(stub_server.get(f"/queue/x?wait={wait}"), 400)
    assert message.startswith(f"wait is '{wait}'")
    assert words in message


def test_nobody_waits_for_an_unknown_job(stub_server: Program) -> None:
    began = time.monotonic()
    assert refusal(stub_server.get("/queue/x?wait=60"), 404) == "Job x not found"
    assert time.monotonic() - began < 45


def test_five_hundred_wait_at_once_and_take_no_thread_each(stub_server: Program) -> None:
    long = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=150, n=16)
    others = [stub_server.submit(model="small", steps=1) for _ in range(10)]
    asked = [long] * 400 + others * 10
    host, port = stub_server.url.removeprefix("http://").split(":")
    arrived = 0

    async def poll(job_id: str) -> dict[str, Any]:
        nonlocal arrived
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /queue/{job_id}?wait=60 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        arrived += 1
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 200")
        status: dict[str, Any] = json.loads(body)
        return status

    async def poll_all() -> list[dict[str, Any]]:
        polls = [asyncio.create_task(poll(asked_id)) for asked_id in asked]
        while arrived < len(asked):
            await asyncio.sleep(0.1)
        threads = await asyncio.to_thread(lambda: psutil.Process(stub_server.process.pid).num_threads())
        assert threads < 100
        # The others are still served.
        for path in ("/hello", "/health", f"/queue/{long}"):
            assert (await asyncio.to_thread(stub_server.get, path)).status_code == 200
        assert not any(poll.done() for poll in polls)
        await asyncio.to_thread(stub_server.request, "DELETE", f"/queue/{long}")
        return await asyncio.gather(*polls)

    answers = asyncio.run(poll_all())
    assert [answer["job_id"] for answer in answers] == asked
    assert [answer["state"] for answer in answers] == ["error"] * 400 + ["done"] * 100


# Cancelling and pausing


def cancelled(server: Program, job_id: str, query: str = "") -> dict[str, Any]:
    answer = server.request("DELETE", f"/queue/{job_id}{query}")
    assert answer.status_code == 200, answer.text
    status: dict[str, Any] = answer.json()
    return status


def test_a_waiting_job_is_cancelled_at_once(stub_server: Program) -> None:
    running, waiting = (stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=100) for _ in range(2))
    stub_server.wait(running, "processing")
    following = stub_server.submit(model="small", steps=1)
    status = cancelled(stub_server, waiting)
    assert status == stub_server.status(waiting)
    assert status.keys() == STATUS_KEYS | {"cancelled", "detail"}
    assert (status["status"], status["state"], status["error"]) == ("success", "error", "cancelled")
    assert status["cancelled"] is True
    assert status["detail"] == "cancelled"
    assert stub_server.status(running)["state"] == "processing"
    cancelled(stub_server, running)
    assert stub_server.wait(following)["state"] == "done"


def test_a_running_job_is_cancelled_within_a_step(stub_server: Program) -> None:
    job_id = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=150)
    stub_server.wait(job_id, "processing")
    status = cancelled(stub_server, job_id)
    assert (status["state"], status["error"], status["cancelled"]) == ("error", "cancelled", True)
    assert "image" not in status
    assert list((stub_server.home / "outputs").glob(f"{job_id}*")) == []
    assert stub_server.result(model="small", steps=1)["state"] == "done"


def test_a_running_job_may_be_cancelled_with_the_picture_that_it_has(stub_server: Program) -> None:
    job_id = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=150, seed=5, fileType="png")
    stub_server.wait(job_id, "processing")
    status = cancelled(stub_server, job_id, "?partial=true")
    assert status.keys() == STATUS_KEYS | FINISHED_KEYS | {"cancelled", "detail"}
    assert (status["state"], status["error"], status["cancelled"]) == ("error", "cancelled", True)
    assert picture(status["image"]).size == (64, 64)
    assert status == stub_server.status(job_id)


def test_a_waiting_job_has_no_picture_to_be_cancelled_with(stub_server: Program) -> None:
    running, waiting = (stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=100) for _ in range(2))
    status = cancelled(stub_server, waiting, "?partial=true")
    assert status.keys() == STATUS_KEYS | {"cancelled", "detail"}
    cancelled(stub_server, running)


def test_cancelling_twice_is_cancelling_once(stub_server: Program) -> None:
    job_id = stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=100)
    assert cancelled(stub_server, job_id) == cancelled(stub_server, job_id)


@pytest.mark.parametrize(("prompt", "state"), [("a lighthouse", "done"), ("stub:fail", "error")])
def test_a_job_that_has_ended_cannot_be_cancelled(stub_server: Program, prompt: str, state: str) -> None:
    job_id = stub_server.submit(prompt=prompt, model="small", steps=1)
    before = stub_server.wait(job_id, state)
    message = refusal(stub_server.request("DELETE", f"/queue/{job_id}"), 409)
    assert message == f"job {job_id} cannot be cancelled: its state is {state}"
    assert stub_server.status(job_id) == before


def test_an_unknown_job_cannot_be_cancelled(stub_server: Program) -> None:
    assert refusal(stub_server.request("DELETE", "/queue/x"), 404) == "Job x not found"
    assert "partial is 'some'" in refusal(stub_server.request("DELETE", "/queue/x?partial=some"), 400)


def test_cancelling_at_any_moment_ends_a_job_once(stub_server: Program) -> None:
    ends = set()
    for moment in range(12):
        job_id = stub_server.submit(prompt="stub:seconds=0.01", model="small", steps=4)
        time.sleep(moment * 0.015)
        with ThreadPoolExecutor(3) as callers:
            answers = list(callers.map(lambda _: stub_server.request("DELETE", f"/queue/{job_id}"), range(3)))  # noqa: B023
        status = stub_server.get(f"/queue/{job_id}?wait=60").json()
        assert {answer.status_code for answer in answers} == {200 if status.get("cancelled") else 409}
        ends.add((status["state"], status.get("cancelled")))
    assert ends <= {("error", True), ("done", None)}


def test_a_paused_queue_takes_jobs_and_begins_none(stub_server: Program) -> None:
    running = stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=20)
    stub_server.wait(running, "processing")
    paused = stub_server.request("POST", "/queue/pause")
    assert (paused.status_code, paused.json()) == (200, {"status": "success", "paused": True})
    try:
        waiting = stub_server.submit(model="small", steps=1)
        assert stub_server.wait(running)["state"] == "done"
        assert stub_server.get(f"/queue/{waiting}?wait=1").json()["state"] == "queued"
        health = stub_server.get("/health").json()
        assert health["queue"]["paused"] is True
        ready = stub_server.get("/ready")
        (reason,) = ready.json()["reasons"]
        assert ready.status_code == 503
        assert "paused" in reason
        assert reason in health["warnings"]
    finally:
        resumed = stub_server.request("POST", "/queue/resume")
    assert (resumed.status_code, resumed.json()) == (200, {"status": "success", "paused": False})
    assert stub_server.wait(waiting)["state"] == "done"
    assert stub_server.get("/ready").status_code == 200
    assert stub_server.get("/health").json()["queue"]["paused"] is False


def test_a_job_that_failed_says_why_and_nothing_of_the_host(stub_server: Program) -> None:
    job_id = stub_server.submit(prompt="stub:fail", model="small", steps=2)
    status = stub_server.wait(job_id, "error")
    assert status.keys() == STATUS_KEYS | {"detail"}
    assert status["detail"] == status["error"]
    assert (status["status"], status["state"], status["current_phase"]) == ("success", "error", "error")
    assert status["error"] == f"the engine failed: RuntimeError; the log has the details under job {job_id}"
    assert "Traceback" in stub_server.log
    assert stub_server.result(model="small", steps=1)["state"] == "done"


def test_the_payload_is_the_request_as_it_was_written(stub_server: Program) -> None:
    asked = {
        "prompt": "a lighthouse",
        "model": "SMALL",
        "sampler_name": "k_euler",
        "fileType": "JPG",
        "steps": 1,
        "loras": ["one", {"name": "two", "scale": 0.5}],
        "mystery": {"kept": [1, None, "x"]},
    }
    assert stub_server.result(**asked)["payload"] == asked


def test_pictures_in_a_payload_are_not_sent_back(stub_server: Program) -> None:
    payload = stub_server.result(model="small", steps=1, mystery="data:image/png;base64,iVBORw0KGgo=")["payload"]
    assert payload["mystery"] == "[BASE64_IMAGE_DATA_34_chars]"


def test_a_picture_that_was_deleted_is_null(stub_server: Program) -> None:
    status = stub_server.result(model="small", steps=1)
    (stub_server.home / status["output_path"]).unlink()
    again = stub_server.status(status["job_id"])
    assert again["image"] is None
    assert again["output_path"] == status["output_path"]


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(stub_server: Program) -> None:
    status = stub_server.result(model="small", steps=1)
    path = stub_server.home / status["output_path"]
    path.unlink()
    path.mkdir()
    message = refusal(stub_server.get(f"/queue/{status['job_id']}"), 500)
    assert message == "the service failed; its log has the details"
    eventually(lambda: "IsADirectoryError" in stub_server.log, "the log to tell")


def test_text_of_all_kinds_comes_back(stub_server: Program) -> None:
    prompt = 'Ünïcode 🦀, "quotes" \\ <tags>, line\nbreaks: 中文'
    status = stub_server.result(prompt=prompt, model="small", steps=1, fileType="png")
    assert status["payload"]["prompt"] == prompt
    assert said(status["image"]).prompt == prompt


def test_numbers_that_json_has_not_are_null_in_the_payload(stub_server: Program) -> None:
    answer = stub_server.request(
        "POST",
        "/txt2img",
        content=b'{"model": "small", "steps": 1, "mystery": NaN}',
        headers={"Content-Type": "application/json"},
    )
    assert stub_server.wait(answer.json()["job_id"])["payload"]["mystery"] is None


# What is taken with a warning


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"sampler": "Euler"}, "unknown field 'sampler' was ignored; did you mean 'sampler_name'?"),
        ({"Steps": 3}, "unknown field 'Steps' was ignored; did you mean 'steps'?"),
        ({"filetype": "png"}, "unknown field 'filetype' was ignored; did you mean 'fileType'?"),
        ({"zzz": 1}, "unknown field 'zzz' was ignored"),
        ({"cfgScale": 3}, "unknown field 'cfgScale' was ignored; did you mean 'cfg_scale'?"),
        ({"batch_size": 2}, "unknown field 'batch_size' was ignored; did you mean 'n'?"),
        ({"n_iter": 2}, "unknown field 'n_iter' was ignored; did you mean 'n'?"),
        ({"num_inference_steps": 2}, "unknown field 'num_inference_steps' was ignored; did you mean 'steps'?"),
        ({"guidance_scale": 2}, "unknown field 'guidance_scale' was ignored; did you mean 'cfg_scale'?"),
        ({"scheduler": "Karras"}, "unknown field 'scheduler' was ignored; did you mean 'scheduler_type'?"),
        ({"enable_hr": True}, "unknown field 'enable_hr' was ignored; did you mean 'hires.enabled'?"),
        (
            {"denoising_strength": 0.5},
            "unknown field 'denoising_strength' was ignored; did you mean 'hires.denoising_strength'?",
        ),
        (
            {"hires": {"hr_scale": 2, "enabled": False}},
            "unknown field 'hires.hr_scale' was ignored; did you mean 'hires.scale'?",
        ),
        ({"loras": ["one"]}, "LoRA 'one' was skipped: it is not installed"),
        ({"loras": [{"name": "one"}]}, "LoRA 'one' was skipped: it is not installed"),
        ({"loras": [{"name": "one", "scale": 0.5}]}, "LoRA 'one' was skipped: it is not installed"),
        ({"prompt": "a <lora:one:0.5>cat <lora:one>"}, "LoRA 'one' was skipped: it is not installed"),
        (
            {"prompt": "<hypernet:one:1>"},
            "<hypernet:one> was taken out of the prompt: no such kind of network is known; <lora:name:weight> is one",
        ),
        ({"refiner_checkpoint": "x"}, "refiner_checkpoint is ignored: model 'small' is no SDXL model"),
    ],
)
def test_what_is_ignored_is_told(stub_server: Program, fields: dict[str, Any], warning: str) -> None:
    answer = stub_server.post(**{"model": "small", "steps": 1} | fields).json()
    assert answer["warnings"] == [warning]
    assert stub_server.wait(answer["job_id"])["warnings"] == [warning]


@pytest.mark.parametrize(
    "fields",
    [
        {"hires": {"enabled": False, "scale": 2.0, "upscaler": "Latent", "steps": 20, "denoising_strength": 0.4}},
        {"hires": None, "loras": None, "refiner_checkpoint": None, "refiner_switch_at": None},
        {"loras": [], "hires": {}, "refiner_switch_at": 0.8},
        {"model": None, "width": None, "n": None, "fileType": None, "negative_prompt": None, "cfg_scale": None},
        {"priority": None, "deadline": None, "webhook": None},
    ],
)
def test_what_asks_for_nothing_is_taken_in_silence(stub_server: Program, fields: dict[str, Any]) -> None:
    assert stub_server.post(steps=1, **fields).json()["warnings"] == []


def test_what_is_asked_beside_the_picture_is_in_the_record(stub_server: Program) -> None:
    job_id = stub_server.submit(model="small", steps=1, priority="-3", deadline=600)
    stub_server.wait(job_id)
    job = loads((stub_server.home / "queue" / "done" / f"{job_id}.json").read_bytes())
    assert (job.priority, job.deadline) == (-3, 600)
    assert (job.caller, job.dialect) == ("127.0.0.1", "native")


def test_a_job_that_a_worker_holds_ready_still_waits(stub_server: Program) -> None:
    running = stub_server.submit(prompt="stub:seconds=0.05", model="small", steps=100)
    ready = stub_server.submit(model="small", steps=1)
    eventually(lambda: stub_server.status(running)["state"] == "processing", "the first job to run")
    status = stub_server.status(ready)
    assert (status["state"], status["position"]) == ("queued", 0)
    cancelled(stub_server, running)


# What is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "nope"}, ["model 'nope'", "small, stable-diffusion-v1-5"]),
        ({"model": "../small"}, ["model '../small'"]),
        (
            {"sampler_name": "Eulr"},
            ["sampler_name 'Eulr' is not known; did you mean 'Euler'? One of Euler, Euler a, Heun"],
        ),
        ({"scheduler_type": "nope"}, ["scheduler_type 'nope'", "default, karras"]),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler_type": "nope"}, ["scheduler_type 'nope'"]),
        ({"fileType": "bmp"}, ["fileType is 'bmp'", "jpg, png, webp, avif, gif"]),
        ({"fileType": "avif", "lossless": True}, ["lossless is true", "png, webp"]),
        ({"fileType": "webp", "width": 16384, "height": 8, "steps": 1}, ["fileType is webp", "16383", "16384"]),
        ({"steps": 0}, ["steps is 0", "greater than or equal to 1"]),
        ({"steps": 151}, ["steps is 151", "1 to 150"]),
        ({"steps": "x"}, ["steps is 'x'", "integer"]),
        ({"steps": 2.5}, ["steps is 2.5", "integer"]),
        ({"steps": []}, ["steps is []", "integer"]),
        ({"cfg_scale": -1}, ["cfg_scale is -1", "greater than or equal to 0"]),
        ({"cfg_scale": 101}, ["cfg_scale is 101", "less than or equal to 100"]),
        ({"cfg_scale": float("nan")}, ["cfg_scale is NaN", "finite"]),
        ({"cfg_scale": float("inf")}, ["cfg_scale is Infinity", "finite"]),
        ({"cfg_scale": "much"}, ["cfg_scale is 'much'", "number"]),
        ({"width": 0}, ["width is 0", "8 to"]),
        ({"width": 7}, ["width is 7", "8 to"]),
        ({"width": -8}, ["width is -8", "8 to"]),
        ({"height": 7}, ["height is 7", "8 to"]),
        ({"width": 1e9}, ["width is 1000000000", "8 to 65536"]),
        ({"width": 10**4000, "height": 10**4000}, ["width is 1000", "8 to 65536"]),
        ({"width": 2048, "height": 2056}, ["2048x2056", "at most 4194304"]),
        ({"n": 0}, ["n is 0", "greater than or equal to 1"]),
        ({"n": 17}, ["n is 17", "1 to 16"]),
        ({"jpeg_quality": 0}, ["jpeg_quality is 0", "greater than or equal to 1"]),
        ({"jpeg_quality": 101}, ["jpeg_quality is 101", "less than or equal to 100"]),
        ({"seed": 2**32}, ["seed is 4294967296", "0 to 4294967295"]),
        ({"seed": "x"}, ["seed is 'x'", "integer"]),
        ({"priority": 10}, ["priority is 10", "less than or equal to 9"]),
        ({"priority": -10}, ["priority is -10", "greater than or equal to -9"]),
        ({"priority": "high"}, ["priority is 'high'", "integer"]),
        ({"deadline": 0}, ["deadline is 0", "greater than 0"]),
        ({"deadline": float("inf")}, ["deadline is Infinity", "less than or equal to 604800"]),
        ({"prompt": 5}, ["prompt is 5", "string"]),
        ({"prompt": ["a"]}, ['prompt is ["a"]', "string"]),
        ({"prompt": "\ud800"}, ["not valid Unicode"]),
        ({"\ud800": 1}, ["unicode"]),
        ({"mystery": "\ud800"}, ["not valid Unicode"]),
        (
            {"loras": "one"},
            ["loras is 'one': it is a list of names, or of objects with name (or path), scale and text_scale"],
        ),
        ({"loras": [{"scale": 1}]}, ["loras.0.name is missing"]),
        ({"loras": ["one", 5]}, ["loras.1 is 5: it is a list of names, or of objects with name"]),
        ({"loras": [["one"]]}, ['loras.0 is ["one"]: it is a list of names']),
        (
            {"hires": True},
            ['hires is true: it is an object, as {"enabled": true, "scale": 2}, with enabled, scale, width'],
        ),
        ({"hires": 2}, ["hires is 2: it is an object"]),
        ({"sampler_name": "DPM++ 2M Karas"}, ["did you mean 'DPM++ 2M Karras'? One of Euler"]),
        ({"scheduler_type": "polyexp"}, ["did you mean 'polyexponential'? One of default"]),
        ({"loras": [{"name": "one", "scale": "x"}]}, ["loras.0.scale is 'x'", "number"]),
        (
            {"hires": {"enabled": True, "upscaler": "4x"}},
            ["hires.upscaler '4x' is not installed (External upscaler model not found)", "Lanczos"],
        ),
        ({"hires": {"enabled": True, "denoising_strength": 2}}, ["hires.denoising_strength is 2"]),
        ({"hires": {"enabled": True, "scale": 8}, "width": 1024, "height": 1024}, ["hires makes 8192x8192"]),
        ({"hires": {"enabled": True, "steps": 999}}, ["hires.steps is 999"]),
        ({"hires": {"enabled": False, "scale": "x"}}, ["hires.scale is 'x'", "number"]),
        ([{"prompt": "x"}], ['the body is [{"prompt": "x"}]', "dictionary"]),
        ("prompt", ["the body is 'prompt'", "dictionary"]),
        (None, ["the body is null"]),
    ],
    ids=lambda value: json.dumps(value)[:50] if not isinstance(value, list) else "",
)
def test_a_refusal_names_the_field_the_value_and_the_choices(
    stub_server: Program, fields: Any, words: list[str]
) -> None:
    message = refused(stub_server, fields)
    assert [word for word in words if word not in message] == []
    assert "Body" not in message


def test_a_prompt_beyond_the_limit_is_refused(stub_server: Program) -> None:
    for name in ("prompt", "negative_prompt"):
        assert refused(stub_server, {name: "x" * 2001}, 413) == f"{name} has 2001 characters; at most 2000 are allowed"
    assert stub_server.post(prompt="x" * 2000, model="small", steps=1).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is missing"),
        (b"{", "the body is no JSON"),
        (b'{"prompt": "x"', "the body is no JSON"),
        (b"\xff\xfe{", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply: at most 32"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"mystery": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply"),
    ],
    ids=["empty", "open", "cut short", "no UTF-8", "deep", "long number", "deep inside"],
)
def test_a_body_that_is_no_json_is_refused(stub_server: Program, body: bytes, words: str) -> None:
    answer = stub_server.request("POST", "/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert words in refusal(answer, 400)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_must_say_that_it_is_json(stub_server: Program, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = stub_server.request("POST", "/txt2img", content=b'{"prompt": "x"}', headers=headers)
    assert "Content-Type: application/json" in refusal(answer, 415)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused(stub_server: Program, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * 2**20 + b'"}'
    pieces = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    answer = stub_server.request(
        "POST", "/txt2img", content=pieces if chunked else body, headers={"Content-Type": "application/json"}
    )
    assert refusal(answer, 413) == "the request body is larger than the 1048576 bytes that are allowed"


def test_a_body_in_chunks_is_taken(stub_server: Program) -> None:
    pieces = iter([b'{"model": "small", ', b'"steps": 1}'])
    answer = stub_server.request("POST", "/txt2img", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("x", "x"),
        ("00000000-0000-4000-8000-000000000000", "00000000-0000-4000-8000-000000000000"),
        ("a" * 4096, "a" * 4096),
        ("%00", "\0"),
        ("%2e%2e", ".."),
        ("%2e%2e%2fx", None),
        ("..%5cx", "..\\x"),
        ("é🦀", "é🦀"),
        ("%ff", "\ufffd"),
        ("*.json", "*.json"),
        ("tmp%0aid", "tmp\nid"),
    ],
    ids=lambda value: str(value)[:12].encode("unicode_escape").decode(),
)
def test_an_unknown_job_is_a_404(stub_server: Program, written: str, name: str | None) -> None:
    message = refusal(stub_server.get(f"/queue/{written}"), 404)
    assert message == f"Job {name} not found" or (name is None and message.startswith("no such route: GET "))


# What else there is


def test_hello(stub_server: Program) -> None:
    answer = stub_server.get("/hello")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})


def test_health_tells_real_numbers(stub_server: Program) -> None:
    health = stub_server.get("/health").json()
    assert health.keys() - {"warnings"} == {
        *("status", "timestamp", "version", "system", "gpu", "workers", "models", "loras", "queue", "outputs", "disk"),
        "safety",
        *("timestamp_iso", "model_status", "service", "buffer_accessible", "model_loaded"),  # what other APIs ask here
    }
    assert health["status"] == ("warning" if "warnings" in health else "healthy")
    assert abs(health["timestamp"] - time.time()) < 60
    system = health["system"]
    assert system["cpu_count"] >= 1
    assert 0 < system["memory_available_gb"] < system["memory_total_gb"]
    assert 0 < system["memory_percent"] < 100
    assert 0 < system["disk_usage_percent"] <= 100
    assert health["gpu"] == {"cuda_available": False, "mps_available": False, "device_name": "stub"}
    (worker,) = health["workers"]
    assert worker.keys() == {
        *("state", "device_name", "jobs", "seconds_since_event", "restarts"),
        *("models_in_memory", "memory_budget_gb"),
    }
    assert (worker["device_name"], worker["restarts"]) == ("stub", 0)
    assert health["models"] == {"count": 2, "directory": "stable_diffusion/models"}
    assert health["loras"] == {"count": 1, "directory": "stable_diffusion/loras"}
    assert health["queue"].keys() == {"active_jobs", "paused", "directory"}
    assert health["queue"]["directory"] == "queue"
    assert health["outputs"].keys() == {"available", "free_space_gb", "directory"}
    assert health["outputs"]["available"] is True
    assert health["outputs"]["free_space_gb"] > 0
    assert health["outputs"]["directory"] == "outputs"


def test_health_counts_the_jobs_that_wait_or_run_only(stub_server: Program) -> None:
    eventually(lambda: active_jobs(stub_server) == 0, "all jobs to end")
    ids = [stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=4) for _ in range(4)]
    assert active_jobs(stub_server) == 4
    stub_server.wait(ids[0])
    assert active_jobs(stub_server) < 4
    for job_id in ids:
        stub_server.wait(job_id)
    assert active_jobs(stub_server) == 0


def test_models_are_listed_with_the_fields_of_both_readmes(stub_server: Program) -> None:
    answer = stub_server.get("/models").json()
    assert answer["status"] == "success"
    names = ["small", "stable-diffusion-v1-5"]
    assert answer["models"] == [
        {
            "name": name,
            "label": name,
            "type": "standard",
            "path": f"stable_diffusion/models/{name}",
            "family": "sd1",
            "pickled": False,
        }
        for name in names
    ]


def test_labels_are_those_of_the_readme_by_label(stub_server: Program) -> None:
    answer = stub_server.get("/models/aliases").json()
    assert answer.keys() == {"status", "models", "message"}
    assert [row["label"] for row in answer["models"]] == [
        *(
            "Amanatsu",
            "ChikMix V3",
            "Ilustmix",
            "MeinaMix V11",
            "Pastel Mix",
            "PlantMilk (HempII)",
            "PlantMilk (Walnut)",
        ),
    ]
    assert answer["models"][1] == {"name": "models--digiplay--ChikMix_V3", "label": "ChikMix V3", "installed": False}


def test_loras_are_listed_with_the_scale_that_they_have_when_none_is_given(stub_server: Program) -> None:
    def listed() -> dict[str, Any]:
        found: dict[str, Any] = stub_server.get("/loras").json()
        return found

    style = (stub_server.home / "stable_diffusion" / "loras" / "style.safetensors").read_bytes()
    tensors = style[8 + int.from_bytes(style[:8], "little") :]
    eventually(lambda: listed()["loras"][0]["hash"], "the hashes, which are made when they were asked for")
    assert listed() == {
        "status": "success",
        "loras": [
            {
                "name": "style",
                "scale": 1.0,
                "path": "stable_diffusion/loras/style.safetensors",
                "family": "sd1",
                "trigger_words": ["ink drawing"],
                "usage_rights": None,
                "allow_no_mention": None,
                "hash": hashlib.sha256(tensors).hexdigest()[:12],
                "autov2": hashlib.sha256(style).hexdigest()[:10],
                "pickled": False,
            }
        ],
    }


def test_a_lora_is_listed_with_the_words_that_call_it_and_its_hashes_once_they_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "stable_diffusion" / "loras"
    tags = {"10_cat": {"cat": 10, "ink": 9} | {f"tag {n}": 1 for n in range(20)}, "5_dog": {"ink": 5, "odd": "many"}}
    plain = checkpoint(folder / "plain.safetensors", LORA_KEYS, {"ss_tag_frequency": "{not json"})
    trained = {"ss_tag_frequency": json.dumps(tags), "sshs_model_hash": "0123456789abcdef" * 4}
    checkpoint(folder / "trained.safetensors", LORA_KEYS, trained)
    phrase = {"ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": " in ink " + "x" * 200}
    checkpoint(folder / "written.safetensors", LORA_KEYS, phrase)
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path) as server:
        rows = {row["name"]: row for row in server.get("/loras").json()["loras"]}
        assert rows["trained"]["trigger_words"] == ["ink", "cat", *(f"tag {n}" for n in range(6))]
        assert rows["written"]["trigger_words"] == ["in ink " + "x" * 93]
        assert rows["plain"]["trigger_words"] == []
        assert [rows[name]["hash"] for name in ("plain", "trained", "written")] == [None, "0123456789ab", None]
        assert {row["autov2"] for row in rows.values()} == {None}
        whole = hashlib.sha256(plain.read_bytes()).hexdigest()
        found = eventually(lambda: all_known(server), "the hashes, which are made when they were asked for")
        assert (found[0]["name"], found[0]["autov2"]) == ("plain", whole[:10])
        server.submit(infotext=f'a cat <lora:renamed:1>\nSteps: 1, Size: 64x64, Lora hashes: "renamed: {whole[:12]}"')
    with serving(tmp_path) as server:
        assert all_known(server) == found


def all_known(server: Program) -> list[dict[str, Any]]:
    """The LoRAs, once each has its hashes."""
    rows: list[dict[str, Any]] = server.get("/loras").json()["loras"]
    return rows if all(row["hash"] and row["autov2"] for row in rows) else []


def test_samplers_and_schedules_are_listed_those_of_the_manual_first(stub_server: Program) -> None:
    answer = stub_server.get("/sampling_methods").json()
    assert answer["status"] == "success"
    assert answer["sampling_methods"][:3] == ["Euler", "Euler a", "Heun"]
    assert answer["scheduler_types"][:5] == ["default", "karras", "exponential", "ddim", "pndm"]
    for name in answer["sampling_methods"]:
        stub_server.submit(sampler_name=name, scheduler_type=answer["scheduler_types"][-1])


def test_upscalers_are_the_internal_ones_and_then_the_files(stub_server: Program) -> None:
    answer = stub_server.get("/upscalers").json()
    assert answer["status"] == "success"
    first, *others, last = answer["upscalers"]
    assert (first["name"], first["path"], first["type"]) == ("Latent", "internal", "internal")
    assert {row["path"] for row in others} == {"internal"}
    assert len(others) == 8
    assert last == {
        "name": "ESRGAN_4x",
        "path": "stable_diffusion/upscalers/ESRGAN_4x.pth",
        "type": "external",
        "description": "a model of its own",
        "size_mb": 1.0,
        "pickled": True,
    }


def test_new_files_are_listed_while_the_service_runs_and_no_path_of_the_host_is_told(tmp_path: Path) -> None:
    root = tmp_path / "secret" / "webui"
    root.mkdir(parents=True)
    with serving(tmp_path / "home", "--models-from", root) as server:
        assert server.get("/loras").json()["loras"] == []
        checkpoint(root / "models" / "Lora" / "new.safetensors", LORA_KEYS)
        diffusers_folder(root / "models" / "Stable-diffusion" / "sub" / "dream")
        eventually(lambda: server.get("/loras").json()["loras"], "the new LoRA")
        told = server.get("/loras").text + server.get("/models").text
        assert '"path":"webui/models/Lora/new.safetensors"' in told
        assert '"path":"webui/models/Stable-diffusion/sub/dream"' in told
        assert "secret" not in told
        assert server.status(server.submit(prompt="x", model="sub/dream", steps=1))["status"] == "success"


def test_a_model_is_loaded_on_request(stub_server: Program) -> None:
    answer = stub_server.request("POST", "/models/Small/load")
    assert (answer.status_code, answer.json()) == (200, {"status": "success", "model": "small"})
    unknown = stub_server.request("POST", "/models/org/nope/load")
    assert unknown.status_code == 400
    assert "model 'org/nope' is not installed; one of " in unknown.json()["detail"]


def test_what_the_operator_says_of_a_model_is_the_default(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    (tmp_path / "stable_diffusion" / "models.toml").write_text(
        "[small]\nlabel = 'Tiny'\nsize = [72, 64]\nsteps = 3\nsampler = 'Euler a'\nclip_skip = 2\n"
    )
    with serving(tmp_path) as server:
        fields = said(server.result(prompt="x", model="tiny")["image"]).fields
        assert (fields["Size"], fields["Steps"], fields["Sampler"]) == ("72x64", 3, "Euler a")
        assert fields["Clip skip"] == 2
        asked = {"width": 64, "steps": 2, "sampler_name": "Heun", "clip_skip": 1, "scheduler_type": "default"}
        fields = said(server.result(prompt="x", model="small", **asked)["image"]).fields
        assert (fields["Size"], fields["Steps"], fields["Sampler"]) == ("64x64", 2, "Heun")
        assert "Clip skip" not in fields
        assert {"name": "small", "label": "Tiny", "installed": True} in server.get("/models/aliases").json()["models"]


def test_a_pipeline_of_diffusers_has_its_publishers_defaults_and_sizes(tmp_path: Path) -> None:
    models = tmp_path / "stable_diffusion" / "models"
    transformer_folder(models / "flux-dev", guidance_embeds=True, sample_size=8)
    transformer_folder(models / "flux-schnell", guidance_embeds=False, sample_size=8)
    transformer_folder(models / "sana", pipeline="SanaPipeline", sample_size=8)
    (tmp_path / "stable_diffusion" / "models.toml").write_text("[sana]\nsteps = 18\nguidance_scale = 4\n")
    with serving(tmp_path) as server:
        for model, steps, guidance in (("flux-dev", 28, 3.5), ("flux-schnell", 4, 1), ("sana", 18, 4)):
            fields = said(server.result(prompt="x", model=model)["image"]).fields
            assert (fields["Steps"], fields["CFG scale"], fields["Sampler"]) == (steps, guidance, "Euler")
        answer = server.post(model="flux-dev", width=71, height=40, steps=2, cfg_scale=7).json()
        assert answer["warnings"] == [
            "width 71 was rounded to 64, a multiple of 16",
            "height 40 was rounded to 48, a multiple of 16",
        ]
        fields = said(server.wait(answer["job_id"])["image"]).fields
        assert (fields["Size"], fields["Steps"], fields["CFG scale"]) == ("64x48", 2, 7)
        families = {model["name"]: model["family"] for model in server.get("/models").json()["models"]}
        assert families["sana"] == "SanaPipeline"


def test_the_api_documents_itself(stub_server: Program) -> None:
    docs = stub_server.get("/docs")
    assert docs.status_code == 200
    assert docs.headers["content-type"].startswith("text/html")
    paths = stub_server.get("/openapi.json").json()["paths"]
    assert {"/txt2img", "/queue/{job_id}", "/models", "/health", "/hello"} <= paths.keys()


OURS = {"service", "queue", "catalog", "jobs", "pictures"}
"""Tags of this dialect's routes."""


def test_the_documentation_knows_the_real_refusals(stub_server: Program) -> None:
    document = stub_server.get("/openapi.json").json()
    assert "ValidationError" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if not OURS & set(operation["tags"]):
                continue
            bodies = {
                status: answer["content"]["application/json"]["schema"]
                for status, answer in operation["responses"].items()
                if not status.startswith(("2", "3"))
            }
            refusals = {
                status for status, schema in bodies.items() if schema["$ref"].endswith(("/ErrorBody", "ReadyBody"))
            }
            assert refusals >= {"default"}, (method, path)
            assert refusals == bodies.keys(), (method, path)
    expected = document["paths"]["/txt2img"]["post"]["responses"]
    assert {"400", "413", "415", "429", "503", "507"} <= expected.keys()
    assert "Retry-After" in expected["503"]["headers"]


def test_every_route_of_the_documentation_says_what_it_is(stub_server: Program) -> None:
    document = stub_server.get("/openapi.json").json()
    operations = [(path, each) for path, methods in document["paths"].items() for each in methods.values()]
    assert len(operations) > 20
    assert [path for path, each in operations if not each["tags"] or not 5 < len(each["summary"]) < 60] == []
    assert len({each["summary"] for _, each in operations}) == len(operations)
    schemas = document["components"]["schemas"]
    named = [name for name in schemas if not name.startswith("Body_")]  # FastAPI's own, of the fields of a form
    assert [name for name in named if not schemas[name].get("description")] == []


def test_the_examples_of_the_documentation_are_taken(stub_server: Program) -> None:
    document = stub_server.get("/openapi.json").json()
    asked = {
        path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {}) and OURS & set(methods["post"]["tags"])
    }
    assert asked.keys() == {"/txt2img", "/img2img", "/inpaint", "/upscale", "/img-info"}
    for path, name in asked.items():
        examples = document["components"]["schemas"][name]["examples"]
        assert examples
        for example in examples:
            # /img2img and /inpaint share their body, and the first example has no mask
            mask = {"mask": example["image"]} if path == "/inpaint" else {}
            model = {"model": "small"} if "prompt" in example else {}
            answer = stub_server.request("POST", path, json=mask | example | model)
            assert answer.status_code == 200, answer.text
            assert answer.json().get("warnings", []) == []


def test_the_root_leads_to_the_documentation(stub_server: Program) -> None:
    answer = stub_server.get("/")
    assert answer.is_redirect
    assert answer.headers["location"] == "/docs"


def test_an_unknown_route_is_a_404(stub_server: Program) -> None:
    assert refusal(stub_server.get("/nope"), 404) == "no such route: GET /nope"


@pytest.mark.parametrize(("method", "path"), [("PUT", "/txt2img"), ("POST", "/hello"), ("DELETE", "/models")])
def test_a_wrong_method_is_a_405(stub_server: Program, method: str, path: str) -> None:
    answer = stub_server.request(method, path)
    assert refusal(answer, 405) == f"{method} is not allowed for {path}"
    assert answer.headers["allow"]


# Once more


@pytest.mark.parametrize("number", [0, 1])
def test_the_infotext_in_a_picture_makes_it_again(stub_server: Program, number: int) -> None:
    first = stub_server.result(
        prompt="a (red:1.3) lighthouse, [fog:rain:0.5]\nat night # a note", negative_prompt="boats, people", model="small",
        sampler_name="DPM++ 2S a Karras", steps=3, cfg_scale=6.5, width=72, height=64, seed=2**32 - 1, n=2, rng="cpu",
        variation_seed=7, variation_strength=0.25, seed_resize_width=64, seed_resize_height=80, ensd=31337, eta=0.7,
        s_noise=1.003, guidance_rescale=0.4, clip_skip=2, emphasis="No norm", fileType="png",
    )  # fmt: skip
    text = images.read_infotext(base64.b64decode(first["images"][number]))
    again = stub_server.result(infotext=text, fileType="png")
    assert again["image"] == first["images"][number]
    assert "warnings" not in again


def test_what_is_null_counts_as_left_out(stub_server: Program) -> None:
    body = {
        "prompt": None,
        "steps": None,
        "hires": {"enabled": False, "scale": None, "upscaler": None},
        "dry_run": True,
    }
    assert stub_server.request("POST", "/txt2img", json=body).status_code == 200
