"""Events of tasks, sent to the WebSockets of the session that began them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import anyio
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool

from diffusion_api.dialects._base import caller_of
from diffusion_api.dialects._jobs import FOREVER
from diffusion_api.dialects.tasks.meaning import base_url
from diffusion_api.dialects.tasks.replies import DIALECT, STARTED, events, stage
from diffusion_api.errors import DiffusionApiError
from diffusion_api.schema.caller import Caller
from diffusion_api.schema.job import Job, State

if TYPE_CHECKING:
    from diffusion_api.queues.base import Snapshot
    from diffusion_api.service import Service

UNFINISHED = frozenset(state for state in State if not state.terminal)
AT_MOST = 1000
"""Tasks that had begun before a socket was opened, of which it hears."""


class Listeners:
    """Who hears of the tasks of a session: any number of sockets each, all on one event loop."""

    def __init__(self) -> None:
        self._sockets: dict[str, set[asyncio.Queue[str]]] = {}

    def tell(self, job: Job) -> None:
        """A task was stored."""
        for heard in self._sockets.get(job.session, ()):
            heard.put_nowait(job.id)

    @contextmanager
    def hearing(self, session: str) -> Iterator[asyncio.Queue[str]]:
        """Within, the ids of the session's new tasks come in there."""
        heard: asyncio.Queue[str] = asyncio.Queue()
        self._sockets.setdefault(session, set()).add(heard)
        try:
            yield heard
        finally:
            self._sockets[session].discard(heard)
            if not self._sockets[session]:
                del self._sockets[session]


def add(router: APIRouter, service: Service, listeners: Listeners) -> None:
    """Add the route of the events."""

    @router.websocket("/events")
    async def socket_of_events(
        socket: WebSocket, format: Literal["text", "json"] = "text", progress: bool = False
    ) -> None:
        await socket.accept()
        caller = caller_of(socket)
        line = _Line(socket, service, plain=format == "json", progress=progress)
        with listeners.hearing(caller.session) as heard:
            async with anyio.create_task_group() as together:
                together.start_soon(_until_left, socket, together.cancel_scope)
                begun = await run_in_threadpool(_begun, caller, service)
                for task_id, told in begun.items():
                    together.start_soon(line.follow, task_id, told)
                while True:
                    task_id = await heard.get()
                    if task_id not in begun:
                        together.start_soon(line.follow, task_id, None)


class _Line:
    """One socket, and how it wants to be told."""

    def __init__(self, socket: WebSocket, service: Service, *, plain: bool, progress: bool) -> None:
        self._socket, self._service = socket, service
        self._plain, self._progress = plain, progress
        self._base = base_url(socket, service)

    async def follow(self, task_id: str, told: int | None) -> None:
        """Tell of a task, from its beginning or from the stage that was ``told``, to its end."""
        reached = -1 if told is None else told
        moved: Any = None
        async with aclosing(self._service.changes(task_id, FOREVER)) as changes:
            async for snapshot in changes:
                if snapshot is None:
                    continue
                for event in events(snapshot, reached, self._service, self._base):
                    await self._send(event)
                reached = max(reached, stage(snapshot))
                if self._progress and reached == STARTED and snapshot.progress != moved:
                    moved = snapshot.progress
                    await self._send(_progress(snapshot))

    async def _send(self, event: dict[str, Any]) -> None:
        text = json.dumps(event)
        try:
            await self._socket.send_text(text if self._plain else json.dumps(text))
        except (WebSocketDisconnect, RuntimeError):
            return  # it has left, which is noticed by whoever reads from it


def _progress(snapshot: Snapshot) -> dict[str, Any]:
    now = snapshot.progress
    return {
        "event_type": "progress",
        "task_id": snapshot.job.id,
        "progress": round(now.fraction, 4) if now else 0.0,
        "step": now.step if now else 0,
        "steps": now.steps if now else 0,
    }


def _begun(caller: Caller, service: Service) -> dict[str, int]:
    """The stages of the session's tasks that have not ended: what was before is not told again."""

    def wanted(snapshot: Snapshot) -> bool:
        return snapshot.job.dialect == DIALECT and snapshot.job.session == caller.session

    try:
        found = service.jobs(wanted, caller, states=UNFINISHED, limit=AT_MOST)
    except DiffusionApiError:  # the queue cannot be read now; new tasks will be told of
        return {}
    return {snapshot.job.id: stage(snapshot) for snapshot in found}


async def _until_left(socket: WebSocket, scope: anyio.CancelScope) -> None:
    """Read what nobody asked for, and end all of it when the client has left."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass
    scope.cancel()
