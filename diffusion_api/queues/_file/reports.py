"""What the workers of a folder say of themselves, in ``workers/<uuid>.json`` beside their locks.

For others to see, never to decide by: written whole, not durably, and gone when the worker leaves or is taken over.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from diffusion_api import disk
from diffusion_api.queues._file.places import MAX_RECORD, Folder, entries
from diffusion_api.schema.report import VERSION, WorkerReport


def write(places: Folder, lock: Path, report: WorkerReport) -> None:
    """Put the report of the worker that holds this lock. Raises OSError."""
    disk.write_whole(path_of(lock), report.model_dump_json().encode(), tmp=places.tmp, durable=False)


def path_of(lock: Path) -> Path:
    """Where the report of the worker with this lock lies."""
    return lock.with_suffix(".json")


def of_the_living(places: Folder) -> list[WorkerReport]:
    """The reports of those workers whose lock is held, in no order that means anything. Raises OSError."""
    locks = [path for path in entries(places.workers) if path.suffix == ".lock" and disk.is_locked(path)]
    return [report for lock in locks if (report := _read(path_of(lock)))]


def _read(path: Path) -> WorkerReport | None:
    """None for a worker that said nothing yet, or says it in words of a newer release."""
    try:
        report = WorkerReport.model_validate_json(disk.read_regular(path, MAX_RECORD))
    except (FileNotFoundError, disk.Unusable, ValidationError):
        return None
    return report if report.version <= VERSION else None
