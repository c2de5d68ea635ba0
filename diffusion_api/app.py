"""The ASGI app: mounts the dialects and the middleware. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from fastapi import FastAPI
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_api import __version__
from diffusion_api.dialects import native
from diffusion_api.dialects._base import error_body

if TYPE_CHECKING:
    from diffusion_api.service import Service
    from diffusion_api.settings import Settings

App: TypeAlias = FastAPI
"""What :func:`create_app` makes: an ASGI app."""

DESCRIPTION = "Post a job, poll its state, get the picture. A queue that loses nothing in front of one GPU."


def create_app(
    service: Service,
    settings: Settings,
    *,
    startup: Callable[[], None] = lambda: None,
    shutdown: Callable[[], None] = lambda: None,
) -> App:
    """The app around a service. ``startup`` and ``shutdown`` run with the app's life; both may block for a while."""
    app = FastAPIOffline(
        title="Diffusion API",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(startup, shutdown),
    )
    app.add_middleware(BodyLimit, limit=settings.max_body)
    native.mount(app, service)

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"no such route: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }.get(error.status_code, error.detail)
        return JSONResponse(error_body(message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("the service failed; its log has the details"), 500)

    return app


class BodyLimit:
    """Refuses request bodies of more than ``limit`` bytes, whether they tell their length or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit
        self._message = f"the request body is larger than the {limit} bytes that are allowed"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._limit:
            await JSONResponse(error_body(self._message), 413)(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)


def _lifespan(
    startup: Callable[[], None], shutdown: Callable[[], None]
) -> Callable[[App], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        startup()
        yield
        shutdown()

    return lifespan
