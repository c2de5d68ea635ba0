"""Records of jobs to answers."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from fastapi import Response
from fastapi.responses import JSONResponse

from diffusion_api import infotext
from diffusion_api.dialects._jobs import Meant
from diffusion_api.dialects.native.bodies import DryRunBody, JobRow, NeedBody, PassBody, PolledBody, UpscaleDryRunBody
from diffusion_api.queues.base import Snapshot
from diffusion_api.schema.caller import Caller
from diffusion_api.schema.job import Earlier, Job, Result, State
from diffusion_api.schema.request import Caption, Embed, Img2Img, Reading, Sampling, Txt2Img, Upscale

if TYPE_CHECKING:
    from diffusion_api.service import Service

LONGEST_PROMPT = 200
"""Characters of a prompt in a list of jobs."""


def dry_run(meant: Meant[Txt2Img | Img2Img], service: Service) -> DryRunBody:
    request = meant.request
    found = service.estimate(request)
    room = found.room
    return DryRunBody(
        seed=request.seed,
        model=found.model.name,
        family=found.model.family,
        passes=[
            PassBody(
                phase=each.phase, width=each.width, height=each.height, sampler=each.sampler, steps=each.run,
                evaluations=each.evaluations,
            )
            for each in found.passes
        ],
        evaluations=found.evaluations,
        seconds=service.seconds(request),
        memory=NeedBody(
            weights={part: numbers * found.number for part, numbers in found.footprint.parts.items()},
            activations=found.need.activations,
            peak=found.need.device,
            budget=room.device if room else None,
            ram=found.need.host,
            ram_budget=room.host if room else None,
            measures=list(found.measures.names),
        ),
        warnings=meant.warnings,
    )  # fmt: skip


def dry_upscale(meant: Meant[Upscale], service: Service) -> UpscaleDryRunBody:
    request = meant.request
    service.check(request)
    return UpscaleDryRunBody(
        upscaler=request.upscaler,
        width=request.width,
        height=request.height,
        seconds=service.seconds(request),
        warnings=meant.warnings,
    )


def ended(job: Job) -> dict[str, Any]:
    """What a webhook is told of a job's end: its status, without the pictures."""
    return _status(Snapshot(job))


def row(snapshot: Snapshot) -> JobRow:
    """A job in a list."""
    job, request = snapshot.job, snapshot.job.request
    first = next(iter(job.result.images), None) if job.result else None
    size = first or request
    drawn = request if isinstance(request, Sampling) else None
    model = request if isinstance(request, Sampling | Reading) else None
    counted = request if isinstance(request, Sampling | Caption) else None
    return JobRow(
        **_standing(snapshot),
        kind=request.kind,
        model=model.model if model else None,
        prompt=drawn.prompt[:LONGEST_PROMPT] if drawn else None,
        width=size.width,
        height=size.height,
        steps=counted.steps if counted else None,
        seed=request.seeds[0],
        n=len(request.seeds),
        priority=job.priority,
        created=job.created,
        started=job.started,
        finished=job.finished,
        generation_time_sec=round(job.result.seconds, 3) if job.result else None,
        pictures=len(job.result.images) if job.result else 0,
    )


def told(job_id: str, caller: Caller, service: Service) -> Response:
    """The answer about a job without its pictures: it is no reading of the result."""
    return JSONResponse(answer_of(service.get(job_id, caller), service, pictures=False))


def read(job_id: str, caller: Caller, service: Service) -> Response:
    """The answer about a job; built before the result is let go of, if it may be read once."""
    snapshot = service.get(job_id, caller)
    answer = JSONResponse(answer_of(snapshot, service))
    service.was_read(snapshot)
    return answer


def answer_of(snapshot: Snapshot, service: Service, *, pictures: bool = True) -> dict[str, Any]:
    """How a job stands, with what it made."""
    answer = _status(snapshot) | (_pictures(snapshot.job, service) if pictures else {})
    if not snapshot.state.terminal:
        left = service.seconds_left(snapshot)
        answer["eta_seconds"] = None if left is None else round(left, 1)
    if links := service.links(snapshot.job):
        answer |= {"image_url": links[0]} | ({"image_urls": links} if len(links) > 1 else {})
    if webhook := service.webhook(snapshot.job):
        answer["webhook"] = webhook
    return answer


def polled(snapshot: Snapshot) -> PolledBody:
    """How a job stands, as some of the original's programs ask for it."""
    standing, job = _standing(snapshot), snapshot.job
    images = job.result.images if job.result else ()
    return PolledBody(
        job_id=job.id,
        status="completed" if job.state is State.DONE else standing["state"],
        progress=standing["progress"] / 100,
        phase=standing["current_phase"],
        output=images[0].path if images else None,
        detail=standing["error"],
    )


def shown_state(snapshot: Snapshot) -> State:
    """The state of a job as callers see it: one that a worker has, but not its device yet, still waits."""
    if snapshot.progress and not snapshot.job.begun:
        return State.QUEUED
    return State.ERROR if snapshot.state is State.CANCELLED else snapshot.state


