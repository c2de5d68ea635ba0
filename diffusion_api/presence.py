"""What a worker tells others of itself, through its queue."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusion_api.engine.base import Engine
from diffusion_api.metrics import JobMetrics
from diffusion_api.queues.base import Queue
from diffusion_api.schema.report import HeldModel, WorkerReport

EVERY = 1.0
"""Seconds between two reports that say only that a job moved."""


class Presence:
    """Reports a worker at each job's beginning and end, and once in a while when a job moves.

    ``due`` says when the job on the device must have ended, None if it may take its time.
    """

    def __init__(
        self, queue: Queue, engine: Engine, metrics: JobMetrics, restarts: int, due: Callable[[], float | None]
    ) -> None:
        self._queue, self._engine, self._metrics = queue, engine, metrics
        self._restarts, self._due = restarts, due
        self._jobs: list[str] = []
        self._told = 0.0
        self._held: tuple[HeldModel, ...] = ()
        self._guard = threading.Lock()

    @contextmanager
    def holding(self, job_id: str) -> Iterator[None]:
        """Within, the job is in this worker's hands."""
        self._jobs.append(job_id)
        self.tell()
        try:
            yield
        finally:
            self._jobs.remove(job_id)
            self.tell()

    def moved(self) -> None:
        """A job did a step."""
        if time.monotonic() - self._told >= EVERY:
            self.tell()

    def look(self) -> None:
        """Report if other models are in memory than was told last: they leave it when there is no job."""
        if self._engine.held != self._held:
            self.tell()

    def tell(self) -> None:
        """Report as things stand now."""
        with self._guard:  # so that the last word is written last
            self._told, self._held = time.monotonic(), self._engine.held
            report = WorkerReport(
                pid=os.getpid(),
                device=self._engine.report(),
                jobs=tuple(self._jobs),
                event=self._told,
                due=self._due(),
                restarts=self._restarts,
                metrics=self._metrics.render(),
            )
            self._queue.report(report)
