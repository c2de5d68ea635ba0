"""Blobs: pictures that are uploaded for later tasks, and those that tasks made, by links that are their own credential."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, File, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool

from diffusion_api.dialects._base import shows
from diffusion_api.dialects._forms import refusals
from diffusion_api.dialects.tasks.meaning import base_url
from diffusion_api.dialects.tasks.route import form_only

if TYPE_CHECKING:
    from diffusion_api.service import Service

PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture, of the type that was uploaded; PNG for what a task made",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def add(router: APIRouter, service: Service) -> None:
    """Add the routes of blobs."""

    @router.post(
        "/blob", tags=["tasks"], summary="Upload a picture, and get its URL", dependencies=[Depends(form_only)],
        responses=refusals(401, 413, 415, 422, 429, 503, 507) | shows("http://127.0.0.1:8000/blob/eyJhbGciOi…"),
    )  # fmt: skip
    async def post_blob(blob_data: Annotated[UploadFile, File(description="the picture")], http: Request) -> str:
        path = await run_in_threadpool(service.upload, await blob_data.read(), "blob_data")
        return base_url(http, service) + path

    @router.get(
        "/blob/{token}", tags=["tasks"], summary="A picture by its URL, without a token", response_class=Response,
        responses=refusals(404, 503) | PICTURE,
    )  # fmt: skip
    def get_blob(token: str) -> Response:
        from diffusion_api.images import media_type  # NumPy and Pillow: a third of the time until the service answers

        data = service.blob(token)
        answer = Response(data, media_type=media_type(data))
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # who has the link may show it anywhere
        return answer
