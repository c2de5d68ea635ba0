"""What callers send to the native API, and what they are answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from typing_extensions import TypeAliasType

from diffusion_api.dialects._base import MAX_SIDE
from diffusion_api.dialects._health import ModelHealthBody
from diffusion_api.dialects.native import examples
from diffusion_api.schema.job import LoraApplied, LoraSkipped, Safety
from diffusion_api.schema.request import (
    MAX_HIRES_SCALE,
    MAX_LORA_SCALE,
    MAX_SEED,
    Emphasis,
    Fill,
    Format,
    Policy,
    ResizeMode,
    Source,
)

MAX_UNKNOWN = 100
"""Fields of a body that are ignored with a warning each; looking for a near name takes its time."""

PICTURE = "a PNG, JPEG, WebP, GIF or AVIF in base64, as a data URL, or at a URL of a host that the operator allows"

MAX_DEADLINE = 7 * 24 * 3600
"""Seconds."""

RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its documentation; all have one body."""
    expected: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "headers": RETRY_AFTER} if status in (429, 503, 507) else {"model": ErrorBody}
        for status in statuses
    }
    return expected | {"default": {"model": ErrorBody, "description": "Any other refusal"}}


def _like(*values: Any, more: bool = False) -> ConfigDict:
    """The configuration of a body that the documentation shows so; ``more`` if it may have fields that are not known."""
    shown = ConfigDict(json_schema_extra={"examples": [*values]})
    return shown | ConfigDict(extra="allow") if more else shown


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    parts = get_args(annotation)
    return {annotation}.union(*map(_kinds, parts)) if parts else {annotation}


class Sent(BaseModel):
    """What a caller sends. What is not known in it is ignored with a warning; true and false are no numbers."""

    model_config = ConfigDict(extra="allow")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("Input should be a valid number")
        return value


def _also(name: str, *others: str) -> AliasChoices:
    """The names that a field of a body may have: its own one, and A1111's."""
    return AliasChoices(name, *others)


def _word(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _source(value: Any) -> Any:
    return "nv" if (word := _word(value)) == "gpu" else word


def _numbered(choices: Any) -> Callable[[Any], Any]:
    """Understands words, in any case, and the numbers that A1111's API has for them."""
    numbered = {str(number): word for number, word in enumerate(get_args(choices))}
    return lambda value: numbered.get(str(value), _word(value))


Factor = Annotated[float, Field(gt=0, le=16, allow_inf_nan=False)]


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


class LoraBody(Sent):
    """A LoRA by name, or by its path as the service shows it, with its strength."""

    name: str = Field(validation_alias=_also("name", "path"))
    scale: float = Field(default=1.0, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)
    text_scale: float | None = Field(
        default=None,
        ge=-MAX_LORA_SCALE,
        le=MAX_LORA_SCALE,
        description="strength on the text encoders; that of scale when left out",
    )


class HiresBody(Sent):
    """A second pass at a larger size. What is left out is as in the first."""

    enabled: bool | None = None
    scale: float = Field(
        default=2.0, gt=0, le=MAX_HIRES_SCALE, allow_inf_nan=False, description="without width and height"
    )
    width: int | None = Field(
        default=None, description="pixels, in place of scale; in proportion to height when left out"
    )
    height: int | None = Field(
        default=None, description="pixels, in place of scale; in proportion to width when left out"
    )
    upscaler: str = Field(default="Latent", description="a name of /upscalers")
    steps: int | None = Field(default=20, ge=0, description="0: as many as the first pass")
    denoising_strength: float = Field(default=0.4, ge=0, le=1, description="how much is drawn anew")
    sampler_name: str | None = None
    scheduler_type: str | None = None
    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


HIRES = 'it is an object, as {"enabled": true, "scale": 2}, with ' + ", ".join(HiresBody.model_fields)
LORAS = "it is a list of names, or of objects with name (or path), scale and text_scale"


def _object(value: Any) -> Any:
    """An object, without what is null in it: that counts as left out."""
    if isinstance(value, dict):
        return {name: part for name, part in value.items() if part is not None}
    if value is None or isinstance(value, HiresBody):
        return value
    raise ValueError(HIRES)


def _list(value: Any) -> Any:
    if value is None or isinstance(value, list):
        return value
    raise ValueError(LORAS)


def _kind(value: Any) -> str | None:
    return "name" if isinstance(value, str) else "object" if isinstance(value, dict | LoraBody) else None


Lora = Annotated[
    Annotated[str, Tag("name")] | Annotated[LoraBody, Tag("object")],
    Discriminator(_kind, custom_error_type="lora", custom_error_message=LORAS),
]


class JobBody(Sent):
    """What a body says of its job, whatever that is. Fields that are not known are ignored with a warning."""

    fileType: str | None = Field(default=None, description="jpg, png, webp, avif or gif; jpg when left out")
    jpeg_quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        validation_alias=_also("jpeg_quality", "quality"),
        description="of jpg, webp and avif; 85 when left out",
    )
    lossless: bool | None = Field(default=None, description="true: a webp that loses nothing, as png is")
    priority: int | None = Field(default=None, ge=-9, le=9, description="higher runs first; 0 when left out")
    deadline: float | None = Field(
        default=None,
        gt=0,
        le=MAX_DEADLINE,
        description="seconds that the job may run; the operator's when left out",
    )
    webhook: str | None = Field(default=None, description="URL that is told of the job's end")
    safety_filter: bool | None = Field(
        default=None,
        description="true: have pictures blurred that the safety checker flags; the operator's policy, where it is stricter",
    )
    dry_run: bool = Field(default=False, description="say what the job would be and take, and store nothing")


