"""What becomes of the records of ended jobs: kept for a time, then tombstones for a longer one.

A tombstone is the record itself, renamed and then emptied, so that a job is never in two places and one of many wins:
``gone/<id>`` for a result that was kept for as long as the operator wants, ``gone/<id>.read`` for one that was dropped
because it was read.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from diffusion_api import disk
from diffusion_api.queues._file.places import READ, Folder, is_id
from diffusion_api.queues.base import TOMBSTONES, gone
from diffusion_api.retention import Limits, due, entries
from diffusion_api.schema.job import State


class Ended:
    """The records of ended jobs, and what is left of them. Methods raise OSError."""

    def __init__(self, places: Folder) -> None:
        self._places = places
        self._folders = [places.ended_path(state, "any").parent for state in State if state.terminal]

    def check(self, job_id: str) -> None:
        """Raise Gone if there was such a job and its time is over."""
        if is_id(job_id) and disk.exists(self._places.gone / job_id):
            raise gone(job_id)

    def forget(self, job_id: str) -> bool:
        """Drop the record of a job that was read, durably; False if another was faster, or there is none."""
        return is_id(job_id) and any(self._drop_read(folder / f"{job_id}.json") for folder in self._folders)

    def sweep(self, results: Limits, *, now: float) -> None:
        """Drop the records beyond the limits, and tombstones whose time is over."""
        records = {
            entry: folder / entry.name
            for folder in self._folders
            for entry in entries(folder, ".json")
            if is_id(entry.name.removesuffix(".json"))
        }
        for entry in due(records, results, now=now, what="results"):
            with self._places.tolerated(entry.name), contextlib.suppress(FileNotFoundError):
                self._expire(records[entry])
        tombstones = entries(self._places.gone)
        for entry in tombstones:
            if entry.size:  # its process died in between
                with self._places.tolerated(entry.name):
                    disk.empty(self._places.gone / entry.name)
        for entry in due(tombstones, TOMBSTONES, now=now, what="tombstones"):
            with self._places.tolerated(entry.name):
                disk.remove(self._places.gone / entry.name)

    def _drop_read(self, record: Path) -> bool:
        tombstone = self._places.gone / f"{record.stem}{READ}"
        try:
            disk.rename_durably(record, tombstone)
        except FileNotFoundError:
            return False
        disk.empty(tombstone)
        return True

    def _expire(self, record: Path) -> None:
        """Not durably: what a power cut brings back is found by the next look."""
        tombstone = self._places.gone / record.stem
        disk.rename(record, tombstone)
        disk.empty(tombstone)
