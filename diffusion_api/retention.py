"""What is kept and for how long: the same few rules for results, pictures and whatever else must not pile up."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffusion_api import disk

log = logging.getLogger(__name__)

AT_ONCE = 1000
"""How many things one look lets go. A clock that was set wrong by years is seen in the log before all is gone."""

_RUNNING = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class Limits:
    """What is kept: no older than ``seconds``, no more than ``count``, together no more than ``size`` bytes.

    None is no limit.
    """

    seconds: float | None = None
    count: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Entry:
    """A thing that is kept: its name, when it came to be (epoch seconds), its bytes."""

    name: str
    since: float
    size: int = 0


class Clock:
    """Epoch seconds that never leap forward while the process lives: what was kept for an hour is an hour old.

    Set back, it follows at once; things from the future are then simply new.
    """

    def __init__(self) -> None:
        self._ahead = time.time() - time.clock_gettime(_RUNNING)

    def now(self) -> float:
        """The time to judge ages by."""
        self._ahead = min(self._ahead, time.time() - time.clock_gettime(_RUNNING))
        return self._ahead + time.clock_gettime(_RUNNING)


def entries(folder: Path, suffix: str = "") -> list[Entry]:
    """The regular files of a folder whose names end so; nothing if it is gone. Raises OSError."""
    return [Entry(*found) for found in disk.files(folder) if found[0].endswith(suffix)]


def due(kept: Iterable[Entry], limits: Limits, *, now: float, what: str) -> list[Entry]:
    """Those beyond the limits, oldest first, at most ``AT_ONCE``; that more of them are due is told in the log."""
    newest_first = sorted(kept, key=lambda entry: (entry.since, entry.name), reverse=True)
    size, beyond = 0, []
    for number, entry in enumerate(newest_first, 1):
        size += entry.size
        if (
            (limits.seconds is not None and now - entry.since > limits.seconds)
            or (limits.count is not None and number > limits.count)
            or (limits.size is not None and size > limits.size)
        ):
            beyond.append(entry)
    beyond.reverse()
    if len(beyond) > AT_ONCE:
        log.warning("%d %s are beyond what is kept; %d go now, the next in a minute", len(beyond), what, AT_ONCE)
    return beyond[:AT_ONCE]
