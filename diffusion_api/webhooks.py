"""Tells the URL that a job names, signed, how the job ended: again until it is heard, also after a crash.

A promise is a file beside the queue, written before the job is. One process at a time, the holder of the folder's lock,
watches the promised jobs and posts; each try is written down before the next, so a receiver hears of a job at least
once, and of a repeat by the same delivery id::

    hooks/<job id>.json         promised, not yet heard
    hooks/done/<job id>.json    heard or given up; gone once the job is
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffusion_api import __version__, disk
from diffusion_api.errors import DiffusionApiError, Gone, Unreachable, UrlRefused
from diffusion_api.fetch import Fetcher, Origin, masked
from diffusion_api.queues.base import Queue, Snapshot, as_queue_errors
from diffusion_api.schema.job import Job
from diffusion_api.schema.request import Frozen

log = logging.getLogger(__name__)

VERSION = 1
MAX_FILE = 4 * 2**20

WAITS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 3600.0)
"""Seconds from one try to the next. There is one try more than there are waits."""

AT_ONCE = 4
"""Tries under way to one origin, so that one that never answers holds up nobody but itself."""

LOOK_EVERY = 0.25
LOOK_AT_LEAST_EVERY = 5.0
RETRY_WRITE = 2.0
SECONDS_AHEAD = 0.02
"""Each job that waits before a job puts off the next look at it by so many seconds."""

FORGOTTEN_AFTER = 60.0
"""Seconds after which a promise whose job is not known belongs to a submission that died between the two."""

FIELD = "webhook"


class Delivery(Frozen):
    """One try: when (epoch seconds), how long (seconds), and the answer's status or why there was none."""

    at: float
    status: int | None = None
    error: str | None = None
    seconds: float

    @property
    def heard(self) -> bool:
        """True when the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


class Hook(Frozen):
    """The promise to tell ``url`` of one job's end. ``body`` is what is sent, once the job has ended."""

    version: int = VERSION
    url: str
    body: str | None = None
    deliveries: tuple[Delivery, ...] = ()
    done: bool = False


