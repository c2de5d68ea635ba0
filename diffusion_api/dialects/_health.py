"""What dialects tell of the service and its model in ``/health``, for clients that each look for other words."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from diffusion_api.dialects._base import caller_of
from diffusion_api.errors import InvalidRequest
from diffusion_api.schema.caller import Role

if TYPE_CHECKING:
    from diffusion_api.service import Service


@dataclass(frozen=True)
class ModelStatus:
    """What a request gets that names no model.

    ``model`` is that one's name, None where such a request is refused; ``adapter`` the LoRA that the backend API applies to
    it, where it is installed. ``device`` is the kind of the worker's, None until a worker has told it; ``held`` says that a
    model is in memory.
    """

    model: str | None
    adapter: str | None
    device: str | None
    held: bool

    @property
    def backend(self) -> dict[str, Any]:
        """It in the words of the backend API."""
        return {
            "loaded": self.model is not None,
            "lora_available": self.adapter is not None,
            "device": self.device or "unknown",
        }


MODEL_INFO: JsonDict = {
    "base_model": "stable-diffusion-v1-5",
    "lora_applied": False,
    "torch_version": "2.15.0",
    "cuda_available": True,
}
"""As the documentation shows it."""


class ModelInfoBody(BaseModel):
    """What a request gets that names no model."""

    base_model: str | None
    lora_applied: bool
    torch_version: str
    cuda_available: bool


class ModelStatusBody(BaseModel):
    """Whether there is a model to draw with, and where; it is brought into memory by the first job."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"loaded": True, "lora_available": False, "device": "cuda"}}
    )

    loaded: bool
    lora_available: bool = Field(description="there is a LoRA that /generate applies")
    device: str = Field(description="cuda, cpu or mps; unknown until a worker has told it")


class ModelHealthBody(ModelStatusBody):
    """The same with the model itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"loaded": True, "lora_available": False, "device": "cuda", "model_info": MODEL_INFO}
        }
    )

    model_info: ModelInfoBody


class BackendHealthBody(BaseModel):
    """How the service is, in the shape of the backend API."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "status": "healthy",
                "timestamp": "2026-11-21T09:00:00",
                "model_status": {"loaded": True, "lora_available": False, "device": "cuda", "model_info": MODEL_INFO},
            }
        }
    )

    status: Literal["healthy", "warning"]
    timestamp: str = Field(description="ISO 8601, the time of the server")
    model_status: ModelHealthBody | None = None


def model_status(service: Service) -> ModelStatus:
    """How it is now."""
    try:
        model = service.model(None).name
    except InvalidRequest:
        model = None
    device = service.device()
    adapter = service.asset("lora", service.settings.lora_adapter)
    return ModelStatus(
        model,
        adapter=adapter.name if adapter else None,
        device=device.kind if device else None,
        held=bool(service.held()),
    )


def torch_version() -> str:
    """The version of torch, without its import."""
    return importlib.metadata.version("torch")


def backend_health(service: Service) -> dict[str, Any]:
    """``/health`` in the shape of the backend API."""
    status = model_status(service)
    return {
        "status": "healthy" if status.model else "warning",
        "timestamp": datetime.now().isoformat(timespec="seconds"),
        "model_status": _with_info(status),
    }


def of_others(service: Service) -> dict[str, Any]:
    """What the clients of the backend API and of the configuration API look for in the ``/health`` of all."""
    status = model_status(service)
    return {
        "timestamp_iso": datetime.now().isoformat(timespec="seconds"),
        "model_status": _with_info(status),
        "service": "stable-diffusion-api",
        "buffer_accessible": status.device is not None,
        "model_loaded": status.held,
    }


def seen(answer: dict[str, Any], http: Request) -> dict[str, Any]:
    """As much of it as this caller may see: those who are not known, that the service is up."""
    known = caller_of(http).role is not Role.NOBODY
    return answer if known else {name: answer[name] for name in ("status", "timestamp")}


def _with_info(status: ModelStatus) -> dict[str, Any]:
    return status.backend | {
        "model_info": {
            "base_model": status.model,
            "lora_applied": status.adapter is not None,
            "torch_version": torch_version(),
            "cuda_available": status.device == "cuda",
        }
    }
