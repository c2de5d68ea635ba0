"""The project's own API: ``/txt2img``, ``/queue/{job_id}``, ``/models``, ``/health``, ``/hello``."""

from __future__ import annotations

import base64
import difflib
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Body, FastAPI, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from diffusion_api import __version__, infotext
from diffusion_api.catalog import samplers
from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.dialects._base import MAX_SIDE, ErrorRoute, build, caller_of, hears, resolve_seed, round_size
from diffusion_api.errors import InvalidRequest, UnknownModel, UnknownSampler
from diffusion_api.prompt import parse, uncommented
from diffusion_api.queues.base import Key, Snapshot
from diffusion_api.schema.job import NOT_INSTALLED, Job, LoraApplied, LoraSkipped, Result, State, lora_skipped
from diffusion_api.schema.request import MAX_SEED, OWN_VAE, Emphasis, Hires, LoraUse, Output, Source, Txt2Img

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Asset, Model
    from diffusion_api.schema.report import DeviceReport, WorkerReport
    from diffusion_api.service import Service

FILE_TYPES = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png"}
DEFAULT_SAMPLER = "DPM++ 2M"
MAX_UNKNOWN = 100
"""Fields of a body that are ignored with a warning each; looking for a near name takes its time."""
LONGEST_NAME = 100
OPTIONS = (
    *("rng", "ensd", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "discard_next_to_last_sigma"),
    *("guidance_rescale", "clip_skip", "emphasis"),
)
"""Fields that are passed on as they are, and left to the request's defaults when they are not given."""

UNKNOWN_DEVICE = {"device_name": "not known: the engine is loading, or no worker runs"}
NEXT_STEP = 5.0
"""Seconds that a running job gets to end before the caller who cancelled it is answered."""

KNOWN = "<lora:name:weight> is one"
NOBODY = 499
"""Status of an answer that nobody will read, as the caller has hung up."""


IN_BODY = {"guidance_scale": "cfg_scale", "sampler": "sampler_name", "schedule": "scheduler_type"}
"""What the body calls a field of the request, where the names differ."""


def _also(name: str, *others: str) -> AliasChoices:
    """The names that a field of a body may have: its own one, and A1111's."""
    return AliasChoices(name, *others)


def _word(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _source(value: Any) -> Any:
    return "nv" if (word := _word(value)) == "gpu" else word


class LoraBody(BaseModel):
    """A LoRA by name, or by its path as the service shows it, with its strength."""

    name: str = Field(validation_alias=_also("name", "path"))
    scale: float = Field(default=1.0, allow_inf_nan=False)
    text_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="strength on the text encoders; that of scale when left out"
    )


class HiresBody(BaseModel):
    """A second pass at a larger size. What is left out is as in the first."""

    enabled: bool | None = None
    scale: float = Field(default=2.0, gt=0, le=8, allow_inf_nan=False, description="without width and height")
    width: int | None = Field(default=None, description="pixels; with height, in place of scale")
    height: int | None = Field(default=None, description="pixels; with width, in place of scale")
    upscaler: str = Field(default="Latent", description="a name of /upscalers")
    steps: int | None = Field(default=20, ge=0, description="0: as many as the first pass")
    denoising_strength: float = Field(default=0.4, ge=0, le=1, description="how much is drawn anew")
    sampler_name: str | None = None
    scheduler_type: str | None = None
    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


