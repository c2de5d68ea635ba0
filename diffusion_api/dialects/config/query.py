"""The parameters of ``/post_config``, and the original's defaults."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, Field

from diffusion_api.dialects._base import MAX_SIDE
from diffusion_api.dialects._forms import PROMPT, TorchDtype

MULTIPLE = 8
SIDE = 512
"""Width and height where nothing else tells them, pixels."""

Side: TypeAlias = Annotated[int, Field(ge=MULTIPLE, le=MAX_SIDE)]


class ConfigQuery(BaseModel):
    """What a picture is configured with."""

    prompt: str = PROMPT
    model_id: str | None = Field(
        default=None, description="a value of /get_available_stable_diffs; left out: the default model of the service"
    )
    torch_dtype: TorchDtype = "float16"
    num_inference_steps: int = Field(default=20, ge=1)
    count_returned: int = Field(default=1, ge=1, description="pictures, whose seeds are seed, seed + 1, ...")
    seed: int = Field(default=0, description="a negative one draws one")
    guidance_scale: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    negative_prompt: str = "blurry, low resolution, low quality"
    width: Side | None = Field(
        default=None, description="left out: 512, or the picture's; rounded down to a multiple of 8"
    )
    height: Side | None = Field(
        default=None, description="left out: 512, or the picture's; rounded down to a multiple of 8"
    )
    lora: str | None = Field(default=None, description="a name of /get_available_loras; empty or None for none")
