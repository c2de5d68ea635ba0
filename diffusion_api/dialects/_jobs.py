"""What dialects make jobs with: a body's meaning stored as a job, and a job waited for where a route answers with its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from fastapi import Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import AfterValidator

from diffusion_api import errors
from diffusion_api.dialects._base import build, caller_of, hears
from diffusion_api.errors import Conflict, DiffusionApiError, Unfinished
from diffusion_api.queues.base import Key, Snapshot
from diffusion_api.schema import request
from diffusion_api.schema.job import Job, Result, State

if TYPE_CHECKING:
    from diffusion_api.service import Picture, Service

Asked = TypeVar("Asked", bound=request.Request, covariant=True)

FOREVER = 7 * 24 * 3600.0
"""Seconds for which a route waits for its job: the job's own deadline and the caller's patience are shorter."""
NOBODY = 499
"""Status of an answer that nobody will read, as the caller has hung up."""


def _visible(key: str) -> str:
    if not re.fullmatch(r"[!-~]{1,255}", key):
        raise ValueError("1 to 255 visible ASCII characters without spaces are allowed")
    return key


IdempotencyKey = Annotated[
    Annotated[str, AfterValidator(_visible)] | None,
    Header(
        alias="Idempotency-Key",
        description="sent again by the same caller within a day, with the same body, it makes no second job",
    ),
]


@dataclass(frozen=True)
class Meant(Generic[Asked]):
    """What a body means: the frozen request, what the caller should know of it, and the pictures that it brings along."""

    request: Asked
    warnings: list[str]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A job as it is stored, and whether an earlier request with the same key had stored it."""

    job: Job
    replayed: bool

    @property
    def headers(self) -> dict[str, str]:
        """What every answer says of it."""
        return {"X-Job-Id": self.job.id} | ({"Idempotency-Replayed": "true"} if self.replayed else {})


def store(
    meant: Meant[Any],
    http: Request,
    service: Service,
    *,
    sent: dict[str, Any],
    shown: dict[str, Any] | None = None,
    key: str | None = None,
    flaw: DiffusionApiError | None = None,
    **fields: Any,
) -> Stored:
    """Store the job that a body means; blocks on the disk. ``sent`` is the body as it came, which the ``key`` stands for, and
    ``shown`` what the record keeps of it, where that is not all. A job with a ``flaw`` has ended with that already, for those
    who look at it later. ``fields`` are further ones of :class:`Job`.

    Raises what :meth:`Service.submit` raises.
    """
    job = build(
        Job,
        request=meant.request,
        payload=sent if shown is None else shown,
        warnings=tuple(meant.warnings),
        caller=caller_of(http).id,
        **fields,
    )
    if flaw:
        job = job.failed(type(flaw).__name__, str(flaw))
    kept = service.submit(job, key=None if key is None else Key.of(key, sent), pictures=meant.pictures)
    return Stored(kept, kept.id != job.id)


async def ended(job_id: str, http: Request, service: Service, *, cancel: bool) -> Snapshot | None:
    """The job once it has ended; None once the caller has hung up, and the job is then cancelled if ``cancel``.

    Raises Unfinished when the service stops before the job has ended, NotFound and Gone.
    """
    caller = caller_of(http)
    if not await hears(http, service.wait(job_id, FOREVER, caller)):
        if cancel:
            await run_in_threadpool(_cancel, job_id, http, service)
        return None
    snapshot = await run_in_threadpool(service.get, job_id, caller)
    if not snapshot.state.terminal:
        raise Unfinished(job_id)
    return snapshot


def _cancel(job_id: str, http: Request, service: Service) -> None:
    with suppress(Conflict):  # it has ended meanwhile
        service.cancel(job_id, caller_of(http))


async def view(
    stored: Stored,
    http: Request,
    service: Service,
    answer: Callable[[Snapshot], Response],
    *,
    cancel: bool = False,
) -> Response:
    """The answer of a synchronous route: made of the job once it has ended, with its id in ``X-Job-Id``.

    ``Prefer: respond-async`` (RFC 7240) is answered at once with 202 and where to ask for the job. ``answer`` may block.
    A caller who hangs up leaves the job running, unless ``cancel``.
    """
    if prefers_async(http):
        body = {"job_id": stored.job.id, "status": "queued", "seed": stored.job.request.seeds[0]}
        place = f"{http.scope.get('root_path', '')}/queue/{stored.job.id}"
        headers = {"Location": place, "Preference-Applied": "respond-async"}
        return JSONResponse(body, 202, headers=stored.headers | headers)
    snapshot = await ended(stored.job.id, http, service, cancel=cancel)
    if snapshot is None:
        return Response(status_code=NOBODY)
    made = await run_in_threadpool(answer, snapshot)
    made.headers.update(stored.headers)
    return made


def result_of(snapshot: Snapshot) -> Result:
    """What a job has made that has ended. Raises the error that it ended with; Conflict when it was cancelled."""
    job = snapshot.job
    if job.state is State.DONE and job.result:
        return job.result
    if job.state is State.CANCELLED:
        raise Conflict(f"job {job.id} was cancelled")
    kind = getattr(errors, job.error.kind, None) if job.error else None
    raise (kind or errors.DiffusionApiError)(job.error.message if job.error else f"job {job.id} has no result")


def prefers_async(http: Request) -> bool:
    """Whether the caller would rather be told where the job is than wait for it."""
    wishes = ",".join(http.headers.getlist("prefer")).lower()
    return "respond-async" in (wish.split(";")[0].strip() for wish in wishes.split(","))
