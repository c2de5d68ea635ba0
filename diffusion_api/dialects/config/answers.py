"""What callers of the configuration API are answered when something is wrong: FastAPI's own bodies, as the original."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from diffusion_api.dialects._base import ErrorRoute
from diffusion_api.errors import InvalidRequest

UNPROCESSABLE = 422


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

    @classmethod
    def told(cls, message: str) -> Any:
        """The body of a refusal."""
        return {"detail": message}

    @classmethod
    def misread(cls, error: RequestValidationError) -> Response:
        """The answer to a request that has not the form that the route declares: FastAPI's list."""
        return JSONResponse({"detail": jsonable_encoder(error.errors())}, UNPROCESSABLE)


OWN_NAMES = {"model": "model_id", "steps": "num_inference_steps", "n": "count_returned"}
"""What this API calls a field of a request, where the names differ."""


@contextmanager
def in_own_words() -> Iterator[None]:
    """Within, a wrong value of a parameter is told as FastAPI tells of one, by the name that the parameter has here."""
    try:
        yield
    except InvalidRequest as error:
        if error.field is None:
            raise
        name = OWN_NAMES.get(error.field, error.field)
        message = str(error)
        if message.startswith(f"{error.field} "):
            message = name + message.removeprefix(error.field)
        where = ("body" if name == "image" else "query", name)
        raise RequestValidationError([{"loc": where, "msg": message, "type": "value_error"}]) from error


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its documentation; all have one body."""
    expected: dict[int | str, dict[str, Any]] = {status: {"model": RefusalBody} for status in statuses}
    return expected | {"default": {"model": RefusalBody, "description": "Any other refusal"}}
