"""The backend API: ``/generate`` answers with the pictures, ``/generate/batch`` with those of several prompts."""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Body, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, WithJsonSchema

from diffusion_api import __version__
from diffusion_api.catalog import samplers
from diffusion_api.dialects._base import ErrorRoute, build, explain, offer, resolve_seed, status_of
from diffusion_api.dialects._health import ModelStatusBody, backend_health, model_status, seen, torch_version
from diffusion_api.dialects._jobs import (
    NOBODY,
    IdempotencyKey,
    Meant,
    Stored,
    ended,
    prefers_async,
    result_of,
    store,
    view,
)
from diffusion_api.errors import (
    CallerError,
    DeviceLost,
    DeviceUnusable,
    DiffusionApiError,
    Gone,
    InvalidRequest,
    KeyReused,
    ModelUnreadable,
    NoModel,
    Unfinished,
    UnknownModel,
)
from diffusion_api.metrics import CONTENT_TYPE
from diffusion_api.nearest import LONGEST_NAME, hint
from diffusion_api.schema.job import Image
from diffusion_api.schema.request import LoraUse, Output, Txt2Img

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.queues.base import Snapshot
    from diffusion_api.service import Service

MAX_ITEMS = 32
"""Prompts of one batch: the answer holds all their pictures."""

NOT_LOADED = "Model not loaded"
UNLOADABLE = (UnknownModel, ModelUnreadable, DeviceUnusable, DeviceLost)
"""Ends of jobs that never had a model to draw with."""

OURS = {"steps": "num_inference_steps", "n": "num_images"}
"""What this dialect calls the fields that the operator's limits name."""

DEFAULT_SAMPLER = "DPM++ 2M Karras"

EXAMPLES = (
    {
        "name": "Abstract Art",
        "prompt": "abstract geometric patterns in vibrant colors, artistic composition",
        "negative_prompt": "photorealistic, realistic, photographic",
    },
    {
        "name": "Minimalist Design",
        "prompt": "minimalist line art, geometric forms, clean design, white background",
        "negative_prompt": "complex, busy, colorful, detailed",
    },
)


class GenerateBody(BaseModel):
    """A picture from words."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"example": EXAMPLES[0] | {"num_inference_steps": 20, "seed": 42}}
    )

    prompt: str
    negative_prompt: str | None = ""
    num_inference_steps: int = Field(default=20, ge=1, le=100)
    guidance_scale: float = Field(default=7.5, ge=1, le=20)
    width: int = Field(default=512, ge=256, le=1024, description="pixels; rounded down to a multiple of 8")
    height: int = Field(default=512, ge=256, le=1024, description="pixels; rounded down to a multiple of 8")
    num_images: int = Field(default=1, ge=1, le=4)
    seed: int | None = Field(default=None, description="0 to 4294967295; a random one when left out or negative")


RANGES = {
    name: f"it may be {field['minimum']:g} to {field['maximum']:g}"
    for name, field in GenerateBody.model_json_schema()["properties"].items()
    if "minimum" in field
}
ITEM = {"$ref": "#/components/schemas/GenerateBody"}
Item = Annotated[Any, WithJsonSchema(ITEM)]
"""An item of a batch, looked at apart from the others: a wrong one is no reason to refuse them."""


class PromptsBody(BaseModel):
    """Several prompts with everything else in common: any field of ``/generate``."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"example": {"prompts": ["a lighthouse", "a harbour"]}})

    prompts: list[str] = Field(max_length=MAX_ITEMS)


Batch = Annotated[
    Annotated[list[Item], Field(max_length=MAX_ITEMS), Tag("items")] | Annotated[PromptsBody, Tag("prompts")],
    Discriminator(lambda batch: "items" if isinstance(batch, list) else "prompts"),
]


SEVERAL: dict[str, Any] = {
    "items": {"value": [EXAMPLES[0] | {"seed": 42}, EXAMPLES[1]]},
    "prompts": {"value": {"prompts": ["a lighthouse", "a harbour"], "num_inference_steps": 20}},
}


class BackendErrorBody(BaseModel):
    """Why a request was refused."""

    model_config = ConfigDict(json_schema_extra={"example": {"detail": "width is 5; it may be 256 to 1024"}})

    detail: str


