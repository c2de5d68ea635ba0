"""Bodies to frozen requests: names looked up, holes filled, warnings collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from diffusion_api.catalog import samplers
from diffusion_api.catalog.compatibility import advice
from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.dialects._base import build, resolve_seed, round_size
from diffusion_api.dialects._jobs import Meant
from diffusion_api.dialects.native.bodies import HiresBody, JobBody, LoraBody, SamplingBody, Txt2ImgBody
from diffusion_api.dialects.native.told import DEFAULT_SAMPLER, Drawn, filled, told_by_infotext, with_text_of_image
from diffusion_api.dialects.native.unknown import unknown_fields
from diffusion_api.errors import InvalidRequest, UnknownModel, UnknownSampler
from diffusion_api.nearest import LONGEST_NAME, hint
from diffusion_api.prompt import Network, misread, parse, uncommented
from diffusion_api.schema.job import lora_skipped
from diffusion_api.schema.request import (
    MAX_LORA_SCALE,
    MAX_SEED,
    OWN_VAE,
    Format,
    Hires,
    LoraUse,
    Output,
    Policy,
    Refiner,
    Txt2Img,
)

if TYPE_CHECKING:
    from diffusion_api.catalog.library import Model
    from diffusion_api.service import Service

Size: TypeAlias = tuple[int, int, list[str]]
"""Width and height in pixels, and what the caller should know of how they came about."""

FILE_TYPES: dict[str, Format] = {
    "jpg": "jpeg",
    "png": "png",
    "webp": "webp",
    "avif": "avif",
    "gif": "gif",
    "jpeg": "jpeg",
}
LOSSLESS = ("png", "webp")
OPTIONS = (
    *("rng", "ensd", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "discard_next_to_last_sigma"),
    *("sigma_min", "sigma_max", "rho"),
    *("guidance_rescale", "clip_skip", "emphasis", "tiling", "preview_every"),
)
"""Fields that are passed on as they are, and left to the request's defaults when they are not given."""
SWITCH_AT = 0.8
"""Share of the steps after which the refiner takes over, where nothing else is said."""

KNOWN = "<lora:name:weight> is one"
LORA = {"name", "scale", "text_scale"}
"""What a body says of a LoRA that is known here."""


def txt2img(body: Txt2ImgBody, service: Service) -> Meant[Txt2Img]:
    """The picture from words that a body means. Raises InvalidRequest."""
    sent = body.model_fields_set
    body, fields, warnings = drawing(with_text_of_image(body, service), service, _own_size)
    first = build(Txt2Img, **fields)
    model = service.model(first.model)
    if model.refines:
        warnings.append(
            f"model {first.model!r} is a refiner and draws no more than the end; name it as refiner_checkpoint"
        )
    with told_by_infotext(body.model_fields_set - sent):
        hires, notes = _hires(_hires_styled(body, service), first, service)
    if hires:
        known = {network.name for network in _networks(first.prompt)} | {lora.name for lora in first.loras}
        own = [network for network in _networks(hires.prompt) if network.name not in known]
        notes += _unfit(own, service.model(hires.model), service)
        notes += misread(hires.prompt) if hires.prompt != first.prompt else []
    return Meant(first.model_copy(update={"hires": hires}), warnings + notes)


def _own_size(body: Txt2ImgBody, model: Model) -> Size:
    width, height = given(body.width, model.default_size[0]), given(body.height, model.default_size[1])
    return rounded({"width": width, "height": height}, model)


def rounded(sides: dict[str, int], model: Model) -> Size:
    """Width and height, by what callers call them, as multiples of what the model can make. Raises InvalidRequest."""
    (width, one), (height, other) = (round_size(side, name, model.multiple) for name, side in sides.items())
    return width, height, [note for note in (one, other) if note]


def drawing(
    body: Drawn, service: Service, size_of: Callable[[Drawn, Model], Size]
) -> tuple[Drawn, dict[str, Any], list[str]]:
    """The body with its holes filled, the fields of a request for drawings, and what the caller should know.

    Raises InvalidRequest.
    """
    warnings, sent = unknown_fields(body), body.model_fields_set
    if body.infotext:
        body, notes = filled(body, service)
        warnings += notes
    with told_by_infotext(body.model_fields_set - sent):
        return _drawn(body, service, size_of, warnings)


