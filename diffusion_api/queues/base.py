"""The queue's two halves behind one small interface: clients enqueue and look; workers claim and commit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from diffusion_api.errors import DiskFull, Gone, KeyReused, QueueUnusable, RateLimited
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.schema.report import WorkerReport
from diffusion_api.schema.request import Frozen

WATCH_POLL = 0.2
"""Seconds between two looks at a job that is watched: another process may have changed it."""

DAY = 24 * 60 * 60.0

KEYS = Limits(seconds=DAY)
"""How long a key stands for a job."""

TOMBSTONES = Limits(seconds=30 * DAY, count=100_000)
"""How long it is known that there was a job whose result is no longer kept."""


@dataclass(frozen=True)
class Snapshot:
    """A job as it stands now. ``progress`` is there while it runs; ``position`` (0 = next) while it waits."""

    job: Job
    progress: Progress | None = None
    position: int | None = None

    @property
    def state(self) -> State:
        """The record's state, refined by the progress of a running job."""
        return self.progress.state if self.progress else self.job.state


class Place(NamedTuple):
    """Where a job stands in a list of jobs by the time of their POST: it never changes."""

    created: float
    id: str

    @classmethod
    def of(cls, job: Job) -> Self:
        """The place of this job."""
        return cls(job.created, job.id)


Wanted = Callable[[Snapshot], bool]
"""Whether a job is one of those that are looked for."""


@dataclass(frozen=True)
class Key:
    """What a caller names a submission with, so that sending it again makes no second job."""

    text: str
    fingerprint: str

    @classmethod
    def of(cls, text: str, body: dict[str, Any]) -> Self:
        """The key of a body as it was sent; the order of its fields does not matter."""
        return cls(text, hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())


class Submission(Frozen):
    """What is remembered of a job that came with a key; the seed, since the body may have left it to the service."""

    version: int = 1
    job_id: str
    seed: int | None
    fingerprint: str
    created: float

    @classmethod
    def of(cls, job: Job, key: Key) -> Self:
        """That of a job which comes with this key now."""
        return cls(job_id=job.id, seed=job.request.seeds[0], fingerprint=key.fingerprint, created=time.time())

    @property
    def stands(self) -> bool:
        """True while the key still stands for the job."""
        return KEYS.seconds is None or time.time() - self.created < KEYS.seconds

    def repeated(self, job: Job, key: Key) -> Job:
        """The earlier job, made from the one that is sent now with the same key. Raises KeyReused if it is another."""
        if key.fingerprint != self.fingerprint:
            raise KeyReused(f"Idempotency-Key {key.text!r} was sent before with another body; take a new one for this")
        request = job.request
        if self.seed is not None:
            request = request.model_copy(update={"seed": self.seed})
        return job.model_copy(update={"id": self.job_id, "request": request})


def check_each(waiting: int, at_most: int) -> None:
    """Raise RateLimited if so many jobs of one caller wait that there is no place for one more; 0 is no limit."""
    if at_most and waiting >= at_most:
        raise RateLimited(f"{waiting} jobs of this caller wait already; at most {at_most} may", retry_after=10)


def gone(job_id: str) -> Gone:
    """What is raised for a job whose result was kept for as long as the operator wants."""
    return Gone(f"Job {job_id} has ended, and its result is no longer kept")


class Control(ABC):
    """A worker's hold on one claimed job. Every call is fenced: once the claim is lost, nothing is written."""

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """True once the caller asked for the job to stop. Cheap enough for every step."""

    @property
    @abstractmethod
    def partial(self) -> bool:
        """True if the caller, when it asked for the stop, also asked for what there is so far."""

    @abstractmethod
    def started(self) -> Job:
        """Charge one attempt, durably, just before the job's first device work; the record as charged."""

    @abstractmethod
    def progress(self, progress: Progress) -> None:
        """Tell how far the job is. Never raises: a progress report that cannot be written must not fail a job."""

    @abstractmethod
    def release(self) -> None:
        """Give the job back to the queue, at its old place, burning no attempt."""

    @abstractmethod
    def commit(self, job: Job) -> None:
        """End the job with a terminal record, once. A suspect that ends so gets those attempts back that
        ended in a crash beside others."""


Handler = Callable[[Job, Control], None]
"""What a worker does with one claimed job: it ends with exactly one ``release`` or ``commit``."""

PAUSED_BY_OPERATOR = "the queue was paused by its operator"


