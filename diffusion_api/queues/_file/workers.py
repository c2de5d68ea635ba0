"""Who serves a file queue, and what becomes of the jobs of those that died.

A worker lives exactly as long as it holds ``workers/<uuid>.lock``, taken before ``running/<uuid>/`` is made. Whoever
gets that lock in its place owns the folder and its records.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, ValidationError

from diffusion_api import disk
from diffusion_api.queues._file import reports
from diffusion_api.queues._file.places import MAX_RECORD, Folder, entries, id_of, note_of, read_claimed
from diffusion_api.schema.job import Job, State, UnreadableRecord, dumps
from diffusion_api.schema.report import WorkerReport
from diffusion_api.schema.request import Frozen

log = logging.getLogger(__name__)

VERSION = 1

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Worker:
    """What one ``serve`` owns: a locked file that says it lives, and the folder of its claims. Raises OSError."""

    def __init__(self, places: Folder) -> None:
        self.guard = threading.RLock()
        self.present = True
        self._places = places
        self._lock_path, self._fd = _new_lock(places.workers)
        self.folder = places.running / self._lock_path.stem
        disk.make_folder(self.folder)
        disk.fsync_dir(places.running)

    def tell(self, report: WorkerReport) -> None:
        """Let others see it. Raises OSError."""
        if self.present:
            reports.write(self._places, self._lock_path, report)

    def leave(self) -> None:
        """Let go of everything. A folder that still holds jobs stays, for whoever recovers them."""
        with self.guard:
            if not self.present:
                return
            self.present = False
            with contextlib.suppress(OSError):
                disk.remove(reports.path_of(self._lock_path))
                disk.remove_folder(self.folder)
                disk.remove(self._lock_path)
            disk.unlock(self._fd)


class _Crashes(Frozen):
    version: int = VERSION
    in_a_row: int = Field(ge=0)


class Recovery:
    """Takes over from workers that died, and clears away what belongs to nobody.

    A crash is the death of a worker that had started a job, in this boot of the machine. After ``pause_after_crashes`` of
    them in a row, with no job ended in between, the queue is paused; 0 is never. ``cancel`` cancels the job with that
    id, wherever it is. Raises OSError.
    """

    def __init__(
        self, places: Folder, *, max_attempts: int, pause_after_crashes: int, cancel: Callable[[str], object]
    ) -> None:
        self._places = places
        self._max_attempts = max_attempts
        self._pause_after_crashes = pause_after_crashes
        self._cancel = cancel

    def run(self) -> None:
        """Do what can be done now; the rest is met again by the next run."""
        places = self._places
        with places.tolerated("tmp"):
            disk.remove_abandoned(places.tmp)
        for folder in entries(places.running):
            with places.tolerated(folder.name):
                self._take_over(folder)
        for path in entries(places.workers):
            with places.tolerated(path.name):
                self._remove_lock_of_nobody(path)
        for name in places.waiting.foreign():
            places.set_aside(places.queued / name, UnreadableRecord("not named like a record"))
        places.forget_stray_progress()

    def _take_over(self, folder: Path) -> None:
        if not disk.is_folder(folder):
            self._places.set_aside(folder, UnreadableRecord("not the folder of a worker"))
            return
        lock_path = self._places.workers / f"{folder.name}.lock"
        fd = disk.lock(lock_path)
        if fd is None:
            return
        try:
            if self._empty(folder):
                self._count_crash()
            with contextlib.suppress(FileNotFoundError):
                disk.remove_folder(folder)
            disk.remove(lock_path)
        finally:
            disk.unlock(fd)

    def _empty(self, folder: Path) -> bool:
        """True if a job had started that did not end, nor was it the machine that went down."""
        found = [(path, self._claimed(path)) for path in entries(folder) if path.suffix != ".cancel"]
        begun = sum(job is not None and job.begun for _, job in found)
        crashed = False
        for path, job in found:
            if job is not None:
                with self._places.tolerated(path.name):
                    crashed |= self._recover(path, job, alone=begun == 1)
        for note in entries(folder):
            if note.suffix == ".cancel" and not disk.exists(note.with_suffix(".json")):
                self._honour(note)
        return crashed

    def _claimed(self, path: Path) -> Job | None:
        """The job in the folder of a worker; what is none is set aside, what cannot be read now is left for later."""
        with self._places.tolerated(path.name):
            try:
                return read_claimed(path)
            except (disk.Unusable, UnreadableRecord) as error:
                self._places.set_aside(path, error)
        return None

    def _recover(self, path: Path, job: Job, *, alone: bool) -> bool:
        note = note_of(path)
        if self._places.dropped_twin(path, job):
            disk.remove(note)
            return False
        recovered = self._recovered(job, alone=alone, cancelled=disk.exists(note))
        if recovered != job:
            self._places.write(path, dumps(recovered))
        disk.rename_durably(path, self._places.place_of(recovered, path.name))
        disk.remove(note)
        self._places.forget_progress(job.id)
        if recovered.state is State.QUEUED:
            self._places.waiting.add(path.name)
        log.warning("%s: its worker died; %s after %d attempts", job.id, recovered.state, recovered.attempts)
        return job.begun and job.boot == boot_id()

    def _recovered(self, job: Job, *, alone: bool, cancelled: bool) -> Job:
        if job.state.terminal:
            return job
        if cancelled:
            return job.cancelled()
        return job.orphaned(max_attempts=self._max_attempts, alone=alone, boot=boot_id())

    def _count_crash(self) -> None:
        crashes = _Crashes(in_a_row=self._crashes_before() + 1)
        self._places.write(self._places.crashes, crashes.model_dump_json().encode())
        if 0 < self._pause_after_crashes <= crashes.in_a_row and self._places.paused() is None:
            reason = f"crashes in a row while jobs ran: {crashes.in_a_row}"
            self._places.pause(reason)
            log.critical("the queue is paused now: %s", reason)

    def _crashes_before(self) -> int:
        """None where that cannot be read, or only by a newer release: they are counted anew."""
        try:
            crashes = _Crashes.model_validate_json(disk.read_regular(self._places.crashes, MAX_RECORD))
        except (FileNotFoundError, disk.Unusable, ValidationError):
            return 0
        return crashes.in_a_row if crashes.version <= VERSION else 0

    def _honour(self, note: Path) -> None:
        """A note without its record was left while the job moved on: cancel the job where it is now."""
        if note.name.count("-") >= 4:
            self._cancel(id_of(note.name))
        disk.remove(note)

    def _remove_lock_of_nobody(self, path: Path) -> None:
        if disk.exists(self._places.running / path.stem):
            return
        fd = disk.lock(path)
        if fd is not None:
            try:
                disk.remove(path)
            finally:
                disk.unlock(fd)


def boot_id() -> str:
    """Which boot of the machine this is; empty where the system does not tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _new_lock(workers: Path) -> tuple[Path, int]:
    while True:
        path = workers / f"{uuid.uuid4()}.lock"
        fd = disk.lock(path)
        if fd is not None:
            return path, fd