def _drawn(
    body: Drawn, service: Service, size_of: Callable[[Drawn, Model], Size], warnings: list[str]
) -> tuple[Drawn, dict[str, Any], list[str]]:
    prompt, negative_prompt, notes = _styled(body, service)
    warnings += notes
    model, notes = service.chosen(body.model)
    warnings += notes
    body = _defaulted(body, model)
    sampler, schedule = samplers.resolve(body.sampler_name or DEFAULT_SAMPLER, body.scheduler_type)
    width, height, notes = size_of(body, model)
    warnings += notes
    loras = tuple(_lora(lora) for lora in body.loras or [])
    warnings += _unfit([*map(_as_network, loras), *_networks(prompt)], model, service)
    warnings += misread(prompt) + misread(negative_prompt)
    refiner, notes = _refiner(body, model, service)
    warnings += notes
    seed, noise = resolve_seed(body.seed), _noise(body)
    if not noise.get("variation_strength") and seed + given(body.n, 1) - 1 > MAX_SEED:
        warnings.append(f"seeds go on from 0 after {MAX_SEED}")
    if bool(body.seed_resize_width) != bool(body.seed_resize_height):
        warnings.append("seed_resize_width and seed_resize_height are ignored: one is of no use without the other")
    return (
        body,
        dict(
            model=model.name,
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=given(body.steps, 30),
            guidance_scale=given(body.cfg_scale, 7.0),
            width=width,
            height=height,
            sampler=sampler.name,
            schedule=schedule.name,
            seed=seed,
            count=given(body.n, 1),
            loras=loras,
            vae=_vae(body.vae, service),
            refiner=refiner,
            **noise,
            **{name: value for name in OPTIONS if (value := getattr(body, name)) is not None},
            safety=safety(body),
            output=output(body),
        ),
        warnings + unfiltered(body, service),
    )


def output(body: JobBody) -> Output:
    """How a body wants its pictures stored. Raises InvalidRequest with the choices."""
    file_type = (body.fileType or "jpg").lower()
    if file_type not in FILE_TYPES:
        raise InvalidRequest(f"fileType is {body.fileType!r}; one of {', '.join(FILE_TYPES)}", field="fileType")
    if body.lossless and file_type not in LOSSLESS:
        raise InvalidRequest(
            f"lossless is true, which {file_type} cannot be; one of {', '.join(LOSSLESS)}", field="lossless"
        )
    return Output(format=FILE_TYPES[file_type], quality=given(body.jpeg_quality, 85), lossless=bool(body.lossless))


def safety(body: JobBody) -> Policy:
    """What a body asks to be done about pictures that the safety checker flags."""
    return "blur" if body.safety_filter else "off"


def unfiltered(body: JobBody, service: Service) -> list[str]:
    """What the caller should know of a filter that cannot be switched off."""
    policy = service.settings.safety
    if body.safety_filter is not False or policy == "off":
        return []
    return [f"safety_filter: false changes nothing, as the operator's policy is {policy}"]


def _refiner(body: SamplingBody, model: Model, service: Service) -> tuple[Refiner | None, list[str]]:
    """The refiner that a body means, and what the caller should know of it. Raises InvalidRequest."""
    if not body.refiner_checkpoint:
        return None, []
    if model.type != "sdxl":
        return None, [f"refiner_checkpoint is ignored: model {model.name!r} is no SDXL model"]
    try:
        found = service.model(body.refiner_checkpoint)
    except UnknownModel as error:
        raise UnknownModel(f"refiner_checkpoint: {error}", field="refiner_checkpoint") from error
    if found.type != "sdxl":
        return None, [f"refiner_checkpoint is ignored: {found.name!r} is no SDXL model"]
    return build(Refiner, model=found.name, switch_at=given(body.refiner_switch_at, SWITCH_AT)), []