@contextlib.contextmanager
def as_queue_errors(folder: str) -> Iterator[None]:
    """Tell the system's errors as DiskFull, or as QueueUnusable of the folder with that name."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no room left on the disk of the queue") from error
        raise QueueUnusable(f"the folder of the {folder} cannot be used: {error.strerror}") from error


class Queue(ABC):
    """Where jobs wait, run and are kept.

    Jobs run by priority, and within one in turns: each caller's oldest job, then each caller's next.
    """

    _closed = False

    # client half

    @abstractmethod
    def enqueue(self, job: Job, *, key: Key | None = None) -> Job:
        """Store the job durably; when this returns, it will not be lost. The job that is stored now.

        That is the earlier one, with its own id, if its caller sent the same ``key`` within a day. A job that has ended
        already is kept as it ended. Raises KeyReused, QueueFull, DiskFull, QueueUnusable.
        """

    @abstractmethod
    def store_input(self, data: bytes) -> str:
        """Store a picture durably, before the job that brings it along; the name by which its request knows it.

        It is swept when it is as old as results are kept and no job names it. Raises QueueFull, DiskFull, QueueUnusable.
        """

    @abstractmethod
    def read_input(self, name: str) -> bytes:
        """The picture of that name, as it was stored. Raises InputLost, QueueUnusable."""

    @abstractmethod
    def check(self) -> None:
        """Try whether a job could be stored now. Raises what :meth:`enqueue` would, and leaves nothing behind."""

    @abstractmethod
    def check_disk(self) -> None:
        """Try whether what happens to a job could be written now. Raises DiskFull, QueueUnusable."""

    @abstractmethod
    def get(self, job_id: str) -> Snapshot | None:
        """The job with that id, or None. Raises Gone for one whose result is no longer kept."""

    @abstractmethod
    def cancel(self, job_id: str, *, partial: bool = False) -> Snapshot | None:
        """Cancel: a waiting job ends at once, a running one is told so; a finished one stays. None if unknown.

        ``partial`` asks a running job for what there is so far. Of several calls the last one that it sees counts.
        Raises Gone like :meth:`get`.
        """

    @abstractmethod
    def forget(self, job_id: str) -> bool:
        """Drop the record of a job that has ended, as if there had been none; False if there is none, or another did."""

    @abstractmethod
    def sweep(self, results: Limits, *, now: float) -> None:
        """Let go of ended jobs beyond these limits, of keys and memories whose time is over at ``now``, and of inputs that
        are that old and that no job names."""

    @abstractmethod
    def jobs(self, states: frozenset[State] | None = None, *, limit: int | None = None) -> list[Job]:
        """Records in these states (all by default): waiting ones in the order they will run, finished ones newest first.

        With a ``limit``, no more than so many: the first.
        """

    @abstractmethod
    def newest(
        self, wanted: Wanted, *, states: frozenset[State], limit: int, before: Place | None = None
    ) -> list[Snapshot]:
        """The jobs in these states that are wanted, newest first by their POST, ``limit`` at most; with ``before``, those
        that are older than that place, so that one call goes on where another ended, whatever has happened in between.
        """

    @abstractmethod
    def counts(self) -> dict[State, int]:
        """How many jobs are QUEUED, PROCESSING (claimed), DONE, ERROR and CANCELLED."""

    @abstractmethod
    def changed(self, since: int, timeout: float) -> int:
        """Wait until something has changed after the mark ``since``, at most ``timeout`` seconds; the present mark.

        What another process changes may be noticed only by looking.
        """

    def _named(self) -> set[str]:
        """The inputs that jobs name. Who runs is looked at twice: a job that is given back moves against the way."""
        unfinished = frozenset(state for state in State if not state.terminal)
        return {name for job in (*self.jobs(), *self.jobs(unfinished)) for name in job.request.inputs}

    def watch(self, job_id: str, timeout: float) -> Iterator[Snapshot]:
        """Snapshots as they change, the present one first; ends after a terminal one, ``timeout`` seconds or close."""
        deadline = time.monotonic() + timeout
        last: Snapshot | None = None
        while True:
            seen = self.changed(0, 0)
            snapshot = self.get(job_id)
            if snapshot is None:
                return
            if snapshot != last:
                last = snapshot
                yield snapshot
            left = deadline - time.monotonic()
            if snapshot.state.terminal or left <= 0 or self._closed:
                return
            self.changed(seen, min(WATCH_POLL, left))

    @abstractmethod
    def workers(self) -> list[WorkerReport]:
        """The last word of every worker that serves this queue now."""

    @abstractmethod
    def pause(self, reason: str = PAUSED_BY_OPERATOR) -> None:
        """Let nothing be claimed until :meth:`resume`, also after a restart. Running jobs go on, new ones may come."""

    @abstractmethod
    def resume(self) -> None:
        """End the pause, if there is one, and forget the crashes that may have led to it."""

    @property
    @abstractmethod
    def paused(self) -> str | None:
        """Why nothing is claimed, or None when the queue is not paused."""

    # worker half

    @abstractmethod
    def recover(self) -> None:
        """Give the jobs of workers that died back to the queue, or end them; :meth:`serve` does so as well."""

    @abstractmethod
    def serve(
        self,
        handle: Handler,
        *,
        wants: Callable[[Job], bool] = lambda job: True,
        ready: Callable[[], bool] = lambda: True,
        slots: int = 1,
    ) -> None:
        """Claim and handle jobs, ``slots`` at a time, until :meth:`stop`. Blocks.

        Before the first claim, jobs of workers that died are recovered: queued again, or ended when their attempts are
        used up. ``wants`` lets the worker leave a job for later or for another; ``ready`` is asked before one is
        claimed, and lets the worker leave all for later.

        A job is claimed when the one before has started or ended, so jobs start in the order of their claims. A suspect
        is claimed when nothing else is in hand, and nothing else is while it runs.
        """

    @abstractmethod
    def report(self, report: WorkerReport) -> None:
        """Let others see how this worker is, for as long as it serves. Never raises."""

    @abstractmethod
    def stop(self) -> None:
        """Claim nothing more; :meth:`serve` returns once the jobs in hand have ended or were released."""

    @abstractmethod
    def close(self) -> None:
        """Drop locks and threads."""
