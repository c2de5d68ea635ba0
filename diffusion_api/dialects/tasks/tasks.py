"""Tasks: posted, looked at, cancelled; and the routes that answer with their end."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from diffusion_api.dialects._base import caller_of, shows
from diffusion_api.dialects._forms import refusals
from diffusion_api.dialects._jobs import IdempotencyKey, Stored, store, view
from diffusion_api.dialects.tasks.bodies import (
    AnyEvent,
    AnyParams,
    Img2ImgQuery,
    InpaintQuery,
    ResultBody,
    TaskBody,
    Txt2ImgQuery,
)
from diffusion_api.dialects.tasks.events import Listeners
from diffusion_api.dialects.tasks.meaning import base_url, meaning
from diffusion_api.dialects.tasks.replies import DIALECT, aborted, event, result, stage
from diffusion_api.errors import Conflict, Gone, NotFound
from diffusion_api.schema.caller import Caller

if TYPE_CHECKING:
    from diffusion_api.queues.base import Snapshot
    from diffusion_api.service import Service

NO_TASK = "Task not found"
MADE: dict[int | str, dict[str, Any]] = refusals(401, 413, 422, 429, 503, 507)
TASK: dict[int | str, dict[str, Any]] = refusals(401, 404, 422, 429, 503)


def add(router: APIRouter, service: Service, listeners: Listeners) -> None:
    """Add the routes of tasks."""

    async def begin(params: AnyParams, http: Request, key: str | None, *, strict: bool = False) -> Stored:
        meant, flaw = await meaning(params, http, service)
        if flaw and strict:
            raise flaw
        sent = params.model_dump(exclude_unset=True)
        used = params.model_dump() | {"model": params.model or meant.request.model, "seed": meant.request.seed}
        stored = await run_in_threadpool(
            store, meant, http, service, sent=sent, shown=used, key=key, flaw=flaw,
            dialect=DIALECT, session=caller_of(http).session,
        )  # fmt: skip
        if not stored.replayed:
            listeners.tell(stored.job)
        return stored

    async def shown(params: AnyParams, http: Request, key: str | None) -> Response:
        base = base_url(http, service)

        def answer(snapshot: Snapshot) -> Response:
            reason = aborted(snapshot.job)
            return (
                JSONResponse({"detail": reason}, 500) if reason else JSONResponse(result(snapshot.job, service, base))
            )

        return await view(await begin(params, http, key, strict=True), http, service, answer, cancel=True)

    def found(task_id: str, caller: Caller) -> Snapshot:
        try:
            snapshot = service.get(task_id, caller)
        except (NotFound, Gone) as error:
            raise NotFound(NO_TASK) from error
        if snapshot.job.dialect != DIALECT:
            raise NotFound(NO_TASK)
        return snapshot

    @router.post(
        "/task",
        tags=["tasks"],
        summary="Begin a task",
        responses=MADE | refusals(415) | shows("0d5a9e7c-3f1b-4d56-8a52-6f3f2f6f2b11"),
    )
    async def post_task(
        params: TaskBody, http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> str:
        stored = await begin(params, http, idempotency_key)
        answer.headers.update(stored.headers)
        return stored.job.id

    @router.get(
        "/task/{task_id}", tags=["tasks"], summary="The latest event of a task", responses=TASK, response_model=AnyEvent
    )
    def get_task(task_id: str, http: Request) -> Response:
        snapshot = found(task_id, caller_of(http))
        told = event(snapshot, stage(snapshot), service, base_url(http, service))
        return JSONResponse(told, headers={"Cache-Control": "no-cache, no-store"})

    @router.delete("/task/{task_id}", tags=["tasks"], summary="Cancel a task", status_code=204, responses=TASK)
    def delete_task(task_id: str, http: Request) -> None:
        caller = caller_of(http)
        found(task_id, caller)
        with suppress(Conflict):  # it has ended, and stays as it is
            service.cancel(task_id, caller)

    @router.get(
        "/txt2img", tags=["tasks"], summary="A picture from words, at once", responses=MADE, response_model=ResultBody
    )
    async def get_txt2img(
        params: Annotated[Txt2ImgQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        return await shown(params, http, idempotency_key)

    @router.get(
        "/img2img", tags=["tasks"], summary="A picture from words and a picture, at once", responses=MADE,
        response_model=ResultBody,
    )  # fmt: skip
    async def get_img2img(
        params: Annotated[Img2ImgQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        return await shown(params, http, idempotency_key)

    @router.get(
        "/inpaint", tags=["tasks"], summary="A picture with a part painted anew, at once", responses=MADE,
        response_model=ResultBody,
    )  # fmt: skip
    async def get_inpaint(
        params: Annotated[InpaintQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        return await shown(params, http, idempotency_key)
