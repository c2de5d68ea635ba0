"""The places of a file queue: its folders, its records, and the waiting ones in their order.

``queued/`` and ``running/<worker>/`` hold ``<rank>-<round>-<sequence>-<caller>-<id>.json``, so that names sort as the
jobs will run: by priority (rank 0 is priority 9), then in rounds of one job of each caller, then by age.
``done/``, ``error/`` and ``cancelled/`` hold ``<id>.json``. What is no record is moved to ``error/<name>.unreadable``,
with the reason in ``error/<name>.reason``.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from diffusion_api import disk
from diffusion_api.errors import DiskFull, InvalidRequest, QueueFull, QueueUnusable, TooLarge
from diffusion_api.queues.base import PAUSED_BY_OPERATOR, check_each
from diffusion_api.schema.job import Job, Progress, State, UnreadableRecord, dumps, loads

log = logging.getLogger(__name__)

FOLDERS = ("tmp", "queued", "running", "done", "error", "cancelled", "workers", "inputs", "progress", "keys", "gone")
MIB = 2**20
MAX_RECORD = 4 * MIB
MAX_ENQUEUED = 2 * MIB  # leaves room for what the result adds to the record
MAX_REASON = 1000
SYNC_EVERY = 0.2
TICK = 0.05
"""Seconds after which the time of a folder's last change is surely another, whatever clock the kernel sets it by."""
KEPT = 256
"""Waiting records that are kept parsed."""

