"""What a caller can choose from, and what is chosen for those who leave it open."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from diffusion_api import tokens
from diffusion_api.catalog.labels import BASE_MODELS
from diffusion_api.dialects._base import shows
from diffusion_api.dialects.config.query import SIDE, ConfigQuery
from diffusion_api.errors import InvalidRequest, UnknownModel
from diffusion_api.settings import DATA

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.service import Service

DEFAULT_MODEL = BASE_MODELS["SD 1.5"]

FILES = {
    "SD 1.5": ("v1-5-pruned-emaonly", "v1-5-pruned"),
    "SD 2.0": ("768-v-ema",),
    "SD 2.1": ("v2-1_768-ema-pruned",),
    "SDXL 1.0": ("sd_xl_base_1.0",),
    "Flux.1 D": ("flux1-dev",),
}
"""What their files are called, where they are no folders."""


class ModelConfig(BaseModel):
    """What a model is loaded with."""

    torch_dtype: str


class PromptConfig(BaseModel):
    """What a picture is drawn with."""

    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str


class Parameters(BaseModel):
    """The parameters of ``/post_config``, in the original's groups, as they are when they are left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model_config": {"torch_dtype": "float16"},
                "prompt_config": {"num_inference_steps": 20, "guidance_scale": 7.5, "negative_prompt": "blurry"},
                "model_id": "runwayml/stable-diffusion-v1-5",
                "prompt": "a beach",
                "count_returned": 1,
                "seed": 0,
                "width": 512,
                "height": 512,
                "lora": None,
            }
        }
    )

    loaded: ModelConfig = Field(serialization_alias="model_config")
    prompt_config: PromptConfig
    model_id: str
    prompt: str
    count_returned: int
    seed: int
    width: int
    height: int
    lora: str | None


def model_of(name: str | None, service: Service) -> tuple[Model, list[str]]:
    """The model that ``model_id`` means, and what its caller should know of that: an id or label of :data:`BASE_MODELS`, or
    any name of an installed one; the service's own default when it is left out or empty. Raises UnknownModel.
    """
    label = next((label for label, model_id in BASE_MODELS.items() if name in (label, model_id)), None)
    if label is None:
        return service.chosen(name or None)
    for known in (BASE_MODELS[label], *FILES[label]):
        with suppress(UnknownModel):
            return service.model(known), []
    return service.chosen(BASE_MODELS[label])


def _default_id(service: Service) -> str:
    """What draws when no model is named, by the original's id where it is that one, or where there is no default."""
    try:
        name = service.model(None).name
    except InvalidRequest:
        return DEFAULT_MODEL
    return DEFAULT_MODEL if DEFAULT_MODEL.endswith(f"/{name}") else name


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that list."""

    @router.get("/get_available_stable_diffs", summary="Models by their labels", responses=shows(BASE_MODELS))
    def get_available_stable_diffs() -> dict[str, str]:
        return BASE_MODELS | {model.label: model.name for model in service.models()}

    @router.get("/get_implemented_parameters", summary="The parameters of /post_config, and their defaults")
    def get_implemented_parameters() -> Parameters:
        query = ConfigQuery()
        return Parameters(
            loaded=ModelConfig(torch_dtype=query.torch_dtype),
            prompt_config=PromptConfig(
                num_inference_steps=query.num_inference_steps,
                guidance_scale=query.guidance_scale,
                negative_prompt=query.negative_prompt,
            ),
            model_id=_default_id(service),
            prompt=query.prompt,
            count_returned=query.count_returned,
            seed=query.seed,
            width=SIDE,
            height=SIDE,
            lora=query.lora,
        )

    @router.get(
        "/get_model_embedding",
        summary="The tokens that a prompt has for the model",
        responses=shows(["a", "lighthouse"]),
    )
    def get_model_embedding(
        prompt: Annotated[str, Query(description="any length")] = ConfigQuery().prompt,
    ) -> list[str]:
        return tokens.tokens(prompt, DATA / "clip")
