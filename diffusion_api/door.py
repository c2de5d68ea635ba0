"""What every request passes before a dialect sees it, and every answer on its way out."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_api import logs
from diffusion_api.access import TOKEN_IN_QUERY, asks_for_token, needed
from diffusion_api.dialects._base import detail, error_body, refusal
from diffusion_api.errors import DiffusionApiError
from diffusion_api.schema.caller import Role

if TYPE_CHECKING:
    from diffusion_api.access import Access
    from diffusion_api.metrics import Metrics
    from diffusion_api.settings import Settings

log = logging.getLogger(__name__)

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 2**10
"""The request's line and all headers."""

CLIENT_LEFT = 499
"""What the log and the metrics call a request whose client went away before the answer; nginx's number for it."""

ALONE = re.compile(r"/compat/\w+")
"""Where a dialect is alone; what follows is the path of its route."""

POLLS = re.compile(rf"({ALONE.pattern})?/(queue|health|ready|hello|metrics)(/|$)")
"""Asked so often that their lines would bury the others; they are logged at debug."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
ELSEWHERE = ("cross-site", "same-site")
"""What Sec-Fetch-Site says of a request that a page of another origin led to."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

HARDENING = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NOTHING_LOADS = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
DOCS_LOAD = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; worker-src blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""For the pages of ``/docs`` and ``/redoc``: they hold nothing that a caller wrote, and load nothing from elsewhere."""


def middleware(settings: Settings, metrics: Metrics, access: Access) -> list[Middleware]:
    """All of it, outermost first."""
    pages = _listed(settings.allowed_origins)
    own = _listed(settings.public_origin)
    return [
        Middleware(Conversation, metrics=metrics, root_path=settings.root_path),
        Middleware(Gate, hosts=allowed_hosts(settings), origins=pages | own),
        *([_readable_by(pages)] if pages else []),
        Middleware(Reception, access=access),
        Middleware(BodyLimit, limit=settings.max_body),
    ]


def _readable_by(pages: frozenset[str]) -> Middleware:
    """What tells browsers that the pages of these origins may call and read. There are no cookies, so none are allowed."""
    return Middleware(
        CORSMiddleware,
        allow_origins=sorted(pages),
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("Authorization", "Content-Type", "Idempotency-Key", "Prefer", "X-API-Key", "X-Request-ID"),
        expose_headers=("Idempotency-Replayed", "Retry-After", "X-Job-Id", "X-Request-ID"),
    )


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """The names by which the service may be called; ``*`` is any.

    A page of another site can make its own name mean 127.0.0.1 and then read what loopback serves (DNS rebinding), but
    its browser still sends that name.
    """
    public = _listed(_without_port(settings.public_origin.partition("://")[2]))
    if settings.allowed_hosts:
        return _listed(settings.allowed_hosts) | public
    if settings.host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return frozenset("*")
    return frozenset({*LOOPBACK, _bracketed(settings.host.lower())}) | public


class Conversation:
    """Gives each request its id, and each answer its headers, its line in the log and its place in the metrics.

    An error that nobody foresaw is answered here: the trace is for the log alone.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, root_path: str) -> None:
        self._app, self._metrics, self._root_path = app, metrics, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._root_path and scope["type"] != "lifespan":
            _mount(scope, self._root_path)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        talk = _Talk(receive, send, _request_id(scope))
        logs.request_id.set(talk.request_id)  # never reset: the server runs each request in a context of its own
        began = time.monotonic()
        try:
            with self._metrics.request_in_progress():
                await self._answer(scope, talk)
        finally:
            self._metrics.request(scope["method"], _template(scope), talk.status)
            _log_access(scope, talk.status, time.monotonic() - began)

    async def _answer(self, scope: Scope, talk: _Talk) -> None:
        try:
            await self._app(scope, talk.receive, talk.send)
        except Exception:  # whatever it was, the caller is told no more than that
            if talk.status:
                raise  # half an answer is out; the server cuts the connection and logs the trace
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = JSONResponse(error_body("the service failed; its log has the details"), 500)
            await answer(scope, talk.receive, talk.send)


@dataclass
class _Talk:
    """One request and its answer. ``status`` is 0 until the answer begins."""

    _receive: Receive
    _send: Send
    request_id: str
    status: int = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.status:
            self.status = CLIENT_LEFT
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = self.status or message["status"]
            harden(MutableHeaders(scope=message), self.request_id)
        await self._send(message)


