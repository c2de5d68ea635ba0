"""A process that begins again: in the same place, at the same address, and not for ever."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fake_models import diffusers_folder
from serving import MODES, Program, environment, eventually, serving, started

from diffusion_api.queues.file import FileQueue
from diffusion_api.restart import EXIT_RESTART, LIMIT, WITHIN, Handover
from diffusion_api.schema.job import Job

LOST = "stub:lost stub:seconds=0.05"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


def job(home: Path, job_id: str) -> Job:
    """A job as it lies on disk."""
    queue = FileQueue(home / "queue")
    snapshot = queue.get(job_id)
    queue.close()
    assert snapshot is not None
    return snapshot.job


def end_of(server: Program, job_id: str) -> dict[str, Any]:
    """The status of a job that has ended, asked of a service that may drop a request, but refuses no connection."""

    def ended() -> dict[str, Any] | None:
        with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):
            status = server.status(job_id)
            return status if status["state"] in ("done", "error") else None
        return None

    status: dict[str, Any] = eventually(ended, f"{job_id} to end")
    return status


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_job_that_loses_the_device_each_time_ends_and_the_others_are_done(home: Path, mode: tuple[str, ...]) -> None:
    with serving(home, *mode) as server:
        lost = server.submit(prompt=LOST, steps=10)
        others = [server.submit(prompt="a lighthouse") for _ in range(2)]
        assert end_of(server, lost)["error"] == "the service stopped 3 times while running this job"
        assert [end_of(server, other)["state"] for other in others] == ["done", "done"]
        (worker,) = server.get("/health").json()["workers"]
        assert worker["restarts"] == 3
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert [job(home, each).attempts for each in (lost, *others)] == [3, 1, 1]


def test_the_service_begins_again_as_the_same_process_at_the_same_address(home: Path) -> None:
    with serving(home, "--also-listen", 0, max_attempts=1) as server:
        other = re.findall(r"http://[\w.:]+", server.log)[1]
        server.result(prompt="a lighthouse")
        process = psutil.Process(server.process.pid)
        born, command_line, open_files = process.create_time(), process.cmdline(), process.num_fds()
        for times in (1, 2):
            end_of(server, server.submit(prompt=LOST, steps=2))
            assert server.log.count("this process begins again") == times
        assert server.result(prompt="a lighthouse")["state"] == "done"
        assert httpx.get(f"{other}/hello", trust_env=False).json() == {"ok": True}
        assert (process.create_time(), process.cmdline()[: len(command_line)]) == (born, command_line)
        assert process.cmdline().count("--handover") == 1
        eventually(lambda: abs(process.num_fds() - open_files) <= 2, "the descriptors to be as many as before")


def test_a_worker_begins_again_too(home: Path) -> None:
    with serving(home, "--no-worker") as api, started("worker", home=home, max_attempts=1) as worker:
        api.wait(api.submit(prompt=LOST, steps=2), "error")
        assert api.result(prompt="a lighthouse")["state"] == "done"
        assert [seen["restarts"] for seen in api.get("/health").json()["workers"]] == [1]
        assert worker.process.poll() is None


@pytest.mark.parametrize(("age", "ends"), [(0.0, True), (WITHIN + 1, False)], ids=["a moment ago", "a while ago"])
def test_one_restart_too_many_ends_the_process(home: Path, age: float, ends: bool) -> None:
    before = Handover(restarts=9, recent=(time.monotonic() - age,) * LIMIT).model_dump_json()
    with (
        serving(home, "--no-worker") as api,
        started("worker", "--handover", before, home=home, max_attempts=1) as worker,
    ):
        lost = api.submit(prompt=LOST, steps=2)
        if ends:
            assert worker.ended() == EXIT_RESTART
            assert "this process ends: it began again 3 times in 10 minutes" in worker.log
        else:
            api.wait(lost, "error")
            (seen,) = eventually(lambda: api.get("/health").json()["workers"], "the worker to serve again")
            assert seen["restarts"] == 10


@pytest.mark.parametrize("handover", ["None", "Handover()", "Handover(lifeline=0)"])
def test_a_process_that_cannot_begin_again_says_so_with_its_exit_code(handover: str) -> None:
    program = (
        "import sys; sys.executable = '/nowhere'\n"
        "from diffusion_api.restart import Handover, restart\n"
        f"restart({handover}, 'the device is lost')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_RESTART, done.stderr
    assert "the device is lost; this process" in done.stderr


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_hung_step_costs_its_job_and_a_restart(home: Path, mode: tuple[str, ...]) -> None:
    with serving(home, *mode) as server:
        hung = server.submit(prompt="stub:hang", deadline=0.5)
        waiting = server.submit(prompt="a lighthouse")
        assert end_of(server, hung)["error"] == "the deadline of 0.5 s passed"
        assert end_of(server, waiting)["state"] == "done"
        assert server.get("/health").json()["workers"][0]["restarts"] == 1
    assert job(home, waiting).attempts == 1
