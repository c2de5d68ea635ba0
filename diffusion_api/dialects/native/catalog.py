"""What is installed: models, LoRAs, upscalers, samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

from diffusion_api.catalog import samplers
from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.dialects.native.bodies import (
    LabelBody,
    LabelsBody,
    LoadingBody,
    LoraRow,
    LorasBody,
    ModelBody,
    ModelsBody,
    SamplingMethodsBody,
    UpscalerRow,
    UpscalersBody,
    refusals,
)

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Asset, Model
    from diffusion_api.service import Service


LISTED = refusals(401, 403, 429)


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that list what is installed."""

    @router.get("/models", tags=["catalog"], summary="Installed models", responses=LISTED)
    def models() -> ModelsBody:
        return ModelsBody(models=[_model(model) for model in service.models()])

    @router.get("/models/aliases", tags=["catalog"], summary="Labels of models", responses=LISTED)
    def labels() -> LabelsBody:
        installed = {model.name for model in service.models()}
        return LabelsBody(
            models=[LabelBody(name=name, label=label, installed=name in installed) for name, label in service.labels()]
        )

    @router.post(
        "/models/{name:path}/load", tags=["catalog"], summary="Load a model now",
        responses=refusals(400, 401, 403, 409, 429, 501),
    )  # fmt: skip
    def load(name: str) -> LoadingBody:
        return LoadingBody(model=service.warm_up(name).name)

    @router.get("/loras", tags=["catalog"], summary="Installed LoRAs", responses=LISTED)
    def loras() -> LorasBody:
        found = LorasBody(loras=[_lora_row(row) for row in service.assets("lora")])
        service.hash_soon("lora")
        return found

    @router.get("/upscalers", tags=["catalog"], summary="Upscalers, built in and installed", responses=LISTED)
    def upscalers() -> UpscalersBody:
        return UpscalersBody(upscalers=[*_internal_upscalers(), *map(_upscaler, service.assets("upscaler"))])

    @router.get("/sampling_methods", tags=["catalog"], summary="Samplers and schedules", responses=LISTED)
    def sampling_methods() -> SamplingMethodsBody:
        return SamplingMethodsBody(
            sampling_methods=samplers.sampling_methods(), scheduler_types=samplers.scheduler_types()
        )


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
    autov2, network = row.known_hashes()
    return LoraRow(
        name=row.name,
        path=row.shown_path,
        family=row.family,
        trigger_words=[*row.trigger_words],
        usage_rights=row.listed.usage_rights if row.listed else None,
        allow_no_mention=row.listed.allow_no_mention if row.listed else None,
        hash=network,
        autov2=autov2,
        pickled=row.pickled,
    )


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
