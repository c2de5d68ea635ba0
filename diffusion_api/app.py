"""The ASGI app: mounts the dialects and the middleware. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from diffusion_api import __version__
from diffusion_api.dialects import native
from diffusion_api.dialects._base import error_body
from diffusion_api.service import Service
from diffusion_api.settings import Settings

DESCRIPTION = "Post a job, poll its state, get the picture. A queue that loses nothing in front of one GPU."


def create_app(
    service: Service,
    settings: Settings,
    *,
    startup: Callable[[], None] = lambda: None,
    shutdown: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The app around a service. ``startup`` and ``shutdown`` run with the app's life; both may block for a while."""
    app = FastAPI(
        title="Diffusion API",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(startup, shutdown),
        max_body_size=settings.max_body,
    )
    native.mount(app, service)

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"no such route: {request.method} {request.url.path}",
            413: f"the request body is larger than the {settings.max_body} bytes that are allowed",
        }.get(error.status_code, error.detail)
        return JSONResponse(error_body(message), error.status_code, error.headers)

    return app


def _lifespan(
    startup: Callable[[], None], shutdown: Callable[[], None]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        startup()
        yield
        shutdown()

    return lifespan

