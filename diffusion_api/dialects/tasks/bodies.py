"""What the task API takes and tells, as its document has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from fastapi import Body
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Scheduler: TypeAlias = Literal["plms", "ddim", "k-lms"]


TASK = "0d5a9e7c-3f1b-4d56-8a52-6f3f2f6f2b11"
PICTURE = "http://127.0.0.1:8000/blob/eyJhbGciOi…"
RESULT: dict[str, Any] = {
    "blob_url": PICTURE,
    "parameters_used": {"params_type": "txt2img", "prompt": "a lighthouse", "steps": 20, "seed": 42, "model": "small"},
}
"""What the documentation shows."""


class Params(BaseModel):
    """What every task says. A field that is not known is refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default=None,
        description="name, label, folder, file or hub id of an installed model; the server's own if none is named",
    )
    prompt: str = Field(description="what the picture shows", examples=["a large red circle on a blue background"])
    negative_prompt: str | None = Field(default=None, description="what it does not show")
    steps: int = Field(default=20, ge=1, description="number of steps")
    guidance: float = Field(default=7.5, ge=1, allow_inf_nan=False, description="relatedness to prompt")
    scheduler: Scheduler = Field(default="plms", description="plms, ddim or k-lms")
    seed: int | None = Field(default=None, description="randomness seed; drawn if none is given, and told")
    safety_filter: bool = Field(default=True, description="have the picture checked, where the operator has a checker")


class Txt2ImgParams(Params):
    """A picture from words."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "a lighthouse", "steps": 20}})

    params_type: Literal["txt2img"] = "txt2img"
    width: int = Field(default=512, description="pixels; the picture has the nearest width that the model can make")
    height: int = Field(default=512, description="pixels")


class Img2ImgParams(Params):
    """A picture from words and a picture."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "a lighthouse", "initial_image": PICTURE, "strength": 0.6}}
    )

    params_type: Literal["img2img"] = "img2img"
    initial_image: str = Field(
        description="URL of the picture to be changed: a blob of this server, or an allowed host"
    )
    strength: float = Field(default=0.8, ge=0, le=1, description="how much of it is changed")


class InpaintParams(Params):
    """A picture with a part painted anew."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "a red boat", "initial_image": PICTURE, "mask": PICTURE}}
    )

    params_type: Literal["inpaint"] = "inpaint"
    initial_image: str = Field(
        description="URL of the picture to be changed: a blob of this server, or an allowed host"
    )
    mask: str = Field(description="URL of a picture of the same size, white where the other is painted anew")


AnyParams: TypeAlias = Txt2ImgParams | Img2ImgParams | InpaintParams
KINDS: dict[str, str] = {"mask": "inpaint", "initial_image": "img2img"}
"""What a task without ``params_type`` is, by the first of these fields that it has."""


def kind_of(params: Any) -> str:
    """Which of the three a body is."""
    if not isinstance(params, dict):
        return getattr(params, "params_type", "txt2img")
    told = params.get("params_type", next((kind for field, kind in KINDS.items() if field in params), "txt2img"))
    return told if isinstance(told, str) else repr(told)


TaskBody: TypeAlias = Annotated[
    Annotated[Txt2ImgParams, Tag("txt2img")]
    | Annotated[Img2ImgParams, Tag("img2img")]
    | Annotated[InpaintParams, Tag("inpaint")],
    Discriminator(kind_of),
    Body(),
]


class Txt2ImgQuery(Txt2ImgParams):
    """The same in a URL, where unknown fields are let pass."""

    model_config = ConfigDict(extra="ignore")


class Img2ImgQuery(Img2ImgParams):
    """The same in a URL, where unknown fields are let pass."""

    model_config = ConfigDict(extra="ignore")


class InpaintQuery(InpaintParams):
    """The same in a URL, where unknown fields are let pass."""

    model_config = ConfigDict(extra="ignore")


class ResultBody(BaseModel):
    """What a task made, with what: the effective seed, model and filter."""

    model_config = ConfigDict(json_schema_extra={"example": RESULT})

    blob_url: str
    parameters_used: Txt2ImgParams | Img2ImgParams | InpaintParams


class PendingEvent(BaseModel):
    """The task waits."""

    model_config = ConfigDict(json_schema_extra={"example": {"event_type": "pending", "task_id": TASK}})

    event_type: Literal["pending"]
    task_id: str


class StartedEvent(BaseModel):
    """The task runs."""

    model_config = ConfigDict(json_schema_extra={"example": {"event_type": "started", "task_id": TASK}})

    event_type: Literal["started"]
    task_id: str


class FinishedEvent(BaseModel):
    """The task has made its picture."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"event_type": "finished", "task_id": TASK, "result": RESULT}}
    )

    event_type: Literal["finished"]
    task_id: str
    result: ResultBody


class AbortedEvent(BaseModel):
    """The task ended without one."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"event_type": "aborted", "task_id": TASK, "reason": "cancelled"}}
    )

    event_type: Literal["aborted"]
    task_id: str
    reason: str


AnyEvent: TypeAlias = PendingEvent | StartedEvent | FinishedEvent | AbortedEvent


class TokenBody(BaseModel):
    """A token, good for four hours."""

    model_config = ConfigDict(json_schema_extra={"example": {"access_token": "eyJhbGciOi…", "token_type": "bearer"}})

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - OAuth2's word


class UserBody(BaseModel):
    """An account."""

    model_config = ConfigDict(json_schema_extra={"example": {"username": "ada"}})

    username: str
