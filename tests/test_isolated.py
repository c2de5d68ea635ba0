"""``serve --isolated``: the jobs run in a process of their own, which may die in every way while the API answers."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fake_models import diffusers_folder
from serving import Program, environment, eventually, run, serving

from diffusion_api.schema.job import Job, State, loads


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


def slow(seconds: float, steps: int, *hooks: str) -> dict[str, object]:
    prompt = " ".join((f"stub:seconds={seconds}", *hooks))
    return {"prompt": prompt, "steps": steps, "seed": 1, "fileType": "png"}


def record(home: Path, job_id: str) -> Job:
    """A job as it lies on disk, wherever it lies."""

    def found() -> list[Path]:
        return [path for path in (home / "queue").rglob(f"*{job_id}.json") if path.parent.name != "progress"]

    (path,) = eventually(found, "the record")
    return loads(path.read_bytes())


def gone(process: psutil.Process) -> bool:
    """True once nothing of the process runs; who adopts orphans here may take its time to bury them."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def pulse(server: Program) -> Iterator[list[float]]:
    """Ask ``/health`` again and again meanwhile; the seconds that each answer took."""
    took: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            began = time.monotonic()
            assert server.get("/health").status_code == 200
            took.append(time.monotonic() - began)
            time.sleep(0.2)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield took
    finally:
        over.set()
        asking.join()


# Running


def test_the_worker_has_the_folders_and_the_device_of_the_services_flags(home: Path, tmp_path: Path) -> None:
    roots = [tmp_path / "webui", tmp_path / "ComfyUI"]
    flags = [argument for root in roots for argument in ("--models-from", root)]
    with serving(home, "--isolated", "--device", "cpu", *flags) as server:
        line = server.worker().cmdline()
    given = [line[i + 1] for i, argument in enumerate(line) if argument in ("--models-from", "--device")]
    assert given == ["cpu", *map(str, roots)]


def test_jobs_run_in_a_process_of_their_own(home: Path) -> None:
    with serving(home, "--isolated") as server:
        worker = server.worker()
        assert os.getpgid(worker.pid) == worker.pid != os.getpgid(server.process.pid)
        job_id = server.submit(**slow(0.05, 40))
        half = eventually(lambda: (s := server.status(job_id))["progress"] > 0 and s, "progress")
        assert (half["state"], half["current_phase"]) == ("processing", "generation")
        (report,) = server.get("/health").json()["workers"]
        assert (report["state"], report["jobs"]) == ("running", 1)
        done = server.wait(job_id)
        assert base64.b64decode(done["image"]) == (home / done["output_path"]).read_bytes()
        health = server.get("/health").json()
        assert health["gpu"]["device_name"] == "stub"
        assert [(w["device_name"], w["restarts"]) for w in health["workers"]] == [("stub", 0)]
        assert eventually(
            lambda: f"[INFO] [worker {worker.pid}] job {job_id} done" in server.log, "the line of the log"
        )


def test_it_also_runs_isolated_under_uvicorn(home: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "diffusion_api.asgi:app", "--port", "0"]
    settings = environment(home=home, engine="stub", shipped_models=False, isolated=True)
    with (home / "uvicorn.log").open("w") as log:
        process = subprocess.Popen(command, cwd=home, env=settings, stdout=log, stderr=log, text=True)
    try:
        found = eventually(
            lambda: re.search(r"running on (http://\S+)", (home / "uvicorn.log").read_text()), "uvicorn to listen"
        )
        server = Program(process, home, home / "uvicorn.log", found[1])
        worker = server.worker()
        assert server.result(prompt="a lighthouse")["state"] == "done"
        server.signal(signal.SIGTERM)
        server.ended()
        assert gone(worker)
    finally:
        process.kill()
        process.wait()


def test_the_doctor_sees_the_worker(home: Path) -> None:
    with serving(home, "--isolated") as server:
        worker = server.worker()
        found = run("doctor", "--home", home, cwd=home, engine="stub", shipped_models=False)
        assert f"process {worker.pid} on stub: idle, 0 restarts" in found.stdout
    found = run("doctor", "--home", home, cwd=home, engine="stub", shipped_models=False)
    assert (found.returncode, "none runs" in found.stdout) == (0, True)


# Dying


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_ends_is_started_again_while_the_api_answers(home: Path, number: signal.Signals) -> None:
    with serving(home, "--isolated", grace=0) as server:
        first = server.worker()
        job_id = server.submit(**slow(0.1, 12))
        server.wait(job_id, "processing")
        with pulse(server) as took:
            first.send_signal(number)
            status = server.wait(job_id)
        assert took
        second = server.worker()
        assert second.pid != first.pid
        assert server.get("/health").json()["workers"][0]["restarts"] == 1
        assert not psutil.pid_exists(first.pid)
        undisturbed = server.result(**slow(0.1, 12))
    assert status["image"] == undisturbed["image"]
    assert (f"{job_id}: its worker died" in server.log) is (number is not signal.SIGTERM)
    told = "ended, and nobody here had asked it to" if number is signal.SIGTERM else f"was ended by {number.name}"
    assert f"worker process {first.pid} {told}" in server.log
    assert ("Fatal Python error: Segmentation fault" in server.log) is (number is signal.SIGSEGV)


def test_a_poison_job_ends_and_its_neighbour_is_done(home: Path) -> None:
    with serving(home, "--isolated") as server:
        deadly = server.submit(prompt="stub:die", steps=4)
        neighbour = server.submit(prompt="a lighthouse")
        assert server.wait(deadly, "error")["error"] == "the service stopped 3 times while running this job"
        assert server.wait(neighbour)["state"] == "done"
        assert server.process.poll() is None
        assert server.get("/health").json()["workers"][0]["restarts"] == 3
    assert (record(home, deadly).attempts, record(home, neighbour).state) == (3, State.DONE)


