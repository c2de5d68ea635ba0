"""The newest jobs of a folder, without reading all of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from diffusion_api.queues.base import Place, Snapshot

SLACK = 0.1
"""Seconds by which the clock of the file system may be behind the one that jobs are dated by."""


class Candidate(NamedTuple):
    """A job that may be listed: it is no newer than ``latest``, in epoch seconds; ``look`` reads it."""

    latest: float
    look: Callable[[], Snapshot | None]


def newest(
    candidates: Iterable[Candidate], wanted: Callable[[Snapshot], bool], *, limit: int, before: Place | None
) -> list[Snapshot]:
    """The newest of these jobs that are wanted and older than ``before``; reading ends where none can be among them."""
    found: dict[Place, Snapshot] = {}
    for candidate in sorted(candidates, key=lambda each: each.latest, reverse=True):
        if len(found) == limit and candidate.latest + SLACK < min(found).created:
            break
        snapshot = candidate.look()
        if snapshot and wanted(snapshot) and (before is None or Place.of(snapshot.job) < before):
            found[Place.of(snapshot.job)] = snapshot
            if len(found) > limit:
                del found[min(found)]
    return [found[place] for place in sorted(found, reverse=True)]