class SamplingBody(JobBody):
    """What a body says of pictures that a model draws. Every field may be left out; numbers may come as strings."""

    prompt: Annotated[str, BeforeValidator(_or_empty)] = ""
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
    sigma_min: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="lowest noise level but 0; 0: the schedule's own"
    )
    sigma_max: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="highest noise level; 0: the schedule's own"
    )
    rho: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="of karras and polyexponential; 0: the schedule's own"
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
    loras: Annotated[list[Lora] | None, BeforeValidator(_list)] = Field(
        default=None, description="beside those that the prompt names as <lora:name:scale>"
    )
    vae: str | None = Field(
        default=None,
        validation_alias=_also("vae", "sd_vae"),
        description="a VAE by name; None: the model's own; Automatic, also when left out: the one named like the model",
    )
    refiner_checkpoint: str | None = Field(
        default=None, description="an SDXL model that draws the last steps of a picture of another"
    )
    refiner_switch_at: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, description="share of the steps before that; 0.8 when left out"
    )
    tiling: bool | None = Field(default=None, description="opposite edges fit each other")
    preview_every: int | None = Field(
        default=None,
        ge=0,
        description="steps after which there is a small picture of what is drawn; 0, none, when left out",
    )


class Txt2ImgBody(SamplingBody):
    """The body of ``POST /txt2img``. Every field may be left out; numbers may come as strings."""

    model_config = _like(*examples.TXT2IMG)

    hires: Annotated[HiresBody | None, BeforeValidator(_object)] = None
    image: str | None = Field(
        default=None, description="a picture in base64, or as a data URL: the infotext in it counts, not its pixels"
    )


class SizeBody(Sent):
    """A size in pixels. A side that is left out keeps the proportions."""

    width: int | None = None
    height: int | None = None


class FactorsBody(Sent):
    """How many times as wide and as high."""

    width: Factor = 1.0
    height: Factor = 1.0


def _kind_of_factors(value: Any) -> str:
    return "sides" if isinstance(value, dict | FactorsBody) else "both"


Factors = Annotated[
    Annotated[Factor, Tag("both")] | Annotated[FactorsBody, Tag("sides")], Discriminator(_kind_of_factors)
]


