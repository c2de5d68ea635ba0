"""What an engine is, and the events a running job sends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeAlias

from diffusion_api.errors import InputLost, Interrupted, OutOfMemory
from diffusion_api.schema.job import LoraApplied, LoraSkipped, Progress, Safety
from diffusion_api.schema.report import DeviceReport, HeldModel
from diffusion_api.schema.request import Reading, Request, Upscale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Pixels: TypeAlias = "NDArray[np.uint8]"
"""A picture: (height, width, 3), uint8, RGB."""


@dataclass(frozen=True)
class Embeddings:
    """A picture in numbers, float32: its embedding by ``clip``, (n,), and its latents, ``vae``, (channels, h/8, w/8)."""

    clip: NDArray[np.float32]
    vae: NDArray[np.float32]


class Stop(Enum):
    """How a running job is to end before its time."""

    NOW = "now"
    WITH_PICTURE = "with picture"
    """With the pictures that are done, and the one in hand as it looks by then."""


StopAsked: TypeAlias = Callable[[], Stop | None]
"""Whether a job is to end before its time; asked at every step."""


@dataclass(frozen=True)
class Attached:
    """What became of the LoRAs, the VAE and the embeddings of a job, or of one of its passes.

    ``hashes`` are those of the files by their names, ``vae`` more fields of an infotext; both by A1111's keys.
    """

    applied: tuple[LoraApplied, ...] = ()
    skipped: tuple[LoraSkipped, ...] = ()
    warnings: tuple[str, ...] = ()
    hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    vae: Mapping[str, str] = field(default_factory=dict)

    def and_then(self, other: Attached) -> Attached:
        """What became of them in the passes so far and in one more. A LoRA that was applied in any was not skipped."""
        applied = (*self.applied, *(one for one in other.applied if one not in self.applied))
        names = {one.name for one in applied}
        skipped = dict.fromkeys(one for one in (*self.skipped, *other.skipped) if one.name not in names)
        return Attached(
            applied=applied,
            skipped=tuple(skipped),
            warnings=tuple(dict.fromkeys(self.warnings + other.warnings)),
            hashes={
                key: {**self.hashes.get(key, {}), **other.hashes.get(key, {})}
                for key in {**self.hashes, **other.hashes}
            },
            vae={**other.vae, **self.vae},
        )

    @property
    def infotext(self) -> dict[str, str]:
        """What is said of it in an infotext."""
        rows = {key: ", ".join(f"{name}: {value}" for name, value in row.items()) for key, row in self.hashes.items()}
        return {**rows, **self.vae}


@dataclass(frozen=True)
class Finished:
    """The pictures, in order, with the seed of each that was drawn, and what the infotext should say beyond the request; or
    what a model tells of a picture.

    ``partial`` is there when the job was told to stop with what it had: the steps that its last picture got, or 0 when
    all of ``images`` are whole and only the rest of them is missing. ``model_cached`` is true when the model was in
    memory already; None for an engine that keeps none. ``memory_steps`` is what was done so that the job fitted.
    """

    images: tuple[Pixels, ...] = ()
    seeds: tuple[int | None, ...] = ()
    caption: str | None = None
    embeddings: Embeddings | None = None
    partial: int | None = None
    model_hash: str | None = None
    model_cached: bool | None = None
    memory_before_mb: float = 0.0
    memory_after_mb: float = 0.0
    warnings: tuple[str, ...] = ()
    memory_steps: tuple[str, ...] = ()
    loras_applied: tuple[LoraApplied, ...] = ()
    loras_skipped: tuple[LoraSkipped, ...] = ()
    safety: Safety = field(default_factory=Safety)
    infotext: Mapping[str, str] = field(default_factory=dict)
    """What only the engine knows of how the pictures were made, by A1111's keys."""


@dataclass(frozen=True)
class Preview:
    """What a job draws, as it looks by now; a small picture."""

    image: Pixels


Event = Progress | Preview | Finished

Pictures: TypeAlias = "Callable[[str], Image]"
"""Gives the stored pictures that requests name. Raises InputLost, InvalidImage, TooLarge."""


def no_pictures(name: str) -> Image:
    """For an engine whose jobs bring nothing along."""
    raise InputLost(f"there is no picture {name!r}")


PATIENCE = 0.05
"""Seconds between two looks at whether a job is to stop, while it waits for the device."""


def out_of_memory(request: Request) -> OutOfMemory:
    """What the caller of a job is told that did not fit into memory."""
    size = f"{request.width}x{request.height}"
    if isinstance(request, Upscale):
        return OutOfMemory(f"out of memory: {size} pixels, upscaler {request.upscaler!r}; ask for a smaller picture")
    if isinstance(request, Reading):
        return OutOfMemory(f"out of memory: {size} pixels, model {request.model!r}; ask for a smaller model")
    return OutOfMemory(
        f"out of memory: {size} pixels, n {request.count}, model {request.model!r}; "
        "ask for a smaller picture or for a smaller model"
    )


class Admission:
    """One job at a time on the device; the others wait, and look whether they were told to stop."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(1)

    @contextmanager
    def admitted(self, stop: StopAsked) -> Iterator[None]:
        """Within, the device is this job's. Raises Interrupted when the job is told to stop while it waits."""
        while not self._free.acquire(timeout=PATIENCE):
            if stop():
                raise Interrupted("stopped before it began")
        try:
            yield
        finally:
            self._free.release()


class Engine(Protocol):
    """Runs requests. Torch may load in the background; :meth:`run` waits for it."""

    def start(self) -> None:
        """Begin loading; returns at once."""

    def wait(self, seconds: float | None = None) -> bool:
        """Block until the engine can run jobs, for so many seconds at most; True once it can.

        Raises DeviceUnusable when it never will.
        """

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        """Events of one job, ending with Finished.

        The first event says that the device is this job's; no device work happens before the second is asked for, so that
        the caller can charge the attempt in between. ``stop`` is asked at every step. Raises Interrupted when the job was
        told to stop and has no picture to show; OutOfMemory, NotFinite, ModelUnreadable, UnknownModel, UnsafePicture and
        NoChecker for this job alone; DeviceLost when no job will work until the process starts again.
        """

    def warm_up(self, model: str) -> None:
        """Have a model in memory before a job asks for it, when the jobs at hand are done. Returns at once; what goes wrong
        is a matter for the log.
        """

    @property
    def held(self) -> tuple[HeldModel, ...]:
        """The models in memory, the last used at the end. Never blocks, whatever the device does."""

    def report(self) -> DeviceReport | None:
        """What the engine runs on, or None while that is not known yet."""

    def close(self, seconds: float | None = None) -> bool:
        """Free the device: True once no thread is in it any more, False if one still is after so many seconds."""
