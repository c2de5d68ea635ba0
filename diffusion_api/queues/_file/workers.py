"""Who serves a file queue, and what becomes of the jobs of those that died.

A worker lives exactly as long as it holds ``workers/<uuid>.lock``, taken before ``running/<uuid>/`` is made. Whoever
gets that lock in its place owns the folder and its records.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from diffusion_api import disk
from diffusion_api.queues._file import reports
from diffusion_api.queues._file.places import Folder, entries, id_of, note_of, read_claimed
from diffusion_api.schema.job import Job, State, UnreadableRecord, dumps
from diffusion_api.schema.report import WorkerReport

log = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Worker:
    """What one ``serve`` owns: a locked file that says it lives, and the folder of its claims. Raises OSError."""

    def __init__(self, places: Folder) -> None:
        self.guard = threading.RLock()
        self.present = True
        self._places = places
        self._lock_path, self._fd = _new_lock(places.workers)
        self.folder = places.running / self._lock_path.stem
        self.folder.mkdir(mode=0o700)
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
                reports.path_of(self._lock_path).unlink(missing_ok=True)
                self.folder.rmdir()
                self._lock_path.unlink()
            os.close(self._fd)


class Recovery:
    """Takes over from workers that died, and clears away what belongs to nobody.

    ``cancel`` cancels the job with that id, wherever it is. Raises OSError.
    """

    def __init__(self, places: Folder, *, max_attempts: int, cancel: Callable[[str], object]) -> None:
        self._places = places
        self._max_attempts = max_attempts
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
        if folder.is_symlink() or not folder.is_dir():
            self._places.set_aside(folder, UnreadableRecord("not the folder of a worker"))
            return
        lock_path = self._places.workers / f"{folder.name}.lock"
        fd = disk.lock(lock_path)
        if fd is None:
            return
        try:
            self._empty(folder)
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()
            lock_path.unlink()
        finally:
            os.close(fd)

    def _empty(self, folder: Path) -> None:
        for path in entries(folder):
            if path.suffix != ".cancel":
                with self._places.tolerated(path.name):
                    self._recover(path)
        for note in entries(folder):
            if note.suffix == ".cancel" and not os.path.lexists(note.with_suffix(".json")):
                self._honour(note)

    def _recover(self, path: Path) -> None:
        try:
            job = read_claimed(path)
        except (disk.Unusable, UnreadableRecord) as error:
            self._places.set_aside(path, error)
            return
        note = note_of(path)
        recovered = self._recovered(job, cancelled=os.path.lexists(note))
        if recovered != job:
            self._places.write(path, dumps(recovered))
        disk.rename_durably(path, self._places.place_of(recovered, path.name))
        note.unlink(missing_ok=True)
        self._places.forget_progress(job.id)
        if recovered.state is State.QUEUED:
            self._places.waiting.add(path.name)
        log.warning("%s: its worker died; %s after %d attempts", job.id, recovered.state, recovered.attempts)

    def _recovered(self, job: Job, *, cancelled: bool) -> Job:
        if job.state.terminal:
            return job
        if cancelled:
            return job.cancelled()
        return job.orphaned(max_attempts=self._max_attempts, boot=boot_id())

    def _honour(self, note: Path) -> None:
        """A note without its record was left while the job moved on: cancel the job where it is now."""
        if note.name.count("-") >= 4:
            self._cancel(id_of(note.name))
        note.unlink(missing_ok=True)

    def _remove_lock_of_nobody(self, path: Path) -> None:
        if os.path.lexists(self._places.running / path.stem):
            return
        fd = disk.lock(path)
        if fd is not None:
            try:
                path.unlink()
            finally:
                os.close(fd)


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
