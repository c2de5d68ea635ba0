"""The life of a service: started, stopped, killed and started again, with jobs in hand."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_models import diffusers_folder
from serving import MODES, Program, environment, eventually, run, serving, started

from diffusion_api.client import Client
from diffusion_api.schema.job import Job, State, loads
from diffusion_api.server import listen


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Jobs run in the serving process, or in one of their own."""
    arguments: tuple[str, ...] = request.param
    return arguments


def record(home: Path, job_id: str) -> Job:
    """A job as it lies on disk, wherever it lies."""

    def found() -> list[Path]:
        return [path for path in (home / "queue").rglob(f"*{job_id}.json") if path.parent.name != "progress"]

    (path,) = eventually(found, "the record")
    return loads(path.read_bytes())


def pictures(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "outputs").iterdir() if path.is_file())


def slow(seconds: float, steps: int) -> dict[str, object]:
    return {"prompt": f"stub:seconds={seconds}", "steps": steps, "seed": 1, "fileType": "png"}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# Starting


def test_it_greets_with_a_command_that_works(home: Path) -> None:
    with serving(home) as server:
        assert server.process.stdout is not None
        line = server.process.stdout.readline()
        rest = [server.process.stdout.readline() for _ in range(2)]
        assert "DIFFUSION_API_MODEL" in rest[1], "what to do with several models"
        words = shlex.split(line)
        assert words[:3] == ["curl", "-s", f"{server.url}/txt2img"]
        body = json.loads(words[words.index("-d") + 1])
        assert server.result(**body)["state"] == "done"


def test_it_answers_while_its_engine_loads(home: Path) -> None:
    with serving(home, engine="diffusers", device="cpu") as server:
        assert server.get("/hello").json() == {"ok": True}
        job_id = server.submit(prompt="a lighthouse")
        status = server.status(job_id)
        health = server.get("/health").json()
        log = server.log
        assert "engine ready" not in log
        assert status["state"] == "queued"
        assert health["queue"]["active_jobs"] == 1
        assert "device_name" in health["gpu"]
        eventually(lambda: "engine ready on" in server.log, "the engine to be ready")
        # The model holds no weights: its job fails, in words that name no folder of the host.
        assert "'small' cannot be read" in server.wait(job_id, "error")["error"]
        assert str(home) not in server.status(job_id)["error"]
        assert server.get("/health").json()["gpu"]["cuda_available"] is False
        server.signal(signal.SIGTERM)
        assert server.ended() == 0


def test_a_file_of_settings_is_read(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / ".env").write_text("DIFFUSION_API_MAX_STEPS=3\n")
    with serving(home) as server:
        assert server.post(steps=4).json()["error"] == "steps is 4; it may be 1 to 3"


def test_more_ports_answer_in_the_same_way(home: Path) -> None:
    with serving(home, "--also-listen", "0, 0") as server:
        addresses = re.search(r"it listens on (.+)", server.log)
        assert addresses
        first, *others = addresses[1].split(", ")
        assert first == server.url
        assert len({first, *others}) == 3
        job_id = server.result(prompt="a lighthouse")["job_id"]
        for url in others:
            assert httpx.get(f"{url}/queue/{job_id}", trust_env=False).json()["state"] == "done"
        server.signal(signal.SIGTERM)
        assert server.ended() == 0


