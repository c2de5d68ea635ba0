"""``make openapi``: write ``openapi.yml``, what the service promises to its callers, as docs/stability.md says.

What a caller of the file that is there now could not cope with is listed, and then nothing is written unless ``--breaking``
is given. Exit status: 0 when it was written, 1 when it was not.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import yaml

SNAPSHOT = Path(__file__).parents[1] / "openapi.yml"

Document: TypeAlias = dict[str, Any]
Schema: TypeAlias = dict[str, Any]

LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems")
UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")


def main(arguments: list[str]) -> int:
    """Write the file, or say why not."""
    document = current()
    broken = list(breaking(yaml.safe_load(SNAPSHOT.read_text("utf-8")), document)) if SNAPSHOT.exists() else []
    print("\n".join(broken), end="\n" if broken else "")
    if broken and arguments != ["--breaking"]:
        print(
            "openapi.yml was left as it was: docs/stability.md promises these; ARGS=--breaking writes it nevertheless"
        )
        return 1
    SNAPSHOT.write_text(written(document), "utf-8")
    return 0


def current() -> Document:
    """The document of the code as it is."""
    from diffusion_api.server import build_app
    from diffusion_api.settings import Settings

    with tempfile.TemporaryDirectory() as home:
        document: Document = build_app(Settings(home=Path(home), engine="stub"), worker=False).openapi()
    return document


def written(document: Document) -> str:
    """The text of the file."""
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))


def breaking(old: Document, new: Document) -> Iterator[str]:
    """What callers who know the old document would meet, each as a sentence: routes, fields, statuses and values that went
    away, what became required, and what was narrowed of what they send or widened of what they get.
    """
    sent, got = _Sent(old, new), _Got(old, new)
    for path, operations in old["paths"].items():
        for method, before in operations.items():
            where = f"{method.upper()} {path}"
            after = new["paths"].get(path, {}).get(method)
            if after is None:
                yield f"{where} is gone"
                continue
            if after.get("security") and not before.get("security"):
                yield f"{where} needs a key"
            yield from _parameters(where, before, after, sent)
            yield from _contents(f"{where}: body", before.get("requestBody"), after.get("requestBody"), sent)
            for status, answer in before["responses"].items():
                there = after["responses"].get(status)
                if there is None:
                    yield f"{where} does not answer {status} any more"
                    continue
                for header in answer.get("headers", {}).keys() - there.get("headers", {}).keys():
                    yield f"{where}: {status} has no header {header} any more"
                yield from _contents(f"{where}: {status}", answer, there, got)


def _parameters(where: str, before: Document, after: Document, sent: _Sent) -> Iterator[str]:
    old, new = (
        {(p["in"], p["name"]): p for p in operation.get("parameters", ()) if p["in"] != "path"}
        for operation in (before, after)
    )
    for key, parameter in new.items():
        if parameter.get("required") and not old.get(key, {}).get("required"):
            yield f"{where}: {key[1]} ({key[0]}) is required"
    for key, parameter in old.items():
        if key in new:
            yield from sent.compare(f"{where}: {key[1]}", parameter["schema"], new[key]["schema"])
        else:
            yield f"{where}: {key[1]} ({key[0]}) is gone"


def _contents(where: str, old: Document | None, new: Document | None, way: _Way) -> Iterator[str]:
    there = (new or {}).get("content", {})
    for media, content in (old or {}).get("content", {}).items():
        if media not in there:
            yield f"{where}: {media} is gone"
        else:
            yield from way.compare(where, content.get("schema", {}), there[media].get("schema", {}))


class _Way:
    """Compares schemas of what goes one way, of the old and the new document."""

    def __init__(self, old: Document, new: Document) -> None:
        self._old, self._new = (document.get("components", {}).get("schemas", {}) for document in (old, new))
        self._within: set[tuple[int, int]] = set()

    def compare(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        """What would break, each as a sentence that begins with the place."""
        before, after = list(_kinds(old, self._old)), list(_kinds(new, self._new))
        yield from self.kinds(where, before, after)
        for kind in before:
            same = [list(self._once(where, kind, other)) for other in after if _like(kind, other)]
            if same:
                yield from min(same, key=len)

    def kinds(self, where: str, old: list[Schema], new: list[Schema]) -> Iterator[str]:
        """What would break of the types."""
        raise NotImplementedError

    def bounds(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        """What would break of the limits of a value, and of what must be there."""
        raise NotImplementedError

    def _once(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        """What would break of two schemas; nothing while these are compared already, as an object may hold its like."""
        pair = id(old), id(new)
        if pair not in self._within:
            self._within.add(pair)
            yield from self._same(where, old, new)
            self._within.remove(pair)

    def _same(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        yield from self.bounds(where, old, new)
        values = set(new.get("enum", ()))
        for value in old.get("enum", ()):
            if values and value not in values:
                yield f"{where} is never {value!r} any more"
        for name, schema in old.get("properties", {}).items():
            if name in new.get("properties", {}):
                yield from self.compare(f"{where}.{name}", schema, new["properties"][name])
            else:
                yield f"{where}.{name} is gone"
        for inner in ("items", "additionalProperties"):
            if isinstance(old.get(inner), dict) and isinstance(new.get(inner), dict):
                yield from self.compare(f"{where}[]", old[inner], new[inner])


class _Sent(_Way):
    """What callers send: it must go on being taken."""

    def kinds(self, where: str, old: list[Schema], new: list[Schema]) -> Iterator[str]:
        """A type that is not taken any more."""
        for kind in old:
            if not any(_takes(other, kind) for other in new):
                yield f"{where} may not be {kind.get('type', 'anything')} any more"

    def bounds(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        """A limit that is closer, a field that must be there."""
        for name in LOWER:
            if name in new and new[name] > old.get(name, float("-inf")):
                yield f"{where}: {name} is {new[name]}, it was {old.get(name, 'none')}"
        for name in UPPER:
            if name in new and new[name] < old.get(name, float("inf")):
                yield f"{where}: {name} is {new[name]}, it was {old.get(name, 'none')}"
        for name in ("pattern", "multipleOf", "format"):
            if name in new and new[name] != old.get(name):
                yield f"{where}: {name} is {new[name]!r}, it was {old.get(name, 'none')!r}"
        if "enum" in new and "enum" not in old:
            yield f"{where} may only be one of {new['enum']}"
        for name in sorted(set(new.get("required", ())) - set(old.get("required", ()))):
            yield f"{where}.{name} is required"


class _Got(_Way):
    """What callers are answered: it must go on being what they understand."""

    def kinds(self, where: str, old: list[Schema], new: list[Schema]) -> Iterator[str]:
        """A type that was never there before, or is not there any more."""
        for kind in new:
            if not any(_takes(other, kind) for other in old):
                yield f"{where} may be {kind.get('type', 'anything')} now"
        for kind in old:
            if not any(_like(kind, other) for other in new):
                yield f"{where} is never {kind.get('type', 'anything')} any more"

    def bounds(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        """A field that may be missing."""
        for name in sorted(set(old.get("required", ())) - set(new.get("required", ()))):
            yield f"{where}.{name} may be missing"


def _kinds(schema: Schema, schemas: dict[str, Schema]) -> Iterator[Schema]:
    """The alternatives that a schema has, references followed, a constant as a list of one value."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    if several := schema.get("anyOf") or schema.get("oneOf"):
        for each in several:
            yield from _kinds(each, schemas)
    elif "const" in schema:
        yield schema | {"enum": [schema["const"]]}
    else:
        yield schema


def _takes(wide: Schema, narrow: Schema) -> bool:
    """Whether a value of the one type is one of the other."""
    kinds = wide.get("type"), narrow.get("type")
    return kinds[0] is None or kinds[0] == kinds[1] or kinds == ("number", "integer")


def _like(one: Schema, other: Schema) -> bool:
    return _takes(one, other) or _takes(other, one)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
