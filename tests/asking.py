"""Requests, plain ones and ones for the shipped model, and what an engine answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_api.engine.base import Engine, Event, Finished, Pixels
from diffusion_api.schema.request import Hires, Img2Img, Output, Request, Txt2Img

Draw = Callable[..., Pixels]
"""``draw(prompt, steps=…)`` → the picture."""


FIELDS: dict[str, Any] = dict(
    model="small", prompt="a lighthouse", negative_prompt="", steps=4, guidance_scale=7.0, width=64, height=64,
    sampler="euler", schedule="karras", seed=1, output=Output(),
)  # fmt: skip
"""A valid request, field by field, for tests that draw nothing or have the stub engine draw."""


def plain(**changes: Any) -> Txt2Img:
    """``FIELDS`` with changes."""
    return Txt2Img(**FIELDS | changes)


SCENE = "a large red circle on a blue background"


def request(prompt: str = SCENE, **changes: object) -> Txt2Img:
    fields: dict[str, object] = dict(
        model="shapes", prompt=prompt, negative_prompt="", steps=20, guidance_scale=5, width=128, height=128,
        sampler="dpmpp_2m", schedule="karras", seed=1, output=Output(),
    )  # fmt: skip
    return Txt2Img.model_validate(fields | changes)


def hires(upscaler: str = "Latent", **changes: object) -> Hires:
    """A second pass with the shipped model."""
    fields: dict[str, object] = dict(
        upscaler=upscaler, width=256, height=256, steps=10, strength=0.4, sampler="dpmpp_2m", schedule="karras",
        model="shapes", prompt=SCENE, negative_prompt="",
    )  # fmt: skip
    return Hires.model_validate(fields | changes)


def from_picture(prompt: str, image: str, **changes: object) -> Img2Img:
    """A request for the shared engine that begins with one of its pictures."""
    fields = request(prompt).model_dump(exclude={"kind", "hires"}) | {"image": image, "strength": 0.75}
    return Img2Img.model_validate(fields | changes)


def events(engine: Engine, asked: Request) -> list[Event]:
    return list(engine.run(asked, stop=lambda: None))


def finished(engine: Engine, asked: Request) -> Finished:
    last = events(engine, asked)[-1]
    assert isinstance(last, Finished)
    return last
