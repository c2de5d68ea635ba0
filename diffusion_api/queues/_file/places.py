"""The places of a file queue: its folders, its records, and the waiting ones in their order.

``queued/`` and ``running/<worker>/`` hold ``<order>-<sequence>-<id>.json``, so that names sort as the jobs will run.
``done/``, ``error/`` and ``cancelled/`` hold ``<id>.json``. What is no record is moved to ``error/<name>.unreadable``,
with the reason in ``error/<name>.reason``.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from diffusion_api import disk
from diffusion_api.errors import InvalidRequest, QueueUnusable, TooLarge
from diffusion_api.schema.job import Job, Progress, State, UnreadableRecord, dumps, loads

log = logging.getLogger(__name__)

FOLDERS = ("tmp", "queued", "running", "done", "error", "cancelled", "workers", "inputs", "progress", "keys", "gone")
MAX_RECORD = 4 * 2**20
MAX_ENQUEUED = 2 * 2**20  # leaves room for what the result adds to the record
SYNC_EVERY = 0.2

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[01][0-9]-(?P<sequence>[0-9]{20})-(?P<id>[A-Za-z0-9_-]{1,64})\.json")
_LAST_SEQUENCE = 10**19  # beyond any clock's nanoseconds: no stray name may drive the sequence out of its 20 digits


class Folder:
    """The queue's folder, made if need be. Raises OSError, or QueueUnusable if it spans file systems."""

    def __init__(self, root: Path) -> None:
        self.tmp = root / "tmp"
        self.queued = root / "queued"
        self.running = root / "running"
        self.workers = root / "workers"
        self.keys = root / "keys"
        self.gone = root / "gone"
        self._root = root
        self._complaints: set[str] = set()
        _make_folders(root)
        self.waiting = Waiting(
            self.queued, after=max((_sequence_of(path.name) for path, _ in self.claimed()), default=0)
        )

    def write(self, path: Path, record: bytes) -> None:
        """Write a record whole and durably."""
        disk.write_whole(path, record, tmp=self.tmp)

    def place_of(self, job: Job, name: str) -> Path:
        """Where a job that is in nobody's hands belongs; ``name`` is its name while it waits."""
        return self.ended_path(job.state, job.id) if job.state.terminal else self.queued / name

    def ended_path(self, state: State, job_id: str) -> Path:
        """Where the record of a job that ended so lies."""
        return self._root / state / f"{job_id}.json"

    def claimed(self) -> Iterator[tuple[Path, str]]:
        """Records in the folders of workers, with the ids in their names."""
        for worker in entries(self.running):
            for path in entries(worker):
                if match := _NAME.fullmatch(path.name):
                    yield path, match["id"]

    def ended(self, state: State) -> list[str]:
        """Ids of the jobs that ended so, in no order."""
        ids = (name.removesuffix(".json") for name in os.listdir(self._root / state) if name.endswith(".json"))
        return [job_id for job_id in ids if is_id(job_id)]

    def read_ended(self, state: State, job_id: str) -> Job | None:
        """The record of a job that ended so.

        A job is cancelled by the rename into ``cancelled/`` and told so in its record after that; until then, or for
        good if the process died in between, the place is what counts.
        """
        path = self.ended_path(state, job_id)
        job = read_if_there(path, job_id)
        if job is None or job.state.terminal:
            return job
        return job.cancelled().model_copy(update={"finished": os.stat(path).st_ctime})

    def read_waiting(self, name: str) -> Job | None:
        """The waiting job of that name, or None: gone, or for a worker to set aside."""
        try:
            return self.waiting.read(name)
        except FileNotFoundError:
            self.waiting.discard(name)
        except (disk.Unusable, UnreadableRecord) as error:
            log.debug("%s: unreadable record: %s", name, error)
        return None

    def write_progress(self, job_id: str, progress: Progress) -> None:
        """Tell other processes how far a job is. Raises OSError."""
        record = progress.model_dump_json().encode()
        disk.write_whole(self._progress_path(job_id), record, tmp=self.tmp, durable=False)

    def read_progress(self, job_id: str) -> Progress:
        """How far a running job is: as loading when nothing was told yet."""
        try:
            return Progress.model_validate_json(disk.read_regular(self._progress_path(job_id), MAX_RECORD))
        except (FileNotFoundError, disk.Unusable, ValidationError):
            return Progress()

    def forget_progress(self, job_id: str) -> None:
        """Drop the progress of a job that runs no more; what cannot be dropped is met again by the next recovery."""
        with contextlib.suppress(OSError):
            self._progress_path(job_id).unlink()

    def forget_stray_progress(self) -> None:
        """Drop the progress of jobs that nobody runs."""
        reported = entries(self._root / "progress")
        running = {job_id for _, job_id in self.claimed()} if reported else set()
        for path in reported:
            if path.stem not in running:
                self.forget_progress(path.stem)

    def set_aside(self, path: Path, reason: Exception) -> None:
        """Move what is no record out of the way, and say why."""
        target = self._root / State.ERROR / f"{path.name}.unreadable"
        if os.path.lexists(target):
            target = target.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unreadable")
        with self.tolerated(path.name), contextlib.suppress(FileNotFoundError):
            disk.rename_durably(path, target)
            log.error("%s: set aside in the folder of errors: %s", path.name, reason)
            self.write(target.with_suffix(".reason"), f"{reason}\n".encode())

    @contextlib.contextmanager
    def tolerated(self, name: str) -> Iterator[None]:
        """Log an OSError about an entry, once, instead of raising it: the entry is met again at the next look."""
        try:
            yield
        except OSError as error:
            if name not in self._complaints:
                self._complaints.add(name)
                log.error("%s: left as it is: %s", name, error.strerror)

    def _progress_path(self, job_id: str) -> Path:
        return self._root / "progress" / f"{job_id}.json"


