"""Upscaling models: the shipped one, others that spandrel knows, tiles, and broken files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from asking import events, finished
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from diffusion_api.engine.base import Stop
from diffusion_api.engine.denoise import Asks, Run
from diffusion_api.engine.devices import Device
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.upscalers import MARGIN, TILE, Upscaler, enlarged, tiles
from diffusion_api.errors import Interrupted, ModelUnreadable
from diffusion_api.schema.job import Progress
from diffusion_api.schema.request import Output, Upscale
from diffusion_api.server import DATA

CPU = Device(torch.device("cpu"), torch.float32)
SHIPPED = DATA / "upscalers" / "shapes-2x.safetensors"


@pytest.fixture(scope="module")
def shipped() -> Upscaler:
    return Upscaler.read(SHIPPED, CPU)


def scene(side: int) -> Image.Image:
    """Shapes with slanted and curved edges in colours of the demo models, anti-aliased."""
    large = Image.new("RGB", (side * 4, side * 4), (50, 80, 220))
    pen = ImageDraw.Draw(large)
    pen.ellipse((side * 0.4, side * 0.4, side * 2, side * 2), fill=(220, 40, 40))
    pen.polygon([(side * 2.2, side * 3.6), (side * 3, side * 0.5), (side * 3.8, side * 3.7)], fill=(240, 220, 50))
    pen.rectangle((side * 0.5, side * 2.6, side * 1.7, side * 3.5), outline=(245, 245, 245), width=side // 8)
    return large.resize((side, side), Image.Resampling.LANCZOS)


def driven(asks: Asks, widest: list[int] | None = None) -> Image.Image:
    answer: Any = None
    with torch.inference_mode():
        while True:
            try:
                question = asks.send(answer)
            except StopIteration as end:
                picture: Image.Image = end.value
                return picture
            assert isinstance(question, Run)
            answer = question.work()
            if widest is not None:
                widest.append(max(answer.shape[-2:]))


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float(20 * math.log10(255) - 10 * math.log10(error))


def ignored(share: float) -> None:
    pass


def test_the_shipped_model_beats_lanczos_on_shapes(shipped: Upscaler) -> None:
    truth = scene(192)
    for shrink in (Image.Resampling.BOX, Image.Resampling.BICUBIC):
        small = truth.resize((96, 96), shrink)
        ours = driven(enlarged(small, 192, 192, shipped, ignored))
        assert psnr(ours, truth) > psnr(small.resize((192, 192), Image.Resampling.LANCZOS), truth) + 3


@pytest.mark.parametrize(("width", "height"), [(192, 192), (250, 100), (700, 700), (96, 96), (40, 48)])
def test_the_size_is_the_one_that_was_asked_for(shipped: Upscaler, width: int, height: int) -> None:
    shares: list[float] = []
    assert driven(enlarged(scene(96), width, height, shipped, shares.append)).size == (width, height)
    assert shares == sorted(shares)
    assert not shares or shares[-1] == 1


def test_tiles_cover_a_picture_once_and_show_no_seam(shipped: Upscaler) -> None:
    picture = scene(2 * TILE + 40)
    widest: list[int] = []
    tiled = driven(enlarged(picture, picture.width * 2, picture.height * 2, shipped, ignored), widest)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
        whole = shipped.enlarged(pixels)[0].permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
    assert np.abs(np.asarray(tiled).astype(int) - whole).max() <= 1
    assert len(widest) == 9
    assert max(widest) == 2 * (TILE + 2 * MARGIN)
    size = picture.width * 3 // 2, picture.height * 5 // 3
    between = driven(enlarged(picture, *size, shipped, ignored))
    reference = Image.fromarray(whole).resize(size, Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(between).astype(int) - np.asarray(reference))
    assert difference.max() <= 4  # a level of the model's, sharpened twice
    assert difference.mean() < 0.05


def test_every_pixel_belongs_to_one_tile() -> None:
    count = np.zeros((50, 101), int)
    for tile in tiles(101, 50, side=16, margin=5):
        count[tile.place] += 1
        for seen, place in zip(tile.seen, tile.place, strict=True):
            assert seen.start <= place.start < place.stop <= seen.stop
    assert (count == 1).all()


@pytest.mark.parametrize("name", zoo.UPSCALERS)
def test_both_layouts_of_esrgan_load(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"4x_{name}"
    zoo.UPSCALERS[name](path)
    upscaler = Upscaler.read(path, CPU)
    assert upscaler.scale == 4
    assert driven(enlarged(scene(24), 96, 96, upscaler, ignored)).size == (96, 96)


def test_broken_files_are_told_by_name_and_reason(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("code ran",)

    (tmp_path / "page.pth").write_text("<!doctype html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save(Evil(), tmp_path / "evil.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "unknown.pth")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    for name, reason in (
        ("page.pth", "damaged"), ("empty.safetensors", "damaged"), ("evil.pth", "damaged"),
        ("unknown.pth", "no kind that is known"), ("cut.safetensors", "unfinished download"),
    ):  # fmt: skip
        with pytest.raises(ModelUnreadable, match=name.split(".")[0]) as error:
            Upscaler.read(tmp_path / name, CPU)
        assert reason in str(error.value)
        assert str(tmp_path) not in str(error.value)


def test_no_code_of_a_pickle_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("code ran",)

    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(ModelUnreadable):
        Upscaler.read(tmp_path / "evil.pth", CPU)
    assert "code ran" not in capfd.readouterr().out


# Jobs that only upscale


def upscale(upscaler: str, width: int, height: int) -> Upscale:
    return Upscale(image="scene", upscaler=upscaler, width=width, height=height, output=Output())


@pytest.mark.parametrize("upscaler", ["None", "Lanczos", "Nearest", "shapes-2x"])
@pytest.mark.parametrize(("width", "height"), [(96, 96), (100, 37), (24, 24)])
def test_a_job_of_its_own_makes_any_size(
    executor: Executor, pictures: dict[str, Image.Image], upscaler: str, width: int, height: int
) -> None:
    pictures["scene"] = scene(48)
    made = finished(executor, upscale(upscaler, width, height))
    assert made.images[0].shape == (height, width, 3)
    assert made.seeds == (None,)
    assert np.abs(made.images[0].mean((0, 1)) - np.asarray(pictures["scene"]).mean((0, 1))).max() < 4


def test_such_a_job_tells_how_far_it_is_and_may_be_stopped_between_two_tiles(
    executor: Executor, pictures: dict[str, Image.Image]
) -> None:
    pictures["scene"] = scene(2 * TILE)
    told = [
        event for event in events(executor, upscale("shapes-2x", 4 * TILE, 4 * TILE)) if isinstance(event, Progress)
    ]
    assert [event.fraction for event in told if event.phase == "upscaling"] == [0, 0.25, 0.5, 0.75, 1, 1]
    looks = iter([None] * 6)
    with pytest.raises(Interrupted):
        list(executor.run(upscale("shapes-2x", 4 * TILE, 4 * TILE), stop=lambda: next(looks, Stop.NOW)))


def test_a_transparent_picture_is_enlarged_on_white(executor: Executor, pictures: dict[str, Image.Image]) -> None:
    pictures["scene"] = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert finished(executor, upscale("shapes-2x", 16, 16)).images[0].min() > 240
    assert finished(executor, upscale("Nearest", 16, 16)).images[0].min() == 255
