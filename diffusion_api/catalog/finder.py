"""The file that somebody else's text means: by its hash first, then by its name."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Sequence

from diffusion_api.catalog.detect import safetensors_metadata
from diffusion_api.catalog.layouts import Kind
from diffusion_api.catalog.library import Asset, Library

LOOK_AGAIN = 0.02
OLD_HASH = 8
"""Hex digits of the hash that programs showed before 2023: of 64 KiB at 1 MiB."""


class Finder:
    """Finds installed files by any hash that programs write of them.

    A hash that is not known yet is made, of the file with the right name first. Who asks waits for at most ``patience``
    seconds for that; it goes on afterwards, for all files of the kind, one after the other.
    """

    def __init__(self, library: Library, *, patience: float = 10.0) -> None:
        self._library, self._patience = library, patience
        self._lock = threading.Lock()
        self._hashing: dict[Kind, threading.Thread] = {}

    def find(self, kind: Kind, name: str, told: str | None) -> tuple[Asset | None, bool]:
        """The file with the hash that is ``told`` of it, else the one with that name; and whether the hash was found.

        A hash is the start of one of these, 8 hex digits of it or more: the SHA-256 of the file (A1111's model hash, AutoV1
        and AutoV2), of its tensors, or what its trainer wrote into it (both of LoRAs), or the one of before 2023.
        """
        named = self._library.find(name) if kind == "model" else self._library.find_asset(kind, name)
        hashed = (told or "").strip().lower()
        if not re.fullmatch(f"[0-9a-f]{{{OLD_HASH},64}}", hashed):
            return named, False
        rows = [row for row in self._library.assets(kind) if row.path.is_file()]
        rows.sort(key=lambda row: row != named)
        found = next((row for row in rows if _known(row, hashed) or _marked(row, hashed)), None)
        if found is None:
            until = time.monotonic() + self._patience
            found = self._made(rows[:1], hashed, until) if named in rows[:1] else None
            found = found or self._made(rows, hashed, until)
        return found or named, found is not None

    def hash_soon(self, kind: Kind) -> None:
        """Have the hashes made that are not known of files of a kind, one after the other; waits for none."""
        rows = [row for row in self._library.assets(kind) if row.path.is_file() and None in row.known_hashes()]
        if rows:
            self._make(rows)

    def _made(self, rows: Sequence[Asset], hashed: str, until: float) -> Asset | None:
        """The file with that hash among some whose hashes may have to be made first, if that is done in time."""
        making = self._make(rows)
        while True:
            last = not making.is_alive() or time.monotonic() > until
            if found := next((row for row in rows if _known(row, hashed)), None):
                return found
            if last:
                return None
            making.join(LOOK_AGAIN)

    def _make(self, rows: Sequence[Asset]) -> threading.Thread:
        """The thread that makes the hashes of some files; there is one of each kind at a time."""
        if len(rows) == 1:
            return _started(rows)
        kind = rows[0].kind if rows else "model"
        with self._lock:
            running = self._hashing.get(kind)
            if running is None or not running.is_alive():
                running = self._hashing[kind] = _started(rows)
            return running


def _started(rows: Sequence[Asset]) -> threading.Thread:
    def make() -> None:
        for row in rows:
            row.hashes.whole(row.path).exception()  # a file that cannot be read has none
            if _has_tensors(row):
                row.hashes.tensors(row.path).exception()

    thread = threading.Thread(target=make, name="hashes", daemon=True)
    thread.start()
    return thread


def _has_tensors(row: Asset) -> bool:
    return row.kind == "lora" and not row.pickled


def _known(row: Asset, hashed: str) -> bool:
    return any(made.startswith(hashed) for made in row.hashes.known(row.path) if made)


def _marked(row: Asset, hashed: str) -> bool:
    """Whether a file has a mark like that which takes no reading of all of it."""
    marks = []
    if _has_tensors(row):
        told = safetensors_metadata(row.path)
        marks = [told.get(key, "").lower() for key in ("sshs_model_hash", "sshs_legacy_hash")]
    if len(hashed) == OLD_HASH:
        marks.append(_old_hash(row))
    return any(mark.startswith(hashed) for mark in marks)


def _old_hash(row: Asset) -> str:
    try:
        with row.path.open("rb") as file:
            file.seek(2**20)
            part = file.read(2**16)
    except OSError:
        return ""
    return hashlib.sha256(part).hexdigest() if part else ""
