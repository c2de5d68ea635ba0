"""A worker on a real queue: what becomes of the jobs that it takes."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import plain
from serving import eventually

from diffusion_api import images, storage
from diffusion_api import worker as worker_module
from diffusion_api.engine.base import Engine, Event, Finished, StopAsked
from diffusion_api.engine.stub import StubEngine
from diffusion_api.errors import DeviceLost, DeviceUnusable, ModelUnreadable
from diffusion_api.outputs import Outputs
from diffusion_api.queues.base import Queue, Snapshot
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Failure, Job, Progress, State
from diffusion_api.schema.report import DeviceReport, HeldModel
from diffusion_api.schema.request import Request
from diffusion_api.worker import Worker

NewWorker = Callable[..., Worker]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    """A queue on disk."""
    queue = FileQueue(tmp_path / "queue")
    yield queue
    queue.close()


@pytest.fixture
def new_worker(queue: Queue, tmp_path: Path) -> Iterator[NewWorker]:
    """Starts workers of that queue, with the stub engine if no other is given; they are stopped in the end."""
    workers: list[Worker] = []

    def start(engine: Engine | None = None, **options: Any) -> Worker:
        worker = Worker(queue, engine or StubEngine(), Outputs(tmp_path / "outputs"), **options)
        workers.append(worker)
        worker.start()
        return worker

    yield start
    for worker in workers:
        worker.stop(grace=0)


class Faulty:
    """An engine that does in each run what it was given to do; it may not be ready either."""

    def __init__(self, run: Callable[[], Iterator[Event]] | None = None, unusable: str | None = None) -> None:
        self._run, self._unusable = run, unusable
        self.closed = False

    def start(self) -> None:
        """Nothing to load."""

    def wait(self, seconds: float | None = None) -> bool:
        """Ready, or never."""
        if self._unusable:
            raise DeviceUnusable(self._unusable)
        return True

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        """What it was given."""
        assert self._run is not None
        return self._run()

    @property
    def held(self) -> tuple[HeldModel, ...]:
        """It keeps none."""
        return ()

    def report(self) -> DeviceReport | None:
        """Not known."""
        return None

    def close(self, seconds: float | None = None) -> bool:
        """Remember it."""
        self.closed = True
        return True


def new_job(
    prompt: str = "a lighthouse", *, payload: dict[str, Any] | None = None, deadline: float | None = None, **fields: Any
) -> Job:
    return Job(request=plain(prompt=prompt, **fields), payload=payload or {}, deadline=deadline)


def found(queue: Queue, job: Job) -> Snapshot:
    snapshot = queue.get(job.id)
    assert snapshot is not None
    return snapshot


def ended(queue: Queue, job: Job) -> Job:
    eventually(lambda: found(queue, job).state.terminal, "the job to end")
    return found(queue, job).job


def running(queue: Queue, job: Job) -> None:
    eventually(lambda: found(queue, job).state is State.PROCESSING, "the job to run")


def test_a_running_job_shows_its_latest_preview(queue: Queue, new_worker: NewWorker, tmp_path: Path) -> None:
    job = queue.enqueue(new_job("stub:seconds=0.2", steps=30, preview_every=1))
    new_worker()
    other = FileQueue(tmp_path / "queue")
    eventually(lambda: (found(other, job).progress or Progress()).preview, "a preview that another process sees")
    progress = found(other, job).progress
    other.close()
    assert progress
    assert progress.preview
    assert images.decode(base64.b64decode(progress.preview), max_pixels=64).size == (8, 8)


def test_a_job_is_run_saved_and_committed(queue: Queue, new_worker: NewWorker, tmp_path: Path) -> None:
    job = new_job(count=2)
    queue.enqueue(job)
    new_worker()
    done = ended(queue, job)
    assert (done.state, done.attempts, done.error) == (State.DONE, 1, None)
    assert done.started is not None
    assert done.finished is not None
    assert done.created <= done.started <= done.finished
    assert done.result is not None
    assert 0 < done.result.seconds < 60
    assert [image.seed for image in done.result.images] == [1, 2]
    assert all((tmp_path / image.path).is_file() for image in done.result.images)


def test_an_error_of_ours_is_told_in_its_own_words(queue: Queue, new_worker: NewWorker) -> None:
    def run() -> Iterator[Event]:
        yield Progress()
        raise ModelUnreadable("model 'small' cannot be read: no such tensor")

    job = new_job()
    queue.enqueue(job)
    new_worker(Faulty(run))
    failed = ended(queue, job)
    assert (failed.state, failed.attempts) == (State.ERROR, 1)
    assert failed.error is not None
    assert (failed.error.kind, failed.error.message) == (
        "ModelUnreadable",
        "model 'small' cannot be read: no such tensor",
    )


def test_any_other_error_fails_its_job_only_and_keeps_its_text_in_the_log(
    queue: Queue, new_worker: NewWorker, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = new_job("stub:fail"), new_job()
    for job in (bad, good):
        queue.enqueue(job)
    new_worker()
    failed = ended(queue, bad)
    assert failed.error is not None
    assert (failed.error.kind, failed.error.message) == (
        "InternalError",
        f"the engine failed: RuntimeError; the log has the details under job {bad.id}",
    )
    assert "the stub engine was told to fail" in caplog.text
    assert "Traceback" in caplog.text
    assert ended(queue, good).state is State.DONE


def test_an_engine_that_ends_without_a_picture_fails_the_job(queue: Queue, new_worker: NewWorker) -> None:
    job = new_job()
    queue.enqueue(job)
    new_worker(Faulty(lambda: iter([Progress()])))
    assert ended(queue, job).state is State.ERROR


def test_what_the_engine_warns_of_is_kept(queue: Queue, new_worker: NewWorker) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    job = new_job()
    queue.enqueue(job)
    new_worker(Faulty(lambda: iter([Progress(), Finished(images=(image,), seeds=(1,), warnings=("low memory",))])))
    assert ended(queue, job).warnings == ("low memory",)


def test_a_running_job_is_cancelled_between_two_steps(queue: Queue, new_worker: NewWorker) -> None:
    job = new_job("stub:seconds=0.02", steps=1000)
    queue.enqueue(job)
    new_worker()
    running(queue, job)
    queue.cancel(job.id)
    assert ended(queue, job).state is State.CANCELLED


def test_a_job_that_waits_for_the_device_is_cancelled(queue: Queue, new_worker: NewWorker) -> None:
    first, second = new_job("stub:seconds=0.02", steps=1000), new_job()
    for job in (first, second):
        queue.enqueue(job)
    new_worker()
    running(queue, first)
    eventually(lambda: found(queue, second).state is State.LOADING, "the second job to be claimed")
    queue.cancel(second.id)
    assert ended(queue, second).state is State.CANCELLED
    assert found(queue, second).job.attempts == 0
    assert found(queue, first).state is State.PROCESSING
    queue.cancel(first.id)


def test_a_job_that_is_cancelled_may_keep_the_picture_that_it_has(
    queue: Queue, new_worker: NewWorker, tmp_path: Path
) -> None:
    job = new_job("stub:seconds=0.02", steps=1000)
    queue.enqueue(job)
    new_worker()
    running(queue, job)
    queue.cancel(job.id, partial=True)
    cancelled = ended(queue, job)
    assert (cancelled.state, cancelled.error) == (State.CANCELLED, Failure(kind="JobCancelled", message="cancelled"))
    assert cancelled.result is not None
    assert [(tmp_path / image.path).is_file() for image in cancelled.result.images] == [True]


def test_a_job_may_finish_within_the_grace(queue: Queue, new_worker: NewWorker) -> None:
    first, second = new_job("stub:seconds=0.05", steps=10), new_job()
    for job in (first, second):
        queue.enqueue(job)
    worker = new_worker()
    running(queue, first)
    worker.stop(grace=30)
    assert found(queue, first).state is State.DONE
    waiting = found(queue, second).job
    assert (waiting.state, waiting.attempts) == (State.QUEUED, 0)


def test_a_job_beyond_the_grace_goes_back_and_burns_no_attempt(queue: Queue, new_worker: NewWorker) -> None:
    job = new_job("stub:seconds=0.02", steps=1000)
    queue.enqueue(job)
    worker = new_worker()
    running(queue, job)
    worker.stop(grace=0.1)
    waiting = found(queue, job).job
    assert (waiting.state, waiting.attempts, waiting.started) == (State.QUEUED, 0, None)


def test_a_worker_reports_what_it_has_in_hand_and_when_it_last_moved(queue: Queue, new_worker: NewWorker) -> None:
    new_worker(restarts=2)
    (idle,) = eventually(queue.workers, "a report")
    assert (idle.state, idle.jobs, idle.restarts, idle.pid) == ("idle", (), 2, os.getpid())
    assert idle.device.name == "stub"
    job = new_job("stub:seconds=0.02", steps=1000)
    queue.enqueue(job)
    running(queue, job)
    (first,) = queue.workers()
    assert (first.state, first.jobs) == ("running", (job.id,))
    eventually(lambda: queue.workers()[0].event > first.event, "a step to be reported")
    queue.cancel(job.id)
    eventually(lambda: queue.workers()[0].state == "idle", "the job to leave its hands")


def test_a_worker_that_is_stopped_closes_its_engine(new_worker: NewWorker) -> None:
    engine = Faulty()
    new_worker(engine).stop(grace=0)
    assert engine.closed


# Deadlines


def test_a_job_ends_at_the_first_step_after_its_deadline(queue: Queue, new_worker: NewWorker) -> None:
    job, following = new_job("stub:seconds=0.02", steps=5000, deadline=0.2), new_job()
    for each in (job, following):
        queue.enqueue(each)
    new_worker()
    failed = ended(queue, job)
    assert (failed.state, failed.error) == (
        State.ERROR,
        Failure(kind="DeadlinePassed", message="the deadline of 0.2 s passed"),
    )
    assert ended(queue, following).state is State.DONE


def test_a_deadline_counts_from_the_start_of_the_job(queue: Queue, new_worker: NewWorker) -> None:
    first, second = new_job("stub:seconds=0.05", steps=20), new_job(deadline=0.9)
    for job in (first, second):
        queue.enqueue(job)
    new_worker()
    eventually(lambda: found(queue, second).state is State.LOADING, "the second job to wait for the device")
    assert ended(queue, second).state is State.DONE
    assert found(queue, first).job.result.seconds > 0.9  # type: ignore[union-attr]


def test_a_step_that_hangs_beyond_the_deadline_ends_its_job_and_starts_the_worker_again(
    monkeypatch: pytest.MonkeyPatch, queue: Queue, new_worker: NewWorker
) -> None:
    monkeypatch.setattr(worker_module, "BREATH", 0.2)
    monkeypatch.setattr(worker_module, "HUNG", 0.3)
    monkeypatch.setattr(worker_module, "WATCH_EVERY", 0.05)
    hanging, waiting = new_job("stub:seconds=3600", deadline=0.1), new_job()
    for job in (hanging, waiting):
        queue.enqueue(job)
    reasons: list[str] = []
    new_worker(restart=reasons.append)
    eventually(lambda: found(queue, waiting).state is State.LOADING, "the second job to wait for the device")
    failed = ended(queue, hanging)
    assert failed.error == Failure(kind="DeadlinePassed", message="the deadline of 0.1 s passed")
    eventually(lambda: reasons, "the worker to ask for a new start")
    assert reasons == [f"job {hanging.id} hangs in a step"]
    back = found(queue, waiting).job
    assert (back.state, back.attempts) == (State.QUEUED, 0)


def test_a_job_of_long_steps_that_come_to_an_end_is_no_hung_one(
    monkeypatch: pytest.MonkeyPatch, queue: Queue, new_worker: NewWorker
) -> None:
    monkeypatch.setattr(worker_module, "WATCH_EVERY", 0.05)
    job = new_job("stub:seconds=0.5", steps=50, deadline=0.1)
    queue.enqueue(job)
    reasons: list[str] = []
    new_worker(restart=reasons.append)
    assert ended(queue, job).error == Failure(kind="DeadlinePassed", message="the deadline of 0.1 s passed")
    assert reasons == []


# A device that is lost


class Fragile(StubEngine):
    """Loses its device at the first step of a job whose prompt says so, and has none from then on."""

    lost = False

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        for event in super().run(request, stop=stop):
            if self.lost or (isinstance(event, Progress) and event.step and "lose" in request.prompt):
                self.lost = True
                raise DeviceLost("the device was lost: illegal memory access")
            yield event


def lost_or_ended(folder: Path, job: Job, engine: Engine) -> bool:
    """Serve the queue, as a new process would, until the device is lost (True) or the job has ended."""
    queue, lost = FileQueue(folder / "queue"), threading.Event()
    worker = Worker(queue, engine, Outputs(folder / "outputs"), restart=lambda reason: lost.set())
    worker.start()
    eventually(lambda: lost.is_set() or found(queue, job).state.terminal, "the device to be lost, or the job to end")
    worker.stop(grace=0)
    queue.close()
    return lost.is_set()


def test_a_lost_device_puts_the_jobs_back_and_starts_the_worker_again(
    queue: Queue, new_worker: NewWorker, tmp_path: Path
) -> None:
    losing, waiting = new_job("lose stub:seconds=0.3"), new_job()
    for job in (losing, waiting):
        queue.enqueue(job)
    reasons: list[str] = []
    new_worker(Fragile(), restart=reasons.append)
    eventually(lambda: reasons, "the worker to ask for a new start")
    assert reasons == ["the device was lost: illegal memory access"]
    # The one that lost it keeps its attempt, as it may lose it each time; the other has nothing to do with it.
    assert [found(queue, job).job.attempts for job in (losing, waiting)] == [1, 0]
    for job, attempts in ((losing, 2), (waiting, 1)):
        assert not lost_or_ended(tmp_path, job, StubEngine())
        assert (found(queue, job).state, found(queue, job).job.attempts) == (State.DONE, attempts)


def test_a_job_that_loses_the_device_each_time_ends_when_its_attempts_are_used_up(queue: Queue, tmp_path: Path) -> None:
    job = new_job("lose")
    queue.enqueue(job)
    assert [lost_or_ended(tmp_path, job, Fragile()) for _ in range(4)] == [True, True, True, False]
    failed = found(queue, job).job
    assert (failed.state, failed.attempts) == (State.ERROR, 3)


# The end of the process


def test_a_stop_gives_back_a_job_whose_step_does_not_end(
    monkeypatch: pytest.MonkeyPatch, queue: Queue, new_worker: NewWorker
) -> None:
    monkeypatch.setattr(worker_module, "BREATH", 0.2)
    job = new_job("stub:seconds=3600", steps=1)
    queue.enqueue(job)
    worker = new_worker()
    eventually(lambda: found(queue, job).job.attempts, "the job to be on the device")
    worker.stop(grace=0.1)
    assert (found(queue, job).job.state, found(queue, job).job.attempts) == (State.QUEUED, 0)


def test_a_device_that_cannot_be_used_ends_the_process(
    queue: Queue, new_worker: NewWorker, caplog: pytest.LogCaptureFixture
) -> None:
    died = threading.Event()
    new_worker(Faulty(unusable="the driver is too old"), died=died.set)
    assert died.wait(20)
    assert "the driver is too old" in caplog.text
    assert "Traceback" not in caplog.text


def fill(folder: Path) -> Path:
    """Leave no room on the disk of that folder; removing this file makes it again."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 1024)
    return filler


