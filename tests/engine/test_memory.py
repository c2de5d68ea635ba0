"""Models within a budget of memory, and what a job does when that is not enough; with the shipped model.

The card is this machine's RAM with figures of its own: what is moved to it is copied, and counted.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import finished, request

from diffusion_api.catalog.library import Library
from diffusion_api.engine import ladder, thrift
from diffusion_api.engine.base import Finished, Pixels
from diffusion_api.engine.devices import Device, Memory
from diffusion_api.engine.executor import Budget, Executor
from diffusion_api.engine.families import base
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.errors import OutOfMemory
from diffusion_api.settings import DATA

MIB = 2**20
SHAPES = DATA / "models" / "shapes"
WEIGHTS = 32_148_820
"""Bytes of the shipped model in float32."""
QUICK: dict[str, object] = dict(steps=3, width=64, height=64, sampler="euler")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@dataclass
class Meter:
    """A memory of some size, of which other programs hold something."""

    total: int
    held: int = 0

    def others(self) -> int:
        return self.held


class OnCard(Executor):
    """The engine on a card of 2 GiB, beside 2 GiB of RAM; a test may change both."""

    card = Meter(2**31)
    ram = Meter(2**31)

    def _chosen(self) -> Device:
        return Device(torch.device("cpu"), torch.float32, Memory(self.card), Memory(self.ram))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnCard]:
    home = tmp_path_factory.mktemp("card")
    for name in ("second", "third"):
        shutil.copytree(SHAPES, home / "models" / name)
    made = OnCard(Library(home, home / "models", DATA / "models"), device="cpu", tokenizer=DATA / "clip")
    made.start()
    made.wait()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def afresh(engine: OnCard) -> Iterator[None]:
    """Nothing is in memory, and the card and RAM are as they were."""
    engine.card, engine.ram = Meter(2**31), Meter(2**31)
    device = engine._device
    assert device
    assert engine._weights
    object.__setattr__(device, "memory", Memory(engine.card))
    object.__setattr__(device, "host", Memory(engine.ram))
    engine._weights.unload()
    return


@pytest.fixture(scope="module")
def picture(engine: OnCard) -> Pixels:
    """As an undisturbed job makes it."""
    return draw(engine).images[0]


def draw(engine: Executor, model: str = "shapes", **changes: object) -> Finished:
    return finished(engine, request(**QUICK | changes, model=model))


def places(engine: Executor) -> dict[str, str]:
    report = engine.report()
    assert report
    return {held.name: held.where for held in report.models}


# Which models stay


def test_models_stay_on_the_card_while_there_is_room(engine: OnCard) -> None:
    for name in ("shapes", "second", "third", "shapes"):
        draw(engine, name)
    assert places(engine) == {"second": "device", "third": "device", "shapes": "device"}


def test_the_one_that_was_used_longest_ago_waits_in_ram_and_makes_the_same_picture_later(
    engine: OnCard, picture: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = counted(monkeypatch, base, "read_text")
    engine.card.total = int(2.5 * WEIGHTS)
    for name in ("shapes", "second", "shapes", "third"):
        draw(engine, name)
    assert places(engine) == {"second": "ram", "shapes": "device", "third": "device"}
    made = draw(engine, "second")
    assert np.array_equal(made.images[0], picture)
    assert made.model_cached
    assert places(engine) == {"shapes": "ram", "third": "device", "second": "device"}
    assert len(read) == 3


def test_what_ram_has_no_room_for_is_dropped_and_read_again(engine: OnCard, picture: Pixels) -> None:
    engine.card.total, engine.ram.total = int(1.5 * WEIGHTS), int(1.5 * WEIGHTS)
    for name in ("shapes", "second", "third"):
        draw(engine, name)
    assert places(engine) == {"second": "ram", "third": "device"}
    engine.ram.total = WEIGHTS // 2
    made = draw(engine)
    assert places(engine) == {"second": "ram", "shapes": "device"}
    assert np.array_equal(made.images[0], picture)
    assert not made.model_cached


def test_free_memory_is_read_again_before_each_load(engine: OnCard) -> None:
    draw(engine)
    engine.card.held = engine.card.total - int(1.5 * WEIGHTS)
    draw(engine, "second")
    assert places(engine) == {"shapes": "ram", "second": "device"}


def test_without_a_card_models_share_the_ram_and_one_is_gone_before_the_next_is_read(engine: OnCard) -> None:
    assert engine._device
    object.__setattr__(engine._device, "memory", Memory(Meter(int(1.5 * WEIGHTS))))
    object.__setattr__(engine._device, "host", None)
    draw(engine)
    assert engine._weights
    before = weakref.ref(engine._weights._held["shapes"].lane.unet)  # type: ignore[attr-defined]
    seen: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = base.read_text
        patch.setattr(base, "read_text", lambda *given: (seen.append(before()), whole(*given))[1])
        draw(engine, "second")
    assert seen == [None]
    assert places(engine) == {"second": "device"}


def test_weights_leave_the_memory_when_nobody_uses_them_and_are_read_again(tmp_path: Path) -> None:
    library = Library(tmp_path, tmp_path / "models", DATA / "models")
    engine = Executor(library, device="cpu", tokenizer=DATA / "clip", budget=Budget(idle=0.2, warm_up=("shapes", "no")))
    engine.start()
    engine.wait()
    first = draw(engine)
    assert first.model_cached, "it was warmed up"
    assert engine._weights
    network = weakref.ref(engine._weights._held["shapes"].lane.unet)  # type: ignore[attr-defined]
    until = time.monotonic() + 30
    while places(engine) and time.monotonic() < until:
        time.sleep(0.05)
    assert places(engine) == {}
    again = draw(engine)
    assert network() is None
    assert not again.model_cached
    assert np.array_equal(first.images[0], again.images[0])
    engine.close()


# What LoRAs keep

INK = "<lora:shapes-ink:1> a red circle"


def kept(engine: OnCard) -> int:
    """Bytes of RAM that hold weights in whose place others stand."""
    assert engine._weights
    return engine._weights._kept()


def test_the_weights_that_a_lora_stands_in_for_count_as_ram_and_waiting_models_make_room(
    engine: OnCard, picture: Pixels
) -> None:
    engine.card.total = int(1.5 * WEIGHTS)
    draw(engine, "second")
    inked = draw(engine, prompt=INK).images[0]
    size = kept(engine)
    assert 0 < size < WEIGHTS
    assert places(engine) == {"second": "ram", "shapes": "device"}
    report = engine.report()
    assert report
    assert [held.size for held in report.models] == [WEIGHTS, WEIGHTS + size]
    draw(engine)
    assert kept(engine) == 0
    engine.ram.total = WEIGHTS + size // 2
    assert np.array_equal(draw(engine, prompt=INK).images[0], inked)
    assert places(engine) == {"shapes": "device"}, "the other one made room"
    assert np.array_equal(draw(engine).images[0], picture)


def test_a_model_that_leaves_the_card_takes_no_copies_with_it(engine: OnCard, picture: Pixels) -> None:
    engine.card.total, engine.ram.total = int(1.5 * WEIGHTS), int(1.1 * WEIGHTS)
    inked = draw(engine, prompt=INK).images[0]
    assert kept(engine) > 0.1 * WEIGHTS
    draw(engine, "second")
    assert kept(engine) == 0
    assert places(engine) == {"shapes": "ram", "second": "device"}, "without the copy it fits"
    made = draw(engine)
    assert made.model_cached
    assert np.array_equal(made.images[0], picture)
    assert np.array_equal(draw(engine, prompt=INK).images[0], inked)


def test_without_a_card_copies_and_models_share_the_ram(engine: OnCard) -> None:
    assert engine._device
    memory = Meter(2**31)
    object.__setattr__(engine._device, "memory", Memory(memory))
    object.__setattr__(engine._device, "host", None)
    draw(engine, prompt=INK)
    size = kept(engine)
    draw(engine, "second")
    assert places(engine) == {"shapes": "device", "second": "device"}
    memory.total = 3 * WEIGHTS + size - MIB
    draw(engine, "third")
    assert places(engine) == {"second": "device", "third": "device"}, (
        f"there were {size} bytes of copies beside the first"
    )


def test_a_model_is_loaded_when_somebody_asks_for_that_and_what_cannot_be_is_said(
    engine: OnCard, picture: Pixels, caplog: pytest.LogCaptureFixture
) -> None:
    with failing(SD1, "from_folder", times=1):
        engine.warm_up("second")
        until = time.monotonic() + 60
        while "model second was not loaded: " not in caplog.text and time.monotonic() < until:
            time.sleep(0.05)
    assert "model second was not loaded: out of memory" in caplog.text
    engine.warm_up("second")
    made = draw(engine, "second")
    assert made.model_cached
    assert np.array_equal(made.images[0], picture)


# What is planned


@pytest.mark.parametrize(
    ("share", "planned"),
    [(1.2, []), (0.9, ["planned: model offload"]), (0.3, ["planned: group offload"])],
)
def test_a_model_that_does_not_fit_whole_is_moved_as_it_is_needed_and_makes_the_same_picture(
    engine: OnCard, picture: Pixels, share: float, planned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    engine._weights.unload()  # type: ignore[union-attr]
    engine.card.total = int(share * WEIGHTS) + 4 * MIB
    with caplog.at_level(logging.INFO), aboard() as most:
        made = draw(engine)
    assert list(made.memory_steps) == planned
    assert np.array_equal(made.images[0], picture)
    assert max(most, default=0) <= engine.card.total
    if planned:
        assert places(engine) == {"shapes": "ram"}
        assert max(most) > 0
        assert "waits until" in caplog.text
    engine.card.total = 2**31
    assert list(draw(engine).memory_steps) == []
    assert places(engine) == {"shapes": "device"}


def test_a_model_moves_between_whole_and_parts_without_a_trace(engine: OnCard, picture: Pixels) -> None:
    for share in (0.9, 1.2, 0.3, 0.9, 1.2):
        engine.card.total = int(share * WEIGHTS) + 4 * MIB
        assert np.array_equal(draw(engine).images[0], picture)


def test_a_picture_that_is_decoded_in_tiles_is_nearly_the_same(engine: OnCard, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    whole = draw(engine, width=160, steps=8, height=128)
    with failing(SD1, "decode", times=2):
        tiled = draw(engine, width=160, steps=8, height=128)
    assert tiled.memory_steps == ("decode: caches freed", "decode: VAE tiling")
    assert 0 < difference(whole.images[0], tiled.images[0]) < 8
    assert np.array_equal(draw(engine, width=160, steps=8, height=128).images[0], whole.images[0])


# The ladder


EVALUATE = ("caches freed", "attention slicing", "one conditioning at a time", "model offload", "group offload")
DECODE = ("caches freed", "VAE tiling", "model offload", "group offload")
LOAD = ("caches freed", "model offload", "group offload")


@pytest.mark.parametrize(
    ("method", "point", "rungs"),
    [
        ("predict", "evaluate", EVALUATE),
        ("decode", "decode", DECODE),
        ("encode", "encode", LOAD),
        ("from_folder", "load", LOAD),
    ],
)
def test_memory_that_runs_out_is_met_step_by_step_until_the_job_fails_with_advice(
    engine: OnCard, picture: Pixels, method: str, point: str, rungs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine._weights.unload()  # type: ignore[union-attr]
    small_tiles(monkeypatch)
    with failing(SD1, method, times=math.inf) as calls, pytest.raises(OutOfMemory) as caught:
        draw(engine, width=72)
    tried = ", ".join(f"{point}: {rung}" for rung in rungs)
    smaller = "one" if point == "load" else "model"
    assert str(caught.value).endswith(f"smaller {smaller} (tried {tried})")
    assert len(calls) == len(rungs) + 1
    assert np.array_equal(draw(engine).images[0], picture)


@pytest.mark.parametrize(
    ("method", "point", "rungs"),
    [("predict", "evaluate", EVALUATE), ("encode", "encode", LOAD), ("from_folder", "load", LOAD)],
)
def test_a_job_goes_on_where_memory_ran_out_and_makes_the_same_picture(
    engine: OnCard, picture: Pixels, method: str, point: str, rungs: tuple[str, ...]
) -> None:
    for failures in range(1, len(rungs) + 1) if method == "predict" else (len(rungs),):
        with failing(SD1, method, times=failures) as calls:
            made = draw(engine)
        assert made.memory_steps == tuple(f"{point}: {rung}" for rung in rungs[:failures])
        assert difference(made.images[0], picture) < 0.01, "one row at a time rounds otherwise"
        if method == "predict":
            alone = 2 if failures >= 3 else 1
            assert len(calls) == failures + 3 * alone, "no step was done twice"


def test_attention_in_slices_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thrift, "QUERIES", 16)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn((2, 3, rows, 8), generator=generator) for rows in (50, 20, 20))
    attend = torch.nn.functional.scaled_dot_product_attention
    masks = [None, torch.ones(2, 3, 1, 20, dtype=torch.bool), torch.ones(2, 3, 50, 20).tril().bool()]
    for mask in masks:
        whole = attend(query, key, value, attn_mask=mask)
        with thrift.SlicedAttention():
            sliced = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert torch.allclose(whole, sliced, atol=1e-6)
    causal = attend(query[:, :, :20], key, value, is_causal=True)
    with thrift.SlicedAttention():
        assert torch.equal(causal, attend(query[:, :, :20], key, value, is_causal=True))


# Tools


def difference(one: Pixels, other: Pixels) -> float:
    """The mean difference of two pictures, in levels of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def counted(monkeypatch: pytest.MonkeyPatch, module: object, function: str) -> list[object]:
    calls: list[object] = []
    whole = getattr(module, function)

    def call(*given: Any, **options: Any) -> Any:
        calls.append(given)
        return whole(*given, **options)

    monkeypatch.setattr(module, function, call)
    return calls


class failing:
    """Within, the first so many calls of a method run out of memory."""

    def __init__(self, kind: type, method: str, *, times: float) -> None:
        self._kind, self._method, self._times = kind, method, times
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> list[object]:
        calls: list[object] = []
        whole = getattr(self._kind, self._method)

        def call(*given: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) <= self._times:
                raise FULL
            return whole(*given, **options)

        self._patch.setattr(self._kind, self._method, call)
        return calls

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


class aboard:
    """Within, the bytes of copies on the card, whenever some are brought."""

    def __enter__(self) -> list[int]:
        found: list[int] = []
        loaded: dict[int, int] = {}
        bring, land = thrift._Cargo.bring, thrift._Cargo.land

        def brought(cargo: Any) -> None:
            bring(cargo)
            loaded[id(cargo)] = sum(tensor.nbytes for tensor, _ in cargo._waiting)
            found.append(sum(loaded.values()))

        def landed(cargo: Any) -> None:
            land(cargo)
            loaded.pop(id(cargo), None)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(thrift._Cargo, "bring", brought)
        self._patch.setattr(thrift._Cargo, "land", landed)
        return found

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "TILE", 64)
    monkeypatch.setattr(thrift, "TILE", 64)
