"""Pictures that a request names by URL: fetched from hosts that the operator listed, within limits, as bytes.

What the bytes are is for :meth:`Service.picture_of` to find out; what their host says of them counts for nothing.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from diffusion_api import __version__
from diffusion_api.errors import InvalidImage, TooLarge, Unreachable

if TYPE_CHECKING:
    from diffusion_api.fetch import Fetcher

SECONDS = 10.0
"""For one picture, from its request to its last byte, with the wait for its turn."""

AT_ONCE = 8
"""Pictures that are being fetched; each may be as large as a body."""

HEADERS = {"Accept": "image/*", "User-Agent": f"DiffusionAPI/{__version__}"}
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether a text names a picture in place of holding it. No base64 does: it has no colon."""
    return _SCHEME.match(text) is not None


class RemotePictures:
    """Fetches pictures through ``fetcher``, of at most ``max_bytes`` each, in at most ``seconds``."""

    def __init__(self, fetcher: Fetcher, *, max_bytes: int, seconds: float = SECONDS) -> None:
        self._fetcher, self._max_bytes, self._seconds = fetcher, max_bytes, seconds
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, url: str, field: str) -> bytes:
        """What the URL in ``field`` leads to. Raises UrlRefused, Unreachable, TooLarge, and InvalidImage where its host has
        nothing for us.
        """
        try:
            async with asyncio.timeout(self._seconds), self._turn:
                return await self._fetched(url.strip(), field)
        except TimeoutError as error:
            raise Unreachable(f"{field}: the picture was not there after {self._seconds:g} seconds") from error
        except Unreachable as error:
            raise Unreachable(f"{field}: the picture's host does not answer: {error}") from error

    async def _fetched(self, url: str, field: str) -> bytes:
        async with self._fetcher.get(url, HEADERS, field=field) as response:
            if response.status_code != 200:
                raise InvalidImage(f"{field}: the picture's host answers {response.status_code}", field=field)
            data = bytearray()
            self._measure(int(response.headers.get("content-length", 0)), field)
            async for part in response.aiter_raw():  # never decompressed: a small answer stays small
                self._measure(len(data) + len(part), field)
                data += part
            return bytes(data)

    def _measure(self, size: int, field: str) -> None:
        if size > self._max_bytes:
            raise TooLarge(f"{field}: the picture has more than the {self._max_bytes} bytes that are accepted")
