"""The project's own API: ``/txt2img``, ``/queue/{job_id}``, ``/img-info``, ``/models``, ``/health``, ``/hello``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from diffusion_api.dialects._base import ErrorRoute, offer
from diffusion_api.dialects.native import capabilities, catalog, events, info, jobs, results, state
from diffusion_api.dialects.native.bodies import refusals
from diffusion_api.dialects.native.replies import ended

if TYPE_CHECKING:
    from diffusion_api.service import Service

__all__ = ["ended", "mount"]


def mount(app: FastAPI, service: Service) -> None:
    """Add the routes of this dialect."""
    router = APIRouter(route_class=ErrorRoute, responses=refusals())
    for part in (state, catalog, capabilities, jobs, events, results, info):
        part.add(router, service)
    own = APIRouter(route_class=ErrorRoute)
    state.add_own(own, service)
    offer(app, "diffusionapi", router, own)
