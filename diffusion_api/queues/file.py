"""The queue as a folder: one file per job, moved by rename, shared by any number of processes on one machine.

A job is where its record lies (see :mod:`._file.places`), and only the owner of a folder writes the records in it: the
worker that claimed by renaming into its own folder, or who recovers a dead one's (see :mod:`._file.workers`). A job
ends by the rename into ``done/``, ``error/`` or ``cancelled/``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffusion_api import disk
from diffusion_api.blobs import FileBlobs
from diffusion_api.errors import QueueUnusable, TooLarge
from diffusion_api.queues._file import reports
from diffusion_api.queues._file.ended import Ended
from diffusion_api.queues._file.keys import Keys
from diffusion_api.queues._file.listing import Candidate, newest
from diffusion_api.queues._file.places import (
    FOLDERS,
    MAX_RECORD,
    Folder,
    id_of,
    is_id,
    note_of,
    posted,
    read,
    read_claimed,
    read_if_there,
    storable,
)
from diffusion_api.queues._file.workers import Recovery, Worker, boot_id
from diffusion_api.queues.base import (
    PAUSED_BY_OPERATOR,
    Control,
    Handler,
    Key,
    Place,
    Queue,
    Snapshot,
    Submission,
    Wanted,
    as_queue_errors,
)
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job, Progress, State, UnreadableRecord, dumps
from diffusion_api.schema.report import WorkerReport

log = logging.getLogger(__name__)

CLAIM_POLL = 0.25
CANCEL_LOOK_EVERY = 0.05
PROGRESS_EVERY = 0.1

ABOUT_TO_END = 2.0
"""Seconds that a worker may take to move away a record into which it has written the end."""
LOOK_EVERY = 0.01

_PARTIAL = b"partial"
_ENDS = tuple(state for state in State if state.terminal)
_LOOKS = 3


class FileQueue(Queue):
    """Jobs as files under ``root``, which is made if need be.

    Several instances, in one process or in many, may share a folder. A job whose worker died ``max_attempts`` times
    while running it ends in error. ``recover_every`` is how often, in seconds, :meth:`serve` looks for such workers.
    At most ``max_waiting`` jobs wait, ``max_waiting_each`` of one caller; 0 is no limit. ``reserve`` are the bytes of the
    disk that new jobs leave to those at hand. After ``pause_after_crashes`` deaths in a row the queue pauses itself; 0 is
    never. A stopped queue stays stopped. A process that serves must never fork. Raises QueueUnusable, DiskFull.
    """

    @as_queue_errors("queue")
    def __init__(
        self,
        root: Path,
        *,
        max_attempts: int = 3,
        max_waiting: int = 0,
        max_waiting_each: int = 0,
        reserve: int = 0,
        pause_after_crashes: int = 0,
        recover_every: float = 3.0,
    ) -> None:
        self._places = Folder(root)
        self._max_waiting, self._max_waiting_each, self._reserve = max_waiting, max_waiting_each, reserve
        self._recovery = Recovery(
            self._places, max_attempts=max_attempts, pause_after_crashes=pause_after_crashes, cancel=self._cancel
        )
        self._ended = Ended(self._places)
        self._keys = Keys(self._places)
        self._inputs = FileBlobs(root / "inputs", tmp=self._places.tmp)
        self._recover_every = recover_every
        self._claims: dict[str, _Claim] = {}
        self._worker: Worker | None = None
        self._report: WorkerReport | None = None
        self._stopped = False
        self._closed = False
        self._turn = threading.Lock()
        self._event = threading.Condition()
        self._changes = 0
        self._arrivals = 0

    # client half

    @as_queue_errors("queue")
    def enqueue(self, job: Job, *, key: Key | None = None) -> Job:
        """Store the job durably, unless its key says that it is stored already. The job that is stored now.

        Raises InvalidRequest or TooLarge for one that could not be read back, and KeyReused.
        """
        if key is None:
            return self._store(job)
        with self._keys.held(job.caller, key) as held:
            if held.submission:
                job = held.submission.repeated(job, key)
                if found := self._look(job.id):
                    return found[0].job
                if self._places.has_ended(job.id):
                    return job
            else:
                self._check_room()
            # Also what was announced before: the try that did so may have died, or failed, before it was on disk.
            held.announce(held.submission or Submission.of(job, key))
            return self._store(job)

    def _store(self, job: Job) -> Job:
        record = storable(job)
        self._places.check_room(self._reserve)
        if job.state.terminal:
            self._places.write(self._places.ended_path(job.state, job.id), record)
            self._announce()
            return job
        with self._places.waiting.place_for(job, at_most=self._max_waiting, each=self._max_waiting_each) as name:
            self._places.write_waiting(name, record)
        self._announce(arrival=True)
        return job

    @as_queue_errors("queue")
    def store_input(self, data: bytes) -> str:
        """Store a picture durably, before the job that brings it along; the name by which its request knows it."""
        self._check_room()
        return self._inputs.put(data)

    @as_queue_errors("queue")
    def read_input(self, name: str) -> bytes:
        """The picture of that name, as it was stored. Raises InputLost."""
        return self._inputs.get(name)

    @as_queue_errors("queue")
    def check(self) -> None:
        """Try whether a job could be stored now. Raises what :meth:`enqueue` would, and leaves nothing behind."""
        self._check_room()
        self._probe()

    @as_queue_errors("queue")
    def check_disk(self) -> None:
        """Try whether what happens to a job could be written now, with room left for the running one."""
        self._places.check_room(self._reserve)
        self._probe()

    def _probe(self) -> None:
        disk.probe(self._places.tmp, disk.PAGE)
        for folder in FOLDERS:
            disk.check_writable(self._places.tmp.with_name(folder))

    def _check_room(self) -> None:
        self._places.check_room(self._reserve)
        self._places.waiting.check(at_most=self._max_waiting)

    @as_queue_errors("queue")
    def get(self, job_id: str) -> Snapshot | None:
        """The job with that id, or None; also None for one whose record has become unreadable. Raises Gone."""
        found = self._snapshot(job_id)
        if found is None:
            self._ended.check(job_id)
        return found

    @as_queue_errors("queue")
    def cancel(self, job_id: str, *, partial: bool = False) -> Snapshot | None:
        """Cancel: a waiting job ends at once, a running one is told so; a finished one stays. None if unknown.

        Raises Gone.
        """
        snapshot = self._cancel(job_id, partial=partial)
        if snapshot is None:
            self._ended.check(job_id)
        return snapshot

    @as_queue_errors("queue")
    def forget(self, job_id: str) -> bool:
        """Drop the record of a job that has ended, durably; False if there is none, or another was faster."""
        deadline = time.monotonic() + ABOUT_TO_END
        while not self._ended.forget(job_id):
            found = self._look(job_id)
            if not found or not found[0].state.terminal or time.monotonic() > deadline:
                return False
            time.sleep(LOOK_EVERY)
        return True

    @as_queue_errors("queue")
    def sweep(self, results: Limits, *, now: float) -> None:
        """Let go of ended jobs beyond these limits, and of keys, tombstones and inputs whose time is over at ``now``."""
        self._ended.sweep(results, now=now)
        self._keys.sweep(now=now)
        self._inputs.sweep(results, now=now, named=self._named)

    @as_queue_errors("queue")
    def jobs(self, states: frozenset[State] | None = None, *, limit: int | None = None) -> list[Job]:
        """Running jobs, with the state of their progress; then waiting ones, next first; then ended, newest first."""
        wanted = frozenset(State) if states is None else states
        waiting = self._waiting_jobs(limit) if State.QUEUED in wanted else []
        running = self._running_jobs() if wanted & {State.LOADING, State.PROCESSING} else []
        ended = [job for state in _ENDS if state in wanted for job in self._ended_jobs(state)]
        ended.sort(key=lambda job: job.finished or job.created, reverse=True)
        moved_on = {job.id for job in ended}
        running = [job for job in running if job.id not in moved_on and job.state in wanted]
        moved_on.update(job.id for job in running)
        return (running + [job for job in waiting if job.id not in moved_on] + ended)[:limit]

    @as_queue_errors("queue")
    def newest(
        self, wanted: Wanted, *, states: frozenset[State], limit: int, before: Place | None = None
    ) -> list[Snapshot]:
        """The jobs in these states that are wanted, newest first, ``limit`` at most, those before a place if there is one."""
        candidates = {}  # by id, in the order in which jobs move on: one that does so meanwhile is there once
        if not states <= frozenset(_ENDS):
            self._places.waiting.sync(now=True)
            for name in (*self._places.waiting.names(), *(path.name for path, _ in self._places.claimed())):
                candidates[id_of(name)] = Candidate(posted(name), partial(self._snapshot, id_of(name)))
        for state in states.intersection(_ENDS):
            for job_id, written in self._places.written(state):
                candidates[job_id] = Candidate(written, partial(self._ended_snapshot, state, job_id))
        return newest(
            candidates.values(), lambda found: found.state in states and wanted(found), limit=limit, before=before
        )

    @as_queue_errors("queue")
    def counts(self) -> dict[State, int]:
        """How many jobs are in each state. Other processes' waiting jobs are counted as of a moment ago."""
        self._places.waiting.sync()
        return {
            State.QUEUED: len(self._places.waiting.names()),
            State.PROCESSING: sum(1 for _ in self._places.claimed()),
            **{state: len(self._places.ended(state)) for state in _ENDS},
        }

    def changed(self, since: int, timeout: float) -> int:
        """Wait until something has changed after the mark ``since``, at most ``timeout`` seconds; the present mark.

        What another process changes is noticed only by looking.
        """
        self._wait_for_change(since, timeout)
        return self._changes

    @as_queue_errors("queue")
    def pause(self, reason: str = PAUSED_BY_OPERATOR) -> None:
        """Let nothing be claimed, by any process, until :meth:`resume`, also after a restart."""
        with self._turn:
            self._places.pause(reason)

    @as_queue_errors("queue")
    def resume(self) -> None:
        """End the pause, if there is one, and forget the crashes that may have led to it."""
        self._places.resume()
        self._announce(arrival=True)

    @property
    def paused(self) -> str | None:
        """Why nothing is claimed, or None when the queue is not paused."""
        return self._places.paused()

    # worker half

    @as_queue_errors("queue")
    def recover(self) -> None:
        """Give the jobs of workers that died back to the queue, or end them; :meth:`serve` does so as well."""
        self._recovery.run()
        self._announce(arrival=True)

    def serve(
        self,
        handle: Handler,
        *,
        wants: Callable[[Job], bool] = lambda job: True,
        ready: Callable[[], bool] = lambda: True,
        slots: int = 1,
    ) -> None:
        """Claim and handle jobs, ``slots`` at a time, until :meth:`stop`. Blocks.

        What ``handle``, ``wants`` or ``ready`` raises ends the serving and is raised here; jobs left in hand are then recovered
        like those of a worker that died. Raises RuntimeError while this instance serves already.
        """
        if self._worker is not None:
            raise RuntimeError("this queue is being served already")
        with as_queue_errors("queue"):
            worker = self._worker = Worker(self._places)
        self._tell()
        failures: list[BaseException] = []
        threads = [
            threading.Thread(
                target=self._serve_slot, args=(worker, handle, wants, ready, failures), daemon=True, name=f"slot-{n}"
            )
            for n in range(slots)
        ]
        try:
            self.recover()
            if reason := self.paused:
                log.warning("no job will run until the queue is resumed: %s", reason)
            for thread in threads:
                thread.start()
            while not self._wait_for_stop(self._recover_every):
                self.recover()
        finally:
            self.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._leave()
        if failures:
            raise failures[0]

    def report(self, report: WorkerReport) -> None:
        """Let others see how the worker of this instance is, for as long as it serves. Never raises."""
        self._report = report
        self._tell()

    @as_queue_errors("queue")
    def workers(self) -> list[WorkerReport]:
        """What the workers say that serve this folder now, in whatever process. Raises QueueUnusable."""
        return reports.of_the_living(self._places)

    def stop(self) -> None:
        """Claim nothing more; :meth:`serve` returns once the jobs in hand have ended or were released."""
        self._stopped = True
        self._announce(arrival=True)

    def close(self) -> None:
        """Stop, end the watching, and let go of the worker's lock: jobs still in hand are for another to recover."""
        self._closed = True
        self.stop()
        self._leave()

    # looking

    def _look(self, job_id: str) -> tuple[Snapshot, Path] | None:
        """The job, and where its record lies.

        Places are looked at in the order in which jobs move on, and more than once, since a released job moves back.
        """
        if not is_id(job_id):
            return None
        for look in range(_LOOKS):
            self._places.waiting.sync(now=look > 0)
            found = (
                self._among_claims(job_id)
                or self._among_waiting(job_id)
                or self._among_running(job_id)
                or self._among_ended(job_id)
            )
            if found:
                return found
        return None

    def _among_claims(self, job_id: str) -> tuple[Snapshot, Path] | None:
        claim = self._claims.get(job_id)
        return (Snapshot(claim.job, progress=claim.latest), claim.path) if claim and claim.here else None

    def _among_waiting(self, job_id: str) -> tuple[Snapshot, Path] | None:
        waiting = self._places.waiting
        name = waiting.name_of(job_id)
        if name and (job := self._places.read_waiting(name)):
            return Snapshot(job, position=waiting.position(name)), self._places.queued / name
        return None

    def _among_running(self, job_id: str) -> tuple[Snapshot, Path] | None:
        for path, found_id in self._places.claimed():
            if found_id == job_id and (job := read_if_there(path, job_id)):
                return Snapshot(job, progress=None if job.state.terminal else self._places.read_progress(job_id)), path
        return None

    def _among_ended(self, job_id: str) -> tuple[Snapshot, Path] | None:
        for state in _ENDS:
            if job := self._places.read_ended(state, job_id):
                return Snapshot(job), self._places.ended_path(state, job_id)
        return None

    def _snapshot(self, job_id: str) -> Snapshot | None:
        found = self._look(job_id)
        return found[0] if found else None

    def _ended_snapshot(self, state: State, job_id: str) -> Snapshot | None:
        job = self._places.read_ended(state, job_id)
        return Snapshot(job) if job else None

    def _waiting_jobs(self, limit: int | None) -> list[Job]:
        self._places.waiting.sync(now=True)
        return [job for name in self._places.waiting.names()[:limit] if (job := self._places.read_waiting(name))]

    def _running_jobs(self) -> list[Job]:
        ids = [job_id for _, job_id in self._places.claimed()]
        found = [self._among_claims(job_id) or self._among_running(job_id) for job_id in ids]
        return [snapshot.job.model_copy(update={"state": snapshot.state}) for snapshot, _ in filter(None, found)]

    def _ended_jobs(self, state: State) -> list[Job]:
        return [job for job_id in self._places.ended(state) if (job := self._places.read_ended(state, job_id))]

    # cancelling

    def _cancel(self, job_id: str, *, partial: bool = False) -> Snapshot | None:
        while found := self._look(job_id):
            snapshot, path = found
            if snapshot.state.terminal:
                return snapshot
            if path.parent == self._places.queued:
                self._cancel_waiting(path, job_id)
            elif self._cancel_running(path, job_id, partial=partial):
                return snapshot
        return None

    def _cancel_waiting(self, path: Path, job_id: str) -> None:
        """Move the record to where it ends, unless a worker was faster; only then write into it what happened."""
        target = self._places.ended_path(State.CANCELLED, job_id)
        try:
            disk.rename_durably(path, target)
        except FileNotFoundError:
            if disk.exists(path):
                raise
            return
        self._places.waiting.discard(path.name)  # not before: it is looked for there until it is elsewhere
        try:
            self._places.write(target, dumps(read(target, job_id).cancelled()))
        except (OSError, disk.Unusable, UnreadableRecord) as error:
            log.warning("%s: cancelled, but the record could not be rewritten: %s", job_id, error)
        self._announce()

    def _cancel_running(self, path: Path, job_id: str, *, partial: bool) -> bool:
        """Put the note beside the record; False if the job has moved on meanwhile."""
        note = note_of(path)
        try:
            self._places.write(note, _PARTIAL if partial else b"")
        except FileNotFoundError:
            if disk.exists(path):
                raise
            return False
        if not disk.exists(path):
            disk.remove(note)
            return False
        if claim := self._claims.get(job_id):
            claim.tell_cancelled(partial=partial)
        self._announce()
        return True

    # claiming

    def _serve_slot(
        self,
        worker: Worker,
        handle: Handler,
        wants: Callable[[Job], bool],
        ready: Callable[[], bool],
        failures: list[BaseException],
    ) -> None:
        try:
            self._handle_jobs(worker, handle, wants, ready)
        except BaseException as error:  # a thread has nobody to raise to: serve() does it
            failures.append(error)
            self.stop()

    def _handle_jobs(
        self, worker: Worker, handle: Handler, wants: Callable[[Job], bool], ready: Callable[[], bool]
    ) -> None:
        while not self._stopped:
            seen = self._arrivals
            claim = self._claim(worker, wants, ready)
            if claim is None:
                self._wait_for_arrival(seen, CLAIM_POLL)
                continue
            handle(claim.job, claim)
            if not claim.over:
                raise RuntimeError(f"{claim.job.id}: the handler returned without release or commit")

    def _claim(
        self, worker: Worker, wants: Callable[[Job], bool], ready: Callable[[], bool] = lambda: True
    ) -> _Claim | None:
        """The first waiting job that is wanted, now in hand; None while another's turn to start has not passed."""
        with self._turn:
            in_hand = [claim for claim in list(self._claims.values()) if not claim.over]
            if self.paused is not None or any(claim.bars_others for claim in in_hand):
                return None
            with as_queue_errors("queue"):
                self._places.waiting.sync()
            for name in self._places.waiting.names():
                if self._stopped:
                    return None
                job = self._peek(name)
                if job is None or not wants(job):
                    continue
                if (job.suspect and in_hand) or not ready():
                    return None
                with as_queue_errors("queue"):
                    job = self._take(name, worker)
                if job is not None:
                    claim = self._claims[job.id] = _Claim(self, worker, name, job)
                    self._announce()
                    return claim
            return None

    def _peek(self, name: str) -> Job | None:
        """The waiting job of that name; None if it is gone, cannot be read just now, or was set aside."""
        with self._places.tolerated(name):
            try:
                return self._places.waiting.read(name)
            except FileNotFoundError:
                self._places.waiting.discard(name)
            except (disk.Unusable, UnreadableRecord) as error:
                self._places.set_aside(self._places.queued / name, error)
                self._places.waiting.discard(name)
        return None

    def _take(self, name: str, worker: Worker) -> Job | None:
        """Claim by rename; None if another was faster, or if it was no record."""
        source, path = self._places.queued / name, worker.folder / name
        with self._places.tolerated(name):
            try:
                disk.rename(source, path)
            except FileNotFoundError:
                self._places.waiting.discard(name)
                if worker.present and not disk.is_folder(worker.folder):
                    raise QueueUnusable("the folder of this worker was removed") from None
                return None
            self._places.waiting.discard(name)
            return self._read_taken(path)
        return None

    def _read_taken(self, path: Path) -> Job | None:
        try:
            job = read_claimed(path)
            if job.state.terminal:
                raise UnreadableRecord(f"a waiting record whose state is {job.state}")
            return None if self._places.dropped_twin(path, job) else job
        except (disk.Unusable, UnreadableRecord) as error:
            self._places.set_aside(path, error)
            return None
        except OSError:
            disk.rename(path, self._places.queued / path.name)
            raise

    def _leave(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.leave()
            self._claims.clear()

    # telling each other

    def _tell(self) -> None:
        worker, report = self._worker, self._report
        if worker and report:
            with self._places.tolerated("report"):
                worker.tell(report)

    def _announce(self, *, arrival: bool = False) -> None:
        with self._event:
            self._changes += 1
            self._arrivals += arrival
            self._event.notify_all()

    def _wait_for_change(self, seen: int, seconds: float) -> None:
        with self._event:
            self._event.wait_for(lambda: self._changes != seen, seconds)

    def _wait_for_arrival(self, seen: int, seconds: float) -> None:
        with self._event:
            self._event.wait_for(lambda: self._arrivals != seen, seconds)

    def _wait_for_stop(self, seconds: float) -> bool:
        with self._event:
            return self._event.wait_for(lambda: self._stopped, seconds)


class _Claim(Control):
    """One job in hand. Fenced twice: nothing is written once the worker has left, or once the record lies elsewhere."""

    def __init__(self, queue: FileQueue, worker: Worker, name: str, job: Job) -> None:
        self.job = job
        self.latest = Progress()
        self.path = worker.folder / name
        self.over = False
        self._queue = queue
        self._places = queue._places
        self._worker = worker
        self._charged = False
        self._cancelled = False
        self._partial = False
        self._next_look = 0.0
        self._next_report = 0.0
        self._reported: tuple[State, str, str | None] | None = None

    @property
    def cancelled(self) -> bool:
        """True once the caller asked for the job to stop, or once the claim is lost."""
        if not self._cancelled and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + CANCEL_LOOK_EVERY
            self._look_for_note()
        return self._cancelled

    @property
    def partial(self) -> bool:
        """True if the caller, when it asked for the stop, also asked for what there is so far."""
        return self._partial

    @property
    def bars_others(self) -> bool:
        """True while nothing else may be claimed: until the job has started, and a suspect's whole time."""
        return not self._charged or self.job.suspect

    def tell_cancelled(self, *, partial: bool) -> None:
        """What the note says, without waiting until it is looked for."""
        self._partial = partial
        self._cancelled = True

    def _look_for_note(self) -> None:
        try:
            self.tell_cancelled(partial=disk.read_regular(note_of(self.path), len(_PARTIAL)) == _PARTIAL)
        except FileNotFoundError:
            self._cancelled = not self.here
        except (OSError, disk.Unusable):
            self.tell_cancelled(partial=False)

    @as_queue_errors("queue")
    def started(self) -> Job:
        """Charge one attempt, once per claim; the record as charged, or unchanged if the claim is lost."""
        with self._worker.guard:
            if self._charged or not self._held("started"):
                return self.job
            charged = self.job.charged(boot_id())
            self._places.write(self.path, dumps(charged))
            disk.fsync_dir(self._places.queued)
            self.job, self._charged = charged, True
        self._queue._announce(arrival=True)
        return self.job

    def progress(self, progress: Progress) -> None:
        """Tell how far the job is: here at once, on disk a few times a second and when its phase or preview changes."""
        self.latest = progress
        self._queue._announce()
        kind = (progress.state, progress.phase, progress.preview)
        if (kind == self._reported and time.monotonic() < self._next_report) or self.over or not self.here:
            return
        self._reported, self._next_report = kind, time.monotonic() + PROGRESS_EVERY
        with self._places.tolerated("progress"):
            self._places.write_progress(self.job.id, progress)

    @as_queue_errors("queue")
    def release(self) -> None:
        """Give the job back, at its old place; one whose caller asked for its end is ended instead."""
        with self._worker.guard:
            if not self._held("release"):
                return
            if disk.exists(note_of(self.path)):
                self.commit(self.job.cancelled())
                return
            self._end(self.job.uncharged() if self._charged else self.job.requeued())
        if disk.remove(note_of(self.path)):
            self._queue.cancel(self.job.id)

    @as_queue_errors("queue")
    def commit(self, job: Job) -> None:
        """End the job, once. Raises DiskFull or TooLarge with the claim still held: another try or record may fit."""
        if not job.state.terminal or job.id != self.job.id:
            raise ValueError(f"{self.job.id}: not the end of this job: {job.id} {job.state}")
        with self._worker.guard:
            if self._held("commit"):
                self._end(job.acquitted())
                with contextlib.suppress(OSError):
                    disk.remove(note_of(self.path))
                    disk.remove(self._places.crashes)

    @property
    def here(self) -> bool:
        """True while the record is this worker's."""
        return self._worker.present and disk.exists(self.path)

    def _held(self, intent: str) -> bool:
        if self.over or not self.here:
            self.over = True
            log.warning("%s: %s ignored: the job is no longer this worker's", self.job.id, intent)
        return not self.over

    def _end(self, job: Job) -> None:
        """Write the record as it shall be, then move it out of our hands."""
        record = dumps(job)
        if len(record) > MAX_RECORD:
            raise TooLarge(f"a record of {len(record)} bytes; at most {MAX_RECORD}")
        self._places.write(self.path, record)
        self.over = True
        waits = job.state is State.QUEUED
        try:
            disk.rename_durably(self.path, self._places.place_of(job, self.path.name))
        finally:
            if waits:
                self._places.waiting.add(self.path.name)
            self._queue._claims.pop(job.id, None)
            self._places.forget_progress(job.id)
            self._queue._announce(arrival=True)
