"""Each field of each POST: a wrong value is refused with the field, the value, and what would be right."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel
from serving import Program

from diffusion_api.dialects.native.bodies import (
    FactorsBody,
    HiresBody,
    Img2ImgBody,
    ImgInfoBody,
    LoraBody,
    SizeBody,
    Txt2ImgBody,
    UpscaleBody,
)
from diffusion_api.dialects.native.examples import PICTURE

DRAWN = {"prompt": "x", "image": PICTURE, "mask": PICTURE}
ROUTES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/txt2img": (Txt2ImgBody, {"prompt": "x"}),
    "/img2img": (Img2ImgBody, DRAWN),
    "/inpaint": (Img2ImgBody, DRAWN),
    "/upscale": (UpscaleBody, {"image": PICTURE}),
    "/img-info": (ImgInfoBody, {}),
}
PARTS: dict[str, tuple[str, type[BaseModel], dict[str, Any]]] = {
    "hires": ("/txt2img", HiresBody, {"enabled": True}),
    "loras": ("/txt2img", LoraBody, {"name": "style"}),
    "resize_to": ("/img2img", SizeBody, {}),
    "resize_by": ("/img2img", FactorsBody, {}),
}
"""Objects within bodies: where they are sent, and what must be in them."""

WORDS = {
    "fileType": "one of jpg, png, webp, avif, gif",
    "model": "one of ",
    "refiner_checkpoint": "one of ",
    "sampler_name": "One of Euler|one of Euler",
    "scheduler_type": "one of default",
    "vae": "one of Automatic, None",
    "upscaler": "one of .*Lanczos",
    "rng": "'nv' or 'cpu'",
    "emphasis": "'original', 'no norm'",
    "resize_mode": "'just resize', 'crop and resize'",
    "mask_fill": "'fill', 'original'",
    "image": "neither base64 nor a data URL|no infotext in it|cannot be read|Invalid base64|not a picture",
    "mask": "neither base64 nor a data URL",
    "webhook": "is refused",
}
"""Fields that take words, with what a wrong one is answered."""
FREE = {"prompt", "negative_prompt", "infotext", "name"}
"""Fields that take any text."""
OF_PICTURES = {"image", "mask"}


def wrong_values(name: str, body: type[BaseModel]) -> list[tuple[Any, str]]:
    """Values that a field cannot have, with a pattern of what must be said of each."""
    schema = body.model_json_schema(by_alias=False)
    field = schema["properties"][name]
    kinds = [kind for kind in field.get("anyOf", field.get("oneOf", [field])) if kind.get("type") != "null"]
    found: list[tuple[Any, str]] = [({"a": [1]}, "Input should be|it is|text is needed")]
    types = {kind.get("type") for kind in kinds}
    if "string" in types:
        found.append((17, "Input should be"))
        if name not in FREE:
            found.append(("no-such-thing", WORDS[name]))
    if types & {"integer", "number"}:
        found += [("many", "number|integer"), (True, "number|integer")]
        for kind in kinds:
            if "minimum" in kind or "exclusiveMinimum" in kind:
                least = kind.get("minimum", kind.get("exclusiveMinimum"))
                found.append((least - 1, f"greater than.* {least:.12g}|{least:.12g} to|may be"))
            if "maximum" in kind:
                found.append((kind["maximum"] + 1, f"less than.* {kind['maximum']:.12g}|to {kind['maximum']:.12g}"))
    if "boolean" in types:
        found.append(("perhaps", "boolean"))
    return found


def table() -> list[Any]:
    rows = []
    for route, (body, sent) in ROUTES.items():
        for name in body.model_fields:
            if name in PARTS or name == "styles":
                continue
            if route == "/inpaint" and name in Txt2ImgBody.model_fields and name not in OF_PICTURES:
                continue  # the very body of /img2img
            rows += [
                pytest.param(route, sent, name, value, words, id=f"{route} {name} {json.dumps(value)}")
                for value, words in wrong_values(name, body)
            ]
    for part, (route, body, sent) in PARTS.items():
        for name in body.model_fields:
            for value, words in wrong_values(name, body):
                inner = sent | {name: value}
                rows.append(
                    pytest.param(
                        route,
                        ROUTES[route][1] | {part: [inner] if part == "loras" else inner},
                        f"{part}.0.{name}" if part == "loras" else f"{part}.{name}",
                        value,
                        words,
                        id=f"{part}.{name} {json.dumps(value)}",
                    )
                )
    return rows


TABLE = table()


@pytest.mark.parametrize(("route", "sent", "field", "value", "words"), TABLE)
def test_a_wrong_value_is_refused_with_the_field_the_value_and_what_is_right(
    stub_server: Program, route: str, sent: dict[str, Any], field: str, value: Any, words: str
) -> None:
    body = sent if "." in field else sent | {field: value}
    answer = stub_server.request("POST", route, json=body)
    if field == "refiner_checkpoint" and isinstance(value, str):
        assert "refiner_checkpoint" in str(
            answer.json()["warnings"]
        )  # the model is no SDXL model, so none is looked for
        return
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]
    assert message.removeprefix("Invalid base64 image data: ").startswith(field)
    shown = repr(value) if isinstance(value, str) else json.dumps(value)
    assert shown in message or field in ("webhook", "image"), message  # an address may hold a credential
    assert re.search(words, message), message
    assert not re.search(r" is (None|True|False)\b", message), message


def test_the_table_has_every_field() -> None:
    fields = {row.values[2].split(".")[-1] for row in TABLE}
    assert len(TABLE) > 400
    for body, _ in ROUTES.values():
        assert body.model_fields.keys() - PARTS.keys() - fields <= {"styles"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loras", "style"),
        ("loras", [5]),
        ("hires", True),
        ("resize_to", 5),
        ("resize_by", "x"),
        ("styles", "one"),
        ("styles", [1]),
    ],
)
def test_a_part_that_is_none_is_refused(stub_server: Program, field: str, value: Any) -> None:
    route = "/img2img" if field.startswith("resize") else "/txt2img"
    answer = stub_server.request("POST", route, json=ROUTES[route][1] | {field: value})
    assert answer.status_code == 400
    assert re.match(rf"{field}(\.0)? is ", answer.json()["error"])


WARNED: list[tuple[str, dict[str, Any], str]] = [
    ("/img2img", {"hires": {"enabled": True}}, "'hires' is a field of /txt2img, and was ignored here"),
    ("/upscale", {"steps": 5}, "'steps' is a field of /txt2img and /img2img, and was ignored here"),
    ("/txt2img", {"mask_blur": 5}, "'mask_blur' is a field of /img2img, and was ignored here"),
    (
        "/img2img",
        {"mask": None, "mask_blur": 9, "only_masked": True},
        "mask_blur, only_masked: ignored, as there is no mask",
    ),
    ("/img2img", {"resize_to": {}}, "resize_to is ignored: it has neither width nor height"),
    (
        "/img2img",
        {"resize_to": {"widht": 8, "width": 64}},
        "'resize_to.widht' was ignored; did you mean 'resize_to.width'?",
    ),
    ("/img2img", {"resize_by": {"hight": 8}}, "'resize_by.hight' was ignored; did you mean 'resize_by.height'?"),
    ("/txt2img", {"prompt": "<lora:style:abc>"}, "'abc' in '<lora:style:abc>' is no number; 1 is used"),
    ("/txt2img", {"prompt": "(a:1e99)"}, "'1e99' is no number for a weight, as 1.2 is one: it is read as words"),
    ("/txt2img", {"negative_prompt": "(a:1,5)"}, "'1,5' is no number for a weight"),
    ("/txt2img", {"seed": 2**32 - 1, "n": 2}, "seeds go on from 0 after 4294967295"),
    ("/txt2img", {"seed_resize_width": 64}, "one is of no use without the other"),
]


@pytest.mark.parametrize(("route", "fields", "warning"), WARNED)
def test_what_has_no_effect_is_said(stub_server: Program, route: str, fields: dict[str, Any], warning: str) -> None:
    body = ROUTES[route][1] | {"model": "small"} | fields | {"dry_run": True}
    if route == "/upscale":
        del body["model"]
    answer = stub_server.request("POST", route, json=body)
    assert answer.status_code == 200, answer.text
    assert warning in "; ".join(answer.json()["warnings"])


def test_what_programs_always_send_is_no_reason_for_a_warning(stub_server: Program) -> None:
    plain = {
        "mask_blur": 4,
        "inpainting_fill": 0,
        "inpaint_full_res": False,
        "inpaint_full_res_padding": 32,
        "subseed": -1,
    }
    body = {"prompt": "(a:1.2) [b:0.5]", "image": PICTURE, "dry_run": True} | plain
    assert stub_server.request("POST", "/img2img", json=body).json()["warnings"] == []


@pytest.mark.parametrize("strength", ["101", "-1000000"])
def test_a_strength_beyond_all_use_is_refused_in_a_prompt_too(stub_server: Program, strength: str) -> None:
    answer = stub_server.post(prompt=f"a <lora:style:{strength}>")
    assert answer.status_code == 400
    assert (
        answer.json()["error"] == f"prompt: the strength of lora 'style' is {float(strength):g}; it may be -100 to 100"
    )


def test_a_second_pass_with_one_side_keeps_the_proportions(stub_server: Program) -> None:
    answer = stub_server.post(model="small", width=64, height=96, hires={"enabled": True, "width": 128}, dry_run=True)
    assert [(each["width"], each["height"]) for each in answer.json()["passes"]] == [(64, 96), (128, 192)]
    answer = stub_server.post(model="small", width=64, height=96, hires={"enabled": True, "height": -5}, dry_run=True)
    assert answer.json()["error"].startswith("hires.height is -5; it may be 8 to")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x\nSteps: 4, Seed: abc, Size: 64x64", "infotext: seed is 'abc'"),
        ("x\nSteps: 4, Seed: 99999999999, Size: 64x64", "infotext: seed is 99999999999; it may be 0 to 4294967295"),
        ("x\nSteps: 4, Seed: 5, Size: 4x64", "infotext: width is 4; it may be 8 to 65536"),
        ("x\nSteps: 4, Seed: 5, Size: 64x64, CFG scale: 500", "infotext: cfg_scale is 500"),
    ],
)
def test_a_wrong_value_in_an_infotext_is_said_to_be_there(stub_server: Program, text: str, said: str) -> None:
    answer = stub_server.post(infotext=text, model="small")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(said)
