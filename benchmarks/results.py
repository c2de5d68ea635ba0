"""Where benches put their figures: ``benchmarks/results/<name>.json``, which the README quotes."""

from __future__ import annotations

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent / "results"


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them, with the machine they were measured on."""
    machine = {
        "date": date.today().isoformat(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "fastapi")},
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps({"figures": figures, "machine": machine}, indent=2) + "\n")
    for key, value in figures.items():
        print(f"  {key:28} {value}")