def test_a_second_port_that_is_taken_is_told(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", 0, "--also-listen", port, cwd=home, home=home, engine="stub")
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


UNDER_OTHERS = {
    "uvicorn": ("uvicorn", "diffusion_api.asgi:app", "--port", "0"),
    "gunicorn": (
        *("gunicorn", "diffusion_api.asgi:app", "--workers", "1", "--worker-class", "uvicorn.workers.UvicornWorker"),
        *("--bind", "127.0.0.1:0"),
    ),
}
"""The commands that manuals print, but for the module and the port."""


@pytest.mark.parametrize("program", UNDER_OTHERS)
def test_it_also_runs_under_uvicorn_and_gunicorn(home: Path, program: str) -> None:
    settings = environment(home=home, engine="stub", shipped_models=False)
    path = home / "log"
    with path.open("w") as log:
        command = [sys.executable, "-m", *UNDER_OTHERS[program]]
        process = subprocess.Popen(command, cwd=home, env=settings, stdout=log, stderr=log, text=True)
    try:
        found = eventually(
            lambda: re.search(r"(?:running on|Listening at:) (http://\S+)", path.read_text()), "it to listen"
        )
        server = Program(process, home, path, found[1])
        assert server.result(prompt="a lighthouse")["state"] == "done"
        server.signal(signal.SIGTERM)
        server.ended()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in path.read_text()


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_running_job_finish(home: Path, number: signal.Signals) -> None:
    with serving(home) as server:
        job_id = server.submit(**slow(0.1, 10))
        waiting = server.submit(**slow(0.1, 10))
        server.wait(job_id, "processing")
        server.signal(number)
        assert server.ended() == 0
    assert record(home, job_id).state is State.DONE
    assert (record(home, waiting).state, record(home, waiting).attempts) == (State.QUEUED, 0)
    assert pictures(home) == [f"{job_id}.png"]


def test_an_idle_service_stops_at_once(home: Path) -> None:
    with serving(home) as server, within(10):
        server.signal(signal.SIGTERM)
        assert server.ended() == 0


def test_a_job_longer_than_the_grace_goes_back_and_is_done_after_the_next_start(
    home: Path, mode: tuple[str, ...]
) -> None:
    with serving(home, *mode, grace=0.5) as server:
        job_id = server.submit(**slow(0.02, 100))
        server.wait(job_id, "processing")
        with within(15):
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
    waiting = record(home, job_id)
    assert (waiting.state, waiting.attempts) == (State.QUEUED, 0)
    assert pictures(home) == []
    with serving(home, *mode) as server:
        server.wait(job_id)
    assert (record(home, job_id).state, record(home, job_id).attempts) == (State.DONE, 1)
    assert pictures(home) == [f"{job_id}.png"]


def test_while_it_stops_it_answers_but_takes_no_job(home: Path, mode: tuple[str, ...]) -> None:
    with serving(home, *mode) as server, ThreadPoolExecutor(2) as callers:
        job_id = server.submit(**slow(0.1, 50))
        waiting = server.submit(**slow(0.1, 50))
        server.wait(job_id, "processing")
        assert server.get("/ready").json() == {"status": "success", "ready": True, "loading": False, "reasons": []}
        polls = [callers.submit(server.get, f"/queue/{each}?wait=60") for each in (job_id, waiting)]
        server.signal(signal.SIGTERM)
        not_ready = eventually(lambda: (a := server.get("/ready")).status_code == 503 and a, "it to hear the signal")
        reason = "the service is shutting down"
        assert not_ready.json() == {
            **{"status": "error", "detail": reason, "error": reason},
            **{"ready": False, "loading": False, "reasons": [reason]},
        }
        refused = server.post(prompt="a lighthouse")
        assert (refused.status_code, refused.json()["error"]) == (503, reason)
        assert int(refused.headers["Retry-After"]) > 0
        assert server.get("/hello").status_code == 200
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "warning")
        assert server.status(job_id)["state"] == "processing"
        assert [poll.result().json()["state"] for poll in polls] == ["done", "queued"]
        assert server.ended() == 0
    assert record(home, job_id).state is State.DONE
    assert (record(home, waiting).state, record(home, waiting).attempts) == (State.QUEUED, 0)


