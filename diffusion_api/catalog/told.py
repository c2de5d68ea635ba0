"""What the file of a LoRA says of itself: the words that call it, and a hash that stays when it is described anew."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from diffusion_api.catalog import detect

MOST = 8
"""Tags that are shown of those that a LoRA was trained with."""

LONGEST = 100
"""Characters of a word that calls a LoRA; anybody can write anything into a file."""


@dataclass(frozen=True)
class Told:
    """``trigger_words``: the phrase that its maker wrote down, else the tags that it was trained with most often, the most
    frequent first. ``hash``: the one that the trainer made of its tensors, in hexadecimal; empty without one.
    """

    trigger_words: tuple[str, ...] = ()
    hash: str = ""


def read_told(path: Path) -> Told:
    """What the header of a safetensors file says; nothing where it says nothing, and for any other file."""
    metadata = detect.safetensors_metadata(path)
    written = metadata.get("modelspec.trigger_phrase", "")
    words = [written] if written.strip() else _tags(metadata.get("ss_tag_frequency", ""))
    made = metadata.get("sshs_model_hash", "")
    return Told(
        tuple(word.strip()[:LONGEST] for word in words if word.strip()),
        made if re.fullmatch("[0-9a-f]{12,64}", made) else "",
    )


def _tags(text: str) -> list[str]:
    """The most frequent tags of ``{folder: {tag: count}}``, as kohya's trainer writes it."""
    try:
        folders: Any = from_json(text) if text else None
    except ValueError:
        return []
    found: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            found[tag] += count if isinstance(count, int) else 0
    return [tag for tag, _ in found.most_common(MOST)]