def _status(snapshot: Snapshot) -> dict[str, Any]:
    job = snapshot.job
    answer: dict[str, Any] = {"status": "success"} | _standing(snapshot)
    if snapshot.progress and snapshot.progress.preview:
        answer["preview"] = snapshot.progress.preview
    if job.warnings:
        answer["warnings"] = list(job.warnings)
    if job.reproduces:
        answer["reproduces"] = _reproduces(job, job.reproduces)
    return answer | (_result(job, job.result) if job.result else {})


def _standing(snapshot: Snapshot) -> dict[str, Any]:
    job, progress, position = snapshot.job, snapshot.progress, snapshot.position
    state = shown_state(snapshot)
    if progress and state is State.QUEUED:
        progress, position = None, 0
    done = job.state is State.DONE
    answer: dict[str, Any] = {
        "job_id": job.id,
        "progress": 100 if done else round(100 * progress.fraction, 2) if progress else 0,
        "current_phase": progress.phase if progress else state.value,
        "state": state.value,
        "error": job.error.message if job.error else None,
    }
    if job.error:
        answer["detail"] = job.error.message  # the original API's documents call it error, its program detail
    if position is not None:
        answer["position"] = position
    if job.state is State.CANCELLED:
        answer["cancelled"] = True
    return answer


def _reproduces(job: Job, earlier: Earlier) -> dict[str, Any]:
    """The job that is made again, whether that made the same pixels, and what was not the same when it did."""
    differences = _differences(earlier.result, job.result) if job.result else []
    return {"job_id": earlier.id, "matched": job.matched, "differences": differences}


def _differences(there: Result, here: Result) -> list[str]:
    before, now = _conditions(there), _conditions(here)
    return [
        f"{name}: {before.get(name, 'nothing')} before, {now.get(name, 'nothing')} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _conditions(result: Result) -> dict[str, str]:
    """All on which pixels depend beside the request."""
    fields = infotext.parse(result.images[0].infotext).fields if result.images else {}
    steps = {"memory_steps": ", ".join(result.memory_steps)} if result.memory_steps else {}
    return result.made_with | steps | {name: str(value) for name, value in fields.items()}


def _result(job: Job, result: Result) -> dict[str, Any]:
    if isinstance(job.request, Reading):
        return _read(job.request, job, result)
    image, output = result.images[0], job.request.output
    several = {"output_paths": [i.path for i in result.images]} if len(result.images) > 1 else {}
    loras = {
        "loras_applied": [lora.model_dump() for lora in result.loras_applied],
        "loras_skipped": [lora.model_dump() for lora in result.loras_skipped],
    }
    return (
        several
        | {name: uses for name, uses in loras.items() if uses}
        | ({"memory_steps": list(result.memory_steps)} if result.memory_steps else {})
        | {
            "payload": job.payload,
            "output_path": image.path,
            "width": image.width,
            "height": image.height,
            "file_type": "jpg" if output.format == "jpeg" else output.format,
            "jpeg_quality": output.quality if output.lossy else None,
            "generation_time_sec": round(result.seconds, 3),
            "memory_before_mb": round(result.memory_before_mb, 2),
            "memory_after_mb": round(result.memory_after_mb, 2),
            "seed": image.seed,
            "safety": result.safety.model_dump(),
        }
        | _brought(job)
    )


def _read(request: Caption | Embed, job: Job, result: Result) -> dict[str, Any]:
    """What a model told of a picture; numbers are too many to be told here."""
    made = {"caption": result.caption} if result.embeddings is None else {"output_path": result.embeddings.path}
    steps = {"memory_steps": list(result.memory_steps)} if result.memory_steps else {}
    return (
        made
        | steps
        | {
            "payload": job.payload,
            "generation_time_sec": round(result.seconds, 3),
            "memory_before_mb": round(result.memory_before_mb, 2),
            "memory_after_mb": round(result.memory_after_mb, 2),
            "seed": request.seed,
        }
    )


def _brought(job: Job) -> dict[str, Any]:
    """What the original API's client expects to be told again of a job that brought a picture along."""
    if not isinstance(job.request, Img2Img):
        return {}
    sizes = {name: job.payload[name] for name in ("resize_to", "resize_by") if name in job.payload}
    return {"denoising_strength": job.request.strength, "resize_mode": job.request.resize_mode} | sizes


def _pictures(job: Job, service: Service) -> dict[str, Any]:
    if not job.result:
        return {}
    if numbers := job.result.embeddings:
        data = service.embeddings(numbers)
        return {"embeddings": None if data is None else json.loads(data)}
    if not job.result.images:
        return {}
    encoded = [_base64(service.image(image)) for image in job.result.images]
    return {"image": encoded[0]} | ({"images": encoded} if len(encoded) > 1 else {})


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()
