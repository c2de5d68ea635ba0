"""A GPU that is there but cannot be used is told with its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_api.engine import devices
from diffusion_api.errors import DeviceUnusable


def test_the_drivers_device_nodes_are_found(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "kfd", "sda", "nvidia-caps"):
        (tmp_path / name).touch()
    assert devices.gpu_nodes(tmp_path) == ["kfd", "nvidia0", "nvidia1"]


def test_a_cpu_build_of_torch_beside_a_gpu_names_the_command_that_mends_it() -> None:
    text = devices.diagnosis(None, ["nvidia0"])
    assert "nvidia0" in text
    assert "make clean setup TORCH=" in text
    assert "DIFFUSION_API_DEVICE=cpu" in text


def test_a_driver_that_is_too_old_is_told() -> None:
    assert "nvidia-smi" in devices.diagnosis("12.6", ["nvidia0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that works")
def test_cuda_that_was_asked_for_and_is_not_there_is_refused_not_replaced() -> None:
    with pytest.raises(DeviceUnusable, match="no GPU device node"):
        devices.choose("cuda")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_cpu_is_found_and_counts_in_float32() -> None:
    device = devices.choose("auto")
    assert (device.place.type, device.dtype) == ("cpu", torch.float32)


def test_the_cpu_can_be_asked_for() -> None:
    device = devices.choose("cpu")
    assert device.report().facts == {"cuda_available": False, "mps_available": False, "device_name": "CPU"}
    assert device.memory_mb > 10


def test_one_card_of_several_can_be_asked_for() -> None:
    assert [devices._place(name, 2).index for name in ("auto", "cuda", "cuda:0", "cuda:1")] == [0, 0, 0, 1]
    with pytest.raises(DeviceUnusable, match="device cuda:2 was asked for; torch finds cuda:0, cuda:1"):
        devices._place("cuda:2", 2)
