"""A small versioned file that any number of processes read and change: who has a key, who has an account."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from diffusion_api import disk
from diffusion_api.errors import KeysUnreadable, Misconfigured
from diffusion_api.schema.request import Frozen

VERSION = 1
MAX_FILE = 2**22
PATIENCE, LOOK_EVERY = 10.0, 0.02
"""Seconds to wait for another process that changes the file."""


class Page(Frozen):
    """What such a file holds; each kind adds its rows."""

    version: int = VERSION


Kind = TypeVar("Kind", bound=Page)


class Ledger(Generic[Kind]):
    """The file at ``path``; one that is not there has the rows of ``kind()``. What another process does to it holds from the
    next call on.

    For its errors: ``what`` it holds, what the operator may do when it cannot be read, and when it cannot be written.
    """

    def __init__(self, path: Path, kind: type[Kind], *, what: str, unreadable: str, unwritable: str = "") -> None:
        self._path, self._kind, self._what = path, kind, what
        self._advice, self._way_out = unreadable, unwritable
        self._seen: tuple[int, int, int] | None = None
        self._page = kind()
        self._turn = threading.Lock()

    def read(self) -> Kind:
        """What is in it; the same object until the file changes. Raises KeysUnreadable."""
        with self._turn:
            try:
                seen = disk.version(self._path)
            except FileNotFoundError:
                if self._seen:
                    self._seen, self._page = None, self._kind()
                return self._page
            except OSError as error:
                raise self._unreadable() from error
            if seen != self._seen:
                self._page, self._seen = self._read(), seen
            return self._page

    def write(self, page: Kind) -> None:
        """Replace what is in it, within :meth:`changing`. Raises OSError."""
        disk.write_whole(self._path, page.model_dump_json(indent=1).encode(), tmp=self._path.parent)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One at a time, among all processes. Raises Misconfigured."""
        deadline = time.monotonic() + PATIENCE
        try:
            disk.make_folder(self._path.parent)
            while (held := disk.lock(self._path.with_suffix(".lock"))) is None:
                if time.monotonic() > deadline:
                    raise Misconfigured(f"another command is changing {self._what}, and does not end")
                time.sleep(LOOK_EVERY)
            try:
                yield
            finally:
                disk.unlock(held)
        except OSError as error:
            raise Misconfigured(
                f"{self._what} cannot be written to {self._path.parent}: {error.strerror}; "
                f"make that folder writable{self._way_out}"
            ) from error

    def _read(self) -> Kind:
        try:
            found = self._kind.model_validate_json(disk.read_regular(self._path, MAX_FILE))
        except (OSError, disk.Unusable, ValidationError) as error:
            raise self._unreadable() from error
        if found.version > VERSION:
            raise KeysUnreadable(f"{self._name} was written by a newer release, so this one can let nobody in")
        return found

    @property
    def _name(self) -> str:
        return f"{self._path.parent.name}/{self._path.name}"

    def _unreadable(self) -> KeysUnreadable:
        return KeysUnreadable(
            f"{self._name} cannot be read, so nobody can be let in: the operator may restore it, or {self._advice}"
        )