class Waiting:
    """The names in ``queued/``, in order, and the records read so far: a cache of the folder, which is the truth.

    New names sort behind those of their priority and behind ``after``, whatever the clock does.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        self._folder = folder
        self._mutex = threading.Lock()
        self._names: list[str] = []
        self._by_id: dict[str, str] = {}
        self._read: dict[str, tuple[tuple[int, int, int], Job]] = {}
        self._foreign: set[str] = set()
        self._last = after
        self._synced = float("-inf")

    def sync(self, *, now: bool = False) -> None:
        """List the folder, if that was not done a moment ago."""
        with self._mutex:
            if not now and time.monotonic() - self._synced < SYNC_EVERY:
                return
            listed = set(os.listdir(self._folder))
            known = set(self._names)
            self._foreign &= listed
            for name in known - listed:
                self._drop(name)
            for name in listed - known - self._foreign:
                self._take_up(name)
            self._synced = time.monotonic()

    def name_for(self, job: Job) -> str:
        """A new name."""
        self.sync()
        with self._mutex:
            self._last = max(self._last + 1, time.time_ns())
            return f"{9 - job.priority:02d}-{self._last:020d}-{job.id}.json"

    def add(self, name: str) -> None:
        """Take up a name just written, unless it is gone already."""
        with self._mutex:
            if name not in self._at(name) and os.path.lexists(self._folder / name):
                self._take_up(name)

    def discard(self, name: str) -> None:
        """Drop a name that is gone from the folder."""
        with self._mutex:
            if name in self._at(name):
                self._drop(name)

    def names(self) -> list[str]:
        """All names, next first."""
        with self._mutex:
            return list(self._names)

    def name_of(self, job_id: str) -> str | None:
        """The name of that job, if it waits."""
        return self._by_id.get(job_id)

    def position(self, name: str) -> int:
        """How many jobs are before it."""
        with self._mutex:
            return bisect.bisect_left(self._names, name)

    def foreign(self) -> set[str]:
        """What lies in the folder and is not named like a record."""
        self.sync(now=True)
        with self._mutex:
            return set(self._foreign)

    def read(self, name: str) -> Job:
        """The record, parsed once. Raises FileNotFoundError, Unusable, UnreadableRecord."""
        status = os.lstat(self._folder / name)
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        known = self._read.get(name)
        if known and known[0] == version:
            return known[1]
        job = read(self._folder / name, id_of(name))
        with self._mutex:
            if name in self._at(name):
                self._read[name] = (version, job)
        return job

    def _at(self, name: str) -> list[str]:
        place = bisect.bisect_left(self._names, name)
        return self._names[place : place + 1]

    def _take_up(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            self._foreign.add(name)
            return
        bisect.insort(self._names, name)
        self._by_id[id_of(name)] = name
        self._last = max(self._last, _sequence_of(name))

    def _drop(self, name: str) -> None:
        del self._names[bisect.bisect_left(self._names, name)]
        self._read.pop(name, None)
        if self._by_id.get(id_of(name)) == name:
            del self._by_id[id_of(name)]


def storable(job: Job) -> bytes:
    """The record of a new job, tried: what was accepted must not turn out unreadable when its turn has come.

    Raises InvalidRequest, TooLarge.
    """
    if not is_id(job.id):
        raise InvalidRequest("an id is 1 to 64 letters, digits, '-' or '_'")
    try:
        record = dumps(job)
        loads(record)
    except ValueError as error:
        raise InvalidRequest("the request cannot be stored: not valid Unicode, or nested too deeply") from error
    if len(record) > MAX_ENQUEUED:
        raise TooLarge(f"a job of {len(record)} bytes; at most {MAX_ENQUEUED}")
    return record


def read(path: Path, job_id: str) -> Job:
    """The record of that job. Raises Unusable, UnreadableRecord, OSError."""
    job = loads(disk.read_regular(path, MAX_RECORD))
    if job.id != job_id:
        raise UnreadableRecord("its name belongs to another job")
    return job


def read_if_there(path: Path, job_id: str) -> Job | None:
    """The record of that job, or None if it is not there or not readable. Raises OSError."""
    try:
        return read(path, job_id)
    except FileNotFoundError:
        return None
    except (disk.Unusable, UnreadableRecord) as error:
        log.warning("%s: unreadable record: %s", job_id, error)
        return None


def read_claimed(path: Path) -> Job:
    """A record in the folder of a worker. Raises Unusable, UnreadableRecord, OSError."""
    if not _NAME.fullmatch(path.name):
        raise UnreadableRecord("not named like a record")
    job = read(path, id_of(path.name))
    if not job.state.terminal and job.state is not State.QUEUED:
        raise UnreadableRecord(f"a record whose state is {job.state}")
    return job


def is_id(text: str) -> bool:
    """True for what can be the id of a job."""
    return _ID.fullmatch(text) is not None


def id_of(name: str) -> str:
    """The id in the name of a waiting or claimed record, or of the note beside it."""
    return name.split("-", 2)[2].partition(".")[0]


def note_of(record: Path) -> Path:
    """Where a caller leaves the note that a running job shall stop."""
    return record.with_suffix(".cancel")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in order; nothing if it is gone or no folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_folders(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in FOLDERS:
        (root / name).mkdir(mode=0o700, exist_ok=True)
    if len({os.stat(root / name).st_dev for name in FOLDERS}) > 1:
        raise QueueUnusable("the folders of the queue must lie on one file system")
    disk.fsync_dir(root)
    disk.probe(root / "tmp")


def _sequence_of(name: str) -> int:
    sequence = int(name.split("-", 2)[1])
    return sequence if sequence < _LAST_SEQUENCE else 0
