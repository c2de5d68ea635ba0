"""Bodies filled from the text of a picture, and the files that it names, found again."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion_api import infotext
from diffusion_api.catalog import samplers
from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.dialects._base import build
from diffusion_api.dialects.native.bodies import MAX_UNKNOWN, Img2ImgBody, SamplingBody, Txt2ImgBody
from diffusion_api.errors import InvalidImage, InvalidRequest, UnknownModel, UnknownSampler
from diffusion_api.prompt import parse
from diffusion_api.schema.request import OWN_VAE

if TYPE_CHECKING:
    from diffusion_api.catalog.layouts import Kind
    from diffusion_api.service import Service

Drawn = TypeVar("Drawn", bound=SamplingBody)

DEFAULT_SAMPLER = "DPM++ 2M"
IN_BODY = {
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "schedule": "scheduler_type",
    "strength": "denoising_strength",
    "noise_multiplier": "initial_noise_multiplier",
}
"""What the body calls a field of the request, where the names differ."""


@contextmanager
def told_by_infotext(names: Container[str]) -> Iterator[None]:
    """Say of a wrong value of one of these fields that it is the infotext's: its sender wrote no such field."""
    try:
        yield
    except InvalidRequest as error:
        if (error.field or "").split(".")[0] not in names:
            raise
        raise type(error)(f"infotext: {error}", field="infotext") from error


def filled(body: Drawn, service: Service) -> tuple[Drawn, list[str]]:
    """The body with what its infotext says of all that it leaves out, and what the caller should know of that.

    Raises InvalidRequest, also for a file that is not installed; UnknownModel, UnknownSampler.
    """
    text = infotext.parse(body.infotext or "")
    told, unused = infotext.asked(text, picture=isinstance(body, Img2ImgBody))
    said = body.model_dump(exclude_unset=True, exclude_none=True)
    asked = {IN_BODY.get(key, key): value for key, value in told.items()}
    own = type(body).model_fields.keys() - said.keys()
    fields = {name: value for name, value in asked.items() if name in own}
    files = _Files(text, service)
    fields |= files.found(fields)
    notes = [f"infotext: {', '.join(unused[:MAX_UNKNOWN])} is not used here"] if unused else []
    began = infotext.began_with(text)
    if began == "enlarged" and not said.get("prompt"):
        raise InvalidRequest(
            "infotext: the picture is another one, enlarged, which is not in it; POST /upscale takes that",
            field="infotext",
        )
    if isinstance(body, Txt2ImgBody) and began == "drawn over":
        notes.append("infotext: the picture began with another one, which is not in it; POST /img2img takes that")
    with told_by_infotext(fields):
        full = build(type(body), **fields | said)
    try:
        samplers.resolve(full.sampler_name or DEFAULT_SAMPLER, full.scheduler_type)
    except UnknownSampler as error:
        if {"sampler_name", "scheduler_type"} & said.keys():
            raise
        raise UnknownSampler(f"infotext: {error}", field="infotext") from error
    return full, notes + files.notes


def with_text_of_image(body: Txt2ImgBody, service: Service) -> Txt2ImgBody:
    """The body with the infotext that is in its picture. Raises InvalidRequest, InvalidImage, TooLarge."""
    if not body.image:
        return body
    if body.infotext:
        raise InvalidRequest("image and infotext are both there, and each says it all; send one", field="image")
    from diffusion_api import images  # NumPy and Pillow: a third of the time until the service answers

    data = images.from_base64(body.image, max_bytes=service.settings.max_body, field="image")
    text = images.read_infotext(data)
    if text is None:
        raise InvalidImage(
            "image has no infotext in it that says how it was made; POST /img2img to draw from a picture", field="image"
        )
    return body.model_copy(update={"infotext": text})


class _Files:
    """The installed files that a text means, by their hashes first. ``notes`` are what the caller should know of them."""

    def __init__(self, text: infotext.Parameters, service: Service) -> None:
        self._hashes, self._service = infotext.hashes(text), service
        self.notes: list[str] = []

    def found(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Those of the fields of a body that name files, with the names that these have here. Raises InvalidRequest."""
        here: dict[str, Any] = {}
        for field in ("model", "refiner_checkpoint"):
            if field in fields:
                here[field] = self._name("model", str(fields[field]))
        if str(fields.get("vae", OWN_VAE)).lower() not in ("automatic", OWN_VAE.lower()):
            here["vae"] = self._name("vae", str(fields["vae"]))
        if hires := fields.get("hires"):
            here["hires"] = hires | self._of_hires(hires)
        if "loras" in fields:
            here["loras"] = [use | {"name": self._lora(use["name"])} for use in fields["loras"]]
        return here | {key: self._prompt(fields[key]) for key in ("prompt", "negative_prompt") if key in fields}

    def _of_hires(self, hires: dict[str, Any]) -> dict[str, Any]:
        here: dict[str, Any] = {key: self._prompt(hires[key]) for key in ("prompt", "negative_prompt") if key in hires}
        if "model" in hires:
            here["model"] = self._name("model", str(hires["model"]))
        upscaler = str(hires.get("upscaler", ""))
        if upscaler and upscaler.lower() not in map(str.lower, INTERNAL):
            here["upscaler"] = self._name("upscaler", upscaler)
        return here

    def _prompt(self, prompt: str) -> str:
        """A prompt with the LoRAs by the names that they have here."""
        for network in parse(prompt).networks:
            if network.kind == "lora" and (name := self._lora(network.name)) != network.name:
                there = rf"<lora:{re.escape(network.name)}(?=[:>])"
                prompt = f"<lora:{name}".join(re.split(there, prompt))
        return prompt

    def _lora(self, name: str) -> str:
        """A LoRA of which no hash is told was of no use there either, so that it may be missing here."""
        found = self._name("lora", name) if ("lora", name) in self._hashes else name
        same = self._service.asset("lora", name)
        return name if same and same.name == found else found

    def _name(self, kind: Kind, told: str) -> str:
        name, hashed = infotext.named(told)
        hashed = hashed or self._hashes.get((kind, name))
        row, by_hash = self._service.told(kind, name, hashed)
        if row is None:
            raise self._absent(kind, name, hashed)
        if hashed and not by_hash and row.path.is_file():
            self.notes.append(f"infotext: {kind} {name!r} is another file here: no installed one has the hash {hashed}")
        return row.name

    def _absent(self, kind: Kind, name: str, hashed: str | None) -> InvalidRequest:
        by_hash = f", and no file has its hash {hashed}" if hashed else ""
        if kind == "model":
            try:
                self._service.model(name)
            except UnknownModel as error:
                return UnknownModel(f"infotext: {error}{by_hash}; model beside it goes before it", field="infotext")
        rows = ", ".join(row.name for row in self._service.assets(kind))
        choices = f"one of {rows}" if rows else "none is"
        return InvalidRequest(f"infotext: {kind} {name!r} is not installed{by_hash}; {choices}", field="infotext")