class Img2ImgBody(SamplingBody):
    """The body of ``POST /img2img`` and ``POST /inpaint``: what ``POST /txt2img`` takes, and pictures to begin with."""

    model_config = _like(*examples.IMG2IMG)

    image: str | None = Field(
        default=None,
        validation_alias=_also("image", "init_image"),
        description=f"the picture to begin with: {PICTURE}; required",
    )
    denoising_strength: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        validation_alias=_also("denoising_strength", "strength"),
        description="how much of it is drawn anew; 0.75 when left out",
    )
    resize_mode: Annotated[ResizeMode, BeforeValidator(_numbered(ResizeMode))] | None = Field(
        default=None, description="how it is brought to the size; just resize when left out"
    )
    resize_to: SizeBody | None = Field(default=None, description="the size, before resize_by, width and height")
    resize_by: Factors | None = Field(
        default=None,
        validation_alias=_also("resize_by", "resized_by"),
        description="the size as a factor of that of image, or one for each side; before width and height",
    )
    initial_noise_multiplier: float | None = Field(
        default=None, ge=0, le=2, allow_inf_nan=False, description="of the noise that is added; 1 when left out"
    )
    image_guidance_scale: float | None = Field(
        default=None, description="has no effect; models that are told how to edit a picture would know it"
    )
    apply_loras: bool | None = Field(
        default=None, description="let loras work on /img2img, which ignores them unless the operator says otherwise"
    )
    mask: str | None = Field(
        default=None,
        validation_alias=_also("mask", "mask_image"),
        description="a picture of the same size, white or opaque where image is painted anew; required on /inpaint",
    )
    mask_blur: float | None = Field(
        default=None, ge=0, le=256, allow_inf_nan=False, description="of its edge, pixels; 4 when left out"
    )
    mask_invert: bool | None = Field(
        default=None,
        validation_alias=_also("mask_invert", "inpainting_mask_invert"),
        description="paint anew where it is black or transparent",
    )
    mask_fill: Annotated[Fill, BeforeValidator(_numbered(Fill))] | None = Field(
        default=None,
        validation_alias=_also("mask_fill", "inpainting_fill"),
        description="what is under it to begin with; fill, the blurred surroundings, when left out",
    )
    only_masked: bool | None = Field(
        default=None,
        validation_alias=_also("only_masked", "inpaint_full_res"),
        description="draw only what is around the mask, at the size of the request, and paste it back",
    )
    mask_padding: int | None = Field(
        default=None,
        ge=0,
        le=2048,
        validation_alias=_also("mask_padding", "inpaint_full_res_padding"),
        description="pixels around the mask that are drawn with only_masked; 32 when left out",
    )


class UpscaleBody(JobBody):
    """The body of ``POST /upscale``."""

    model_config = _like(*examples.UPSCALE)

    image: str | None = Field(
        default=None,
        validation_alias=_also("image", "init_image"),
        description=f"{PICTURE}; required",
    )
    upscaler: str | None = Field(
        default=None,
        validation_alias=_also("upscaler", "upscaler_1"),
        description="a name of /upscalers that does not begin with Latent; Lanczos when left out",
    )
    scale: Factor | None = Field(
        default=None,
        validation_alias=_also("scale", "upscaling_resize"),
        description="how many times as wide and as high, where no size is given; 2 when left out",
    )
    width: int | None = Field(
        default=None,
        validation_alias=_also("width", "upscaling_resize_w"),
        description="pixels; in proportion to height when left out",
    )
    height: int | None = Field(
        default=None,
        validation_alias=_also("height", "upscaling_resize_h"),
        description="pixels; in proportion to width when left out",
    )


class SubmittedBody(BaseModel):
    """The answer to a job that was stored."""

    model_config = _like(examples.SUBMITTED)

    job_id: str
    status: Literal["queued"] = "queued"
    seed: int | None = Field(description="null where nothing is drawn")
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


class UpscaleDryRunBody(BaseModel):
    """What an upscaling would be; nothing was stored."""

    model_config = _like(examples.UPSCALE_DRY_RUN)

    status: Literal["success"] = "success"
    dry_run: Literal[True] = True
    upscaler: str
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    seconds: float | None = Field(description="how long it will probably run; null when not known")
    warnings: list[str] = []


class DryRunBody(BaseModel):
    """What a job would be and take; nothing was stored."""

    model_config = _like(examples.DRY_RUN)

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


_Answered = Field(description="that the job was stored, or with dry_run what it would be")
Posted = TypeAliasType("Posted", Annotated[SubmittedBody | DryRunBody, _Answered])
PostedUpscale = TypeAliasType("PostedUpscale", Annotated[SubmittedBody | UpscaleDryRunBody, _Answered])


class ErrorBody(BaseModel):
    """Every refusal; ``detail`` and ``error`` say the same."""

    model_config = _like(examples.ERROR)

    status: Literal["error"] = "error"
    detail: str
    error: str


class ReproducesBody(BaseModel):
    """The job that a job makes again."""

    job_id: str
    matched: bool | None = Field(description="whether the pixels are the same; null until it is done")
    differences: list[str] = Field(description="versions, device and files that were not the same")


