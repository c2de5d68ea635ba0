"""What pictures say of themselves, over HTTP: file types, what is read from a picture, and pictures made again."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import Program

from diffusion_api import images, infotext

FILE_TYPES = ["jpg", "png", "webp", "avif", "gif"]
PROMPT = 'a „lighthouse“ 🦀, "quoted": yes\n中文, <b>'


def data_of(status: dict[str, Any]) -> bytes:
    return base64.b64decode(status["image"])


def pixels_of(status: dict[str, Any]) -> NDArray[np.uint8]:
    return np.asarray(images.decode(data_of(status), max_pixels=2**20).convert("RGB"))


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_says_what_was_asked_whatever_the_letters(stub_server: Program, file_type: str) -> None:
    status = stub_server.result(
        prompt=PROMPT, negative_prompt="fog", model="small", steps=1, seed=7, fileType=file_type
    )
    parameters = infotext.parse(images.read_infotext(data_of(status)) or "")
    assert (parameters.prompt, parameters.negative_prompt, parameters.fields["Seed"]) == (PROMPT, "fog", 7)


def test_a_lossless_webp_has_the_pixels_of_a_png(stub_server: Program) -> None:
    asked: dict[str, Any] = {"model": "small", "steps": 1, "seed": 7}
    png, webp, lossy = (
        stub_server.result(**asked, **how)
        for how in ({"fileType": "png"}, {"fileType": "webp", "lossless": True}, {"fileType": "webp", "quality": 30})
    )
    assert np.array_equal(pixels_of(png), pixels_of(webp))
    assert not np.array_equal(pixels_of(png), pixels_of(lossy))
    assert (webp["jpeg_quality"], lossy["jpeg_quality"]) == (None, 30)
    assert len(data_of(lossy)) < len(data_of(webp))
