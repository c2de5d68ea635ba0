"""``/buffer_status``: whether a model is in memory, and when it leaves."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from diffusion_api.service import Service

NEVER = -1.0


class BufferBody(BaseModel):
    """The model that was used last, as it is in memory."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "is_loaded": True,
                "loaded_at": "2026-11-21T09:00:00Z",
                "last_accessed": "2026-11-21T09:05:00Z",
                "timeout_seconds": 600,
                "timer_active": True,
            }
        }
    )

    is_loaded: bool
    loaded_at: datetime | None = None
    last_accessed: datetime | None = Field(default=None, description="when a job last asked for it")
    timeout_seconds: float = Field(
        default=NEVER, description="after so many without a job it leaves the memory; -1: never, or there is none"
    )
    timer_active: bool = Field(default=False, description="it will leave by itself")


def add(router: APIRouter, service: Service) -> None:
    """Add the route, with and without a slash at its end: a redirect would lose the key of some clients."""

    @router.get("/buffer_status/", include_in_schema=False)
    @router.get("/buffer_status", summary="Is a model in memory, and until when?")
    def buffer_status() -> BufferBody:
        held = max(service.held(), key=lambda model: model.used, default=None)
        if held is None:
            return BufferBody(is_loaded=False)
        return BufferBody(
            is_loaded=True,
            loaded_at=datetime.fromtimestamp(held.loaded, UTC),
            last_accessed=datetime.fromtimestamp(held.used, UTC),
            timeout_seconds=NEVER if held.idle is None else held.idle,
            timer_active=held.idle is not None,
        )
