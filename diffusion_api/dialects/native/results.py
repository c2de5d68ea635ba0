"""What became of jobs: a list of them, and their pictures as files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from diffusion_api.dialects._base import caller_of, error_body
from diffusion_api.dialects.native.bodies import ErrorBody, JobsBody, refusals
from diffusion_api.dialects.native.replies import row, shown_state
from diffusion_api.errors import Conflict, Gone, InvalidRequest, NotFound
from diffusion_api.queues.base import Place, Snapshot
from diffusion_api.schema.caller import Caller
from diffusion_api.schema.job import State
from diffusion_api.schema.request import Reading

if TYPE_CHECKING:
    from diffusion_api.service import Service

UNFINISHED = frozenset({State.QUEUED, State.LOADING, State.PROCESSING})
Listed = Literal["queued", "loading", "processing", "done", "error", "cancelled"]
States = Annotated[
    list[Listed] | None,
    Query(alias="state", max_length=6, description="one or more; cancelled are those of error that somebody ended"),
]
Limit = Annotated[int, Query(ge=1, le=200, description="rows of one answer")]
Cursor = Annotated[str | None, Query(description="next of the answer before, for what follows")]
Number = Annotated[int, Path(ge=0, description="which of several pictures; 0 is the first")]
Condition = Annotated[str | None, Header()]

BINARY = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
FILE: dict[int | str, dict[str, Any]] = {
    200: BINARY | {"description": "The file"},
    206: BINARY | {"description": "The part that Range asked for"},
    304: {"description": "The caller has it already: If-None-Match names its ETag"},
    416: {"model": ErrorBody, "description": "The file has no such part"},
}


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that list jobs and give out pictures."""

    @router.get("/queue", tags=["jobs"], summary="Jobs, newest first", responses=refusals(400, 401, 403, 429, 503))
    def jobs(http: Request, state: States = None, limit: Limit = 50, cursor: Cursor = None) -> JobsBody:
        return _listed(set(map(State, state or State)), limit, cursor, caller_of(http), service)

    @router.get(
        "/queue/{job_id}/image", tags=["jobs"], summary="The picture of a job as a file", response_class=Response,
        responses=refusals(400, 401, 403, 404, 409, 410, 429, 503) | FILE,
    )  # fmt: skip
    def image(
        http: Request, job_id: str, if_none_match: Condition = None, if_range: Condition = None, range: Condition = None
    ) -> Response:
        return _file(service.get(job_id, caller_of(http)), 0, service, known=if_none_match, part=range, unless=if_range)

    @router.get(
        "/queue/{job_id}/image/{n}", tags=["jobs"], summary="One of several pictures of a job as a file",
        response_class=Response, responses=refusals(400, 401, 403, 404, 409, 410, 429, 503) | FILE,
    )  # fmt: skip
    def image_of_several(
        http: Request,
        job_id: str,
        n: Number,
        if_none_match: Condition = None,
        if_range: Condition = None,
        range: Condition = None,
    ) -> Response:
        return _file(service.get(job_id, caller_of(http)), n, service, known=if_none_match, part=range, unless=if_range)

    @router.get(
        "/image/{link}", tags=["jobs"], summary="A picture by its link, without a key", response_class=Response,
        responses=refusals(400, 404, 409, 410, 503) | FILE,
    )  # fmt: skip
    def linked(
        link: str, if_none_match: Condition = None, if_range: Condition = None, range: Condition = None
    ) -> Response:
        snapshot, n = service.linked(link)
        answer = _file(snapshot, n, service, known=if_none_match, part=range, unless=if_range)
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # who has the link may show it anywhere
        return answer


def _listed(states: set[State], limit: int, cursor: str | None, caller: Caller, service: Service) -> JobsBody:
    def wanted(snapshot: Snapshot) -> bool:
        return shown_state(snapshot) in states or (snapshot.state in states & {State.CANCELLED})

    # A job may be shown in another state than the queue has it in: see shown_state.
    looked_at = states | (UNFINISHED if states & UNFINISHED else set())
    looked_at |= {State.CANCELLED} if State.ERROR in states else set()
    before = None if cursor is None else _place(cursor)
    found = service.jobs(wanted, caller, states=frozenset(looked_at), limit=limit + 1, before=before)
    rows = [row(snapshot) for snapshot in found[:limit]]
    return JobsBody(jobs=rows, next=f"{rows[-1].created!r}-{rows[-1].job_id}" if len(found) > limit else None)


def _place(cursor: str) -> Place:
    """The place that a cursor means. Raises InvalidRequest."""
    found = re.fullmatch(r"(\d{1,12}\.\d{1,12})-([A-Za-z0-9_-]{1,64})", cursor, re.ASCII)
    if not found:
        raise InvalidRequest(f"cursor is {cursor[:80]!r}; it must be the next of another answer", field="cursor")
    return Place(float(found[1]), found[2])


def _file(
    snapshot: Snapshot, number: int, service: Service, *, known: str | None, part: str | None, unless: str | None
) -> Response:
    """A picture of a job, or a part of it (RFC 9110, 13 and 14). Raises NotFound, Gone, Conflict."""
    job_id = snapshot.job.id
    if not snapshot.state.terminal:
        raise Conflict(f"job {job_id} has no picture yet: its state is {shown_state(snapshot)}")
    request, images = snapshot.job.request, snapshot.job.result.images if snapshot.job.result else ()
    if not images or isinstance(request, Reading):
        raise NotFound(f"job {job_id} ended without a picture")
    if number >= len(images):
        raise NotFound(f"job {job_id} has no picture {number}; there are {len(images)}, from 0")
    picture = images[number]
    data = service.image(picture)
    if data is None:
        raise Gone(f"the picture of job {job_id} was deleted")
    name, format = picture.path.rpartition("/")[2], request.output.format
    headers = {
        "ETag": f'"{picture.sha256}"',
        "Cache-Control": "private, no-cache",
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{name}"',
    }
    tag = headers["ETag"]
    if known and (known.strip() == "*" or tag in [each.strip().removeprefix("W/") for each in known.split(",")]):
        return Response(status_code=304, headers=headers)
    media_type = f"image/{format}"
    if part is None or (unless and unless.strip() != tag) or not (span := _span(part, len(data))):
        return Response(data, headers=headers, media_type=media_type)
    first, last = span
    if first > last:
        message = f"Range is {part!r}; the file has {len(data)} bytes"
        return JSONResponse(error_body(message), 416, {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Response(data[first : last + 1], 206, headers, media_type)


def _span(part: str, size: int) -> tuple[int, int] | None:
    """The first and the last byte that a Range header asks for, in reverse where the file has no such; None for a header that
    asks for no part, or for several, which may be answered with the whole.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", part.strip(), re.ASCII)
    if not found or found[0].endswith("=-"):
        return None
    if not found[1]:
        return max(size - int(found[2]), 0), size - 1
    first, last = int(found[1]), int(found[2] or size)
    if last < first:
        return None
    return (first, min(last, size - 1)) if first < size else (size, 0)
