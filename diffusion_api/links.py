"""Links to pictures that are their own credential, for a time: for ``<img>`` tags and scripts, which send no key."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from contextlib import suppress

from diffusion_api.errors import Gone, Misconfigured, NotFound

HOUR = 3600
LASTS = 24 * HOUR
"""Seconds that a link opens its picture at least; an hour more at most, so that it stays the same for an hour."""

LINK = re.compile(r"([A-Za-z0-9_-]{1,64})\.(\d{1,4})\.(\d{1,12})\.([0-9a-f]{64})", re.ASCII)
BLOB = re.compile(r"([A-Za-z0-9_-]{1,64}(?:\.\d{1,4})?)\.(\d{1,12})\.([0-9a-f]{64})", re.ASCII)

NO_BLOB = "Blob not found"

FOREVER = 0
"""When a link expires that does not."""


class Links:
    """Makes links and reads them. ``secret`` is asked for at the first; it may raise Misconfigured, and then there are none."""

    def __init__(self, secret: Callable[[], str]) -> None:
        self._secret = secret

    def link(self, job_id: str, number: int) -> str | None:
        """The path of a picture's link, from the root of the service; None where none can be signed."""
        expires = (int(time.time()) // HOUR + 1) * HOUR + LASTS
        with suppress(Misconfigured):
            return f"/image/{job_id}.{number}.{expires}.{self._signed(job_id, number, expires)}"
        return None

    def opened(self, text: str) -> tuple[str, int]:
        """The job's id and the picture's number that the end of a link stands for. Raises NotFound, Gone, Misconfigured."""
        found = LINK.fullmatch(text)
        if not found or not hmac.compare_digest(found[4], self._signed(found[1], int(found[2]), int(found[3]))):
            raise NotFound("this link opens no picture")
        if int(found[3]) <= time.time():
            raise Gone("this link has expired; the status of the job has a new one")
        return found[1], int(found[2])

    def blob(self, name: str, expires: int) -> str:
        """The path of a link to the blob of that name, good until ``expires``, epoch seconds or FOREVER.

        Raises Misconfigured.
        """
        return f"/blob/{name}.{expires}.{self._mac(f'blob {name} {expires}')}"

    def blob_opened(self, text: str) -> str:
        """The name of the blob that the end of a link stands for. Raises NotFound, Misconfigured."""
        found = BLOB.fullmatch(text)
        if not found or not hmac.compare_digest(found[3], self._mac(f"blob {found[1]} {found[2]}")):
            raise NotFound(NO_BLOB)
        if int(found[2]) != FOREVER and int(found[2]) <= time.time():
            raise NotFound(NO_BLOB)
        return found[1]

    def _signed(self, job_id: str, number: int, expires: int) -> str:
        return self._mac(f"image {job_id} {number} {expires}")

    def _mac(self, message: str) -> str:
        return hmac.new(self._secret().encode(), message.encode(), hashlib.sha256).hexdigest()
