"""Faults 1 to 7 and 10 on the real service: it is killed at a named point of a job's way, once in each mode."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path
from typing import Any

import counting
import httpx
import pytest
from aftermath import all_is_well, ended, told_as_done
from driving import places
from fake_models import diffusers_folder
from serving import MODES, Program, command, environment, eventually, serving
from tracing import arguments, injected

from diffusion_api.schema.job import State, loads

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

POINTS = {
    "1 before anything is written": ("/^f?statfs", 1, "api", None),
    "2 written, but not renamed": ("/^rename", 1, "api", None),
    "3 renamed, but not flushed": ("fsync", 2, "api", ("queued", 0, 0)),
    "3 flushed, but not answered": ("sendto", 1, "api", ("queued", 0, 0)),
    "4 claimed, but not charged": ("/^rename", 2, "worker", ("running", 0, 0)),
    "5 charged, before the first step": ("fsync", 5, "worker", ("running", 1, 0)),
    "6 picture saved, but not committed": ("fsync", 8, "worker", ("running", 1, 1)),
    "7 committed, but not flushed": ("fsync", 10, "worker", ("done", 1, 1)),
    "7 flushed, but not tidied": ("fsync", 11, "worker", ("done", 1, 1)),
}
"""The system call, the number of it in its thread, whose it is, and what is left: where the record lies, its attempts,
and the number of pictures. The worker's first two flushes are looks at whether it can write.
"""

RECOVERIES = ["/^rename:signal=KILL:when=1", "/^rename:signal=KILL:when=2", "fsync:signal=KILL:when=5"]
"""The record of the dead worker's job is written, but not renamed; renamed, but in its old place; in the new one, but
not flushed."""

JOB: dict[str, Any] = {"prompt": "a lighthouse stub:seconds=0.01", "steps": 3, "seed": 1, "fileType": "png"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


def is_dead(server: Program, victim: int) -> bool:
    return server.process.poll() is not None if victim == server.process.pid else not Path(f"/proc/{victim}").exists()


def what_is_left(home: Path) -> tuple[str, int, int] | None:
    records = [path for place in ("queued", "running/*", "done") for path in (home / "queue").glob(f"{place}/*.json")]
    if not records:
        return None
    job, (place, *_) = loads(records[0].read_bytes()), records[0].relative_to(home / "queue").parts
    return place, job.attempts, len(list((home / "outputs").glob("*.png")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_its_way_loses_or_doubles_no_job(
    home: Path, tmp_path: Path, point: str, mode: str
) -> None:
    call, number, whose, expected = POINTS[point]
    answered = None
    with serving(home, *MODES[mode]) as server:
        victim = server.worker().pid if mode == "isolated" and whose == "worker" else server.process.pid
        with injected(f"{call}:signal=KILL:when={number}", victim, tmp_path / "strace"):
            with contextlib.suppress(httpx.TransportError):
                answered = server.submit(**JOB)
            eventually(lambda: is_dead(server, victim), "the kill")
            left = what_is_left(home)
        if victim != server.process.pid:
            assert answered
            server.wait(answered)
        server.kill()
    assert left == expected or (left, expected) == (("running", 0, 0), ("queued", 0, 0))  # claimed at once
    lies, there = places(home), 0 if expected is None else 1
    assert len(lies) == there
    assert answered is None or set(lies) == {answered}
    finished = [ended(home, job_id) for job_id, where in lies.items() if where == ["done"]]
    with serving(home, *MODES[mode]) as server:
        for job_id in lies:
            server.wait(job_id)
        undisturbed = server.result(**JOB)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert all_is_well(home, [*lies, undisturbed["job_id"]]) == {"done": there + 1}
    pictures = {image.sha256 for job_id in places(home) for image in _images(home, job_id)}
    assert len(pictures) == 1
    assert len(list((home / "outputs").glob("*.png"))) == there + 1
    assert [ended(home, job.id) for job in finished] == finished
    counting.keep(f"points, {mode}", **{point: "nothing lost, nothing twice"})


@pytest.mark.parametrize("mode", MODES)
def test_a_kill_at_any_step_has_the_job_run_once_more(home: Path, mode: str) -> None:
    steps = 6
    slow = JOB | {"prompt": "a lighthouse stub:seconds=0.25", "steps": steps}
    killed = []
    for step in range(steps):
        with serving(home, *MODES[mode]) as server:
            killed.append(server.submit(**slow))
            at = eventually(lambda: (s := server.status(killed[-1]))["state"] == "processing" and s, "it to run")
            while at["progress"] < 100 * step / steps:
                at = server.status(killed[-1])
            server.kill()
        assert places(home)[killed[-1]] == ["running"]
    with serving(home, *MODES[mode]) as server:
        pictures = {server.wait(job_id)["image"] for job_id in killed}
        pictures.add(server.result(**slow)["image"])
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert len(pictures) == 1
    assert all_is_well(home, killed) == {"done": steps + 1}
    assert [ended(home, job_id).attempts for job_id in killed] == [2] * steps
    assert sorted(told_as_done(home)) == sorted(places(home))
    counting.keep(f"a kill at each step, {mode}", kills=steps, lost=0, twice=0, run_again=steps)


@pytest.mark.parametrize("fault", RECOVERIES)
@pytest.mark.parametrize("program", ["serve --port 0", "worker"])
def test_a_kill_during_the_recovery_is_recovered_from(home: Path, tmp_path: Path, program: str, fault: str) -> None:
    with serving(home) as server:
        job_id = server.submit(**JOB | {"prompt": "stub:seconds=60"})
        eventually(lambda: server.status(job_id)["state"] == "loading" and ended_or_running(home, job_id), "it to run")
        server.kill()
    (path,) = (home / "queue" / "running").glob(f"*/*{job_id}.json")
    path.write_text(path.read_text().replace("stub:seconds=60", "stub:seconds=0"))
    for _ in range(2):
        with (home / "strace.log").open("a") as log:
            tracing = subprocess.Popen(
                [*arguments(fault, tmp_path / "strace"), *command(*program.split(), "--home", home)],
                cwd=home,
                env=environment(engine="stub", shipped_models=False),
                stdout=log,
                stderr=log,
            )
        assert tracing.wait(120) == -signal.SIGKILL
        assert len(places(home)[job_id]) == 1
    with serving(home) as server:
        server.wait(job_id)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert all_is_well(home, [job_id]) == {"done": 1}
    counting.keep(f"kills during the recovery, {program.partition(' ')[0]}", **{fault: "twice, nothing lost"})


def ended_or_running(home: Path, job_id: str) -> bool:
    """True once the attempt is on disk."""
    return any('"attempts":1' in path.read_text() for path in (home / "queue" / "running").glob(f"*/*{job_id}.json"))


def _images(home: Path, job_id: str) -> Any:
    job = ended(home, job_id)
    return job.result.images if job.state is State.DONE and job.result else ()
