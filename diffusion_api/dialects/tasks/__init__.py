"""The task API: ``/task``, ``/events``, ``/blob``, ``/token``, ``/user``, and GET ``/txt2img``, ``/img2img``, ``/inpaint``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from diffusion_api.dialects._base import offer
from diffusion_api.dialects.tasks import accounts, blobs, events, tasks
from diffusion_api.dialects.tasks.events import Listeners
from diffusion_api.dialects.tasks.route import TaskRoute

if TYPE_CHECKING:
    from diffusion_api.access import Access
    from diffusion_api.service import Service


def mount(app: FastAPI, service: Service, access: Access) -> None:
    """Add the routes of this dialect."""
    router = APIRouter(route_class=TaskRoute)
    listeners = Listeners()
    tasks.add(router, service, listeners)
    events.add(router, service, listeners)
    blobs.add(router, service)
    accounts.add(router, access)
    offer(app, "tasks", router)
