"""What an upscaled picture takes: from 512 to 4096 pixels a side with the shipped model, by itself on the engine.

Resident memory is read every 10 ms while the job runs. Beside the peak over what the loaded engine had stand the bytes that
the result itself must have.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import psutil
from PIL import Image
from results import write

from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import Finished
from diffusion_api.engine.executor import Executor
from diffusion_api.schema.request import Output, Upscale
from diffusion_api.settings import DATA

MIB = 2**20
UPSCALER = "shapes-2x"
BEGINS = 512


class _Watch:
    """The largest resident memory of this process, looked at while it is open."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peak = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.peak = max(self.peak, psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096)
    side: int = parser.parse_known_args()[0].side
    with tempfile.TemporaryDirectory() as home:
        library = Library(Path(home), Path(home) / "models", DATA / "models")
        small = Image.linear_gradient("L").resize((BEGINS, BEGINS))
        engine = Executor(library, device="cpu", tokenizer=DATA / "clip", picture=lambda name: small)
        engine.start()
        engine.wait()
        _upscaled(engine, BEGINS * 2)  # the model is loaded
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        with _Watch() as watch:
            result = _upscaled(engine, side)
        seconds = time.perf_counter() - started
        engine.close()
    assert result == (side, side)
    write(
        "upscale",
        {
            "job": f"{UPSCALER}, {BEGINS}x{BEGINS} to {side}x{side}",
            "seconds": round(seconds, 1),
            "peak_mib_over_start": round((watch.peak - before) / MIB, 1),
            "result_mib": round(side * side * 3 / MIB, 1),
        },
    )


def _upscaled(engine: Executor, side: int) -> tuple[int, int]:
    request = Upscale(image="gradient", upscaler=UPSCALER, width=side, height=side, output=Output())
    *_, last = engine.run(request, stop=lambda: None)
    assert isinstance(last, Finished)
    height, width, _ = last.images[0].shape
    return width, height


if __name__ == "__main__":
    main()
