"""A language model that another service runs: what it is asked in a URL, and the text that it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import httpx

from diffusion_api.errors import BrokenDownload, Unreachable
from diffusion_api.fetch import Fetcher, origin_of

LONGEST_QUESTION = 64 * 2**10
"""Characters of a URL, in which one of a text may take nine."""
LONGEST_ANSWER = 2**20
"""Bytes."""


class Llm:
    """Asks the service at ``url``, for ``seconds`` at most. Raises Misconfigured."""

    def __init__(self, url: str, *, seconds: float) -> None:
        self._url, self._seconds = url, seconds
        self._fetcher = Fetcher([origin_of(url)], trusted=True, total=seconds)

    async def ask(self, path: str, question: Mapping[str, str]) -> str:
        """The text that it answers to a GET with this query. Raises UrlRefused, Unreachable, BrokenDownload."""
        url = str(httpx.URL(self._url).join(path).copy_merge_params(question))
        try:
            async with asyncio.timeout(self._seconds):
                return await self._answer(url)
        except TimeoutError as error:
            raise Unreachable(f"no whole answer within {self._seconds:g} s") from error

    async def _answer(self, url: str) -> str:
        answer = b""
        async with self._fetcher.get(url, {}, field="the language model", longest=LONGEST_QUESTION) as response:
            if not response.is_success:
                raise BrokenDownload(f"it answered with status {response.status_code}")
            async for part in response.aiter_raw():
                answer += part
                if len(answer) > LONGEST_ANSWER:
                    raise BrokenDownload(f"its answer is larger than {LONGEST_ANSWER} bytes")
        return _text(answer.decode(errors="replace"))


def _text(answer: str) -> str:
    """What an answer says: a JSON text without its quotes, anything else as it is."""
    try:
        value = json.loads(answer)
    except ValueError:
        return answer
    return value if isinstance(value, str) else answer
