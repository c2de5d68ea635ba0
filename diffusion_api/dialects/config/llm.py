"""What a language model has to say of a prompt: asked where the operator runs one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query

from diffusion_api.dialects._base import shows
from diffusion_api.dialects._forms import refusals
from diffusion_api.errors import DiffusionApiError

if TYPE_CHECKING:
    from diffusion_api.service import Service

log = logging.getLogger(__name__)

NOBODY = "could not reach LLM"
"""The original's answer, also when nobody is there to be asked."""

Text = Annotated[str, Query(description="any text")]
Role = Annotated[str | None, Query(description="whom the model is to speak as")]


SAID = "Description: (a lighthouse:1.2) at night"
"""As the documentation shows it."""


def add(router: APIRouter, service: Service) -> None:
    """Add the routes that ask."""

    @router.get(
        "/llm_prompt_assistance", summary="A prompt for what a text describes", responses=refusals(422) | shows(SAID)
    )
    async def llm_prompt_assistance(text: Text, role: Role = None) -> str:
        return await answered("llm_prompt_assistance", text, role)

    @router.get("/llm_interface", summary="What a language model answers", responses=refusals(422) | shows(SAID))
    async def llm_interface(text: Text, role: Role = None) -> str:
        return await answered("llm_interface", text, role)

    async def answered(path: str, text: str, role: str | None) -> str:
        try:
            return await service.ask(path, {"text": text} | ({} if role is None else {"role": role}))
        except DiffusionApiError as error:
            log.warning("%s: %s: %s", path, NOBODY, error)
            return NOBODY
