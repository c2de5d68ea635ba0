"""An engine without torch: its picture is a function of the request alone. For tests, demos of clients and load tests.

Words in a prompt make it misbehave, as an engine or its device may; unless they say otherwise, the next job is served as
if nothing had happened. ``k`` is the step in which it happens, 1 to ``steps``; without ``=k`` it is the one in the middle.

    stub:seconds=s   sleep for s seconds in every step
    stub:fail=k      raise an error that nobody expected
    stub:oom=k       run out of memory; ``stub:oom=load``: while the model is loaded
    stub:nan=k       compute what is no number, which shows when the picture is made
    stub:lost=k      lose the device: this job and every later one fail with DeviceLost
    stub:hang=k      never come back from the step
    stub:die=k       kill the process (SIGKILL), as the system does when memory runs out
    stub:segfault=k  crash the process in C code
    stub:gil=s       hold the interpreter's lock for s seconds, in the step in the middle
    stub:memory=m    use m MiB of memory while the job runs
    stub:unsafe=n    make a picture n, 1 to ``count``, that a safety checker flags, if one is installed; without ``=n``: each

A job that is stopped with a picture gets the one that it would have made with so many steps.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import NoReturn

import numpy as np

from diffusion_api.engine.base import (
    Admission,
    Embeddings,
    Event,
    Finished,
    Pictures,
    Pixels,
    Preview,
    Stop,
    StopAsked,
    no_pictures,
    out_of_memory,
)
from diffusion_api.engine.guard import Applied, enforced, shown, unseen
from diffusion_api.errors import DeviceLost, Interrupted, NotFinite
from diffusion_api.schema.job import Progress, Safety, State
from diffusion_api.schema.report import DeviceReport, HeldModel
from diffusion_api.schema.request import (
    Caption,
    Embed,
    Policy,
    Reading,
    Request,
    Txt2Img,
    Upscale,
    model_of,
    policy_for,
)

HOOK = re.compile(r"stub:(\w+)(?:=([\w.]+))?")


class StubEngine:
    """Satisfies :class:`diffusion_api.engine.base.Engine`."""

    def __init__(
        self,
        picture: Pictures = no_pictures,
        *,
        policy: Policy = "off",
        checker: Callable[[str | None], object | None] = lambda model: None,
    ) -> None:
        self._picture, self._policy, self._checker = picture, policy, checker
        self._admission = Admission()
        self._lost = False

    def start(self) -> None:
        """Nothing to load."""

    def wait(self, seconds: float | None = None) -> bool:
        """Always ready."""
        return True

    def warm_up(self, model: str) -> None:
        """Nothing to load."""

    @property
    def held(self) -> tuple[HeldModel, ...]:
        """It needs no model."""
        return ()

    def report(self) -> DeviceReport:
        """No device at all."""
        return DeviceReport("stub", "stub", {"cuda_available": False, "mps_available": False, "device_name": "stub"})

    def close(self, seconds: float | None = None) -> bool:
        """Nothing to free."""
        return True

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        """Steps without work, then noise seeded by the request. What it brings along is opened, and seen only by its name."""
        for name in request.inputs:
            self._picture(name)
        with self._admission.admitted(stop):
            if self._lost:
                _lose(request)
            try:
                policy = policy_for(request, self._policy)
                applied, warnings = enforced(policy, lambda: self._checker(model_of(request)))
                drawn, more = unseen(request, applied)
                finished = _guarded((yield from _job(drawn, stop)), drawn, applied, warnings + more)
            except DeviceLost:
                self._lost = True
                raise
        yield finished


def _job(request: Request, stop: StopAsked) -> Generator[Event, None, Finished]:
    if isinstance(request, Upscale):
        yield Progress(state=State.LOADING, phase="loading")
        yield Progress(state=State.PROCESSING, fraction=1, phase="upscaling", step=1, steps=1)
        return Finished(images=(_picture(request, request.width, request.height),), seeds=request.seeds)
    if isinstance(request, Reading):
        return (yield from _told(request, stop))
    hooks = dict(HOOK.findall(request.prompt))
    yield Progress(state=State.LOADING, phase="loading")
    if hooks.get("oom") == "load":
        _exhaust(request)
    held = _allocated(request, int(hooks.get("memory", 0)))
    middle = request.steps // 2 + 1
    partial: int | None = None
    for step in range(1, request.steps + 1):
        if asked := stop():
            if asked is Stop.NOW or step == 1:
                raise Interrupted("stopped while it ran")
            partial = step - 1
            break
        time.sleep(float(hooks.get("seconds", 0)))
        if step == middle:
            _hold_the_interpreter(float(hooks.get("gil", 0)))
        for name, misbehave in FAULTS.items():
            if name in hooks and step == int(hooks[name] or middle):
                misbehave(request)
        yield Progress(
            state=State.PROCESSING,
            fraction=step / request.steps,
            phase="generation",
            step=step,
            steps=request.steps,
        )
        if request.preview_every and step % request.preview_every == 0:
            yield Preview(_picture(request.model_copy(update={"steps": step}), request.width // 8, request.height // 8))
    del held
    made = request if partial is None else request.model_copy(update={"steps": partial})
    if "nan" in hooks and made.steps >= int(hooks["nan"] or middle):
        raise NotFinite("the stub engine was told to compute what is no number")
    size = (isinstance(made, Txt2Img) and made.hires) or made
    images = tuple(
        _picture(
            made.model_copy(update={"seed": seed, "variation_seed": variation_seed, "count": 1, "preview_every": 0}),
            size.width,
            size.height,
        )
        for seed, variation_seed in zip(made.seeds, made.variation_seeds, strict=True)
    )
    return Finished(images=images, seeds=made.seeds, partial=partial)


def _told(request: Caption | Embed, stop: StopAsked) -> Generator[Event, None, Finished]:
    """A word of the request's own, or numbers as many as UniDiffuser has."""
    yield Progress(state=State.LOADING, phase="loading")
    steps = request.steps if isinstance(request, Caption) else 1
    for step in range(1, steps + 1):
        if stop():
            raise Interrupted("stopped while it ran")
        yield Progress(state=State.PROCESSING, fraction=step / steps, phase=request.kind, step=step, steps=steps)
    digest = hashlib.sha256(request.model_dump_json().encode()).digest()
    if isinstance(request, Caption):
        return Finished(caption=f"a picture of {digest.hex()[:8]}")
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    latents = (4, request.height // 8, request.width // 8)
    return Finished(
        embeddings=Embeddings(
            clip=generator.standard_normal(512, np.float32), vae=generator.standard_normal(latents, np.float32)
        )
    )


def _guarded(finished: Finished, request: Request, applied: Applied, warnings: tuple[str, ...]) -> Finished:
    """What a job made, as it may be seen. Raises UnsafePicture."""
    if applied == "off":
        return replace(finished, warnings=warnings)
    hooks = dict(HOOK.findall("".join(request.prompts)))
    flagged = tuple(
        "unsafe" in hooks and hooks["unsafe"] in ("", str(number + 1)) for number in range(len(finished.images))
    )
    images = tuple(shown(*both, applied) for both in zip(finished.images, flagged, strict=True))
    return replace(finished, images=images, warnings=warnings, safety=Safety(applied=applied, flagged=flagged))


def _fail(request: Request) -> NoReturn:
    raise RuntimeError("the stub engine was told to fail")


def _exhaust(request: Request) -> NoReturn:
    raise out_of_memory(request)


def _lose(request: Request) -> NoReturn:
    raise DeviceLost("the stub engine was told to lose its device")


def _hang(request: Request) -> None:
    threading.Event().wait()


def _die(request: Request) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash(request: Request) -> None:
    ctypes.string_at(0)


FAULTS: dict[str, Callable[[Request], None]] = {
    "fail": _fail,
    "oom": _exhaust,
    "lost": _lose,
    "hang": _hang,
    "die": _die,
    "segfault": _crash,
}
"""What happens in a step."""


def _allocated(request: Request, mebibytes: int) -> bytes:
    try:
        return b"\1" * (mebibytes * 2**20)
    except MemoryError:
        raise out_of_memory(request) from None


def _hold_the_interpreter(seconds: float) -> None:
    """Sleep in C without letting go of the lock, as a library may that forgets to."""
    if seconds:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def _picture(asked: Request, width: int, height: int) -> Pixels:
    digest = hashlib.sha256(asked.model_dump_json(exclude={"output", "safety"}).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    coarse = generator.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
