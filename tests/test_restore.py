"""The lines of docs/operating.md that a tired person copies: backup, restore, bringing back what was set aside."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_models import diffusers_folder
from serving import ROOT, Program, eventually, serving

from diffusion_api.dialects.native.examples import PICTURE
from diffusion_api.schema.job import VERSION


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


def documented(name: str, home: Path, **variables: object) -> str:
    """Run the lines of that name as they stand in the guide; what they said."""
    text = (ROOT / "docs" / "operating.md").read_text("utf-8")
    found = re.search(rf"<!-- {name} -->\n```bash\n(.*?)```\n<!-- /{name} -->", text, re.DOTALL)
    assert found
    settings = {key: str(value) for key, value in variables.items()}
    done = subprocess.run(
        ["bash", "-u", "-c", found[1]], cwd=home, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    return done.stderr


def submit(server: Program, n: int, **fields: object) -> str:
    """A job with a key of its own."""
    body = {"prompt": f"stub:seconds=0.02 {n}", "steps": 3, "seed": n, "fileType": "png"} | fields
    answer = server.request("POST", "/txt2img", json=body, headers={"Idempotency-Key": f"key-{n}"})
    assert answer.status_code == 200, answer.text
    job_id: str = answer.json()["job_id"]
    return job_id


def outcome(status: dict[str, Any]) -> tuple[bytes, Any]:
    return base64.b64decode(status["image"]), status["payload"]


def lose(home: Path) -> None:
    """What a backup is for."""
    queue = home / "queue"
    for path in (*queue.rglob("*.json"), *(queue / "inputs").iterdir(), *(home / "outputs").glob("*.png")):
        path.write_bytes(b"lost")


def test_a_backup_of_a_service_that_works_restores_all_of_it(home: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    with serving(home) as server:
        done = [submit(server, n) for n in range(5)]
        before = {job_id: outcome(server.wait(job_id)) for job_id in done}
        failed, cancelled = submit(server, 5, prompt="stub:fail"), submit(server, 6, priority=-9)
        server.request("DELETE", f"/queue/{cancelled}")
        server.wait(failed, "error")
        waiting = [submit(server, n) for n in range(10, 40)]
        brought = server.request("POST", "/img2img", json={"prompt": "a lighthouse", "image": PICTURE})
        waiting.append(brought.json()["job_id"])
        server.wait(waiting[2])
        documented("backup", home, BACKUP=backup)
        left = [job_id for job_id in waiting if server.status(job_id)["state"] != "done"]
        assert len(left) > 5, "the service was to be at work until the copy was made"
        server.kill()
    lose(home)
    assert documented("restore", home, BACKUP=backup) == ""
    with serving(home) as server:
        order = [server.wait(job_id)["job_id"] for job_id in waiting]
        assert order == waiting
        assert {job_id: outcome(server.status(job_id)) for job_id in done} == before
        assert server.status(failed)["state"] == "error"
        assert server.status(cancelled)["error"] == "cancelled"
        assert [submit(server, n) for n in range(5)] == done
        assert [submit(server, n) for n in range(10, 40)] == waiting[:-1]
        assert server.get("/health").json()["queue"]["active_jobs"] == 0
    assert len(list((home / "queue" / "done").iterdir())) == len(done) + len(waiting)
    assert list((home / "queue" / "error").glob("*.unreadable")) == []
    assert (home / "queue.before").is_dir()


def test_a_backup_of_a_service_that_has_stopped_is_the_same(home: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    with serving(home, grace=0.1) as server:
        done = server.wait(submit(server, 1))
        running, waiting = submit(server, 2, prompt="stub:seconds=0.2", steps=20), submit(server, 3)
        server.wait(running, "processing")
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert documented("backup", home, BACKUP=backup) == ""
    lose(home)
    assert documented("restore", home, BACKUP=backup) == ""
    with serving(home) as server:
        assert outcome(server.status(done["job_id"])) == outcome(done)
        assert {server.wait(job_id)["state"] for job_id in (running, waiting)} == {"done"}


def test_jobs_that_were_set_aside_are_brought_back(home: Path) -> None:
    with serving(home, "--no-worker") as server:
        newer, fine = submit(server, 1), submit(server, 2)
    (path,) = (home / "queue" / "queued").glob(f"*{newer}.json")
    record = path.read_text()
    path.write_text(json.dumps(json.loads(record) | {"version": VERSION + 1}))
    with serving(home) as server:
        server.wait(fine)
        aside = home / "queue" / "error" / f"{path.name}.unreadable"
        eventually(aside.exists, "the record to be set aside")
        assert server.get(f"/queue/{newer}").status_code == 404
        assert "newer release" in eventually(aside.with_suffix(".reason").read_text)
    aside.write_text(record)  # as the next release can read it
    assert documented("bring back", home) == ""
    with serving(home) as server:
        assert server.wait(newer)["state"] == "done"
    assert list((home / "queue" / "error").iterdir()) == []
