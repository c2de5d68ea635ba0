"""What happens to a job, as server-sent events (HTML Living Standard, 9.2)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from diffusion_api.dialects._base import caller_of
from diffusion_api.dialects.native.bodies import refusals
from diffusion_api.dialects.native.examples import RUNNING
from diffusion_api.dialects.native.replies import answer_of

if TYPE_CHECKING:
    from diffusion_api.service import Service

PING = 15.0
"""Seconds without an event after which there is a comment, so that nobody on the way takes the connection for dead."""

PINGED = ": ping\n\n"
END = "end"
"""Id of the last event of a job."""

LastEvent = Annotated[str | None, Header(alias="Last-Event-ID", description="end is answered with 204")]
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events state, progress and preview until the job has ended",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "each event; its data is JSON",
                    "properties": {
                        "event": {"type": "string", "enum": ["state", "progress", "preview"]},
                        "data": {"type": "string"},
                        "id": {"type": "string"},
                    },
                    "required": ["event", "data"],
                },
                "example": {"event": "state", "data": json.dumps(RUNNING)},
            }
        },
    },
    204: {"description": "The caller has seen the end: a browser asks no more"},
}


def add(router: APIRouter, service: Service) -> None:
    """Add the route that tells of a job as it runs."""

    @router.get(
        "/queue/{job_id}/events", tags=["jobs"], summary="A job as it runs, as server-sent events",
        response_class=Response, responses=refusals(400, 401, 403, 404, 410, 429, 503) | EVENTS,
    )  # fmt: skip
    async def events(job_id: str, http: Request, last_event_id: LastEvent = None) -> Response:
        snapshot = await run_in_threadpool(service.get, job_id, caller_of(http))
        if last_event_id == END and snapshot.state.terminal:
            return Response(status_code=204)
        return StreamingResponse(
            _stream(job_id, service), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )


async def _stream(job_id: str, service: Service) -> AsyncGenerator[str]:
    """The events of a job as text; ends with it, or when the caller has hung up."""
    last: dict[str, Any] = {}
    async with aclosing(service.changes(job_id, PING)) as changes:
        async for snapshot in changes:
            if snapshot is None:
                yield PINGED
                continue
            status = await run_in_threadpool(answer_of, snapshot, service, pictures=False)
            for event in _events(last, status, over=snapshot.state.terminal):
                yield event
            last = status


def _events(last: dict[str, Any], status: dict[str, Any], *, over: bool) -> Iterator[str]:
    """The events that lead from one status to the next."""
    job_id, preview, before = status["job_id"], status.get("preview"), last.get("preview")
    told = {name: value for name, value in status.items() if name != "preview"}
    if over or status["state"] != last.get("state"):
        yield _event("state", told, id=END if over else None)
    elif _moved(told) != _moved(last):
        yield _event("progress", told)
    if preview and preview != before:
        yield _event("preview", {"job_id": job_id, "preview": preview})


def _moved(status: dict[str, Any]) -> dict[str, Any]:
    """All but what also changes when nothing happens."""
    return {name: value for name, value in status.items() if name not in ("preview", "eta_seconds")}


def _event(name: str, data: dict[str, Any], *, id: str | None = None) -> str:
    known = f"id: {id}\n" if id else ""
    return f"{known}event: {name}\ndata: {json.dumps(data)}\n\n"
