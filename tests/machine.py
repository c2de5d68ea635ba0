"""What may happen to a queue, in any order, and what must hold after each of it: state machines for Hypothesis.

They hold the promise of ``docs/reliability.md``: a job that was taken is in one place, ends, and counts once; no more
processes die of it than it has attempts.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from driving import CAP, ENDS, Process, leftovers, made_in, new_job, places
from forgetful import Disk, Killed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from diffusion_api.errors import DiskFull, Gone, QueueUnusable
from diffusion_api.queues._file import places as places_module
from diffusion_api.queues._file import workers
from diffusion_api.queues.base import Control, Key, Queue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job, Progress, State

WAITING = frozenset({State.QUEUED})
SLOTS = 2
ANY = st.integers(0, 99)
"""Which one of what there is."""
KILLED_AT = st.none() | st.none() | st.integers(0, 12)
"""The number of the changing call before which the process is killed."""


class _Outcome(Enum):
    DONE = "done"
    REFUSED = "refused: the disk is full or fails"
    KILLED = "killed on the way"


@dataclass
class _Hand:
    """A job in hand."""

    job: Job
    control: Any
    started: bool = False


@dataclass
class _Seat:
    """Where a process runs, if one does. Those of a worker have jobs in hand."""

    works: bool
    process: Any = None
    hands: dict[str, _Hand] = field(default_factory=dict)


@dataclass
class _Known:
    """What was promised of a job."""

    taken: bool = False
    end: State | None = None
    runs: set[int] = field(default_factory=set)
    """One of them made the result."""
    cancelled: bool = False
    dropped: bool = False
    deaths: int = 0
    """Processes that were killed while they ran it; those that a reboot followed are forgiven."""


class _InMemory:
    """A process with a queue of its own."""

    def __init__(self) -> None:
        self.queue: Queue = MemoryQueue(max_attempts=CAP)

    def claim(self) -> tuple[Job, Control] | None:
        claim = self.queue._claim(lambda job: True)  # type: ignore[attr-defined]
        return (claim.entry.job, claim) if claim else None


answering = precondition(lambda self: self.seats[0].process)
knowing = precondition(lambda self: self.seats[0].process and self.known)
ready = precondition(lambda self: self.seats[0].process and self._ready() and self._next())
holding = precondition(lambda self: self._held())


class MemoryMachine(RuleBasedStateMachine):
    """A queue in memory, whose process lives on."""

    @initialize(isolated=st.booleans())
    def begin(self, isolated: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.known: dict[str, _Known] = {}
        self.keys: dict[str, set[str]] = {}
        self.runs = 0
        self.paused: bool | None = False
        self.ahead = 0
        really_time, really_ns = time.time, time.time_ns
        self.patch.setattr(time, "time", lambda: really_time() + self.ahead)
        self.patch.setattr(time, "time_ns", lambda: really_ns() + self.ahead * 10**9)
        self.seats: list[_Seat] = []
        self._set_up(isolated)

    def teardown(self) -> None:
        if hasattr(self, "seats"):
            try:
                self._end()
            finally:
                self.patch.undo()

    def _set_up(self, isolated: bool) -> None:
        self.seats = [_Seat(works=True, process=_InMemory())]

    def _end(self) -> None:
        (seat,) = self.seats
        seat.process.queue.resume()
        for hand in seat.hands.values():
            hand.control.release()
        self._work_off(seat.process)

    def _do(self, seat: _Seat, act: Callable[[], Any], killed_at: int | None = None) -> tuple[_Outcome, Any]:
        return _Outcome.DONE, act()

    @property
    def _front(self) -> Any:
        """The queue of the process that answers callers."""
        return self.seats[0].process.queue

    def _ready(self) -> list[_Seat]:
        return [seat for seat in self.seats if seat.works and seat.process and len(seat.hands) < SLOTS]

    def _held(self) -> list[tuple[_Seat, _Hand]]:
        return [(seat, hand) for seat in self.seats for hand in seat.hands.values()]

    def _next(self) -> Job | None:
        waiting = self._front.jobs(WAITING, limit=1)
        return waiting[0] if waiting else None

    def _lies(self) -> dict[str, list[str]]:
        """Where each job is that is anywhere."""
        found = {}
        for job_id, known in self.known.items():
            try:
                snapshot = self._front.get(job_id)
            except Gone:
                found[job_id] = ["gone"]
            else:
                if snapshot or known.dropped:
                    found[job_id] = [snapshot.job.state if snapshot else "gone"]
        return found

    # callers

    @answering
    @rule(priority=st.sampled_from([0, 0, 1]), caller=st.sampled_from("ab"), killed_at=KILLED_AT)
    def submit(self, priority: int, caller: str, killed_at: int | None) -> None:
        self._submit(new_job(f"job-{len(self.known)}", priority=priority, caller=caller), None, killed_at)

    @answering
    @rule(key=st.sampled_from("kl"), killed_at=KILLED_AT)
    def submit_with_a_key(self, key: str, killed_at: int | None) -> None:
        self._submit(new_job(f"job-{len(self.known)}"), key, killed_at)

    def _submit(self, job: Job, key: str | None, killed_at: int | None) -> None:
        self.known[job.id] = _Known()
        same = self.keys.setdefault(key, set()) if key else set()
        same.add(job.id)
        sent = Key(key, "body") if key else None
        outcome, stored = self._do(self.seats[0], lambda: self._front.enqueue(job, key=sent), killed_at)
        if outcome is _Outcome.DONE:
            assert stored.id in same
            assert not any(self.known[other].taken for other in same - {stored.id})
            self.known[stored.id].taken = True

    @knowing
    @rule(which=ANY, partial=st.booleans(), killed_at=KILLED_AT)
    def cancel(self, which: int, partial: bool, killed_at: int | None) -> None:
        job_id, known = self._one(which)

        def cancel() -> Any:
            try:
                return self._front.cancel(job_id, partial=partial)
            except Gone:
                return None

        outcome, snapshot = self._do(self.seats[0], cancel, killed_at)
        if outcome is _Outcome.DONE:
            assert snapshot or not known.taken or known.dropped
            known.cancelled |= snapshot is not None
            if snapshot and snapshot.state.terminal:
                self._learn(job_id, snapshot.state)

    @knowing
    @rule(which=ANY, killed_at=KILLED_AT)
    def forget(self, which: int, killed_at: int | None) -> None:
        job_id, known = self._one(which)
        had_ended = self._lies().get(job_id, ["nowhere"])[0] in ENDS
        outcome, dropped = self._do(self.seats[0], lambda: self._front.forget(job_id), killed_at)
        assert had_ended or not dropped
        known.dropped |= had_ended and (dropped or outcome is not _Outcome.DONE)

    @knowing
    @rule(keep=st.integers(0, 3), killed_at=KILLED_AT)
    def sweep(self, keep: int, killed_at: int | None) -> None:
        for job_id, (place, *_) in self._lies().items():
            self.known[job_id].dropped |= place in ENDS
        self._do(self.seats[0], lambda: self._front.sweep(Limits(count=keep), now=time.time()), killed_at)

    @answering
    @rule(pause=st.booleans(), killed_at=KILLED_AT)
    def pause_or_resume(self, pause: bool, killed_at: int | None) -> None:
        before = self.paused
        outcome, _ = self._do(self.seats[0], self._front.pause if pause else self._front.resume, killed_at)
        self.paused = pause if outcome is _Outcome.DONE or before is pause else None

    def _one(self, which: int) -> tuple[str, _Known]:
        return list(self.known.items())[which % len(self.known)]

    # workers

    @ready
    @rule(which=ANY, killed_at=KILLED_AT)
    def claim(self, which: int, killed_at: int | None) -> None:
        self._claim(self._ready()[which % len(self._ready())], killed_at)

    @ready
    @rule(which=ANY, end=st.sampled_from(["start", "give back", "finish", "finish", "fail"]), killed_at=KILLED_AT)
    def run(self, which: int, end: str, killed_at: int | None) -> None:
        seat = self._ready()[which % len(self._ready())]
        if hand := self._claim(seat, None):
            self._start(seat, hand, killed_at if end == "start" else None)
            if hand.started and end == "give back":
                self._give_back(seat, hand, killed_at)
            elif hand.started and end != "start":
                self._finish(seat, hand, end == "fail", killed_at)

    def _claim(self, seat: _Seat, killed_at: int | None) -> _Hand | None:
        first = self._next()
        barred = any(not hand.started or hand.job.suspect for hand in seat.hands.values())
        barred |= bool(first and first.suspect and seat.hands)
        outcome, claimed = self._do(seat, seat.process.claim, killed_at)
        if outcome is not _Outcome.DONE:
            return None
        if claimed is None:
            assert barred or self.paused in (True, None) or first is None
            self.pause_or_resume(False, None)
            return None
        job, control = claimed
        assert not barred
        assert self.paused in (False, None)
        assert first
        assert job.id == first.id
        assert self.known[job.id].end is None
        assert not self.known[job.id].cancelled
        seat.hands[job.id] = _Hand(job, control)
        return seat.hands[job.id]

    @holding
    @rule(which=ANY, killed_at=KILLED_AT)
    def start(self, which: int, killed_at: int | None) -> None:
        self._start(*self._held()[which % len(self._held())], killed_at)

    def _start(self, seat: _Seat, hand: _Hand, killed_at: int | None) -> None:
        outcome, job = self._do(seat, hand.control.started, killed_at)
        if outcome is _Outcome.DONE:
            hand.job, hand.started = job, True
            assert self.known[job.id].deaths < CAP, "run again though all its attempts died"

    @holding
    @rule(which=ANY, killed_at=KILLED_AT)
    def step(self, which: int, killed_at: int | None) -> None:
        seat, hand = self._held()[which % len(self._held())]
        self._do(seat, lambda: hand.control.progress(Progress(state=State.PROCESSING, fraction=0.5)), killed_at)

    @holding
    @rule(which=ANY, fails=st.booleans(), killed_at=KILLED_AT)
    def finish(self, which: int, fails: bool, killed_at: int | None) -> None:
        self._finish(*self._held()[which % len(self._held())], fails, killed_at)

    def _finish(self, seat: _Seat, hand: _Hand, fails: bool, killed_at: int | None) -> None:
        self.runs += 1
        known = self.known[hand.job.id]
        ended = hand.job.failed("Oops", "no picture") if fails else hand.job.succeeded(made_in(self.runs))
        known.runs.add(self.runs)
        outcome, _ = self._do(seat, lambda: hand.control.commit(ended), killed_at)
        if outcome is _Outcome.DONE and not known.end:
            self._learn(ended.id, ended.state)
            known.runs = {self.runs}
        self._let_go(seat, hand, outcome)

    @holding
    @rule(which=ANY, killed_at=KILLED_AT)
    def give_back(self, which: int, killed_at: int | None) -> None:
        self._give_back(*self._held()[which % len(self._held())], killed_at)

    def _give_back(self, seat: _Seat, hand: _Hand, killed_at: int | None) -> None:
        outcome, _ = self._do(seat, hand.control.release, killed_at)
        self._let_go(seat, hand, outcome)

    def _let_go(self, seat: _Seat, hand: _Hand, outcome: _Outcome) -> None:
        if outcome is _Outcome.DONE or hand.control.over:
            seat.hands.pop(hand.job.id, None)

    @rule(hours=st.sampled_from([-2, 2]))
    def advance_the_clock(self, hours: int) -> None:
        if abs(self.ahead + 3600 * hours) < 6 * 3600:  # a key stands for a day
            self.ahead += 3600 * hours

    # what must hold

    def _learn(self, job_id: str, end: State) -> None:
        known = self.known[job_id]
        assert known.end in (None, end)
        known.end = end

    @invariant()
    def every_job_that_was_taken_is_in_one_place(self) -> None:
        if not hasattr(self, "seats"):
            return
        lies = self._lies()
        for job_id, known in self.known.items():
            where = lies.get(job_id, [])
            assert len(where) <= 1, job_id
            assert where or not known.taken, f"{job_id} is lost"
            for place in where:
                if place == "gone":
                    assert known.dropped, f"{job_id} was dropped"
                elif known.end:
                    assert place == known.end
                elif place in (State.DONE, State.ERROR):
                    known.end = State(place)
        for same in self.keys.values():
            assert sum(job_id in lies for job_id in same) <= 1, "a key made two jobs"

    def _work_off(self, process: Any) -> None:
        """Run all that waits to its end; by then all that was taken has ended."""
        for _ in range(len(self.known)):
            if claimed := process.claim():
                job, control = claimed
                assert not self.known[job.id].end
                self.known[job.id].runs.add(0)
                control.commit(control.started().succeeded(made_in(0)))
        self.every_job_that_was_taken_is_in_one_place()
        for job_id, (place, *_) in self._lies().items():
            known = self.known[job_id]
            if known.dropped:
                continue
            job = process.queue.get(job_id).job
            assert job.state.terminal
            assert job.state == place
            assert job.attempts <= CAP
            assert job.state is not State.DONE or job.result.seconds in known.runs
            assert not known.cancelled or known.end or job.state is State.CANCELLED


class KillMachine(MemoryMachine):
    """A queue on a disk that may be full or fail, with processes that may be killed in any of their calls."""

    def _set_up(self, isolated: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.boots = 0
        self._boot()
        self.patch.setattr(workers, "_BOOT", self.folder / "boot")
        self.patch.setattr(places_module, "SYNC_EVERY", -1.0)
        self.disk = Disk(self.folder / "home", self.patch)
        self.full_for = 0
        self.unrecovered: set[str] = set()
        self.seats = [_Seat(works=works) for works in ((False, True, True) if isolated else (True,))]
        self._start_all()

    def _end(self) -> None:
        self._mend_the_disk()
        try:
            for seat in self.seats:
                self._kill(seat)
            last = Process(self.disk.root)
            last.serve()
            last.queue.resume()
            self.seats = [_Seat(works=True, process=last)]
            self._work_off(last)
            assert leftovers(self.disk.root) == []
        finally:
            self.disk.kill(None)
            shutil.rmtree(self.folder)

    def _boot(self) -> None:
        self.boots += 1
        (self.folder / "boot").write_text(str(self.boots))

    def _mend_the_disk(self) -> None:
        self.disk.failing = self.full_for = 0

    def _do(self, seat: _Seat, act: Callable[[], Any], killed_at: int | None = None) -> tuple[_Outcome, Any]:
        failing = self.disk.failing
        self.disk.full = self.full_for > 0
        self.full_for -= self.disk.full
        try:
            with self.disk.running(id(seat), killed_at=killed_at):
                return _Outcome.DONE, act()
        except Killed:
            self._kill(seat)
            return _Outcome.KILLED, None
        except (DiskFull, QueueUnusable):
            assert self.disk.full or failing
            return _Outcome.REFUSED, None
        finally:
            self.disk.full = False

    def _kill(self, seat: _Seat) -> None:
        self.disk.kill(id(seat))
        seat.process = None
        for hand in seat.hands.values():
            if hand.started:
                self.known[hand.job.id].deaths += 1
                self.unrecovered.add(hand.job.id)
        seat.hands.clear()

    def _start_all(self, killed_at: int | None = None) -> None:
        for seat in self.seats:
            if not seat.process:
                outcome, seat.process = self._do(seat, lambda: Process(self.disk.root), killed_at)
                if outcome is _Outcome.DONE and seat.works:
                    self._recover(seat, seat.process.serve, killed_at)

    def _recover(self, seat: _Seat, look: Callable[[], None], killed_at: int | None) -> None:
        troubled = self.full_for or self.disk.failing
        outcome, _ = self._do(seat, look, killed_at)
        if outcome is _Outcome.REFUSED:
            self._kill(seat)
        elif outcome is _Outcome.DONE and not troubled:
            self.unrecovered.clear()

    def _next(self) -> Job | None:
        with self.disk.running("looking"):
            return super()._next()

    def _lies(self) -> dict[str, list[str]]:
        return places(self.disk.root)

    @rule(which=ANY)
    def kill(self, which: int) -> None:
        self._kill(self.seats[which % len(self.seats)])

    @precondition(lambda self: not all(seat.process for seat in self.seats))
    @rule(killed_at=KILLED_AT)
    def start_what_was_killed(self, killed_at: int | None) -> None:
        self._start_all(killed_at)

    @precondition(lambda self: self._ready())
    @rule(which=ANY, killed_at=KILLED_AT)
    def look_for_dead_workers(self, which: int, killed_at: int | None) -> None:
        seat = self._ready()[which % len(self._ready())]
        self._recover(seat, seat.process.recover, killed_at)

    @rule(acts=st.integers(1, 3))
    def fill_the_disk(self, acts: int) -> None:
        self.full_for = acts

    @rule(flushes=st.integers(1, 4))
    def let_a_flush_fail(self, flushes: int) -> None:
        self.disk.failing = flushes


class PowerCutMachine(KillMachine):
    """A queue on a disk that forgets what was not flushed when the power is cut."""

    @rule(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.5, 1.0]))
    def cut_the_power(self, seed: int, share: float) -> None:
        for seat in self.seats:
            self._kill(seat)
        chance = random.Random(seed)
        self.disk.cut(lambda: chance.random() < share)
        self._mend_the_disk()
        self._boot()
        for job_id in self.unrecovered:
            self.known[job_id].deaths -= 1
        self.unrecovered.clear()
        self._start_all()
