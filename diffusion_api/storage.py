"""Whether jobs and pictures can be written: tried now and then, as each look writes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from diffusion_api.errors import DiffusionApiError

LOOK_EVERY = 5.0
"""Seconds between two looks."""


class Storage:
    """What stands against writing, by checks that raise an error of ours with the reason."""

    def __init__(self, *checks: Callable[[], None]) -> None:
        self._checks = checks
        self._mutex = threading.Lock()
        self._looked = -math.inf
        self._reasons: tuple[str, ...] = ()

    def reasons(self) -> tuple[str, ...]:
        """As found a moment ago; none when all is well."""
        with self._mutex:
            if time.monotonic() - self._looked > LOOK_EVERY:
                self._reasons = tuple(reason for check in self._checks if (reason := _reason_against(check)))
                self._looked = time.monotonic()
            return self._reasons

    def look_again(self) -> None:
        """Have the next question be answered by a new look."""
        with self._mutex:
            self._looked = -math.inf


def _reason_against(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DiffusionApiError as error:
        return str(error)
    return None
