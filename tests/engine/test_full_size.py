"""Single files as large as the published ones, on the CPU: they are listed, read and drawn with."""

from __future__ import annotations

from pathlib import Path

import full_size
import numpy as np
import psutil
import pytest
from asking import finished, request
from ldm_layout import write_checkpoint

from diffusion_api.catalog.library import Library
from diffusion_api.engine.executor import Executor
from diffusion_api.settings import DATA


@pytest.mark.chaos
@pytest.mark.parametrize(("size", "family", "side", "gib"), [("sd15", "sd1", 512, 6), ("sdxl", "sdxl", 1024, 22)])
def test_a_single_file_of_full_size_draws(tmp_path: Path, size: str, family: str, side: int, gib: int) -> None:
    if psutil.virtual_memory().available < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of memory")
    models = tmp_path / "models"
    models.mkdir()
    folder = full_size.stable_diffusion(tmp_path / size, size, "cpu")
    write_checkpoint(folder, DATA / "clip" / "vocab.json", models / f"{size}.safetensors", family)
    library = Library(tmp_path, models, None)
    assert [(m.name, m.family, m.default_size) for m in library.models()] == [(size, family, (side, side))]
    engine = Executor(library, device="cpu", tokenizer=DATA / "clip")
    engine.start()
    engine.wait()
    done = finished(engine, request("a castle", model=size, steps=2, width=256, height=256))
    engine.close()
    assert done.images[0].shape == (256, 256, 3)
    assert np.std(done.images[0]) > 1
    assert done.warnings == ()
