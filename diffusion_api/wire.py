"""JSON of callers: how deep it is and how much is in it is known before it is parsed."""

from __future__ import annotations

import json
from typing import Any

from diffusion_api.errors import InvalidRequest, TooLarge

MAX_DEPTH = 32
"""Lists and objects within each other."""

MAX_VALUES = 10_000
"""Values in a body, those in lists and objects included. A list of nothing but ``[]`` takes 20 times its text in memory."""

_STRUCTURE = b"[]{},"
_OTHER = bytes(code for code in range(256) if code not in _STRUCTURE)


def loads(body: bytes) -> Any:
    """The value of a JSON body in UTF-8. Raises InvalidRequest and TooLarge, in time linear in the body's length."""
    _measure(body)
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is no JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is no JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise InvalidRequest("the body is no JSON that can be read: a number has too many digits") from error


def _measure(body: bytes) -> None:
    """Refuse what is too deep or too much. Works by whole-body operations: a loop over bytes would take seconds."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = unescaped.count(b'"')
    structure = b"".join(unescaped.split(b'"', 4 * MAX_VALUES)[::2]).translate(None, _OTHER)
    depth = 0
    for mark in structure[: 2 * MAX_VALUES].translate(None, b","):
        depth += 1 if mark in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested too deeply: at most {MAX_DEPTH} lists and objects in each other")
    values = sum(structure.count(mark) for mark in (b"[", b"{", b","))
    # Each value may have a name, each text has two quotes, and what was opened is closed once.
    if values > MAX_VALUES or quotes > 4 * MAX_VALUES or len(structure) > 2 * MAX_VALUES:
        raise TooLarge(f"the body has too much in it: at most {MAX_VALUES} values are allowed")
