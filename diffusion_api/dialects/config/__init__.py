"""The configuration API: ``/post_config`` and what it is configured with, all in the query. Its LoRAs come from a shop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from diffusion_api.dialects._base import offer
from diffusion_api.dialects._forms import DetailRoute, refusals
from diffusion_api.dialects.config import buffer, generate, lists, llm, shop

if TYPE_CHECKING:
    from diffusion_api.service import Service

__all__ = ["mount"]


def mount(app: FastAPI, service: Service) -> None:
    """Add the routes of this dialect."""
    router = APIRouter(route_class=DetailRoute, responses=refusals(), tags=["configuration"])
    for part in (generate, lists, buffer, shop, llm):
        part.add(router, service)
    offer(app, "sd", router)
