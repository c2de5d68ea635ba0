"""What a job's LoRAs cost before its first step: another set, the same again, none; and a check by headers alone."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import write

from diffusion_api.catalog.compatibility import fit, layers, model_shapes
from diffusion_api.catalog.detect import safetensors_header
from diffusion_api.catalog.library import Library
from diffusion_api.engine import devices
from diffusion_api.engine.extras import Extras
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.schema.request import Output, Txt2Img
from diffusion_api.settings import DATA

RUNS = 30
SHAPES, INK = DATA / "models" / "shapes", DATA / "loras" / "shapes-ink.safetensors"


def main() -> None:
    with tempfile.TemporaryDirectory() as home, torch.inference_mode():
        library = Library(Path(home), Path(home) / "models", SHAPES.parent)
        lane, extras = SD1.from_folder(SHAPES, devices.choose("cpu")), Extras(library)

        def attach(tags: str) -> Callable[[], object]:
            asked = Txt2Img(
                model="shapes", prompt=f"{tags} a star", negative_prompt="", steps=1, guidance_scale=7, width=64, height=64,
                sampler="euler", schedule="karras", seed=1, output=Output(),
            )  # fmt: skip
            return lambda: extras.attach(lane, asked)

        one, other, none = attach("<lora:shapes-ink:1>"), attach("<lora:shapes-ink:0.5>"), attach("")
        write(
            "loras",
            {
                "another_ms": _median(one, before=other),
                "again_ms": _median(one),
                "none_ms": _median(none, before=one),
                "check_ms": _median(_checked),
                "threads": torch.get_num_threads(),
            },
        )


def _checked() -> None:
    """Whether the file fits the model. Each time another stamp, so that nothing is known of either."""
    shapes = {name: tensor.shape for name, tensor in safetensors_header(INK).items()}
    assert fit(shapes, layers(model_shapes(SHAPES, time.perf_counter_ns()))).applies


def _median(work: Callable[[], object], *, before: Callable[[], object] | None = None) -> float:
    """Milliseconds; the first run warms up and does not count."""
    seconds = []
    for _ in range(RUNS + 1):
        if before:
            before()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return round(1000 * statistics.median(seconds[1:]), 3)


if __name__ == "__main__":
    main()
