"""Loading of models and changing between them, with the shipped model and a single-file copy of it.

Loading is compared with diffusers' own ``from_pretrained`` on the same folder, in turns, each after the other; both find
the files in the page cache. A change takes a model that is in memory already, as the device thread does at the beginning of
each job. Whether memory stays steady over changes that read a model anew is ``bench_memory``'s matter.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from results import write
from transformers.utils import logging as transformers_logging

from diffusion_api.catalog.library import Library
from diffusion_api.engine.devices import Device
from diffusion_api.engine.weights import Weights
from diffusion_api.settings import DATA

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ldm_layout import write_checkpoint

SHAPES = DATA / "models" / "shapes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--changes", type=int, default=200)
    given = parser.parse_known_args()[0]
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        models = Path(folder) / "models"
        models.mkdir()
        write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", models / "copy.safetensors")
        library = Library(Path(folder), models, DATA / "models")
        ratio, ours, theirs = loading(library, given.rounds)
        write(
            "models",
            {
                "model": "shapes, and a single-file copy of it, float32 on the CPU",
                "load_ratio_median": round(ratio, 3),
                "load_ms": round(ours, 1),
                "from_pretrained_ms": round(theirs, 1),
                "switch_ms_median": round(switch(library, given.changes), 3),
                "changes": given.changes,
            },
        )


def weights(library: Library) -> Weights:
    return Weights(library, Device(torch.device("cpu"), torch.float32), DATA / "clip")


def loading(library: Library, rounds: int) -> tuple[float, float, float]:
    """The median ratio of neighbours, and the median milliseconds of each."""
    own = weights(library)

    def load() -> None:
        own.load("shapes")

    def pretrained() -> None:
        StableDiffusionPipeline.from_pretrained(SHAPES, safety_checker=None, local_files_only=True)

    pairs = []
    for number in range(rounds + 1):
        first, second = (load, pretrained) if number % 2 else (pretrained, load)
        took = {work: took_by(work) for work in (first, second)}
        own.unload()
        pairs.append((took[load], took[pretrained]))
    pairs = pairs[1:]  # the first one imports
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    return ratio, *(statistics.median(column) * 1000 for column in zip(*pairs, strict=True))


def took_by(work: Callable[[], None]) -> float:
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def switch(library: Library, changes: int) -> float:
    """Milliseconds."""
    held = weights(library)
    for name in ("shapes", "copy"):
        held.load(name)
    took = []
    for number in range(changes):
        began = time.perf_counter()
        held.load(("shapes", "copy")[number % 2])
        took.append(time.perf_counter() - began)
        assert held.hit
    return statistics.median(took) * 1000


if __name__ == "__main__":
    main()
