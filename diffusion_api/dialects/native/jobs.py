"""Jobs: posted, looked at, cancelled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from diffusion_api.dialects._base import caller_of, hears
from diffusion_api.dialects._jobs import NOBODY, IdempotencyKey, Meant, store
from diffusion_api.dialects.native import pictures, requests
from diffusion_api.dialects.native.bodies import (
    DryRunBody,
    Img2ImgBody,
    JobBody,
    PolledBody,
    Posted,
    PostedUpscale,
    StatusBody,
    SubmittedBody,
    Txt2ImgBody,
    UpscaleBody,
    UpscaleDryRunBody,
    refusals,
)
from diffusion_api.dialects.native.replies import answer_of, dry_run, dry_upscale, polled, read, told
from diffusion_api.dialects.native.requests import given

if TYPE_CHECKING:
    from diffusion_api.service import Service

Dry = TypeVar("Dry", DryRunBody, UpscaleDryRunBody)

NEXT_STEP = 5.0
"""Seconds that a running job gets to end before the caller who cancelled it is answered."""
LINKS = {
    name: {"operationRef": f"#/paths/~1queue~1{{job_id}}/{name}", "parameters": {"job_id": "$response.body#/job_id"}}
    for name in ("get", "delete")
}
"""What can be asked of a job that was stored, for the documentation."""
POSTED: dict[int | str, dict[str, Any]] = refusals(400, 401, 403, 413, 415, 422, 429, 503, 507) | {
    200: {"links": LINKS}
}
PICTURES = {"image", "mask"}
"""Fields of bodies that are pictures, and go into no record."""
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


Pictures = Annotated[
    bool, Query(alias="image", description="false leaves the pictures out, which does not count as reading the result")
]


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that make jobs, and those of a job."""

    @router.post("/txt2img", tags=["jobs"], summary="A picture from words", responses=POSTED)
    def txt2img(
        body: Annotated[Txt2ImgBody, Body()], http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> Posted:
        return answered(body, partial(requests.txt2img, body, service), dry_run, http, answer, idempotency_key)

    @router.post("/img2img", tags=["jobs"], summary="A picture from words and a picture", responses=POSTED)
    async def img2img(
        body: Annotated[Img2ImgBody, Body()], http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> Posted:
        fetched = await pictures.fetched(body, service)
        meaning = partial(pictures.img2img, body, service, fetched)
        return await run_in_threadpool(answered, body, meaning, dry_run, http, answer, idempotency_key)

    @router.post("/inpaint", tags=["jobs"], summary="A picture with a part painted anew", responses=POSTED)
    async def inpaint(
        body: Annotated[Img2ImgBody, Body()], http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> Posted:
        fetched = await pictures.fetched(body, service)
        meaning = partial(pictures.inpaint, body, service, fetched)
        return await run_in_threadpool(answered, body, meaning, dry_run, http, answer, idempotency_key)

    @router.post("/upscale", tags=["jobs"], summary="A larger picture", responses=POSTED)
    async def upscale(
        body: Annotated[UpscaleBody, Body()], http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> PostedUpscale:
        fetched = await pictures.fetched(body, service)
        meaning = partial(pictures.upscale, body, service, fetched)
        return await run_in_threadpool(answered, body, meaning, dry_upscale, http, answer, idempotency_key)

    def answered(
        body: JobBody,
        meaning: Callable[[], Meant[Any]],
        estimated: Callable[[Meant[Any], Service], Dry],
        http: Request,
        answer: Response,
        key: str | None,
    ) -> SubmittedBody | Dry:
        meant = meaning()
        return estimated(meant, service) if body.dry_run else post(body, meant, http, answer, key)

    def post(body: JobBody, meant: Meant[Any], http: Request, answer: Response, key: str | None) -> SubmittedBody:
        payload = body.model_dump(exclude_unset=True)
        shown = {name: value for name, value in payload.items() if name != "webhook"}  # may hold a credential
        shown |= {field: pictures.shown(payload[field]) for field in PICTURES & payload.keys() if payload[field]}
        stored = store(
            meant, http, service, sent=payload, shown=shown, key=key,
            priority=given(body.priority, 0), deadline=body.deadline, webhook=body.webhook,
        )  # fmt: skip
        answer.headers.update(stored.headers)
        job = stored.job
        return SubmittedBody(job_id=job.id, seed=job.request.seeds[0], warnings=list(job.warnings))

    @router.get(
        "/queue/{job_id}", tags=["jobs"], summary="A job as it stands", responses=refusals(400, 401, 403, 404, 410, 429, 503),
        response_model=StatusBody,
    )  # fmt: skip
    async def queue(job_id: str, http: Request, wait: Wait = 0, pictures: Pictures = True) -> Response:
        caller = caller_of(http)
        if wait and not await hears(http, service.wait(job_id, wait, caller)):
            return Response(status_code=NOBODY)
        return await run_in_threadpool(read if pictures else told, job_id, caller, service)

    @router.get(
        "/status/{job_id}", tags=["jobs"], summary="A job as programs of the original poll it",
        responses=refusals(400, 401, 403, 404, 410, 429, 503),
    )  # fmt: skip
    def status(job_id: str, http: Request) -> PolledBody:
        return polled(service.get(job_id, caller_of(http)))

    @router.delete(
        "/queue/{job_id}", tags=["jobs"], summary="Cancel a job", responses=refusals(400, 401, 403, 404, 409, 410, 429, 503),
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
