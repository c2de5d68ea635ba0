"""Where a safety checker lies: a model that tells which pictures not everybody shall see. Files as facts, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class CheckerFiles:
    """The files of a safety checker: the folder of its network, and the file that says how pictures are brought before it.
    ``shown`` is for callers; ``stamp`` changes with the files.
    """

    folder: Path
    processor: Path
    shown: str
    stamp: int


def beside_model(folder: Path, shown: str) -> CheckerFiles | None:
    """The one that a model in the diffusers layout has in its own folder."""
    return _found(folder / "safety_checker", folder / "feature_extractor" / PROCESSOR, f"{shown}/safety_checker")


def alone(folder: Path, shown: str) -> CheckerFiles | None:
    """The one in a folder of its own, as CompVis/stable-diffusion-safety-checker is published."""
    return _found(folder, folder / PROCESSOR, shown)


def _found(folder: Path, processor: Path, shown: str) -> CheckerFiles | None:
    files = [processor, folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if len(files) < 3 or not all(file.is_file() for file in files):
        return None
    stats = [file.stat() for file in files]
    stamp = hash(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in zip(files, stats, strict=True)))
    return CheckerFiles(folder, processor, shown, stamp)
