"""How long jobs take, learned from those that ran, and so when a waiting one will have ended."""

from __future__ import annotations

import heapq
import logging
import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, ValidationError

from diffusion_api import disk
from diffusion_api.catalog.samplers import SAMPLERS
from diffusion_api.engine.plan import plan
from diffusion_api.schema.job import State
from diffusion_api.schema.request import Caption, Embed, Frozen, Request, Sampling, Upscale

if TYPE_CHECKING:
    from diffusion_api.queues.base import Queue, Snapshot

log = logging.getLogger(__name__)

NEWEST = 0.3
"""Weight of the newest job against all before it."""

MAX_FILE = 2**20
KINDS = {"upscale": "upscaler ", "caption": "caption ", "embed": "embed "}
"""What names begin with of what no model draws: one's time says nothing of another's."""

LOOK_AHEAD = 64
LOOK_EVERY = 1.0
RUNNING = frozenset({State.LOADING, State.PROCESSING})


class _Learned(Frozen):
    version: int = 1
    seconds: dict[str, PositiveFloat]


class Pace:
    """Seconds per unit of work by model, in a small file that the processes of one queue share.

    It is a help and no truth: what cannot be read is learned again, what cannot be written is forgotten.
    """

    def __init__(self, path: Path, *, tmp: Path) -> None:
        self._path, self._tmp = path, tmp
        self._mutex = threading.Lock()
        self._read_as: tuple[int, int] | None = None
        self._seconds: dict[str, float] = {}

    def learn(self, request: Request, seconds: float, *, share: float = 1.0) -> None:
        """Take to heart that this share (0 to 1) of a job's work took so many seconds."""
        if share <= 0 or seconds <= 0:
            return
        took = seconds / (share * work(request))
        with self._mutex:
            known, name = dict(self._known()), _name(request)
            known[name] = took + (1 - NEWEST) * (known.get(name, took) - took)
            record = _Learned(seconds=known).model_dump_json().encode()
            try:
                disk.write_whole(self._path, record, tmp=self._tmp, durable=False)
            except OSError as error:
                log.debug("the pace of %s is forgotten: %s", name, error.strerror)

    def seconds(self, request: Request) -> float | None:
        """How long a job will run; None when nothing was learned. A new model counts as the mean of the others."""
        with self._mutex:
            known = self._known()
        if isinstance(request, Sampling) and request.sampler not in {row.name for row in SAMPLERS}:
            return None  # a record of another release
        alike = KINDS.get(request.kind)
        others = [
            seconds
            for name, seconds in known.items()
            if (name.startswith(alike) if alike else not name.startswith(tuple(KINDS.values())))
        ]
        if not others:
            return None
        return work(request) * known.get(_name(request), sum(others) / len(others))

    def _known(self) -> dict[str, float]:
        try:
            status = os.stat(self._path)
            read_as = (status.st_ino, status.st_mtime_ns)
            if read_as != self._read_as:
                data = disk.read_regular(self._path, MAX_FILE)
                self._seconds, self._read_as = dict(_Learned.model_validate_json(data).seconds), read_as
        except (OSError, disk.Unusable, ValidationError):
            return {}
        return self._seconds


def _name(request: Request) -> str:
    """What it is that a job's time depends on."""
    return KINDS.get(request.kind, "") + (request.upscaler if isinstance(request, Upscale) else request.model)


def work(request: Request) -> float:
    """What a job costs: megapixels, times the model's evaluations if they are drawn; guidance evaluates twice."""
    size = request.width * request.height / 1e6
    if isinstance(request, Caption):
        return size * request.steps * (1 if request.guidance_scale <= 1 else 2)
    if isinstance(request, Upscale | Embed):
        return size
    passes = plan(request)
    return sum(p.evaluations * p.width * p.height * (1 if p.guidance_scale == 1 else 2) for p in passes) / 1e6


@dataclass(frozen=True)
class _Line:
    """The jobs at one moment: seconds until each running one has ended, and until each of the next waiting ones begins."""

    seen: float
    running: dict[str, float]
    waiting: tuple[float, ...]

    def until_turn_of(self, position: int) -> float:
        """Seconds until the job at that position begins; beyond those looked at, they are taken as the average."""
        if position < len(self.waiting):
            return self.waiting[position]
        busy, last = self.waiting[0], self.waiting[-1]
        return last + (position + 1 - len(self.waiting)) * (last - busy) / max(1, len(self.waiting) - 1)


class Forecast:
    """When the jobs of a queue will have ended. However many ask, the queue is looked at once a second."""

    def __init__(self, queue: Queue, pace: Pace) -> None:
        self._queue, self._pace = queue, pace
        self._mutex = threading.Lock()
        self._latest: _Line | None = None

    def seconds_left(self, snapshot: Snapshot) -> float | None:
        """Seconds until this job, which has not ended, will have; None when that cannot be known."""
        own = self._pace.seconds(snapshot.job.request)
        if own is None:
            return None
        line = self._line()
        passed = time.monotonic() - line.seen
        if snapshot.position is None:
            return max(0.0, line.running.get(snapshot.job.id, own) - passed)
        return max(0.0, line.until_turn_of(snapshot.position) - passed) + own

    def _line(self) -> _Line:
        known = self._latest
        if known and time.monotonic() - known.seen < LOOK_EVERY:
            return known
        if not self._mutex.acquire(blocking=known is None) and known:
            return known  # while one looks, the others take what there is
        try:
            self._latest = self._look()
            return self._latest
        finally:
            self._mutex.release()

    def _look(self) -> _Line:
        claimed = filter(None, (self._queue.get(job.id) for job in self._queue.jobs(RUNNING)))
        # What a worker holds and has not begun waits for its device, as if it still stood in the queue.
        begun = sorted(claimed, key=lambda snapshot: snapshot.job.started or math.inf)
        waiting = self._queue.jobs(frozenset({State.QUEUED}), limit=LOOK_AHEAD)
        free = [0.0] * max(1, len(self._queue.workers()))
        running = {snapshot.job.id: _taken(free, self._left(snapshot)) for snapshot in begun}
        begins = [free[0]]
        for job in waiting:
            _taken(free, self._pace.seconds(job.request) or 0.0)
            begins.append(free[0])
        return _Line(seen=time.monotonic(), running=running, waiting=tuple(begins))

    def _left(self, snapshot: Snapshot) -> float:
        done = snapshot.progress.fraction if snapshot.progress else 0.0
        return (1 - done) * (self._pace.seconds(snapshot.job.request) or 0.0)


def _taken(free: list[float], seconds: float) -> float:
    """Put a job on the device that is free first; when it ends there. ``free`` is a heap of when each device is."""
    ends = free[0] + seconds
    heapq.heapreplace(free, ends)
    return ends
