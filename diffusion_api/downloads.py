"""One file from another host: resumed where it was cut, tried again, and whole and true when it is there."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import httpx

from diffusion_api import disk
from diffusion_api.errors import BrokenDownload, DiffusionApiError, DiskFull, NotFound, TooLarge, Unreachable
from diffusion_api.fetch import Fetcher, masked

log = logging.getLogger(__name__)

RESERVE = 64 * 2**20
"""Bytes of the disk that a download leaves free."""

TRIES = 6
"""Attempts in a row that brought nothing, after which a download is given up."""

LONGEST_WAIT = 300.0
"""Seconds; a host that wants us to wait longer is told of instead."""

BUSY = (408, 425, 429, 500, 502, 503, 504)

Tell: TypeAlias = Callable[[str, int, int | None], None]
"""Told as a file grows: its name, the bytes that are there, and how many it will have if that is known."""

Explain: TypeAlias = Callable[[int, Mapping[str, str]], DiffusionApiError]
"""What a refusal means, by its status and headers."""


def explain(status: int, headers: Mapping[str, str]) -> DiffusionApiError:
    """A refusal in plain words."""
    if status in (404, 410):
        return NotFound("the host says that there is no such file")
    if status in (401, 403):
        return NotFound("the host does not let this file be fetched without signing in")
    return Unreachable(f"the host answered {status}")


@dataclass(frozen=True)
class Remote:
    """A file of another host. ``name`` is for people; ``secrets`` are headers for the first host alone. Size in bytes, and
    so is ``limit``, beyond which it is not fetched.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    explain: Explain = explain
    limit: int | None = None


