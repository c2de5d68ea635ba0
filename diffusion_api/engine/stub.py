"""An engine without torch: its picture is a function of the request alone. For tests, demos of clients and load tests.

Words in a prompt make it misbehave: ``stub:seconds=0.05`` sleeps before every step, ``stub:fail`` fails the job,
``stub:die`` kills the process in mid-job.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np

from diffusion_api.engine.base import Admission, Event, Finished
from diffusion_api.errors import Interrupted
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.report import DeviceReport
from diffusion_api.schema.request import Request

HOOK = re.compile(r"stub:(\w+)(?:=([\d.]+))?")


class StubEngine:
    """Satisfies :class:`diffusion_api.engine.base.Engine`."""

    def __init__(self) -> None:
        self._admission = Admission()

    def start(self) -> None:
        """Nothing to load."""

    def wait(self) -> None:
        """Always ready."""

    def report(self) -> DeviceReport:
        """No device at all."""
        return DeviceReport("stub", "stub", {"cuda_available": False, "mps_available": False, "device_name": "stub"})

    def close(self) -> None:
        """Nothing to free."""

    def run(self, request: Request, *, interrupted: Callable[[], bool]) -> Iterator[Event]:
        """Steps without work, then noise seeded by the request."""
        hooks: dict[str, str] = dict(HOOK.findall(request.prompt))
        with self._admission.admitted(interrupted):
            yield Progress(state=State.LOADING, phase="loading")
            for step in range(request.steps):
                if interrupted():
                    raise Interrupted("stopped while it ran")
                time.sleep(float(hooks.get("seconds") or 0))
                if step == request.steps // 2 and "fail" in hooks:
                    raise RuntimeError("the stub engine was told to fail")
                if step == request.steps // 2 and "die" in hooks:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield Progress(
                    state=State.PROCESSING,
                    fraction=(step + 1) / request.steps,
                    phase="generation",
                    step=step + 1,
                    steps=request.steps,
                )
            images = tuple(_picture(request, seed) for seed in request.seeds)
        yield Finished(images=images, seeds=request.seeds)


def _picture(request: Request, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    asked = request.model_copy(update={"seed": seed, "count": 1})
    digest = hashlib.sha256(asked.model_dump_json().encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    coarse = generator.integers(0, 256, (request.height // 8, request.width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)