class StatusBody(BaseModel):
    """A job as it stands. From ``payload`` on: once it is done, or was cancelled with a picture."""

    model_config = _like(examples.RUNNING, examples.DONE, examples.CANCELLED, more=True)

    status: Literal["success"] = "success"
    job_id: str
    progress: float = Field(description="0 to 100")
    current_phase: str
    state: Literal["queued", "loading", "processing", "done", "error"]
    error: str | None = Field(description="why there is no picture, or not the whole one")
    detail: str = Field(default="", description="there where there is an error, and the same")
    position: int = Field(default=0, description="while it waits: how many are before it")
    eta_seconds: float | None = Field(
        default=None, description="until it ends: in how many seconds that will probably be; null when not known"
    )
    preview: str = Field(
        default="", description="while it runs, with preview_every: a small JPEG in base64 of what is drawn"
    )
    cancelled: bool = Field(default=False, description="there, and true, once it was cancelled")
    warnings: list[str] = []
    webhook: dict[str, Any] = Field(default={}, description="the URL that is told of its end, and the tries so far")
    reproduces: ReproducesBody | None = Field(default=None, description="there for a job that makes another one again")
    payload: dict[str, Any] = Field(default={}, description="the body of the POST, without its pictures")
    image: str | None = Field(default=None, description="the file in base64; null when it was deleted meanwhile")
    images: list[str | None] = Field(default=[], description="with n > 1: all of them")
    image_url: str = Field(
        default="", description="opens the picture without a key for a day; a path, where the service has no public URL"
    )
    image_urls: list[str] = Field(default=[], description="with n > 1: all of them")
    output_path: str = Field(default="", description="where the service keeps the file, from its home folder")
    output_paths: list[str] = Field(default=[], description="with n > 1: all of them")
    caption: str = Field(default="", description="of a job that finds words for a picture: the words")
    embeddings: dict[str, Any] | None = Field(
        default=None,
        description="of a job that turns a picture into numbers: CLIP_embeddings and vae_emb; null when they were deleted",
    )
    width: int = Field(default=0, description="pixels")
    height: int = Field(default=0, description="pixels")
    file_type: Literal["jpg", "png", "webp", "avif", "gif"] = "jpg"
    jpeg_quality: int | None = Field(default=None, description="null where nothing is lost, or 256 colours are left")
    loras_applied: list[LoraApplied] = Field(default=[], description="with their strengths, in order")
    loras_skipped: list[LoraSkipped] = Field(default=[], description="those that were asked for in vain, and why")
    memory_steps: list[str] = Field(
        default=[], description="what was done so that it fitted into memory, planned or at the point where it ran out"
    )
    generation_time_sec: float = 0
    memory_before_mb: float = Field(default=0, description="resident on a CPU, allocated on a GPU")
    memory_after_mb: float = 0
    seed: int | None = Field(default=0, description="null where nothing is drawn")
    safety: Safety = Field(
        default=Safety(), description="what was done about pictures that the safety checker flags, and which it flagged"
    )
    denoising_strength: float = Field(default=0.75, description="of a job that brought a picture along, like the rest")
    resize_mode: ResizeMode = "just resize"
    resize_to: SizeBody | None = None
    resize_by: float | FactorsBody | None = None


class PolledBody(BaseModel):
    """A job as it stands, in the words in which programs of the original API ask for it."""

    model_config = _like(examples.POLLED)

    job_id: str
    status: Literal["queued", "loading", "processing", "completed", "error"]
    progress: float = Field(description="0 to 1")
    phase: str
    output: str | None = Field(description="where the service keeps the picture; null until it is there")
    detail: str | None = Field(description="why there is no picture")


class ImgInfoBody(BaseModel):
    """The body of ``POST /img-info``."""

    model_config = _like({"image": examples.DOT})

    image: str | None = Field(default=None, description="a picture in base64, or as a data URL")


class InfoBody(BaseModel):
    """What a picture says of itself."""

    model_config = _like(examples.INFO)

    status: Literal["success"] = "success"
    info: str = Field(description="the infotext as it was written; empty when there is none")
    items: dict[str, str] = Field(description="all other texts in the file, by keyword")
    parameters: dict[str, Any] = Field(
        description="the infotext taken apart: prompt, negative_prompt, and its fields; empty when there is none"
    )
    format: Format = Field(description="of the file, whatever its name")
    width: int = Field(description="pixels, upright")
    height: int


