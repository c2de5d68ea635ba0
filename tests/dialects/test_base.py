"""What every dialect shares, with the app called as a server calls it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import plain
from serving import eventually

from diffusion_api.app import App, create_app
from diffusion_api.catalog.library import Library
from diffusion_api.dialects.native import jobs
from diffusion_api.outputs import Outputs
from diffusion_api.queues.base import Control, Queue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.server import build_access
from diffusion_api.service import Service
from diffusion_api.settings import Settings


@pytest.fixture
def queue() -> Iterator[Queue]:
    """A queue that nobody serves."""
    queue = MemoryQueue()
    yield queue
    queue.close()


@pytest.fixture
def app(queue: Queue, tmp_path: Path) -> App:
    """The app of that queue."""
    settings = Settings(home=tmp_path)
    settings.create_folders()
    library, outputs = Library(tmp_path, settings.models_dir), Outputs(settings.outputs_dir)
    return create_app(Service(settings, library, queue, outputs, None), settings, build_access(settings))


class Caller:
    """One request, and the caller's side of its connection."""

    def __init__(self, path: str, query: str = "", method: str = "GET") -> None:
        self.scope: dict[str, Any] = {
            **{"type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": ""},
            **{
                "query_string": query.encode(),
                "headers": [(b"host", b"127.0.0.1")],
                "http_version": "1.1",
                "scheme": "http",
            },
            **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "asgi": {"version": "3.0"}},
        }
        self.answers: list[Any] = []
        self.gone = asyncio.Event()
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if self._asked:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        self._asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Any) -> None:
        self.answers.append(message)


def test_a_caller_that_hangs_up_leaves_no_waiting_behind(app: App, queue: Queue) -> None:
    job = Job(request=plain())
    queue.enqueue(job)

    async def main() -> None:
        base = len(asyncio.all_tasks())
        callers = [Caller(f"/queue/{job.id}", "wait=60") for _ in range(20)]
        requests = [asyncio.create_task(app(caller.scope, caller.receive, caller.send)) for caller in callers]
        await asyncio.sleep(0.5)
        assert not any(request.done() for request in requests)
        for caller in callers:
            caller.gone.set()
        await asyncio.wait_for(asyncio.gather(*requests), 30)
        for _ in range(300):
            if len(asyncio.all_tasks()) == base:
                break
            await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) == base

    asyncio.run(main())
    assert queue.get(job.id).state is State.QUEUED  # type: ignore[union-attr]


def test_a_caller_that_stays_is_answered(app: App, queue: Queue) -> None:
    job = Job(request=plain())
    queue.enqueue(job)

    async def main() -> None:
        caller = Caller(f"/queue/{job.id}", "wait=60")
        request = asyncio.create_task(app(caller.scope, caller.receive, caller.send))
        await asyncio.sleep(0.3)
        queue.cancel(job.id)
        await asyncio.wait_for(request, 30)
        assert caller.answers[0]["status"] == 200

    asyncio.run(main())


def test_a_step_that_takes_long_does_not_keep_who_cancels_waiting(
    app: App, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "NEXT_STEP", 0.3)
    job, step = Job(request=plain()), threading.Event()
    queue.enqueue(job)

    def run(job: Job, control: Control) -> None:
        control.started()
        control.progress(Progress(state=State.PROCESSING, fraction=0.5))
        step.wait(60)
        control.commit(job.cancelled())

    async def main() -> dict[str, Any]:
        caller = Caller(f"/queue/{job.id}", method="DELETE")
        await asyncio.wait_for(app(caller.scope, caller.receive, caller.send), 30)
        assert caller.answers[0]["status"] == 200
        status: dict[str, Any] = json.loads(caller.answers[1]["body"])
        return status

    serving = threading.Thread(target=queue.serve, args=(run,))
    serving.start()
    eventually(lambda: queue.get(job.id).state is State.PROCESSING, "the job to run")  # type: ignore[union-attr]
    status = asyncio.run(main())
    step.set()
    eventually(lambda: queue.get(job.id).state is State.CANCELLED, "the step to end")  # type: ignore[union-attr]
    queue.stop()
    serving.join(60)
    assert (status["state"], status["cancelled"], status["error"]) == ("processing", True, None)
