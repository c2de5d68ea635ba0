"""An installation's processes, driven by hand: what their threads would do, one call at a time, so that each may be the
last.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from asking import plain

from diffusion_api.engine.base import Finished
from diffusion_api.outputs import Outputs
from diffusion_api.queues._file.workers import Worker
from diffusion_api.queues.base import Control, Key, as_queue_errors
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job, Result, State

CAP = 3
"""Attempts that a job has."""
ENDS = tuple(state for state in State if state.terminal)
PIXELS = np.zeros((8, 8, 3), np.uint8)


def new_job(job_id: str, **fields: Any) -> Job:
    """A job with that id."""
    return Job(id=job_id, request=plain(width=8, height=8), **fields)


def made_in(run: int) -> Result:
    """A result without pictures that tells which run made it."""
    return Result(images=(), seconds=run, memory_before_mb=0, memory_after_mb=0)


class Process:
    """One process of an installation. As long as it does not :meth:`serve`, it is one without a worker."""

    def __init__(self, home: Path, **options: Any) -> None:
        self.queue = FileQueue(home / "queue", max_attempts=CAP, **options)
        self._home = home

    @cached_property
    def outputs(self) -> Outputs:
        """Where its pictures are."""
        return Outputs(self._home / "outputs")

    def submit(self, job_id: str, *, key: str | None = None, **fields: Any) -> str:
        """Store a job; the id that its caller is told."""
        return self.queue.enqueue(new_job(job_id, **fields), key=Key(key, "body") if key else None).id

    def serve(self) -> None:
        """Become a worker, and take over from those that died."""
        with as_queue_errors("queue"):
            self.queue._worker = Worker(self.queue._places)
        self.recover()

    def recover(self) -> None:
        """Look for workers that died."""
        self.queue.recover()

    def claim(self) -> tuple[Job, Control] | None:
        """Take the next job in hand."""
        assert self.queue._worker is not None
        claim = self.queue._claim(self.queue._worker, lambda job: True)
        return (claim.job, claim) if claim else None

    def publish(self, job: Job, control: Control) -> None:
        """Save the picture of a job, and end it."""
        saved = self.outputs.save(job, Finished(images=(PIXELS,), seeds=(1,)))
        control.commit(job.succeeded(made_in(1).model_copy(update={"images": saved})))

    def work_off(self) -> None:
        """Run every job that waits to its end."""
        while claimed := self.claim():
            _, control = claimed
            self.publish(control.started(), control)

    def is_published(self, job: Job) -> bool:
        """True if every picture of the job is there as it was recorded."""
        assert job.result
        pictures = [(image, self.outputs.read(image)) for image in job.result.images]
        return all(data and hashlib.sha256(data).hexdigest() == image.sha256 for image, data in pictures)


def places(home: Path) -> dict[str, list[str]]:
    """Where the records of each job lie, by the id in their names. Nothing is opened."""
    found: dict[str, list[str]] = {}
    queue = home / "queue"
    for path in [*queue.glob("queued/*.json"), *queue.glob("running/*/*.json")]:
        found.setdefault(path.stem.split("-", 4)[4], []).append(path.relative_to(queue).parts[0])
    for path in [*(path for end in ENDS for path in queue.glob(f"{end}/*.json")), *queue.glob("gone/*")]:
        found.setdefault(path.name.partition(".")[0], []).append(path.parent.name)
    return found


def leftovers(home: Path) -> list[str]:
    """What lies about that belongs to no job and to no living process, after a recovery by the only worker."""
    queue = home / "queue"
    stray = [*queue.glob("tmp/*"), *queue.glob("progress/*"), *queue.glob("error/*.unreadable")]
    stray += [*(home / "outputs" / ".tmp").glob("*"), *list(queue.glob("workers/*.lock"))[1:]]
    return sorted(str(path.relative_to(home)) for path in stray + list(queue.glob("running/*"))[1:])
