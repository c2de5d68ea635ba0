"""The backend API as its document has it: what it prints is sent as it stands there, and the rest is asked over HTTP."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_models import diffusers_folder
from PIL import Image
from semantics import asked, seen
from serving import PATIENCE, ROOT, Program, environment, eventually, serving

from diffusion_api import __version__

METRICS = {
    "model_loaded": True,
    "lora_available": False,
    "device": "stub",
    "torch_version": version("torch"),
    "api_version": __version__,
}
PRINTED = "http://localhost:8000"

PYTHON = """
import requests
import base64
from PIL import Image
import io

# Generate image
response = requests.post("http://localhost:8000/generate", json={
    "prompt": "abstract geometric patterns in vibrant colors",
    "num_inference_steps": 20,
    "guidance_scale": 7.5
})

if response.status_code == 200:
    data = response.json()
    # Decode and save first image
    image_data = data["images"][0].split(",")[1]  # Remove data:image/png;base64,
    image_bytes = base64.b64decode(image_data)
    image = Image.open(io.BytesIO(image_bytes))
    image.save("generated_image.png")
"""

JAVASCRIPT = """
async function generateImage() {
    const response = await fetch('http://localhost:8000/generate', {
        method: 'POST',
        headers: {
            'Content-Type': 'application/json',
        },
        body: JSON.stringify({
            prompt: "abstract geometric patterns in vibrant colors",
            num_inference_steps: 20,
            guidance_scale: 7.5
        })
    });

    const data = await response.json();

    // Display image
    const img = document.createElement('img');
    img.src = data.images[0];
    document.body.appendChild(img);
}
"""
PAGE = """
const document = {createElement: name => ({name}), body: {appendChild: image => console.log(JSON.stringify(image))}};
generateImage();
"""
"""As much of a browser as that needs."""

CURL = """
curl -X POST "http://localhost:8000/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "abstract geometric patterns in vibrant colors",
    "num_inference_steps": 20,
    "guidance_scale": 7.5
  }'
