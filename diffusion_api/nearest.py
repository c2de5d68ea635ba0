"""What a caller may have meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 100
"""Characters that are looked at; finding a near name takes the square of them."""


def hint(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'steps'?"`` with the nearest of the known names, whatever its case; nothing where none is near."""
    names = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name[:LONGEST_NAME].lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