def test_the_api_answers_while_the_worker_is_frozen(home: Path) -> None:
    with serving(home, "--isolated") as server:
        worker = server.worker()
        job_id = server.submit(**slow(0.02, 50))
        server.wait(job_id, "processing")
        frozen = 3.0
        with pulse(server) as took:
            worker.suspend()
            time.sleep(frozen)
            (report,) = server.get("/health").json()["workers"]
            worker.resume()
        assert report["state"] == "running"
        assert report["seconds_since_event"] > frozen / 2
        assert max(took) < frozen / 2
        server.wait(job_id)
    assert record(home, job_id).attempts == 1


def test_the_api_answers_while_native_code_holds_the_interpreter_and_the_deadline_ends_that(home: Path) -> None:
    with serving(home, "--isolated", max_attempts=1) as server:
        first = server.worker()
        held = server.submit(prompt="stub:gil=600", deadline=0.2)
        neighbour = server.submit(prompt="a lighthouse")
        server.wait(held, "processing")
        with pulse(server) as took:
            began = time.monotonic()
            assert "the service stopped" in server.wait(held, "error")["error"]
            hold = time.monotonic() - began
        assert max(took) < hold / 2
        assert f"worker process {first.pid} hangs beyond the deadline of its job and is killed" in server.log
        assert server.wait(neighbour)["state"] == "done"


def test_a_worker_that_dies_again_and_again_leaves_no_zombie_and_no_descriptor(home: Path) -> None:
    with serving(home, "--isolated") as server:
        parent = psutil.Process(server.process.pid)
        server.worker()
        server.get("/health")
        before = parent.num_fds()
        for _ in range(3):
            dying = server.worker()
            dying.kill()
            eventually(lambda dying=dying: not psutil.pid_exists(dying.pid), "it to be buried")
        server.worker()
        assert [child.status() for child in parent.children() if child.status() == psutil.STATUS_ZOMBIE] == []
        assert abs(parent.num_fds() - before) <= 2


# The end of the parent


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_worker_dies_with_its_parent(home: Path, number: signal.Signals) -> None:
    with serving(home, "--isolated") as server:
        worker = server.worker()
        job_id = server.submit(**slow(0.1, 150))
        server.wait(job_id, "processing")
        server.signal(number)
        assert server.ended() == -number
        eventually(lambda: gone(worker), "the worker to die")
    assert record(home, job_id).attempts == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_worker_whose_interpreter_is_held_dies_with_its_parent(home: Path) -> None:
    with serving(home, "--isolated") as server:
        worker = server.worker()
        server.submit(prompt="stub:gil=600")

        def held() -> bool:
            (seen,) = server.get("/health").json()["workers"]
            return bool(seen["state"] == "running" and seen["seconds_since_event"] > 2)

        eventually(held, "the interpreter to be held")
        server.kill()
        eventually(lambda: gone(worker), "the worker to die")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_worker_told_by_its_lifeline_alone_dies_too(home: Path, frozen: bool) -> None:
    """Where the kernel does not end the child with its parent, and for one that is frozen, as soon as it is not."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "diffusion_api", "worker", "--engine", "stub"]
    handover = f'{{"lifeline": {reading}}}'
    with (home / "worker.log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--home", home, "--handover", handover], env=environment(), pass_fds=[reading], stderr=log
        )
    os.close(reading)
    eventually(lambda: "worker runs" in (home / "worker.log").read_text(), "the worker to run")
    if frozen:
        child.send_signal(signal.SIGSTOP)
    os.close(writing)
    if frozen:
        child.send_signal(signal.SIGCONT)
    assert child.wait(60) == -signal.SIGKILL


def test_a_stop_lets_the_running_job_finish_and_ends_both(home: Path) -> None:
    with serving(home, "--isolated") as server:
        worker = server.worker()
        job_id = server.submit(**slow(0.1, 10))
        waiting = server.submit(**slow(0.1, 10))
        server.wait(job_id, "processing")
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        assert gone(worker)
    assert record(home, job_id).state is State.DONE
    assert (record(home, waiting).state, record(home, waiting).attempts) == (State.QUEUED, 0)


def test_a_second_signal_ends_both_at_once_and_loses_nothing(home: Path) -> None:
    with serving(home, "--isolated", grace=300) as server:
        worker = server.worker()
        job_id = server.submit(**slow(0.1, 12))
        server.wait(job_id, "processing")
        server.signal(signal.SIGTERM)
        eventually(lambda: "SIGTERM: no new jobs" in server.log, "the first signal to be heard")
        server.signal(signal.SIGTERM)
        assert server.ended() == -signal.SIGTERM
        eventually(lambda: gone(worker), "the worker to die")
    with serving(home, "--isolated") as server:
        server.wait(job_id)


def test_a_worker_that_cannot_start_is_tried_until_it_can_while_the_api_takes_jobs(home: Path) -> None:
    with serving(home, "--isolated") as server:
        first = server.worker()
        running = home / "queue" / "running"
        running.rename(running.with_name("away"))
        running.touch()
        first.kill()
        eventually(lambda: "could not start" in server.log, "the worker to fail")
        assert "diffusion-api: the folder of the queue cannot be used" in server.log
        health = server.get("/health").json()
        assert (health["workers"], health["status"]) == ([], "warning")
        assert "no worker runs" in health["warnings"]
        job_id = server.submit(prompt="a lighthouse")
        assert server.status(job_id)["state"] == "queued"
        running.unlink()
        running.with_name("away").rename(running)
        server.wait(job_id)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
