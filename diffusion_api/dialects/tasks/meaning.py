"""Parameters of a task to frozen requests, and the pictures that their URLs lead to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from diffusion_api.catalog import samplers
from diffusion_api.dialects._base import build, resolve_seed, round_size
from diffusion_api.dialects._jobs import Meant
from diffusion_api.dialects.tasks.bodies import AnyParams, Txt2ImgParams
from diffusion_api.errors import (
    CallerError,
    DiffusionApiError,
    InvalidImage,
    InvalidRequest,
    Unreachable,
    UrlRefused,
)
from diffusion_api.links import NO_BLOB
from diffusion_api.remote_pictures import is_url
from diffusion_api.schema.request import Img2Img, Mask, Output, Txt2Img

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.service import Picture, Service

INPAINT_STRENGTH = 0.8
"""How much is painted anew under a mask: the default of the pipeline that the original ran, which has no field for it."""


async def meaning(
    params: AnyParams, http: HTTPConnection, service: Service
) -> tuple[Meant[Txt2Img | Img2Img], DiffusionApiError | None]:
    """What parameters mean; and what is wrong with a picture that they name, which ends the task and refuses no request.

    Raises InvalidRequest.
    """
    model, notes = await run_in_threadpool(service.chosen, params.model)
    if isinstance(params, Txt2ImgParams):
        width, _ = round_size(params.width, "width", model.multiple)
        height, _ = round_size(params.height, "height", model.multiple)
        return Meant(build(Txt2Img, **_drawing(params, model), width=width, height=height), notes), None
    if model.whole:
        raise InvalidRequest(
            f"model {model.name!r} is drawn by a pipeline of its own, from words alone", field="initial_image"
        )
    try:
        pictures = [
            await _picture(url, field, http, service)
            for field in ("initial_image", "mask")
            if (url := getattr(params, field, None)) is not None
        ]
        meant = await run_in_threadpool(_changed, params, model, pictures)
        return replace(meant, warnings=notes), None
    except (CallerError, Unreachable) as error:
        width, height = model.default_size
        asked = build(Img2Img, **_drawing(params, model), width=width, height=height, image="", strength=0)
        return Meant(asked, notes), error


def _changed(params: AnyParams, model: Model, pictures: list[Picture]) -> Meant[Txt2Img | Img2Img]:
    picture, *masks = pictures
    for mask in masks:
        if (mask.width, mask.height) != (picture.width, picture.height):
            raise InvalidRequest(
                f"mask has {mask.width}x{mask.height} pixels and initial_image {picture.width}x{picture.height}: "
                "they must have the same size",
                field="mask",
            )
    width, _ = round_size(picture.width, "initial_image's width", model.multiple)
    height, _ = round_size(picture.height, "initial_image's height", model.multiple)
    asked = build(
        Img2Img,
        **_drawing(params, model),
        width=width,
        height=height,
        image=picture.name,
        strength=getattr(params, "strength", INPAINT_STRENGTH),
        mask=Mask(image=masks[0].name, blur=0, fill="original") if masks else None,
    )
    return Meant(asked, [], tuple(pictures))


def _drawing(params: AnyParams, model: Model) -> dict[str, Any]:
    sampler, schedule = samplers.resolve(params.scheduler, "default")
    return dict(
        model=model.name,
        prompt=params.prompt,
        negative_prompt=params.negative_prompt or "",
        steps=params.steps,
        guidance_scale=params.guidance,
        sampler=sampler.name,
        schedule=schedule.name,
        seed=resolve_seed(params.seed),
        safety="blur" if params.safety_filter else "off",
        output=Output(format="png"),
    )


async def _picture(url: str, field: str, http: HTTPConnection, service: Service) -> Picture:
    """The picture at a URL. Raises UrlRefused, Unreachable, InvalidImage, TooLarge."""
    if not is_url(url):
        raise InvalidImage(f"{field} is {url[:80]!r}, which is no URL", field=field)
    try:
        return await service.picture_at(url, field)
    except UrlRefused as error:
        if url.startswith(f"{base_url(http, service)}/blob/"):
            raise InvalidImage(f"{field}: {NO_BLOB}", field=field) from error
        raise


def base_url(connection: HTTPConnection, service: Service) -> str:
    """The URL under which the service was called, or the one that its operator says that it has."""
    here = connection.base_url
    scheme = "https" if here.scheme in ("https", "wss") else "http"
    return (service.settings.public_url or str(here.replace(scheme=scheme))).rstrip("/")
