"""Faults of the engine, seen from outside: a real service, and what its callers are told."""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path

import fake_models
import psutil
import pytest
from fake_models import checkpoint, diffusers_folder
from serving import Program, serving, started

from diffusion_api.schema.job import State, loads


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


def still_works(server: Program) -> None:
    """The same process runs the next job."""
    assert server.result(prompt="a lighthouse")["state"] == "done"
    assert server.process.poll() is None


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        ("oom=2", "out of memory: 64x64 pixels, n 2, model 'small'; ask for a smaller picture"),
        ("oom=load", "out of memory: 64x64 pixels, n 2, model 'small'; ask for a smaller picture"),
        ("nan", "no number"),
        ("fail=1", "the engine failed: RuntimeError; the log has the details"),
    ],
)
def test_a_job_that_fails_is_told_why_and_the_next_one_works(stub_server: Program, hook: str, told: str) -> None:
    job_id = stub_server.submit(prompt=f"a lighthouse stub:{hook}", model="small", n=2, steps=4)
    assert told in stub_server.wait(job_id, "error")["error"]
    still_works(stub_server)


def test_a_job_beyond_the_memory_of_the_process_fails_and_harms_no_other(home: Path) -> None:
    with serving(home) as server:
        within = psutil.Process(server.process.pid).memory_info()
        limit = within.vms + 2**30
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, limit))
        job_id = server.submit(prompt="stub:memory=2000", steps=4)
        assert "out of memory: 64x64 pixels" in server.wait(job_id, "error")["error"]
        still_works(server)
        assert psutil.Process(server.process.pid).memory_info().rss < within.rss + 200 * 2**20


def test_a_model_that_is_damaged_or_missing_is_refused_before_it_becomes_a_job(home: Path) -> None:
    path = checkpoint(home / "stable_diffusion" / "models" / "half.safetensors", fake_models.SD1_KEYS)
    path.write_bytes(path.read_bytes()[:-4])
    with serving(home) as server:
        for model, reason in (("half", "cannot be used: models/half.safetensors has "), ("gone", "is not installed; ")):
            answer = server.post(model=model)
            assert answer.status_code == 400
            assert f"model '{model}' {reason}" in answer.json()["error"]
            assert str(home) not in answer.text
        assert server.get("/health").json()["queue"]["active_jobs"] == 0
        still_works(server)


def test_an_interpreter_that_is_held_costs_no_attempt(home: Path) -> None:
    with serving(home) as server:
        job_id = server.submit(prompt="stub:gil=2", steps=4)
        server.wait(job_id)
    assert ran_once(home, job_id)


def test_an_interpreter_that_a_worker_holds_stops_no_api_of_another_process(home: Path) -> None:
    hold = 3.0
    with serving(home, "--no-worker") as api, started("worker", home=home), started("worker", home=home):
        job_id = api.submit(prompt=f"stub:gil={hold} stub:seconds=0.05", steps=4, fileType="png")
        api.wait(job_id, "processing")
        waits: list[float] = []
        while api.status(job_id)["state"] == "processing":
            began = time.monotonic()
            assert api.get("/health").status_code == 200
            waits.append(time.monotonic() - began)
        assert len(waits) > 3
        assert statistics.median(waits) < hold / 10
        api.wait(job_id)
    assert ran_once(home, job_id)


def ran_once(home: Path, job_id: str) -> bool:
    (path,) = (home / "queue" / "done").rglob(f"*{job_id}.json")
    job = loads(path.read_bytes())
    (picture,) = (path.name for path in (home / "outputs").iterdir() if path.is_file())
    return (job.state, job.attempts) == (State.DONE, 1) and picture.startswith(job_id)
