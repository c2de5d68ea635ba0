"""What a job asks for, in the project's own words. No holes: dialects fill defaults and draw seeds before they build one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

MAX_SEED = 2**32 - 1

OWN_VAE = "None"
"""The name of the VAE that a model has itself."""

Format = Literal["png", "jpeg", "webp", "avif", "gif"]
Source = Literal["nv", "cpu"]
Emphasis = Literal["original", "no norm", "ignore", "none"]
Fill = Literal["fill", "original", "latent noise", "latent nothing"]
ResizeMode = Literal["just resize", "crop and resize", "resize and fill", "latent"]

Policy = Literal["off", "blur", "refuse", "required"]
"""What is done about pictures that a safety checker flags, from the mildest. ``required`` is ``refuse`` that does without no
checker.
"""


def strictest(*policies: Policy) -> Policy:
    """The one of several policies that holds."""
    return max(policies, key=get_args(Policy).index)


class Frozen(BaseModel):
    """Immutable data that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(Frozen):
    """How the picture is stored. ``quality`` is 1 to 100 and matters where something is lost: in JPEG, AVIF and WebP, unless
    that is ``lossless``.
    """

    format: Format = "jpeg"
    quality: int = Field(default=85, ge=1, le=100)
    lossless: bool = False

    @property
    def lossy(self) -> bool:
        """Whether ``quality`` matters."""
        return self.format in ("jpeg", "webp", "avif") and not self.lossless


MAX_HIRES_SCALE = 8
"""Of a side of the first pass; larger ones can be asked for by width and height."""

MAX_LORA_SCALE = 100
"""Up or down. What makes pictures lies between -2 and 2; far beyond, weights overflow."""


class LoraUse(Frozen):
    """A LoRA by name, how strongly it works, and how strongly on the text encoders where that is another number."""

    name: str
    scale: float = Field(default=1.0, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)
    text_scale: float | None = Field(default=None, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)

    @property
    def on_text(self) -> float:
        """Its strength on the text encoders."""
        return self.scale if self.text_scale is None else self.text_scale


class Refiner(Frozen):
    """The model that draws the rest of a pass once ``switch_at`` of its steps are done, 0 to 1."""

    model: str
    switch_at: float = Field(ge=0, le=1)


def _zero_or(low: float, high: float) -> Callable[[float], float]:
    def checked(value: float) -> float:
        if value == 0 or low <= value <= high:
            return value
        raise ValueError(f"it may be {low:g} to {high:g}, or 0 for the schedule's own")

    return checked


class Sampling(Frozen):
    """What every request says that has pictures drawn by a model.

    ``model``, ``sampler`` and ``schedule`` are names of the catalogs, already looked up. ``width`` and ``height`` are pixels,
    multiples of 8. ``guidance_scale`` 1 means no guidance. ``seed`` is 0 to 2**32 - 1; ``count`` pictures are made.

    ``rng`` is where noise comes from: as on an NVIDIA GPU, or torch's CPU generator. ``variation_strength`` is 0 to 1; at 0
    there is no ``variation_seed``. ``seed_resize_width`` and ``seed_resize_height`` are pixels, both 0 for no other size.
    ``ensd`` is added to the seed of noise that is drawn after the first. ``eta`` None is the sampler's own; ``s_tmax`` 0 is
    no end; ``sigma_min``, ``sigma_max`` and ``rho`` 0 are the schedule's own.
    ``clip_skip`` counts layers of the text encoder from the last one, 1.

    ``loras`` are asked for beside those that the prompt names. ``vae`` is a name, ``"None"`` for the model's own; None for
    the one that is named like the model, where there is one.

    ``safety`` is what was asked for at least; the policy of the worker that runs the job may be stricter.

    ``refiner`` takes over in the last pass of each picture. With ``tiling`` the edges of a picture fit each other. After
    every ``preview_every`` steps there is a small picture of what is drawn; 0 for none.
    """

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

    rng: Source = "nv"
    variation_seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    variation_strength: float = Field(default=0, ge=0, le=1)
    seed_resize_width: int = Field(default=0, ge=0, multiple_of=8)
    seed_resize_height: int = Field(default=0, ge=0, multiple_of=8)
    ensd: int = Field(default=0, ge=-MAX_SEED, le=MAX_SEED)

    eta: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    s_churn: float = Field(default=0, ge=0, allow_inf_nan=False)
    s_tmin: float = Field(default=0, ge=0, allow_inf_nan=False)
    s_tmax: float = Field(default=0, ge=0, allow_inf_nan=False)
    s_noise: float = Field(default=1, ge=0, allow_inf_nan=False)
    discard_next_to_last_sigma: bool = False
    sigma_min: Annotated[float, AfterValidator(_zero_or(0.001, 10))] = 0
    sigma_max: Annotated[float, AfterValidator(_zero_or(0.1, 5000))] = 0
    rho: Annotated[float, AfterValidator(_zero_or(0.1, 100))] = 0

    guidance_rescale: float = Field(default=0, ge=0, le=1)
    clip_skip: int = Field(default=1, ge=1, le=12)
    emphasis: Emphasis = "original"

    loras: tuple[LoraUse, ...] = ()
    vae: str | None = None
    refiner: Refiner | None = None
    tiling: bool = False
    preview_every: int = Field(default=0, ge=0)
    safety: Policy = "off"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.variation_seed is None) != (self.variation_strength == 0):
            raise ValueError("variation_seed and variation_strength belong together")
        if (self.seed_resize_width == 0) != (self.seed_resize_height == 0):
            raise ValueError("seed_resize_width and seed_resize_height belong together")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stored pictures that it brings along."""
        return ()

    @field_validator("sigma_max")
    @classmethod
    def _above(cls, sigma_max: float, others: ValidationInfo) -> float:
        if sigma_max and sigma_max <= others.data.get("sigma_min", 0):
            raise ValueError(f"it must be more than sigma_min, {others.data['sigma_min']:g}")
        return sigma_max

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture: ``seed``, ``seed + 1``, …, around at 2**32. All variations have the same one."""
        if self.variation_seed is not None:
            return (self.seed,) * self.count
        return self._counted(self.seed)

    @property
    def variation_seeds(self) -> tuple[int | None, ...]:
        """The variation seed of each picture."""
        if self.variation_seed is None:
            return (None,) * self.count
        return self._counted(self.variation_seed)

    @property
    def prompts(self) -> tuple[str, ...]:
        """All that was asked for in words."""
        return self.prompt, self.negative_prompt

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all that draw."""
        return (self.model, self.refiner.model) if self.refiner else (self.model,)

    def _counted(self, first: int) -> tuple[int, ...]:
        return tuple((first + i) % (MAX_SEED + 1) for i in range(self.count))


class Hires(Frozen):
    """A second pass at a larger size, ``width`` x ``height`` pixels.

    ``upscaler`` is one of the catalog's. ``strength`` is how much of the first picture is drawn anew, 0 to 1, in ``steps``
    steps. ``model``, ``prompt`` and the rest are those of the first pass or its own.
    """

    upscaler: str
    width: int = Field(ge=8, multiple_of=8)
    height: int = Field(ge=8, multiple_of=8)
    steps: int = Field(ge=1)
    strength: float = Field(ge=0, le=1)
    sampler: str
    schedule: str
    model: str
    prompt: str
    negative_prompt: str


class Mask(Frozen):
    """Where a picture is painted anew: ``image`` names a stored picture, white or opaque there.

    ``blur`` is the sigma of its edge in pixels. ``fill`` is what is under it to begin with. With ``only_masked`` the box
    around it and ``padding`` pixels more are drawn at the size of the request and pasted back.
    """

    image: str
    blur: float = Field(default=4, ge=0, le=256)
    invert: bool = False
    fill: Fill = "fill"
    only_masked: bool = False
    padding: int = Field(default=32, ge=0, le=2048)


class Txt2Img(Sampling):
    """A picture from words."""

    kind: Literal["txt2img"] = "txt2img"
    hires: Hires | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """All that was asked for in words."""
        return super().prompts + ((self.hires.prompt, self.hires.negative_prompt) if self.hires else ())

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all that draw."""
        return super().models + ((self.hires.model,) if self.hires else ())


