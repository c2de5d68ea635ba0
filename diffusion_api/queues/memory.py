"""The queue in the memory of one process, for tests and embedding: the same contract, and nothing left afterwards."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from diffusion_api.blobs import MemoryBlobs
from diffusion_api.errors import QueueFull
from diffusion_api.queues.base import (
    PAUSED_BY_OPERATOR,
    TOMBSTONES,
    Control,
    Handler,
    Key,
    Place,
    Queue,
    Snapshot,
    Submission,
    Wanted,
    check_each,
    gone,
)
from diffusion_api.retention import Entry, Limits, due
from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.schema.report import WorkerReport

log = logging.getLogger(__name__)

CLAIM_POLL = 0.25  # what ``wants`` answers may change without a word


class _Order(NamedTuple):
    rank: int
    round: int
    sequence: int


@dataclass
class _Entry:
    job: Job
    order: _Order
    claim: _Claim | None = None

    @property
    def waits(self) -> bool:
        return self.claim is None and not self.job.state.terminal


class MemoryQueue(Queue):
    """Jobs in a dict. A job that a failing ``serve`` left in hand ``max_attempts`` times ends in error.

    At most ``max_waiting`` jobs wait, ``max_waiting_each`` of one caller; 0 is no limit. A stopped queue stays stopped.
    """

    def __init__(self, *, max_attempts: int = 3, max_waiting: int = 0, max_waiting_each: int = 0) -> None:
        self._max_attempts = max_attempts
        self._max_waiting, self._max_waiting_each = max_waiting, max_waiting_each
        self._paused: str | None = None
        self._entries: dict[str, _Entry] = {}
        self._keys: dict[tuple[str, str], Submission] = {}
        self._gone: dict[str, float] = {}
        self._inputs = MemoryBlobs()
        self._sequence = itertools.count()
        self._turn = threading.Lock()
        self._event = threading.Condition()
        self._changes = 0
        self._report: WorkerReport | None = None
        self._serving = False
        self._stopped = False
        self._closed = False

    # client half

    def enqueue(self, job: Job, *, key: Key | None = None) -> Job:
        """Store the job, unless its key says that it is stored already. The job that is stored now.

        Raises KeyReused, QueueFull.
        """
        with self._event:
            known = self._keys.get((job.caller, key.text)) if key else None
            if key and known and known.stands:
                job = known.repeated(job, key)
                entry = self._entries.get(job.id)
                return entry.job if entry else job
            self.check()
            theirs = sum(entry.waits and entry.job.caller == job.caller for entry in self._entries.values())
            check_each(theirs, self._max_waiting_each)
            if key:
                self._keys[job.caller, key.text] = Submission.of(job, key)
            self._entries[job.id] = _Entry(job, _Order(-job.priority, self._round_of(job), next(self._sequence)))
            self._announce()
            return job

    def store_input(self, data: bytes) -> str:
        """Store a picture before the job that brings it along; the name by which its request knows it."""
        self.check()
        return self._inputs.put(data)

    def read_input(self, name: str) -> bytes:
        """The picture of that name, as it was stored. Raises InputLost."""
        return self._inputs.get(name)

    def check(self) -> None:
        """Raise QueueFull if a job could not be stored now."""
        with self._event:
            waiting = sum(entry.waits for entry in self._entries.values())
        if self._max_waiting and waiting >= self._max_waiting:
            raise QueueFull(f"{waiting} jobs wait already; at most {self._max_waiting} may")

    def check_disk(self) -> None:
        """Nothing: there is none."""

    def get(self, job_id: str) -> Snapshot | None:
        """The job with that id, or None. Raises Gone."""
        with self._event:
            entry = self._entries.get(job_id)
            if entry is None:
                if job_id in self._gone:
                    raise gone(job_id)
                return None
            if entry.claim:
                return Snapshot(entry.job, progress=entry.claim.latest)
            if entry.job.state.terminal:
                return Snapshot(entry.job)
            before = sum(1 for other in self._entries.values() if other.waits and other.order < entry.order)
            return Snapshot(entry.job, position=before)

    def cancel(self, job_id: str, *, partial: bool = False) -> Snapshot | None:
        """Cancel: a waiting job ends at once, a running one is told so; a finished one stays. None if unknown.

        Raises Gone.
        """
        with self._event:
            entry = self._entries.get(job_id)
            if entry and entry.claim:
                entry.claim.tell_cancelled(partial=partial)
            elif entry and entry.waits:
                entry.job = entry.job.cancelled()
            self._announce()
            return self.get(job_id)

    def forget(self, job_id: str) -> bool:
        """Drop a job that has ended; False if there is none."""
        with self._event:
            entry = self._entries.get(job_id)
            ended = entry is not None and entry.job.state.terminal
            if ended:
                del self._entries[job_id]
            return ended

    def sweep(self, results: Limits, *, now: float) -> None:
        """Let go of ended jobs beyond these limits, and of keys, tombstones and inputs whose time is over at ``now``."""
        with self._event:
            ended = [Entry(e.job.id, e.job.finished or now) for e in self._entries.values() if e.job.state.terminal]
            for entry in due(ended, results, now=now, what="results"):
                del self._entries[entry.name]
                self._gone[entry.name] = now
            for entry in due([Entry(*gone) for gone in self._gone.items()], TOMBSTONES, now=now, what="tombstones"):
                del self._gone[entry.name]
            self._keys = {name: kept for name, kept in self._keys.items() if kept.stands}
        self._inputs.sweep(results, now=now, named=self._named)

    def jobs(self, states: frozenset[State] | None = None, *, limit: int | None = None) -> list[Job]:
        """Running jobs, with the state of their progress; then waiting ones, next first; then ended, newest first."""
        with self._event:
            entries = list(self._entries.values())
            running = [e.job.model_copy(update={"state": e.claim.latest.state}) for e in entries if e.claim]
            waiting = [e.job for e in sorted(entries, key=lambda e: e.order) if e.waits]
            ended = [e.job for e in entries if e.job.state.terminal]
        ended.sort(key=lambda job: job.finished or job.created, reverse=True)
        return [job for job in running + waiting + ended if states is None or job.state in states][:limit]

    def newest(
        self, wanted: Wanted, *, states: frozenset[State], limit: int, before: Place | None = None
    ) -> list[Snapshot]:
        """The jobs in these states that are wanted, newest first, ``limit`` at most, those before a place if there is one."""
        with self._event:
            found = [
                snapshot for job_id in self._entries if (snapshot := self.get(job_id)) and snapshot.state in states
            ]
        placed = sorted(((Place.of(snapshot.job), snapshot) for snapshot in found if wanted(snapshot)), reverse=True)
        return [snapshot for place, snapshot in placed if before is None or place < before][:limit]

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        counts = dict.fromkeys((State.QUEUED, State.PROCESSING, State.DONE, State.ERROR, State.CANCELLED), 0)
        with self._event:
            for entry in self._entries.values():
                counts[State.PROCESSING if entry.claim else entry.job.state] += 1
        return counts

    def changed(self, since: int, timeout: float) -> int:
        """Wait until something has changed after the mark ``since``, at most ``timeout`` seconds; the present mark."""
        self._wait(since, timeout)
        return self._changes

    def workers(self) -> list[WorkerReport]:
        """What the one worker says, while it serves."""
        return [self._report] if self._serving and self._report else []

    def pause(self, reason: str = PAUSED_BY_OPERATOR) -> None:
        """Let nothing be claimed until :meth:`resume`."""
        with self._turn:
            self._paused = reason

    def resume(self) -> None:
        """End the pause, if there is one."""
        self._paused = None
        self._announce()

    @property
    def paused(self) -> str | None:
        """Why nothing is claimed, or None when the queue is not paused."""
        return self._paused

    # worker half

    def recover(self) -> None:
        """Nothing: the jobs of a server that ended went back when it did."""

    def serve(
        self,
        handle: Handler,
        *,
        wants: Callable[[Job], bool] = lambda job: True,
        ready: Callable[[], bool] = lambda: True,
        slots: int = 1,
    ) -> None:
        """Claim and handle jobs, ``slots`` at a time, until :meth:`stop`. Blocks.

        What ``handle``, ``wants`` or ``ready`` raises ends the serving and is raised here; jobs left in hand then wait again.
        Raises RuntimeError while this queue is served already.
        """
        if self._serving:
            raise RuntimeError("this queue is being served already")
        self._serving = True
        failures: list[BaseException] = []
        threads = [
            threading.Thread(
                target=self._serve_slot, args=(handle, wants, ready, failures), daemon=True, name=f"slot-{n}"
            )
            for n in range(slots)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self.stop()
            self._give_up()
            self._serving = False
        if failures:
            raise failures[0]

    def report(self, report: WorkerReport) -> None:
        """Let others see how the worker is, for as long as it serves."""
        self._report = report

    def stop(self) -> None:
        """Claim nothing more; :meth:`serve` returns once the jobs in hand have ended or were released."""
        self._stopped = True
        self._announce()

    def close(self) -> None:
        """Stop, and end the watching; jobs still in hand wait again."""
        self._closed = True
        self.stop()
        self._give_up()

    def _serve_slot(
        self,
        handle: Handler,
        wants: Callable[[Job], bool],
        ready: Callable[[], bool],
        failures: list[BaseException],
    ) -> None:
        try:
            self._handle_jobs(handle, wants, ready)
        except BaseException as error:  # a thread has nobody to raise to: serve() does it
            failures.append(error)
            self.stop()

    def _handle_jobs(self, handle: Handler, wants: Callable[[Job], bool], ready: Callable[[], bool]) -> None:
        while not self._stopped:
            seen = self._changes
            claim = self._claim(wants, ready)
            if claim is None:
                self._wait(seen, CLAIM_POLL)
                continue
            handle(claim.entry.job, claim)
            if not claim.over:
                raise RuntimeError(f"{claim.entry.job.id}: the handler returned without release or commit")

    def _claim(self, wants: Callable[[Job], bool], ready: Callable[[], bool] = lambda: True) -> _Claim | None:
        """The first waiting job that is wanted, now in hand; None while another's turn to start has not passed."""
        with self._turn:
            in_hand = [entry.claim for entry in list(self._entries.values()) if entry.claim]
            if self._paused is not None or any(claim.bars_others for claim in in_hand):
                return None
            for job in self.jobs(frozenset({State.QUEUED})):
                if self._stopped:
                    return None
                if not wants(job):
                    continue
                if (job.suspect and in_hand) or not ready():
                    return None
                with self._event:
                    entry = self._entries[job.id]
                    if entry.waits:
                        entry.claim = _Claim(self, entry)
                        self._announce()
                        return entry.claim
            return None

    def _round_of(self, job: Job) -> int:
        """The round of jobs, one of each caller, that the new job belongs to: this one or after its caller's last."""
        there = [entry for entry in self._entries.values() if entry.job.priority == job.priority]
        waiting = [entry for entry in there if entry.waits]
        mine = max((entry.order.round + 1 for entry in waiting if entry.job.caller == job.caller), default=0)
        after_those_in_hand = max((entry.order.round + 1 for entry in there if entry.claim), default=0)
        return max(mine, min((entry.order.round for entry in waiting), default=after_those_in_hand))

    def _give_up(self) -> None:
        """What recovery is to a queue on disk: no job stays with a server that has gone."""
        with self._event:
            in_hand = [entry for entry in self._entries.values() if entry.claim]
            alone = sum(entry.job.begun for entry in in_hand) == 1
            for entry in in_hand:
                cancelled = entry.claim is not None and entry.claim.cancelled
                entry.job, entry.claim = self._recovered(entry.job, alone=alone, cancelled=cancelled), None
            self._announce()

    def _recovered(self, job: Job, *, alone: bool, cancelled: bool) -> Job:
        if cancelled:
            return job.cancelled()
        return job.orphaned(max_attempts=self._max_attempts, alone=alone)

    def _announce(self) -> None:
        with self._event:
            self._changes += 1
            self._event.notify_all()

    def _wait(self, seen: int, seconds: float) -> None:
        with self._event:
            self._event.wait_for(lambda: self._changes != seen, seconds)


