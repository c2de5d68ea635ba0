"""What a job needs of memory, and what is done so that it fits. Pure, torch-free.

The same arithmetic answers at the door (can this ever fit?), plans a job's start, and orders what is tried when memory
runs out all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import reduce

from diffusion_api.catalog.footprint import DENOISERS, Footprint, footprint
from diffusion_api.catalog.library import Model
from diffusion_api.engine.plan import Pass, plan
from diffusion_api.errors import OutOfMemory
from diffusion_api.prompt import parse
from diffusion_api.schema.report import Room
from diffusion_api.schema.request import Request

GIB = 2**30

TILE = 512
"""Side in pixels of the tiles that a picture is decoded in, when it is not decoded whole."""

PIECES = 32
"""A network that is moved in pieces: each is at most this part of it, or one tensor if that is larger."""

HALF = 2
"""Bytes of a weight where no device is known yet."""

WORKSPACE = 1.25
"""What libraries take beside the numbers that the layers must hold; planned for, and never a reason to refuse a job."""


class Placement(IntEnum):
    """How much of a model is on the device at a time; the rest waits in RAM."""

    WHOLE = 0
    PARTS = 1
    """One network."""
    PIECES = 2
    """A few layers of one network."""


@dataclass(frozen=True)
class Measures:
    """What is done so that a job fits: the picture decoded in tiles, attention in slices, one conditioning at a time."""

    tiling: bool = False
    slicing: bool = False
    singly: bool = False
    placement: Placement = Placement.WHOLE

    @property
    def names(self) -> tuple[str, ...]:
        """The rungs that lead here."""
        return tuple(rung.name for rung in RUNGS if rung.within(self))

    def joined(self, others: Measures) -> Measures:
        """All of both."""
        return Measures(
            self.tiling or others.tiling,
            self.slicing or others.slicing,
            self.singly or others.singly,
            max(self.placement, others.placement),
        )


@dataclass(frozen=True)
class Rung:
    """One more measure, and its price."""

    name: str
    price: str
    measure: Measures

    def within(self, measures: Measures) -> bool:
        """Whether the measures have this one; of the offloads the one that is in force."""
        placement = self.measure.placement
        return self.measure.joined(measures) == measures and placement in (Placement.WHOLE, measures.placement)


RUNGS = (
    Rung("VAE tiling", "seams may be seen", Measures(tiling=True)),
    Rung("attention slicing", "steps take a little longer", Measures(slicing=True)),
    Rung("one conditioning at a time", "steps take up to twice as long", Measures(singly=True)),
    Rung(
        "model offload", "each picture waits until its networks are moved, seconds", Measures(placement=Placement.PARTS)
    ),
    Rung(
        "group offload",
        "each step waits until the model is moved, several times as long",
        Measures(placement=Placement.PIECES),
    ),
)
"""What is tried, in this order."""


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a job: weights and activations on the device, and weights that wait in RAM."""

    weights: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class Load:
    """One job's demands on one model."""

    footprint: Footprint
    passes: tuple[Pass, ...]

    def need(self, measures: Measures, number: int) -> Need:
        """The bytes at the stage that needs most, ``number`` for each weight."""
        resident = {part: self._resident(part, measures.placement) for part in self.footprint.parts}
        everything = sum(self.footprint.parts.values())
        stages = []
        for part, own in resident.items():
            weights = own if measures.placement else everything
            stages.append(Need(weights * number, int(self._activations(part, measures)) * number, 0))
        worst = max(stages, key=lambda need: need.device, default=Need(0, 0, 0))
        return replace(worst, host=everything * number if measures.placement else 0)

    def _resident(self, part: str, placement: Placement) -> int:
        size = self.footprint.parts[part]
        return max(size // PIECES, self.footprint.largest[part]) if placement is Placement.PIECES else size

    def _activations(self, part: str, measures: Measures) -> float:
        if part in DENOISERS:
            return max((self._evaluated(p, measures) for p in self.passes), default=0)
        if part == "vae":
            return max((self._decoded(p, measures) for p in self.passes), default=0)
        return 0

    def _evaluated(self, stage: Pass, measures: Measures) -> float:
        rows = 1 if measures.singly else rows_of(stage)
        return self.footprint.latent * rows * (stage.width // 8) * (stage.height // 8)

    def _decoded(self, stage: Pass, measures: Measures) -> float:
        whole = stage.width * stage.height
        tile = min(stage.width, TILE) * min(stage.height, TILE)
        # Tiled, the picture itself is still there, in tiles and once more put together: three channels each.
        return self.footprint.pixel * tile + 6 * whole if measures.tiling else self.footprint.pixel * whole


def rows_of(stage: Pass) -> int:
    """Conditionings of one evaluation: the prompts that AND joins, and the negative one if it counts."""
    return len(parse(stage.prompt).parts) + (stage.guidance_scale != 1)


def chosen(load: Load, room: Room, *, workspace: float = WORKSPACE) -> Measures | None:
    """The measures, in order and no more than it takes, with which a job fits; None when none help enough."""

    def fits(taken: Sequence[Rung]) -> bool:
        return _fits(load.need(_joined(taken), room.number), room, workspace)

    taken: list[Rung] = []
    while not fits(taken):
        need = load.need(_joined(taken), room.number).device
        found = (rung for rung in rungs(room) if load.need(_joined([*taken, rung]), room.number).device < need)
        if (better := next(found, None)) is None:
            return None
        taken.append(better)
    for rung in list(taken):  # what a later one made superfluous
        fewer = [other for other in taken if other is not rung]
        taken = fewer if fits(fewer) else taken
    return _joined(taken)


def _joined(taken: Iterable[Rung]) -> Measures:
    return reduce(Measures.joined, (rung.measure for rung in taken), Measures())


def rungs(room: Room) -> tuple[Rung, ...]:
    """Those that the device has: only from memory of its own can models be moved."""
    return tuple(rung for rung in RUNGS if room.host is not None or not rung.measure.placement)


def _fits(need: Need, room: Room, workspace: float) -> bool:
    return need.weights + need.activations * workspace <= room.device and need.host <= (room.host or 0)


def strictest(room: Room) -> Measures:
    """Everything that can be done there."""
    return _joined(rungs(room))


@dataclass(frozen=True)
class Estimate:
    """What a job will do and take: its passes, and with which measures. ``number`` is the bytes of one weight; ``room`` is None
    where no device is known.
    """

    model: Model
    passes: tuple[Pass, ...]
    footprint: Footprint
    measures: Measures
    need: Need
    room: Room | None
    number: int

    @property
    def evaluations(self) -> int:
        """Model evaluations, each of all conditionings."""
        return sum(each.evaluations for each in self.passes)


def estimate(model: Model, request: Request, room: Room | None) -> Estimate:
    """The estimate of a job on a device. Raises OutOfMemory for one that cannot fit; Unrecognised for a damaged model."""
    load = Load(footprint(model), plan(request))
    measures = Measures()
    if room:
        if chosen(load, room, workspace=1) is None:
            raise OutOfMemory(_refusal(model, request, room))
        measures = chosen(load, room) or strictest(room)
    number = room.number if room else HALF
    return Estimate(model, load.passes, load.footprint, measures, load.need(measures, number), room, number)


def _refusal(model: Model, request: Request, room: Room) -> str:
    """Why a job cannot fit, with everything that can be done, and what would."""
    need = Load(footprint(model), plan(request)).need(strictest(room), room.number)
    done = ", ".join(rung.name for rung in rungs(room))
    beside = "" if room.host is None else f" and {shown(need.host)} of RAM"
    there = "" if room.host is None else f" and {shown(room.host)}"
    return (
        f"{request.width}x{request.height} pixels with model {model.name!r} need {shown(need.device)}{beside}, even with "
        f"{done}; there are {shown(room.device)}{there}: {_instead(model, request, room)}"
    )


def _instead(model: Model, request: Request, room: Room) -> str:
    for share in (step / 16 for step in range(15, 0, -1)):
        width, height = (max(64, int(side * share) // 64 * 64) for side in (request.width, request.height))
        smaller = request.model_copy(update={"width": width, "height": height})
        load = Load(footprint(model), plan(smaller))
        if width * height < request.width * request.height and chosen(load, room, workspace=1) is not None:
            return f"{width}x{height} would fit"
    return "ask for a smaller model"


def prices(measures: Measures) -> Iterable[str]:
    """Each measure with what it costs, for the log."""
    return (f"{rung.name} ({rung.price})" for rung in RUNGS if rung.within(measures))


def shown(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
