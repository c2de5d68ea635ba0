"""Loading of models, and which of them stay in memory: the last ones used, on the device and in RAM."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_api.catalog.checkers import CheckerFiles
from diffusion_api.catalog.detect import UNIDIFFUSER, Unrecognised, is_pipeline
from diffusion_api.catalog.footprint import footprint
from diffusion_api.catalog.library import Library, Model
from diffusion_api.engine import thrift
from diffusion_api.engine.denoise import Lane, Painter
from diffusion_api.engine.devices import HOST, Device, is_out_of_memory
from diffusion_api.engine.estimate import Load, Measures, Placement, chosen, prices, shown, strictest
from diffusion_api.engine.families.base import UNetLane
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.engine.families.sd2 import SD2
from diffusion_api.engine.families.sdxl import SDXL, SDXLRefiner
from diffusion_api.engine.loras import Patches, Step, Weight
from diffusion_api.engine.plan import plan
from diffusion_api.engine.safety import Checker, size_of
from diffusion_api.engine.upscalers import Upscaler
from diffusion_api.errors import InvalidRequest, ModelUnreadable, OutOfMemory, UnknownModel
from diffusion_api.schema.report import HeldModel
from diffusion_api.schema.request import Request

log = logging.getLogger(__name__)

LONGEST_REASON = 300
"""Characters of what a library says of a file; some list every tensor."""

FAMILIES: dict[str, type[UNetLane]] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "sdxl-refiner": SDXLRefiner}
"""By the names of :mod:`diffusion_api.catalog.detect`."""


@dataclass(frozen=True)
class Held:
    """A model in memory. ``measures`` are what it was last used with; None while it waits in RAM."""

    model: Model
    lane: Lane | Painter
    placed: thrift.Placed
    measures: Measures | None
    loaded: float
    used: float
    """Epoch seconds."""

    @property
    def whole(self) -> bool:
        """Whether all of its weights are on the device."""
        return self.measures is not None and self.measures.placement is Placement.WHOLE

    @property
    def kept(self) -> int:
        """Bytes of RAM beside it: its own weights, while those of a LoRA or a VAE stand in their place."""
        return self.lane.patches.size


class Weights:
    """The models in memory. The one that was used longest ago goes first: from the device to RAM, from RAM for good."""

    def __init__(self, library: Library, device: Device, tokenizer: Path) -> None:
        self._library, self._device, self._tokenizer = library, device, tokenizer
        self._held: dict[str, Held] = {}  # the last used is the last
        self._used: set[str] = set()
        self._upscaler: tuple[tuple[Path, int], Upscaler] | None = None
        self._checker: tuple[CheckerFiles, Checker] | None = None
        self.hit = False
        """Whether the model that was asked for last was in memory already."""
        self.measures = Measures()
        """What it is used with."""
        self.report: tuple[HeldModel, ...] = ()
        """What is in memory; may be read from any thread."""

    def begin(self) -> None:
        """A job begins: what it loads from now on is kept until the next one begins."""
        self._used = set()

    def load(self, name: str, request: Request | None = None, measures: Measures | None = None) -> Lane | Painter:
        """The lane of that model, with at least those measures, and those that the request needs beside them.

        Raises ModelUnreadable, OutOfMemory, and UnknownModel when it is no longer listed.
        """
        model = self._library.find(name)
        if model is None:
            raise UnknownModel(f"model {name!r} {self._library.absence(name)}", field="model")
        held = self._held.get(model.name)
        if held and held.model != model:  # its files are others by now
            self._drop(held)
            held = None
            self._device.free()
        self.hit = held is not None
        self._used.add(model.name)
        needed, size = self._needed(model, request, measures or Measures())
        self.measures = needed
        self._make_room(model, size)
        held = self._placed(held, needed) if held else self._read(model, needed)
        self._keep(held)
        return held.lane

    def upscaler(self, name: str) -> Upscaler:
        """The upscaling model of that name; the last one is kept. Raises ModelUnreadable, InvalidRequest."""
        row = self._library.find_asset("upscaler", name)
        if row is None:
            raise InvalidRequest(f"upscaler {name!r} {self._library.absence(name)}", field="upscaler")
        key = row.path, row.stamp
        if self._upscaler is None or self._upscaler[0] != key:
            self._upscaler = None
            self._upscaler = key, Upscaler.read(row.path, self._device)
        return self._upscaler[1]

    def checker(self, files: CheckerFiles) -> Checker:
        """The safety checker in these files; the last one is kept while there is room. It is on the device if it fits there
        beside the models, else in RAM. Raises ModelUnreadable, OutOfMemory.
        """
        if self._checker is None or self._checker[0] != files:
            self._checker = None
            self._checker = files, self._read_checker(files)
        return self._checker[1]

    @property
    def occupied(self) -> bool:
        """Whether anything is in memory."""
        return bool(self._held or self._upscaler or self._checker)

    def patch(self, patches: Patches, steps: Mapping[Weight, Sequence[Step]], label: Any) -> None:
        """Attach patches to a model of this job, after models that it does not use have made room in RAM for what they keep.
        Raises what :meth:`Patches.attach` raises.
        """
        if (size := patches.size_with(steps) - patches.size) > 0:
            self._spare(size)
        patches.attach(steps, label)
        self._tell()

    def take(self, measures: Measures) -> None:
        """Have the models of this job work with these measures from now on. Raises what a full device raises."""
        for held in [held for name, held in self._held.items() if name in self._used]:
            self._keep(self._placed(held, measures))

    def free(self) -> None:
        """Let go of all that the job at hand does not use, or can read again."""
        self._checker = None
        for held in [held for name, held in self._held.items() if name not in self._used]:
            self._drop(held)
        self._tell()
        self._device.free()

    def unload(self) -> None:
        """Let go of every model."""
        self._held, self._used, self._upscaler, self._checker = {}, set(), None, None
        self._tell()
        self._device.free()

    def _needed(self, model: Model, request: Request | None, measures: Measures) -> tuple[Measures, int]:
        """The measures that the model needs now, and the bytes it then takes of the device."""
        room = self._device.room_now
        try:
            load = Load(footprint(model), plan(request) if request else ())
        except Unrecognised as error:
            raise ModelUnreadable(f"model {model.name!r} cannot be read: {error}") from error
        found = chosen(load, room)
        if found is None:
            log.warning(
                "model %s may not fit: %s are free on the device, and RAM for %s",
                model.name, shown(room.device), shown(room.host or room.device),
            )  # fmt: skip
            found = strictest(room)
        needed = measures.joined(found)
        if needed != Measures():
            need = shown(load.need(Measures(), room.number).device)
            log.info(
                "model %s needs %s and may use %s: %s",
                model.name, need, shown(room.device), ", ".join(prices(needed)),
            )  # fmt: skip
        return needed, load.need(needed, room.number).device

    def _make_room(self, model: Model, size: int) -> None:
        """Move models away until there is room for one of that size, or none is left to move."""
        for held in [held for held in self._held.values() if held.model != model]:
            held.placed.land()
            if not held.whole or self._on_device(without=model) + size <= self._device.memory.now():
                continue
            if self._device.host is None:
                self._drop(held)
            else:
                self._to_host(held)
            self._device.free()

        if self._aboard and self._on_device(without=model) + size > self._device.memory.now():
            self._checker = None
            self._device.free()

    def _spare(self, size: int) -> None:
        """Drop models that this job does not use until there is RAM for so many bytes."""
        memory = self._device.host or self._device.memory
        others = [held for name, held in self._held.items() if name not in self._used and self._in_ram(held)]
        while others and self._on_host() + size > memory.now():
            self._drop(others.pop(0))
            self._device.free()

    def _to_host(self, held: Held) -> None:
        """Have a model wait in RAM; those that wait there longest make room, and if that is not enough it is dropped."""
        assert self._device.host
        now = self._device.host.now()
        held.lane.patches.detach()
        waiting = [other for other in self._held.values() if not other.whole and other.model.name not in self._used]
        while waiting and held.placed.size <= now < self._on_host() + held.placed.size:
            self._drop(waiting.pop(0))
        if self._on_host() + held.placed.size > now:
            self._drop(held)
            return
        held.placed.put(None)
        self._held[held.model.name] = replace(held, measures=None)
        log.info("model %s waits in RAM", held.model.name)

    def _on_device(self, *, without: Model | None = None) -> int:
        size = sum(held.placed.size for held in self._held.values() if held.whole and held.model != without)
        return self._aboard + (size if self._device.host else size + self._kept())

    def _on_host(self) -> int:
        checker = self._checker[1].size if self._checker and self._checker[1].place == HOST else 0
        return checker + self._kept() + sum(held.placed.size for held in self._held.values() if self._in_ram(held))

    @property
    def _aboard(self) -> int:
        """Bytes that the safety checker has of the device."""
        return self._checker[1].size if self._checker and self._checker[1].place == self._device.place else 0

    def _kept(self) -> int:
        return sum(held.kept for held in self._held.values())

    def _in_ram(self, held: Held) -> bool:
        return self._device.host is None or not held.whole

    def _drop(self, held: Held) -> None:
        held.placed.land()
        del self._held[held.model.name]
        log.info("model %s was dropped from memory", held.model.name)

    def _keep(self, held: Held) -> None:
        """As the one that was used last."""
        self._held.pop(held.model.name, None)
        self._held[held.model.name] = replace(held, used=time.time())
        self._tell()

    def _tell(self) -> None:
        self.report = tuple(
            HeldModel(
                held.model.name,
                "device" if held.whole else "ram",
                held.placed.size + held.kept,
                loaded=held.loaded,
                used=held.used,
            )
            for held in self._held.values()
        )

    def _placed(self, held: Held, measures: Measures) -> Held:
        held.placed.land()  # patches go to the weights themselves, not to a copy on the device
        thrift.set_tiling(thrift.networks(held.lane), measures.tiling)
        if held.measures is None or held.measures.placement is not measures.placement:
            held.placed.put(measures.placement)
        return replace(held, measures=measures)

    def _read(self, model: Model, measures: Measures) -> Held:
        started = time.monotonic()
        whole = measures.placement is Placement.WHOLE
        lane = self._opened(model, replace(self._device, offloads=not whole))
        placed = thrift.Placed(thrift.networks(lane), self._device.place, HOST)
        log.info("loaded model %s (%s) in %.1f s", model.name, model.family, time.monotonic() - started)
        now = time.time()
        return self._placed(Held(model, lane, placed, Measures() if whole else None, now, now), measures)

    def _opened(self, model: Model, device: Device) -> Lane | Painter:
        with self._explaining(f"model {model.name!r}", model.path, model.name, instead="; ask for a smaller one"):
            return self._open(model, device)

    def _read_checker(self, files: CheckerFiles) -> Checker:
        started = time.monotonic()
        with self._explaining(f"safety checker {files.shown}", files.folder, files.shown):
            size, place = size_of(files), self._device.place
            if self._device.host and self._on_device() + size > self._device.memory.now():
                place = HOST
            if place == HOST:
                self._spare(size)
            found = Checker.read(files, place)
        log.info("loaded safety checker %s on %s in %.1f s", files.shown, place, time.monotonic() - started)
        return found

    @contextmanager
    def _explaining(self, what: str, path: Path, shown: str, *, instead: str = "") -> Iterator[None]:
        """Within, files are read. Raises OutOfMemory, and ModelUnreadable for whatever else is wrong with them."""
        try:
            yield
        except Exception as error:  # transformers, diffusers and tokenizers raise anything for a file that is damaged
            if is_out_of_memory(error):
                raise OutOfMemory(f"out of memory while {what} was loaded{instead}") from error
            if self._device.lost(error):
                raise
            raise ModelUnreadable(f"{what} cannot be read: {_reason(error, path, shown)}") from error

    def _open(self, model: Model, device: Device) -> Lane | Painter:
        if is_pipeline(model.family):
            from diffusion_api.engine.families.generic import Generic  # all of diffusers, which takes seconds
            from diffusion_api.engine.unidiffuser import UniDiffuser

            kind = UniDiffuser if model.family == UNIDIFFUSER else Generic
            return kind.from_folder(model.path, device)
        family, schedule = FAMILIES[model.family], model.profile.schedule
        if not model.single_file:
            return family.from_folder(model.path, device, schedule)
        return family.from_checkpoint(model.path, self._tokenizer, device, schedule)


def _reason(error: Exception, path: Path, shown: str) -> str:
    """One line for callers, with no path of the host."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, OSError) and error.filename:
        file = Path(str(error.filename))
        return f"{file.parent.name}/{file.name}: {error.strerror}"
    text = " ".join(str(error).replace(str(path), shown).split())
    return text[:LONGEST_REASON] or type(error).__name__
