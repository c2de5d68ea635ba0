"""What a picture says of itself, and pictures made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Request, Response

from diffusion_api import infotext
from diffusion_api.dialects._base import caller_of
from diffusion_api.dialects._jobs import IdempotencyKey
from diffusion_api.dialects.native.bodies import ImgInfoBody, InfoBody, SubmittedBody, refusals
from diffusion_api.dialects.native.jobs import LINKS
from diffusion_api.errors import InvalidImage
from diffusion_api.queues.base import Key

if TYPE_CHECKING:
    from diffusion_api.service import Service


def add(router: APIRouter, service: Service) -> None:
    """Add the route that reads pictures, and the one that makes them again."""

    @router.post(
        "/img-info",
        tags=["pictures"],
        summary="What a picture says of itself",
        responses=refusals(400, 401, 403, 413, 415, 429),
    )
    def img_info(body: Annotated[ImgInfoBody, Body()]) -> InfoBody:
        from diffusion_api import images  # NumPy and Pillow: a third of the time until the service answers

        if not (body.image or "").strip():
            raise InvalidImage("No image data provided: image is a picture in base64, or a data URL", field="image")
        try:
            data = images.from_base64(body.image or "", max_bytes=service.settings.max_body, field="image")
        except InvalidImage as error:
            raise InvalidImage(f"Invalid base64 image data: {error}", field="image") from error
        try:
            found = images.read_metadata(data)
        except InvalidImage as error:
            raise InvalidImage(f"Failed to load image: {error}", field="image") from error
        return InfoBody(
            info=found.infotext or "",
            items=dict(found.items),
            parameters=_taken_apart(found.infotext) if found.infotext else {},
            format=found.format,
            width=found.width,
            height=found.height,
        )

    @router.post(
        "/queue/{job_id}/reproduce", tags=["pictures"], summary="Make the picture of a job again",
        responses=refusals(400, 401, 403, 404, 409, 410, 413, 422, 429, 503, 507) | {200: {"links": LINKS}},
    )  # fmt: skip
    def reproduce(
        job_id: str, http: Request, answer: Response, idempotency_key: IdempotencyKey = None
    ) -> SubmittedBody:
        key = None if idempotency_key is None else Key.of(idempotency_key, {"reproduce": job_id})
        stored, new = service.reproduce(job_id, caller_of(http), key=key)
        if not new:
            answer.headers["Idempotency-Replayed"] = "true"
        return SubmittedBody(job_id=stored.id, seed=stored.request.seeds[0], warnings=list(stored.warnings))


def _taken_apart(text: str) -> dict[str, infotext.Value]:
    told = infotext.parse(text)
    prompts: dict[str, infotext.Value] = {"prompt": told.prompt, "negative_prompt": told.negative_prompt}
    return prompts | {key: value for key, value in told.fields.items() if key not in prompts}