def harden(headers: MutableHeaders, request_id: str) -> None:
    """Add what keeps browsers and caches from doing more with an answer than show it."""
    page = headers.get("content-type", "").startswith("text/html")
    for name, value in HARDENING.items():
        headers.setdefault(name, value)
    headers["Content-Security-Policy"] = DOCS_LOAD if page else NOTHING_LOADS
    if "etag" not in headers:  # what has one is a file of the documentation; anything else is about jobs
        headers.setdefault("Cache-Control", "no-store")
    headers["X-Request-ID"] = request_id


class Gate:
    """Refuses what no route should see: foreign host names, requests of other sites' pages, oversized headers.

    What a page of another site may ask for is what anybody may see without a key: a GET, too, may begin a job.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], origins: frozenset[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        found = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if found is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await _closed(send)
        else:
            status, message = found
            await JSONResponse(error_body(message), status, {"Connection": "close"})(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        fields = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in fields)
        if len(fields) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            return 431, f"the headers are too large: at most {MAX_HEADERS} and {MAX_HEADER_BYTES} bytes are allowed"
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if "*" not in self._hosts and _without_port(host) not in self._hosts:
            return 400, (
                f"the Host header is {host[:100]!r}; this service answers as {', '.join(sorted(self._hosts))}. "
                "Its operator can set DIFFUSION_API_ALLOWED_HOSTS"
            )
        method = scope.get("method", "GET")
        harmless = method in SAFE_METHODS and needed(method, route_path(scope)) is Role.NOBODY
        if not harmless and (page := self._foreign_page(headers, host)):
            return 403, f"a page of {page} may not do this here. The operator can set DIFFUSION_API_ALLOWED_ORIGINS"
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy may believe the other one, and take the rest of the body for a request of somebody else.
            return 400, "the body has two lengths: send Content-Length or Transfer-Encoding, not both"
        if headers.get("content-encoding", "identity").lower() != "identity":
            return 415, "the body is compressed; send it as it is, without Content-Encoding"
        return None

    def _foreign_page(self, headers: Headers, host: str) -> str | None:
        """The page of another site that has a browser send this, None if there is none. What is no browser tells of none.

        A browser sends no Origin with links, forms that GET and pictures, but then it says where from it was led here
        (Fetch Metadata, W3C): ``none`` is a person who typed the address.
        """
        if origin := headers.get("origin"):
            own = origin.lower().partition("://")[2] == host
            return None if own or origin.lower() in self._origins else repr(origin[:100])
        return "another site" if headers.get("sec-fetch-site", "").lower() in ELSEWHERE else None


class Reception:
    """Finds out who asks, before anything else is done for them, and sends away whom the service does not let in."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if TOKEN_IN_QUERY.fullmatch(
            route_path(scope)
        ):  # a link as the task API's document prints it: ...&steps=5?token=...
            scope["query_string"] = scope["query_string"].replace(b"?token=", b"&token=")
        try:
            caller = await self._access.admit(HTTPConnection(scope), route_path(scope))
        except DiffusionApiError as error:
            if scope["type"] == "websocket":
                await _closed(send)
            else:
                tasks = asks_for_token(scope["method"], route_path(scope))
                await refusal(error, detail if tasks else error_body)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


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


def route_path(scope: Scope) -> str:
    """The path as the routes know it: without what a proxy has before it."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if path == root or path.startswith(f"{root}/") else path


def _mount(scope: Scope, root: str) -> None:
    """Say under which path callers find the service, as ASGI has it: in ``root_path``, and before ``path``, be it that the
    proxy took it off.
    """
    scope["root_path"] = root
    if route_path(scope) == scope["path"]:
        scope["path"] = root + scope["path"]


async def _closed(send: Send) -> None:
    """Refuse a WebSocket before it is opened; its client sees HTTP 403."""
    await send({"type": "websocket.close", "code": 1008})


def _request_id(scope: Scope) -> str:
    """The caller's ``X-Request-ID`` where it is one that can stand in a log, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _template(scope: Scope) -> str:
    """The route as it was declared, so that the metrics do not grow with the paths that callers think of."""
    if "route" not in scope:
        return "none"
    alone = ALONE.match(route_path(scope))
    return (alone[0] if alone else "") + str(scope["route"].path)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    quiet = POLLS.match(route_path(scope)) and status < 500
    client = scope["client"][0] if scope["client"] else "-"
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %s %d in %.0f ms", client, scope["method"], scope["path"], status, 1000 * seconds,
    )  # fmt: skip


def _listed(names: str) -> frozenset[str]:
    return frozenset(name.strip().lower() for name in names.split(",") if name.strip())


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host)


def _bracketed(host: str) -> str:
    """A host as it stands in a Host header: IPv6 addresses in brackets."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