class _Claim(Control):
    """One job in hand, until it ends, is released, or the queue gives it up."""

    def __init__(self, queue: MemoryQueue, entry: _Entry) -> None:
        self.entry = entry
        self.latest = Progress()
        self.over = False
        self._queue = queue
        self._charged = False
        self._cancelled = False
        self._partial = False

    @property
    def bars_others(self) -> bool:
        """True while nothing else may be claimed: until the job has started, and a suspect's whole time."""
        return not self._charged or self.entry.job.suspect

    @property
    def cancelled(self) -> bool:
        """True once the caller asked for the job to stop, or once the claim is lost."""
        return self._cancelled or self.entry.claim is not self

    @property
    def partial(self) -> bool:
        """True if the caller, when it asked for the stop, also asked for what there is so far."""
        return self._partial

    def tell_cancelled(self, *, partial: bool) -> None:
        """The caller's word."""
        self._partial = partial
        self._cancelled = True

    def started(self) -> Job:
        """Charge one attempt, once per claim; the record as charged, or unchanged if the claim is lost."""
        with self._queue._event:
            if not self._charged and self._held("started"):
                self.entry.job, self._charged = self.entry.job.charged(), True
                self._queue._announce()
            return self.entry.job

    def progress(self, progress: Progress) -> None:
        """Tell how far the job is."""
        self.latest = progress
        self._queue._announce()

    def release(self) -> None:
        """Give the job back, at its old place; one whose caller asked for its end is ended instead."""
        with self._queue._event:
            if self._held("release"):
                job = self.entry.job
                back = job.uncharged() if self._charged else job.requeued()
                self._end(job.cancelled() if self._cancelled else back)

    def commit(self, job: Job) -> None:
        """End the job, once."""
        if not job.state.terminal or job.id != self.entry.job.id:
            raise ValueError(f"{self.entry.job.id}: not the end of this job: {job.id} {job.state}")
        with self._queue._event:
            if self._held("commit"):
                self._end(job.acquitted())

    def _held(self, intent: str) -> bool:
        if self.entry.claim is not self:
            self.over = True
            log.warning("%s: %s ignored: the job is no longer this worker's", self.entry.job.id, intent)
        return not self.over

    def _end(self, job: Job) -> None:
        self.entry.job, self.entry.claim, self.over = job, None, True
        self._queue._announce()
