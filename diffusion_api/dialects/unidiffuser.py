"""The UniDiffuser API: pictures from words, words for pictures, and pictures in numbers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from diffusion_api.catalog import samplers
from diffusion_api.dialects._base import MAX_SIDE, build, offer, resolve_seed, shows
from diffusion_api.dialects._forms import (
    PNG,
    PROMPT,
    UNPROCESSABLE,
    DetailRoute,
    TorchDtype,
    form,
    in_own_words,
    picture_of,
    picture_sent,
    refusals,
    sheet,
)
from diffusion_api.dialects._jobs import IdempotencyKey, Meant, Stored, result_of, store, view
from diffusion_api.errors import Gone, NotInstalled
from diffusion_api.schema.request import Caption, Embed, Output, Reading, Txt2Img

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.queues.base import Snapshot
    from diffusion_api.service import Service

REPOSITORY = "thu-ml/unidiffuser-v1"
FOLDER = "models--" + REPOSITORY.replace("/", "--")
"""What ``pull`` calls it."""
NO_PICTURE = "No image was passed!"
MULTIPLE = 8
SAMPLER = "Euler"
REFUSED = refusals(400, 413, 415, 422, 429, 503, 507)
FORM = form("the picture; it is seen with the pixels that the model was made for, 512 x 512", required=True)

Side: TypeAlias = Annotated[int, Field(ge=MULTIPLE, le=MAX_SIDE)]
Steps = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=0, allow_inf_nan=False, description="0 to 1: none")]
Seed = Annotated[int, Field(description="a negative one draws one")]


class PictureQuery(BaseModel):
    """What a picture is drawn with."""

    prompt: str = PROMPT
    torch_dtype: TorchDtype = "float16"
    num_inference_steps: Steps = 20
    count_returned: int = Field(default=1, ge=1, description="pictures, whose seeds are seed, seed + 1, ...")
    seed: Seed = 0
    guidance_scale: Guidance = 7.5
    negative_prompt: str = Field(default="", description="without effect: the model is guided away from any words")
    width: Side | None = Field(default=None, description="rounded down to a multiple of 8; then it must be the model's")
    height: Side | None = Field(default=None, description="the same")


class CaptionQuery(BaseModel):
    """How words are found for a picture."""

    torch_dtype: TorchDtype = "float16"
    num_inference_steps: Steps = 20
    guidance_scale: Guidance = 7.5
    seed: Seed = 0


class EmbedQuery(BaseModel):
    """How a picture is turned into numbers."""

    torch_dtype: TorchDtype = "float16"
    seed: Seed = 0


class EmbeddingsBody(BaseModel):
    """A picture in numbers."""

    model_config = ConfigDict(json_schema_extra={"example": {"CLIP_embeddings": [0.1, -0.2], "vae_emb": [[[0.5]]]}})

    CLIP_embeddings: list[float] = Field(description="its embedding by CLIP: 512 numbers")
    vae_emb: list[list[list[float]]] = Field(description="a sample of its latents: 4 x 64 x 64 numbers")


def mount(app: FastAPI, service: Service) -> None:
    """Add the routes of this dialect."""
    router = APIRouter(route_class=DetailRoute, responses=refusals(), tags=["unidiffuser"])

    @router.post("/prompt2img", summary="Pictures from words", response_class=Response, responses=REFUSED | PNG)
    async def prompt2img(
        query: Annotated[PictureQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        stored = await run_in_threadpool(_drawing, query, http, service, idempotency_key)
        return await view(stored, http, service, partial(sheet, service=service))

    @router.post(
        "/img2prompt",
        summary="Words for a picture",
        response_model=str,
        responses=REFUSED | shows("a lighthouse at night"),
        openapi_extra=FORM,
    )
    async def img2prompt(
        query: Annotated[CaptionQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        sent = await _picture(http, service)
        asked = {"steps": query.num_inference_steps, "guidance_scale": query.guidance_scale}
        stored = await run_in_threadpool(_reading, Caption, asked, query, sent, http, service, idempotency_key)
        return await view(stored, http, service, _caption)

    @router.post(
        "/img2embed", summary="A picture in numbers", response_model=EmbeddingsBody, responses=REFUSED,
        openapi_extra=FORM,
    )  # fmt: skip
    async def img2embed(
        query: Annotated[EmbedQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        sent = await _picture(http, service)
        stored = await run_in_threadpool(_reading, Embed, {}, query, sent, http, service, idempotency_key)
        return await view(stored, http, service, partial(_embeddings, service=service))

    offer(app, "unidiffuser", router)


async def _picture(http: Request, service: Service) -> bytes | str:
    """The picture that was sent. Raises HTTPException where there is none."""
    sent = await picture_sent(http, service.settings.max_body)
    if sent is None:
        raise HTTPException(UNPROCESSABLE, NO_PICTURE)
    return sent


def _model(service: Service) -> Model:
    """The installed UniDiffuser, the first by name. Raises NotInstalled."""
    for model in service.models():
        if model.tells:
            return model
    raise NotInstalled(
        f"{REPOSITORY} {service.absence(FOLDER)}; the operator can fetch it: diffusion-api pull {REPOSITORY}"
    )


def _drawing(query: PictureQuery, http: Request, service: Service, key: str | None) -> Stored:
    model = _model(service)
    sampler, schedule = samplers.resolve(SAMPLER, None)
    width, height = (
        given // MULTIPLE * MULTIPLE if given else own
        for given, own in zip((query.width, query.height), model.default_size, strict=True)
    )
    with in_own_words():
        asked = build(
            Txt2Img,
            model=model.name,
            prompt=query.prompt,
            negative_prompt=query.negative_prompt,
            steps=query.num_inference_steps,
            guidance_scale=query.guidance_scale,
            width=width,
            height=height,
            sampler=sampler.name,
            schedule=schedule.name,
            seed=resolve_seed(query.seed),
            count=query.count_returned,
            output=Output(format="png"),
        )
        return _stored(Meant(asked, []), query, http, service, key)


def _reading(
    kind: type[Reading],
    asked: dict[str, Any],
    query: CaptionQuery | EmbedQuery,
    sent: bytes | str,
    http: Request,
    service: Service,
    key: str | None,
) -> Stored:
    model = _model(service)
    width, height = model.default_size
    with in_own_words():
        picture = picture_of(sent, service)
        request = build(
            kind,
            model=model.name,
            image=picture.name,
            width=width,
            height=height,
            seed=resolve_seed(query.seed),
            **asked,
        )
        return _stored(Meant(request, [], (picture,)), query, http, service, key)


def _stored(meant: Meant[Any], query: BaseModel, http: Request, service: Service, key: str | None) -> Stored:
    shown = query.model_dump(exclude_unset=True)
    if meant.pictures:
        shown["image"] = meant.pictures[0].name
    sent = shown | {"kind": meant.request.kind}  # a key stands for one route
    return store(meant, http, service, sent=sent, shown=shown, key=key, dialect="unidiffuser")


def _caption(snapshot: Snapshot) -> Response:
    return JSONResponse(result_of(snapshot).caption)


def _embeddings(snapshot: Snapshot, service: Service) -> Response:
    made = result_of(snapshot).embeddings
    data = service.embeddings(made) if made else None
    if data is None:
        raise Gone(f"the embeddings of job {snapshot.job.id} were deleted")
    return Response(data, media_type="application/json")
