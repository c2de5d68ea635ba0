"""Which device the engine runs on, what it is called, how much memory is in use, and what its errors mean."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffusion_api.errors import DeviceUnusable
from diffusion_api.schema.report import DeviceReport

MIB = 2**20

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


@dataclass(frozen=True)
class Device:
    """Where tensors live, and the dtype that models are loaded in."""

    place: torch.device
    dtype: torch.dtype

    @property
    def memory_mb(self) -> float:
        """Memory in use, MiB: allocated on a GPU, resident in the process on a CPU."""
        if self.place.type == "cuda":
            return torch.cuda.memory_allocated(self.place) / MIB
        return float(psutil.Process().memory_info().rss) / MIB

    def free(self) -> None:
        """Give back what nothing uses any more."""
        gc.collect()
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
        if self.place.type == "cuda":
            name = torch.cuda.get_device_name(self.place)
            facts: dict[str, bool | int | float | str] = {
                "cuda_available": True,
                "cuda_version": torch.version.cuda or torch.version.hip or "",
                "gpu_count": torch.cuda.device_count(),
                "current_device": torch.cuda.current_device(),
                "device_name": name,
                "memory_allocated_gb": round(torch.cuda.memory_allocated(self.place) / 2**30, 2),
                "memory_reserved_gb": round(torch.cuda.memory_reserved(self.place) / 2**30, 2),
            }
            return DeviceReport(name, "cuda", facts)
        if self.place.type == "mps":
            return DeviceReport("Apple Silicon GPU", "mps", {"mps_available": True, "device_name": "Apple Silicon GPU"})
        return DeviceReport("CPU", "cpu", {"cuda_available": False, "mps_available": False, "device_name": "CPU"})


def choose(wanted: str) -> Device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises DeviceUnusable for a GPU that was asked for or is in the box and cannot be used: a silent run on the CPU would be
    a hundred times slower and nobody would know why.
    """
    cuda = torch.cuda.is_available()
    if wanted == "cuda" or (wanted == "auto" and (cuda or gpu_nodes())):
        if not cuda:
            raise DeviceUnusable(diagnosis(torch.version.cuda or torch.version.hip, gpu_nodes()))
        return Device(torch.device("cuda"), torch.float16)
    mps = torch.backends.mps.is_available()
    if wanted == "mps" or (wanted == "auto" and mps):
        if not mps:
            raise DeviceUnusable(
                "device mps was asked for, and this torch finds no Apple GPU; set DIFFUSION_API_DEVICE=cpu"
            )
        return Device(torch.device("mps"), torch.float32)
    return Device(torch.device("cpu"), torch.float32)


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
