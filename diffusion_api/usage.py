"""How much of the disk lies in which folder."""

from __future__ import annotations

import math
import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COUNT_EVERY = 10.0
SHARE = 0.01
"""Of one core: where counting takes long, the next one comes later."""

BLOCK = 512
"""Bytes of what ``st_blocks`` counts, on every file system."""


@dataclass(frozen=True)
class Use:
    """What the regular files below a folder take: bytes on the disk, as ``du`` has them, and how many files they are."""

    bytes: int
    files: int


class Usage:
    """The use of some folders, by name, counted now and then. No link is followed."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self._mutex = threading.Lock()
        self._counted: dict[str, Use] = {}
        self._next = -math.inf

    def now(self) -> dict[str, Use]:
        """As counted a moment ago."""
        with self._mutex:
            began = time.monotonic()
            if began >= self._next:
                self._counted = {name: _count(folder) for name, folder in self._folders.items()}
                took = time.monotonic() - began
                self._next = began + max(COUNT_EVERY, took / SHARE)
            return self._counted


def _count(folder: Path) -> Use:
    found = [status for parent, _, names in os.walk(folder) for name in names if (status := _regular(parent, name))]
    return Use(bytes=sum(status.st_blocks for status in found) * BLOCK, files=len(found))


def _regular(parent: str, name: str) -> os.stat_result | None:
    """What is known of a regular file; None for anything else, and for what is gone or hidden."""
    try:
        status = os.lstat(os.path.join(parent, name))
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
