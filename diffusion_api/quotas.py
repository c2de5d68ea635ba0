"""How much each caller may ask for in a minute."""

from __future__ import annotations

import math
import threading
import time
from functools import cached_property
from typing import TYPE_CHECKING

from diffusion_api.errors import RateLimited, TooLarge

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.strategies import FixedWindowRateLimiter


class Minutes:
    """So much of one thing for each caller in a minute, which begins with the first of it. 0 is no limit.

    Counted in this process alone, and forgotten when it ends.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._turn = threading.Lock()

    def take(self, who: str, amount: int = 1) -> None:
        """Count this, or refuse it and count nothing. Raises RateLimited, and TooLarge where no minute is enough."""
        if not self._most:
            return
        if amount > self._most:
            raise TooLarge(f"{amount} {self._what} are asked for; at most {self._most} a minute are allowed")
        with self._turn:
            self.check(who, amount)
            self._limiter.hit(self._item, who, cost=amount)

    def check(self, who: str, amount: int = 1) -> None:
        """Raise RateLimited if this would be too much now."""
        if self._most and not self._limiter.test(self._item, who, cost=amount):
            ends = self._limiter.get_window_stats(self._item, who).reset_time
            wait = max(1, math.ceil(ends - time.time()))
            raise RateLimited(
                f"too many {self._what}: {self._most} a minute are allowed; try again in {wait} s", retry_after=wait
            )

    @cached_property
    def _limiter(self) -> FixedWindowRateLimiter:
        from limits.storage import MemoryStorage  # a tenth of a second, for those who want limits
        from limits.strategies import FixedWindowRateLimiter

        return FixedWindowRateLimiter(MemoryStorage())

    @cached_property
    def _item(self) -> RateLimitItem:
        from limits import RateLimitItemPerMinute

        return RateLimitItemPerMinute(self._most)