class Downloads:
    """Fetches files. ``wait`` is how seconds pass between two attempts."""

    def __init__(self, fetcher: Fetcher, *, wait: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._fetcher, self._wait = fetcher, wait

    async def read(self, remote: Remote, limit: int, tries: int = TRIES) -> bytes:
        """The content of a small file. Raises BrokenDownload for one of more than ``limit`` bytes, and as :meth:`file`."""
        failures = 0
        while True:
            try:
                async with self._fetcher.get(remote.url, {}, field=remote.name, secrets=remote.secrets) as response:
                    self._check(remote, response)
                    content = b""
                    async for chunk in response.aiter_raw():
                        content += chunk
                        if len(content) > limit:
                            raise BrokenDownload(f"{remote.name} has more than {limit} bytes")
                    return content
            except Unreachable as error:
                failures += 1
                await self._pause(remote, error, failures, tries)

    async def file(self, remote: Remote, target: Path, tell: Tell) -> str:
        """Fetch into ``target``, by way of a ``.part`` file beside it that a later call goes on with. When this returns, the
        file has the size and the SHA-256 that it should have, and is on the disk. The name that its host has for it.

        Raises Unreachable, BrokenDownload, TooLarge, DiskFull, UrlRefused, and what ``remote.explain`` makes of a refusal.
        """
        part = target.with_name(target.name + ".part")
        failures, name = 0, ""
        while True:
            before = _size(part)
            try:
                name = await self._some(remote, part, tell)
                break
            except Unreachable as error:
                failures = 1 if _size(part) > before else failures + 1
                await self._pause(remote, error, failures, more=_size(part) > 0)
            except TooLarge:
                disk.remove(part)
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DiskFull(f"the disk is full; {_shown(_size(part))} of {remote.name} are there") from error
        if remote.sha256:
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != remote.sha256:
                disk.remove(part)
                raise BrokenDownload(
                    f"{remote.name} has the SHA-256 {found} and should have {remote.sha256}; what came was removed"
                )
        disk.rename_durably(part, target)
        disk.remove(_tag(part))
        return name

    async def _some(self, remote: Remote, part: Path, tell: Tell) -> str:
        """Go on with the file until it is whole. Raises Unreachable when it was cut."""
        have = _size(part)
        if remote.size is not None and have == remote.size:
            return ""
        tag = _tag(part).read_text() if have and _tag(part).exists() else ""
        headers = {"Range": f"bytes={have}-", **({"If-Range": tag} if tag else {})} if have else {}
        async with self._fetcher.get(remote.url, headers, field=remote.name, secrets=remote.secrets) as response:
            if response.status_code == 416:  # it has become shorter, or was whole already and nobody knew
                if response.headers.get("content-range") == f"bytes */{have}":
                    return _named(response)
                disk.remove(part)
                raise Unreachable("the file is another one than before")
            self._check(remote, response)
            start = _start(response)
            if start not in (0, have):
                raise Unreachable("the host sent another part of the file than was asked for")
            length = response.headers.get("content-length", "")
            total = start + int(length) if length.isdecimal() else None
            if remote.size is not None and total is not None and total != remote.size:
                raise BrokenDownload(f"{remote.name} has {total} bytes there, and should have {remote.size}")
            _check_size(remote, total)
            _check_room(remote, part, start, total)
            _tag(part).write_text(_strong(response.headers.get("etag", "")))
            tell(remote.name, start, total)
            with part.open("r+b" if part.exists() else "wb") as file:
                file.truncate(start)
                file.seek(start)
                async for chunk in response.aiter_raw():
                    if file.tell() == 0 and chunk[:1] == b"<":
                        raise BrokenDownload(
                            f"{remote.name} is a web page and no file; does one have to sign in there?"
                        )
                    _check_size(remote, file.tell() + len(chunk))
                    file.write(chunk)
                    tell(remote.name, file.tell(), total)
                file.flush()
                os.fsync(file.fileno())
                if total is not None and file.tell() < total:
                    raise Unreachable("the connection was cut")
            return _named(response)

    def _check(self, remote: Remote, response: httpx.Response) -> None:
        status = response.status_code
        if status in BUSY:
            asked = response.headers.get("retry-after", "")
            raise _Busy(f"the host answered {status}", float(asked) if asked.isdecimal() else None)
        if status not in (200, 206):
            raise remote.explain(status, response.headers)
        if response.headers.get("content-type", "").startswith("text/html"):
            raise BrokenDownload(f"{remote.name} is a web page and no file; does one have to sign in there?")

    async def _pause(
        self, remote: Remote, error: Unreachable, failures: int, tries: int = TRIES, *, more: bool = False
    ) -> None:
        """Wait before the next attempt. Raises Unreachable when there shall be none; ``more`` if something came already."""
        seconds = error.seconds if isinstance(error, _Busy) and error.seconds is not None else 2.0 ** (failures - 1)
        if failures >= tries or seconds > LONGEST_WAIT:
            patience = f" and wants to be left alone for {seconds:.0f} s" if seconds > LONGEST_WAIT else ""
            where, later = (
                masked(remote.url).partition("?")[0],
                "; asked again later, it goes on from there" if more else "",
            )
            raise Unreachable(f"{remote.name} ({where}): {error}{patience}{later}") from error
        log.warning("%s: %s; again in %.0f s (tries left: %d)", remote.name, error, seconds, tries - failures)
        await self._wait(seconds)


class _Busy(Unreachable):
    """The host wants to be asked later, in so many seconds if it says so."""

    def __init__(self, message: str, seconds: float | None) -> None:
        super().__init__(message)
        self.seconds = seconds


def _check_size(remote: Remote, size: int | None) -> None:
    """Raises TooLarge for more bytes than are wanted."""
    if remote.limit is not None and size is not None and size > remote.limit:
        raise TooLarge(f"{remote.name} has {_shown(size)} or more; at most {_shown(remote.limit)} are fetched")


def _check_room(remote: Remote, part: Path, start: int, total: int | None) -> None:
    """Raises DiskFull before anything is written that would not fit."""
    if total is None:
        return
    needed, free = total - start, disk.free(part.parent) - RESERVE
    if needed > free:
        raise DiskFull(f"{remote.name} needs {_shown(needed)} more, and {_shown(max(0, free))} are free; make room")


def _shown(size: int) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    """Where the version of an unfinished file stands, so that its rest comes from the same one."""
    return part.with_name(part.name + ".etag")


def _strong(etag: str) -> str:
    return "" if etag.startswith("W/") else etag


def _start(response: httpx.Response) -> int:
    """Where in the file an answer begins."""
    if response.status_code != 206:
        return 0
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", ""))
    return int(found[1]) if found else -1


def _named(response: httpx.Response) -> str:
    """The name that the host has for the file, without any folder; empty if it says none."""
    found = re.search(r'filename="?([^";]+)"?', response.headers.get("content-disposition", ""))
    return re.split(r"[/\\]", found[1])[-1].strip() if found else ""
