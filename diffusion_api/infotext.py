"""The generation parameters as text, in AUTOMATIC1111's form: written into pictures, and read back from them.

    a castle on a hill
    Negative prompt: fog
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: anything

The form is that of A1111 v1.10.1. ``METADATA_README.md`` is the manual; :mod:`diffusion_api.images` puts it into files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusion_api.schema.request import MAX_HIRES_SCALE, Img2Img, LoraUse, Sampling, Txt2Img, Upscale

Value = str | int | float | bool
"""What a field holds: text, or the number or truth value that the text stood for."""

_NEGATIVE = "Negative prompt:"

_LEADING = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Image CFG scale",
    "Seed",
    "Face restoration",
    "Size",
    "Model hash",
    "Model",
    "FP8 weight",
    "Cache FP16 weight for LoRA",
    "VAE hash",
    "VAE",
    "Variation seed",
    "Variation seed strength",
    "Seed resize from",
    "Denoising strength",
    "Conditional mask weight",
    "Clip skip",
    "ENSD",
    "Token merging ratio",
    "Token merging ratio hr",
    "Init image hash",
    "RNG",
    "Tiling",
)
_TRAILING = ("Version", "User")

# A field whose key ends in one of these words is text, whatever it looks like: "Model hash: 12345678", "Version: 1.10".
_TEXT_WORDS = {
    *("hash", "hashes", "model", "checkpoint", "vae", "refiner", "upscaler", "sampler", "scheduler"),
    *("version", "user", "name", "prompt"),
}

# All quantifiers are possessive and the depth of JSON is bounded, so that no text is read more than a few times.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'


def _json_pattern(depth: int) -> str:
    """A pattern for brackets with brackets and strings in them, ``depth`` deep: what may be JSON."""
    inner = f"|{_json_pattern(depth - 1)}" if depth > 1 else ""
    return rf'[\[{{](?:[^\[\]{{}}"]++|{_STRING}{inner})*+[\]}}]'


_END = r"\s*+(?:,|\Z)"
_KEY = re.compile(r"(\w[\w \-/]++)(:\s*+)?+")
_QUOTED = re.compile(f"({_STRING}){_END}")
_JSON = re.compile(f"({_json_pattern(6)}){_END}")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30}(?:e[+-][0-9]{2,3})?|e[+-][0-9]{2,3})")
_STRENGTH = r"(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,3})?)"
_USE = re.compile(rf'\s*+({_STRING}|[^,:"][^,:]*+):{_STRENGTH}(?::{_STRENGTH})?\s*+(?:,|\Z)')
_BARE_USE = rf'[^,:"\s][^,:"]{{0,200}}+:{_STRENGTH}(?::{_STRENGTH})?'
_BARE_USES = re.compile(rf"({_BARE_USE}(?:,\s*+{_BARE_USE}){{1,99}}+){_END}")
_NAMED = re.compile(r"(.+?)\s*+\[([0-9a-fA-F]{8,64})\]", re.DOTALL)
_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")
_VERSION = re.compile(r"v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(?:-(\d{1,9}))?(?![.\w])")

_NOVELAI_SAMPLERS = {
    "k_euler": "Euler",
    "k_heun": "Heun",
    "k_lms": "LMS",
    "k_dpm_2": "DPM2",
    "k_dpm_2_ancestral": "DPM2 a",
    "k_dpm_fast": "DPM fast",
    "k_dpm_adaptive": "DPM adaptive",
    "k_dpmpp_2s_ancestral": "DPM++ 2S a",
    "k_dpmpp_2m": "DPM++ 2M",
    "k_dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_sde": "DPM++ SDE",
    "ddim": "DDIM",
    "ddim_v3": "DDIM",
    "plms": "PLMS",
}

_DEFAULTS: dict[str, Value] = {
    "Clip skip": 1,
    "Hires resize-1": 0,
    "Hires resize-2": 0,
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": 32,
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": 0,
    "Schedule min sigma": 0,
    "Schedule rho": 0,
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Refiner switch by sampling steps": False,
}


_OPTIONS = {
    "Variation seed strength": "variation_strength",
    "Clip skip": "clip_skip",
    "ENSD": "ensd",
    "Sigma churn": "s_churn",
    "Sigma tmin": "s_tmin",
    "Sigma tmax": "s_tmax",
    "Sigma noise": "s_noise",
    "Discard penultimate sigma": "discard_next_to_last_sigma",
    "Schedule min sigma": "sigma_min",
    "Schedule max sigma": "sigma_max",
    "Schedule rho": "rho",
    "CFG Rescale": "guidance_rescale",
}
"""Fields of a request that are written where they differ from their default."""

_ASKED = _OPTIONS | {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "schedule",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Size-1": "width",
    "Size-2": "height",
    "Model": "model",
    "Variation seed": "variation_seed",
    "Seed resize from-1": "seed_resize_width",
    "Seed resize from-2": "seed_resize_height",
    "Eta": "eta",
    "Eta DDIM": "eta",
    "VAE": "vae",
    "RNG": "rng",
    "Emphasis": "emphasis",
    "Tiling": "tiling",
    "Refiner": "refiner_checkpoint",
    "Refiner switch at": "refiner_switch_at",
}

_ASKED_OF_HIRES = {
    "Denoising strength": "denoising_strength",
    "Hires checkpoint": "model",
    "Hires sampler": "sampler_name",
    "Hires schedule type": "scheduler_type",
    "Hires prompt": "prompt",
    "Hires negative prompt": "negative_prompt",
    "Hires upscale": "scale",
    "Hires resize-1": "width",
    "Hires resize-2": "height",
    "Hires steps": "steps",
    "Hires upscaler": "upscaler",
}

_ASKED_OF_PICTURES = {
    "Denoising strength": "strength",
    "Resize mode": "resize_mode",
    "Noise multiplier": "noise_multiplier",
    "Mask mode": "mask_invert",
    "Mask blur": "mask_blur",
    "Masked content": "mask_fill",
    "Inpaint area": "only_masked",
    "Masked area padding": "mask_padding",
}
"""What is said of a picture that began with another one. A1111 has no word for the resize mode; it is the original API's."""

