"""``lora_list.json``: where LoRAs come from and what their makers allow, in the form of the configuration API.

People edit it by hand, so what is not understood in it is told and kept as it is.
"""

from __future__ import annotations

import json
import os
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from diffusion_api import disk
from diffusion_api.catalog.labels import FAMILY_BASES
from diffusion_api.errors import Misconfigured

NAME = "lora_list.json"
MAX_BYTES = 32 * 2**20
UNKNOWN = "unknown"

NOT_FOUND = -1
"""The ``model_id`` of a LoRA of which only the file is known."""


class Listed(BaseModel):
    """What is known of a LoRA. ``model_id`` is Civitai's number, ``base_model`` a name of the hub, ``lora_path`` where the
    file came from. With ``allow_no_mention`` its maker need not be named; ``usage_rights`` are in Civitai's words.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    model_id: int = NOT_FOUND
    base_model: str | None = None
    lora_path: str = ""
    trigger_words: tuple[str, ...] = Field(
        default=(), validation_alias="trigger words", serialization_alias="trigger words"
    )
    allow_no_mention: bool = False
    usage_rights: str = UNKNOWN

    @classmethod
    def of_file(cls, shown_path: str, family: str | None, words: tuple[str, ...]) -> Listed:
        """What a file alone tells: nothing of what its maker allows."""
        return cls(base_model=FAMILY_BASES.get(family or ""), lora_path=shown_path, trigger_words=words)

    def dump(self) -> dict[str, Any]:
        """As it stands in the file."""
        return self.model_dump(mode="json", by_alias=True)


def place(home: Path) -> Path:
    """The file of an installation: in its home, or beside the weights where the home is closed to us, as in a container."""
    file = home / NAME
    closed = home.is_dir() and not os.access(home, os.W_OK) and not file.exists()
    return home / "stable_diffusion" / NAME if closed else file


def read(file: Path, tell: Callable[[str], None]) -> dict[str, Listed]:
    """The entries by name. What is wrong in the file is told, and the rest is used."""
    try:
        entries = _entries(file)
    except (OSError, ValueError) as error:
        tell(f"{file.name} is not used: {getattr(error, 'strerror', error)}")
        return {}
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = Listed.model_validate(entry)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "it"
            tell(f"{file.name}: {name!r} is not used: {where} is {first['input']!r}: {first['msg']}")
    return found


def put(file: Path, name: str, listed: Listed, tell: Callable[[str], None]) -> None:
    """Write one entry, and leave the others as they are. A file that cannot be read is kept aside, and that is told.

    Raises Misconfigured when it cannot be written.
    """
    try:
        with _locked(file.with_name(f".{file.name}.lock")):
            try:
                entries = _entries(file)
            except ValueError as error:
                aside = _keep_aside(file)
                tell(f"{file.name} could not be read ({error}); it is kept as {aside.name}, and a new one was begun")
                entries = {}
            text = json.dumps(entries | {name: listed.dump()}, indent=2, ensure_ascii=False)
            disk.write_whole(file, text.encode() + b"\n", tmp=file.parent)
    except OSError as error:
        raise Misconfigured(f"{file.name} cannot be written: {error.strerror}") from error


def _entries(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none. Raises ValueError for one that is no list of LoRAs, and OSError."""
    try:
        data = disk.read_regular(file, MAX_BYTES)
    except FileNotFoundError:
        return {}
    try:
        content = from_json(data.removeprefix(BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object with a name for each LoRA")
    return content


def _keep_aside(file: Path) -> Path:
    number = 1
    while disk.exists(aside := file.with_name(f"{file.name}.broken-{number}")):
        number += 1
    disk.rename_durably(file, aside)
    return aside


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within, nobody else changes the list: neither a thread nor a process. It takes them milliseconds."""
    while (held := disk.lock(path)) is None:
        time.sleep(0.01)
    try:
        yield
        disk.remove(path)
    finally:
        disk.unlock(held)
