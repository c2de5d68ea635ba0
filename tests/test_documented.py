"""The OpenAPI document, whoever's routes are in it: each is described, with examples of what it takes and gives."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from jsonschema_rs import validator_for

from diffusion_api.server import build_app
from diffusion_api.settings import Settings

Document = dict[str, Any]

with tempfile.TemporaryDirectory() as home:
    APP = build_app(Settings(home=Path(home), engine="stub"), worker=False)
DOCUMENT: Document = APP.openapi()
OPERATIONS: dict[str, Document] = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
ROUTES = {
    f"{method} {route.path_format}": route
    for route in iter_route_contexts(APP.routes)
    for method in route.methods or ()
    if route.path_format
}
UNSHOWN = ("multipart/", "image/", "application/octet-stream", "application/x-www-form-urlencoded")
"""Contents of which no example can be written as JSON."""


def contents(part: Document) -> dict[str, Document]:
    """What a body or an answer may be, by media type, without what cannot be shown."""
    return {kind: content for kind, content in part.get("content", {}).items() if not kind.startswith(UNSHOWN)}


def named(schema: Document) -> Document:
    """The schema that a reference means."""
    while name := schema.get("$ref"):
        schema = DOCUMENT["components"]["schemas"][name.rpartition("/")[2]]
    return schema


def examples(content: Document) -> list[Any]:
    """What is shown of a body or an answer, beside it or with its schema; of a choice, all of its schemas."""
    shown = [content["example"]] if "example" in content else []
    shown += [each["value"] for each in content.get("examples", {}).values()]
    return shown or list(_of_schema(content.get("schema", {})))


def _of_schema(schema: Document) -> Iterator[Any]:
    schema = named(schema)
    if "example" in schema or "examples" in schema:
        yield from [schema["example"]] if "example" in schema else schema["examples"]
        return
    for kind in schema.get("anyOf", schema.get("oneOf", ())):
        found = list(_of_schema(kind))
        assert found or kind.get("type") == "null", f"no example of {kind}"
        yield from found


def refused(value: Any, schema: Document) -> list[str]:
    """Why a value is none of a schema."""
    whole = {"components": DOCUMENT["components"], **schema}
    return [str(error.message) for error in validator_for(whole).iter_errors(value)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_says_what_it_is_for(name: str) -> None:
    operation = OPERATIONS[name]
    assert operation.get("summary")
    assert operation.get("tags")
    assert operation["summary"] != ROUTES[name].name.replace("_", " ").title(), (
        "FastAPI made it from the function's name"
    )


@pytest.mark.parametrize("name", [name for name, found in OPERATIONS.items() if contents(found.get("requestBody", {}))])
def test_a_route_shows_bodies_that_it_takes(name: str) -> None:
    field = ROUTES[name].body_field
    for content in contents(OPERATIONS[name]["requestBody"]).values():
        shown = examples(content)
        assert shown
        for example in shown:
            assert refused(example, content["schema"]) == []
            if field is not None:  # else the route reads the body itself
                _, errors = field.validate(example, {}, loc=("body",))
                assert not errors


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_shows_answers_of_its_schema(name: str) -> None:
    good = {status: answer for status, answer in OPERATIONS[name]["responses"].items() if status.startswith("2")}
    assert good
    for content in (content for answer in good.values() for content in contents(answer).values()):
        schema = named(content["schema"])
        assert (
            schema.get("type") != "object" or "properties" in schema or isinstance(schema["additionalProperties"], dict)
        )
        shown = examples(content)
        assert shown
        for example in shown:
            assert refused(example, content["schema"]) == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_says_how_it_refuses(name: str) -> None:
    answers = {s: a for s, a in OPERATIONS[name]["responses"].items() if s.startswith(("4", "5"))}
    assert any(status.startswith("4") for status in answers)
    for content in (content for answer in answers.values() for content in contents(answer).values()):
        shown = examples(content)
        assert shown
        assert [why for example in shown for why in refused(example, content["schema"])] == []


def test_the_schemas_have_names_that_people_gave() -> None:
    names = [name for name in DOCUMENT["components"]["schemas"] if name.startswith(("Response_", "diffusion_api__"))]
    assert names == []
