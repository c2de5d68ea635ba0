"""What a job asks for, in the project's own words. No holes: dialects fill defaults and draw seeds before they build one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**32 - 1


class Frozen(BaseModel):
    """Immutable data that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(Frozen):
    """How the picture is stored. ``quality`` is 1 to 100 and means nothing to a PNG."""

    format: Literal["png", "jpeg"] = "jpeg"
    quality: int = Field(default=85, ge=1, le=100)


class Txt2Img(Frozen):
    """A picture from words.

    ``model``, ``sampler`` and ``schedule`` are names of the catalogs, already looked up. ``width`` and ``height`` are pixels,
    multiples of 8. ``guidance_scale`` 1 means no guidance. ``seed`` is 0 to 2**32 - 1; ``count`` pictures are made.
    """

    kind: Literal["txt2img"] = "txt2img"
    model: str
    prompt: str
    negative_prompt: str
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0, allow_inf_nan=False)
    width: int = Field(ge=8, multiple_of=8)
    height: int = Field(ge=8, multiple_of=8)
    sampler: str
    schedule: str
    seed: int = Field(ge=0, le=MAX_SEED)
    count: int = Field(default=1, ge=1)
    output: Output

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture: ``seed``, ``seed + 1``, …, around at 2**32."""
        return tuple((self.seed + i) % (MAX_SEED + 1) for i in range(self.count))


Request = Txt2Img
