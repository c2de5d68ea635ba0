"""What an engine is, and the events a running job sends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from diffusion_api.errors import Interrupted
from diffusion_api.schema.job import Progress
from diffusion_api.schema.report import DeviceReport
from diffusion_api.schema.request import Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pixels: TypeAlias = "NDArray[np.uint8]"
"""A picture: (height, width, 3), uint8, RGB."""


@dataclass(frozen=True)
class Finished:
    """The pictures, in order, with the seed of each, and what the infotext should say beyond the request."""

    images: tuple[Pixels, ...]
    seeds: tuple[int, ...]
    model_hash: str | None = None
    memory_before_mb: float = 0.0
    memory_after_mb: float = 0.0
    warnings: tuple[str, ...] = ()


Event = Progress | Finished

PATIENCE = 0.05
"""Seconds between two looks at ``interrupted`` while a job waits for the device."""


class Admission:
    """One job at a time on the device; the others wait, and look whether they were told to stop."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(1)

    @contextmanager
    def admitted(self, interrupted: Callable[[], bool]) -> Iterator[None]:
        """Within, the device is this job's. Raises Interrupted when the job is told to stop while it waits."""
        while not self._free.acquire(timeout=PATIENCE):
            if interrupted():
                raise Interrupted("stopped before it began")
        try:
            yield
        finally:
            self._free.release()


class Engine(Protocol):
    """Runs requests. Torch may load in the background; :meth:`run` waits for it."""

    def start(self) -> None:
        """Begin loading; returns at once."""

    def wait(self) -> None:
        """Block until the engine can run jobs. Raises DeviceUnusable when it never will."""

    def run(self, request: Request, *, interrupted: Callable[[], bool]) -> Iterator[Event]:
        """Events of one job, ending with Finished. Raises Interrupted, ModelUnreadable and other errors of the tree.

        The first event says that the device is this job's; no device work happens before the second is asked for, so that
        the caller can charge the attempt in between. ``interrupted`` is asked before every step.
        """

    def report(self) -> DeviceReport | None:
        """What the engine runs on, or None while that is not known yet."""

    def close(self) -> None:
        """Free the device."""
