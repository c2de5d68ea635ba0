"""An installation's processes, driven by hand: what their threads would do, one call at a time, so that each may be the
last.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from asking import plain

from diffusion_api.engine.base import Finished
from diffusion_api.outputs import Outputs
from diffusion_api.queues._file.workers import Worker
from diffusion_api.queues.base import Control, Key
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job, Result, State

CAP = 3
"""Attempts that a job has."""
ENDS = tuple(state for state in State if state.terminal)
PIXELS = np.zeros((8, 8, 3), np.uint8)


def new_job(job_id: str, **fields: Any) -> Job:
    """A job with that id."""
    return Job(id=job_id, request=plain(width=8, height=8), **fields)


class Process:
    """One process of an installation. As long as it does not :meth:`serve`, it is one without a worker."""

    def __init__(self, home: Path, **options: Any) -> None:
        self.queue = FileQueue(home / "queue", max_attempts=CAP, **options)
        self.outputs = Outputs(home / "outputs")

    def submit(self, job_id: str, *, key: str | None = None, **fields: Any) -> str:
        """Store a job; the id that its caller is told."""
        return self.queue.enqueue(new_job(job_id, **fields), key=Key(key, "body") if key else None).id

    def serve(self) -> None:
        """Become a worker, and take over from those that died."""
        self.queue._worker = Worker(self.queue._places)
        self.recover()

    def recover(self) -> None:
        """Look for workers that died."""
        self.queue.recover()

    def claim(self) -> Control | None:
        """Take the next job in hand."""
        assert self.queue._worker is not None
        return self.queue._claim(self.queue._worker, lambda job: True)

    def publish(self, control: Control) -> None:
        """Save the picture of a job, and end it."""
        job = control.job
        saved = self.outputs.save(job, Finished(images=(PIXELS,), seeds=(1,)))
        result = Result(images=saved, seconds=1, memory_before_mb=1, memory_after_mb=1)
        control.commit(job.succeeded(result))

    def work_off(self) -> None:
        """Run every job that waits to its end."""
        while control := self.claim():
            control.started()
            self.publish(control)

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