_SWITCHES = {"mask_invert": "Inpaint not masked", "only_masked": "Only masked"}
"""The value that means true."""

_IN_WORDS = ("rng", "emphasis")
"""Fields whose values are words, which A1111 writes with capitals."""

UNSAID = ("", 0, None, "Use same checkpoint", "Use same sampler", "Use same scheduler")
"""What A1111 writes, or means, of a second pass that does as the first."""

_DISTILLED = "Distilled CFG Scale"
"""Forge's key for the guidance of FLUX and its like, which take it as a number and not as a second evaluation."""

_SINGLE = {"model": "Model", "vae": "VAE"}
"""Kinds of files of which a text names one, and where."""

_NO_MATTER = {"Model hash", "Lora hashes", "TI hashes", "VAE hash", "Hashes", "Version", "User", "Created Date"}
"""What is said of a picture, and decides nothing of how it looks."""


@dataclass(frozen=True)
class Parameters:
    """What an infotext says.

    ``fields`` holds the keys as written, in their order. Numbers are ``int`` or ``float``, True and False are
    ``bool``; names, hashes, prompts and versions are always text, and so is all that was quoted. ``raw`` is the text
    that was read.
    """

    prompt: str
    negative_prompt: str
    fields: Mapping[str, Value]
    raw: str

    @property
    def split_fields(self) -> dict[str, Value]:
        """The fields as A1111 names them: ``Size: 512x768`` becomes ``Size-1: 512`` and ``Size-2: 768``."""
        split: dict[str, Value] = {}
        for key, value in self.fields.items():
            if size := _SIZE.fullmatch(str(value)):
                split[f"{key}-1"], split[f"{key}-2"] = int(size[1]), int(size[2])
            else:
                split[key] = value
        return split


