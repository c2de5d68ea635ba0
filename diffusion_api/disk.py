"""The few file-system operations a queue on disk stands on: whole or not at all, durable on return, no link followed.

Locks are ``flock``: the kernel drops them when the process that took them ends, however it ends. A forked child would
keep its parent's, so a process that holds one must never fork (starting another program is fine: it inherits none).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from pathlib import Path

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEVER_READABLE = (errno.ELOOP, errno.ENXIO, errno.EACCES)


class Unusable(ValueError):
    """A directory entry that is no regular file of bearable size, and will not become one by waiting."""


def write_whole(target: Path, data: bytes, *, tmp: Path, durable: bool = True) -> None:
    """Put ``data`` at ``target``: readers, also those after a crash, find it whole or find what was there before.

    ``tmp`` is a folder of the same file system for the unfinished file, which is gone when this raises OSError.
    ``durable=False`` leaves out both fsyncs: never torn for readers, but perhaps gone after a power cut.
    """
    path, fd = _open_temporary(tmp)
    try:
        _write_all(fd, data)
        if durable:
            os.fsync(fd)
        os.rename(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)
    if durable:
        fsync_dir(target.parent)


def probe(tmp: Path) -> None:
    """Try what every write does, and leave nothing behind. Raises OSError where it would."""
    path, fd = _open_temporary(tmp)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
        path.unlink()


def rename_durably(source: Path, target: Path) -> None:
    """Rename, and return when a power cut can no longer undo it. The new place is flushed first: never in neither."""
    os.rename(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Follows no link and waits for no pipe.

    Raises :class:`Unusable` for anything else, and OSError for what another try may cure.
    """
    try:
        fd = os.open(path, _READ)
    except OSError as error:
        if error.errno in _NEVER_READABLE:
            raise Unusable(f"cannot be opened: {error.strerror}") from error
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not a regular file")
        if status.st_size > limit:
            raise Unusable(f"{status.st_size} bytes, more than the {limit} of a record")
        return _read_all(fd, status.st_size)
    finally:
        os.close(fd)


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock of this file, made if need be; None while another does. Closing it unlocks.

    It may be read, and rewritten with :func:`rewrite`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    return fd if _taken(fd) else None


def is_locked(path: Path) -> bool:
    """True while someone holds the lock of this file. Looking is shared: those who look do not meet each other."""
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def rewrite(fd: int, data: bytes) -> None:
    """Put ``data`` in the place of what an open file holds, durably. A crash may leave it torn: its reader must tell."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    _write_all(fd, data)
    os.fsync(fd)


def empty(path: Path) -> None:
    """Take away what a file holds. No link is followed."""
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))


def remove_abandoned(tmp: Path) -> None:
    """Remove the unfinished files of writers that died.

    A writer holds the lock of its file from before the first byte until after the rename, so a file whose lock can be
    had belongs to nobody. No age or clock is asked.
    """
    for path in tmp.iterdir():
        with contextlib.suppress(OSError):
            fd = os.open(path, _READ)
            if _taken(fd):
                try:
                    path.unlink()
                finally:
                    os.close(fd)


def _open_temporary(tmp: Path) -> tuple[Path, int]:
    while True:
        path = tmp / uuid.uuid4().hex
        fd = os.open(path, _CREATE, 0o600)
        if _taken(fd):
            return path, fd


def _taken(fd: int) -> bool:
    """Lock the open file; close it and say False if another has it, or had it and removed the name."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EWOULDBLOCK:
            return False
        raise
    if os.fstat(fd).st_nlink == 0:
        os.close(fd)
        return False
    return True


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read_all(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := os.read(fd, size - len(data))):
        data += more
    return data
