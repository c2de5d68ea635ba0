"""SHA-256 of files of weights, made once: kept by path, size and time of the last change, also over a restart."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, TypeAlias

from pydantic import TypeAdapter, ValidationError

from diffusion_api import disk

log = logging.getLogger(__name__)

Kept: TypeAlias = dict[str, tuple[int, int, str]]
"""Size, time of the last change in nanoseconds, and hash, by path and what was hashed."""

_KEPT = TypeAdapter(Kept)


class Made(NamedTuple):
    """The hashes of a file that were made; None for one that was not yet."""

    whole: str | None = None
    tensors: str | None = None


class Hashes:
    """The hashes that are known; they are kept in ``file`` if there is one. May be used from any thread."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._kept: Kept | None = None
        self._asked: dict[tuple[str, int, int], Future[str]] = {}

    def whole(self, path: Path) -> Future[str]:
        """The SHA-256 of a file, in hexadecimal; made on a thread of its own if it is not known. May become an OSError."""
        return self._ask(str(path), path, _whole)

    def tensors(self, path: Path) -> Future[str]:
        """The SHA-256 of what follows the header of a safetensors file, which stays when the file is described anew."""
        return self._ask(f"{path}#tensors", path, _after_header)

    def known(self, path: Path) -> Made:
        """Those hashes of a file that were made, as it is now."""
        try:
            status = path.stat()
        except OSError:
            return Made()
        with self._lock:
            return Made(
                *(self._known(key, status.st_size, status.st_mtime_ns) for key in (str(path), f"{path}#tensors"))
            )

    def _ask(self, key: str, path: Path, make: Callable[[Path], str]) -> Future[str]:
        answer: Future[str] = Future()
        try:
            status = path.stat()
        except OSError as error:
            answer.set_exception(error)
            return answer
        state = (key, status.st_size, status.st_mtime_ns)
        with self._lock:
            if state in self._asked:
                return self._asked[state]
            self._asked[state] = answer
            if known := self._known(*state):
                answer.set_result(known)
                return answer
        threading.Thread(target=self._make, args=(state, path, make, answer), name="hash", daemon=True).start()
        return answer

    def _make(self, state: tuple[str, int, int], path: Path, make: Callable[[Path], str], answer: Future[str]) -> None:
        try:
            made = make(path)
        except OSError as error:
            with self._lock:
                del self._asked[state]
            answer.set_exception(error)
            return
        with self._lock:
            self._keep(state, made)
        answer.set_result(made)

    def _known(self, key: str, size: int, changed: int) -> str | None:
        if self._kept is None:
            self._kept = self._read()
        found = self._kept.get(key)
        return found[2] if found and found[:2] == (size, changed) else None

    def _keep(self, state: tuple[str, int, int], made: str) -> None:
        key, size, changed = state
        self._kept = self._read() | {key: (size, changed, made)}  # other processes keep theirs in the same file
        if self._file and self._file.parent.is_dir():
            there = {key: kept for key, kept in self._kept.items() if Path(key.removesuffix("#tensors")).exists()}
            try:
                disk.write_whole(self._file, json.dumps(there, indent=0).encode(), tmp=self._file.parent, durable=False)
            except OSError as error:
                log.warning("hashes of files cannot be kept: %s", error.strerror)

    def _read(self) -> Kept:
        try:
            return _KEPT.validate_json(self._file.read_bytes()) if self._file else self._kept or {}
        except (OSError, ValidationError):  # it is only a help, and made anew
            return {}


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _after_header(path: Path) -> str:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        return hashlib.file_digest(file, "sha256").hexdigest()
