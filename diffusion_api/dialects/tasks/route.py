"""How the task API refuses: ``{"detail": …}``, and FastAPI's list where a field is wrong."""

from __future__ import annotations

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from diffusion_api.dialects._forms import FORMS, DetailRoute
from diffusion_api.errors import DiffusionApiError, InvalidRequest

KINDS = ("txt2img", "img2img", "inpaint")


class TaskRoute(DetailRoute):
    """A route of this dialect."""

    @classmethod
    def misread(cls, error: RequestValidationError) -> Response:
        """The fields that are wrong; never what they hold, which may be a password."""
        flaws = error.errors()
        if any(isinstance(flaw.get("input"), bytes) for flaw in flaws):
            return JSONResponse(cls.told("the body must be JSON, sent with Content-Type: application/json"), 415)
        return _flawed(*((_place(flaw["loc"]), flaw["msg"], flaw["type"]) for flaw in flaws))

    def refused(self, error: DiffusionApiError) -> Response:
        """The same of what only the catalogs and the operator's limits know."""
        if isinstance(error, InvalidRequest) and error.field:
            return _flawed(
                (["query" if "GET" in (self.methods or ()) else "body", error.field], str(error), "value_error")
            )
        return super().refused(error)


def _flawed(*flaws: tuple[list[str | int], str, str]) -> Response:
    return JSONResponse({"detail": [dict(zip(("loc", "msg", "type"), flaw, strict=True)) for flaw in flaws]}, 422)


def _place(loc: tuple[str | int, ...]) -> list[str | int]:
    """Where a field is, without the kind of task, which pydantic puts before it."""
    return [part for number, part in enumerate(loc) if number != 1 or part not in KINDS]


def form_only(http: Request) -> None:
    """Refuse a body that is no form. Raises HTTPException."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind not in FORMS:
        raise HTTPException(415, f"the body is {kind[:80]}; it must be {' or '.join(FORMS)}")
