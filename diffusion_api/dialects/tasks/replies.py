"""Records of jobs to events, with no field beside those that the original has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusion_api.queues.base import Snapshot
from diffusion_api.schema.job import Job, State

if TYPE_CHECKING:
    from diffusion_api.service import Service

DIALECT = "tasks"
PENDING, STARTED, ENDED = range(3)
"""How far a task is. Each is told once, in this order."""


def stage(snapshot: Snapshot) -> int:
    """How far a task is."""
    if snapshot.state.terminal:
        return ENDED
    return PENDING if snapshot.state is State.QUEUED else STARTED


def events(snapshot: Snapshot, told: int, service: Service, base: str) -> Iterator[dict[str, Any]]:
    """The events that lead from the stage ``told`` to the present one; -1 where nothing was told."""
    for reached in range(told + 1, stage(snapshot) + 1):
        yield event(snapshot, reached, service, base)


def event(snapshot: Snapshot, reached: int, service: Service, base: str) -> dict[str, Any]:
    """The event of one stage. Raises Misconfigured."""
    job = snapshot.job
    if reached != ENDED:
        return {"event_type": "pending" if reached == PENDING else "started", "task_id": job.id}
    if reason := aborted(job):
        return {"event_type": "aborted", "task_id": job.id, "reason": reason}
    return {"event_type": "finished", "task_id": job.id, "result": result(job, service, base)}


def result(job: Job, service: Service, base: str) -> dict[str, Any]:
    """What a task made that is done. Raises Misconfigured."""
    return {"blob_url": base + service.blob_of(job), "parameters_used": parameters_used(job)}


def aborted(job: Job) -> str | None:
    """Why a task that has ended made nothing; None if it did."""
    if job.state is State.CANCELLED:
        return "Task cancelled by user"
    return f"Internal error: {job.error.message}" if job.error else None


def parameters_used(job: Job) -> dict[str, Any]:
    """What was sent, with what was drawn or chosen for the holes, and whether the picture was really checked."""
    return job.payload | {"safety_filter": job.result is not None and job.result.safety.on}