"""

REQUEST = {
    "prompt": "abstract geometric patterns in vibrant colors, artistic composition",
    "negative_prompt": "photorealistic, realistic, photographic",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "width": 512,
    "height": 512,
    "num_images": 1,
    "seed": 42,
}
BATCH = [
    {"prompt": "abstract geometric patterns", "num_inference_steps": 20},
    {"prompt": "minimalist line art", "num_inference_steps": 25},
]
SMALL = {"prompt": "x", "num_inference_steps": 1, "width": 256, "height": 256}


def generated(server: Program, **fields: Any) -> dict[str, Any]:
    """The answer to ``POST /generate`` that makes pictures."""
    answer = server.request("POST", "/generate", json=fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def opened(url: str) -> Image.Image:
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def pixels(data: str) -> bytes:
    """Those of a picture in base64."""
    return Image.open(io.BytesIO(base64.b64decode(data))).tobytes()


def refused(server: Program, path: str = "/generate", **fields: Any) -> str:
    """The text of a refusal with 400, which is all that it says."""
    answer = server.request("POST", path, json=fields)
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"detail"}
    return str(answer.json()["detail"])


# The clients that the document prints


def here(code: str, server: Program) -> str:
    """Code as printed, but for the port."""
    assert PRINTED in code
    return code.replace(PRINTED, server.url.replace("127.0.0.1", "localhost"))


def test_the_printed_python_client_saves_a_picture(stub_server: Program, tmp_path: Path) -> None:
    command = [sys.executable, "-c", here(PYTHON, stub_server)]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=PATIENCE)
    assert Image.open(tmp_path / "generated_image.png").size == (512, 512)


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_printed_javascript_client_shows_a_picture(stub_server: Program, tmp_path: Path) -> None:
    script = tmp_path / "page.js"
    script.write_text(here(JAVASCRIPT, stub_server) + PAGE)
    done = subprocess.run(["node", script], capture_output=True, text=True, check=True, timeout=PATIENCE)
    image = json.loads(done.stdout)
    assert (image["name"], opened(image["src"]).size) == ("img", (512, 512))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_printed_curl_line_gets_a_picture(stub_server: Program) -> None:
    done = subprocess.run(["sh", "-c", here(CURL, stub_server)], capture_output=True, check=True, timeout=PATIENCE)
    assert opened(json.loads(done.stdout)["images"][0]).size == (512, 512)


# /generate


def test_the_printed_request_has_the_printed_answer(stub_server: Program) -> None:
    body = generated(stub_server, **REQUEST)
    assert {name: body[name] for name in ("prompt", "negative_prompt")} == {
        name: REQUEST[name] for name in ("prompt", "negative_prompt")
    }
    assert isinstance(body["generation_time"], float)
    assert body["model_info"] == {
        "base_model": "stable-diffusion-v1-5",
        "lora_applied": False,
        "device": "stub",
        "inference_steps": 20,
        "guidance_scale": 7.5,
        "resolution": "512x512",
    }
    assert [opened(url).size for url in body["images"]] == [(512, 512)]


def test_a_prompt_alone_makes_one_picture_of_512_pixels(stub_server: Program) -> None:
    body = generated(stub_server, prompt="x")
    assert [opened(url).size for url in body["images"]] == [(512, 512)]
    assert (body["negative_prompt"], body["model_info"]["inference_steps"]) == ("", 20)
    assert generated(stub_server, prompt="x", negative_prompt=None)["negative_prompt"] == ""


def test_four_images_are_one_job_with_four_seeds(stub_server: Program) -> None:
    answer = stub_server.request("POST", "/generate", json=SMALL | {"num_images": 4, "seed": 7})
    images = answer.json()["images"]
    assert len(set(images)) == 4
    assert stub_server.status(answer.headers["X-Job-Id"])["images"] == [url.split(",")[1] for url in images]
    assert generated(stub_server, **SMALL, seed=10)["images"] == images[3:]


def test_a_seed_makes_the_same_picture_again_and_none_another(stub_server: Program) -> None:
    first, again = (generated(stub_server, **SMALL, seed=42)["images"] for _ in range(2))
    assert first == again
    drawn = generated(stub_server, **SMALL)
    assert drawn["images"] != generated(stub_server, **SMALL)["images"]
    assert generated(stub_server, **SMALL, seed=drawn["seed"])["images"] == drawn["images"]


@pytest.mark.parametrize(
    ("field", "allowed", "beyond"),
    [
        ("num_inference_steps", (1, 100), (0, 101)),
        ("guidance_scale", (1, 20), (0.9, 20.1)),
        ("width", (256, 1024), (255, 1025)),
        ("height", (256, 1024), (255, 1025)),
        ("num_images", (1, 4), (0, 5)),
    ],
)
def test_numbers_have_the_documents_ranges(
    stub_server: Program, field: str, allowed: tuple[float, float], beyond: tuple[float, float]
) -> None:
    for value in allowed:
        generated(stub_server, **SMALL | {field: value})
    for value in beyond:
        detail = refused(stub_server, **SMALL | {field: value})
        assert detail == f"{field} is {value}: it may be {allowed[0]} to {allowed[1]}"


def test_a_field_that_is_not_known_is_told(stub_server: Program) -> None:
    sent = {"prompt": "a lighthouse", "width": 256, "height": 256, "num_inference_steps": 1, "num_image": 2}
    expected = ["unknown field 'num_image' was ignored; did you mean 'num_images'?"]
    assert stub_server.request("POST", "/generate", json=sent).json()["warnings"] == expected


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "prompt is missing"),
        ({"prompt": None}, "prompt is null: Input should be a valid string"),
        ({"prompt": "x", "num_inference_steps": "many"}, "num_inference_steps is 'many': Input should be a valid integer"),
        ({"prompt": "x", "seed": 2**32}, "seed is 4294967296; it may be 0 to 4294967295"),
        ({"prompt": "x" * 2001}, "prompt has 2001 characters; at most 2000 are allowed"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_refused_with_the_field(stub_server: Program, body: dict[str, Any], detail: str) -> None:
    answer = stub_server.request("POST", "/generate", json=body)
    assert answer.status_code == (413 if "characters" in detail else 400)
    assert answer.json().keys() == {"detail"}
    assert answer.json()["detail"].startswith(detail)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [("{", "application/json", 400), ("[]", "application/json", 400), ('{"prompt": "x"}', "text/plain", 415)],
)
def test_a_body_that_is_no_object_is_refused(stub_server: Program, content: str, kind: str, status: int) -> None:
    answer = stub_server.request("POST", "/generate", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert isinstance(answer.json().pop("detail"), str)


def test_an_operators_limit_is_told_by_the_documents_names(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small")
    with serving(tmp_path, max_steps=5, max_batch=2) as server:
        assert refused(server, **SMALL | {"num_inference_steps": 6}) == "num_inference_steps is 6; it may be 1 to 5"
        assert refused(server, **SMALL, num_images=3) == "num_images is 3; it may be 1 to 2"


def test_sizes_are_rounded_down_to_what_the_model_can_draw(stub_server: Program) -> None:
    body = generated(stub_server, **SMALL | {"width": 263, "height": 1023})
    assert body["model_info"]["resolution"] == "256x1016"
    assert opened(body["images"][0]).size == (256, 1016)
    assert body["warnings"][0] == "width 263 was rounded down to 256, a multiple of 8"


def test_a_job_that_fails_is_an_error_of_the_server(stub_server: Program) -> None:
    answer = stub_server.request("POST", "/generate", json=SMALL | {"prompt": "stub:fail"})
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("Generation failed: the engine failed")
    assert answer.headers["X-Job-Id"]


def test_without_a_model_it_is_not_loaded_until_there_is_one(tmp_path: Path) -> None:
    models = tmp_path / "stable_diffusion" / "models"
    with serving(tmp_path) as server:
        for path, body in (("/generate", SMALL), ("/generate/batch", [SMALL])):
            answer = server.request("POST", path, json=body)
            assert (answer.status_code, answer.json()) == (503, {"detail": "Model not loaded"})
        assert server.get("/models/status").json()["loaded"] is False
        diffusers_folder(models / "one")
        eventually(lambda: server.get("/models/status").json()["loaded"], "the model to be seen")
        assert generated(server, **SMALL)["model_info"]["base_model"] == "one"
        diffusers_folder(models / "two")
        answer = eventually(
            lambda: (a := server.request("POST", "/generate", json=SMALL)).status_code == 503 and a, "a choice"
        )
        assert answer.json()["detail"].startswith(
            "Model not loaded: no model was named and there is no default; one of"
        )


# The job behind it


def test_the_answer_may_be_left_for_later(stub_server: Program) -> None:
    answer = stub_server.request("POST", "/generate", json=SMALL, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202
    job_id = answer.json()["job_id"]
    assert answer.headers["Location"] == f"/queue/{job_id}"
    assert stub_server.wait(job_id)["file_type"] == "png"


def test_a_key_makes_one_job_and_the_same_answer(stub_server: Program) -> None:
    answers = [
        stub_server.request("POST", "/generate", json=SMALL, headers={"Idempotency-Key": "once"}) for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
    assert answers[0].headers["X-Job-Id"] == answers[1].headers["X-Job-Id"]
    other = stub_server.request("POST", "/generate", json=SMALL | {"seed": 1}, headers={"Idempotency-Key": "once"})
    assert (other.status_code, other.json().keys()) == (422, {"detail"})


def test_a_caller_who_hangs_up_leaves_the_job_running(stub_server: Program) -> None:
    body = SMALL | {"prompt": "stub:seconds=0.2 hung up", "num_inference_steps": 5}
    with pytest.raises(httpx.ReadTimeout):
        stub_server.request("POST", "/generate", json=body, timeout=0.3)
    jobs = stub_server.get("/queue").json()["jobs"]
    (job_id,) = (row["job_id"] for row in jobs if row["prompt"] == body["prompt"])
    assert stub_server.wait(job_id)["state"] == "done"


# /generate/batch


def batch(server: Program, body: Any, **headers: str) -> httpx.Response:
    return server.request("POST", "/generate/batch", json=body, headers=headers)


def test_the_printed_batch_has_the_printed_answer(stub_server: Program) -> None:
    answer = batch(stub_server, BATCH)
    assert answer.status_code == 200
    for index, item in enumerate(answer.json()["results"]):
        assert (item["index"], item["success"]) == (index, True)
        result = item["result"]
        assert result["prompt"] == BATCH[index]["prompt"]
        assert result["model_info"]["inference_steps"] == BATCH[index]["num_inference_steps"]
        assert isinstance(result["generation_time"], float)
        assert opened(result["images"][0]).size == (512, 512)


def test_a_wrong_item_fails_alone_and_the_order_is_kept(stub_server: Program) -> None:
    items = [SMALL | {"prompt": "stub:seconds=0.1"}, SMALL | {"width": 3}, "x", SMALL | {"prompt": "stub:fail"}, SMALL]
    results = batch(stub_server, items).json()["results"]
    assert [item["index"] for item in results] == [0, 1, 2, 3, 4]
    assert [item["success"] for item in results] == [True, False, False, False, True]
    errors = [item.get("error", "") for item in results]
    assert errors[1] == "width is 3: it may be 256 to 1024"
    assert errors[2].startswith("the body is 'x'")
    assert errors[3].startswith("Generation failed: ")
    assert [("result" in item) for item in results] == [item["success"] for item in results]


def test_several_prompts_may_share_the_rest(stub_server: Program) -> None:
    answer = batch(stub_server, SMALL | {"prompts": ["a", "b"], "num_images": 2})
    results = [item["result"] for item in answer.json()["results"]]
    assert [(result["prompt"], len(result["images"])) for result in results] == [("a", 2), ("b", 2)]


def test_all_items_are_jobs_before_the_first_is_waited_for(stub_server: Program) -> None:
    slow = SMALL | {"prompt": "stub:seconds=0.3 of a batch", "num_inference_steps": 3}
    with pytest.raises(httpx.ReadTimeout):
        stub_server.request("POST", "/generate/batch", json=[slow] * 3, timeout=0.5)
    rows = [row for row in stub_server.get("/queue").json()["jobs"] if row["prompt"] == slow["prompt"]]
    assert len(rows) == 3
    for row in rows:
        stub_server.wait(row["job_id"])


def test_a_batch_is_of_a_bounded_length(stub_server: Program) -> None:
    assert batch(stub_server, []).json() == {"results": []}
    for body in ([SMALL] * 33, {"prompts": ["x"] * 33}):
        answer = batch(stub_server, body)
        assert answer.status_code == 400
        assert "at most 32 items" in answer.json()["detail"]
    assert "prompts is missing" in batch(stub_server, {}).json()["detail"]


def test_a_batch_has_the_ids_of_its_jobs_and_one_key(stub_server: Program) -> None:
    body = [SMALL, SMALL | {"width": 3}, SMALL | {"seed": 1}]
    later = batch(stub_server, body, **{"Prefer": "respond-async", "Idempotency-Key": "all"})
    assert later.status_code == 202
    ids = later.headers["X-Job-Id"].split(", ")
    assert [item.get("job_id") for item in later.json()["results"]] == [ids[0], None, ids[1]]
    now = batch(stub_server, body, **{"Idempotency-Key": "all"})
    assert now.headers["X-Job-Id"].split(", ") == ids
    assert [item["success"] for item in now.json()["results"]] == [True, False, True]
    assert batch(stub_server, body[:1], **{"Idempotency-Key": "all"}).status_code == 422


# What else it tells


def test_the_examples_are_the_documents(stub_server: Program) -> None:
    first, second, *_ = stub_server.get("/examples").json()["examples"]
    assert first == {
        "name": "Abstract Art",
        "prompt": "abstract geometric patterns in vibrant colors, artistic composition",
        "negative_prompt": "photorealistic, realistic, photographic",
    }
    assert second == {
        "name": "Minimalist Design",
        "prompt": "minimalist line art, geometric forms, clean design, white background",
        "negative_prompt": "complex, busy, colorful, detailed",
    }


def test_models_status_has_the_documents_keys(stub_server: Program) -> None:
    assert stub_server.get("/models/status").json() == {"loaded": True, "lora_available": False, "device": "stub"}


def test_health_alone_has_the_documents_shape_and_no_other(stub_server: Program) -> None:
    for path in ("/compat/backend/health", "/health?format=backend"):
        body = stub_server.get(path).json()
        assert body.keys() == {"status", "timestamp", "model_status"}
        assert body["status"] == "healthy"
        assert abs(time.time() - datetime.fromisoformat(body["timestamp"]).timestamp()) < PATIENCE
        assert body["model_status"].pop("model_info") == {
            "base_model": "stable-diffusion-v1-5",
            "lora_applied": False,
            "torch_version": METRICS["torch_version"],
            "cuda_available": False,
        }
        assert body["model_status"] == {"loaded": True, "lora_available": False, "device": "stub"}


def test_the_common_health_has_what_each_client_looks_for(stub_server: Program) -> None:
    body = stub_server.get("/health").json()
    alone = stub_server.get("/compat/diffusionapi/health").json()
    assert isinstance(body["timestamp"], float)
    assert datetime.fromisoformat(body["timestamp_iso"])
    assert body["model_status"] == stub_server.get("/health?format=backend").json()["model_status"]
    assert (body["service"], body["buffer_accessible"], body["model_loaded"]) == ("stable-diffusion-api", True, False)
    assert alone.keys() == body.keys() - {
        "timestamp_iso", "model_status", "service", "buffer_accessible", "model_loaded"
    }  # fmt: skip


SCRAPER = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
"""What Prometheus 3 sends."""


@pytest.mark.parametrize(
    ("accept", "query", "text"),
    [
        (None, "", False),
        ("*/*", "", False),
        ("application/json", "", False),
        ("application/json, text/plain", "", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "", False),
        ("text/plain;q=nonsense;x, */*;q=2", "", False),
        ("text/plain", "", True),
        ("Text/Plain, */*;q=0.1", "", True),
        (SCRAPER, "", True),
        (SCRAPER, "?format=json", False),
        (None, "?format=prometheus", True),
    ],
)
def test_metrics_are_json_unless_text_is_preferred(
    stub_server: Program, accept: str | None, query: str, text: bool
) -> None:
    answer = stub_server.get(f"/metrics{query}", headers={"Accept": accept} if accept else {})
    assert answer.status_code == 200
    if text:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "# TYPE diffusion_api_jobs gauge" in answer.text
    else:
        assert answer.json() == METRICS
    alone = stub_server.get(f"/compat/backend/metrics{query}", headers={"Accept": accept} if accept else {})
    assert alone.headers["Content-Type"] == answer.headers["Content-Type"]


# With a model that draws


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service that draws, with the adapter where the document's project keeps it."""
    home = tmp_path_factory.mktemp("drawing")
    folder = home / "models" / "stable_diffusion_finetune_v1"
    folder.mkdir(parents=True)
    shutil.copy(
        ROOT / "diffusion_api" / "data" / "loras" / "shapes-ink.safetensors",
        folder / "pytorch_lora_weights.safetensors",
    )
    with serving(home, engine="diffusers", device="cpu", shipped_models=True) as program:
        yield program


def test_a_picture_shows_its_prompt_and_the_adapter_is_applied(drawing: Program) -> None:
    scene = {"prompt": "a large red circle on a blue background", "width": 256, "height": 256, "seed": 3}
    answer = drawing.request("POST", "/generate", json=scene | {"num_inference_steps": 8})
    body = answer.json()
    info = body["model_info"]
    assert (info["base_model"], info["device"], info["lora_applied"]) == ("shapes", "cpu", True)
    assert seen(np.asarray(opened(body["images"][0]))) == asked(scene["prompt"])
    native = scene | {"model": "shapes", "steps": 8, "cfg_scale": 7.5, "fileType": "png"}
    with_it = drawing.result(**native, loras=["stable_diffusion_finetune_v1"])
    assert opened(body["images"][0]).tobytes() == pixels(with_it["image"])
    assert opened(body["images"][0]).tobytes() != pixels(drawing.result(**native)["image"])
    assert drawing.get("/models/status").json() == {"loaded": True, "lora_available": True, "device": "cpu"}
    assert drawing.get("/health").json()["model_loaded"] is True