class Txt2ImgBody(BaseModel):
    """The body of ``POST /txt2img``. Every field may be left out; numbers may come as strings."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"prompt": "a large red circle on a blue background"},
                {
                    "prompt": "a small green star on a black background on the left",
                    "negative_prompt": "blurry",
                    "steps": 20,
                    "cfg_scale": 5,
                    "width": 256,
                    "height": 256,
                    "model": "shapes",
                    "sampler_name": "DPM++ 2M Karras",
                    "fileType": "png",
                    "seed": 42,
                },
            ]
        },
    )

    prompt: str = ""
    negative_prompt: str | None = None
    steps: int | None = Field(default=None, ge=1, description="at most the operator's limit; 30 when left out")
    cfg_scale: float | None = Field(
        default=None, ge=0, le=100, allow_inf_nan=False, description="guidance; 7 when left out, 1 is none"
    )
    width: int | None = Field(
        default=None, description="pixels; rounded to a multiple of 8; the model's own when left out"
    )
    height: int | None = Field(default=None, description="pixels, like width")
    model: str | None = Field(default=None, description="a name or label of /models")
    sampler_name: str | None = Field(default=None, description="DPM++ 2M when left out; may end in a scheduler_type")
    scheduler_type: str | None = Field(default=None, description="karras when left out")
    fileType: str | None = Field(default=None, description="jpg or png")
    jpeg_quality: int | None = Field(default=None, ge=1, le=100, description="85 when left out")
    seed: int | None = Field(default=None, description="0 to 4294967295; null or -1 draws one")
    n: int | None = Field(default=None, ge=1, description="pictures, with seeds seed, seed + 1, ...; 1 when left out")
    rng: Annotated[Source, BeforeValidator(_source)] | None = Field(
        default=None,
        validation_alias=_also("rng", "randn_source"),
        description="where noise comes from; nv when left out",
    )
    variation_seed: int | None = Field(
        default=None, validation_alias=_also("variation_seed", "subseed"), description="like seed"
    )
    variation_strength: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        validation_alias=_also("variation_strength", "subseed_strength"),
        description="how far to go from the noise of seed to that of variation_seed; 0 when left out",
    )
    seed_resize_width: int | None = Field(
        default=None,
        le=MAX_SIDE,
        validation_alias=_also("seed_resize_width", "seed_resize_from_w"),
        description="pixels; with seed_resize_height: noise as for a picture of that size",
    )
    seed_resize_height: int | None = Field(
        default=None, le=MAX_SIDE, validation_alias=_also("seed_resize_height", "seed_resize_from_h")
    )
    ensd: int | None = Field(
        default=None,
        ge=-MAX_SEED,
        le=MAX_SEED,
        validation_alias=_also("ensd", "eta_noise_seed_delta"),
        description="added to the seed for noise after the first; 0 when left out",
    )
    eta: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="the sampler's own when left out")
    s_churn: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="0 when left out")
    s_tmin: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="0 when left out")
    s_tmax: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="0, which is no end, when left out"
    )
    s_noise: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="1 when left out")
    discard_next_to_last_sigma: bool | None = Field(
        default=None,
        validation_alias=_also("discard_next_to_last_sigma", "always_discard_next_to_last_sigma"),
        description="the sampler's own way when left out",
    )
    guidance_rescale: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, description="0 when left out; against overexposed pictures"
    )
    clip_skip: int | None = Field(
        default=None,
        ge=1,
        le=12,
        validation_alias=_also("clip_skip", "CLIP_stop_at_last_layers"),
        description="1 when left out: the last layer of the text encoder",
    )
    emphasis: Annotated[Emphasis, BeforeValidator(_word)] | None = Field(
        default=None, description="what weights in a prompt do; original when left out"
    )
    styles: list[str] | None = Field(
        default=None, max_length=MAX_UNKNOWN, description="names of styles to put around both prompts, in order"
    )
    infotext: str | None = Field(
        default=None, description="the parameters of a picture, as A1111 writes them: for all that is left out here"
    )
    loras: list[LoraBody | str] | None = Field(
        default=None, description="beside those that the prompt names as <lora:name:scale>"
    )
    vae: str | None = Field(
        default=None,
        validation_alias=_also("vae", "sd_vae"),
        description="a VAE by name; None: the model's own; Automatic, also when left out: the one named like the model",
    )
    hires: HiresBody | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, description="0 to 1")
    priority: int | None = Field(default=None, ge=-9, le=9, description="higher runs first; 0 when left out")
    deadline: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="seconds that the job may run; the operator's when left out",
    )
    webhook: str | None = Field(default=None, description="URL that is told of the job's end")
    dry_run: bool = Field(default=False, description="say what the job would be and take, and store nothing")


class SubmittedBody(BaseModel):
    """The answer to a job that was stored."""

    job_id: str
    status: Literal["queued"] = "queued"
    seed: int
    warnings: list[str] = []


class PassBody(BaseModel):
    """One sampling pass of a job. Sizes in pixels."""

    phase: str
    width: int
    height: int
    sampler: str
    steps: int
    evaluations: int


class NeedBody(BaseModel):
    """What a job takes of memory, in bytes. ``budget`` and ``ram_budget`` are null where no device is known yet, or it has
    no memory of its own."""

    weights: dict[str, int] = Field(description="of each network of the model")
    activations: int = Field(description="at the job's peak, beside the weights that are there then")
    peak: int = Field(description="weights and activations on the device")
    budget: int | None
    ram: int = Field(description="weights that wait in RAM")
    ram_budget: int | None
    measures: list[str] = Field(description="what will be done so that it fits")


class DryRunBody(BaseModel):
    """What a job would be and take; nothing was stored."""

    status: Literal["success"] = "success"
    dry_run: Literal[True] = True
    seed: int
    model: str
    family: str
    passes: list[PassBody]
    evaluations: int = Field(description="of the model, in all passes")
    seconds: float | None = Field(description="how long it will probably run; null when not known")
    memory: NeedBody
    warnings: list[str] = []


class ErrorBody(BaseModel):
    """Every refusal; ``detail`` and ``error`` say the same."""

    status: Literal["error"] = "error"
    detail: str
    error: str


class StatusBody(BaseModel):
    """A job as it stands. From ``payload`` on: once it is done, or was cancelled with a picture."""

    model_config = ConfigDict(extra="allow")

    status: Literal["success"] = "success"
    job_id: str
    progress: float = Field(description="0 to 100")
    current_phase: str
    state: Literal["queued", "loading", "processing", "done", "error"]
    error: str | None = Field(description="why there is no picture, or not the whole one")
    position: int = Field(default=0, description="while it waits: how many are before it")
    eta_seconds: float | None = Field(
        default=None, description="until it ends: in how many seconds that will probably be; null when not known"
    )
    cancelled: bool = Field(default=False, description="there, and true, once it was cancelled")
    warnings: list[str] = []
    webhook: dict[str, Any] = Field(default={}, description="the URL that is told of its end, and the tries so far")
    payload: dict[str, Any] = Field(default={}, description="the body of the POST, without its pictures")
    image: str | None = Field(default=None, description="the file in base64; null when it was deleted meanwhile")
    images: list[str | None] = Field(default=[], description="with n > 1: all of them")
    output_path: str = Field(default="", description="where the service keeps the file, from its home folder")
    output_paths: list[str] = Field(default=[], description="with n > 1: all of them")
    width: int = Field(default=0, description="pixels")
    height: int = Field(default=0, description="pixels")
    file_type: Literal["jpg", "png"] = "jpg"
    jpeg_quality: int | None = None
    loras_applied: list[LoraApplied] = Field(default=[], description="with their strengths, in order")
    loras_skipped: list[LoraSkipped] = Field(default=[], description="those that were asked for in vain, and why")
    memory_steps: list[str] = Field(
        default=[], description="what was done so that it fitted into memory, planned or at the point where it ran out"
    )
    generation_time_sec: float = 0
    memory_before_mb: float = Field(default=0, description="resident on a CPU, allocated on a GPU")
    memory_after_mb: float = 0
    seed: int = 0


class ModelBody(BaseModel):
    """An installed model."""

    name: str
    label: str
    type: Literal["standard", "sdxl"]
    path: str
    family: str
    pickled: bool = Field(description="in a format that can hold code; read as data only")


class ModelsBody(BaseModel):
    """The installed models, by name."""

    status: Literal["success"] = "success"
    models: list[ModelBody]


class LabelBody(BaseModel):
    """A model's name, and a label that may stand for it."""

    name: str
    label: str


