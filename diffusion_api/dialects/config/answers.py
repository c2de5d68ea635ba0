"""What callers of the configuration API are answered when something is wrong."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from diffusion_api.dialects._base import ErrorRoute


class FaultBody(BaseModel):
    """What is wrong with one parameter."""

    loc: list[str | int] = Field(description="where it stands, such as query and its name")
    msg: str
    type: str


class RefusalBody(BaseModel):
    """A refusal: a sentence, or what is wrong with each parameter."""

    detail: str | list[FaultBody]


class ConfigRoute(ErrorRoute):
    """A route whose refusals have the body of :class:`RefusalBody`."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its documentation; all have one body."""
    expected: dict[int | str, dict[str, Any]] = {status: {"model": RefusalBody} for status in statuses}
    return expected | {"default": {"model": RefusalBody, "description": "Any other refusal"}}