def test_no_open_connection_keeps_it_from_stopping(home: Path) -> None:
    with serving(home) as server, contextlib.ExitStack() as connections:
        job_id = server.submit(**slow(0.1, 10))
        waiting = server.submit(prompt="a lighthouse", priority=-9)
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        opened = [connections.enter_context(socket.create_connection(address)) for _ in range(4)]
        idle, kept, half, poll = opened
        kept.sendall(b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        half.sendall(b"POST /txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        poll.sendall(f"GET /queue/{waiting}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        server.wait(job_id, "processing")
        with within(45):
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
        assert b'"state":"queued"' in b"".join(iter(lambda: poll.recv(4096), b""))
        assert idle.recv(1) == b""


def test_a_step_that_does_not_end_does_not_keep_it_from_stopping(home: Path, mode: tuple[str, ...]) -> None:
    with serving(home, *mode, grace=0.2) as server:
        job_id = server.submit(**slow(3600, 1))
        server.wait(job_id, "loading")
        eventually(lambda: record(home, job_id).attempts, "the job to begin")
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert (record(home, job_id).state, record(home, job_id).attempts) == (State.QUEUED, 0)


def test_a_stuck_step_shows(home: Path, mode: tuple[str, ...]) -> None:
    with serving(home, *mode, stuck_after=0.5) as server:
        job_id = server.submit(**slow(4, 1))
        not_ready = eventually(lambda: "stuck" in (a := server.get("/ready")).text and a, "the step to be stuck")
        assert not_ready.status_code == 503
        (reason,) = not_ready.json()["reasons"]
        assert re.fullmatch(r"the running job is stuck: nothing was heard of it for \d+ seconds", reason)
        health = server.get("/health")
        assert health.status_code == 200
        assert [w for w in health.json()["warnings"] if "stuck" in w]
        server.wait(job_id)
        assert server.get("/ready").status_code == 200


def test_a_second_signal_ends_it_at_once(home: Path) -> None:
    with serving(home) as server:
        job_id = server.submit(**slow(0.1, 150))
        server.wait(job_id, "processing")
        server.signal(signal.SIGTERM)
        eventually(lambda: "SIGTERM: no new jobs" in server.log, "the first signal to be heard")
        assert server.process.poll() is None
        with within(10):
            server.signal(signal.SIGTERM)
            assert server.ended() == -signal.SIGTERM


# Dying


def test_a_job_survives_a_kill_and_is_run_again(home: Path, mode: tuple[str, ...]) -> None:
    with serving(home, *mode) as server:
        job_id = server.submit(**slow(0.1, 12))
        waiting = [server.submit(**slow(0, 1)) for _ in range(2)]
        server.wait(job_id, "processing")
        server.kill()
    assert record(home, job_id).attempts == 1
    with serving(home, *mode) as server:
        status = server.wait(job_id)
        for other in waiting:
            assert server.wait(other)["state"] == "done"
        undisturbed = server.result(**slow(0.1, 12))
    assert (record(home, job_id).attempts, record(home, job_id).state) == (2, State.DONE)
    assert len(pictures(home)) == 4
    assert f"{job_id}.png" in pictures(home)
    assert base64.b64decode(status["image"]) == base64.b64decode(undisturbed["image"])


def test_a_job_that_kills_the_service_each_time_ends_and_the_next_one_runs(home: Path) -> None:
    with serving(home, "--no-worker") as server:
        deadly = server.submit(prompt="stub:die", steps=4)
    for deaths in (1, 2, 3):
        with started("serve", "--port", 0, home=home) as server:
            assert server.ended() == -signal.SIGKILL
        assert record(home, deadly).attempts == deaths
    with serving(home) as server:
        assert server.wait(deadly, "error")["error"] == "the service stopped 3 times while running this job"
        assert server.result(prompt="a lighthouse")["state"] == "done"
        assert server.process.poll() is None


def test_a_service_that_dies_of_its_jobs_again_and_again_pauses_itself(home: Path, mode: tuple[str, ...]) -> None:
    settings = {"pause_after_crashes": 2, "max_attempts": 10}
    with serving(home, "--no-worker") as server:
        deadly, other = server.submit(prompt="stub:die", steps=4), server.submit(prompt="a lighthouse")
    for _ in range(0 if mode else 2):
        with started("serve", "--port", 0, home=home, **settings) as server:
            assert server.ended() == -signal.SIGKILL
    with serving(home, *mode, **settings) as server:
        not_ready = eventually(lambda: "crashes" in (a := server.get("/ready")).text and a, "the pause")
        assert not_ready.status_code == 503
        assert "crashes in a row while jobs ran: 2" in not_ready.json()["reasons"]
        assert server.status(deadly)["state"] == server.status(other)["state"] == "queued"
        assert server.request("DELETE", f"/queue/{deadly}").status_code == 200
        assert server.request("POST", "/queue/resume").status_code == 200
        server.wait(other)
        assert record(home, deadly).attempts == 2


def test_more_jobs_than_may_wait_are_refused(home: Path) -> None:
    with serving(home, "--no-worker", max_queue=2) as server:
        jobs = [server.submit(prompt="a lighthouse") for _ in range(2)]
        refused = server.post(prompt="a lighthouse")
        assert (refused.status_code, refused.json()["error"]) == (503, "2 jobs wait already; at most 2 may")
        assert int(refused.headers["Retry-After"]) > 0
        assert len(list((home / "queue" / "queued").iterdir())) == 2
        server.request("DELETE", f"/queue/{jobs[0]}")
        server.submit(prompt="a lighthouse")


def test_new_jobs_are_refused_when_little_of_the_disk_is_left(home: Path) -> None:
    with serving(home, disk_reserve_mb=10**9) as server:
        refused = server.post(prompt="a lighthouse")
        assert refused.status_code == 507
        assert re.fullmatch(
            r"\d+ MiB are left on the disk of the queue; 1000000000 are kept .*", refused.json()["error"]
        )
        assert int(refused.headers["Retry-After"]) > 0
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200


@pytest.mark.parametrize("hangs", [False, True], ids=["torch", "a torch that never comes"])
@pytest.mark.parametrize("mode", MODES)
def test_a_stop_while_torch_loads_does_not_wait_for_it(
    home: Path, tmp_path: Path, mode: str, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hangs:
        hanging = "import pathlib, time\npathlib.Path(__file__).with_name('loads').touch()\ntime.sleep(3600)\n"
        (tmp_path / "torch.py").write_text(hanging)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serving(home, *MODES[mode], engine="diffusers", grace=0) as server:
        job_id = server.submit(prompt="a lighthouse")
        if hangs:
            eventually((tmp_path / "loads").exists, "torch to be imported")
        server.signal(signal.SIGTERM)
        assert server.ended(timeout=30) == 0
    assert (record(home, job_id).state, record(home, job_id).attempts) == (State.QUEUED, 0)


# Several processes


def test_a_second_worker_with_a_device_of_its_own_serves_the_same_queue(home: Path) -> None:
    def second() -> contextlib.AbstractContextManager[Program]:
        return started("worker", "--device", "cpu", home=home)

    with serving(home, "--no-worker") as api, second(), second():
        eventually(lambda: len(api.get("/health").json()["workers"]) == 2, "both workers")
        jobs = [api.submit(prompt="stub:seconds=0.2", steps=3, seed=seed) for seed in range(6)]
        eventually(lambda: all(w["jobs"] for w in api.get("/health").json()["workers"]), "both to be at work")
        assert [api.wait(job)["seed"] for job in jobs] == [*range(6)]
    records = [loads(path.read_bytes()) for path in (home / "queue" / "done").glob("*.json")]
    assert sorted(job.id for job in records) == sorted(jobs)
    assert {job.attempts for job in records} == {1}


def test_a_device_that_does_not_exist_is_told_with_the_choices(tmp_path: Path) -> None:
    done = run("worker", "--device", "cuda:x", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "setting device (DIFFUSION_API_DEVICE) is 'cuda:x': Value error, one of auto, cpu, cuda, cuda:0" in done.stderr
    )


def test_the_api_and_a_worker_share_a_folder(home: Path) -> None:
    with serving(home, "--no-worker") as api:
        job_id = api.submit(**slow(0.05, 20))
        time.sleep(0.3)
        assert api.status(job_id)["state"] == "queued"
        assert "device_name" in api.get("/health").json()["gpu"]
        with started("worker", home=home) as worker:
            half = eventually(lambda: (s := api.status(job_id))["progress"] > 0 and s, "progress")
            assert (half["state"], half["current_phase"]) == ("processing", "generation")
            status = api.wait(job_id)
            assert base64.b64decode(status["image"]) == (home / status["output_path"]).read_bytes()
            failed = api.submit(prompt="stub:fail")
            assert "the engine failed" in api.wait(failed, "error")["error"]
            worker.signal(signal.SIGTERM)
            assert worker.ended() == 0
        later = api.submit(prompt="a lighthouse")
        time.sleep(0.3)
        assert api.status(later)["state"] == "queued"
        assert api.get("/health").json()["queue"]["active_jobs"] == 1


def test_a_stopped_worker_gives_its_job_back_and_a_killed_ones_is_taken_over(home: Path) -> None:
    with serving(home, "--no-worker") as api:
        job_id = api.submit(**slow(0.05, 40))
        with started("worker", home=home, grace=0.1) as worker:
            api.wait(job_id, "processing")
            worker.signal(signal.SIGTERM)
            assert worker.ended() == 0
        assert (record(home, job_id).state, record(home, job_id).attempts) == (State.QUEUED, 0)
        with started("worker", home=home) as worker:
            api.wait(job_id, "processing")
            with started("worker", home=home):
                worker.kill()
                assert api.wait(job_id)["state"] == "done"
    assert record(home, job_id).attempts == 2


def test_a_second_signal_ends_a_worker_at_once(home: Path) -> None:
    with serving(home, "--no-worker") as api, started("worker", home=home) as worker:
        job_id = api.submit(**slow(0.1, 150))
        api.wait(job_id, "processing")
        worker.signal(signal.SIGINT)
        time.sleep(0.3)
        assert worker.process.poll() is None
        with within(10):
            worker.signal(signal.SIGINT)
            assert worker.ended() == -signal.SIGINT


def test_many_callers_at_once_get_a_picture_each(home: Path) -> None:
    with serving(home) as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:

        def submit(seed: int) -> str:
            answer = client.post("/txt2img", json={"steps": 1, "seed": seed})
            assert answer.status_code == 200
            job_id: str = answer.json()["job_id"]
            return job_id

        with ThreadPoolExecutor(8) as callers:
            ids = list(callers.map(submit, range(40)))
        assert len(set(ids)) == 40
        statuses = [server.wait(job_id) for job_id in ids]
    assert [status["seed"] for status in statuses] == list(range(40))
    assert pictures(home) == sorted(f"{job_id}.jpg" for job_id in ids)
    assert all(record(home, job_id).attempts == 1 for job_id in ids)


def test_what_is_beyond_the_queues_limit_is_refused_and_what_was_taken_is_run(home: Path) -> None:
    with serving(home, max_queue=3) as server:
        server.submit(**slow(0.05, 20))
        with ThreadPoolExecutor(8) as callers:
            answers = list(callers.map(lambda _: server.post(prompt="stub:seconds=0.05", steps=4), range(24)))
        taken = [answer.json()["job_id"] for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(taken) + len(refused) == 24
        assert refused
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
        assert all("at most 3" in answer.json()["error"] for answer in refused)
        for job_id in taken:
            server.wait(job_id)
    assert len(pictures(home)) == len(taken) + 1


def test_the_client_comes_back_when_a_full_queue_has_room(home: Path) -> None:
    with serving(home, max_queue=2) as server, Client(server.url) as client, ThreadPoolExecutor(6) as callers:
        jobs = list(callers.map(lambda seed: client.txt2img(prompt="stub:seconds=0.05", steps=8, seed=seed), range(6)))
        assert [job.seed for job in jobs] == list(range(6))
        assert all(client.wait(job.job_id)["state"] == "done" for job in jobs)
    assert len(pictures(home)) == 6


def test_the_log_tells_of_each_job_and_holds_no_picture(home: Path) -> None:
    with serving(home, log_level="debug") as server:
        done = server.result(prompt="a lighthouse", picture="data:image/png;base64," + "A" * 500)
        failed = server.submit(prompt="stub:fail")
        server.wait(failed, "error")
        log = server.log
    assert f"job {done['job_id']} done in" in log
    assert f"job {failed} failed" in log
    assert "AAAAAAAA" not in log
    assert done["image"][:40] not in log


def test_the_greeting_has_an_address_that_can_be_used(home: Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        with serving(home, "--host", "::1") as program:
            assert program.url.startswith("http://[::1]:")
            assert program.get("/hello").json() == {"ok": True}


def test_answers_are_not_held_back_for_an_acknowledgement() -> None:
    """asyncio turns Nagle's algorithm off for sockets that say that they are TCP; else kept connections wait 40 ms."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
