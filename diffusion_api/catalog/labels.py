"""Friendly names of models, and what the operator says of them in ``stable_diffusion/models.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from diffusion_api.catalog import samplers
from diffusion_api.catalog.detect import PREDICTIONS
from diffusion_api.errors import UnknownSampler
from diffusion_api.schema.request import Frozen

LABELS = {
    "John6666__amanatsu-illustrious-v11-sdxl": "Amanatsu",
    "models--digiplay--ChikMix_V3": "ChikMix V3",
    "models--John6666--ilustmix-v6-sdxl": "Ilustmix",
    "models--Meina--MeinaMix_V11": "MeinaMix V11",
    "models--mirroring--pastel-mix": "Pastel Mix",
    "models--misri--plantMilkModelSuite_hempII": "PlantMilk (HempII)",
    "models--misri--plantMilkModelSuite_walnut": "PlantMilk (Walnut)",
}
"""The labels of the original API, installed or not."""

SHIPPED = {"shapes": "Shapes (demo)"}

BASE_MODELS = {
    "SD 1.5": "runwayml/stable-diffusion-v1-5",
    "SD 2.0": "stabilityai/stable-diffusion-2",
    "SD 2.1": "stabilityai/stable-diffusion-2-1",
    "SDXL 1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "Flux.1 D": "black-forest-labs/FLUX.1-dev",
}
"""The base models of the configuration API: Civitai's word for each, and its name on the hub."""

FAMILY_BASES = {
    "sd1": BASE_MODELS["SD 1.5"],
    "sd2": BASE_MODELS["SD 2.1"],
    "sdxl": BASE_MODELS["SDXL 1.0"],
    "flux": BASE_MODELS["Flux.1 D"],
}
"""The base model of each family."""


def label(name: str) -> str:
    """The friendly name of a model; its own name when it has none."""
    return (LABELS | SHIPPED).get(name, name)


def repository(name: str) -> str | None:
    """The repository of the hub that a name or label of a model means, None where it means none."""
    if name == "stable-diffusion-v1-5":
        return "stable-diffusion-v1-5/stable-diffusion-v1-5"
    named = next((model for model, text in LABELS.items() if loose(text) == loose(name)), name)
    parts = named.removeprefix("models--").replace("--", "/", 1).replace("__", "/", 1)
    return parts if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", parts) else None


def loose(name: str) -> str:
    """A name as it is compared where case, ``-`` and ``_`` do not matter."""
    return name.lower().replace("-", " ").replace("_", " ").strip()


def _both_sides(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Side = Annotated[int, Field(ge=64, multiple_of=8)]


class Profile(Frozen):
    """What the operator says of one model: names, the defaults of requests, and how it predicts, whatever its files say.
    ``size`` is width and height in pixels. None is for what was not said.
    """

    label: str | None = None
    aliases: tuple[str, ...] = ()
    size: Annotated[tuple[Side, Side] | None, BeforeValidator(_both_sides)] = None
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    sampler: str | None = None
    clip_skip: int | None = Field(default=None, ge=1, le=12)
    vae: str | None = None
    prediction: Literal["epsilon", "v"] | None = None
    ztsnr: bool | None = None

    @property
    def schedule(self) -> dict[str, object]:
        """How the model predicts, in the words of a diffusers scheduler config."""
        said = {
            "prediction_type": self.prediction and PREDICTIONS[self.prediction],
            "rescale_betas_zero_snr": self.ztsnr,
        }
        return {key: value for key, value in said.items() if value is not None}

    def over(self, other: Profile) -> Profile:
        """This one, and what it leaves open as the other has it."""
        return Profile.model_validate(other.model_dump() | self.model_dump(exclude_unset=True))

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                samplers.resolve(name, None)
            except UnknownSampler as error:
                raise ValueError(str(error)) from error
        return name


def read_profiles(file: Path, tell: Callable[[str], None]) -> dict[str, Profile]:
    """The profiles in a file, by loose name of the model. What is wrong in it is told, and the rest is used."""
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        tell(f"{file.name} is not used: {error.strerror}")
        return {}
    except ValueError as error:  # of TOML, which tells the line, or of UTF-8
        tell(f"{file.name} is not used: {error}")
        return {}
    found = {}
    for name, table in tables.items():
        try:
            found[loose(name)] = Profile.model_validate(table)
        except ValidationError as error:
            tell(f"{file.name}: [{name}] is not used: {_reason(error)}")
    return found


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return "it is no table of keys; write [name] above them"
    key = first["loc"][0]
    if first["type"] == "extra_forbidden":
        return f"{key!r} is no key; one of {', '.join(Profile.model_fields)}"
    return f"{key} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
