"""Pictures that jobs bring along, stored once by the SHA-256 of their bytes, and swept when no record names them."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from diffusion_api import disk
from diffusion_api.errors import InputLost
from diffusion_api.retention import Entry, Limits, due, entries

MAX_BLOB = 2**30
"""Bytes that are read back; no body may be that long."""

AT_LEAST = 60 * 60.0
"""Seconds that a blob is kept after it was stored, whoever names it: its job may be on the way into the queue."""

_NAME = re.compile(r"[0-9a-f]{64}")


def name_of(data: bytes) -> str:
    """What a blob is called: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


class Blobs(ABC):
    """Bytes by the hash of what they are. Bytes that are stored again are there once, and as new."""

    @abstractmethod
    def put(self, data: bytes) -> str:
        """Store them durably; their name. Raises OSError."""

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """What is stored under that name. Raises FileNotFoundError, Unusable, OSError."""

    @abstractmethod
    def _entries(self) -> list[Entry]:
        """All of them. Raises OSError."""

    @abstractmethod
    def _remove(self, entry: Entry) -> None:
        """Let go of one, unless it was stored again since. Raises OSError."""

    def get(self, name: str) -> bytes:
        """The bytes of that name, as they were given. Raises InputLost, OSError."""
        try:
            data = self._read(name) if _NAME.fullmatch(name) else None
        except (FileNotFoundError, disk.Unusable):
            data = None
        if data is None:
            raise InputLost(f"the picture {name[:12]} that the job brought along is gone: send the job again with it")
        if name_of(data) != name:
            raise InputLost(
                f"the picture {name[:12]} that the job brought along was damaged on the disk: send the job again with it"
            )
        return data

    def sweep(self, kept: Limits, *, now: float, named: Callable[[], set[str]]) -> None:
        """Let go of what is older than such results are, and ``named`` by no record. Raises OSError.

        The records are read only when something is that old. What is stored again meanwhile stays.
        """
        limits = Limits(seconds=max(kept.seconds or 0, AT_LEAST))
        stored = self._entries()
        if not due(stored, limits, now=now, what="inputs"):
            return
        spared = named()
        for entry in due((entry for entry in stored if entry.name not in spared), limits, now=now, what="inputs"):
            self._remove(entry)


class FileBlobs(Blobs):
    """Files in a folder that is there; ``tmp`` is one on the same file system. Any number of processes may share them."""

    def __init__(self, folder: Path, *, tmp: Path) -> None:
        self._folder, self._tmp = folder, tmp
        self._flush = disk.SharedFlush(folder)

    def put(self, data: bytes) -> str:
        """Store them durably; their name. Raises OSError."""
        name = name_of(data)
        path = self._folder / name
        with disk.held(path) as stored:  # nobody takes it away meanwhile
            if stored is not None and disk.content(stored, len(data) + 1) == data:
                disk.touch(stored)
                self._flush()  # who stored it first may not have come so far
            else:
                disk.write_whole(path, data, tmp=self._tmp, flush=self._flush)
        return name

    def _read(self, name: str) -> bytes:
        return disk.read_regular(self._folder / name, MAX_BLOB)

    def _entries(self) -> list[Entry]:
        return [entry for entry in entries(self._folder) if _NAME.fullmatch(entry.name)]

    def _remove(self, entry: Entry) -> None:
        path = self._folder / entry.name
        with disk.held(path) as stored:
            if stored is not None and disk.written_at(path) == entry.since:
                disk.remove(path)


class MemoryBlobs(Blobs):
    """Bytes in a dict."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._stored: dict[str, tuple[bytes, float]] = {}

    def put(self, data: bytes) -> str:
        """Store them; their name."""
        name = name_of(data)
        with self._mutex:
            self._stored[name] = data, time.time()
        return name

    def _read(self, name: str) -> bytes:
        if name not in self._stored:
            raise FileNotFoundError(name)
        return self._stored[name][0]

    def _entries(self) -> list[Entry]:
        with self._mutex:
            return [Entry(name, since, len(data)) for name, (data, since) in self._stored.items()]

    def _remove(self, entry: Entry) -> None:
        with self._mutex:
            if entry.name in self._stored and self._stored[entry.name][1] == entry.since:
                del self._stored[entry.name]
