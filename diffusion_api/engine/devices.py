"""Which device the engine runs on, what it is called, how much memory is in use, and what its errors mean."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import psutil
import torch

from diffusion_api.errors import DeviceUnusable
from diffusion_api.schema.report import DeviceReport, Room

MIB = 2**20
GIB = 2**30

CARD_RESERVE = GIB // 2
"""Bytes of a card that nothing is planned into: the driver's context, kernels and fragments."""

HOST_RESERVE = 2 * GIB
"""Bytes of RAM that nothing is planned into: the libraries of this process, and the system."""

HOST = torch.device("cpu")

CGROUP = Path("/sys/fs/cgroup")

EXHAUSTED = ("out of memory", "can't allocate memory", "status_alloc_failed")
"""What RuntimeErrors of torch's backends say when memory runs out."""

STICKY = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "hardware stack error",
    "uncorrectable ecc error",
)
"""What CUDA says when it fails every call of the process from then on (CUDA Runtime API, ``cudaError_t``)."""


class Meter(Protocol):
    """Reads how large a memory is, and what of it is not ours. Bytes."""

    @property
    def total(self) -> int:
        """All there is."""

    def others(self) -> int:
        """What other programs hold at this moment, which may change before the next."""


class RamMeter:
    """The machine's RAM, or what the control group of this process may have of it."""

    @cached_property
    def total(self) -> int:
        """All there is."""
        return min(int(psutil.virtual_memory().total), _cgroup("memory.max") or 2**63)

    def others(self) -> int:
        """What is not available, less what is ours."""
        memory = psutil.virtual_memory()
        return max(0, int(memory.total - memory.available) - int(psutil.Process().memory_info().rss))