def signature(secret: str, at: int, body: bytes) -> str:
    """The value of ``X-DiffusionAPI-Signature``: HMAC-SHA256 over the time in epoch seconds, a dot and the body."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Outbox:
    """The promises on disk. Raises QueueUnusable when its folder cannot be made; the rest raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._waiting, self._done, self._tmp = folder, folder / "done", folder / "tmp"
        self._lock: int | None = None
        with as_queue_errors("webhooks"):
            for path in (self._waiting, self._done, self._tmp):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk.fsync_dir(folder)
            disk.remove_abandoned(self._tmp)

    def owned(self) -> bool:
        """True while this process is the one that delivers; takes that place when it is free."""
        if self._lock is None:
            self._lock = disk.lock(self._waiting / "lock")
        return self._lock is not None

    def leave(self) -> None:
        """Let another process deliver."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def waiting(self) -> list[str]:
        """Ids of the jobs whose promise is not kept yet."""
        return _ids(self._waiting)

    def done(self) -> list[str]:
        """Ids of the jobs whose promise was kept or given up."""
        return _ids(self._done)

    def write(self, job_id: str, hook: Hook) -> None:
        """Store durably what is new; the place of a promise that is done is another."""
        path = self._waiting / f"{job_id}.json"
        disk.write_whole(path, hook.model_dump_json().encode(), tmp=self._tmp)
        if hook.done:
            disk.rename_durably(path, self._done / path.name)

    def read(self, job_id: str) -> Hook | None:
        """The promise of that job, None if there is none. One that cannot be read is set aside."""
        for folder in (self._waiting, self._done):  # in the order in which it moves
            path = folder / f"{job_id}.json"
            try:
                return _loads(disk.read_regular(path, MAX_FILE))
            except FileNotFoundError:
                continue
            except (disk.Unusable, ValueError) as error:
                log.error("job %s: its webhook is set aside as %s: %s", job_id, path.with_suffix(".unreadable"), error)
                path.rename(path.with_suffix(".unreadable"))
        return None

    def drop(self, job_id: str) -> None:
        """Remove the promise of a job that is gone."""
        for folder in (self._waiting, self._done):
            (folder / f"{job_id}.json").unlink(missing_ok=True)


class Webhooks:
    """Promises to tell of jobs' ends, and keeps that on a thread of its own.

    ``describe`` makes of an ended job what its receiver is told. ``waits`` are the seconds between tries. Raises
    QueueUnusable.
    """

    def __init__(
        self,
        folder: Path,
        queue: Queue,
        fetcher: Fetcher,
        *,
        secret: str,
        describe: Callable[[Job], dict[str, Any]],
        waits: tuple[float, ...] = WAITS,
    ) -> None:
        self._outbox = Outbox(folder)
        self._queue, self._fetcher, self._secret = queue, fetcher, secret
        self._describe, self._waits = describe, waits
        self._turns: defaultdict[Origin, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._next_look: dict[str, float] = {}
        self._unknown: dict[str, float] = {}
        self._to_sweep: list[str] = []
        self._writing = threading.Lock()  # what was tried must not be written over by who read the promise before that
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    @contextlib.contextmanager
    def promised(self, job: Job) -> Iterator[None]:
        """Promise durably to tell of this job's end, unless what is done in this context, storing the job, fails.

        Raises UrlRefused, DiskFull, QueueUnusable.
        """
        assert job.webhook is not None
        self._fetcher.check(job.webhook, field=FIELD)
        with as_queue_errors("webhooks"):
            self._outbox.write(job.id, Hook(url=job.webhook))
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._outbox.drop(job.id)
            raise

    def turn(self, job: Job, earlier: Job) -> None:
        """A job that was promised turned out to be an earlier one, sent again: promise of that instead, if need be."""
        with as_queue_errors("webhooks"):
            self._outbox.drop(job.id)
            if earlier.webhook and self._outbox.read(earlier.id) is None:
                self._outbox.write(earlier.id, Hook(url=earlier.webhook))

    def settle(self, job: Job) -> None:
        """Make what is told of an ended job now, as its record is about to go."""
        with as_queue_errors("webhooks"), self._writing:
            hook = self._outbox.read(job.id)
            if hook and hook.body is None:
                self._outbox.write(job.id, self._described(hook, job))

    def report(self, job: Job) -> dict[str, Any]:
        """What the caller is shown: ``url`` without the values in its query, and ``deliveries`` so far."""
        assert job.webhook is not None
        with as_queue_errors("webhooks"):
            hook = self._outbox.read(job.id)
        tries = hook.deliveries if hook else ()
        return {"url": masked(job.webhook), "deliveries": [one.model_dump(exclude_none=True) for one in tries]}

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self) -> None:
        """Break off what is under way, which the next start begins again, and end the thread. Blocks for a moment."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_AT_LEAST_EVERY)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:  # a thread has nobody to raise to
            log.critical("webhooks are not delivered any more, until the next start", exc_info=True)

    async def _serve(self) -> None:
        complaint = ""
        try:
            while not self._stopping.is_set():
                try:
                    if self._outbox.owned():
                        self._look()
                    complaint = ""
                except (DiffusionApiError, OSError) as error:
                    if str(error) != complaint:
                        log.error("webhooks wait: %s", error)
                    complaint = str(error)
                await asyncio.sleep(LOOK_EVERY)
        finally:
            self._outbox.leave()

    def _look(self) -> None:
        """Find promises that are due, and one that was kept for a job that is gone."""
        for job_id in self._outbox.waiting():
            if job_id not in self._tasks and time.monotonic() >= self._next_look.get(job_id, 0):
                self._look_at(job_id)
        if not self._to_sweep:
            self._to_sweep = self._outbox.done()
        if self._to_sweep and self._job(job_id := self._to_sweep.pop()) is None:
            self._outbox.drop(job_id)

    def _look_at(self, job_id: str) -> None:
        hook = self._outbox.read(job_id)
        job = self._ended(job_id) if hook and hook.body is None else None
        if hook is None or (hook.body is None and job is None):
            return
        self._next_look.pop(job_id, None)
        self._tasks[job_id] = task = asyncio.create_task(self._deliver(job_id, hook, job))
        task.add_done_callback(lambda task: self._over(job_id, task))

    def _ended(self, job_id: str) -> Job | None:
        """The job once it has ended."""
        snapshot = self._job(job_id)
        if snapshot is None:
            self._forget(job_id)
            return None
        self._unknown.pop(job_id, None)
        if snapshot.state.terminal:
            return snapshot.job
        ahead = SECONDS_AHEAD * (snapshot.position or 0)
        self._next_look[job_id] = time.monotonic() + min(ahead, LOOK_AT_LEAST_EVERY)
        return None

    def _job(self, job_id: str) -> Snapshot | None:
        try:
            return self._queue.get(job_id)
        except Gone:
            return None

    def _forget(self, job_id: str) -> None:
        """Drop a promise whose job is not known, unless that may be because it is about to be stored."""
        since = self._unknown.setdefault(job_id, time.monotonic())
        if time.monotonic() - since > FORGOTTEN_AFTER:
            log.info("job %s: its webhook is dropped: there is no such job", job_id)
            self._outbox.drop(job_id)
            del self._unknown[job_id]

    async def _deliver(self, job_id: str, hook: Hook, job: Job | None) -> None:
        """Try until the promise is done. ``job`` is the ended one if what is told has yet to be made of it."""
        if job:
            hook = self._described(hook, job)
        while not hook.done:
            await asyncio.sleep(self._wait(hook))
            hook = await self._tried(job_id, hook)
            await self._keep(job_id, hook)

    def _described(self, hook: Hook, job: Job) -> Hook:
        return hook.model_copy(update={"body": json.dumps(self._describe(job))})

    def _wait(self, hook: Hook) -> float:
        """Seconds until the next try; never more than from one to the next, however the clock was set meanwhile."""
        if not hook.deliveries:
            return 0
        wait = self._waits[min(len(hook.deliveries), len(self._waits)) - 1]
        last = hook.deliveries[-1]
        return min(max(last.at + last.seconds + wait - time.time(), 0), wait)

    async def _tried(self, job_id: str, hook: Hook) -> Hook:
        """The promise after one more try."""
        try:
            origin = self._fetcher.check(hook.url, field=FIELD)
        except UrlRefused as error:
            log.warning("job %s: webhook given up: %s", job_id, error)
            refused = Delivery(at=time.time(), error="its host is no longer allowed", seconds=0)
            return hook.model_copy(update={"deliveries": (*hook.deliveries, refused), "done": True})
        async with self._turns[origin]:
            delivery = await self._post(job_id, hook)
        deliveries = (*hook.deliveries, delivery)
        done = delivery.heard or len(deliveries) > len(self._waits)
        level = logging.INFO if delivery.heard else logging.ERROR if done else logging.WARNING
        told = delivery.error or f"status {delivery.status}"
        log.log(level, "job %s: webhook to %s, try %d: %s", job_id, origin, len(deliveries), told)
        return hook.model_copy(update={"deliveries": deliveries, "done": done})

    async def _post(self, job_id: str, hook: Hook) -> Delivery:
        assert hook.body is not None
        at, began, body = time.time(), time.monotonic(), hook.body.encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"DiffusionAPI/{__version__}",
            "X-DiffusionAPI-Delivery": job_id,
            "X-DiffusionAPI-Signature": signature(self._secret, int(at), body),
        }
        status = error = None
        try:
            status = await self._fetcher.post(hook.url, body, headers, field=FIELD)
        except Unreachable as failure:
            error = str(failure)
        except Exception as failure:  # what a library makes of one receiver's answer fails this try and nothing else
            log.exception("job %s: webhook failed", job_id)
            error = f"failed: {type(failure).__name__}"
        return Delivery(at=at, status=status, error=error, seconds=round(time.monotonic() - began, 3))

    async def _keep(self, job_id: str, hook: Hook) -> None:
        """Write a try down; a full or failing disk is waited for, so that nothing is sent again because of it."""
        while True:
            try:
                with self._writing:
                    self._outbox.write(job_id, hook)
            except OSError as error:
                log.error("job %s: a try of its webhook cannot be written down yet: %s", job_id, error.strerror)
                await asyncio.sleep(RETRY_WRITE)
            else:
                return

    def _over(self, job_id: str, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if error := task.exception():
            log.error("job %s: webhook broke; the next start tries again", job_id, exc_info=error)
        else:
            del self._tasks[job_id]


def _loads(data: bytes) -> Hook:
    """The promise in a file. Raises ValueError."""
    hook = Hook.model_validate_json(data)
    if hook.version > VERSION:
        raise ValueError(f"written by a newer release: version {hook.version}, this one reads up to {VERSION}")
    return hook


def _ids(folder: Path) -> list[str]:
    return [name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")]
