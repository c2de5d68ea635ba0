"""What every dialect needs: a route class that speaks its errors, its places, holes filled, seeds drawn, sizes rounded."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from diffusion_api import errors, wire
from diffusion_api.schema.caller import Caller
from diffusion_api.schema.request import MAX_SEED

log = logging.getLogger(__name__)

Built = TypeVar("Built", bound=BaseModel)

MAX_SIDE = 65_536
"""Pixels. No codec writes longer sides; the operator's own limit is on the area."""

SECTIONS = ("body", "path", "query", "header")

STATUS: tuple[tuple[type[errors.DiffusionApiError], int], ...] = (
    (errors.NotFound, 404),
    (errors.Gone, 410),
    (errors.Conflict, 409),
    (errors.TooLarge, 413),
    (errors.KeyReused, 422),
    (errors.Unauthenticated, 401),
    (errors.Forbidden, 403),
    (errors.RateLimited, 429),
    (errors.OutOfMemory, 422),
    (errors.CallerError, 400),
    (errors.DiskFull, 507),
    (errors.Unavailable, 503),
    (errors.QueueUnusable, 503),
    (errors.NotInstalled, 503),
    (errors.KeysUnreadable, 503),
    (errors.NoAdminKey, 501),
    (errors.NoChecker, 503),
    (errors.DiffusionApiError, 500),
)
"""HTTP status of each error; the first row that fits."""


def shows(example: Any) -> dict[int | str, dict[str, Any]]:
    """What the documentation shows of the answer of a route, where no model of its own has an example."""
    return {200: {"content": {"application/json": {"example": example}}}}


def status_of(error: errors.DiffusionApiError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def error_body(message: str) -> dict[str, str]:
    """The body of every refusal: ``detail`` and ``error`` say the same, as the two READMEs name it differently."""
    return {"status": "error", "detail": message, "error": message}


def detail(message: str) -> dict[str, str]:
    """The body of a refusal as FastAPI has it."""
    return {"detail": message}


def refusal(error: errors.DiffusionApiError, body: Callable[[str], Any] = error_body) -> JSONResponse:
    """The answer to a request that ended in this error; ``body`` makes a dialect's own of its message."""
    status = status_of(error)
    headers = {"Retry-After": "10"} if status in (503, 507) else {}
    if isinstance(error, errors.RateLimited):
        headers = {"Retry-After": str(error.retry_after)}
    if isinstance(error, errors.Unauthenticated):
        headers = {"WWW-Authenticate": error.scheme}
    if isinstance(error, errors.Unfinished):
        headers["X-Job-Id"] = error.job_id
    return JSONResponse(body(str(error)), status, headers)


def explain(error: dict[str, Any], body: Any = None) -> str:
    """One pydantic error in a sentence with the field, the value and what was expected. ``body`` is what was sent."""
    where = ".".join(str(part) for part in _as_written(error, body))
    if isinstance(error.get("input"), bytes):
        return "the body is no JSON: it must be sent with Content-Type: application/json"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where or 'the body'} is missing"
    return f"{where or 'the body'} is {_shown(error.get('input'))}: {message}"


def _shown(value: Any) -> str:
    """A value as its sender knows it: null and true, not None and True. Cut when it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_written(error: dict[str, Any], body: Any) -> list[str | int]:
    """The way to a field in the caller's words: pydantic puts the names of our types between them."""
    section, *path = error["loc"] if error["loc"] and error["loc"][0] in SECTIONS else ("", *error["loc"])
    if section != "body":
        return path[:1]  # which of several with the same name is of no use to anybody
    written: list[str | int] = []
    for part in path:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and part in range(len(body))):
            written.append(part)
            body = body[part]
    return [*written, path[-1]] if error["type"] == "missing" and path else written


class BoundedRequest(Request):
    """A request whose JSON is measured before it is parsed."""

    async def json(self) -> Any:
        """The body's value. Raises HTTPException, the one error that FastAPI lets pass here."""
        try:
            return wire.loads(await self.body())
        except errors.DiffusionApiError as error:
            raise HTTPException(status_of(error), str(error)) from error


class ErrorRoute(APIRoute):
    """A route whose refusals have the body of :func:`error_body`; a dialect with another one overrides :meth:`told`."""

    @classmethod
    def told(cls, message: str) -> Any:
        """The body of a refusal."""
        return error_body(message)

    @classmethod
    def misread(cls, error: RequestValidationError) -> Response:
        """The answer to a request that has not the form that the route declares: each of the first errors in a sentence."""
        unread = any(isinstance(e.get("input"), bytes) for e in error.errors())
        message = "; ".join(cls.explained(e, error.body) for e in error.errors()[:5])
        return JSONResponse(cls.told(message), 415 if unread else 400)

    @classmethod
    def explained(cls, error: dict[str, Any], body: Any) -> str:
        """One of pydantic's errors in a sentence."""
        return explain(error, body)

    def refused(self, error: errors.DiffusionApiError) -> Response:
        """The answer to a request that ended in this error."""
        return refusal(error, self.told)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with the project's errors turned into answers."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(BoundedRequest(request.scope, request.receive))
            except RequestValidationError as error:
                return self.misread(error)
            except HTTPException as error:
                return JSONResponse(self.told(error.detail), error.status_code, error.headers)
            except errors.DiffusionApiError as error:
                return self.refused(error)

        return answer


def offer(app: FastAPI, name: str, router: APIRouter, own: APIRouter | None = None) -> None:
    """Add a dialect's routes at the root, among those of all, and under ``/compat/<name>``, where it is alone.

    ``own`` are routes of the latter place only: they stand there for those of the same path at the root, where the answer
    has to serve the clients of several dialects.
    """
    app.include_router(router)
    for alone in filter(None, (own, router)):
        app.include_router(alone, prefix=f"/compat/{name}", include_in_schema=False)


def caller_of(connection: HTTPConnection) -> Caller:
    """Who asks; the door has found that out."""
    caller: Caller = connection.state.caller
    return caller


async def hears(request: Request, waiting: Coroutine[Any, Any, None]) -> bool:
    """Wait for something on behalf of a caller: False once the caller has hung up, and the waiting ends with that."""
    tasks = asyncio.ensure_future(waiting), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done() and tasks[0].result() is None  # what it raised is raised here
    finally:
        for task in tasks:
            task.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build(kind: type[Built], **fields: Any) -> Built:
    """A frozen request from a dialect's values. Raises InvalidRequest in place of pydantic's error."""
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        raise errors.InvalidRequest(explain(dict(first)), field=field) from error


def resolve_seed(seed: int | None, name: str = "seed") -> int:
    """The seed of a job: drawn when none or a negative one was given. Raises InvalidRequest above 2**32 - 1."""
    if seed is None or seed < 0:
        return random.randint(0, MAX_SEED)  # noqa: S311 - a seed is no secret
    if seed > MAX_SEED:
        raise errors.InvalidRequest(f"{name} is {seed}; it may be 0 to {MAX_SEED}, or -1 for a random one", field=name)
    return seed


def round_size(value: int, name: str, multiple: int = 8) -> tuple[int, str | None]:
    """A side rounded half up to a multiple of what the model can make, and what to tell the caller. Raises InvalidRequest."""
    if not multiple <= value <= MAX_SIDE:
        raise errors.InvalidRequest(f"{name} is {value}; it may be {multiple} to {MAX_SIDE}", field=name)
    rounded = (value + multiple // 2) // multiple * multiple
    return rounded, None if rounded == value else f"{name} {value} was rounded to {rounded}, a multiple of {multiple}"
