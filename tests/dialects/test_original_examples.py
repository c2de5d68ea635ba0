"""Every example of the original API's two manuals, as printed there: what is sent, what is answered, what its types say."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_models import ESRGAN_KEYS, LORA_KEYS, REFINER_KEYS, SD1_KEYS, SDXL_KEYS, checkpoint, diffusers_folder
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving import PATIENCE, Program, eventually, serving

PRINTED = "http://localhost:8000"
LABELS = {
    "Amanatsu": "John6666__amanatsu-illustrious-v11-sdxl",
    "ChikMix V3": "models--digiplay--ChikMix_V3",
    "Ilustmix": "models--John6666--ilustmix-v6-sdxl",
    "MeinaMix V11": "models--Meina--MeinaMix_V11",
    "Pastel Mix": "models--mirroring--pastel-mix",
    "PlantMilk (HempII)": "models--misri--plantMilkModelSuite_hempII",
    "PlantMilk (Walnut)": "models--misri--plantMilkModelSuite_walnut",
}
SAMPLERS = [
    *("Euler", "Euler a", "Heun", "DPM2", "DPM++ 2S a", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ SDE", "DPM++ SDE Karras"),
    *("DPM fast", "DPM adaptive", "LMS", "LMS Karras", "DDIM", "PLMS", "UniPC"),
]
SCHEDULES = ["default", "karras", "exponential", "ddim", "pndm"]

FOREST: dict[str, Any] = {
    "prompt": "a beautiful green forest with a river and a waterfall",
    "negative_prompt": "blurry, bad quality",
    "steps": 30,
    "cfg_scale": 7.0,
    "width": 1024,
    "height": 1024,
    "model": "stable-diffusion-v1-5",
    "sampler_name": "DPM++ 2M Karras",
    "fileType": "jpg",
    "jpeg_quality": 85,
    "loras": [{"name": "my-lora", "scale": 0.8}],
    "hires": {"enabled": True, "scale": 2.0, "upscaler": "Latent", "steps": 20, "denoising_strength": 0.4},
}
REFINED: dict[str, Any] = {
    "prompt": "a beautiful landscape, high quality, detailed",
    "negative_prompt": "blurry, low quality, distorted",
    "steps": 30,
    "cfg_scale": 7.0,
    "width": 512,
    "height": 512,
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "sampler_name": "DPM++ 2M Karras",
    "fileType": "png",
    "refiner_checkpoint": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "refiner_switch_at": 0.8,
    "seed": 42,
}
CITY: dict[str, Any] = REFINED | {
    "prompt": "a futuristic cityscape with neon lights, cyberpunk style",
    "image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA...",
    "denoising_strength": 0.7,
}
INFOTEXT = """\
a beautiful landscape with mountains and trees, masterpiece, best quality
Negative prompt: blurry, low quality, distorted
Steps: 30, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.0, Seed: 123456789, Size: 512x512, \
Model: stable-diffusion-v1-5, Model hash: a1b2c3d4e5f6, VAE: vae-ft-mse-840000-ema-pruned, VAE hash: f6e5d4c3b2a1, \
Denoising strength: 0.75, Clip skip: 2, Face restoration: CodeFormer, LoRAs: anime_style:0.8, detail_enhancer:0.6, \
Memory before: 2048.5 MB, Memory after: 3072.1 MB, Generation time: 12.34s, User: test_user, Version: DiffusionAPI v1.0"""

LIST_LABELS = """
import requests

response = requests.get("http://localhost:8000/models/aliases")
models = response.json()
for model in models['models']:
    print(f"{model['label']} → {model['name']}")
"""
TXT2IMG = """
import requests

payload = {
    "prompt": "a beautiful landscape",
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "refiner_checkpoint": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "refiner_switch_at": 0.8,
    "steps": 30
}

response = requests.post("http://localhost:8000/txt2img", json=payload)
"""
IMG2IMG = """
import requests
import base64
from PIL import Image
import io

