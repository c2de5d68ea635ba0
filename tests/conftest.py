"""What many tests share: a running service, a disk that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_models import LORA_KEYS, checkpoint, diffusers_folder
from hypothesis import settings
from serving import Program, serving

settings.register_profile("busy", deadline=None)  # one example may take long on a machine with much to do
settings.load_profile("busy")


@pytest.fixture(scope="session")
def stub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with the stub engine.

    Its models are ``stable-diffusion-v1-5`` (512 pixels, the default) and ``small`` (64 pixels). Its limits are those
    of a fresh installation, except for a body of 1 MiB and prompts of 2,000 characters. It has the LoRA ``style`` and the
    upscaler ``ESRGAN_4x``, a pickle.
    """
    home = tmp_path_factory.mktemp("stub")
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / "stable-diffusion-v1-5")
    diffusers_folder(models / "small", sample_size=8)
    checkpoint(
        home / "stable_diffusion" / "loras" / "style.safetensors",
        LORA_KEYS,
        {"modelspec.trigger_phrase": "ink drawing"},
    )
    (home / "stable_diffusion" / "upscalers").mkdir()
    (home / "stable_diffusion" / "upscalers" / "ESRGAN_4x.pth").write_bytes(bytes(2**20))
    with serving(home, max_body=2**20, max_prompt=2000) as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
