"""Jobs: posted, looked at, cancelled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import AfterValidator

from diffusion_api.dialects._base import build, caller_of, hears
from diffusion_api.dialects.native.bodies import DryRunBody, StatusBody, SubmittedBody, Txt2ImgBody, refusals
from diffusion_api.dialects.native.replies import answer_of, dry_run, read
from diffusion_api.dialects.native.requests import given, to_request
from diffusion_api.queues.base import Key
from diffusion_api.schema.job import Job

if TYPE_CHECKING:
    from diffusion_api.service import Service

NEXT_STEP = 5.0
"""Seconds that a running job gets to end before the caller who cancelled it is answered."""
NOBODY = 499
"""Status of an answer that nobody will read, as the caller has hung up."""
LINKS = {
    name: {"operationRef": f"#/paths/~1queue~1{{job_id}}/{name}", "parameters": {"job_id": "$response.body#/job_id"}}
    for name in ("get", "delete")
}
"""What can be asked of a job that was stored, for the documentation."""
Wait = Annotated[
    float,
    Query(
        ge=0,
        le=60,
        allow_inf_nan=False,
        description="answer when the job has ended, or after so many seconds as it then stands",
    ),
]
Partial = Annotated[bool, Query(description="have a running job end with the picture that it has so far")]


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


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that make jobs, and those of a job."""

    @router.post(
        "/txt2img", tags=["jobs"], summary="A picture from words",
        responses=refusals(400, 413, 422, 503, 507) | {200: {"links": LINKS}},
    )  # fmt: skip
    def txt2img(
        body: Annotated[Txt2ImgBody, Body()], http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> SubmittedBody | DryRunBody:
        request, warnings = to_request(body, service)
        if body.dry_run:
            return dry_run(request, warnings, service)
        payload = body.model_dump(exclude_unset=True)
        key = None if idempotency_key is None else Key.of(idempotency_key, payload)
        payload.pop("webhook", None)  # its query may hold a credential
        job = build(
            Job,
            request=request,
            payload=payload,
            warnings=tuple(warnings),
            caller=caller_of(http).id,
            priority=given(body.priority, 0),
            deadline=body.deadline,
            webhook=body.webhook,
        )
        stored = service.submit(job, key=key)
        if stored.id != job.id:
            answer.headers["Idempotency-Replayed"] = "true"
        return SubmittedBody(job_id=stored.id, seed=stored.request.seeds[0], warnings=list(stored.warnings))

    @router.get(
        "/queue/{job_id}", tags=["jobs"], summary="A job as it stands", responses=refusals(400, 404, 410, 503),
        response_model=StatusBody,
    )  # fmt: skip
    async def queue(job_id: str, http: Request, wait: Wait = 0) -> Response:
        caller = caller_of(http)
        if wait and not await hears(http, service.wait(job_id, wait, caller)):
            return Response(status_code=NOBODY)
        return await run_in_threadpool(read, job_id, caller, service)

    @router.delete(
        "/queue/{job_id}", tags=["jobs"], summary="Cancel a job", responses=refusals(400, 404, 409, 410, 503),
        response_model=StatusBody,
    )  # fmt: skip
    async def cancel(job_id: str, http: Request, partial: Partial = False) -> Response:
        caller = caller_of(http)
        await run_in_threadpool(service.cancel, job_id, caller, partial=partial)
        if not await hears(http, service.wait(job_id, NEXT_STEP, caller)):
            return Response(status_code=NOBODY)
        # Asked once more: it may have ended in another way before it was heard.
        cancelled = await run_in_threadpool(service.cancel, job_id, caller, partial=partial)
        return await run_in_threadpool(lambda: JSONResponse(answer_of(cancelled, service) | {"cancelled": True}))
