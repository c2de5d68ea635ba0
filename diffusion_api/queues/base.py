"""The queue's two halves behind one small interface: clients enqueue and look; workers claim and commit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.schema.report import WorkerReport


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
        """End the job with a terminal record, once. A suspect that ends so gets the attempts of its crashes back."""


Handler = Callable[[Job, Control], None]
"""What a worker does with one claimed job: it ends with exactly one ``release`` or ``commit``."""

PAUSED_BY_OPERATOR = "the queue was paused by its operator"


class Queue(ABC):
    """Where jobs wait, run and are kept.

    Jobs run by priority, and within one in turns: each caller's oldest job, then each caller's next.
    """

    # client half

    @abstractmethod
    def enqueue(self, job: Job) -> None:
        """Store the job durably; when this returns, it will not be lost. Raises QueueFull, DiskFull, QueueUnusable."""

    @abstractmethod
    def check(self) -> None:
        """Try whether a job could be stored now. Raises what :meth:`enqueue` would, and leaves nothing behind."""

    @abstractmethod
    def get(self, job_id: str) -> Snapshot | None:
        """The job with that id, or None."""

    @abstractmethod
    def cancel(self, job_id: str, *, partial: bool = False) -> Snapshot | None:
        """Cancel: a waiting job ends at once, a running one is told so; a finished one stays. None if unknown.

        ``partial`` asks a running job for what there is so far. Of several calls the last one that it sees counts.
        """

    @abstractmethod
    def jobs(self, states: frozenset[State] | None = None, *, limit: int | None = None) -> list[Job]:
        """Records in these states (all by default): waiting ones in the order they will run, finished ones newest first.

        With a ``limit``, no more than so many: the first.
        """

    @abstractmethod
    def counts(self) -> dict[State, int]:
        """How many jobs are QUEUED, PROCESSING (claimed), DONE, ERROR and CANCELLED."""

    @abstractmethod
    def changed(self, since: int, timeout: float) -> int:
        """Wait until something has changed after the mark ``since``, at most ``timeout`` seconds; the present mark.

        What another process changes may be noticed only by looking.
        """

    @abstractmethod
    def watch(self, job_id: str, timeout: float) -> Iterator[Snapshot]:
        """Snapshots as they change, the present one first; ends after a terminal one or ``timeout`` seconds."""

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
    def serve(self, handle: Handler, *, wants: Callable[[Job], bool] = lambda job: True, slots: int = 1) -> None:
        """Claim and handle jobs, ``slots`` at a time, until :meth:`stop`. Blocks.

        Before the first claim, jobs of workers that died are recovered: queued again, or ended when their attempts are
        used up. ``wants`` lets the worker leave a job for later or for another.

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
