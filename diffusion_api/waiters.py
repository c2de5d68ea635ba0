"""Callers that wait for the end of a job: one look at all of their jobs together, and no thread for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffusion_api.errors import DiffusionApiError

if TYPE_CHECKING:
    from diffusion_api.queues.base import Queue

LOOK_EVERY = 0.2
"""Seconds between two looks when nothing is heard of a change: another process may have made one."""

SHARE = 0.2
"""Of the time, that looking may take, however many jobs are waited for."""


class Waiters:
    """Those who wait for the end of jobs of one queue, on one event loop."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ended(self, job_id: str, seconds: float) -> None:
        """Return once the job has ended or there is none, after ``seconds``, or when nobody is to wait any longer."""
        over = await asyncio.to_thread(self._over, [job_id])
        if over:
            return
        self._loop = asyncio.get_running_loop()
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        if self._looking is None or self._looking.done():
            self._looking = self._loop.create_task(self._look())
        try:
            if not self._closed:
                await asyncio.wait_for(bell.wait(), seconds)
        except TimeoutError:
            pass  # then it is answered as it stands
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    def close(self) -> None:
        """Nobody is to wait any longer. May be called from any thread."""
        self._closed = True
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self._ring(self._bells))

    async def _look(self) -> None:
        """Look after each change, and now and then, for as long as anybody waits."""
        seen = 0
        while self._bells:
            began = time.monotonic()
            self._ring(await asyncio.to_thread(self._over, list(self._bells)))
            took = time.monotonic() - began
            await asyncio.sleep(took / SHARE - took)
            seen = await asyncio.to_thread(self._queue.changed, seen, LOOK_EVERY)

    def _over(self, job_ids: Iterable[str]) -> list[str]:
        return [job_id for job_id in job_ids if self._has_ended(job_id)]

    def _has_ended(self, job_id: str) -> bool:
        """True also when it cannot be known: the answer to the caller will then say why."""
        try:
            snapshot = self._queue.get(job_id)
        except DiffusionApiError:
            return True
        return snapshot is None or snapshot.state.terminal

    def _ring(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            for bell in self._bells.get(job_id, ()):
                bell.set()