class ModelInfo(BaseModel):
    """What the pictures were made with, as it was."""

    base_model: str
    lora_applied: bool
    device: str
    inference_steps: int
    guidance_scale: float
    resolution: str = Field(description="width x height in pixels", examples=["512x512"])


GENERATED: dict[str, Any] = {
    "images": ["data:image/png;base64,iVBORw0KGgo="],
    "prompt": "a lighthouse",
    "negative_prompt": "",
    "generation_time": 2.4,
    "model_info": {
        "base_model": "stable-diffusion-v1-5",
        "lora_applied": False,
        "device": "cuda",
        "inference_steps": 20,
        "guidance_scale": 7.5,
        "resolution": "512x512",
    },
    "seed": 42,
}
"""As the documentation shows it."""


class GeneratedBody(BaseModel):
    """The pictures, as data URLs of PNGs."""

    model_config = ConfigDict(json_schema_extra={"example": GENERATED})

    images: list[str]
    prompt: str
    negative_prompt: str
    generation_time: float = Field(description="seconds")
    model_info: ModelInfo
    seed: int = Field(description="of the first picture; the next ones count on")
    warnings: list[str] | None = Field(default=None, description="what was not done as it was asked for")


class ItemBody(BaseModel):
    """What became of one item of a batch: a result, or an error."""

    index: int
    success: bool
    result: GeneratedBody | None = None
    error: str | None = None
    job_id: str | None = Field(default=None, description="of an item that became a job")


class BatchBody(BaseModel):
    """The items in the order in which they were sent."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "results": [
                    {"index": 0, "success": True, "result": GENERATED},
                    {"index": 1, "success": False, "error": "steps is 0"},
                ]
            }
        }
    )

    results: list[ItemBody]


class ExampleBody(BaseModel):
    """A prompt to begin with."""

    name: str
    prompt: str
    negative_prompt: str


SHOWN: dict[str, Any] = {"examples": [*EXAMPLES]}


class ExamplesBody(BaseModel):
    """Prompts to begin with."""

    model_config = ConfigDict(json_schema_extra={"example": SHOWN})

    examples: list[ExampleBody]


class BackendMetricsBody(BaseModel):
    """Whether there is a model to draw with, and where, with the versions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model_loaded": True,
                "lora_available": False,
                "device": "cuda",
                "torch_version": "2.15.0",
                "api_version": "1.0.0",
            }
        }
    )

    model_loaded: bool
    lora_available: bool
    device: str
    torch_version: str
    api_version: str


