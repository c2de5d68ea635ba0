"""The keys that callers name their submissions with: a file for each, locked while its job is being stored.

The file is written before the job and says which id the job will have. After a crash in between, the same key stores the
job under that id; a file that is empty or torn announced no job.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from diffusion_api import disk
from diffusion_api.errors import CallerError, Unavailable
from diffusion_api.queues._file.places import Folder
from diffusion_api.queues.base import KEYS, Key, Submission
from diffusion_api.retention import due, entries

VERSION = Submission.model_fields["version"].default
MAX_KEY = 4096
PATIENCE = 10.0
LOOK_EVERY = 0.005


class _Versioned(BaseModel):
    version: int


class Held:
    """A key that nobody else has meanwhile. ``submission`` is what it stands for, None if for nothing yet."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        self.submission = _read(fd)
        self.announced = False

    def announce(self, submission: Submission) -> None:
        """Say, durably, for which job the key stands from now on."""
        self.announced = True
        disk.rewrite(self._fd, submission.model_dump_json().encode())
        disk.fsync_dir(self._path.parent)


class Keys:
    """The folder ``keys/``. Methods raise OSError."""

    def __init__(self, places: Folder) -> None:
        self._places = places

    @contextlib.contextmanager
    def held(self, caller: str, key: Key) -> Iterator[Held]:
        """A caller's key. A job that is announced and then refused leaves it free. Raises Unavailable."""
        name = hashlib.sha256(f"{caller}\0{key.text}".encode()).hexdigest()
        path = self._places.keys / f"{name}.json"
        fd = _lock(path)
        try:
            held = Held(path, fd)
            try:
                yield held
            except (CallerError, Unavailable):
                if held.announced or held.submission is None:
                    disk.remove(path)
                raise
        finally:
            disk.unlock(fd)

    def sweep(self, *, now: float) -> None:
        """Remove keys whose time is over."""
        for entry in due(entries(self._places.keys), KEYS, now=now, what="keys"):
            with self._places.tolerated(entry.name):
                _remove(self._places.keys / entry.name, since=entry.since)


def _lock(path: Path) -> int:
    deadline = time.monotonic() + PATIENCE
    while (fd := disk.lock(path)) is None:
        if time.monotonic() > deadline:
            raise Unavailable("a request with this Idempotency-Key is still being stored; send it again")
        time.sleep(LOOK_EVERY)
    return fd


def _read(fd: int) -> Submission | None:
    """What an open key file says; None when it says nothing any more, or was torn by a crash. Raises Unavailable."""
    data = disk.content(fd, MAX_KEY)
    try:
        if _Versioned.model_validate_json(data).version > VERSION:
            raise Unavailable("this Idempotency-Key was stored by a newer release of the service")
        known = Submission.model_validate_json(data)
    except ValidationError:
        return None
    return known if known.stands else None


def _remove(path: Path, *, since: float) -> None:
    """Remove a key file, unless it is in use or was written again."""
    fd = disk.lock(path)
    if fd is None:
        return
    try:
        if disk.written_at(path) == since:
            disk.remove(path)
    finally:
        disk.unlock(fd)
