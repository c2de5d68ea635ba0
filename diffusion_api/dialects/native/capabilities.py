"""What may be asked of a model: its fields with their limits and defaults, read from the bodies themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from fastapi import APIRouter, Query

from diffusion_api.catalog import samplers
from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.dialects.native import pictures, requests
from diffusion_api.dialects.native.bodies import (
    CapabilitiesBody,
    HiresBody,
    Img2ImgBody,
    JobBody,
    ModelFacts,
    ParameterBody,
    SafetyFacts,
    Txt2ImgBody,
    UpscaleBody,
    refusals,
)
from diffusion_api.dialects.native.examples import DOT
from diffusion_api.dialects.native.requests import FILE_TYPES, SWITCH_AT
from diffusion_api.dialects.native.told import IN_BODY
from diffusion_api.errors import InvalidRequest
from diffusion_api.schema.request import Img2Img, Output, Sampling, Txt2Img

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.service import Service

Schema: TypeAlias = dict[str, Any]

ModelName = Annotated[
    str | None, Query(description="a name or label of /models; the one of a POST that names none when left out")
]

LIMITS = (
    *("max_steps", "max_pixels", "max_batch", "max_work", "max_seconds", "max_prompt"),
    *("max_input_pixels", "max_upscaled_pixels", "max_body"),
)
"""Settings that limit a request."""
OF_THE_OPERATOR = {"steps": "max_steps", "n": "max_batch", "deadline": "max_seconds"}
"""Fields whose limit is a setting; 0 is none."""
ITS_OWN = {"seed", "prompt", "image", "mask"}
"""Fields that say what this one job is; their defaults are those of the body."""
OF_THE_PICTURE = {"width", "height"}
"""Fields that are as the picture is that comes along."""


def add(router: APIRouter, service: Service) -> None:
    """Add the route that tells what may be asked."""

    @router.get(
        "/capabilities", tags=["catalog"], summary="What may be asked of a model", responses=refusals(400, 401, 403, 429),
    )  # fmt: skip
    def capabilities(model: ModelName = None) -> CapabilitiesBody:
        return _capabilities(service.model(model), service)


def _capabilities(model: Model, service: Service) -> CapabilitiesBody:
    features = [name for name, ask in FEATURES.items() if _can(ask, model, service)]
    parameters = {"/txt2img": _parameters(Txt2ImgBody, _defaults(_plain(model, service)), model, service)}
    if "img2img" in features:
        drawn = _defaults(_from_picture(model, service))
        of_picture = {name: value for name, value in drawn.items() if name not in OF_THE_PICTURE}
        of_picture["apply_loras"] = service.settings.apply_loras
        for route in ("/img2img", "/inpaint"):
            parameters[route] = _parameters(Img2ImgBody, of_picture, model, service)
    enlarged = _of_output(Output()) | {"upscaler": pictures.UPSCALER, "scale": pictures.SCALE}
    parameters["/upscale"] = _parameters(UpscaleBody, enlarged, model, service)
    return CapabilitiesBody(
        model=ModelFacts(
            name=model.name,
            label=model.label,
            type=model.type,
            family=model.family,
            native_size=model.native_size,
            width=model.default_size[0],
            height=model.default_size[1],
            multiple=model.multiple,
        ),
        features=features,
        safety=SafetyFacts(policy=service.settings.safety, checker=service.checks(model.name)),
        limits={name: getattr(service.settings, name) for name in LIMITS},
        parameters=parameters,
        sampling_methods=samplers.sampling_methods(),
        scheduler_types=samplers.scheduler_types(),
        file_types=list(FILE_TYPES),
        upscalers=[*INTERNAL, *(row.name for row in service.assets("upscaler"))],
        vaes=["Automatic", "None", *(row.name for row in service.assets("vae"))],
        loras=[row.name for row in service.assets("lora") if row.family in (None, model.family)],
    )


# The answers to these are those of the very code that takes a POST.


def _plain(model: Model, service: Service) -> Txt2Img:
    return requests.txt2img(Txt2ImgBody(model=model.name), service).request


def _from_picture(model: Model, service: Service) -> Img2Img:
    width, height = model.default_size
    body = Img2ImgBody(model=model.name, prompt="a picture", image=DOT, mask=DOT, width=width, height=height)
    return pictures.inpaint(body, service, {}).request


def _hires(model: Model, service: Service) -> bool:
    body = Txt2ImgBody(model=model.name, hires=HiresBody(enabled=True))
    return requests.txt2img(body, service).request.hires is not None


def _refiner(model: Model, service: Service) -> bool:
    body = Txt2ImgBody(model=model.name, refiner_checkpoint=model.name)
    return requests.txt2img(body, service).request.refiner is not None


FEATURES: dict[str, Callable[[Model, Service], object]] = {
    "txt2img": _plain,
    "img2img": _from_picture,
    "inpaint": _from_picture,
    "hires": _hires,
    "refiner": _refiner,
}
"""What a model may be able to do, with a request that asks for it."""


def _can(ask: Callable[[Model, Service], object], model: Model, service: Service) -> bool:
    try:
        return bool(ask(model, service))
    except InvalidRequest:
        return False


def _defaults(request: Sampling) -> dict[str, Any]:
    """What a body means that leaves a field out, by field: what its request says."""
    values = {IN_BODY.get(name, name): getattr(request, name) for name in type(request).model_fields}
    values |= _of_output(request.output) | {
        "n": request.count,
        "sampler_name": samplers.sampler(request.sampler).label,
        "vae": request.vae or "Automatic",
        "refiner_switch_at": SWITCH_AT,
    }
    if isinstance(request, Img2Img) and request.mask:
        mask = request.mask
        values |= {f"mask_{name}": getattr(mask, name) for name in type(mask).model_fields}
        values["only_masked"] = mask.only_masked
    return {name: value for name, value in values.items() if name not in ITS_OWN}


def _of_output(output: Output) -> dict[str, Any]:
    file_type = next(name for name, format in FILE_TYPES.items() if format == output.format)
    return {"fileType": file_type, "jpeg_quality": output.quality, "lossless": output.lossless}


def _parameters(
    body: type[JobBody], defaults: dict[str, Any], model: Model, service: Service
) -> dict[str, ParameterBody]:
    schema = body.model_json_schema(by_alias=False)
    found = {
        name: _parameter(part, schema.get("$defs", {}), defaults.get(name))
        for name, part in schema["properties"].items()
    }
    for name, setting in OF_THE_OPERATOR.items():
        if name in found and (limit := getattr(service.settings, setting)):
            found[name] = found[name].model_copy(update={"maximum": limit})
    if issubclass(body, Txt2ImgBody | Img2ImgBody):
        for name in OF_THE_PICTURE:
            found[name] = found[name].model_copy(update={"minimum": model.multiple, "multiple": model.multiple})
    return found


def _parameter(schema: Schema, others: dict[str, Schema], default: Any) -> ParameterBody:
    """One field. Where there is a choice of objects and plain values, ``fields`` are those of the object."""
    kinds = [
        others[kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind for kind in schema.get("anyOf", [schema])
    ]
    told = {name: kind[name] for kind in kinds for name in ("minimum", "maximum", "enum", "properties") if name in kind}
    fields = told.get("properties")
    return ParameterBody(
        type=[kind["type"] for kind in kinds if kind.get("type", "null") != "null"],
        minimum=told.get("minimum"),
        maximum=told.get("maximum"),
        choices=told.get("enum"),
        default=schema.get("default") if default is None else default,
        description=schema.get("description", ""),
        fields=fields and {name: _parameter(part, others, None) for name, part in fields.items()},
    )