class Img2Img(Sampling):
    """A picture from words and a picture, ``image``, the name of a stored one; with a mask, a part of it.

    ``strength`` is how much of it is drawn anew, 0 to 1. ``noise_multiplier`` scales the noise that is added.
    """

    kind: Literal["img2img"] = "img2img"
    image: str
    strength: float = Field(ge=0, le=1)
    resize_mode: ResizeMode = "just resize"
    noise_multiplier: float = Field(default=1, ge=0, le=2)
    mask: Mask | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The picture, and the mask if there is one."""
        return (self.image, self.mask.image) if self.mask else (self.image,)


class Upscale(Frozen):
    """A picture, ``image``, the name of a stored one, with other pixels, ``width`` x ``height``.

    ``upscaler`` is one of the catalog's that enlarges no latents; ``safety`` as in :class:`Sampling`.
    """

    kind: Literal["upscale"] = "upscale"
    image: str
    upscaler: str
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    output: Output
    safety: Policy = "off"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The picture."""
        return (self.image,)

    @property
    def seeds(self) -> tuple[None]:
        """Nothing is drawn, so there is none."""
        return (None,)

    @property
    def prompts(self) -> tuple[()]:
        """Nothing is asked for in words."""
        return ()


class Reading(Frozen):
    """What every request says that has a model tell of a picture, ``image``, the name of a stored one.

    The model sees it with ``width`` x ``height`` pixels.
    """

    model: str
    image: str
    width: int = Field(ge=8, multiple_of=8)
    height: int = Field(ge=8, multiple_of=8)
    seed: int = Field(ge=0, le=MAX_SEED)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The picture."""
        return (self.image,)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One: there is one answer."""
        return (self.seed,)

    @property
    def prompts(self) -> tuple[()]:
        """Nothing is asked for in words."""
        return ()

    @property
    def models(self) -> tuple[str, ...]:
        """The one that tells."""
        return (self.model,)


class Caption(Reading):
    """Words for a picture. ``guidance_scale`` 1 means no guidance."""

    kind: Literal["caption"] = "caption"
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0, allow_inf_nan=False)


class Embed(Reading):
    """What a model makes of a picture before it draws or tells: its embedding by CLIP, and a sample of its latents."""

    kind: Literal["embed"] = "embed"


Request = Txt2Img | Img2Img | Upscale | Caption | Embed
AnyRequest = Annotated[Request, Field(discriminator="kind")]
"""For fields of records: the kind says which one it is."""


def model_of(request: Request) -> str | None:
    """The model that draws, by name; None where none does."""
    return request.model if isinstance(request, Sampling) else None


def policy_for(request: Request, operator: Policy) -> Policy:
    """What is done about the pictures of a request: the stricter of what it asks for and of the operator's policy."""
    return "off" if isinstance(request, Reading) else strictest(request.safety, operator)