def render(prompt: str, negative_prompt: str, fields: Mapping[str, str | int | float | None]) -> str:
    """The infotext: prompt, negative prompt (left out when empty) and one line of fields in the order given.

    A field of None is absent; False, 0 and "" are written. A text is written bare; as a JSON string where it has a
    comma, a colon or a line break, which is A1111's rule; and also where A1111 would change it on reading: when it is
    empty, starts with a quotation mark or has white space at an end. Whole floats are written without a fraction
    ("7", as A1111's page does; its API writes "7.0", and every reader takes both), others as the shortest text that
    gives the same number ("7.5").

    :func:`parse` reads the same values back, except for: fewer than three fields; keys that are not a letter or digit
    followed by letters, digits, spaces, ``-`` or ``/``; a bare text that looks like a number or truth value; white
    space at the ends of a prompt or its lines; and a line of a prompt that starts with "Negative prompt:".
    """
    pairs = ", ".join(f"{key}: {_written(value)}" for key, value in fields.items() if value is not None)
    negative = f"{_NEGATIVE} {negative_prompt}\n" if negative_prompt else ""
    return f"{prompt}\n{negative}{pairs}".strip()


def ordered(fields: Mapping[str, str | int | float | None]) -> dict[str, str | int | float | None]:
    """The same fields in A1111's order: the known ones, then all others as they come, then Version and User."""
    known = {*_LEADING, *_TRAILING}
    others = [key for key in fields if key not in known]
    return {key: fields[key] for key in (*_LEADING, *others, *_TRAILING) if key in fields}


def for_request(
    request: Sampling,
    *,
    number: int = 0,
    sampler_label: str,
    schedule_label: str,
    model_name: str,
    model_hash: str | None,
    known: Mapping[str, str] | None = None,
    version: str,
) -> str:
    """The infotext of one picture of a request: of the first one, or the one with that ``number``.

    Labels are those that users see ("Euler a", "Karras"). ``model_hash`` is the first ten hex digits of the file's
    SHA-256, or None; ``known`` are more fields by A1111's keys. ``version`` should start with a name
    ("DiffusionAPI v1.0.0"): a bare number looks like A1111's own, which then behaves as it did in that version.
    """
    resized = f"{request.seed_resize_width}x{request.seed_resize_height}" if request.seed_resize_width else None
    options = {key: _unless_default(request, field) for key, field in _OPTIONS.items()}
    emphasis = _unless_default(request, "emphasis")
    fields = {
        "Steps": request.steps,
        "Sampler": sampler_label,
        "Schedule type": schedule_label,
        "CFG scale": request.guidance_scale,
        "Seed": request.seeds[number],
        "Size": f"{request.width}x{request.height}",
        "Model hash": model_hash,
        "Model": model_name,
        "Variation seed": request.variation_seeds[number],
        "Seed resize from": resized,
        "RNG": request.rng.upper(),
        "Tiling": request.tiling or None,
        "Emphasis": emphasis and emphasis.capitalize(),
        "Eta DDIM" if request.sampler.startswith("ddim") else "Eta": request.eta,
        **options,
        **_hires(request),
        **_picture(request),
        "Refiner": request.refiner and request.refiner.model,
        "Refiner switch at": request.refiner and request.refiner.switch_at,
        "Refiner switch by sampling steps": True if request.refiner else None,
        "LoRAs": ", ".join(f"{_written(use.name)}:{_strengths(use)}" for use in request.loras) or None,
        **(known or {}),
        "Version": version,
    }
    return render(request.prompt, request.negative_prompt, ordered(fields))


def for_upscale(request: Upscale, *, version: str) -> str:
    """The infotext of an upscaled picture."""
    fields = {
        "Postprocess upscale to": f"{request.width}x{request.height}",
        "Postprocess upscaler": request.upscaler,
        "Version": version,
    }
    return render("", "", fields)


def _hires(request: Sampling) -> dict[str, str | int | float | None]:
    """What is to be said of the second pass; of its words and model only what differs from the first."""
    if not isinstance(request, Txt2Img) or request.hires is None:
        return {}
    hires = request.hires
    scaled = (
        hires.width * request.height == hires.height * request.width and hires.width <= MAX_HIRES_SCALE * request.width
    )

    def unlike(field: str) -> str | None:
        value: str = getattr(hires, field)
        return None if value == getattr(request, field) else value

    return {
        "Denoising strength": hires.strength,
        "Hires checkpoint": unlike("model"),
        "Hires sampler": unlike("sampler"),
        "Hires schedule type": unlike("schedule"),
        "Hires prompt": unlike("prompt"),
        "Hires negative prompt": unlike("negative_prompt"),
        "Hires upscale": hires.width / request.width if scaled else None,
        "Hires resize": None if scaled else f"{hires.width}x{hires.height}",
        "Hires steps": hires.steps,
        "Hires upscaler": hires.upscaler,
    }