class JobRow(BaseModel):
    """A job in a list: how it stands, and what it is, without its pictures. Times in epoch seconds."""

    job_id: str
    kind: Literal["txt2img", "img2img", "upscale", "caption", "embed"]
    state: Literal["queued", "loading", "processing", "done", "error"]
    cancelled: bool = False
    progress: float = Field(description="0 to 100")
    current_phase: str
    error: str | None
    position: int | None = Field(default=None, description="while it waits: how many are before it")
    model: str | None = Field(default=None, description="null for a job that draws nothing")
    prompt: str | None = Field(default=None, description="its beginning")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    steps: int | None = None
    seed: int | None = None
    n: int = 1
    priority: int
    created: float
    started: float | None
    finished: float | None
    generation_time_sec: float | None = None
    pictures: int = Field(default=0, description="how many there are to fetch")


class JobsBody(BaseModel):
    """Jobs, newest first."""

    model_config = _like(examples.JOBS)

    status: Literal["success"] = "success"
    jobs: list[JobRow]
    next: str | None = Field(description="the cursor with which the list goes on; null at its end")


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

    model_config = _like(examples.MODELS)

    status: Literal["success"] = "success"
    models: list[ModelBody]


class LabelBody(BaseModel):
    """A model's name, and a label that may stand for it."""

    name: str
    label: str
    installed: bool


class LabelsBody(BaseModel):
    """The labels that are known, by label; the models need not be installed."""

    model_config = _like(examples.LABELS)

    status: Literal["success"] = "success"
    models: list[LabelBody]
    message: str = "a label may stand for the name of its model; case, - and _ do not matter"


class LoraRow(BaseModel):
    """An installed LoRA."""

    name: str
    scale: float = 1.0
    path: str
    family: str | None = Field(description="the family of models that it is for; null where its file does not tell")
    trigger_words: list[str] = Field(
        description="those that its maker published, else the phrase in its file, else the tags that it was trained with "
        "most often"
    )
    usage_rights: str | None = Field(description="what may be sold, in Civitai's words; null where that is not known")
    allow_no_mention: bool | None = Field(
        description="whether its maker need not be named; null where that is not known"
    )
    hash: str | None = Field(
        description="12 hex digits by which A1111 knows it, as in an infotext; null until made, soon after the first look"
    )
    autov2: str | None = Field(description="the first 10 hex digits of the file's SHA-256; null until it was made")
    pickled: bool


class LorasBody(BaseModel):
    """The installed LoRAs, by name."""

    model_config = _like(examples.LORAS)

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

    model_config = _like(examples.UPSCALERS)

    status: Literal["success"] = "success"
    upscalers: list[UpscalerRow]


class SamplingMethodsBody(BaseModel):
    """Names for ``sampler_name`` and for ``scheduler_type``."""

    model_config = _like(examples.SAMPLING_METHODS)

    status: Literal["success"] = "success"
    sampling_methods: list[str]
    scheduler_types: list[str]


class ParameterBody(BaseModel):
    """A field of a body. What is null does not apply."""

    type: list[str] = Field(description="JSON types that it may have, beside null")
    minimum: float | None
    maximum: float | None
    multiple: int | None = Field(default=None, description="what it is rounded to a multiple of")
    choices: list[Any] | None
    default: Any = Field(description="what it means to leave it out; null for nothing, or for what the job then says")
    description: str
    fields: dict[str, ParameterBody] | None = Field(description="those of an object")


class ModelFacts(BaseModel):
    """What a model is. Sizes in pixels."""

    name: str
    label: str
    type: Literal["standard", "sdxl"]
    family: str
    native_size: int = Field(description="the side that it was trained at")
    width: int = Field(description="of a request that names none")
    height: int
    multiple: int = Field(description="what width and height are rounded to a multiple of")


class SafetyFacts(BaseModel):
    """What is done about pictures that a safety checker flags."""

    policy: Policy = Field(description="the operator's, for every request")
    checker: bool = Field(description="whether one is installed that looks at the pictures of this model")


class CapabilitiesBody(BaseModel):
    """What may be asked of a model."""

    model_config = _like(examples.CAPABILITIES)

    status: Literal["success"] = "success"
    model: ModelFacts
    features: list[str] = Field(description="those of txt2img, img2img, inpaint, hires and refiner that work with it")
    safety: SafetyFacts
    limits: dict[str, float] = Field(description="the operator's, by setting; 0 is none")
    parameters: dict[str, dict[str, ParameterBody]] = Field(description="of the bodies of each route, by field")
    sampling_methods: list[str]
    scheduler_types: list[str]
    file_types: list[str]
    upscalers: list[str]
    vaes: list[str]
    loras: list[str] = Field(description="installed ones of its family, and of an unknown one")


