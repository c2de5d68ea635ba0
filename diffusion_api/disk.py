"""The file-system operations a queue on disk stands on: whole or not at all, durable on return, no link followed.

All of them are made of calls to ``os`` and ``fcntl`` here, so that a test can put another file system in their place.

Locks are ``flock``: the kernel drops them when the process that took them ends, however it ends. A forked child would
keep its parent's, so a process that holds one must never fork (starting another program is fine: it inherits none).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
"""Bytes for which a full disk has no room, though it may take an empty file."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEVER_READABLE = (errno.ELOOP, errno.ENXIO, errno.EACCES)
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"nfs4?|cifs|smb3|smbfs|9p|afs|ceph|lustre|gpfs|beegfs|glusterfs|ocfs2|gfs2|orangefs|pvfs2|coda|davfs|"
    r"fuse\.(sshfs|glusterfs|ceph.*|davfs.*|s3fs|gcsfuse|rclone|goofys|mount-s3|juicefs|seaweedfs|grpcfuse|osxfs)"
)


_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
"""What file systems say that cannot make a file without a name."""


class Unusable(ValueError):
    """A directory entry that is no regular file of bearable size, and will not become one by waiting."""


def write_whole(
    target: Path, data: bytes, *, tmp: Path, durable: bool = True, flush: Callable[[], None] | None = None
) -> None:
    """Put ``data`` at ``target``: readers, also those after a crash, find it whole or find what was there before.

    ``tmp`` is a folder of the same file system for the unfinished file, which is gone when this raises OSError.
    ``durable=False`` leaves out both fsyncs: never torn for readers, but perhaps gone after a power cut. ``flush`` is a
    shared way to flush the folder of the target. An fsync that failed is never tried again: the kernel may have dropped
    what it could not write (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
    """
    path, fd = _open_temporary(tmp)
    try:
        _write_all(fd, data)
        if durable:
            os.fsync(fd)
        os.rename(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path)
        raise
    finally:
        os.close(fd)
    if durable:
        flush() if flush else fsync_dir(target.parent)


def probe(tmp: Path, size: int = 0) -> None:
    """Try what every write does, with a file of that size, and leave nothing behind. Raises OSError where it would."""
    path, fd = _open_temporary(tmp)
    try:
        _write_all(fd, bytes(size))
        os.fsync(fd)
    finally:
        os.close(fd)
        remove(path)


def check_writable(folder: Path) -> None:
    """Raises OSError where no file could get into the folder: its owner, a flag of it, or its disk is against that."""
    unnamed = getattr(os, "O_TMPFILE", None)
    if unnamed is None:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return
    try:
        os.close(os.open(folder, os.O_WRONLY | unnamed | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno not in _NO_UNNAMED_FILES:
            raise


def rename(source: Path, target: Path) -> None:
    """Rename, for now: a power cut may undo it. Raises FileNotFoundError to all but one who try at the same time."""
    os.rename(source, target)


def rename_durably(source: Path, target: Path) -> None:
    """Rename, and return when a power cut can no longer undo it. The new place is flushed first: never in neither."""
    os.rename(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def remove(path: Path) -> bool:
    """Remove a file, for now: a power cut may bring it back. False if there is none."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Make a folder for this user only, and those above it, where they are missing."""
    os.makedirs(folder, mode=0o700, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove an empty folder, once no power cut can bring back to it what was moved away. Raises OSError for others."""
    fsync_dir(folder)
    os.rmdir(folder)


def exists(path: Path) -> bool:
    """True if there is anything of that name, were it a link to nowhere."""
    return os.path.lexists(path)


def is_folder(path: Path) -> bool:
    """True for a folder that is no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def names(folder: Path) -> list[str]:
    """What lies in a folder, in no order. Raises FileNotFoundError, NotADirectoryError."""
    return os.listdir(folder)


def version(path: Path) -> tuple[int, int, int]:
    """Something that is another once the file was written whole again. Raises FileNotFoundError."""
    status = os.lstat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


def modified(folder: Path) -> int:
    """Something that is another a few milliseconds after something came to or went from the folder."""
    return os.stat(folder).st_mtime_ns


def changed_at(path: Path) -> float:
    """When the file was last written or renamed, in epoch seconds. Raises FileNotFoundError."""
    return os.lstat(path).st_ctime


def written_at(path: Path) -> float:
    """When what the file holds was last changed, in epoch seconds. Raises FileNotFoundError."""
    return os.lstat(path).st_mtime


def files(folder: Path) -> Iterator[tuple[str, float, int]]:
    """Name, time of the last change and size of each regular file in a folder; none if it is gone. No link counts."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        for item in found:
            with contextlib.suppress(FileNotFoundError):
                status = item.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield item.name, status.st_mtime, status.st_size


def device(folder: Path) -> int:
    """The number of the file system on which a folder lies."""
    return os.stat(folder).st_dev


def free(folder: Path) -> int:
    """Bytes that may still be written to the disk of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def network_file_system(folder: Path) -> str | None:
    """The kind of the file system on which a folder lies if it is a network's, as Linux names it; else None."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    here, kind, above = os.path.realpath(folder), "", -1
    for line in lines:
        mount, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4])
        if len(point) >= above and os.path.commonpath((point, here)) == point:  # of two in one place the later counts
            kind, above = rest.split()[0], len(point)
    return kind if _NETWORK.fullmatch(kind) else None


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class SharedFlush:
    """:func:`fsync_dir` of one folder for many threads: each waits for a flush that began after it came, and those who
    come while one runs share the next. A flush that failed has failed for all who waited for it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._flushing = threading.Lock()
        self._next = _Flush()

    def __call__(self) -> None:
        """Make the entries of the folder durable. Raises OSError."""
        mine = self._next
        with self._flushing:
            if not mine.over:
                self._next = _Flush()
                try:
                    fsync_dir(self._folder)
                except OSError as error:
                    mine.failure = error
                mine.over = True
        if mine.failure:
            raise OSError(mine.failure.errno, mine.failure.strerror) from mine.failure


@dataclass
class _Flush:
    over: bool = False
    failure: OSError | None = None


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

    What the file holds is for :func:`content` and :func:`rewrite`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    return fd if _taken(fd) else None


def unlock(fd: int) -> None:
    """Let go of a lock."""
    os.close(fd)


@contextlib.contextmanager
def held(path: Path) -> Iterator[int | None]:
    """Within, a file that is there, open and locked; None where there is none. Waits until who has the lock lets go."""
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd if os.fstat(fd).st_nlink else None
    finally:
        os.close(fd)


def touch(fd: int) -> None:
    """Let an open file be as one that was written now."""
    os.utime(fd)


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


def content(fd: int, limit: int) -> bytes:
    """The first ``limit`` bytes of a locked file."""
    return os.pread(fd, limit, 0)


def rewrite(fd: int, data: bytes) -> None:
    """Put ``data`` in the place of what an open file holds, durably. A crash may leave it torn: its reader must tell."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    _write_all(fd, data)
    os.fsync(fd)


def empty(path: Path) -> None:
    """Take away what a file holds. No link is followed."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def remove_abandoned(tmp: Path) -> None:
    """Remove the unfinished files of writers that died.

    A writer holds the lock of its file from before the first byte until after the rename, so a file whose lock can be
    had belongs to nobody. No age or clock is asked.
    """
    for name in names(tmp):
        with contextlib.suppress(OSError):
            fd = os.open(tmp / name, _READ)
            if _taken(fd):
                try:
                    remove(tmp / name)
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
