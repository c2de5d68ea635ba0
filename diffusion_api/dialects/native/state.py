"""How the service is, and whether jobs may begin. ``/health`` serves the clients of all dialects."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from diffusion_api import __version__
from diffusion_api.dialects._health import BackendHealthBody, backend_health, of_others, seen
from diffusion_api.dialects.native.bodies import HealthBody, HelloBody, NotReadyBody, PausedBody, ReadyBody, refusals

if TYPE_CHECKING:
    from diffusion_api.schema.report import DeviceReport, WorkerReport
    from diffusion_api.service import Service

HealthShape = Annotated[
    Literal["backend"] | None,
    Query(alias="format", description="the shape of another dialect, in place of that for all"),
]
UNKNOWN_DEVICE = {"device_name": "not known: the engine is loading, or no worker runs"}


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that tell how the service is, and that pause the queue."""

    @router.get("/hello", tags=["service"], summary="Is it up?", responses=refusals(400))
    async def hello() -> HelloBody:  # on the event loop: it answers even when every thread is busy
        return HelloBody()

    @router.get(
        "/health", tags=["service"], summary="How the box is", responses=refusals(400),
        response_model=HealthBody | BackendHealthBody, response_model_exclude_unset=True,
    )  # fmt: skip
    def health(http: Request, shape: HealthShape = None) -> dict[str, Any]:
        if shape == "backend":
            return seen(backend_health(service), http)
        return seen(_health(service) | of_others(service), http)

    @router.get(
        "/ready", tags=["service"], summary="Would a job be run now?", response_model=ReadyBody,
        responses=refusals(400) | {503: {"model": NotReadyBody}},
    )  # fmt: skip
    def ready() -> JSONResponse:
        return _ready(service)

    @router.post(
        "/queue/pause", tags=["queue"], summary="Let no job begin", responses=refusals(401, 403, 429, 501, 503, 507)
    )
    def pause() -> PausedBody:
        service.pause()
        return PausedBody(paused=True)

    @router.post(
        "/queue/resume",
        tags=["queue"],
        summary="Let jobs begin again",
        responses=refusals(401, 403, 429, 501, 503, 507),
    )
    def resume() -> PausedBody:
        service.resume()
        return PausedBody(paused=False)


def add_own(router: APIRouter, service: Service) -> None:
    """Add ``/health`` as it is where this dialect is alone."""

    @router.get("/health")
    def health(http: Request) -> dict[str, Any]:
        return seen(_health(service), http)


def _ready(service: Service) -> JSONResponse:
    found = service.readiness()
    if found.reasons:
        message = "; ".join(found.reasons)
        body: BaseModel = NotReadyBody(detail=message, error=message, loading=found.loading, reasons=[*found.reasons])
        return JSONResponse(body.model_dump(), 503)
    return JSONResponse(ReadyBody(loading=found.loading).model_dump())


def _health(service: Service) -> dict[str, Any]:
    health, settings = service.health(), service.settings
    answer: dict[str, Any] = {
        "status": "warning" if health.warnings else "healthy",
        "timestamp": time.time(),
        "version": __version__,
        "system": {
            "cpu_count": health.cpu_count,
            "memory_total_gb": health.memory_total_gb,
            "memory_available_gb": health.memory_available_gb,
            "memory_percent": health.memory_percent,
            "disk_usage_percent": health.disk_usage_percent,
        },
        "gpu": health.device.facts if health.device else UNKNOWN_DEVICE,
        "workers": [_worker(report) for report in health.workers],
        "models": {"count": health.models, "directory": _shown(settings.models_dir, settings.home)},
        "safety": {"policy": settings.safety, "checker": service.checks(None)},
        "loras": {"count": health.loras, "directory": _shown(settings.loras_dir, settings.home)},
        "queue": {
            "active_jobs": health.active_jobs,
            "paused": health.paused,
            "directory": _shown(settings.queue_dir, settings.home),
        },
        "outputs": {
            "available": health.outputs_available,
            "free_space_gb": health.outputs_free_gb,
            "directory": _shown(settings.outputs_dir, settings.home),
        },
        "disk": {folder: {"bytes": use.bytes, "files": use.files} for folder, use in health.disk.items()},
    }
    if health.warnings:
        answer["warnings"] = list(health.warnings)
    return answer


def _worker(report: WorkerReport) -> dict[str, Any]:
    """A worker as callers see it: nothing of the host, and no id, since who has a job's id may have its picture."""
    return {
        "state": report.state,
        "device_name": report.device.name if report.device else None,
        "jobs": len(report.jobs),
        "seconds_since_event": round(report.quiet, 1),
        "restarts": report.restarts,
    } | (_memory(report.device) if report.device else {})


def _memory(device: DeviceReport) -> dict[str, Any]:
    models = [{"name": held.name, "where": held.where, "mb": round(held.size / 2**20, 1)} for held in device.models]
    budget = round(device.room.device / 2**30, 2) if device.room else None
    return {"memory_budget_gb": budget, "models_in_memory": models}


def _shown(folder: Path, home: Path) -> str:
    """A folder as callers see it: relative to the installation's home, never a path of the host."""
    return folder.relative_to(home).as_posix()
