"""The OpenAPI document: what FastAPI makes of the routes, with the keys that they ask for and the nulls that it leaves out."""

from __future__ import annotations

from typing import Any, TypeAlias

from diffusion_api.access import needed
from diffusion_api.schema.caller import Role

Document: TypeAlias = dict[str, Any]
Schema: TypeAlias = dict[str, Any]

DOOR = {"401": "No credential", "403": "A wrong credential, or one that is not enough", "429": "Too many requests"}
KEYS: Document = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}
"""The ways to send a credential, so that people can do so from ``/docs``."""


def completed(document: Document) -> Document:
    """The document with what each route asks of its caller, and examples that are as the service answers."""
    components = document.setdefault("components", {})
    components["securitySchemes"] = KEYS
    schemas = components.get("schemas", {})
    for schema in schemas.values():
        if "examples" in schema:
            schema["examples"] = [_with_nulls(value, schema, schemas) for value in schema["examples"]]
        if "example" in schema:
            schema["example"] = _with_nulls(schema["example"], schema, schemas)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if needed(method.upper(), path) is not Role.NOBODY:
                operation["security"] = [{name: []} for name in KEYS]
                operation["responses"] = _of_the_door(operation["responses"]) | operation["responses"]
            for part in (operation.get("requestBody", {}), *operation["responses"].values()):
                for content in part.get("content", {}).values():
                    _complete(content, schemas)
    return document


def _of_the_door(answers: Document) -> Document:
    """What anybody may be answered who is not let in, in the words that the route has for all else that it refuses."""
    if "default" not in answers:
        return {}
    return {status: {**answers["default"], "description": text} for status, text in DOOR.items()}


def _complete(content: Document, schemas: dict[str, Schema]) -> None:
    schema = content.get("schema", {})
    if "example" in content:
        content["example"] = _with_nulls(content["example"], schema, schemas)
    for example in content.get("examples", {}).values():
        example["value"] = _with_nulls(example["value"], schema, schemas)


def _with_nulls(value: Any, schema: Schema, schemas: dict[str, Schema]) -> Any:
    """An example with null for each field that must be there and is not: FastAPI leaves out all that is null."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    for kind in schema.get("anyOf", ()):
        value = _with_nulls(value, kind, schemas)
    if isinstance(value, list):
        return [_with_nulls(part, schema.get("items", {}), schemas) for part in value]
    if not isinstance(value, dict):
        return value
    fields, others = schema.get("properties", {}), schema.get("additionalProperties")
    rest = others if isinstance(others, dict) else {}
    there = {name: _with_nulls(part, fields.get(name, rest), schemas) for name, part in value.items()}
    missing = schema.get("required", []) if "anyOf" not in schema else []
    return there | {name: None for name in missing if name not in there and _nullable(fields.get(name, {}))}


def _nullable(schema: Schema) -> bool:
    return any(kind.get("type") == "null" for kind in schema.get("anyOf", ()))