# Load and encode input image
image = Image.open("input.png")
buffer = io.BytesIO()
image.save(buffer, format='PNG')
image_b64 = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

payload = {
    "prompt": "a futuristic cityscape",
    "image": image_b64,
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "refiner_checkpoint": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "refiner_switch_at": 0.8,
    "denoising_strength": 0.7,
    "steps": 30
}

response = requests.post("http://localhost:8000/img2img", json=payload)
"""

NUMBER = (int, float)
STATUS: dict[str, Any] = {"status": str, "job_id": str, "progress": NUMBER, "current_phase": str, "state": str}
COMPLETE: dict[str, Any] = STATUS | {
    "payload": dict,
    "image": str,
    "output_path": str,
    "width": int,
    "height": int,
    "file_type": str,
    "generation_time_sec": NUMBER,
    "memory_before_mb": NUMBER,
    "memory_after_mb": NUMBER,
    "seed": int,
}
"""``QueueStatusResponse`` of both, "only when complete" included."""

HEALTH: dict[str, Any] = {
    "status": str,
    "timestamp": NUMBER,
    "version": str,
    "system": {
        "cpu_count": int,
        "memory_total_gb": NUMBER,
        "memory_available_gb": NUMBER,
        "memory_percent": NUMBER,
        "disk_usage_percent": NUMBER,
    },
    "gpu": {"device_name": str},
    "models": {"count": int, "directory": str},
    "loras": {"count": int, "directory": str},
    "queue": {"active_jobs": int, "directory": str},
    "outputs": {"available": bool, "free_space_gb": NUMBER, "directory": str},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with all that the manuals name."""
    home = tmp_path_factory.mktemp("printed")
    own = home / "stable_diffusion"
    checkpoint(own / "models" / "stable-diffusion-v1-5.safetensors", SD1_KEYS)
    checkpoint(own / "models" / "stable-diffusion-xl-base-1.0.safetensors", SDXL_KEYS)
    hub = own / "models" / "models--stabilityai--stable-diffusion-xl-base-1.0"
    diffusers_folder(hub, pipeline="StableDiffusionXLPipeline")
    checkpoint(own / "models" / "stabilityai" / "stable-diffusion-xl-refiner-1.0.safetensors", REFINER_KEYS)
    for name in LABELS.values():
        diffusers_folder(own / "models" / name, sample_size=8)
    for name in ("my-lora", "another-lora"):
        checkpoint(own / "loras" / f"{name}.safetensors", LORA_KEYS)
    checkpoint(own / "upscalers" / "ESRGAN_4x.pth", ESRGAN_KEYS)
    Image.new("RGB", (64, 64), "teal").save(home / "input.png")
    with serving(home) as program:
        yield program


def fits(answer: dict[str, Any], type_: dict[str, Any]) -> bool:
    """Whether an answer has each field of a type, and of that kind."""
    for name, kind in type_.items():
        assert name in answer, name
        if isinstance(kind, dict):
            assert fits(answer[name], kind)
        else:
            assert isinstance(answer[name], kind), (name, answer[name])
    return True


def posted(server: Program, path: str, body: dict[str, Any]) -> str:
    """The id of a job that was taken without a word of warning."""
    answer = server.request("POST", path, json=body)
    assert answer.status_code == 200, answer.text
    taken = answer.json()
    assert fits(taken, {"job_id": str, "status": str})
    assert taken["status"] == "queued"
    assert taken.get("warnings", []) == []
    return str(taken["job_id"])


