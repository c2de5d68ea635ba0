"""What jobs bring along, pictures mostly: stored once by the hash of the content, and kept as long as records are."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from diffusion_api import disk
from diffusion_api.errors import DiskFull, NotFound
from diffusion_api.retention import Limits, due, entries

NAME = re.compile(r"[0-9a-f]{64}")
FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class Blobs:
    """A folder of files that are named by the SHA-256 of what they hold. ``tmp`` is a folder on the same disk."""

    def __init__(self, folder: Path, tmp: Path) -> None:
        self.folder, self._tmp = folder, tmp

    def put(self, data: bytes) -> str:
        """Store ``data`` durably, if it is not there yet; its name. Raises DiskFull."""
        name = hashlib.sha256(data).hexdigest()
        path = self.folder / name
        try:
            os.utime(path)  # as new: it is kept for this job as long as for one that brought it first
        except FileNotFoundError:
            self._write(path, data)
        return name

    def get(self, name: str) -> bytes:
        """What was stored under that name. Raises NotFound when it is gone."""
        if not NAME.fullmatch(name):
            raise NotFound(f"{name!r} is no name of a stored picture")
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise NotFound("the picture that the job brought along is no longer there") from None

    def sweep(self, limits: Limits, *, now: float, in_use: Callable[[], set[str]]) -> None:
        """Delete what is beyond the limits, oldest first, but nothing that ``in_use`` names. Raises OSError."""
        beyond = due([e for e in entries(self.folder) if NAME.fullmatch(e.name)], limits, now=now, what="inputs")
        spared = in_use() if beyond else set()
        for entry in beyond:
            if entry.name not in spared:
                disk.remove(self.folder / entry.name)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            disk.write_whole(path, data, tmp=self._tmp)
        except OSError as error:
            if error.errno in FULL:
                raise DiskFull("the disk is full: the picture of the job could not be stored") from error
            raise