class HelloBody(BaseModel):
    """The service answers."""

    model_config = _like({"ok": True})

    ok: bool = True


class SystemBody(BaseModel):
    """The machine."""

    cpu_count: int
    memory_total_gb: float
    memory_available_gb: float
    memory_percent: float = Field(description="in use")
    disk_usage_percent: float


class GpuBody(BaseModel):
    """What pictures are made on. The keys beside ``device_name`` depend on what that is."""

    model_config = ConfigDict(extra="allow")

    device_name: str
    cuda_available: bool | None = None
    cuda_version: str | None = None
    gpu_count: int | None = None
    current_device: int | None = None
    memory_allocated_gb: float | None = None
    memory_reserved_gb: float | None = None
    mps_available: bool | None = None


class HeldModelBody(BaseModel):
    """A model in memory."""

    name: str
    where: Literal["device", "ram"]
    mb: float


class WorkerBody(BaseModel):
    """A process that makes pictures."""

    state: Literal["running", "idle"]
    device_name: str | None = Field(description="null until its engine has loaded")
    jobs: int = Field(description="in hand: one on the device, and one that is saved or will be next")
    seconds_since_event: float = Field(description="since one of them last moved")
    restarts: int
    memory_budget_gb: float | None = Field(default=None, description="for models and jobs; null where none is known")
    models_in_memory: list[HeldModelBody] = Field(default=[], description="the last used at the end")


class InstalledBody(BaseModel):
    """What a folder has of something. ``directory`` is seen from the service's home."""

    count: int
    directory: str


class QueueBody(BaseModel):
    """The jobs that wait or run."""

    active_jobs: int | None = Field(description="null when the queue cannot be read")
    paused: bool
    directory: str


class OutputsBody(BaseModel):
    """Where pictures are kept."""

    available: bool = Field(description="whether a file can be written there")
    free_space_gb: float
    directory: str


class UsageBody(BaseModel):
    """What a folder takes on the disk."""

    bytes: int
    files: int


class HealthBody(BaseModel):
    """How the box is. A caller without a key, where one is needed, is told ``status`` and ``timestamp`` alone."""

    model_config = _like(examples.HEALTH, more=True)

    status: Literal["healthy", "warning", "error"]
    timestamp: float = Field(description="epoch seconds")
    version: str = ""
    system: SystemBody | None = None
    gpu: GpuBody | None = None
    workers: list[WorkerBody] = []
    models: InstalledBody | None = None
    loras: InstalledBody | None = None
    queue: QueueBody | None = None
    outputs: OutputsBody | None = None
    disk: dict[str, UsageBody] = Field(default={}, description="by folder")
    warnings: list[str] = Field(default=[], description="there where status is warning")
    timestamp_iso: str = Field(default="", description="the same time for clients of the backend API")
    model_status: ModelHealthBody | None = Field(default=None, description="for clients of the backend API")
    service: str = Field(default="", description="this and the next two are for clients of the configuration API")
    buffer_accessible: bool = Field(default=False, description="a worker has told its device")
    model_loaded: bool = Field(default=False, description="a model is in memory")


class LoadingBody(BaseModel):
    """The model will be loaded when the jobs at hand are done."""

    model_config = _like({"status": "success", "model": "stable-diffusion-v1-5"})

    status: Literal["success"] = "success"
    model: str


class PausedBody(BaseModel):
    """Whether waiting jobs are left to wait."""

    model_config = _like({"status": "success", "paused": True})

    status: Literal["success"] = "success"
    paused: bool


class ReadyBody(BaseModel):
    """A job would be run if it was posted now; while ``loading``, as soon as the engine has loaded."""

    model_config = _like({"status": "success", "ready": True, "loading": False, "reasons": []})

    status: Literal["success"] = "success"
    ready: Literal[True] = True
    loading: bool
    reasons: list[str] = Field(default=[], max_length=0)


class NotReadyBody(ErrorBody):
    """A job would not be run, for these reasons."""

    model_config = _like(examples.NOT_READY)

    ready: Literal[False] = False
    loading: bool
    reasons: list[str] = Field(min_length=1)