class BackendRoute(ErrorRoute):
    """A route whose refusals say ``detail`` alone, and of a number which ones are allowed."""

    @classmethod
    def told(cls, message: str) -> Any:
        """The body of a refusal."""
        return {"detail": message}

    @classmethod
    def explained(cls, error: dict[str, Any], body: Any) -> str:
        """A wrong field in a sentence, a number with its range."""
        allowed = RANGES.get(str(error["loc"][-1])) if error["loc"] else None
        beyond = error["type"] in ("greater_than_equal", "less_than_equal")
        return explain(error | {"msg": allowed} if allowed and beyond else error, body)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its documentation; all have one body."""
    expected: dict[int | str, dict[str, Any]] = {status: {"model": BackendErrorBody} for status in statuses}
    return expected | {"default": {"model": BackendErrorBody, "description": "Any other refusal"}}


def mount(app: FastAPI, service: Service, prometheus: Callable[[], bytes]) -> None:
    """Add the routes of this dialect; ``prometheus`` is the text that ``/metrics`` has for it."""
    router = APIRouter(route_class=BackendRoute, responses=refusals(), tags=["backend"])
    _add_drawing(router, service)
    _add_facts(router, service, prometheus)
    own = APIRouter(route_class=BackendRoute)

    @own.get("/health")
    def health(http: Request) -> dict[str, Any]:
        return seen(backend_health(service), http)

    offer(app, "backend", router, own)


def _add_drawing(router: APIRouter, service: Service) -> None:
    @router.post(
        "/generate", summary="Pictures from words, in the answer", response_model=GeneratedBody,
        responses=refusals(400, 413, 415, 422, 429, 500, 503, 507),
    )  # fmt: skip
    async def generate(
        body: Annotated[GenerateBody, Body()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        def post() -> Stored:
            sent = body.model_dump(exclude_unset=True)
            return _store(_meant(body, service), http, service, sent=sent, key=idempotency_key)

        stored = await run_in_threadpool(post)
        return await view(stored, http, service, lambda snapshot: _answer(snapshot, service))

    @router.post(
        "/generate/batch", summary="Pictures from several prompts, in the answer", response_model=BatchBody,
        responses=refusals(400, 413, 415, 422, 429, 503, 507),
    )  # fmt: skip
    async def batch(
        body: Annotated[Batch, Body(openapi_examples=SEVERAL)], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        items = await run_in_threadpool(_store_all, _items(body), http, service, idempotency_key)
        headers = {"X-Job-Id": ", ".join(item["job_id"] for item in items if "job_id" in item)}
        if prefers_async(http):
            return JSONResponse({"results": items}, 202, headers | {"Preference-Applied": "respond-async"})
        for item in items:
            if "job_id" not in item:
                continue
            try:
                snapshot = await ended(item["job_id"], http, service, cancel=False)
            except Unfinished as error:
                item |= {"success": False, "error": str(error)}
                continue
            if snapshot is None:
                return Response(status_code=NOBODY)
            item |= await run_in_threadpool(_outcome, snapshot, service)
        return JSONResponse({"results": items}, headers=headers)


def _add_facts(router: APIRouter, service: Service, prometheus: Callable[[], bytes]) -> None:
    @router.get("/examples", summary="Prompts to begin with")
    def examples() -> ExamplesBody:
        return ExamplesBody(examples=[ExampleBody(**example) for example in EXAMPLES])

    @router.get("/models/status", summary="Is there a model to draw with?")
    def models_status() -> ModelStatusBody:
        return ModelStatusBody(**model_status(service).backend)

    @router.get(
        "/metrics", summary="Facts of the model, or numbers for Prometheus", response_model=BackendMetricsBody,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": "diffusion_api_jobs_total 4"}}}},
    )  # fmt: skip
    def metrics(
        http: Request,
        form: Annotated[
            Literal["json", "prometheus"] | None, Query(alias="format", description="whatever Accept says")
        ] = None,
    ) -> Response:
        if form == "prometheus" or (form is None and _prefers_text(http.headers.get("accept", ""))):
            return PlainTextResponse(prometheus(), media_type=CONTENT_TYPE)
        found = model_status(service).backend
        body = {"model_loaded": found.pop("loaded")} | found
        return JSONResponse(body | {"torch_version": torch_version(), "api_version": __version__})


def _prefers_text(accept: str) -> bool:
    """Whether an Accept header has text before JSON (RFC 9110, 12.5.1), as that of Prometheus has."""
    weights = {}
    for part in accept.lower().split(","):
        kind, *parameters = (text.strip() for text in part.split(";"))
        weights[kind] = 1.0
        for parameter in parameters:
            with suppress(ValueError):
                weights[kind] = float(parameter.removeprefix("q=")) if parameter.startswith("q=") else weights[kind]
    text = max(weights.get(kind, 0) for kind in ("text/plain", "application/openmetrics-text"))
    return text > max(weights.get(kind, 0) for kind in ("application/json", "application/*", "*/*"))


def _meant(body: GenerateBody, service: Service) -> Meant[Txt2Img]:
    """The pictures that a body means. Raises InvalidRequest, NoModel."""
    model = _model(service)
    profile = model.profile
    sampler, schedule = samplers.resolve(profile.sampler or DEFAULT_SAMPLER, None)
    adapter = model_status(service).adapter
    sides = {"width": body.width, "height": body.height}
    rounded = {name: side // model.multiple * model.multiple for name, side in sides.items()}
    request = build(
        Txt2Img,
        model=model.name,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        **rounded,
        sampler=sampler.name,
        schedule=schedule.name,
        seed=resolve_seed(body.seed),
        count=body.num_images,
        loras=(LoraUse(name=adapter),) if adapter else (),
        clip_skip=profile.clip_skip or 1,
        output=Output(format="png"),
    )
    notes = [
        f"{name} {side} was rounded down to {rounded[name]}, a multiple of {model.multiple}"
        for name, side in sides.items()
        if side != rounded[name]
    ]
    for name in body.model_extra or {}:
        notes.append(f"unknown field {name[:LONGEST_NAME]!r} was ignored{hint(name, GenerateBody.model_fields)}")
    return Meant(request, notes)


def _model(service: Service) -> Model:
    """The model of this service. Raises NoModel: this dialect's callers cannot choose another one."""
    try:
        return service.model(None)
    except InvalidRequest as error:
        raise NoModel(f"{NOT_LOADED}: {error}" if service.models() else NOT_LOADED) from error


