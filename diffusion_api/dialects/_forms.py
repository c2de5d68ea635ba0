"""What APIs share whose parameters stand in the query: FastAPI's own refusals, the picture of a form, pictures in one PNG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import HTTPException, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from diffusion_api.dialects._base import MAX_SIDE, ErrorRoute, detail
from diffusion_api.dialects._jobs import result_of
from diffusion_api.errors import Gone, InvalidRequest

if TYPE_CHECKING:
    from diffusion_api.queues.base import Snapshot
    from diffusion_api.service import Picture, Service

UNPROCESSABLE = 422
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "description": "All pictures in one, up to four in a row",
    }
}
PROMPT = "Ein weiter Sandstrand am Meer bei Sonnenuntergang"
"""What is drawn where nothing else is asked for."""
TorchDtype = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    Field(description="checked, and without effect: numbers have the type that suits the device"),
]


class FaultBody(BaseModel):
    """What is wrong with one parameter."""

    loc: list[str | int] = Field(description="where it stands, such as query and its name")
    msg: str
    type: str


class RefusalBody(BaseModel):
    """A refusal: a sentence, or what is wrong with each parameter."""

    model_config = ConfigDict(json_schema_extra={"example": {"detail": "width is 5; it may be 8 to 65536"}})

    detail: str | list[FaultBody]


class DetailRoute(ErrorRoute):
    """A route whose refusals have the body of :class:`RefusalBody`."""

    @classmethod
    def told(cls, message: str) -> Any:
        """The body of a refusal."""
        return detail(message)

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


def form(description: str, *, required: bool = False) -> dict[str, Any]:
    """A form with a picture, for the documentation of a route."""
    image = {"type": "string", "format": "binary", "description": "what its part says of its type does not matter"}
    schema = {"type": "object", "properties": {"image": image}} | ({"required": ["image"]} if required else {})
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"description": description, "content": content, "required": required}}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its documentation; all have one body."""
    expected: dict[int | str, dict[str, Any]] = {status: {"model": RefusalBody} for status in statuses}
    return expected | {"default": {"model": RefusalBody, "description": "Any other refusal"}}


async def picture_sent(http: Request, limit: int) -> bytes | str | None:
    """The field ``image`` of a form, None where there is none. What else is sent would be of no effect, and is refused."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORMS:
        if await http.body():
            raise HTTPException(
                415, f"the body is {kind or 'of no type'}; a picture is sent as image of a multipart form"
            )
        return None
    async with http.form(max_files=1, max_fields=1, max_part_size=limit) as form:
        others = sorted(form.keys() - {"image"})
        if others:
            raise HTTPException(422, f"the form has {others[0][:80]!r}; all but image goes into the query")
        sent = form.get("image")
        if isinstance(sent, UploadFile):
            return await sent.read() if sent.size or sent.filename else None
        return sent or None


def picture_of(sent: bytes | str, service: Service) -> Picture:
    """The picture of a form. Raises InvalidImage and TooLarge."""
    return service.picture(sent, "image") if isinstance(sent, str) else service.picture_of(sent, "image")


def sheet(snapshot: Snapshot, service: Service) -> Response:
    """All pictures of a job as one PNG, with the infotext of the first. Raises the error that the job ended with, and Gone."""
    pictures = result_of(snapshot).images
    files = [data for picture in pictures if (data := service.image(picture))]
    if len(files) < len(pictures):
        raise Gone(f"a picture of job {snapshot.job.id} was deleted")
    return Response(files[0] if len(files) == 1 else _grid(files, pictures[0].infotext), media_type="image/png")


def _grid(files: list[bytes], infotext: str) -> bytes:
    import numpy as np

    from diffusion_api import canvas, images  # NumPy and Pillow: a third of the time until the service answers

    sheet = canvas.grid([images.decode(data, max_pixels=MAX_SIDE**2) for data in files])
    return images.encode(np.asarray(sheet), format="png", quality=100, infotext=infotext)