def _picture(request: Sampling) -> dict[str, str | int | float | None]:
    """What is to be said of a picture that began with another one."""
    if not isinstance(request, Img2Img):
        return {}
    mask = request.mask
    return {
        "Denoising strength": request.strength,
        "Resize mode": None if request.resize_mode == "just resize" else request.resize_mode,
        "Mask mode": _SWITCHES["mask_invert"] if mask and mask.invert else None,
        "Mask blur": mask.blur if mask else None,  # also 0, which A1111 leaves out, and then takes for its page's 4
        "Inpaint area": _SWITCHES["only_masked"] if mask and mask.only_masked else None,
        "Masked area padding": mask.padding if mask and mask.only_masked else None,
        "Masked content": mask.fill if mask and mask.fill != "original" else None,
        "Noise multiplier": None if request.noise_multiplier == 1 else request.noise_multiplier,
    }


def _strengths(use: LoraUse) -> str:
    """As in ``<lora:name:text encoder:unet>``, in full only where the two differ."""
    text, unet = _written(use.on_text), _written(use.scale)
    return unet if text == unet else f"{text}:{unet}"


def _unless_default(request: Sampling, field: str) -> Any:
    value = getattr(request, field)
    return None if value == Sampling.model_fields[field].default else value


def asked(parameters: Parameters, *, picture: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a picture like that is asked for with, by the names of :class:`Sampling`, and ``refiner_checkpoint`` and
    ``refiner_switch_at``; and the keys that are not understood.

    Sampler, schedule and model are as written. What A1111 means by leaving a key out is filled in, so that the noise is
    A1111's where no RNG is named. Whether the values are good ones is not looked at. With ``picture`` there is a picture to
    begin with, and no second pass: then ``strength``, ``resize_mode``, ``noise_multiplier`` and what is said of the mask
    are found too, if the text is of such a picture.
    """
    full = restored(parameters)
    found: dict[str, Any] = {"prompt": full.prompt, "negative_prompt": full.negative_prompt}
    for key, field in _ASKED.items():
        if key in full.fields:
            value = full.fields[key]
            found[field] = str(value).lower() if field in _IN_WORDS else value
    if "model" not in found and ("model", "") in hashes(parameters):
        found["model"] = ""  # as before 2023, when the hash was all
    if found.get("rng") == "gpu":
        found["rng"] = "nv"
    if loras := list(_uses(str(full.fields.get("LoRAs", "")))):
        found["loras"] = loras
    known = _ASKED.keys() | _NO_MATTER | {"LoRAs", "Refiner switch by sampling steps"}
    if found.get("guidance_scale") == 1 and (distilled := full.fields.get(_DISTILLED)) is not None:
        found["guidance_scale"] = distilled
        known |= {_DISTILLED}
    second_pass = bool({"Hires upscale", "Hires resize", "Hires upscaler"} & parameters.fields.keys())
    if picture and not second_pass and "Denoising strength" in parameters.fields:
        known |= _ASKED_OF_PICTURES.keys()
        for key, field in _ASKED_OF_PICTURES.items():
            if key in full.fields:
                value = full.fields[key]
                found[field] = value == _SWITCHES[field] if field in _SWITCHES else value
    if second_pass and not picture:
        known |= _ASKED_OF_HIRES.keys()
        second = {
            field: full.fields[key] for key, field in _ASKED_OF_HIRES.items() if full.fields.get(key) not in UNSAID
        }
        found["hires"] = {"enabled": True, "steps": 0} | second  # A1111's 0: as many as the first pass
    return found, tuple(key for key in parameters.fields if not {key, f"{key}-1"} & known)


def began_with(parameters: Parameters) -> str | None:
    """What was done to another picture to make the one with this text, so that the text alone cannot make it again; None where
    it was drawn from words.
    """
    if {
        "Postprocess upscale to",
        "Postprocess upscale by",
    } & parameters.fields.keys() and "Steps" not in parameters.fields:
        return "enlarged"
    return "drawn over" if "Denoising strength" in asked(parameters)[1] else None


def named(told: str) -> tuple[str, str | None]:
    """The name and the hash in a field of the form ``name [hash]``; without the brackets all is name."""
    found = _NAMED.fullmatch(told)
    return (found[1], found[2]) if found else (told, None)


def hashes(parameters: Parameters) -> dict[tuple[str, str], str]:
    """The hashes that a text tells of files, by kind (model, vae, lora, upscaler) and name: in A1111's fields, or in Civitai's
    ``Hashes``. The name is empty where the text has none.
    """
    fields = parameters.fields
    names = {kind: str(fields.get(key, "")) for kind, key in _SINGLE.items()}
    found: dict[tuple[str, str], str] = {}
    for key, value in _object(fields.get("Hashes")).items():
        kind, _, name = key.partition(":")
        found[kind, name or names.get(kind, "")] = str(value)
    for kind, key in _SINGLE.items():
        if f"{key} hash" in fields:
            found[kind, names[kind]] = str(fields[f"{key} hash"])
    for pair in str(fields.get("Lora hashes", "")).split(","):
        name, _, value = pair.rpartition(":")
        if name:
            found["lora", name.strip()] = value.strip()
    return found


def _object(text: Value | None) -> dict[str, Any]:
    try:
        value = json.loads(str(text))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _uses(text: str) -> Iterator[dict[str, str | float]]:
    """The LoRAs in a list as :func:`for_request` writes it; what is no such item is passed over."""
    position = 0
    while position < len(text):
        if item := _USE.match(text, position):
            position = item.end()
            name = _unquoted(item[1]) if item[1].startswith('"') else item[1]
            on_text, scale = float(item[2]), float(item[3] or item[2])
            if math.isfinite(on_text) and math.isfinite(scale):
                yield {"name": name, "scale": scale} | ({"text_scale": on_text} if item[3] else {})
        else:
            position = text.find(",", position) + 1 or len(text)


def from_novelai(description: str, comment: str, *, width: int, height: int) -> str | None:
    """The infotext for the two texts that NovelAI puts into a PNG, as A1111 words it.

    None when ``comment`` is no JSON object.
    """
    try:
        told = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    fields: dict[str, str | int | float | None] = {
        "Steps": _scalar(told.get("steps")),
        "Sampler": _NOVELAI_SAMPLERS.get(str(told.get("sampler")), "Euler a"),
        "CFG scale": _scalar(told.get("scale")),
        "Seed": _scalar(told.get("seed")),
        "Size": f"{width}x{height}",
        "Clip skip": 2,
        "ENSD": 31337,
    }
    text = render(description, str(told.get("uc") or ""), fields)
    return text.encode(errors="replace").decode()


def parse(text: str) -> Parameters:
    """What an infotext says. Any text can be read, in time that grows with its length.

    The last line holds the fields if it has at least three pairs; otherwise all is prompt. Unquoted JSON, as Civitai
    writes it, is kept whole as the text of its field.
    """
    lines = text.strip().split("\n")
    pairs = list(_pairs(lines[-1]))
    if len(pairs) >= 3:
        lines.pop()
    else:
        pairs = []
    prompt: list[str] = []
    negative: list[str] = []
    part = prompt
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            part = negative
            line = line.removeprefix(_NEGATIVE).strip()
        part.append(line)
    fields = {key: value for key, value in pairs if value is not None}
    return Parameters("\n".join(prompt), "\n".join(negative).lstrip("\n"), fields, text)


def restored(parameters: Parameters) -> Parameters:
    """The parameters as A1111 fills its page from them.

    Sizes are split, fields that were left out have the value that this means, and the habits of old versions are
    translated. Sampler names, styles and LoRAs are not looked up.
    """
    fields = _DEFAULTS | parameters.split_fields
    prompt = parameters.prompt
    if "Hypernet" in fields:
        prompt += f"<hypernet:{fields['Hypernet']}:{fields.get('Hypernet strength', '1.0')}>"
    if fields["FP8 weight"] != "Disable":
        fields.setdefault("Cache FP16 weight for LoRA", False)
    if _has_brackets(prompt) or _has_brackets(parameters.negative_prompt):
        fields.setdefault("Emphasis", "Original")
    _restore_first_pass(fields)
    _restore_old_behaviour(fields, prompt)
    return replace(parameters, prompt=prompt, fields=fields)


def _written(value: str | int | float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    text = str(value)
    if not text or text[0] == '"' or text != text.strip() or any(c in text for c in ",:\n\r"):
        return json.dumps(text, ensure_ascii=False)
    return text


def _scalar(value: object) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _pairs(line: str) -> Iterator[tuple[str, Value | None]]:
    """Every ``key: value`` of the line; the value is None where nothing follows the colon."""
    position = 0
    while found := _KEY.search(line, position):
        position = found.end()
        if found[2] is not None:
            value, position = _value(found[1], line, position)
            yield found[1].rstrip(), value


def _value(key: str, line: str, start: int) -> tuple[Value | None, int]:
    """The value that starts there, and where the next pair may start."""
    if quoted := _QUOTED.match(line, start):
        return _unquoted(quoted[1]), quoted.end()
    if (bracketed := _JSON.match(line, start)) and _is_json(bracketed[1]):
        return bracketed[1], bracketed.end()
    if key == "LoRAs" and (listed := _BARE_USES.match(line, start)):  # as the original API wrote it, without quotes
        return listed[1], listed.end()
    comma = line.find(",", start)
    end_of_value = len(line) if comma < 0 else comma
    text = line[start:end_of_value].strip()
    return (_typed(key, text) if text else None), end_of_value + 1


def _unquoted(quoted: str) -> str:
    try:
        text = str(json.loads(quoted))
        text.encode()  # no half of a surrogate pair, which no response could carry
    except ValueError:
        return quoted
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _typed(key: str, text: str) -> Value:
    if key.lower().split()[-1] in _TEXT_WORDS:
        return text
    if text in ("True", "False"):
        return text == "True"
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


def _has_brackets(prompt: str) -> bool:
    bare = re.sub(r"\\.", "", prompt, flags=re.DOTALL)
    return "(" in bare or "[" in bare


def _restore_first_pass(fields: dict[str, Value]) -> None:
    """Until 2022 ``Size`` was the final size of a hires picture, and ``First pass size`` the one drawn at first."""
    width, height = _pixels(fields, "Size-1", 512), _pixels(fields, "Size-2", 512)
    first_width, first_height = _pixels(fields, "First pass size-1"), _pixels(fields, "First pass size-2")
    if width is None or height is None or first_width is None or first_height is None:
        return
    if not (first_width and first_height) and width and height:
        scale = 512 / math.sqrt(width * height)
        first_width, first_height = (math.ceil(scale * side / 64) * 64 for side in (width, height))
    fields |= {"Size-1": first_width, "Size-2": first_height, "Hires resize-1": width, "Hires resize-2": height}


def _pixels(fields: Mapping[str, Value], key: str, default: int | None = None) -> int | None:
    value = fields.get(key, default)
    return value if isinstance(value, int) else None


def _restore_old_behaviour(fields: dict[str, Value], prompt: str) -> None:
    found = _VERSION.match(str(fields.get("Version", "")))
    if not found:
        return
    version = tuple(int(part or 0) for part in found.groups())
    if version < (1, 6, 0, 0) and "[" in prompt:
        fields["Old prompt editing timelines"] = True
    if version < (1, 6, 0, 0) and fields.get("Sampler") in ("DDIM", "PLMS"):
        fields["Pad conds v0"] = True
    if version < (1, 7, 0, 225):
        fields["Downcast alphas_cumprod"] = True
    if version < (1, 8, 0, 0) and "Refiner" in fields:
        fields["Refiner switch by sampling steps"] = True
