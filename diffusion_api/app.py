"""The ASGI app: mounts the dialects and the middleware. Decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from fastapi import FastAPI
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match

from diffusion_api import __version__, door
from diffusion_api.dialects import backend, config, native, tasks, unidiffuser
from diffusion_api.dialects._base import error_body
from diffusion_api.documentation import completed
from diffusion_api.metrics import METHODS, Metrics

if TYPE_CHECKING:
    from diffusion_api.access import Access
    from diffusion_api.service import Service
    from diffusion_api.settings import Settings

App: TypeAlias = FastAPI
"""What :func:`create_app` makes: an ASGI app."""

DESCRIPTION = "Post a job, poll its state, get the picture. A queue that loses nothing in front of one GPU."


def create_app(
    service: Service,
    settings: Settings,
    access: Access,
    *,
    startup: Callable[[], None] = lambda: None,
    shutdown: Callable[[], None] = lambda: None,
) -> App:
    """The app around a service. ``startup`` and ``shutdown`` run with the app's life; both may block for a while."""
    metrics = Metrics(service.counts, service.workers)
    app = FastAPIOffline(
        title="Diffusion API",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(startup, shutdown),
        middleware=door.middleware(settings, metrics, access),
    )
    native.mount(app, service)
    backend.mount(app, service, metrics.render)
    config.mount(app, service)
    tasks.mount(app, service, access)
    unidiffuser.mount(app, service)

    @app.get("/", include_in_schema=False)
    def root(request: Request) -> RedirectResponse:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"no such route: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }.get(error.status_code, error.detail)
        headers = {"Allow": allowed_methods(app, request)} if error.status_code == 405 else error.headers
        return JSONResponse(error_body(message), error.status_code, headers)

    plain = app.openapi
    app.openapi = lambda: completed(plain())  # type: ignore[method-assign] # FastAPI's way to extend it
    return app


def allowed_methods(app: App, request: Request) -> str:
    """The methods of all routes with this path; FastAPI tells those of the first one."""
    possible = ({**request.scope, "method": method} for method in METHODS)
    found = (scope["method"] for scope in possible if any(r.matches(scope)[0] is Match.FULL for r in app.routes))
    return ", ".join(found)


def _lifespan(
    startup: Callable[[], None], shutdown: Callable[[], None]
) -> Callable[[App], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        startup()
        yield
        shutdown()

    return lifespan
