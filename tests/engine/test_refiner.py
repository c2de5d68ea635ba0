"""The model of a pass changes midway: small random models of SDXL's kind, against a loop written by hand."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from asking import finished, from_picture, request
from PIL import Image

from diffusion_api.catalog.library import Library
from diffusion_api.engine import devices, executor
from diffusion_api.engine.devices import Device, Memory
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.families.sdxl import SDXL, SDXLRefiner
from diffusion_api.engine.noise import streams
from diffusion_api.engine.pixels import to_pixels
from diffusion_api.engine.plan import plan
from diffusion_api.engine.samplers.sigmas import spacing
from diffusion_api.schema.request import Hires, Refiner, Txt2Img
from diffusion_api.settings import DATA

CPU = devices.choose("cpu")
LARGEST = 1.6
"""Of what both models take together, what each of them does, at most."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    tiny.save(tiny.pipeline("sdxl"), folder / "models" / "xl")
    tiny.save(tiny.pipeline("sdxl-refiner"), folder / "models" / "xl-refiner")
    return folder


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[Executor]:
    pictures = {"grey": Image.new("RGB", (64, 64), (90, 120, 60)), "white": Image.new("L", (64, 64), 255)}
    library = Library(home, home / "models", DATA / "models")
    made = Executor(library, device="cpu", tokenizer=DATA / "clip", picture=pictures.__getitem__)
    made.start()
    made.wait()
    yield made
    made.close()


FIELDS: dict[str, object] = dict(model="xl", steps=5, width=64, height=64, sampler="euler", schedule="default")


def refined(share: float | None, **changes: object) -> Txt2Img:
    return request(
        **FIELDS | {"refiner": share if share is None else Refiner(model="xl-refiner", switch_at=share)} | changes
    )


def test_a_refiner_draws_the_rest_of_the_steps(engine: Executor, home: Path) -> None:
    wanted = refined(0.6, negative_prompt="green")
    (stage,) = plan(wanted)
    base = SDXL.from_folder(home / "models" / "xl", CPU)
    other = SDXLRefiner.from_folder(home / "models" / "xl-refiner", CPU)
    sigmas = spacing(base.levels, "euler", "default", 5)
    noise, _ = streams(stage, base.latent_shape)
    x = noise * sigmas[0]
    with torch.inference_mode():
        for number, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            lane = base if number < 3 else other
            said = lane.encode((wanted.negative_prompt,), negative=True) + lane.encode((wanted.prompt,))
            scaled = (x * (1 / np.sqrt(sigma**2 + 1))).float().expand(2, -1, -1, -1)
            without, with_prompt = lane.predict(scaled, lane.levels.timestep(sigma), said).split(1)
            guided = without + (with_prompt - without) * wanted.guidance_scale
            x = x + guided * (following - sigma)
        theirs = to_pixels(other.decode(x))
    ours = finished(engine, wanted).images[0]
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_refiner_that_never_begins_changes_no_bit_and_an_earlier_one_does(engine: Executor) -> None:
    alone, never, late, early = (finished(engine, refined(share)).images[0] for share in (None, 1, 0.8, 0.2))
    assert np.array_equal(alone, never)
    assert len({picture.tobytes() for picture in (alone, late, early)}) == 3


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_sde", "dpm_adaptive"])
def test_each_kind_of_sampler_goes_on_with_the_refiner(engine: Executor, sampler: str) -> None:
    alone, half = (finished(engine, refined(share, sampler=sampler, steps=4)).images[0] for share in (None, 0.5))
    assert not np.array_equal(alone, half)


def test_any_model_of_the_family_refines_also_the_same_one(engine: Executor) -> None:
    same = refined(None, refiner=Refiner(model="xl", switch_at=0.4))
    assert np.array_equal(finished(engine, same).images[0], finished(engine, refined(None)).images[0])


def test_pictures_of_pictures_are_refined_and_of_two_passes_the_second(engine: Executor) -> None:
    fields = {**FIELDS, "strength": 0.7}
    for mask in (None, {"image": "white", "blur": 0}):
        alone = finished(engine, from_picture("a circle", "grey", mask=mask, **fields)).images[0]
        wanted = from_picture(
            "a circle", "grey", mask=mask, refiner=Refiner(model="xl-refiner", switch_at=0.5), **fields
        )
        assert not np.array_equal(alone, finished(engine, wanted).images[0])
    hires = Hires(
        upscaler="Latent", width=96, height=96, steps=3, strength=0.6, sampler="euler", schedule="default", model="xl",
        prompt="a circle", negative_prompt="",
    )  # fmt: skip
    first, second = plan(refined(0.5, hires=hires))
    assert (first.refiner, second.refiner) == (None, Refiner(model="xl-refiner", switch_at=0.5))
    assert not np.array_equal(*(finished(engine, refined(s, hires=hires)).images[0] for s in (None, 0.5)))


def test_each_picture_of_a_batch_begins_with_the_base_model(engine: Executor) -> None:
    batch = finished(engine, refined(0.5, count=2, sampler="euler_a"))
    alone = finished(engine, refined(0.5, seed=2, sampler="euler_a")).images[0]
    assert np.array_equal(batch.images[1], alone)


def test_the_base_model_makes_room_where_both_do_not_fit(
    engine: Executor, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = finished(engine, refined(0.5)).images[0]
    report = engine.report()
    assert report
    sizes = {held.name: held.size for held in report.models}

    class Small:
        total = int(max(sizes.values()) * LARGEST)

        def others(self) -> int:
            return 0

    assert sum(sizes.values()) > Small.total

    class Cramped(Executor):
        def _chosen(self) -> Device:
            return Device(torch.device("cpu"), torch.float32, Memory(Small()))

    alive: list[int] = []
    lanes: list[weakref.ref[object]] = []
    computed = executor._computed

    def watched(question: object, measures: object) -> object:
        if (lane := getattr(question, "lane", None)) is not None:
            if lane not in [known() for known in lanes]:
                lanes.append(weakref.ref(lane))
            del lane
            gc.collect()
            alive.append(sum(known() is not None for known in lanes))
        return computed(question, measures)  # type: ignore[arg-type]

    cramped = Cramped(Library(home, home / "models", DATA / "models"), device="cpu", tokenizer=DATA / "clip")
    cramped.start()
    cramped.wait()
    monkeypatch.setattr(executor, "_computed", watched)
    made = finished(cramped, refined(0.5)).images[0]
    cramped.close()
    assert np.array_equal(made, plenty)
    assert len(lanes) == 2
    assert set(alive) == {1}