def _cgroup(name: str) -> int | None:
    """A number of this process's control group (version 2), None where it has no such limit."""
    try:
        return int((CGROUP / name).read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class CardMeter:
    """The memory of a CUDA card."""

    place: torch.device

    @cached_property
    def total(self) -> int:
        """All there is."""
        return int(torch.cuda.mem_get_info(self.place)[1])

    def others(self) -> int:
        """What the driver has given away, less what torch got of it; this process's context counts as another's."""
        free, total = torch.cuda.mem_get_info(self.place)
        return max(0, total - free - torch.cuda.memory_reserved(self.place))


@dataclass(frozen=True)
class Memory:
    """What the models and jobs of this process may use of a memory. ``limit`` is the operator's. Bytes."""

    meter: Meter
    limit: int | None = None
    reserve: int = 0

    @property
    def budget(self) -> int:
        """What they may use when no other program needs it."""
        return min(self.limit or 2**63, self._ours)

    def now(self) -> int:
        """What they may use at this moment."""
        return min(self.budget, max(0, self._ours - self.meter.others()))

    @property
    def _ours(self) -> int:
        total = self.meter.total
        return total - min(self.reserve, total // 4)


def ram(limit: int | None = None) -> Memory:
    """The RAM of this machine."""
    return Memory(RamMeter(), limit, HOST_RESERVE)


@dataclass(frozen=True)
class Device:
    """Where tensors live, and the dtype that models are loaded in.

    ``memory`` is what it has; ``host`` is the RAM beside it, None where they are one. ``offloads``: models are read into
    RAM, from where they go to the device in parts.
    """

    place: torch.device
    dtype: torch.dtype
    memory: Memory = field(default_factory=ram)
    host: Memory | None = None
    offloads: bool = False

    @property
    def home(self) -> torch.device:
        """Where networks are put when they are read."""
        return HOST if self.offloads else self.place

    @property
    def room(self) -> Room:
        """What models and jobs may use when no other program needs it."""
        return Room(self.memory.budget, self.host.budget if self.host else None, self.dtype.itemsize)

    @property
    def room_now(self) -> Room:
        """What they may use at this moment. RAM that others hold counts as ours: it can be had back, a card's cannot."""
        return replace(self.room, device=self.memory.now()) if self.host else self.room

    @property
    def memory_mb(self) -> float:
        """Memory in use, MiB: allocated on a GPU, resident in the process on a CPU."""
        if self.place.type == "cuda":
            return torch.cuda.memory_allocated(self.place) / MIB
        return float(psutil.Process().memory_info().rss) / MIB

    def free(self) -> None:
        """Give back what nothing uses any more."""
        gc.collect()
        _trim()
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
        elif self.place.type == "mps":
            torch.mps.empty_cache()

    def lost(self, error: Exception) -> bool:
        """True when the device fails every call after this error, until the process starts again."""
        return isinstance(error, RuntimeError) and (_says(error, STICKY) or not self._answers())

    def _answers(self) -> bool:
        try:
            torch.ones(1, device=self.place).add(1).item()
        except RuntimeError:
            return False
        return True

    def report(self) -> DeviceReport:
        """The ``gpu`` part of ``GET /health``."""
        facts: dict[str, bool | int | float | str]
        if self.place.type == "cuda":
            name = torch.cuda.get_device_name(self.place)
            facts = {
                "cuda_available": True,
                "cuda_version": torch.version.cuda or torch.version.hip or "",
                "gpu_count": torch.cuda.device_count(),
                "current_device": self.place.index,
                "device_name": name,
                "memory_allocated_gb": round(torch.cuda.memory_allocated(self.place) / 2**30, 2),
                "memory_reserved_gb": round(torch.cuda.memory_reserved(self.place) / 2**30, 2),
            }
            return DeviceReport(name, "cuda", facts, self.room)
        if self.place.type == "mps":
            facts = {"mps_available": True, "device_name": "Apple Silicon GPU"}
            return DeviceReport("Apple Silicon GPU", "mps", facts, self.room)
        facts = {"cuda_available": False, "mps_available": False, "device_name": "CPU"}
        return DeviceReport("CPU", "cpu", facts, self.room)


def choose(wanted: str, *, max_vram: int | None = None, max_ram: int | None = None) -> Device:
    """The device for ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``, with at most so many bytes of its memory and of RAM.

    Raises DeviceUnusable for a GPU that was asked for or is in the box and cannot be used: a silent run on the CPU would be
    a hundred times slower and nobody would know why.
    """
    cuda = torch.cuda.is_available()
    if wanted.startswith("cuda") or (wanted == "auto" and (cuda or gpu_nodes())):
        if not cuda:
            raise DeviceUnusable(diagnosis(torch.version.cuda or torch.version.hip, gpu_nodes()))
        return _card(_place(wanted, torch.cuda.device_count()), max_vram, max_ram)
    mps = torch.backends.mps.is_available()
    if wanted == "mps" or (wanted == "auto" and mps):
        if not mps:
            raise DeviceUnusable(
                "device mps was asked for, and this torch finds no Apple GPU; set DIFFUSION_API_DEVICE=cpu"
            )
        return Device(torch.device("mps"), torch.float32, ram(max_ram))
    return Device(torch.device("cpu"), torch.float32, ram(max_ram))


def _place(wanted: str, count: int) -> torch.device:
    """The card with that number among ``count``; the first where none was named. Raises DeviceUnusable."""
    _, _, number = wanted.partition(":")
    index = int(number or 0)
    if index >= count:
        choices = ", ".join(f"cuda:{each}" for each in range(count))
        raise DeviceUnusable(f"device {wanted} was asked for; torch finds {choices}")
    return torch.device("cuda", index)


def _card(place: torch.device, max_vram: int | None, max_ram: int | None) -> Device:
    """A CUDA card; beyond ``max_vram`` torch itself says that memory has run out, so that other programs keep theirs."""
    torch.cuda.set_device(place)  # for what libraries put on "the" card
    meter = CardMeter(place)
    if max_vram:
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_vram / meter.total), place)
    return Device(place, torch.float16, Memory(meter, max_vram, CARD_RESERVE), ram(max_ram))


def _trim() -> None:
    """Have the C library give freed memory back to the system: glibc keeps it in pieces, some 30 KB for each model that was
    loaded and dropped, and a service loads thousands.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch, its backends and the system raise when memory runs out, also where a library hid it."""
    return _is_exhaustion(error) or (error.__context__ is not None and is_out_of_memory(error.__context__))


def _is_exhaustion(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or _says(error, EXHAUSTED)
    return isinstance(error, MemoryError)


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(part in text for part in words)


def gpu_nodes(root: Path = Path("/dev")) -> list[str]:
    """Names of the device nodes that NVIDIA's and AMD's compute drivers make."""
    nodes: Iterable[Path] = (*root.glob("nvidia[0-9]*"), *root.glob("kfd"))
    return sorted(node.name for node in nodes)


def diagnosis(torch_build: str | None, nodes: list[str]) -> str:
    """What is wrong with the GPU, and what to type."""
    found = "no GPU device node is present under /dev, so torch finds no GPU"
    if nodes:
        found = f"a GPU is present ({', '.join(nodes)}), but torch cannot use it"
    if not torch_build:
        fix = "torch is a CPU build: run `make clean setup TORCH=cu126` (or the backend of your card)"
    elif nodes:
        fix = (
            f"torch was built for {torch_build} and cannot open it: update the driver (`nvidia-smi` must work), check that "
            "this user may open the device, or install another build with `make clean setup TORCH=cu126`"
        )
    else:
        fix = "load the driver (`nvidia-smi` must work); in a container, pass the GPU through"
    return f"{found}; {fix}. To run on the CPU on purpose: DIFFUSION_API_DEVICE=cpu"