def test_a_full_disk_fails_the_job_once_there_is_room_to_say_so(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = FileQueue(small_disk / "queue")
    job = new_job("stub:seconds=0.1")
    queue.enqueue(job)
    worker = Worker(queue, StubEngine(), Outputs(small_disk / "outputs"))
    worker.start()
    running(queue, job)
    filler = fill(small_disk)
    eventually(lambda: "its end cannot be written" in caplog.text, "the worker to complain")
    assert found(queue, job).state is State.PROCESSING
    filler.unlink()
    failed = ended(queue, job)
    worker.stop(grace=0)
    assert failed.error is not None
    assert failed.error.kind == "DiskFull"
    queue.close()


def test_a_stop_on_a_full_disk_leaves_the_job_to_the_next_start(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue, died = FileQueue(small_disk / "queue"), threading.Event()
    job = new_job("stub:seconds=0.1")
    queue.enqueue(job)
    worker = Worker(queue, StubEngine(), Outputs(small_disk / "outputs"), died=died.set)
    worker.start()
    running(queue, job)
    filler = fill(small_disk)
    eventually(lambda: "its end cannot be written" in caplog.text, "the worker to complain")
    worker.stop(grace=0)
    queue.close()
    assert f"what became of job {job.id} could not be written" in caplog.text
    assert not died.is_set()
    filler.unlink()
    again = FileQueue(small_disk / "queue")
    worker = Worker(again, StubEngine(), Outputs(small_disk / "outputs"))
    worker.start()
    assert ended(again, job).state is State.DONE
    worker.stop(grace=0)
    again.close()


@pytest.mark.parametrize("small", ["queue", "outputs"])
def test_jobs_wait_while_little_of_a_disk_is_left(
    tmp_path: Path, small_disk: Path, small: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "LOOK_EVERY", 0.2)
    caplog.set_level("INFO")
    (tmp_path / small).symlink_to(small_disk, target_is_directory=True)
    queue = FileQueue(tmp_path / "queue", reserve=48 * 1024 if small == "queue" else 0)
    outputs = Outputs(tmp_path / "outputs", reserve=48 * 1024 if small == "outputs" else 0)
    jobs = [new_job(), new_job(), new_job()]
    for job in jobs:
        queue.enqueue(job)
    filler = fill(small_disk)
    worker = Worker(queue, StubEngine(), outputs)
    worker.start()
    eventually(lambda: "no job begins now" in caplog.text, "the worker to complain")
    time.sleep(1)
    assert [(found(queue, job).state, found(queue, job).job.attempts) for job in jobs] == [(State.QUEUED, 0)] * 3
    told = [record.getMessage() for record in caplog.records if "no job begins now" in record.getMessage()]
    assert len(told) == 1
    assert f"0 MiB are left on the disk of the {'queue' if small == 'queue' else 'pictures'}" in told[0]
    filler.unlink()
    assert [ended(queue, job).state for job in jobs] == [State.DONE] * 3
    assert "jobs begin again" in caplog.text
    worker.stop(grace=0)
    queue.close()


def test_jobs_wait_while_no_picture_can_be_written(
    queue: Queue, new_worker: NewWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOOK_EVERY", 0.2)
    worker = new_worker()
    (tmp_path / "outputs" / ".tmp").rmdir()
    job = new_job()
    queue.enqueue(job)
    time.sleep(1)
    assert found(queue, job).state is State.QUEUED
    (tmp_path / "outputs" / ".tmp").mkdir()
    assert ended(queue, job).state is State.DONE
    assert worker._storage.reasons() == ()


@pytest.mark.parametrize("ending", ["there is room again", "the service stops", "it is cancelled"])
def test_a_start_that_cannot_be_written_fails_no_job(
    tmp_path: Path, small_disk: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    died = threading.Event()
    queue = FileQueue(small_disk / "queue")
    first, second = new_job("stub:seconds=0.1"), new_job("stub:seconds=0.3")
    for job in (first, second):
        queue.enqueue(job)
    worker = Worker(queue, StubEngine(), Outputs(tmp_path / "outputs"), died=died.set)
    worker.start()
    eventually(lambda: found(queue, second).state is State.LOADING, "the second job to be in hand")
    filler = fill(small_disk)
    eventually(lambda: f"job {second.id}: its start cannot be written" in caplog.text, "the worker to complain")
    if ending == "the service stops":
        worker.stop(grace=0)
        queue.close()
        assert not died.is_set()
        filler.unlink()
        queue = FileQueue(small_disk / "queue")
        worker = Worker(queue, StubEngine(), Outputs(tmp_path / "outputs"))
        worker.start()
    filler.unlink(missing_ok=True)
    if ending == "it is cancelled":
        queue.cancel(second.id)
    assert ended(queue, first).state is State.DONE
    last = ended(queue, second)
    cancelled = ending == "it is cancelled"
    assert (last.state, last.attempts) == ((State.CANCELLED, 1) if cancelled else (State.DONE, 1))
    worker.stop(grace=0)
    queue.close()


def test_a_result_too_large_for_a_record_fails_its_job_only(queue: Queue, new_worker: NewWorker) -> None:
    died = threading.Event()
    long: dict[str, Any] = {"prompt": "\1" * 20_000, "negative_prompt": "\1" * 20_000}
    large, good = new_job(**long, count=16, width=8, height=8, payload={"x": "y" * 1_500_000}), new_job()
    for job in (large, good):
        queue.enqueue(job)
    new_worker(died=died.set)
    failed = ended(queue, large)
    assert failed.error is not None
    assert failed.error.kind == "TooLarge"
    assert ended(queue, good).state is State.DONE
    assert not died.is_set()
