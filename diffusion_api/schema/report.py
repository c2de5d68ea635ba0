"""What a worker says of itself, and its engine of the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from diffusion_api.schema.request import Frozen

VERSION = 1


@dataclass(frozen=True)
class HeldModel:
    """A model in memory: ``where`` its weights are, and how many bytes they have. It was ``loaded`` and last ``used`` at these
    epoch seconds, and leaves after ``idle`` seconds without a job, None for never.
    """

    name: str
    where: Literal["device", "ram"]
    size: int
    loaded: float = 0.0
    used: float = 0.0
    idle: float | None = None


@dataclass(frozen=True)
class Room:
    """What models and jobs may use, in bytes: on the device, and in RAM beside it (None: it is RAM itself).

    ``number`` is the bytes of one weight.
    """

    device: int
    host: int | None
    number: int


@dataclass(frozen=True)
class DeviceReport:
    """What the engine runs on. ``facts`` are the keys of ``gpu`` in ``GET /health``; of the ``models`` in memory the last
    used is the last; ``versions`` are those of the libraries on which pixels depend.
    """

    name: str
    kind: str
    facts: dict[str, bool | int | float | str] = field(default_factory=dict)
    room: Room | None = None
    models: tuple[HeldModel, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


class WorkerReport(Frozen):
    """A worker that serves a queue.

    ``jobs`` are the ids in its hands. ``event`` is when one of them last moved (or the worker began), ``due`` when the one
    on the device must have ended; both in seconds of the machine's monotonic clock, which all processes share.
    ``restarts`` is how often its process had to begin again, ``metrics`` what it counted, in Prometheus's text format.
    """

    version: int = VERSION
    pid: int
    device: DeviceReport | None = None
    jobs: tuple[str, ...] = ()
    event: float
    due: float | None = None
    restarts: int = 0
    metrics: str = ""

    @property
    def state(self) -> str:
        """``running`` with a job in hand, else ``idle``."""
        return "running" if self.jobs else "idle"

    @property
    def quiet(self) -> float:
        """Seconds since something last happened."""
        return max(0.0, time.monotonic() - self.event)

    @property
    def overdue(self) -> float:
        """Seconds for which a job that should have ended has not even moved."""
        return 0.0 if self.due is None else max(0.0, time.monotonic() - max(self.due, self.event))