def _hires(body: HiresBody | None, first: Txt2Img, service: Service) -> tuple[Hires | None, list[str]]:
    """The second pass that a body means, and what the caller should know of it. Raises InvalidRequest."""
    if body is None or not body.enabled:
        forgotten = body is not None and body.enabled is None and body.model_fields_set
        return None, ['hires is left out: it is not enabled; add "enabled": true'] if forgotten else []
    sides = _hires_sides(body, first)
    if sides[0] < first.width + 4 and sides[1] < first.height + 4:  # which the rounding to 8 would take away
        return None, [f"hires is left out: {sides[0]}x{sides[1]} is no larger than the first pass"]
    (width, one), (height, other) = (
        round_size(side, f"hires.{name}") for side, name in zip(sides, ("width", "height"), strict=True)
    )
    notes = [note for note in (one, other) if note and (body.width or body.height)]
    model = first.model
    if body.model:
        with _said_of("hires"):
            model = service.model(body.model).name
    if service.model(model).whole:
        raise InvalidRequest(
            f"hires: model {model!r} is drawn by a pipeline of its own, in one pass; leave it out", field="hires"
        )
    sampler, schedule = first.sampler, first.schedule
    if body.sampler_name or body.scheduler_type:
        label = body.sampler_name or samplers.sampler(sampler).label
        with _said_of("hires"):
            found = samplers.resolve(label, body.scheduler_type or schedule)
        sampler, schedule = found[0].name, found[1].name
    return build(
        Hires,
        upscaler=upscaler_name(body.upscaler, service, "hires.upscaler"),
        width=width,
        height=height,
        steps=body.steps or first.steps,
        strength=body.denoising_strength,
        sampler=sampler,
        schedule=schedule,
        model=model,
        prompt=body.prompt or first.prompt,
        negative_prompt=body.negative_prompt or first.negative_prompt,
    ), notes


def _hires_sides(body: HiresBody, first: Txt2Img) -> tuple[int, int]:
    """Width and height of the second pass; one alone keeps the proportions of the first."""
    if not (body.width or body.height):
        return round(first.width * body.scale), round(first.height * body.scale)
    for name in ("width", "height"):
        if side := getattr(body, name):
            round_size(side, f"hires.{name}")  # may be refused
    return (
        body.width or round(first.width * given(body.height, 0) / first.height),
        body.height or round(first.height * given(body.width, 0) / first.width),
    )


@contextmanager
def _said_of(part: str) -> Iterator[None]:
    """Say of a name that is not known in which part of the body it stands."""
    try:
        yield
    except (UnknownModel, UnknownSampler) as error:
        raise type(error)(f"{part}.{error}", field=part) from error


def upscaler_name(name: str, service: Service, field: str, built_in: Iterable[str] = INTERNAL) -> str:
    """The upscaler that a body means, whatever its case. Raises InvalidRequest with the choices."""
    choices = [*built_in, *(row.name for row in service.assets("upscaler"))]
    found = next((known for known in choices if known.lower() == name.lower()), None)
    if found is None and (row := service.asset("upscaler", name)):
        found = row.name
    if found is None:
        raise InvalidRequest(
            f"{field} {name!r} {service.absence(name)} (External upscaler model not found); one of {', '.join(choices)}",
            field=field,
        )
    return found


def _styled(body: SamplingBody, service: Service) -> tuple[str, str, list[str]]:
    """Both prompts with the body's styles around them, and which of these are not known. Raises TooLarge."""
    prompt, negative_prompt, notes = body.prompt, body.negative_prompt or "", []
    if body.styles:
        known = service.styles()
        prompt, negative_prompt = uncommented(prompt), uncommented(negative_prompt)
        for name in body.styles:
            if name in known:
                prompt, negative_prompt = known[name].around(prompt, negative_prompt)
                service.check_length(prompt, negative_prompt)  # each of them may double it
            else:
                notes.append(f"style {name[:LONGEST_NAME]!r} is not known and was skipped" + hint(name, known))
    return prompt, negative_prompt, notes


