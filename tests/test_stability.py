"""What callers were promised: ``openapi.yml`` is that, and the service keeps it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import openapi

Document = dict[str, Any]


@pytest.fixture(scope="module")
def snapshot() -> Document:
    document: Document = yaml.safe_load(openapi.SNAPSHOT.read_text("utf-8"))
    return document


@pytest.fixture(scope="module")
def document() -> Document:
    return openapi.current()


def test_nothing_that_was_promised_is_broken(snapshot: Document, document: Document) -> None:
    assert list(openapi.breaking(snapshot, document)) == []


def test_the_tracked_document_is_that_of_the_code(document: Document) -> None:
    assert openapi.written(document) == openapi.SNAPSHOT.read_text("utf-8"), "`make openapi` writes it anew"


def schema(document: Document, name: str) -> Document:
    found: Document = document["components"]["schemas"][name]
    return found


def field(document: Document, body: str, name: str) -> Document:
    found: Document = schema(document, body)["properties"][name]
    return found


BREAKS: dict[str, tuple[Callable[[Document], object], str]] = {
    "a route": (lambda d: d["paths"].pop("/hello"), "GET /hello is gone"),
    "a method": (lambda d: d["paths"]["/queue/{job_id}"].pop("delete"), "DELETE /queue/{job_id} is gone"),
    "a status": (
        lambda d: d["paths"]["/txt2img"]["post"]["responses"].pop("507"),
        "POST /txt2img does not answer 507 any more",
    ),
    "a header": (
        lambda d: d["paths"]["/txt2img"]["post"]["responses"]["503"].pop("headers"),
        "POST /txt2img: 503 has no header Retry-After any more",
    ),
    "a field of a body": (
        lambda d: schema(d, "Txt2ImgBody")["properties"].pop("tiling"),
        "POST /txt2img: body.tiling is gone",
    ),
    "a field of an answer": (
        lambda d: schema(d, "StatusBody")["properties"].pop("eta_seconds"),
        "GET /queue/{job_id}: 200.eta_seconds is gone",
    ),
    "a field of an object in a body": (
        lambda d: schema(d, "HiresBody")["properties"].pop("upscaler"),
        "POST /txt2img: body.hires.upscaler is gone",
    ),
    "a parameter": (
        lambda d: d["paths"]["/queue"]["get"].update(parameters=[]),
        "GET /queue: cursor (query) is gone",
    ),
    "a value of an answer": (
        lambda d: field(d, "StatusBody", "state")["enum"].remove("loading"),
        "GET /queue/{job_id}: 200.state is never 'loading' any more",
    ),
    "a value of a body": (
        lambda d: field(d, "Img2ImgBody", "mask_fill")["anyOf"][0]["enum"].remove("original"),
        "POST /inpaint: body.mask_fill is never 'original' any more",
    ),
    "a field that must be sent": (
        lambda d: schema(d, "Txt2ImgBody").update(required=["prompt"]),
        "POST /txt2img: body.prompt is required",
    ),
    "a parameter that must be sent": (
        lambda d: d["paths"]["/hello"]["get"].update(
            parameters=[{"in": "query", "name": "q", "required": True, "schema": {"type": "string"}}]
        ),
        "GET /hello: q (query) is required",
    ),
    "a field that may be missing": (
        lambda d: schema(d, "SubmittedBody")["required"].remove("job_id"),
        "POST /txt2img: 200.job_id may be missing",
    ),
    "a type that is taken": (
        lambda d: field(d, "Txt2ImgBody", "cfg_scale")["anyOf"][0].update(type="integer"),
        "POST /txt2img: body.cfg_scale may not be number any more",
    ),
    "null where it is taken": (
        lambda d: field(d, "Txt2ImgBody", "seed")["anyOf"].pop(),
        "POST /txt2img: body.seed may not be null any more",
    ),
    "null where there was none": (
        lambda d: field(d, "StatusBody", "job_id").update(anyOf=[{"type": "string"}, {"type": "null"}]),
        "GET /queue/{job_id}: 200.job_id may be null now",
    ),
    "a limit": (
        lambda d: field(d, "Txt2ImgBody", "cfg_scale")["anyOf"][0].update(maximum=50),
        "POST /txt2img: body.cfg_scale: maximum is 50, it was 100.0",
    ),
    "a limit that was not there": (
        lambda d: field(d, "Txt2ImgBody", "steps")["anyOf"][0].update(maximum=50),
        "POST /txt2img: body.steps: maximum is 50, it was none",
    ),
    "a key": (
        lambda d: d["paths"]["/hello"]["get"].update(security=[{"ApiKey": []}]),
        "GET /hello needs a key",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_would_break_a_caller_is_told(snapshot: Document, what: str) -> None:
    change, told = BREAKS[what]
    changed = copy.deepcopy(snapshot)
    change(changed)
    assert told in list(openapi.breaking(snapshot, changed))


ADDITIONS: dict[str, Callable[[Document], object]] = {
    "a route": lambda d: d["paths"].update({"/new": d["paths"]["/hello"]}),
    "a field of a body": lambda d: schema(d, "Txt2ImgBody")["properties"].update(new={"type": "string"}),
    "a field of an answer": lambda d: schema(d, "StatusBody")["properties"].update(new={"type": "string"}),
    "a status": lambda d: d["paths"]["/hello"]["get"]["responses"].update({"429": {"description": "later"}}),
    "a wider limit": lambda d: field(d, "Txt2ImgBody", "cfg_scale")["anyOf"][0].update(maximum=1000),
    "a wider type": lambda d: field(d, "Txt2ImgBody", "seed")["anyOf"][0].update(type="number"),
    "a value of a body": lambda d: field(d, "Img2ImgBody", "mask_fill")["anyOf"][0]["enum"].append("grey"),
    "other words": lambda d: field(d, "Txt2ImgBody", "seed").update(description="another text"),
}


@pytest.mark.parametrize("what", ADDITIONS)
def test_what_is_added_breaks_nobody(snapshot: Document, what: str) -> None:
    changed = copy.deepcopy(snapshot)
    ADDITIONS[what](changed)
    assert changed != snapshot
    assert list(openapi.breaking(snapshot, changed)) == []


def test_a_breaking_change_is_not_written_by_the_way(
    snapshot: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = copy.deepcopy(snapshot)
    more["paths"]["/gone"] = more["paths"]["/hello"]
    file = tmp_path / "openapi.yml"
    file.write_text(openapi.written(more))
    monkeypatch.setattr(openapi, "SNAPSHOT", file)
    monkeypatch.setattr(openapi, "current", lambda: snapshot)
    assert openapi.main([]) == 1
    assert "GET /gone is gone" in capsys.readouterr().out
    assert yaml.safe_load(file.read_text()) == more
    assert openapi.main(["--breaking"]) == 0
    assert yaml.safe_load(file.read_text()) == snapshot
