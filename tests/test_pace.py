"""How long jobs take, and when they will have ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import plain
from serving import eventually

from diffusion_api.engine.stub import StubEngine
from diffusion_api.outputs import Outputs
from diffusion_api.pace import LOOK_AHEAD, Forecast, Pace, work
from diffusion_api.queues.base import Control, Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.schema.report import WorkerReport
from diffusion_api.schema.request import Caption, Embed, Txt2Img
from diffusion_api.worker import Worker


@pytest.fixture
def pace(tmp_path: Path) -> Pace:
    """A pace that has learned nothing."""
    return Pace(tmp_path / "pace.json", tmp=tmp_path)


@pytest.fixture
def queue() -> Iterator[Queue]:
    """A queue in memory."""
    queue = MemoryQueue()
    yield queue
    queue.close()


def left(forecast: Forecast, queue: Queue, job: Job) -> float | None:
    snapshot = queue.get(job.id)
    assert snapshot is not None
    return forecast.seconds_left(snapshot)


def queued(queue: Queue, request: Txt2Img, count: int = 1) -> list[Job]:
    jobs = [Job(request=request) for _ in range(count)]
    for job in jobs:
        queue.enqueue(job)
    return jobs


# Learning


def test_nothing_is_known_before_a_job_has_run(pace: Pace) -> None:
    assert pace.seconds(plain()) is None


def test_a_job_takes_as_long_as_the_last_one_like_it(pace: Pace) -> None:
    pace.learn(plain(steps=20), 10)
    assert pace.seconds(plain(steps=20)) == pytest.approx(10)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"steps": 40}, 2),
        ({"width": 128, "height": 128}, 4),
        ({"count": 3}, 3),
        ({"guidance_scale": 1}, 0.5),
        ({"sampler": "heun"}, 39 / 20),  # its last step needs no corrector
        ({"prompt": "something else", "seed": 2}, 1),
    ],
    ids=str,
)
def test_work_grows_with_what_the_engine_has_to_do(changes: dict[str, object], times: float) -> None:
    assert work(plain(**{"steps": 20} | changes)) == pytest.approx(times * work(plain(steps=20)))


def test_newer_jobs_count_more_than_older_ones(pace: Pace) -> None:
    pace.learn(plain(), 100)
    for _ in range(20):
        pace.learn(plain(), 10)
    assert pace.seconds(plain()) == pytest.approx(10, rel=0.05)
    pace.learn(plain(), 1000)
    assert pace.seconds(plain()) < 1000  # type: ignore[operator]


def test_a_share_of_a_job_teaches_of_the_whole(pace: Pace) -> None:
    pace.learn(plain(), 10, share=0.25)
    assert pace.seconds(plain()) == pytest.approx(40)


@pytest.mark.parametrize(("seconds", "share"), [(1, 0), (1, -1), (0, 1), (-1, 1)])
def test_what_teaches_nothing_is_left(pace: Pace, seconds: float, share: float) -> None:
    pace.learn(plain(), seconds, share=share)
    assert pace.seconds(plain()) is None


def test_each_model_has_its_own_pace_and_a_new_one_is_taken_as_average(pace: Pace) -> None:
    pace.learn(plain(model="fast"), 1)
    pace.learn(plain(model="slow"), 9)
    found = [pace.seconds(plain(model=name)) for name in ("fast", "slow", "new")]
    assert found == [pytest.approx(seconds) for seconds in (1, 9, 5)]


def test_what_a_model_tells_of_pictures_says_nothing_of_how_long_it_draws(pace: Pace) -> None:
    seen = {"model": "small", "image": "0", "width": 512, "height": 512, "seed": 0}
    caption = Caption(**seen, steps=20, guidance_scale=7.5)
    for told in (caption, Embed(**seen)):
        assert pace.seconds(told) is None
        pace.learn(told, 3)
        assert pace.seconds(told) == pytest.approx(3)
    assert pace.seconds(caption.model_copy(update={"steps": 40, "guidance_scale": 1.0})) == pytest.approx(3)
    assert pace.seconds(plain(model="small")) is None
    pace.learn(plain(model="small"), 9)
    assert pace.seconds(caption) == pytest.approx(3)
    assert pace.seconds(caption.model_copy(update={"model": "new"})) == pytest.approx(3)


def test_a_sampler_of_another_release_makes_the_time_unknown(pace: Pace) -> None:
    pace.learn(plain(), 1)
    assert pace.seconds(plain(sampler="of another release")) is None


def test_what_one_process_learns_the_others_know(pace: Pace, tmp_path: Path) -> None:
    other = Pace(tmp_path / "pace.json", tmp=tmp_path)
    assert other.seconds(plain()) is None
    pace.learn(plain(), 7)
    assert other.seconds(plain()) == pytest.approx(7)
    other.learn(plain(model="second"), 3)
    assert pace.seconds(plain(model="second")) == pytest.approx(3)
    assert [path.name for path in tmp_path.iterdir()] == ["pace.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seconds": {"small": -1}}', b'{"seconds": {"small": "x"}}'])
def test_a_file_that_cannot_be_read_is_learned_again(pace: Pace, tmp_path: Path, content: bytes) -> None:
    pace.learn(plain(), 7)
    (tmp_path / "pace.json").write_bytes(content)
    assert pace.seconds(plain()) is None
    pace.learn(plain(), 8)
    assert pace.seconds(plain()) == pytest.approx(8)


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "gone" / "pace.json", tmp=tmp_path / "gone")
    pace.learn(plain(), 7)
    assert pace.seconds(plain()) is None


def test_a_worker_learns_from_the_jobs_that_it_runs(pace: Pace, queue: Queue, tmp_path: Path) -> None:
    worker = Worker(queue, StubEngine(), Outputs(tmp_path / "outputs"), pace=pace)
    worker.start()
    (job,) = queued(queue, plain(prompt="stub:seconds=0.05", steps=10))
    eventually(lambda: queue.get(job.id).state.terminal, "the job to end")  # type: ignore[union-attr]
    worker.stop(grace=0)
    assert queue.get(job.id).state is State.DONE  # type: ignore[union-attr]
    assert 0.5 <= pace.seconds(plain(steps=10)) < 60  # type: ignore[operator]


# Waiting


def test_a_waiting_job_ends_after_those_before_it(pace: Pace, queue: Queue) -> None:
    pace.learn(plain(steps=10), 10)
    short, long, last = *queued(queue, plain(steps=5)), *queued(queue, plain(steps=30)), *queued(queue, plain(steps=10))
    forecast = Forecast(queue, pace)
    assert left(forecast, queue, short) == pytest.approx(5, abs=1)
    assert left(forecast, queue, long) == pytest.approx(35, abs=1)
    assert left(forecast, queue, last) == pytest.approx(45, abs=1)


def test_the_end_of_a_job_is_unknown_before_anything_was_learned(pace: Pace, queue: Queue) -> None:
    (job,) = queued(queue, plain())
    assert left(Forecast(queue, pace), queue, job) is None


def test_what_lies_further_ahead_is_taken_as_average(pace: Pace, queue: Queue) -> None:
    pace.learn(plain(steps=10), 10)
    jobs = queued(queue, plain(steps=10), 2 * LOOK_AHEAD)
    assert left(Forecast(queue, pace), queue, jobs[-1]) == pytest.approx(20 * LOOK_AHEAD, abs=1)


def test_running_jobs_count_with_what_is_left_of_them(pace: Pace, queue: Queue) -> None:
    pace.learn(plain(steps=10), 100)
    first, second, third = queued(queue, plain(steps=10), 3)
    held, over = threading.Semaphore(0), threading.Event()

    def hold(job: Job, control: Control) -> None:
        if job.id == first.id:
            control.started()
            control.progress(Progress(state=State.PROCESSING, fraction=0.75))
        held.release()
        over.wait(60)
        control.release()

    serving = threading.Thread(target=queue.serve, args=(hold,), kwargs={"slots": 2})
    serving.start()
    assert held.acquire(timeout=60)
    assert held.acquire(timeout=60)
    forecast = Forecast(queue, pace)
    found = [left(forecast, queue, job) for job in (first, second, third)]
    queue.stop()
    over.set()
    serving.join(60)
    assert found == [pytest.approx(seconds, abs=5) for seconds in (25, 125, 225)]


def test_two_workers_take_half_the_time(pace: Pace, tmp_path: Path) -> None:
    pace.learn(plain(steps=10), 10)
    ends = {}
    for count in (1, 2):
        queue = FileQueue(tmp_path / str(count))
        others = [FileQueue(tmp_path / str(count)) for _ in range(count)]
        queue.pause()
        threads = [threading.Thread(target=other.serve, args=(lambda job, control: None,)) for other in others]
        for thread, other in zip(threads, others, strict=True):
            thread.start()
            other.report(WorkerReport(pid=1, event=0))
        eventually(lambda queue=queue, count=count: len(queue.workers()) == count, "the workers to be seen")
        last = queued(queue, plain(steps=10), 10)[-1]
        ends[count] = left(Forecast(queue, pace), queue, last)
        for each in (*others, queue):
            each.close()
        for thread in threads:
            thread.join(60)
    assert ends == {1: pytest.approx(100, abs=3), 2: pytest.approx(50, abs=3)}
