"""HTTP connections whose clients are waited for only so long: uvicorn's, with limits on headers, bodies and readers."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import sys
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import h11
from starlette.datastructures import MutableHeaders
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from diffusion_api.dialects._base import error_body
from diffusion_api.door import harden

if TYPE_CHECKING:
    from diffusion_api.settings import Settings

log = logging.getLogger(__name__)

LINGER = 5.0
"""Seconds that a client which was answered early may go on to send, so that it gets to read the answer."""

EVERY = 1.0
"""Seconds between two looks at a connection."""


class Wait(StrEnum):
    """What a client keeps the service waiting for."""

    HEADERS = "headers"
    BODY = "body"
    REST = "end of a body that nobody reads"
    READER = "reading of the answer"


def protocol(settings: Settings) -> type[Connection]:
    """What uvicorn is to make of each connection."""
    return type("Connection", (Connection,), {"settings": settings})


def is_proxy(host: str, trusted: str) -> bool:
    """Whether an address is one of those ``trusted`` lists, as addresses and networks with commas, or ``*``."""
    for name in filter(None, map(str.strip, trusted.split(","))):
        with contextlib.suppress(ValueError):
            if name in ("*", host) or ipaddress.ip_address(host) in ipaddress.ip_network(name):
                return True
    return False


class Connection(H11Protocol):
    """One connection. Its own refusals look like those of the dialects."""

    settings: Settings

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._every = min(EVERY, self.settings.header_seconds / 4, self.settings.body_seconds / 4)
        self._timer: asyncio.TimerHandle | None = None
        self._received = 0
        self._drained = 0
        self._waiting: tuple[object, ...] = ()
        self._since = 0.0
        self._start = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or tell the client that there are too many."""
        super().connection_made(transport)
        self._look()
        if len(self.connections) > self.settings.max_connections:
            log.warning("a connection was refused: %d are open", len(self.connections) - 1)
            self._refuse(503, "too many connections; try again later", ("retry-after", "10"))
        elif self._has_too_many():
            self._refuse(429, "too many connections of one address; try again later", ("retry-after", "10"))

    @property
    def _host(self) -> str:
        return self.client[0] if self.client else ""

    def _has_too_many(self) -> bool:
        most, host = self.settings.max_connections_per_client, self._host
        clients = (
            getattr(other, "client", None) for other in self.connections
        )  # those of WebSockets are of another class
        theirs = sum(client is not None and client[0] == host for client in clients)
        if not most or theirs <= most or is_proxy(host, self.settings.trusted_proxies):
            return False
        log.warning("%s: a connection was refused: %d are open", host, theirs - 1)
        return True

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over to uvicorn's WebSockets, which end those that answer no ping."""
        if self._timer:
            self._timer.cancel()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count, and go on."""
        self._received += len(data)
        super().data_received(data)

    def resume_writing(self) -> None:
        """The client has read most of what was written."""
        self._drained += 1
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. uvicorn calls this while it handles h11's error, which knows the status."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, f"this is no HTTP request that can be read: {error or msg}")

    def _look(self) -> None:
        """Give up a client that keeps the service waiting. Again and again, all through the connection's life."""
        self._timer = self.loop.call_later(self._every, self._look)
        wait = self._wait()
        if wait is None:
            self._waiting = ()
            return
        waiting, place = (wait, self.cycle, self._drained), self._place(wait)
        if waiting != self._waiting:
            self._waiting, self._since, self._start = waiting, self.loop.time(), place
        if self.loop.time() - self._since > self._patience(wait, place - self._start):
            self._give_up(wait)

    def _wait(self) -> Wait | None:
        """What the client is to do now; None when it is the service's turn."""
        if self.transport.get_write_buffer_size():
            return Wait.READER
        if self.conn.their_state is h11.IDLE:
            return Wait.HEADERS
        if self.conn.their_state is h11.SEND_BODY and not self.flow.read_paused:
            return Wait.REST if self.cycle.response_complete else Wait.BODY
        return None

    def _place(self, wait: Wait) -> int:
        """How far the client is, in bytes from anywhere."""
        return -self.transport.get_write_buffer_size() if wait is Wait.READER else self._received

    def _patience(self, wait: Wait, moved: int) -> float:
        """Seconds that this may take, of which ``moved`` bytes are done."""
        if wait is Wait.HEADERS:
            return self.settings.header_seconds
        if wait is Wait.REST:
            return LINGER
        return self.settings.body_seconds + moved / self.settings.min_rate

    def _give_up(self, wait: Wait) -> None:
        log.info("%s: gave up on the %s", self.client[0] if self.client else "-", wait)
        if wait is Wait.HEADERS and not self.conn.trailing_data[0]:
            self.transport.close()  # it never began
        elif wait is Wait.HEADERS:
            self._refuse(408, "the headers took too long")
        elif wait is Wait.BODY and not self.cycle.response_started:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._refuse(408, "the body took too long")
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str, *more: tuple[str, str]) -> None:
        """Answer without the app, and close."""
        body = json.dumps(error_body(message)).encode()
        headers = MutableHeaders(
            {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **dict(more)}
        )
        harden(headers, uuid.uuid4().hex)
        response = h11.Response(status_code=status, headers=headers.raw, reason=STATUS_PHRASES.get(status, b""))
        try:
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer is on its way already
            self.transport.abort()
            return
        self.transport.close()
