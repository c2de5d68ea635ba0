"""The policy about flagged pictures over HTTP, the same for every API, with an engine that draws none."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_models import diffusers_folder
from PIL import Image
from serving import Program, eventually, run, serving

FLAGGED = "stub:unsafe"
POLICIES = ("off", "blur", "refuse", "required")


def install(home: Path) -> None:
    """A checker's files; the stub engine looks at none of them."""
    folder = home / "stable_diffusion" / "safety_checker"
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).touch()


@contextmanager
def guarded(home: Path, policy: str, *, installed: bool = True) -> Iterator[Program]:
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    if installed:
        install(home)
    with serving(home, safety=policy, enable_public_access=1) as server:
        yield server


@pytest.fixture(scope="module", params=POLICIES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with guarded(tmp_path_factory.mktemp(request.param), request.param) as program:
        yield program


@pytest.fixture
def policy(server: Program) -> str:
    told: str = server.get("/health").json()["safety"]["policy"]
    return told


def ended(server: Program, path: str = "/txt2img", **fields: Any) -> dict[str, Any]:
    """A job as it ended, whatever its end."""
    body = {"prompt": "a lighthouse", "model": "small", "steps": 2, "seed": 7, "fileType": "png"} | fields
    answer = server.request("POST", path, json=body)
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["job_id"]
    found: dict[str, Any] = eventually(
        lambda: (status := server.status(job_id))["state"] in ("done", "error") and status, "the job to end"
    )
    return found


def sharpness(encoded: str) -> float:
    """The largest step between two pixels side by side: the stub's pictures are made of squares, and a blur of slopes."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return float(np.abs(np.diff(np.asarray(image.convert("L"), float), axis=1)).max())


def test_each_policy_does_what_it_says(server: Program, policy: str) -> None:
    flagged, spared = ended(server, prompt=FLAGGED), ended(server)
    applied = "refuse" if policy == "required" else policy
    assert spared["safety"] == {"applied": applied, "flagged": [] if policy == "off" else [False]}
    assert spared["state"] == "done"
    assert sharpness(spared["image"]) > 20
    if applied == "refuse":
        assert flagged["state"] == "error"
        assert flagged["error"].startswith("the safety checker flagged a picture")
        assert "image" not in flagged
        assert list((server.home / "outputs").glob(f"{flagged['job_id']}*")) == []
        assert server.get(f"/queue/{flagged['job_id']}/image").status_code == 404
    else:
        assert flagged["safety"] == {"applied": applied, "flagged": [] if policy == "off" else [True]}
        assert (sharpness(flagged["image"]) < 10) == (policy == "blur")


def test_a_request_may_be_stricter_than_the_operator_and_never_milder(server: Program, policy: str) -> None:
    stricter, milder = (ended(server, prompt=FLAGGED, safety_filter=asked) for asked in (True, False))
    if policy in ("refuse", "required"):
        assert (stricter["state"], milder["state"]) == ("error", "error")
    else:
        assert stricter["safety"] == {"applied": "blur", "flagged": [True]}
        assert milder["safety"]["applied"] == policy
    told = f"safety_filter: false changes nothing, as the operator's policy is {policy}"
    assert milder.get("warnings", []) == ([] if policy == "off" else [told])


def test_each_picture_of_a_job_is_judged_alone(server: Program, policy: str) -> None:
    status = ended(server, prompt="stub:unsafe=2", n=3)
    if policy == "blur":
        assert status["safety"]["flagged"] == [False, True, False]
        assert [sharpness(image) < 10 for image in status["images"]] == [False, True, False]
    if policy in ("refuse", "required"):
        assert status["state"] == "error"
        assert list((server.home / "outputs").glob(f"{status['job_id']}*")) == []


def test_every_route_that_makes_pictures_keeps_the_policy(server: Program, policy: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    for path, fields in (("/img2img", {}), ("/inpaint", {"mask": picture}), ("/upscale", {"prompt": "a lighthouse"})):
        status = ended(server, path, image=picture, **fields)
        assert status["safety"]["applied"] == ("refuse" if policy == "required" else policy)


def test_the_backend_api_keeps_the_policy(server: Program, policy: str) -> None:
    asked = {"prompt": FLAGGED, "width": 512, "height": 512, "num_inference_steps": 2}
    answer = server.request("POST", "/generate", json=asked)
    made = server.status(answer.headers["X-Job-Id"])
    if policy in ("refuse", "required"):
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith("the safety checker flagged a picture")
    else:
        assert answer.status_code == 200
        assert made["safety"] == {"applied": policy, "flagged": [] if policy == "off" else [True]}


def test_the_task_api_keeps_the_policy_and_says_what_its_filter_did(server: Program, policy: str) -> None:
    def ask(prompt: str, wanted: bool) -> httpx.Response:
        return server.get("/txt2img", params={"prompt": prompt, "steps": 2, "model": "small", "safety_filter": wanted})

    for wanted in (True, False):
        answer = ask("a lighthouse", wanted)
        assert answer.status_code == 200, answer.text
        assert answer.json()["parameters_used"]["safety_filter"] is (wanted or policy != "off")
        flagged = ask(FLAGGED, wanted)
        assert flagged.status_code == (500 if policy in ("refuse", "required") else 200)
        if flagged.status_code == 500:
            assert "the safety checker flagged a picture" in flagged.json()["detail"]


def test_nothing_is_seen_of_a_picture_before_it_was_checked(server: Program, policy: str) -> None:
    job_id = server.submit(prompt="stub:seconds=0.05 stub:unsafe", model="small", steps=10, preview_every=1)
    with server._client.stream("GET", f"/queue/{job_id}/events") as events:
        heard = "".join(events.iter_text())
    assert ("event: preview" in heard) == (policy == "off")


def test_a_job_that_is_made_again_is_made_under_todays_policy(server: Program, policy: str) -> None:
    first = ended(server)
    answer = server.request("POST", f"/queue/{first['job_id']}/reproduce")
    again = server.wait(answer.json()["job_id"])
    assert again["reproduces"]["matched"]
    assert again["safety"] == first["safety"]


def test_capabilities_tell_policy_and_checker(server: Program, policy: str) -> None:
    assert server.get("/capabilities?model=small").json()["safety"] == {"policy": policy, "checker": True}
    assert server.get("/health").json()["safety"] == {"policy": policy, "checker": True}


def test_the_doctor_tells_them_too(server: Program, policy: str) -> None:
    done = run("doctor", "--home", server.home, cwd=server.home, engine="stub", shipped_models=False, safety=policy)
    assert f"policy {policy}; checker: stable_diffusion/safety_checker" in done.stdout


# Without a checker


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_checker_only_required_refuses_and_nothing_pretends(tmp_path: Path, policy: str) -> None:
    with guarded(tmp_path, policy, installed=False) as server:
        assert server.get("/health").json()["safety"] == {"policy": policy, "checker": False}
        if policy == "required":
            for dry in (False, True):
                refused = server.post(prompt="a lighthouse", dry_run=dry)
                assert refused.status_code == 503
                assert "stable_diffusion/safety_checker/" in refused.json()["detail"]
            assert server.get("/queue").json()["jobs"] == []
            install(tmp_path)  # noticed while it runs
            assert ended(server, prompt=FLAGGED)["state"] == "error"
            return
        for asked in (None, True):
            status = ended(server, prompt=FLAGGED, safety_filter=asked)
            assert status["safety"] == {"applied": "off", "flagged": []}
            told = ["no picture was checked: no safety checker is installed"]
            assert status.get("warnings", []) == ([] if policy == "off" and not asked else told)
        done = run("doctor", "--home", tmp_path, cwd=tmp_path, engine="stub", shipped_models=False, safety=policy)
        assert f"policy {policy}; checker: none for all models" in done.stdout
        assert ("their pictures are not checked" in done.stdout) == (policy != "off")


def test_a_job_outlives_a_kill_under_the_stricter_policy_of_two(tmp_path: Path) -> None:
    asked: dict[str, Any] = dict(prompt=f"{FLAGGED} stub:seconds=0.05", model="small", steps=20, seed=7, fileType="png")
    with guarded(tmp_path, "blur") as server:
        whole = ended(server, **asked)
        job_id = server.submit(**asked)
        server.wait(job_id, "processing")
        server.kill()
    with serving(tmp_path, safety="off") as server:
        again = server.wait(job_id)
        assert again["safety"] == whole["safety"] == {"applied": "blur", "flagged": [True]}
        assert again["image"] == whole["image"]
        milder = server.submit(**asked)
        server.wait(milder, "processing")
        server.kill()
    with serving(tmp_path, safety="refuse"):
        record = tmp_path / "queue" / "error" / f"{milder}.json"
        eventually(record.exists, "its end")
        assert json.loads(record.read_text())["error"]["kind"] == "UnsafePicture"