def _store(meant: Meant[Txt2Img], http: Request, service: Service, *, sent: dict[str, Any], key: str | None) -> Stored:
    """Store a job; a limit of the operator is told by our names of the fields. Raises what ``store`` raises."""
    try:
        return store(meant, http, service, sent=sent, key=key, dialect="backend")
    except InvalidRequest as error:
        if error.field not in OURS:
            raise
        message = str(error).replace(f"{error.field} is", f"{OURS[error.field]} is", 1)
        raise InvalidRequest(message, field=OURS[error.field]) from error


def _items(body: list[Any] | PromptsBody) -> list[Any]:
    if isinstance(body, list):
        return body
    shared = body.model_extra or {}
    return [shared | {"prompt": prompt} for prompt in body.prompts]


def _store_all(items: list[Any], http: Request, service: Service, key: str | None) -> list[dict[str, Any]]:
    """Store a job for each item that makes one, all before the first is waited for, so that they are drawn together. What
    became of each so far. Raises NoModel, and KeyReused for a key that came with another batch.
    """
    _model(service)
    results = []
    for index, item in enumerate(items):
        numbered = None if key is None else f"{key}/{index}"
        try:
            body = GenerateBody.model_validate(item)
            meant = _meant(body, service)
            stored = _store(meant, http, service, sent={"batch": items, "index": index}, key=numbered)
        except ValidationError as error:
            message = "; ".join(BackendRoute.explained(dict(one), item) for one in error.errors(include_url=False)[:5])
            results.append({"index": index, "success": False, "error": message})
        except KeyReused as error:
            raise KeyReused(
                f"Idempotency-Key {key!r} was sent before with another batch; take a new one for this"
            ) from error
        except NoModel:
            raise
        except DiffusionApiError as error:
            results.append({"index": index, "success": False, "error": str(error)})
        else:
            results.append({"index": index, "success": True, "job_id": stored.job.id})
    return results


def _outcome(snapshot: Snapshot, service: Service) -> dict[str, Any]:
    """What became of an item that was stored."""
    if failure := _failure(snapshot):
        return {"success": False, "error": failure[1]}
    try:
        made = _result(snapshot, service)
    except Gone as error:
        return {"success": False, "error": str(error)}
    service.was_read(snapshot)
    return {"result": made}


def _answer(snapshot: Snapshot, service: Service) -> Response:
    """The answer of ``/generate``. Raises Gone."""
    if failure := _failure(snapshot):
        status, message = failure
        return JSONResponse(BackendRoute.told(message), status)
    answer = JSONResponse(_result(snapshot, service))
    service.was_read(snapshot)
    return answer


def _failure(snapshot: Snapshot) -> tuple[int, str] | None:
    """Status and text for a job that made nothing."""
    try:
        result_of(snapshot)
    except UNLOADABLE as error:
        return 503, f"{NOT_LOADED}: {error}"
    except CallerError as error:
        return status_of(error), str(error)
    except DiffusionApiError as error:
        return 500, f"Generation failed: {error}"
    return None


def _result(snapshot: Snapshot, service: Service) -> dict[str, Any]:
    """What a job that is done has made. Raises Gone."""
    job, result = snapshot.job, result_of(snapshot)
    request = job.request
    assert isinstance(request, Txt2Img)
    first = result.images[0]
    answer: dict[str, Any] = {
        "images": [_data_url(image, service) for image in result.images],
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "generation_time": round(result.seconds, 2),
        "model_info": {
            "base_model": request.model,
            "lora_applied": bool(result.loras_applied),
            "device": model_status(service).device or "unknown",
            "inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "resolution": f"{first.width}x{first.height}",
        },
        "seed": first.seed,
    }
    return answer | ({"warnings": list(job.warnings)} if job.warnings else {})


def _data_url(image: Image, service: Service) -> str:
    data = service.image(image)
    if data is None:
        raise Gone(f"{image.path} was deleted")
    return "data:image/png;base64," + base64.b64encode(data).decode()
