"""Styles: texts that are put around prompts by name, from A1111's ``styles.csv``."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PLACE = "{prompt}"
"""Where in a style the prompt goes; without it the style follows the prompt."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Style:
    """What is put around a prompt and a negative prompt."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""

    def around(self, prompt: str, negative_prompt: str) -> tuple[str, str]:
        """Both prompts with the style."""
        return _merged(self.prompt, prompt), _merged(self.negative_prompt, negative_prompt)


def _merged(style: str, prompt: str) -> str:
    if PLACE in style:
        return style.replace(PLACE, prompt)
    return ", ".join(filter(None, (prompt.strip(), style.strip())))


def read(files: Iterable[Path]) -> Mapping[str, Style]:
    """The styles in these files, by name; of two with one name the first. A file that cannot be read is logged."""
    found: dict[str, Style] = {}
    for file in files:
        try:
            stat = file.stat()
            rows = _rows(file, stat.st_mtime_ns, stat.st_size)
        except (OSError, ValueError, csv.Error) as error:
            log.warning("%s cannot be read: %s", file.name, error)
            continue
        found = {row.name: row for row in rows} | found
    return found


@lru_cache(maxsize=16)
def _rows(file: Path, changed: int, size: int) -> tuple[Style, ...]:
    """The rows of a file; those without a name, or with one that starts with ``#``, are notes to the reader."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = [(row, (row.get("name") or "").strip()) for row in csv.DictReader(lines)]
    return tuple(
        Style(name, row.get("prompt") or row.get("text") or "", row.get("negative_prompt") or "")
        for row, name in rows
        if name and not name.startswith("#")
    )