def _hires_styled(body: Txt2ImgBody, service: Service) -> HiresBody | None:
    """The second pass that a body has, with its styles around the words of its own. Raises TooLarge."""
    if body.hires is None or not body.styles:
        return body.hires
    own = {"prompt": body.hires.prompt or "", "negative_prompt": body.hires.negative_prompt or ""}
    prompt, negative_prompt, _ = _styled(body.model_copy(update=own), service)
    styled = {"prompt": own["prompt"] and prompt, "negative_prompt": own["negative_prompt"] and negative_prompt}
    return body.hires.model_copy(update=styled)


def _noise(body: SamplingBody) -> dict[str, Any]:
    """The variation and the other size of the noise, each whole or not there at all."""
    fields: dict[str, Any] = {}
    if body.variation_strength:
        seed = resolve_seed(body.variation_seed, "variation_seed")
        fields |= {"variation_seed": seed, "variation_strength": body.variation_strength}
    width, height = (given(side, 0) // 8 * 8 for side in (body.seed_resize_width, body.seed_resize_height))
    if width > 0 and height > 0:
        fields |= {"seed_resize_width": width, "seed_resize_height": height}
    return fields


def _lora(body: LoraBody | str) -> LoraUse:
    return LoraUse(name=body) if isinstance(body, str) else LoraUse(**body.model_dump(include=LORA))


def _as_network(lora: LoraUse) -> Network:
    return Network("lora", lora.name, lora.on_text, lora.scale)


def _networks(prompt: str) -> list[Network]:
    """The networks that a prompt names. Raises InvalidRequest for a strength beyond all use."""
    found = list(parse(prompt).networks)
    for network in found:
        strongest = max(network.unet, network.text_encoder, key=abs)
        if abs(strongest) > MAX_LORA_SCALE:
            raise InvalidRequest(
                f"prompt: the strength of {network.kind} {network.name[:LONGEST_NAME]!r} is {strongest:g}; "
                f"it may be -{MAX_LORA_SCALE} to {MAX_LORA_SCALE}",
                field="prompt",
            )
    return found


def _unfit(networks: list[Network], model: Model, service: Service) -> list[str]:
    """What to tell the caller of networks that no job will find, and of LoRAs that say that they are for other models.

    Whether a LoRA fits in the end is seen when it runs.
    """
    warnings = []
    for kind, name in dict.fromkeys((network.kind, network.name) for network in networks):
        row = service.asset("lora", name)
        if kind != "lora":
            warnings.append(f"<{kind}:{name}> was taken out of the prompt: no such kind of network is known; {KNOWN}")
        elif row is None:
            warnings.append(lora_skipped(name, f"it {service.absence(name)}"))
        elif row.family not in (None, model.family):
            warnings.append(advice(name, model.name, made_for=row.family, family=model.family))
    return warnings


def _vae(name: str | None, service: Service) -> str | None:
    """The VAE that a request means. Raises InvalidRequest with the choices."""
    if name is None or name.lower() == "automatic":
        return None
    if name.lower() == "none":
        return OWN_VAE
    row = service.asset("vae", name)
    if row is None:
        choices = ", ".join(["Automatic", OWN_VAE, *(row.name for row in service.assets("vae"))])
        raise InvalidRequest(f"vae {name!r} {service.absence(name)}; one of {choices}", field="vae")
    return row.name


def _defaulted(body: Drawn, model: Model) -> Drawn:
    """The body with the model's own defaults in place of what it leaves out."""
    profile = model.profile
    names = ("steps", "clip_skip", "vae")
    defaults: dict[str, Any] = {name: getattr(profile, name) for name in names} | {"cfg_scale": profile.guidance_scale}
    if profile.sampler and body.sampler_name is None:
        sampler, schedule = samplers.resolve(profile.sampler, body.scheduler_type)
        defaults |= {"sampler_name": sampler.label, "scheduler_type": schedule.name}
    left_out = {
        name: value
        for name, value in defaults.items()
        if value is not None and name in type(body).model_fields and getattr(body, name) is None
    }
    return body.model_copy(update=left_out)


def given(value: Any, default: Any) -> Any:
    return default if value is None else value
