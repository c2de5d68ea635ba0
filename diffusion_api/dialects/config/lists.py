"""What a caller can choose from, and what is chosen for those who leave it open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

if TYPE_CHECKING:
    from diffusion_api.service import Service

STABLE_DIFFS = {
    "SD 1.5": "runwayml/stable-diffusion-v1-5",
    "SD 2.0": "stabilityai/stable-diffusion-2",
    "SD 2.1": "stabilityai/stable-diffusion-2-1",
    "SDXL 1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "Flux.1 D": "black-forest-labs/FLUX.1-dev",
}
"""The models that the original knows, by its names; a LoRA's ``baseModel`` at Civitai is one of these names too."""


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that list."""

    @router.get("/get_available_stable_diffs", summary="Models by their labels")
    def get_available_stable_diffs() -> dict[str, str]:
        return STABLE_DIFFS | {model.label: model.name for model in service.models()}
