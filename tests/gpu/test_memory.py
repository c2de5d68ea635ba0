"""Models of real size, with random weights, on a card that is capped. What is measured is printed (``pytest -s``)."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import full_size
import numpy as np
import psutil
import pytest
import torch
from asking import finished, request

from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import Finished
from diffusion_api.engine.executor import Budget, Executor
from diffusion_api.schema.request import Txt2Img
from diffusion_api.settings import DATA

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]

GIB = 2**30
NEEDS = {"sd15": (8, 8), "sdxl": (16, 16), "flux": (40, 64)}
"""GiB of the card and of RAM that it takes to build a model, and to draw with all of it for comparison."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of Stable Diffusion 1.5's size; tests add others."""
    home = tmp_path_factory.mktemp("home")
    full_size.stable_diffusion(home / "models" / "sd15", "sd15", "cuda")
    shutil.copytree(home / "models" / "sd15", home / "models" / "other")
    return home


@pytest.fixture(scope="module")
def sdxl(home: Path) -> Iterator[str]:
    """A model of SDXL's size, 7 GB on the disk."""
    _room_for("sdxl")
    folder = full_size.stable_diffusion(home / "models" / "sdxl", "sdxl", "cuda")
    yield folder.name
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def flux(home: Path) -> Iterator[str]:
    """A model of FLUX.1's size, 34 GB on the disk."""
    _room_for("flux")
    folder = full_size.flux(home / "models" / "flux", "cuda")
    yield folder.name
    shutil.rmtree(folder)


def _room_for(size: str) -> None:
    card, ram = NEEDS[size]
    if torch.cuda.mem_get_info()[0] < card * GIB or psutil.virtual_memory().available < ram * GIB:
        pytest.skip(f"{size} takes {card} GiB of the card and {ram} GiB of RAM")


@pytest.fixture(autouse=True)
def uncapped() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class Drawn:
    """What a job made, and the most bytes that torch held meanwhile."""

    result: Finished
    peak: int


def engine(home: Path, gib: float | None) -> Executor:
    budget = Budget(max_vram=int(gib * GIB) if gib else None)
    made = Executor(Library(home, home / "models"), device="cuda", tokenizer=DATA / "clip", budget=budget)
    made.start()
    made.wait()
    return made


def close(made: Executor) -> None:
    """End an engine, and leave nothing of it on the card."""
    assert made.close(60)
    assert made._weights
    made._weights.unload()


def drawn(home: Path, gib: float | None, asked: Txt2Img) -> Drawn:
    """What an engine of its own draws on a card of that size; None: all of it."""
    torch.cuda.reset_peak_memory_stats()
    made = engine(home, gib)
    result = finished(made, asked)
    peak = torch.cuda.max_memory_reserved()
    close(made)
    print(
        f"\n{asked.model}, {asked.width}x{asked.height}, {gib or 'no'} GiB: peak {peak / GIB:.2f} GiB, "
        f"{', '.join(result.memory_steps) or 'whole'}"
    )
    assert gib is None or peak <= gib * GIB
    return Drawn(result, peak)


def far(one: Finished, other: Finished) -> float:
    """The mean difference of two pictures, in levels of 255."""
    return float(np.abs(one.images[0].astype(int) - other.images[0].astype(int)).mean())


def alike(one: Finished, other: Finished) -> bool:
    """Tiles may show, and what is computed in another order rounds otherwise."""
    tiled = any("tiling" in step for step in (*one.memory_steps, *other.memory_steps))
    return far(one, other) < (8 if tiled else 0.5)


@pytest.mark.parametrize(("gib", "side"), [(4, 512), (2, 512), (1.2, 512), (4, 1024)])
def test_sd15_draws_on_a_capped_card_what_it_draws_on_a_whole_one(home: Path, gib: float, side: int) -> None:
    asked = request(model="sd15", steps=4, width=side, height=side, sampler="euler")
    capped = drawn(home, gib, asked)
    assert alike(drawn(home, None, asked).result, capped.result)
    if (gib, side) == (4, 512):
        assert not capped.result.memory_steps, "it fits whole"


@pytest.mark.parametrize("gib", [8, 6, 4])
def test_sdxl_draws_on_a_capped_card_what_it_draws_on_a_whole_one(home: Path, sdxl: str, gib: float) -> None:
    asked = request(model=sdxl, steps=4, width=1024, height=1024, sampler="euler")
    capped = drawn(home, gib, asked)
    assert alike(drawn(home, None, asked).result, capped.result)
    if gib == 8:
        assert not any("offload" in step for step in capped.result.memory_steps), "its weights fit whole"


def test_flux_draws_on_a_card_of_24_gib(home: Path, flux: str) -> None:
    asked = request(model=flux, steps=4, width=1024, height=1024, sampler="euler", guidance_scale=3.5)
    capped = drawn(home, 24, asked)
    assert capped.result.images[0].shape == (1024, 1024, 3)
    assert capped.result.images[0].std() > 0
    assert not any("group" in step for step in capped.result.memory_steps), "each network fits alone"


@pytest.mark.parametrize("form", ["fp8", "gguf"])
def test_flux_in_fewer_bits_draws_on_a_card_of_12_gib(home: Path, flux: str, form: str) -> None:
    folder = full_size.smaller(home / "models" / flux, home / "models" / form, form)
    asked = request(model=form, steps=4, width=1024, height=1024, sampler="euler", guidance_scale=3.5)
    capped = drawn(home, 12, asked)
    shutil.rmtree(folder)
    assert capped.result.images[0].shape == (1024, 1024, 3)
    assert capped.result.images[0].std() > 0


def test_a_model_that_waited_in_ram_draws_the_same_bits(home: Path) -> None:
    asked = request(model="sd15", steps=4, width=512, height=512, sampler="euler")
    capped = engine(home, 4)
    before = finished(capped, asked).images[0]
    finished(capped, asked.model_copy(update={"model": "other"}))
    report = capped.report()
    assert report
    assert {held.name: held.where for held in report.models} == {"sd15": "ram", "other": "device"}
    again = finished(capped, asked)
    close(capped)
    assert again.model_cached
    assert np.array_equal(again.images[0], before)


def test_memory_that_runs_out_on_the_card_is_met_and_given_back(home: Path) -> None:
    made = engine(home, 3)
    asked = request(model="sd15", steps=2, width=512, height=512, sampler="euler")
    finished(made, asked)
    before = torch.cuda.memory_allocated()
    hog = torch.empty(GIB // 2, dtype=torch.uint8, device="cuda")  # it was not there when the budget was made
    large = finished(made, asked.model_copy(update={"width": 1024, "height": 1024}))
    print("\n", large.memory_steps)
    del hog
    finished(made, asked)
    after = torch.cuda.memory_allocated()
    close(made)
    assert after <= before * 1.05