READ = ".read"
"""Ends the name of what is left of a record that was dropped because it was read."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[01][0-9]-[0-9]{10}-[0-9]{20}-[0-9a-f]{8}-[A-Za-z0-9_-]{1,64}\.json")
_LAST_SEQUENCE = 10**19  # beyond any clock's nanoseconds: no stray name may drive the sequence out of its 20 digits
_LAST_ROUND = 10**10 - 1


class Folder:
    """The queue's folder, made if need be. Raises OSError, or QueueUnusable if its file system is not fit for it."""

    def __init__(self, root: Path) -> None:
        self.tmp = root / "tmp"
        self.queued = root / "queued"
        self.running = root / "running"
        self.workers = root / "workers"
        self.keys = root / "keys"
        self.gone = root / "gone"
        self.crashes = root / "crashes.json"
        self._root = root
        self._paused = root / "paused"
        self._complaints: set[str] = set()
        _make_folders(root)
        self._flush_queued = disk.SharedFlush(self.queued)
        self.waiting = Waiting(self.queued, running=lambda: [path.name for path, _ in self.claimed()])

    def write(self, path: Path, record: bytes) -> None:
        """Write a record whole and durably."""
        disk.write_whole(path, record, tmp=self.tmp)

    def write_waiting(self, name: str, record: bytes) -> None:
        """Write a new record whole and durably; submissions that arrive together share the flush of the folder."""
        path = self.queued / name
        try:
            disk.write_whole(path, record, tmp=self.tmp, flush=self._flush_queued)
        except OSError:
            disk.remove(path)
            raise

    def check_room(self, reserve: int) -> None:
        """Raise DiskFull if fewer than ``reserve`` bytes are left, which the jobs at hand may need to be saved."""
        free = disk.free(self._root)
        if free < reserve:
            left, kept = free // MIB, reserve // MIB
            raise DiskFull(f"{left} MiB are left on the disk of the queue; {kept} are kept for the jobs at hand")

    def place_of(self, job: Job, name: str) -> Path:
        """Where a job that is in nobody's hands belongs; ``name`` is its name while it waits."""
        return self.ended_path(job.state, job.id) if job.state.terminal else self.queued / name

    def ended_path(self, state: State, job_id: str) -> Path:
        """Where the record of a job that ended so lies."""
        return self._root / state / f"{job_id}.json"

    def has_ended(self, job_id: str) -> bool:
        """True if that job has ended, also when its result is no longer kept."""
        records = (self.ended_path(state, job_id) for state in State if state.terminal)
        return any(disk.exists(path) for path in (*records, self.gone / job_id, self.gone / f"{job_id}{READ}"))

    def dropped_twin(self, path: Path, job: Job) -> bool:
        """True for a record of a job that has ended, now removed: a copy of a folder in use has some jobs twice."""
        twin = not job.state.terminal and self.has_ended(job.id)
        if twin:
            disk.remove(path)
            log.warning("%s: not begun again: it has ended", job.id)
        return twin

    def claimed(self) -> Iterator[tuple[Path, str]]:
        """Records in the folders of workers, with the ids in their names."""
        for worker in entries(self.running):
            for path in entries(worker):
                if _NAME.fullmatch(path.name):
                    yield path, id_of(path.name)

    def ended(self, state: State) -> list[str]:
        """Ids of the jobs that ended so, in no order."""
        ids = (name.removesuffix(".json") for name in disk.names(self._root / state) if name.endswith(".json"))
        return [job_id for job_id in ids if is_id(job_id)]

    def written(self, state: State) -> Iterator[tuple[str, float]]:
        """Ids of the jobs that ended so, and when their records were written, in epoch seconds."""
        for name, written, _ in disk.files(self._root / state):
            if name.endswith(".json") and is_id(name.removesuffix(".json")):
                yield name.removesuffix(".json"), written

    def read_ended(self, state: State, job_id: str) -> Job | None:
        """The record of a job that ended so.

        A job is cancelled by the rename into ``cancelled/`` and told so in its record after that; until then, or for
        good if the process died in between, the place is what counts.
        """
        path = self.ended_path(state, job_id)
        job = read_if_there(path, job_id)
        if job is None or job.state.terminal:
            return job
        return job.cancelled().model_copy(update={"finished": disk.changed_at(path)})

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
            disk.remove(self._progress_path(job_id))

    def forget_stray_progress(self) -> None:
        """Drop the progress of jobs that nobody runs."""
        reported = entries(self._root / "progress")
        running = {job_id for _, job_id in self.claimed()} if reported else set()
        for path in reported:
            if path.stem not in running:
                self.forget_progress(path.stem)

    def pause(self, reason: str) -> None:
        """Leave the word that nothing shall be claimed."""
        self.write(self._paused, f"{reason}\n".encode())

    def resume(self) -> None:
        """Take that word back."""
        disk.remove(self.crashes)
        disk.remove(self._paused)
        disk.fsync_dir(self._root)

    def paused(self) -> str | None:
        """Why nothing shall be claimed. Whatever is named so pauses, were it made by hand and empty."""
        if not disk.exists(self._paused):
            return None
        try:
            reason = disk.read_regular(self._paused, MAX_REASON).decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        except (OSError, disk.Unusable):
            return PAUSED_BY_OPERATOR
        return reason or PAUSED_BY_OPERATOR

    def set_aside(self, path: Path, reason: Exception) -> None:
        """Move what is no record out of the way, and say why."""
        target = self._root / State.ERROR / f"{path.name}.unreadable"
        if disk.exists(target):
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

    Sequences grow, whatever the clock does, also over those of the ``running`` names. A new job's round is the lowest
    one that waits, or the one after its caller's last: so a caller with one job waits for one of each other caller, and
    not for all that a busy one brought before (start-time fair queueing; Goyal, Vin, Cheng 1996).
    """

    def __init__(self, folder: Path, *, running: Callable[[], Iterable[str]]) -> None:
        self._folder = folder
        self._running = running
        self._mutex = threading.Lock()
        self._names: list[str] = []
        self._of_caller: dict[tuple[str, str], list[str]] = {}
        self._by_id: dict[str, str] = {}
        self._coming: set[str] = set()
        self._read: dict[str, tuple[tuple[int, int, int], Job]] = {}
        self._foreign: set[str] = set()
        self._last = max(map(_sequence_of, running()), default=0)
        self._synced = -math.inf
        self._modified = 0
        self._modified_since = -math.inf
        self._settled = False

    def sync(self, *, now: bool = False) -> None:
        """List the folder, if that was not done a moment ago, or not since it last changed."""
        with self._mutex:
            if not now and time.monotonic() - self._synced < SYNC_EVERY:
                return
            self._synced = time.monotonic()
            modified = disk.modified(self._folder)
            if modified != self._modified:
                self._modified, self._modified_since, self._settled = modified, self._synced, False
            if self._settled:
                return
            self._settled = self._synced - self._modified_since > TICK
            listed = set(disk.names(self._folder))
            known = set(self._names)
            self._foreign &= listed
            for name in known - listed - self._coming:
                self._drop(name)
            for name in listed - known:
                self._take_up(name)

    @contextlib.contextmanager
    def place_for(self, job: Job, *, at_most: int, each: int) -> Iterator[str]:
        """The name of a new job, which counts from now on and is written within. ``at_most`` jobs wait, and ``each`` of
        one caller; 0 is no limit. Raises QueueFull, RateLimited.
        """
        self.sync()
        rank, caller = f"{9 - job.priority:02d}", hashlib.sha256(job.caller.encode(errors="replace")).hexdigest()[:8]
        with self._mutex:
            self._check(at_most)
            check_each(sum(len(mine) for (_, of), mine in self._of_caller.items() if of == caller) if each else 0, each)
            self._last = max(self._last + 1, time.time_ns())
            name = f"{rank}-{self._new_round(rank, caller):010d}-{self._last:020d}-{caller}-{job.id}.json"
            self._coming.add(name)
            self._take_up(name)
        try:
            yield name
        finally:
            self._coming.discard(name)
            if not disk.exists(self._folder / name):
                self.discard(name)

    def check(self, *, at_most: int) -> None:
        """Raise QueueFull if there is no place for a new job."""
        self.sync()
        self._check(at_most)

    def add(self, name: str) -> None:
        """Take up a name that came back to the folder, unless it is gone already."""
        with self._mutex:
            if name not in self._at(name) and disk.exists(self._folder / name):
                self._take_up(name)

    def discard(self, name: str) -> None:
        """Drop a name that is gone from the folder."""
        with self._mutex:
            if name in self._at(name) and name not in self._coming:
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
        version = disk.version(self._folder / name)
        known = self._read.get(name)
        if known and known[0] == version:
            return known[1]
        job = read(self._folder / name, id_of(name))
        with self._mutex:
            if name in self._at(name):
                self._read[name] = (version, job)
                while len(self._read) > KEPT:
                    del self._read[next(iter(self._read))]
        return job

    def _check(self, at_most: int) -> None:
        if at_most and len(self._names) >= at_most:
            raise QueueFull(f"{len(self._names)} jobs wait already; at most {at_most} may")

    def _new_round(self, rank: str, caller: str) -> int:
        mine = self._of_caller.get((rank, caller))
        after_mine = _round_of(mine[-1]) + 1 if mine else 0
        first = bisect.bisect_left(self._names, rank)
        if self._names[first : first + 1] and self._names[first].startswith(rank):
            lowest = _round_of(self._names[first])
        else:
            lowest = max((_round_of(name) + 1 for name in self._running() if name.startswith(rank)), default=0)
        return min(max(lowest, after_mine), _LAST_ROUND)

    def _at(self, name: str) -> list[str]:
        place = bisect.bisect_left(self._names, name)
        return self._names[place : place + 1]

    def _take_up(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            self._foreign.add(name)
            return
        bisect.insort(self._names, name)
        bisect.insort(self._of_caller.setdefault(_caller_of(name), []), name)
        self._by_id[id_of(name)] = name
        self._last = max(self._last, _sequence_of(name))

    def _drop(self, name: str) -> None:
        del self._names[bisect.bisect_left(self._names, name)]
        mine = self._of_caller[_caller_of(name)]
        del mine[bisect.bisect_left(mine, name)]
        if not mine:
            del self._of_caller[_caller_of(name)]
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
    return name.split("-", 4)[4].partition(".")[0]


def note_of(record: Path) -> Path:
    """Where a caller leaves the note that a running job shall stop. It says ``partial`` or nothing."""
    return record.with_suffix(".cancel")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in order; nothing if it is gone or no folder."""
    try:
        return sorted(folder / name for name in disk.names(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_folders(root: Path) -> None:
    disk.make_folder(root)
    if kind := disk.network_file_system(root):
        raise QueueUnusable(
            f"the folder of the queue lies on a network file system ({kind}), whose locks and renames cannot be trusted; "
            "it must lie on a local disk"
        )
    for name in FOLDERS:
        disk.make_folder(root / name)
    if len({disk.device(root / name) for name in FOLDERS}) > 1:
        raise QueueUnusable("the folders of the queue must lie on one file system")
    disk.fsync_dir(root)
    disk.fsync_dir(root.parent)
    disk.probe(root / "tmp")


def posted(name: str) -> float:
    """When a job was posted, at the latest, in epoch seconds, from the name of its waiting or claimed record."""
    return _sequence_of(name) / 1e9


def _sequence_of(name: str) -> int:
    sequence = int(name.split("-", 3)[2])
    return sequence if sequence < _LAST_SEQUENCE else 0


def _round_of(name: str) -> int:
    return int(name.split("-", 2)[1])


def _caller_of(name: str) -> tuple[str, str]:
    rank, _, _, caller, _ = name.split("-", 4)
    return rank, caller
