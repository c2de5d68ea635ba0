"""A disk that forgets, for queues on it: processes are killed between any two of its calls, and power cuts leave what was
flushed.

A real folder is used, and every call to ``os`` that changes something below it is counted and remembered first. What a
power cut leaves follows what local file systems with a journal promise, and no more:

- what was written to a file is there once the file was flushed; before that, all, a part or nothing of it;
- what was changed in a folder is there once the folder was flushed; before that, perhaps, but never without the earlier
  changes of the same names;
- a rename is there whole or not at all, also between two folders, and flushing either folder keeps it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Chance = Callable[[], bool]
"""Answers whether something that was not flushed outlives a power cut."""


class Killed(BaseException):
    """The process ends here. Not even a handler of all exceptions may take it for one."""


@dataclass(eq=False)
class _Node:
    """A file (``entries`` is None) or a folder: as it is, and as it would be after a power cut."""

    entries: dict[str, _Node] | None = None
    kept_entries: dict[str, _Node] = field(default_factory=dict)
    kept_data: bytes = b""
    flushed: bool = True


_Name = tuple[_Node, str]


@dataclass(eq=False)
class _Change:
    """One call that changed folders: names that went, then one that came."""

    gone: list[_Name]
    came: tuple[_Node, str, _Node] | None = None

    @property
    def names(self) -> set[_Name]:
        return {*self.gone, *([self.came[:2]] if self.came else [])}

    def keep(self) -> None:
        for folder, name in self.gone:
            folder.kept_entries.pop(name, None)
        if self.came:
            folder, name, node = self.came
            folder.kept_entries[name] = node


class Disk:
    """Takes the place of the real calls as long as ``patch`` lasts. ``root`` must not be there yet."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        root.mkdir()
        self.root = root
        self.full = False
        """True while nothing more can be written or made."""
        self.failing = 0
        """So many flushes from now one fails; 0: none does."""
        self._left: int | None = None
        self._killed = False
        self._process: object = None
        self._tree = _Node(entries={})
        self._pending: list[_Change] = []
        self._files: dict[int, tuple[object, _Node]] = {}
        self._real: dict[str, Callable[..., Any]] = {}
        for name in "open close write ftruncate fsync rename replace unlink remove mkdir rmdir".split():
            self._real[name] = getattr(os, name)
            patch.setattr(os, name, getattr(self, f"_{name}"))

    # faults

    @contextmanager
    def running(self, process: object, *, killed_at: int | None = None) -> Iterator[None]:
        """That process makes the calls within, and is killed before the one with that number. Raises Killed."""
        self._process, self._left, self._killed = process, killed_at, False
        try:
            yield
            assert not self._killed, "something went on after it was killed"
        finally:
            if self._killed:
                self.kill(process)
            self._process, self._left, self._killed = None, None, False

    def kill(self, process: object) -> None:
        """Close what the process has open, as the kernel does: its locks are free."""
        for fd in [fd for fd, (owner, _) in self._files.items() if owner == process]:
            self._close(fd)

    def cut(self, survives: Chance) -> None:
        """Cut the power: every process is gone, and so is what was not flushed, unless it ``survives``."""
        for fd in list(self._files):
            self._close(fd)
        lost: set[_Name] = set()
        for change in self._pending:
            if lost & change.names or not survives():
                lost |= change.names
            else:
                change.keep()
        self._pending.clear()
        self._settle(self._tree, self.root, survives)
        shutil.rmtree(self.root)
        self._restore(self._tree, self.root)

    def _settle(self, folder: _Node, path: Path, survives: Chance) -> None:
        """Decide what every file that is still there holds; those that a change brought back lie nowhere now."""
        for name, node in folder.kept_entries.items():
            if node.entries is not None:
                self._settle(node, path / name, survives)
            elif not node.flushed and node is (folder.entries or {}).get(name) and survives():
                data = (path / name).read_bytes()
                node.kept_data = data if survives() else data[: len(data) // 2]

    def _restore(self, folder: _Node, path: Path) -> None:
        self._real["mkdir"](path, 0o700)
        folder.entries = dict(folder.kept_entries)
        for name, node in folder.entries.items():
            if node.entries is not None:
                self._restore(node, path / name)
            else:
                (path / name).write_bytes(node.kept_data)
                node.flushed = True

    # calls

    def _call(self, *, takes_room: bool = False) -> None:
        if self._killed or self._left == 0:
            self._killed = True
            raise Killed
        if self._left is not None:
            self._left -= 1
        if self.full and takes_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _place(self, path: Any) -> tuple[_Node, str] | None:
        """The folder and the name of a path below the root; None for others, and where there is no such folder."""
        if not isinstance(path, str | Path) or self.root not in Path(path).parents:
            return None
        *above, name = Path(path).relative_to(self.root).parts
        folder: _Node | None = self._tree
        for part in above:
            folder = (folder.entries or {}).get(part) if folder else None
        return (folder, name) if folder and folder.entries is not None else None

    def _node(self, path: Any) -> _Node | None:
        if path in (self.root, str(self.root)):
            return self._tree
        place = self._place(path)
        return (place[0].entries or {}).get(place[1]) if place else None

    def _changed(self, gone: list[_Name], came: tuple[_Node, str, _Node] | None = None) -> None:
        for folder, name in gone:
            assert folder.entries is not None
            folder.entries.pop(name, None)
        if came:
            folder, name, node = came
            assert folder.entries is not None
            folder.entries[name] = node
        self._pending.append(_Change(gone, came))

    def _open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        known = self._node(path)
        place = self._place(path)
        makes = known is None and place is not None and bool(flags & os.O_CREAT)
        if makes or (known and flags & os.O_TRUNC):
            self._call(takes_room=makes)
        fd: int = self._real["open"](path, flags, mode, **options)
        if makes and place:
            known = _Node()
            self._changed([], (*place, known))
        if known:
            known.flushed &= not flags & os.O_TRUNC
            self._files[fd] = self._process, known
        return fd

    def _close(self, fd: int) -> None:
        self._files.pop(fd, None)
        self._real["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        if fd in self._files:
            self._files[fd][1].flushed = False
            try:
                self._call(takes_room=True)
            except Killed:
                self._real["write"](fd, data[: len(data) // 2])
                raise
        written: int = self._real["write"](fd, data)
        return written

    def _ftruncate(self, fd: int, length: int) -> None:
        if fd in self._files:
            self._call()
            self._files[fd][1].flushed = False
        self._real["ftruncate"](fd, length)

    def _fsync(self, fd: int) -> None:
        if fd not in self._files:
            self._real["fsync"](fd)
            return
        self._call()
        if self.failing:
            self.failing -= 1
            if self.failing == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        node = self._files[fd][1]
        if node.entries is None:
            node.kept_data, node.flushed = Path(f"/proc/self/fd/{fd}").read_bytes(), True
        else:
            self._flush_folder(node)

    def _flush_folder(self, node: _Node) -> None:
        kept, names = [], set[_Name]()
        for change in reversed(self._pending):
            if change.names & names or any(folder is node for folder, _ in change.names):
                names |= change.names
                kept.append(change)
        for change in reversed(kept):
            change.keep()
            self._pending.remove(change)

    def _rename(self, source: Any, target: Any) -> None:
        from_, to, node = self._place(source), self._place(target), self._node(source)
        if from_ and to:
            self._call()
        self._real["rename"](source, target)
        if from_ and to and node:
            self._changed([from_], (*to, node))

    _replace = _rename

    def _unlink(self, path: Any, **options: Any) -> None:
        place = self._place(path)
        if place:
            self._call()
        self._real["unlink"](path, **options)
        if place:
            self._changed([place])

    _remove = _unlink

    def _mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        place = self._place(path)
        if place and self._node(path) is None:
            self._call(takes_room=True)
        self._real["mkdir"](path, mode, **options)
        if place:
            self._changed([], (*place, _Node(entries={})))

    def _rmdir(self, path: Any, **options: Any) -> None:
        place = self._place(path)
        if place:
            self._call()
        self._real["rmdir"](path, **options)
        if place:
            self._changed([place])
