"""``POST /post_config``: everything in the query, maybe a picture in a form, and all pictures of the answer in one PNG."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from diffusion_api.catalog import samplers
from diffusion_api.dialects._base import build, resolve_seed
from diffusion_api.dialects._forms import PNG, form, in_own_words, picture_of, picture_sent, refusals, sheet
from diffusion_api.dialects._jobs import IdempotencyKey, Meant, Stored, store, view
from diffusion_api.dialects.config.lists import model_of
from diffusion_api.dialects.config.query import SIDE, ConfigQuery
from diffusion_api.errors import InvalidRequest
from diffusion_api.nearest import LONGEST_NAME, hint
from diffusion_api.schema.request import Img2Img, LoraUse, Output, Txt2Img

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.service import Picture, Service

SAMPLER = "Euler"
STRENGTH = {"sdxl": 0.3, "standard": 0.8}
"""How much of a picture is drawn anew, by the type of the model: what the pipelines of the original have by default."""
MOST_TOLD = 20
"""Parameters that mean nothing, of which a caller is told."""
NO_LORA = ("", "none", "null")
"""What clients send who mean none: some write Python's own word."""


def add(router: APIRouter, service: Service) -> None:
    """Add the route that draws."""

    @router.post(
        "/post_config", summary="Pictures from words, or from words and a picture", response_class=Response,
        responses=refusals(400, 413, 415, 422, 429, 503, 507) | PNG, openapi_extra=form("a picture to begin with"),
    )  # fmt: skip
    async def post_config(
        query: Annotated[ConfigQuery, Query()], http: Request, idempotency_key: IdempotencyKey = None
    ) -> Response:
        sent = await picture_sent(http, service.settings.max_body)
        stored = await run_in_threadpool(_stored, query, sent, http, service, idempotency_key)
        return await view(stored, http, service, partial(sheet, service=service))


def _stored(query: ConfigQuery, sent: bytes | str | None, http: Request, service: Service, key: str | None) -> Stored:
    with in_own_words():
        picture = None if sent is None else picture_of(sent, service)
        meant = _meant(query, picture, service)
        meant.warnings.extend(
            f"unknown parameter {name[:LONGEST_NAME]!r} was ignored{hint(name, ConfigQuery.model_fields)}"
            for name in sorted(http.query_params.keys() - ConfigQuery.model_fields.keys())[:MOST_TOLD]
        )
        said = query.model_dump(exclude_unset=True) | ({"image": picture.name} if picture else {})
        return store(meant, http, service, sent=said, key=key, dialect="config")


def _meant(query: ConfigQuery, picture: Picture | None, service: Service) -> Meant[Txt2Img | Img2Img]:
    model, warnings = model_of(query.model_id, service)
    sampler, schedule = samplers.resolve(SAMPLER, None)
    width, height = _size(query, picture, model)
    fields = dict(
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
        loras=_loras(query.lora, service),
        output=Output(format="png"),
    )
    if picture is None:
        return Meant(build(Txt2Img, **fields), warnings)
    if model.whole:
        raise InvalidRequest(f"model {model.name!r} draws from words alone; leave image out", field="image")
    return Meant(build(Img2Img, **fields, image=picture.name, strength=STRENGTH[model.type]), warnings, (picture,))


def _size(query: ConfigQuery, picture: Picture | None, model: Model) -> tuple[int, int]:
    """Width and height in pixels, rounded down to what the model can make."""
    own = (picture.width, picture.height) if picture else (SIDE, SIDE)
    width, height = (given or side for given, side in zip((query.width, query.height), own, strict=True))
    sides = [side // model.multiple * model.multiple for side in (width, height)]
    for name, side in zip(("width", "height"), sides, strict=True):
        if not side:
            raise InvalidRequest(f"{name} must be at least {model.multiple}", field=name)
    return sides[0], sides[1]


def _loras(name: str | None, service: Service) -> tuple[LoraUse, ...]:
    """The one LoRA that a caller means, if any. Raises InvalidRequest with the choices."""
    if name is None or name.strip().lower() in NO_LORA:
        return ()
    row = service.asset("lora", name)
    if row is None:
        choices = ", ".join(asset.name for asset in service.assets("lora")) or "none is installed"
        raise InvalidRequest(f"lora {name!r} {service.absence(name)}; one of: {choices}", field="lora")
    return (LoraUse(name=row.name),)