class LabelsBody(BaseModel):
    """The labels that are known, by label; the models need not be installed."""

    status: Literal["success"] = "success"
    models: list[LabelBody]
    message: str = "a label may stand for the name of its model; case, - and _ do not matter"


class LoraRow(BaseModel):
    """An installed LoRA."""

    name: str
    scale: float = 1.0
    path: str
    family: str | None = Field(description="the family of models that it is for; null where its file does not tell")
    pickled: bool


class LorasBody(BaseModel):
    """The installed LoRAs, by name."""

    status: Literal["success"] = "success"
    loras: list[LoraRow]


class UpscalerRow(BaseModel):
    """An upscaler: one that is built in, or an installed file."""

    name: str
    path: str = Field(description="internal for one that is built in")
    type: Literal["internal", "external"]
    description: str
    size_mb: float
    pickled: bool = False


class UpscalersBody(BaseModel):
    """The upscalers: those that are built in, then the installed ones by name."""

    status: Literal["success"] = "success"
    upscalers: list[UpscalerRow]


class SamplingMethodsBody(BaseModel):
    """Names for ``sampler_name`` and for ``scheduler_type``."""

    status: Literal["success"] = "success"
    sampling_methods: list[str]
    scheduler_types: list[str]


class HelloBody(BaseModel):
    """The service answers."""

    ok: bool = True


