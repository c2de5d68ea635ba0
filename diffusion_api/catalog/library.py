"""The files under the model folders, as facts. A scan reads directory entries and headers, never weights."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from diffusion_api.catalog import detect
from diffusion_api.catalog.labels import label
from diffusion_api.errors import InvalidRequest, UnknownModel

log = logging.getLogger(__name__)

RUNNABLE = frozenset({"sd1"})
PREFERRED_DEFAULT = "stable-diffusion-v1-5"
FRESH = 2.0
"""Seconds for which a scan is believed."""


@dataclass(frozen=True)
class Model:
    """An installed model.

    ``native_size`` is the side in pixels that it was trained at; ``shown_path`` is for callers; ``stamp`` changes with the
    files.
    """

    name: str
    family: str
    path: Path
    shown_path: str
    native_size: int
    shipped: bool = False
    stamp: int = 0

    @property
    def label(self) -> str:
        """The friendly name."""
        return label(self.name)

    @property
    def single_file(self) -> bool:
        """True for a checkpoint file, False for a diffusers folder."""
        return self.path.suffix == ".safetensors"

    @property
    def type(self) -> Literal["standard", "sdxl"]:
        """``sdxl`` or ``standard``, the two words of the original API."""
        return "sdxl" if self.family == "sdxl" else "standard"

    @property
    def hash(self) -> str | None:
        """The first 10 hex digits of the file's SHA-256, as A1111 shows it; None for a folder."""
        return _sha256(self.path, self.stamp)[:10] if self.single_file else None


class Library:
    """The models of an installation: the user's folder, and the ones that come with the package."""

    def __init__(self, home: Path, models_dir: Path, shipped: Path | None = None, default: str | None = None) -> None:
        self._home, self._models_dir, self._shipped, self._default = home, models_dir, shipped, default
        self._lock = threading.Lock()
        self._scanned = float("-inf")
        self._models: dict[str, Model] = {}
        self._refused: dict[str, str] = {}
        self._told: set[str] = set()

    def models(self) -> list[Model]:
        """Installed models that can run, by name."""
        with self._lock:
            if time.monotonic() - self._scanned > FRESH:
                self._refused = {}
                self._models = self._scan()
                self._scanned = time.monotonic()
            return sorted(self._models.values(), key=lambda m: m.name.lower())

    def find(self, name: str) -> Model | None:
        """The model with that name, file name or label; case, ``-`` and ``_`` do not matter for labels."""
        models = self.models()
        for model in models:
            if name in (model.name, model.path.name):
                return model
        wanted = _loose(name)
        return next((m for m in models if wanted in (_loose(m.label), _loose(m.name))), None)

    def resolve(self, name: str | None) -> Model:
        """The model that a request means; None means the default one. Raises UnknownModel with the choices."""
        if name is None:
            return self.default()
        model = self.find(name)
        if model is None:
            raise UnknownModel(f"model {name!r} {self.absence(name)}; {self._choices()}", field="model")
        return model

    def absence(self, name: str) -> str:
        """Why no model has that name, as the end of a sentence."""
        reason = self._refused.get(name)
        return f"cannot be used: {reason}" if reason else "is not installed"

    def default(self) -> Model:
        """The configured model; else stable-diffusion-v1-5 if installed; else the only sensible one.

        Raises InvalidRequest when the caller has to choose.
        """
        if self._default:
            return self.resolve(self._default)
        if model := self.find(PREFERRED_DEFAULT):
            return model
        models = self.models()
        candidates = [m for m in models if not m.shipped] or models
        if len(candidates) == 1:
            return candidates[0]
        raise InvalidRequest(f"no model was named and there is no default; {self._choices()}", field="model")

    def _choices(self) -> str:
        names = [m.name for m in self.models()]
        return f"one of {', '.join(names)}" if names else "no model is installed: put one into stable_diffusion/models"

    def _scan(self) -> dict[str, Model]:
        found: dict[str, Model] = {}
        if self._shipped:
            found.update(self._scan_folder(self._shipped, shipped=True))
        found.update(self._scan_folder(self._models_dir, shipped=False))
        return found

    def _scan_folder(self, root: Path, *, shipped: bool) -> dict[str, Model]:
        found: dict[str, Model] = {}
        entries = sorted(root.iterdir()) if root.is_dir() else []
        for entry in entries:
            if entry.name.startswith(".") or not (entry.is_dir() or entry.suffix in (".safetensors", ".ckpt")):
                continue
            try:
                model = self._recognise(entry, shipped=shipped)
            except (detect.Unrecognised, OSError) as error:
                self._tell(entry, str(error))
                continue
            if model.family in RUNNABLE:
                found[model.name] = model
            else:
                self._tell(entry, f"family {model.family} has no lane yet")
        return found

    def _recognise(self, entry: Path, *, shipped: bool) -> Model:
        if entry.suffix == ".ckpt":
            raise detect.Unrecognised(".ckpt files can run code when loaded; convert it to .safetensors")
        if entry.is_dir():
            family, size = detect.folder_family(_snapshot(entry))
            name, path = entry.name, _snapshot(entry)
        else:
            family, size = detect.file_family(entry)
            name, path = entry.stem, entry
        shown = f"shipped/{entry.name}" if shipped else entry.relative_to(self._home).as_posix()
        return Model(name, family, path, shown, size, shipped, _stamp(path))

    def _tell(self, entry: Path, reason: str) -> None:
        self._refused |= {entry.name: reason, entry.stem: reason}
        message = f"{entry.name} is not listed: {reason}"
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


def _snapshot(folder: Path) -> Path:
    """The newest snapshot of a folder in the hub's ``models--org--name`` layout; any other folder itself."""
    snapshots = folder / "snapshots"
    found = [s for s in snapshots.iterdir() if (s / "model_index.json").is_file()] if snapshots.is_dir() else []
    return max(found, key=lambda s: s.stat().st_mtime) if found else folder


def _stamp(path: Path) -> int:
    """Another number whenever a file of the model is another one."""
    files = [path, *sorted(path.glob("*/*"))] if path.is_dir() else [path]
    found = [file.stat() for file in files if file.exists()]
    return hash(tuple((file.st_mtime_ns, file.st_size) for file in found))


def _loose(name: str) -> str:
    return name.lower().replace("-", " ").replace("_", " ").strip()


@lru_cache(maxsize=1024)
def _sha256(path: Path, stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
