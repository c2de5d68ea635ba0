"""``/add_new_lora`` and ``/get_available_loras``: LoRAs from Civitai, with what their makers allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from diffusion_api.catalog.lora_list import Listed
from diffusion_api.dialects._base import hears, shows
from diffusion_api.dialects._forms import refusals
from diffusion_api.dialects._jobs import NOBODY

if TYPE_CHECKING:
    from diffusion_api.service import Service

STEP = "searchterm ink lead to 3 models\ncollecting the first one: Ink"
LISTED_ONE = {"ink": Listed(model_id=12345, base_model="runwayml/stable-diffusion-v1-5").dump()}
LISTED: dict[int | str, dict[str, Any]] = {
    200: {"model": dict[str, Listed], "description": "What is known of each LoRA"} | shows(LISTED_ONE)[200]
}
STEPS: dict[int | str, dict[str, Any]] = {
    200: {"model": str, "description": "A line for each step; empty if it was here already"} | shows(STEP)[200]
}


def add(router: APIRouter, service: Service) -> None:
    """Add the routes of the shop."""

    @router.get("/get_available_loras", summary="LoRAs, and what their makers allow", responses=LISTED)
    def get_available_loras() -> JSONResponse:
        return JSONResponse({name: listed.dump() for name, listed in service.lora_list().items()})

    @router.get(
        "/add_new_lora", summary="Fetch a LoRA from Civitai, by a link", operation_id="add_new_lora_by_get",
        responses=refusals(400, 401, 403, 404, 409, 413, 422, 429, 501, 503, 507) | STEPS, response_model=None,
    )  # fmt: skip
    @router.post(
        "/add_new_lora", summary="Fetch a LoRA from Civitai",
        responses=refusals(400, 401, 403, 404, 409, 413, 422, 429, 501, 503, 507) | STEPS, response_model=None,
    )  # fmt: skip
    async def add_new_lora(
        name: Annotated[
            str, Query(min_length=1, max_length=500, description="Civitai's number of it, or words to search for")
        ],
        http: Request,
    ) -> Response:
        steps: list[str] = []

        async def fetched() -> None:
            steps.append(await service.add_lora(name))

        if not await hears(http, fetched()):  # it comes nevertheless
            return Response(status_code=NOBODY)
        return JSONResponse(steps[0])
