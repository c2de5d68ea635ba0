"""Sweeping while jobs are served."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
from asking import plain
from serving import eventually

from diffusion_api import sweeper
from diffusion_api.errors import DiskFull, Gone
from diffusion_api.outputs import Outputs
from diffusion_api.queues.base import Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job
from diffusion_api.sweeper import Sweeper

HOUR = 3600.0
FOR_EVER = Limits()


def cancelled(queue: Queue, count: int) -> list[Job]:
    """Jobs that have ended just now."""
    jobs = [queue.enqueue(Job(request=plain())) for _ in range(count)]
    for job in jobs:
        queue.cancel(job.id)
    return jobs


def new_picture(outputs: Outputs, job: Job, *, age: float) -> Path:
    path = outputs.folder / f"{job.id}.png"
    path.write_bytes(b"x" * 100)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_it_sweeps_at_once_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "EVERY", 0.05)
    queue = MemoryQueue()
    cancelled(queue, 3)
    Sweeper(queue, Outputs(tmp_path), results=Limits(count=1), pictures=FOR_EVER).start()
    eventually(lambda: len(queue.jobs()) == 1)
    cancelled(queue, 3)
    eventually(lambda: len(queue.jobs()) == 1)


@pytest.mark.parametrize("jump", [-2 * HOUR, 2 * HOUR, 24 * HOUR, 100_000 * HOUR])
def test_a_clock_that_leaps_lets_nothing_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    queue, outputs = FileQueue(tmp_path / "queue"), Outputs(tmp_path / "outputs")
    limits = Limits(seconds=HOUR)
    swept = Sweeper(queue, outputs, results=limits, pictures=limits)
    jobs = cancelled(queue, 3)
    picture = new_picture(outputs, jobs[0], age=0)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    swept.sweep()
    assert len(queue.jobs()) == 3
    assert picture.exists()
    queue.close()


def test_pictures_of_jobs_that_have_not_ended_are_spared(tmp_path: Path) -> None:
    queue, outputs = FileQueue(tmp_path / "queue"), Outputs(tmp_path / "outputs")
    (ended,) = cancelled(queue, 1)
    waiting = queue.enqueue(Job(request=plain()))
    gone = Job(request=plain())
    pictures = {job.id: new_picture(outputs, job, age=48 * HOUR) for job in (ended, waiting, gone)}
    Sweeper(queue, outputs, results=FOR_EVER, pictures=Limits(seconds=24 * HOUR)).sweep()
    assert {job_id for job_id, path in pictures.items() if path.exists()} == {waiting.id}
    queue.close()


def test_what_goes_wrong_is_told_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue, outputs = FileQueue(tmp_path / "queue"), Outputs(tmp_path / "outputs")
    jobs = cancelled(queue, 2)
    gone = tmp_path / "queue" / "gone"
    gone.rmdir()
    gone.touch()
    picture = new_picture(outputs, jobs[0], age=0)
    swept = Sweeper(queue, outputs, results=Limits(count=0), pictures=Limits(count=0))
    swept.sweep()
    assert "Not a directory" in caplog.text
    assert len(queue.jobs()) == len(jobs)
    assert not picture.exists()
    gone.unlink()
    gone.mkdir()
    swept.sweep()
    assert queue.jobs() == []
    queue.close()


def test_a_full_disk_is_swept_too(small_disk: Path) -> None:
    queue, outputs = FileQueue(small_disk / "queue"), Outputs(small_disk / "outputs")
    jobs = cancelled(queue, 3)
    picture = new_picture(outputs, jobs[0], age=0)
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    with pytest.raises(DiskFull):
        queue.enqueue(Job(request=plain()))
    Sweeper(queue, outputs, results=Limits(count=0), pictures=Limits(count=0)).sweep()
    with pytest.raises(Gone):
        queue.get(jobs[0].id)
    assert not picture.exists()
    queue.enqueue(Job(request=plain()))
    queue.close()
