"""Callers that wait for the end of jobs, on an event loop of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import plain

from diffusion_api.queues.base import Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job
from diffusion_api.waiters import Waiters


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    """A queue on disk, which nobody serves."""
    queue = FileQueue(tmp_path / "queue")
    yield queue
    queue.close()


def waiting_jobs(queue: Queue, count: int) -> list[str]:
    jobs = [Job(request=plain()) for _ in range(count)]
    for job in jobs:
        queue.enqueue(job)
    return [job.id for job in jobs]


async def seconds_of(*waits: asyncio.Task[None]) -> float:
    began = time.monotonic()
    await asyncio.gather(*waits)
    return time.monotonic() - began


def wait_for(waiters: Waiters, job_ids: list[str], seconds: float = 60) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(waiters.ended(job_id, seconds)) for job_id in job_ids]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in this process", "in another"])
def test_each_is_told_of_the_end_of_its_own_job(queue: Queue, tmp_path: Path, elsewhere: bool) -> None:
    ids = waiting_jobs(queue, 3)
    other = FileQueue(tmp_path / "queue") if elsewhere else queue

    async def main() -> None:
        waits = wait_for(Waiters(queue), [ids[0], ids[1], ids[0], ids[2]])
        await asyncio.sleep(0.5)
        assert not any(wait.done() for wait in waits)
        other.cancel(ids[0])
        assert await seconds_of(waits[0], waits[2]) < 30
        await asyncio.sleep(0.5)
        assert [wait.done() for wait in waits] == [True, False, True, False]
        other.cancel(ids[1])
        other.cancel(ids[2])
        assert await seconds_of(*waits) < 30

    asyncio.run(main())
    other.close()


def test_who_has_waited_long_enough_is_answered(queue: Queue) -> None:
    (job_id,) = waiting_jobs(queue, 1)

    async def main() -> None:
        waiters = Waiters(queue)
        short, long = *wait_for(waiters, [job_id], 0.3), *wait_for(waiters, [job_id], 60)
        assert await seconds_of(short) >= 0.29
        assert not long.done()
        queue.cancel(job_id)
        assert await seconds_of(long) < 30

    asyncio.run(main())


def test_nobody_waits_for_what_is_over_or_never_was(queue: Queue) -> None:
    (job_id,) = waiting_jobs(queue, 1)
    queue.cancel(job_id)

    async def main() -> None:
        assert await seconds_of(*wait_for(Waiters(queue), [job_id, "unknown", "../x"])) < 30

    asyncio.run(main())


def test_nobody_waits_any_longer_once_it_is_closed(queue: Queue) -> None:
    ids = waiting_jobs(queue, 2)

    async def main() -> None:
        waiters = Waiters(queue)
        waits = wait_for(waiters, ids)
        await asyncio.sleep(0.3)
        threading.Thread(target=waiters.close).start()
        assert await seconds_of(*waits) < 30
        assert await seconds_of(*wait_for(waiters, ids)) < 30

    asyncio.run(main())


def test_one_who_gives_up_does_not_disturb_the_others(queue: Queue) -> None:
    (job_id,) = waiting_jobs(queue, 1)

    async def main() -> None:
        waiters = Waiters(queue)
        first, second = wait_for(waiters, [job_id, job_id])
        await asyncio.sleep(0.3)
        first.cancel()
        await asyncio.sleep(0.3)
        assert not second.done()
        queue.cancel(job_id)
        assert await seconds_of(second) < 30

    asyncio.run(main())


def test_a_queue_that_cannot_be_read_keeps_nobody(queue: Queue, tmp_path: Path) -> None:
    (job_id,) = waiting_jobs(queue, 1)

    async def main() -> None:
        (wait,) = wait_for(Waiters(queue), [job_id])
        await asyncio.sleep(0.3)
        (tmp_path / "queue" / "queued").rename(tmp_path / "away")
        assert await seconds_of(wait) < 30

    asyncio.run(main())


def test_looking_takes_a_share_of_the_time_however_many_jobs_are_waited_for(queue: Queue) -> None:
    ids = waiting_jobs(queue, 150)

    async def main() -> None:
        waits = wait_for(Waiters(queue), ids, 60)
        await asyncio.sleep(1)
        busy = time.process_time()
        began = time.monotonic()
        await asyncio.sleep(3)
        share = (time.process_time() - busy) / (time.monotonic() - began)
        for wait in waits:
            wait.cancel()
        assert share < 0.5

    asyncio.run(main())
