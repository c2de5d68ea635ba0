"""Where programs keep their model files: A1111, Forge, ComfyUI, the hub's cache, this service, or a folder of one's own."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from diffusion_api.catalog.detect import INDEXES, index_of

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["model", "lora", "vae", "upscaler", "embedding"]

FOLDERS: dict[str, Kind] = {
    "stable-diffusion": "model",
    "checkpoints": "model",
    "diffusion_models": "model",
    "diffusers": "model",
    "unet": "model",
    "lora": "lora",
    "loras": "lora",
    "lycoris": "lora",
    "vae": "vae",
    "esrgan": "upscaler",
    "realesrgan": "upscaler",
    "bsrgan": "upscaler",
    "swinir": "upscaler",
    "scunet": "upscaler",
    "dat": "upscaler",
    "hat": "upscaler",
    "upscale_models": "upscaler",
    "upscalers": "upscaler",
    "embeddings": "embedding",
}
"""What a folder of that name holds in any of those programs, in any case."""

EXTRA_PATHS = "extra_model_paths.yaml"
"""ComfyUI's own list of more folders, in its root."""

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
MAX_DEPTH = 10
MAX_ENTRIES = 100_000
"""Directory entries of one place that are looked at; a disk is no model folder."""

Tell: TypeAlias = Callable[[str, str], None]
"""Told of what cannot be read: its name for people, and why."""


@dataclass(frozen=True)
class Place:
    """A folder to be searched, with its sub-folders. ``kind`` is what its files are where they do not tell; ``shown``
    stands before their paths when callers see them.
    """

    folder: Path
    shown: str
    kind: Kind | None = None


@dataclass(frozen=True)
class Entry:
    """A file, or a folder of the diffusers layout, that may be something. ``relative`` is its path within its place, as
    people know it: the folders of the hub's cache between a repository and its files are left out.
    """

    path: Path
    relative: PurePosixPath
    shown: str
    kind: Kind | None


def places(root: Path, shown: str, tell: Tell) -> list[Place]:
    """Where to search below a root that the operator named, whichever program it belongs to. It may be ComfyUI's file of
    more roots, too.
    """
    if root.suffix.lower() in (".yaml", ".yml"):
        return _extra_places(root, shown, tell)
    more = root / EXTRA_PATHS
    extra = _extra_places(more, f"{shown}/{EXTRA_PATHS}", tell) if more.is_file() else []
    return [*_program_places(root, shown), *extra]


def _program_places(root: Path, shown: str) -> list[Place]:
    inner = [(root / name, f"{shown}/{name}") for name in ("models", "stable_diffusion")]
    programs = [(folder, text) for folder, text in inner if any(_known(folder))]
    if not programs:
        return [Place(root, shown)]
    found = [(kind, child, f"{shown}/{child.name}") for kind, child in _known(root)]
    for folder, text in programs:
        found += [(kind, child, f"{text}/{child.name}") for kind, child in _known(folder)]
    if (root / "stable_diffusion" / "models").is_dir():
        found.append(("model", root / "stable_diffusion" / "models", f"{shown}/stable_diffusion/models"))
    return [Place(child, text, kind) for kind, child, text in found]


def _extra_places(file: Path, shown: str, tell: Tell) -> list[Place]:
    """The folders that a file of ComfyUI names: sections with a base path, and lines of folders for each kind."""
    import yaml

    try:
        sections = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        tell(shown, " ".join(str(getattr(error, "strerror", None) or error).split())[:200])
        return []
    found: list[Place] = []
    for section in sections.values() if isinstance(sections, dict) else ():
        if isinstance(section, dict):
            found += _section_places(section, file.parent)
    return found


def _section_places(section: dict[str, Any], beside: Path) -> Iterator[Place]:
    base = beside / Path(str(section.get("base_path") or "")).expanduser()
    shown = base.resolve().name
    for name, lines in section.items():
        kind = FOLDERS.get(str(name).lower())
        for line in str(lines).splitlines() if kind else ():
            if line.strip():
                folder = base / line.strip()
                yield Place(folder, f"{shown}/{folder.name}", kind)


def _known(folder: Path) -> Iterator[tuple[Kind, Path]]:
    """The folders in there whose names say what they hold."""
    try:
        children = sorted(folder.iterdir())
    except OSError:
        return
    for child in children:
        kind = FOLDERS.get(child.name.lower())
        if kind and child.is_dir():
            yield kind, child


def search(searched: Iterable[Place], tell: Tell) -> Iterator[Entry]:
    """What may be a model file, nearer ones first. Each folder is entered once, so links in a circle come to an end."""
    entered: set[tuple[int, int]] = set()
    for place in searched:
        yield from _search(place, entered, tell)


def _search(place: Place, entered: set[tuple[int, int]], tell: Tell) -> Iterator[Entry]:
    waiting = deque([(place.folder, PurePosixPath(), place.kind)])
    looked = 0
    while waiting:
        folder, relative, kind = waiting.popleft()
        shown = str(PurePosixPath(place.shown, relative))
        try:
            folder = _snapshot(folder)
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                children = sorted((child for child in found if child.name[0] != "."), key=_order)
        except FileNotFoundError:
            continue
        except OSError as error:
            tell(shown, error.strerror or str(error))
            continue
        if _is_model(folder, {child.name for child in children}):
            yield Entry(folder, relative, shown, "model")
            continue
        looked += len(children)
        if looked > MAX_ENTRIES:
            tell(place.shown, f"it holds more than {MAX_ENTRIES} files; the rest of them were not looked at")
            return
        for child in children:
            below = relative / child.name
            if _is_folder(child):
                if len(below.parts) <= MAX_DEPTH:
                    waiting.append((Path(child), below, kind or FOLDERS.get(child.name.lower())))
            elif child.name.lower().endswith(SUFFIXES):
                yield Entry(Path(child), below, str(PurePosixPath(place.shown, below)), kind)


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _order(child: os.DirEntry[str]) -> tuple[bool, str]:
    """By name, pickles last: of two files of one name the one that can hold no code goes first."""
    return child.name.lower().endswith(SUFFIXES[1:]), child.name


def _is_model(folder: Path, names: set[str]) -> bool:
    """True for a folder of the diffusers layout, also for one that lacks its index."""
    if names & set(INDEXES):
        return True
    return any(part in names and (folder / part / "config.json").is_file() for part in ("unet", "transformer"))


def _snapshot(folder: Path) -> Path:
    """The files of a repository in the hub's cache: its main revision, else the newest one; any other folder itself."""
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("models--") and snapshots.is_dir()):
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (pinned := snapshots / main.read_text().strip()).is_dir():
        return pinned
    found = [s for s in snapshots.iterdir() if s.is_dir()]
    whole = [s for s in found if index_of(s).is_file()] or found
    return max(whole, key=lambda s: s.stat().st_mtime, default=folder)
