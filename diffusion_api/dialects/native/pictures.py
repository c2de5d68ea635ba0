"""Bodies that bring pictures along, to frozen requests: which pictures, what size, what mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from diffusion_api.catalog.upscalers import INTERNAL, LATENT
from diffusion_api.dialects._base import MAX_SIDE, build
from diffusion_api.dialects._jobs import Meant
from diffusion_api.dialects.native.bodies import FactorsBody, Img2ImgBody, UpscaleBody
from diffusion_api.dialects.native.requests import (
    Size,
    drawing,
    given,
    output,
    rounded,
    safety,
    unfiltered,
    upscaler_name,
)
from diffusion_api.dialects.native.unknown import unknown_fields
from diffusion_api.errors import InvalidRequest
from diffusion_api.remote_pictures import is_url
from diffusion_api.schema.request import Img2Img, Mask, Upscale

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.service import Picture, Service

Fetched: TypeAlias = "Mapping[str, Picture]"
"""The pictures that came from elsewhere, by the field that named them."""

STRENGTH = 0.75
SCALE = 2.0
UPSCALER = "Lanczos"
OF_THE_MASK = {"mask_blur": 4, "mask_invert": False, "mask_fill": "fill", "only_masked": False, "mask_padding": 32}
"""What is said of a mask, with the values that say nothing: many programs send these always."""


async def fetched(body: Img2ImgBody | UpscaleBody, service: Service) -> Fetched:
    """The pictures that a body names by URL. Raises UrlRefused, Unreachable, InvalidImage, TooLarge."""
    texts = {field: getattr(body, field, None) or "" for field in ("image", "mask")}
    return {field: await service.picture_at(text, field) for field, text in texts.items() if is_url(text)}


def shown(text: str) -> str:
    """What records have in place of a picture: its length, or where it came from without what may be a credential."""
    from diffusion_api.images import placeholder  # NumPy and Pillow: a third of the time until the service answers

    if not is_url(text):
        return placeholder(text)
    from diffusion_api.fetch import masked  # httpx: a tenth of a second

    return masked(text.strip())


def img2img(body: Img2ImgBody, service: Service, fetched: Fetched) -> Meant[Img2Img]:
    """The picture from a picture that a body means. ``loras`` in it is ignored, as the original API does, unless it or the
    operator says otherwise. Raises InvalidRequest.
    """
    ignored = body.loras and not given(body.apply_loras, service.settings.apply_loras)
    meant = inpaint(body.model_copy(update={"loras": None}) if ignored else body, service, fetched, needs_mask=False)
    if ignored:
        meant.warnings.append('loras is ignored on /img2img; add "apply_loras": true, or name them in the prompt')
    return meant


def inpaint(body: Img2ImgBody, service: Service, fetched: Fetched, *, needs_mask: bool = True) -> Meant[Img2Img]:
    """The picture with a part painted anew that a body means. Raises InvalidRequest."""
    picture = fetched.get("image") or _picture(body.image, "image", service)
    if not (body.prompt or body.infotext or body.styles):
        raise InvalidRequest("Prompt field is required", field="prompt")
    mask = fetched.get("mask") or (_picture(body.mask, "mask", service) if body.mask or needs_mask else None)
    if mask and (mask.width, mask.height) != (picture.width, picture.height):
        raise InvalidRequest(
            f"mask has {mask.width}x{mask.height} pixels and image {picture.width}x{picture.height}: "
            "they must have the same size",
            field="mask",
        )

    def size_of(body: Img2ImgBody, model: Model) -> Size:
        if model.whole:
            raise InvalidRequest(
                f"image: model {model.name!r} is drawn by a pipeline of its own, from words alone", field="image"
            )
        return rounded(_wanted(body, picture), model)

    warnings = _in_vain(body, mask)
    body, fields, notes = drawing(body, service, size_of)
    warnings += notes
    if body.image_guidance_scale is not None:
        warnings.append("image_guidance_scale has no effect: it is for models that are told how to edit a picture")
    asked = build(
        Img2Img,
        **fields,
        image=picture.name,
        strength=given(body.denoising_strength, STRENGTH),
        **_said(resize_mode=body.resize_mode, noise_multiplier=body.initial_noise_multiplier),
        mask=_mask(body, mask) if mask else None,
    )
    return Meant(asked, warnings, (picture, mask) if mask else (picture,))


def upscale(body: UpscaleBody, service: Service, fetched: Fetched) -> Meant[Upscale]:
    """The larger picture that a body means. Raises InvalidRequest."""
    picture = fetched.get("image") or _picture(body.image, "image", service)
    wanted = body.upscaler or UPSCALER
    if wanted.lower() in map(str.lower, LATENT):
        raise InvalidRequest(
            f"upscaler is {wanted!r}, which enlarges what a model draws and no picture; one of those of /upscalers "
            "whose names do not begin with Latent",
            field="upscaler",
        )
    upscaler = upscaler_name(wanted, service, "upscaler", [name for name in INTERNAL if name not in LATENT])
    if body.width or body.height:
        sides = _in_proportion(body.width, body.height, picture)
    else:
        sides = _scaled(picture, FactorsBody(width=given(body.scale, SCALE), height=given(body.scale, SCALE)))
    for name, side in zip(("width", "height"), sides, strict=True):
        if not 1 <= side <= MAX_SIDE:
            raise InvalidRequest(f"{name} would be {side} pixels; it may be 1 to {MAX_SIDE}", field=name)
    width, height = sides
    asked = build(
        Upscale,
        image=picture.name,
        upscaler=upscaler,
        width=width,
        height=height,
        safety=safety(body),
        output=output(body),
    )
    return Meant(asked, unknown_fields(body) + unfiltered(body, service), (picture,))


def _picture(text: str | None, field: str, service: Service) -> Picture:
    if not text:
        raise InvalidRequest(f"{field.capitalize()} field is required", field=field)
    return service.picture(text, field)


def _in_vain(body: Img2ImgBody, mask: Picture | None) -> list[str]:
    """What to tell the caller of fields that mean nothing without another one."""
    warnings = []
    said = [name for name, plain in OF_THE_MASK.items() if getattr(body, name) not in (None, plain)]
    if said and mask is None:
        warnings.append(f"{', '.join(said)}: ignored, as there is no mask")
    if body.resize_to and not (body.resize_to.width or body.resize_to.height):
        warnings.append("resize_to is ignored: it has neither width nor height")
    return warnings


def _mask(body: Img2ImgBody, mask: Picture) -> Mask:
    return build(
        Mask,
        image=mask.name,
        **_said(
            blur=body.mask_blur,
            invert=body.mask_invert,
            fill=body.mask_fill,
            only_masked=body.only_masked,
            padding=body.mask_padding,
        ),
    )


def _said(**fields: Any) -> dict[str, Any]:
    """The fields that were not left out."""
    return {name: value for name, value in fields.items() if value is not None}


def _wanted(body: Img2ImgBody, picture: Picture) -> dict[str, int]:
    """Width and height that a body asks for, by what it calls them; those of the picture if it does not."""
    if body.resize_to and (body.resize_to.width or body.resize_to.height):
        prefix, sides = "resize_to.", _in_proportion(body.resize_to.width, body.resize_to.height, picture)
    elif body.resize_by:
        factors = body.resize_by
        if not isinstance(factors, FactorsBody):
            factors = FactorsBody(width=factors, height=factors)
        prefix, sides = "resize_by: ", _scaled(picture, factors)
    elif body.width or body.height:
        prefix, sides = "", _in_proportion(body.width, body.height, picture)
    else:
        prefix, sides = "image's ", (picture.width, picture.height)
    return {f"{prefix}width": sides[0], f"{prefix}height": sides[1]}


def _scaled(picture: Picture, factors: FactorsBody) -> tuple[int, int]:
    return round(picture.width * factors.width), round(picture.height * factors.height)


def _in_proportion(width: int | None, height: int | None, picture: Picture) -> tuple[int, int]:
    """Both sides; one that is left out is as the picture has it."""
    return (
        width or round(picture.width * given(height, 0) / picture.height),
        height or round(picture.height * given(width, 0) / picture.width),
    )
