"""Jobs, and a queue being served, for the tests of queues."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from asking import plain

from diffusion_api.queues.base import Handler, Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.job import Job, Result

NewJob = Callable[..., Job]
Serving = Callable[..., AbstractContextManager[None]]
Eventually = Callable[[Callable[[], object]], None]

PATIENCE = 20.0

QUEUES: dict[str, Callable[..., Queue]] = {
    "file": lambda home, **options: FileQueue(home / "queue", **options),
    "memory": lambda home, **options: MemoryQueue(**options),
}


@pytest.fixture(params=QUEUES)
def make_queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Queue]]:
    """Makes a queue of each kind; keywords are its options."""
    made: list[Queue] = []

    def make(**options: Any) -> Queue:
        made.append(QUEUES[request.param](tmp_path, **options))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


@pytest.fixture
def queue(make_queue: Callable[..., Queue]) -> Queue:
    """One of each kind, as it is without options."""
    return make_queue()


@pytest.fixture
def new_job() -> NewJob:
    """Makes a job; keywords are its fields, ``model`` is its request's."""

    def make(*, model: str = "tiny", **fields: Any) -> Job:
        return Job(request=plain(model=model, schedule="automatic"), **fields)

    return make


@pytest.fixture
def result() -> Result:
    """What a job made that made nothing."""
    return Result(images=(), seconds=0.1, memory_before_mb=1.0, memory_after_mb=1.0)


@pytest.fixture
def serving() -> Serving:
    """``with serving(queue, handle):`` serves on a thread; leaving stops it, and raises what ``serve`` raised."""

    @contextmanager
    def serve(queue: Queue, handle: Handler, **options: Any) -> Iterator[None]:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                queue.serve(handle, **options)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            queue.stop()
            thread.join(PATIENCE)
        assert not thread.is_alive()
        if failures:
            raise failures[0]

    return serve


@pytest.fixture
def eventually() -> Eventually:
    """Waits until something holds."""

    def wait(holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    return wait