class PausedBody(BaseModel):
    """Whether waiting jobs are left to wait."""

    status: Literal["success"] = "success"
    paused: bool


class ReadyBody(BaseModel):
    """A job would be run if it was posted now; while ``loading``, as soon as the engine has loaded."""

    status: Literal["success"] = "success"
    ready: Literal[True] = True
    loading: bool
    reasons: list[str] = Field(default=[], max_length=0)


class NotReadyBody(ErrorBody):
    """A job would not be run, for these reasons."""

    ready: Literal[False] = False
    loading: bool
    reasons: list[str] = Field(min_length=1)


RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}


LINKS = {
    name: {"operationRef": f"#/paths/~1queue~1{{job_id}}/{name}", "parameters": {"job_id": "$response.body#/job_id"}}
    for name in ("get", "delete")
}
"""What can be asked of a job that was stored, for the documentation."""


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its documentation; all have one body."""
    expected: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "headers": RETRY_AFTER} if status in (503, 507) else {"model": ErrorBody}
        for status in statuses
    }
    return expected | {"default": {"model": ErrorBody, "description": "Any other refusal"}}


Wait = Annotated[
    float,
    Query(
        ge=0,
        le=60,
        allow_inf_nan=False,
        description="answer when the job has ended, or after so many seconds as it then stands",
    ),
]


Partial = Annotated[bool, Query(description="have a running job end with the picture that it has so far")]


def _visible(key: str) -> str:
    if not re.fullmatch(r"[!-~]{1,255}", key):
        raise ValueError("1 to 255 visible ASCII characters without spaces are allowed")
    return key


IdempotencyKey = Annotated[
    Annotated[str, AfterValidator(_visible)] | None,
    Header(
        alias="Idempotency-Key",
        description="sent again by the same caller within a day, with the same body, it makes no second job",
    ),
]


def mount(app: FastAPI, service: Service) -> None:
    """Add the routes of this dialect."""
    router = APIRouter(route_class=ErrorRoute, responses=_refusals())

    @router.get("/hello", tags=["service"], summary="Is it up?")
    async def hello() -> HelloBody:  # on the event loop: it answers even when every thread is busy
        return HelloBody()

    @router.get("/health", tags=["service"], summary="How the box is")
    def health() -> dict[str, Any]:
        return _health(service)

    @router.get(
        "/ready", tags=["service"], summary="Would a job be run now?", response_model=ReadyBody,
        responses={503: {"model": NotReadyBody}},
    )  # fmt: skip
    def ready() -> JSONResponse:
        return _ready(service)

    @router.get("/models", tags=["catalog"], summary="Installed models")
    def models() -> ModelsBody:
        return ModelsBody(models=[_model(model) for model in service.models()])

    @router.get("/models/aliases", tags=["catalog"], summary="Labels of models")
    def labels() -> LabelsBody:
        return LabelsBody(models=[LabelBody(name=name, label=label) for name, label in service.labels()])

    @router.get("/loras", tags=["catalog"], summary="Installed LoRAs")
    def loras() -> LorasBody:
        return LorasBody(loras=[_lora_row(row) for row in service.assets("lora")])

    @router.get("/upscalers", tags=["catalog"], summary="Upscalers")
    def upscalers() -> UpscalersBody:
        return UpscalersBody(upscalers=[*_internal_upscalers(), *map(_upscaler, service.assets("upscaler"))])

    @router.get("/sampling_methods", tags=["catalog"], summary="Samplers and schedules")
    def sampling_methods() -> SamplingMethodsBody:
        return SamplingMethodsBody(
            sampling_methods=samplers.sampling_methods(), scheduler_types=samplers.scheduler_types()
        )

    @router.post(
        "/txt2img", tags=["jobs"], summary="A picture from words",
        responses=_refusals(400, 413, 422, 503, 507) | {200: {"links": LINKS}},
    )  # fmt: skip
    def txt2img(
        body: Annotated[Txt2ImgBody, Body()], http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> SubmittedBody | DryRunBody:
        request, warnings = to_request(body, service)
        if body.dry_run:
            return _dry_run(request, warnings, service)
        payload = body.model_dump(exclude_unset=True)
        key = None if idempotency_key is None else Key.of(idempotency_key, payload)
        payload.pop("webhook", None)  # its query may hold a credential
        job = build(
            Job,
            request=request,
            payload=payload,
            warnings=tuple(warnings),
            caller=caller_of(http),
            priority=_given(body.priority, 0),
            deadline=body.deadline,
            webhook=body.webhook,
        )
        stored = service.submit(job, key=key)
        if stored.id != job.id:
            answer.headers["Idempotency-Replayed"] = "true"
        return SubmittedBody(job_id=stored.id, seed=stored.request.seed, warnings=list(stored.warnings))

    @router.get(
        "/queue/{job_id}", tags=["jobs"], summary="A job as it stands", responses=_refusals(400, 404, 410, 503),
        response_model=StatusBody,
    )  # fmt: skip
    async def queue(job_id: str, http: Request, wait: Wait = 0) -> Response:
        if wait and not await hears(http, service.wait(job_id, wait)):
            return Response(status_code=NOBODY)
        return await run_in_threadpool(_read, job_id, service)

    @router.delete(
        "/queue/{job_id}", tags=["jobs"], summary="Cancel a job", responses=_refusals(400, 404, 409, 410, 503),
        response_model=StatusBody,
    )  # fmt: skip
    async def cancel(job_id: str, http: Request, partial: Partial = False) -> Response:
        await run_in_threadpool(service.cancel, job_id, partial=partial)
        if not await hears(http, service.wait(job_id, NEXT_STEP)):
            return Response(status_code=NOBODY)
        # Asked once more: it may have ended in another way before it was heard.
        cancelled = await run_in_threadpool(service.cancel, job_id, partial=partial)
        return await run_in_threadpool(lambda: JSONResponse(_answer(cancelled, service) | {"cancelled": True}))

    @router.post("/queue/pause", tags=["queue"], summary="Let no job begin", responses=_refusals(503, 507))
    def pause() -> PausedBody:
        service.pause()
        return PausedBody(paused=True)

    @router.post("/queue/resume", tags=["queue"], summary="Let jobs begin again", responses=_refusals(503, 507))
    def resume() -> PausedBody:
        service.resume()
        return PausedBody(paused=False)

    app.include_router(router)


def to_request(body: Txt2ImgBody, service: Service) -> tuple[Txt2Img, list[str]]:
    """The frozen request that a body means, and what the caller should know. Raises InvalidRequest."""
    warnings = _unknown_fields(list(body.model_extra or {}))
    if body.infotext:
        body, notes = _filled(body, service)
        warnings += notes
    prompt, negative_prompt, notes = _styled(body, service)
    warnings += notes
    model = service.model(body.model)
    body = _defaulted(body, model)
    sampler, schedule = samplers.resolve(body.sampler_name or DEFAULT_SAMPLER, body.scheduler_type)
    width, width_note = round_size(_given(body.width, model.default_size[0]), "width", model.multiple)
    height, height_note = round_size(_given(body.height, model.default_size[1]), "height", model.multiple)
    warnings += [note for note in (width_note, height_note) if note]
    loras = tuple(_lora(lora) for lora in body.loras or [])
    warnings += _absent([*(("lora", lora.name) for lora in loras), *_networks(prompt)], service)
    if body.refiner_checkpoint:
        warnings.append(f"refiner_checkpoint is ignored: model {model.name!r} is no SDXL model")
    file_type = (body.fileType or "jpg").lower()
    if file_type not in FILE_TYPES:
        raise InvalidRequest(f"fileType is {body.fileType!r}; one of jpg, png", field="fileType")
    first = build(
        Txt2Img,
        model=model.name,
        prompt=prompt,
        negative_prompt=negative_prompt,
        steps=_given(body.steps, 30),
        guidance_scale=_given(body.cfg_scale, 7.0),
        width=width,
        height=height,
        sampler=sampler.name,
        schedule=schedule.name,
        seed=resolve_seed(body.seed),
        count=_given(body.n, 1),
        loras=loras,
        vae=_vae(body.vae, service),
        **_noise(body),
        **{name: value for name in OPTIONS if (value := getattr(body, name)) is not None},
        output=build(Output, format=FILE_TYPES[file_type], quality=_given(body.jpeg_quality, 85)),
    )
    hires, notes = _hires(body.hires, first, service)
    return first.model_copy(update={"hires": hires}), warnings + notes


def _hires(body: HiresBody | None, first: Txt2Img, service: Service) -> tuple[Hires | None, list[str]]:
    """The second pass that a body means, and what the caller should know of it. Raises InvalidRequest."""
    if body is None or not body.enabled:
        forgotten = body is not None and body.enabled is None and body.model_fields_set
        return None, ['hires is left out: it is not enabled; add "enabled": true'] if forgotten else []
    scaled = [round(side * body.scale) for side in (first.width, first.height)]
    sides = [_given(given, side) for given, side in zip((body.width or None, body.height or None), scaled, strict=True)]
    (width, one), (height, other) = (
        round_size(side, f"hires.{name}") for side, name in zip(sides, ("width", "height"), strict=True)
    )
    notes = [note for note in (one, other) if note and sides != scaled]
    if width <= first.width and height <= first.height:
        return None, [f"hires is left out: {width}x{height} is no larger than the first pass"]
    model = first.model
    if body.model:
        model = service.model(body.model).name
    if service.model(model).whole:
        raise InvalidRequest(
            f"hires: model {model!r} is drawn by a pipeline of its own, in one pass; leave it out", field="hires"
        )
    sampler, schedule = first.sampler, first.schedule
    if body.sampler_name or body.scheduler_type:
        label = body.sampler_name or samplers.sampler(sampler).label
        found = samplers.resolve(label, body.scheduler_type or schedule)
        sampler, schedule = found[0].name, found[1].name
    return build(
        Hires,
        upscaler=_upscaler_name(body.upscaler, service),
        width=width,
        height=height,
        steps=body.steps or first.steps,
        strength=body.denoising_strength,
        sampler=sampler,
        schedule=schedule,
        model=model,
        prompt=body.prompt or first.prompt,
        negative_prompt=body.negative_prompt or first.negative_prompt,
    ), notes


def _upscaler_name(name: str, service: Service) -> str:
    """The upscaler that a body means, whatever its case. Raises InvalidRequest with the choices."""
    own = [row.name for row in service.assets("upscaler")]
    found = next((known for known in (*INTERNAL, *own) if known.lower() == name.lower()), None)
    if found is None and (row := service.asset("upscaler", name)):
        found = row.name
    if found is None:
        raise InvalidRequest(
            f"External upscaler model not found: {name!r}; one of {', '.join((*INTERNAL, *own))}", field="upscaler"
        )
    return found


def _filled(body: Txt2ImgBody, service: Service) -> tuple[Txt2ImgBody, list[str]]:
    """The body with what its infotext says of all that it leaves out, and what the infotext says in vain."""
    told, unused = infotext.asked(infotext.parse(body.infotext or ""))
    notes = [f"infotext: {', '.join(unused[:MAX_UNKNOWN])} is not used here"] if unused else []
    said = body.model_dump(exclude_unset=True, exclude_none=True)
    fields = {IN_BODY.get(name, name): value for name, value in told.items()} | said
    if "model" in told and "model" not in said:
        try:
            service.model(str(told["model"]))
        except UnknownModel as error:
            try:
                default = service.model(None)
            except InvalidRequest:
                raise UnknownModel(f"infotext: {error}", field="infotext") from error
            del fields["model"]
            notes.append(f"infotext: model {told['model']!r} is not installed; {default.name!r} is used")
    upscaler = told.get("hires", {}).get("upscaler")
    if upscaler and "hires" not in said:
        try:
            _upscaler_name(str(upscaler), service)
        except InvalidRequest as error:
            raise InvalidRequest(f"infotext: {error}", field="infotext") from error
    if "vae" in told and "vae" not in said and service.asset("vae", str(told["vae"])) is None:
        del fields["vae"]
        notes.append(f"infotext: vae {told['vae']!r} is not installed; the model's own is used")
    filled = build(Txt2ImgBody, **fields)
    try:
        samplers.resolve(filled.sampler_name or DEFAULT_SAMPLER, filled.scheduler_type)
    except UnknownSampler as error:
        if {"sampler_name", "scheduler_type"} & said.keys():
            raise
        raise UnknownSampler(f"infotext: {error}", field="infotext") from error
    return filled, notes


def _styled(body: Txt2ImgBody, service: Service) -> tuple[str, str, list[str]]:
    """Both prompts with the body's styles around them, and which of these are not known. Raises TooLarge."""
    prompt, negative_prompt, notes = body.prompt, body.negative_prompt or "", []
    if body.styles:
        known = service.styles()
        prompt, negative_prompt = uncommented(prompt), uncommented(negative_prompt)
        for name in body.styles:
            if name in known:
                prompt, negative_prompt = known[name].around(prompt, negative_prompt)
                service.check_length(prompt, negative_prompt)  # each of them may double it
            else:
                notes.append(f"style {name[:LONGEST_NAME]!r} is not known and was skipped" + _near(name, known))
    return prompt, negative_prompt, notes


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _noise(body: Txt2ImgBody) -> dict[str, Any]:
    """The variation and the other size of the noise, each whole or not there at all."""
    fields: dict[str, Any] = {}
    if body.variation_strength:
        seed = resolve_seed(body.variation_seed, "variation_seed")
        fields |= {"variation_seed": seed, "variation_strength": body.variation_strength}
    width, height = (_given(side, 0) // 8 * 8 for side in (body.seed_resize_width, body.seed_resize_height))
    if width > 0 and height > 0:
        fields |= {"seed_resize_width": width, "seed_resize_height": height}
    return fields


def _lora(body: LoraBody | str) -> LoraUse:
    return LoraUse(name=body) if isinstance(body, str) else LoraUse(**body.model_dump())


def _networks(prompt: str) -> list[tuple[str, str]]:
    return [(network.kind, network.name) for network in parse(prompt).networks]


def _absent(networks: list[tuple[str, str]], service: Service) -> list[str]:
    """What to tell the caller of networks that no job will find. Whether a LoRA fits the model is seen when it runs."""
    warnings = []
    for kind, name in dict.fromkeys(networks):
        if kind != "lora":
            warnings.append(f"<{kind}:{name}> was taken out of the prompt: no such kind of network is known; {KNOWN}")
        elif service.asset("lora", name) is None:
            warnings.append(lora_skipped(name, NOT_INSTALLED))
    return warnings


def _vae(name: str | None, service: Service) -> str | None:
    """The VAE that a request means. Raises InvalidRequest with the choices."""
    if name is None or name.lower() == "automatic":
        return None
    if name.lower() == "none":
        return OWN_VAE
    row = service.asset("vae", name)
    if row is None:
        choices = ", ".join(["Automatic", OWN_VAE, *(row.name for row in service.assets("vae"))])
        raise InvalidRequest(f"vae {name!r} is not installed; one of {choices}", field="vae")
    return row.name


def _defaulted(body: Txt2ImgBody, model: Model) -> Txt2ImgBody:
    """The body with the model's own defaults in place of what it leaves out."""
    profile = model.profile
    names = ("steps", "clip_skip", "vae")
    defaults: dict[str, Any] = {name: getattr(profile, name) for name in names} | {"cfg_scale": profile.guidance_scale}
    if profile.sampler and body.sampler_name is None:
        sampler, schedule = samplers.resolve(profile.sampler, body.scheduler_type)
        defaults |= {"sampler_name": sampler.label, "scheduler_type": schedule.name}
    left_out = {
        name: value
        for name, value in defaults.items()
        if value is not None and name in Txt2ImgBody.model_fields and getattr(body, name) is None
    }
    return body.model_copy(update=left_out)


def _model(model: Model) -> ModelBody:
    return ModelBody(
        name=model.name,
        label=model.label,
        type=model.type,
        path=model.shown_path,
        family=model.family,
        pickled=model.pickled,
    )


def _lora_row(row: Asset) -> LoraRow:
    return LoraRow(name=row.name, path=row.shown_path, family=row.family, pickled=row.pickled)


def _internal_upscalers() -> list[UpscalerRow]:
    return [
        UpscalerRow(name=name, path="internal", type="internal", description=text, size_mb=0)
        for name, text in INTERNAL.items()
    ]


def _upscaler(row: Asset) -> UpscalerRow:
    return UpscalerRow(
        name=row.name,
        path=row.shown_path,
        type="external",
        description="a model of its own",
        size_mb=round(row.bytes / 2**20, 1),
        pickled=row.pickled,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _unknown_fields(names: list[str]) -> list[str]:
    """What to tell the caller of fields that mean nothing here. Raises InvalidRequest when that would be a book."""
    if len(names) > MAX_UNKNOWN:
        raise InvalidRequest(f"the body has {len(names)} fields that are not known; at most {MAX_UNKNOWN} are ignored")
    return [_unknown(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...") for name in names]


def _unknown(name: str) -> str:
    return f"unknown field {name!r} was ignored" + _near(name, Txt2ImgBody.model_fields)


def _dry_run(request: Txt2Img, warnings: list[str], service: Service) -> DryRunBody:
    found = service.estimate(request)
    room = found.room
    return DryRunBody(
        seed=request.seed,
        model=found.model.name,
        family=found.model.family,
        passes=[
            PassBody(
                phase=each.phase, width=each.width, height=each.height, sampler=each.sampler, steps=each.steps,
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
        warnings=warnings,
    )  # fmt: skip


def ended(job: Job) -> dict[str, Any]:
    """What a webhook is told of a job's end: its status, without the pictures."""
    return _status(Snapshot(job))


def _read(job_id: str, service: Service) -> Response:
    """The answer about a job; built before the result is let go of, if it may be read once."""
    snapshot = service.get(job_id)
    answer = JSONResponse(_answer(snapshot, service))
    service.was_read(snapshot)
    return answer


def _answer(snapshot: Snapshot, service: Service) -> dict[str, Any]:
    answer = _status(snapshot) | _pictures(snapshot.job, service)
    if not snapshot.state.terminal:
        left = service.seconds_left(snapshot)
        answer["eta_seconds"] = None if left is None else round(left, 1)
    if webhook := service.webhook(snapshot.job):
        answer["webhook"] = webhook
    return answer


def _status(snapshot: Snapshot) -> dict[str, Any]:
    job, progress, position = snapshot.job, snapshot.progress, snapshot.position
    state = State.ERROR if snapshot.state is State.CANCELLED else snapshot.state
    if progress and not job.begun:  # in the hands of a worker, and waiting for the device
        state, progress, position = State.QUEUED, None, 0
    done = job.state is State.DONE
    answer: dict[str, Any] = {
        "status": "success",
        "job_id": job.id,
        "progress": 100 if done else round(100 * progress.fraction, 2) if progress else 0,
        "current_phase": progress.phase if progress else state.value,
        "state": state.value,
        "error": job.error.message if job.error else None,
    }
    if position is not None:
        answer["position"] = position
    if job.warnings:
        answer["warnings"] = list(job.warnings)
    if job.state is State.CANCELLED:
        answer["cancelled"] = True
    if job.result:
        answer |= _result(job, job.result)
    return answer


def _result(job: Job, result: Result) -> dict[str, Any]:
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
            "jpeg_quality": output.quality if output.format == "jpeg" else None,
            "generation_time_sec": round(result.seconds, 3),
            "memory_before_mb": round(result.memory_before_mb, 2),
            "memory_after_mb": round(result.memory_after_mb, 2),
            "seed": image.seed,
        }
    )


def _pictures(job: Job, service: Service) -> dict[str, Any]:
    if not job.result:
        return {}
    encoded = [_base64(service.image(image)) for image in job.result.images]
    return {"image": encoded[0]} | ({"images": encoded} if len(encoded) > 1 else {})


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


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
