"""Callers that wait for jobs: one look at all of their jobs together, and no thread for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffusion_api.errors import DiffusionApiError

if TYPE_CHECKING:
    from diffusion_api.queues.base import Queue, Snapshot

LOOK_EVERY = 0.2
"""Seconds between two looks when nothing is heard of a change: another process may have made one."""

SHARE = 0.2
"""Of the time, that looking may take, however many jobs are waited for."""


class _Waiting:
    """Somebody who waits for the end of a job, or for each change after ``seen``."""

    def __init__(self, seen: Snapshot, *, changes: bool) -> None:
        self.seen: Snapshot | None = seen
        self._changes = changes
        self._bell = asyncio.Event()

    def tell(self, snapshot: Snapshot | None) -> None:
        """Say how the job stands; None when there is none any more."""
        if _over(snapshot) or (self._changes and snapshot != self.seen):
            self.seen = snapshot
            self.ring()

    def ring(self) -> None:
        """Let it wait no longer."""
        self._bell.set()

    async def heard(self, seconds: float) -> bool:
        """Wait until there is something to hear; False after ``seconds`` without."""
        try:
            await asyncio.wait_for(self._bell.wait(), seconds)
        except TimeoutError:
            return False
        self._bell.clear()
        return True


class Waiters:
    """Those who wait for jobs of one queue, on one event loop."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._waiting: dict[str, set[_Waiting]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ended(self, job_id: str, seconds: float) -> None:
        """Return once the job has ended or there is none, after ``seconds``, or when nobody is to wait any longer."""
        snapshot = await asyncio.to_thread(self._find, job_id)
        if snapshot is None or snapshot.state.terminal:
            return
        with self._among(job_id, _Waiting(snapshot, changes=False)) as waiting:
            if not self._closed:
                await waiting.heard(seconds)  # if it is not, the caller is answered as the job stands

    async def changes(self, job_id: str, every: float) -> AsyncGenerator[Snapshot | None]:
        """The job as it stands and then whenever that is another, None for each ``every`` seconds in which it is not.

        What changes back between two looks, or twice, is one change. Ends after a terminal snapshot, when there is no such job
        any more, or when nobody is to wait any longer.
        """
        snapshot = await asyncio.to_thread(self._find, job_id)
        if snapshot is None:
            return
        with self._among(job_id, _Waiting(snapshot, changes=True)) as waiting:
            while (seen := waiting.seen) and not self._closed:
                yield seen
                if seen.state.terminal:
                    return
                while not await waiting.heard(every):
                    yield None

    def close(self) -> None:
        """Nobody is to wait any longer. May be called from any thread."""
        self._closed = True
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring)

    @contextmanager
    def _among(self, job_id: str, waiting: _Waiting) -> Iterator[_Waiting]:
        self._loop = asyncio.get_running_loop()
        self._waiting.setdefault(job_id, set()).add(waiting)
        if self._looking is None or self._looking.done():
            self._looking = self._loop.create_task(self._look())
        try:
            yield waiting
        finally:
            self._waiting[job_id].discard(waiting)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def _look(self) -> None:
        """Look after each change, and now and then, for as long as anybody waits."""
        seen = 0
        while self._waiting:
            began = time.monotonic()
            found = await asyncio.to_thread(self._found, list(self._waiting))
            for job_id, snapshot in found.items():
                for waiting in self._waiting.get(job_id, ()):
                    waiting.tell(snapshot)
            took = time.monotonic() - began
            await asyncio.sleep(took / SHARE - took)
            seen = await asyncio.to_thread(self._queue.changed, seen, LOOK_EVERY)

    def _found(self, job_ids: Iterable[str]) -> dict[str, Snapshot | None]:
        return {job_id: self._find(job_id) for job_id in job_ids}

    def _find(self, job_id: str) -> Snapshot | None:
        """The job; None also when it cannot be known: the answer to the caller will then say why."""
        try:
            return self._queue.get(job_id)
        except DiffusionApiError:
            return None

    def _ring(self) -> None:
        for several in self._waiting.values():
            for waiting in several:
                waiting.ring()


def _over(snapshot: Snapshot | None) -> bool:
    return snapshot is None or snapshot.state.terminal
