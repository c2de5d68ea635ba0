"""Lets go of what need not be kept any longer, from time to time, while jobs are served."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from diffusion_api.errors import DiffusionApiError
from diffusion_api.outputs import Outputs
from diffusion_api.queues.base import Queue
from diffusion_api.retention import Clock, Limits
from diffusion_api.schema.job import State

log = logging.getLogger(__name__)

EVERY = 60.0
SHARE = 0.01
"""Of one core: where a look takes long, the next one comes later."""

UNFINISHED = frozenset(state for state in State if not state.terminal)


class Sweeper:
    """Sweeps a queue and its pictures on a thread of its own, at once and then every minute, as long as the process lives.

    Several may sweep one installation at a time.
    """

    def __init__(self, queue: Queue, outputs: Outputs, *, results: Limits, pictures: Limits) -> None:
        self._queue, self._outputs = queue, outputs
        self._results, self._pictures = results, pictures
        self._clock = Clock()
        self._thread = threading.Thread(target=self._main, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin. There is no end to it: whatever a sweep is doing may be cut off."""
        self._thread.start()

    def sweep(self) -> None:
        """Do it once. What goes wrong is logged, and met again by the next."""
        now = self._clock.now()
        with _told("results"):
            self._queue.sweep(self._results, now=now)
        with _told("pictures"):
            self._outputs.sweep(self._pictures, now=now, in_use=self._in_use)

    def _main(self) -> None:
        while True:
            began = time.monotonic()
            self.sweep()
            time.sleep(max(EVERY, (time.monotonic() - began) / SHARE))

    def _in_use(self) -> set[str]:
        return {job.id for job in self._queue.jobs(UNFINISHED)}


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (DiffusionApiError, OSError) as error:
        log.error("%s that are no longer kept could not all be removed: %s", what, error)