def python(program: str, server: Program) -> str:
    """What a program of the manual prints, which differs by the address alone, and by what is said after it."""
    done = subprocess.run(
        [sys.executable, "-c", program.replace(PRINTED, server.url)],
        cwd=server.home,
        env={"NO_PROXY": "*", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hello_and_health(server: Program) -> None:
    assert server.get("/hello").json() == {"ok": True}
    answer = server.get("/health").json()
    assert fits(answer, HEALTH)
    assert answer["status"] in ("healthy", "warning", "error")
    assert (answer["loras"]["count"], answer["outputs"]["available"]) == (2, True)


def test_the_models_of_both_manuals_are_listed(server: Program) -> None:
    answer = server.get("/models").json()
    assert answer["status"] == "success"
    assert all(fits(row, dict.fromkeys(("name", "label", "type", "path"), str)) for row in answer["models"])
    rows = {row["name"]: row for row in answer["models"]}
    for name, kind in (("stable-diffusion-v1-5", "standard"), ("stable-diffusion-xl-base-1.0", "sdxl")):
        assert (rows[name]["type"], rows[name]["path"]) == (kind, f"stable_diffusion/models/{name}.safetensors")
    assert {rows[name]["label"]: name for name in LABELS.values()} == LABELS


def test_loras_and_upscalers_are_listed(server: Program) -> None:
    loras = server.get("/loras").json()
    assert loras["status"] == "success"
    assert [(row["name"], row["scale"]) for row in loras["loras"]] == [("another-lora", 1.0), ("my-lora", 1.0)]
    upscalers = server.get("/upscalers").json()
    assert upscalers["status"] == "success"
    found = [(row["name"], row["path"]) for row in upscalers["upscalers"]]
    assert found[0] == ("Latent", "internal")
    assert ("ESRGAN_4x", "stable_diffusion/upscalers/ESRGAN_4x.pth") in found


def test_the_samplers_and_schedules_go_first_in_their_order_and_are_taken(server: Program) -> None:
    answer = server.get("/sampling_methods").json()
    assert answer["status"] == "success"
    assert answer["sampling_methods"][: len(SAMPLERS)] == SAMPLERS
    assert answer["scheduler_types"][: len(SCHEDULES)] == SCHEDULES
    body = {"prompt": "x", "model": "Amanatsu", "steps": 1}
    jobs = [posted(server, "/txt2img", body | {"sampler_name": name}) for name in SAMPLERS]
    jobs += [posted(server, "/txt2img", body | {"scheduler_type": name}) for name in SCHEDULES]
    for job in jobs:
        server.wait(job)


def test_the_labels_are_told_by_curl_and_by_the_program(server: Program) -> None:
    command = "curl http://localhost:8000/models/aliases".replace(PRINTED, server.url).split()
    told = subprocess.run([*command, "--silent", "--noproxy", "*"], capture_output=True, timeout=PATIENCE, check=True)
    answer = server.get("/models/aliases").json()
    assert told.stdout == server.get("/models/aliases").content
    assert (answer["status"], type(answer["message"])) == ("success", str)
    lines = python(LIST_LABELS, server).splitlines()
    assert lines == sorted(lines, key=str.lower)
    assert {f"{label} → {name}" for label, name in LABELS.items()} <= {*lines}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_the_model(server: Program, label: str) -> None:
    body = {"prompt": "a beautiful anime girl", "model": label}
    first, second = (
        server.wait(posted(server, "/txt2img", body | {"model": model, "seed": 1, "fileType": "png"}))
        for model in (label, LABELS[label])
    )
    assert first["image"] == second["image"]
    assert server.wait(posted(server, "/txt2img", body))["payload"] == body


def test_the_forest_in_two_passes(server: Program) -> None:
    job_id = posted(server, "/txt2img", FOREST)
    done = server.wait(job_id)
    assert fits(done, COMPLETE)
    assert {name: done[name] for name in ("status", "job_id", "progress", "current_phase", "state", "error")} == {
        **{"status": "success", "job_id": job_id, "progress": 100},
        **{"current_phase": "done", "state": "done", "error": None},
    }
    assert done["payload"] == FOREST
    assert (done["file_type"], done["jpeg_quality"]) == ("jpg", 85)
    assert done["output_path"].startswith("outputs/")
    assert done["output_path"].endswith(f"{job_id}.jpg")
    assert (server.home / done["output_path"]).read_bytes() == base64.b64decode(done["image"])
    assert (done["width"], done["height"]) == (2048, 2048)


def test_loras_may_be_objects_and_names(server: Program) -> None:
    loras = [{"name": "my-lora", "scale": 0.8}, "another-lora"]
    body = {"prompt": "x", "model": "Amanatsu", "steps": 1, "loras": loras}
    assert server.wait(posted(server, "/txt2img", body))["payload"]["loras"] == loras


def test_a_landscape_with_the_refiner(server: Program) -> None:
    done = server.wait(posted(server, "/txt2img", REFINED))
    assert fits(done, COMPLETE)
    assert (done["seed"], done["file_type"], done["width"], done["height"]) == (42, "png", 512, 512)
    assert done["payload"] == REFINED
    assert "warnings" not in done


def test_a_city_from_a_picture_with_the_refiner(server: Program) -> None:
    refused = server.request("POST", "/img2img", json=CITY)  # printed shortened, which is no picture
    assert refused.status_code == 400
    assert refused.json()["status"] == "error"
    assert refused.json()["detail"].startswith("image")
    url = f"data:image/png;base64,{base64.b64encode((server.home / 'input.png').read_bytes()).decode()}"
    done = server.wait(posted(server, "/img2img", CITY | {"image": url}))
    assert fits(done, COMPLETE)
    assert (done["seed"], done["file_type"], done["width"], done["height"]) == (42, "png", 512, 512)


@pytest.mark.parametrize(("program", "path"), [(TXT2IMG, "/txt2img"), (IMG2IMG, "/img2img")])
def test_the_programs_with_the_refiner_run_as_printed(server: Program, program: str, path: str) -> None:
    job_id = python(program + "print(response.json()['job_id'])", server).strip()
    done = server.wait(job_id)
    assert fits(done, COMPLETE)
    assert done["payload"]["refiner_switch_at"] == 0.8
    assert "warnings" not in done


def test_loras_are_ignored_for_a_picture_that_came_along(server: Program) -> None:
    image = base64.b64encode((server.home / "input.png").read_bytes()).decode()
    body = {"prompt": "x", "image": image, "model": "Amanatsu", "steps": 1, "loras": ["my-lora"]}
    answer = server.request("POST", "/img2img", json=body)
    assert (answer.status_code, len(answer.json()["warnings"])) == (200, 1)
    assert "loras_applied" not in server.wait(answer.json()["job_id"])


def test_a_job_that_runs_says_how_far_it_is(server: Program) -> None:
    job_id = posted(server, "/txt2img", {"prompt": "stub:seconds=0.1", "model": "Amanatsu", "steps": 100})

    def half_way() -> dict[str, Any] | None:
        status = server.status(job_id)
        return status if 0 < status["progress"] < 100 else None

    status = eventually(half_way, "progress")
    assert fits(status, STATUS)
    assert (status["status"], status["state"], status["error"]) == ("success", "processing", None)
    assert not {"payload", "image", "output_path"} & status.keys()
    server.request("DELETE", f"/queue/{job_id}")


def test_the_infotext_of_the_manual_is_read(server: Program) -> None:
    file, texts = io.BytesIO(), PngInfo()
    texts.add_text("parameters", INFOTEXT)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=texts)
    told = server.request("POST", "/img-info", json={"image": base64.b64encode(file.getvalue()).decode()}).json()
    assert (told["status"], told["info"]) == ("success", INFOTEXT)
    fields = told["parameters"]
    assert (fields["Steps"], fields["Sampler"], fields["Schedule type"]) == (30, "Euler a", "Karras")
    assert (fields["Seed"], fields["LoRAs"]) == (123456789, "anime_style:0.8, detail_enhancer:0.6")
    assert (fields["User"], fields["Generation time"]) == ("test_user", "12.34s")
