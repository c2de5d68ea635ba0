"""What holds for every kind of job alike: words, pictures, masks and second passes; with the shipped model, small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import events, finished, from_picture, request
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from diffusion_api.catalog import library
from diffusion_api.engine import pixels
from diffusion_api.engine.base import Pixels, Preview
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.errors import NotFinite
from diffusion_api.schema.request import Hires, Sampling
from diffusion_api.settings import DATA

PROMPT = "a large red circle on a blue background"
QUICK: dict[str, object] = dict(steps=4, width=64, height=64)


def words(**changes: Any) -> Sampling:
    return request(changes.pop("prompt", PROMPT), **QUICK | changes)


def picture(**changes: Any) -> Sampling:
    return from_picture(changes.pop("prompt", PROMPT), "disc", **QUICK | changes)


def mask(changes: dict[str, object], **of: object) -> Sampling:
    return picture(**{"mask": {"image": "half", "blur": 2, **of}} | changes)


def hires(changes: dict[str, Any], upscaler: str) -> Sampling:
    second = Hires(
        upscaler=upscaler, width=96, height=96, steps=3, strength=0.6, sampler=changes.get("sampler", "euler"),
        schedule="default", model="shapes", prompt=changes.get("prompt", PROMPT), negative_prompt="",
    )  # fmt: skip
    return words(**{"hires": second} | changes)


KINDS: dict[str, Callable[..., Sampling]] = {
    "txt2img": words,
    "img2img": picture,
    "inpaint": lambda **changes: mask(changes),
    "only masked": lambda **changes: mask(changes, only_masked=True, fill="latent noise"),
    "hires, latent": lambda **changes: hires(changes, "Latent"),
    "hires, picture": lambda **changes: hires(changes, "Lanczos"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def brought(pictures: dict[str, Image.Image]) -> None:
    """A disc that goes on at the opposite edge, and the mask of a half."""
    pictures["disc"] = Image.new("RGB", (64, 64), (50, 80, 220))
    for left in (-20, 44):
        ImageDraw.Draw(pictures["disc"]).ellipse((left, 12, left + 40, 52), fill=(220, 40, 40))
    pictures["half"] = Image.new("L", (64, 64))
    ImageDraw.Draw(pictures["half"]).rectangle((32, 0, 63, 63), fill=255)


@pytest.fixture
def draw(executor: Executor) -> Callable[[Sampling], Pixels]:
    return lambda asked: finished(executor, asked).images[0]


@every_kind
def test_each_picture_of_a_batch_is_what_its_seed_gives_alone(executor: Executor, kind: str) -> None:
    batch = finished(executor, KINDS[kind](count=3, sampler="euler_a", seed=5))
    assert batch.seeds == (5, 6, 7)
    alone = finished(executor, KINDS[kind](sampler="euler_a", seed=7)).images[0]
    assert np.array_equal(batch.images[2], alone)
    assert not np.array_equal(batch.images[1], alone)


def test_the_picture_that_a_batch_begins_with_is_encoded_once(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = SD1.latents_of, []

    def counted(lane: SD1, values: torch.Tensor) -> torch.Tensor:
        calls.append(values.shape)
        return own(lane, values)

    monkeypatch.setattr(SD1, "latents_of", counted)
    finished(executor, KINDS["inpaint"](count=3))
    assert len(calls) == 1


OPTIONS: dict[str, object] = {
    "clip_skip": 2,
    "eta": 0.3,
    "variation_seed": 9,
    "vae": "dim",
    "prompt": f"{PROMPT} <lora:shapes-ink:1>",
}


@pytest.fixture(scope="module")
def dim(models_dir: Path) -> None:
    """A VAE that is installed beside the model's own and draws with less contrast."""
    tensors = load_file(DATA / "models" / "shapes" / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_out.weight"] *= 0.5
    folder = models_dir.parent / "stable_diffusion" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "dim.safetensors")


@every_kind
def test_every_option_works_in_every_kind(
    executor: Executor, kind: str, dim: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FRESH", 0.0)
    drawn = {}
    for option, value in {"": None, **OPTIONS}.items():
        changes: dict[str, object] = {option: value} if option else {}
        if option == "variation_seed":
            changes["variation_strength"] = 0.5
        made = finished(executor, KINDS[kind](steps=3, sampler="euler_a", **changes))
        assert made.warnings == ()
        drawn[option] = made.images[0].tobytes()
    assert len(set(drawn.values())) == len(drawn)


def seam(picture: Pixels) -> float:
    """How much the picture changes from one edge to the other, of what it changes most from one column to the next."""
    values = picture.astype(float)
    inside = np.abs(np.diff(values, axis=1)).mean((0, 2)).max()
    return float(np.abs(values[:, 0] - values[:, -1]).mean() / inside)


@every_kind
def test_pictures_that_tile_have_no_seam_and_leave_nothing_behind(
    draw: Callable[[Sampling], Pixels], kind: str
) -> None:
    asked = KINDS[kind](steps=8, sampler="euler")
    before = draw(asked)
    tiled = draw(asked.model_copy(update={"tiling": True}))
    assert np.array_equal(draw(asked), before)
    assert not np.array_equal(tiled, before)
    if getattr(asked, "mask", None) is None:  # what a mask keeps meets what is drawn
        assert seam(tiled) < 0.4 < seam(before)


def fitted(large: Pixels, small: Pixels) -> NDArray[np.float64]:
    """A picture in the size of another one."""
    return np.asarray(Image.fromarray(large).resize(small.shape[1::-1], Image.Resampling.BOX)).astype(float)


@every_kind
def test_previews_come_when_they_are_asked_for_and_end_up_like_the_picture(executor: Executor, kind: str) -> None:
    asked = KINDS[kind](steps=6)
    told = events(executor, asked.model_copy(update={"preview_every": 1}))
    shown = [event.image for event in told if isinstance(event, Preview)]
    made, without = told[-1].images[0], events(executor, asked)  # type: ignore[union-attr]
    assert len(shown) >= 5
    assert np.array_equal(made, without[-1].images[0])  # type: ignore[union-attr]
    assert not any(isinstance(event, Preview) for event in without)
    if kind != "only masked":  # where it shows a part of the picture
        last, first = (np.abs(image - fitted(made, image)).mean() for image in (shown[-1], shown[0]))
        assert last < 8
        assert last < first


def test_a_preview_is_small_however_large_the_picture(executor: Executor) -> None:
    told = events(executor, request(PROMPT, steps=1, width=512, height=256, sampler="euler", preview_every=1))
    (shown,) = [event.image for event in told if isinstance(event, Preview)]
    assert shown.shape == (128, 256, 3)


@every_kind
def test_numbers_that_overflow_are_an_error_in_every_kind(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(SD1, "predict", lambda lane, latents, *rest: latents * float("nan"))
    with pytest.raises(NotFinite, match="overflowed"):
        finished(executor, KINDS[kind]())


@pytest.mark.parametrize("kind", ["img2img", "hires, picture"])
def test_a_picture_that_overflows_in_the_encoder_is_read_again_in_float32(
    draw: Callable[[Sampling], Pixels], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    before, own, calls = draw(KINDS[kind]()), SD1._read, []

    def once(lane: SD1, values: torch.Tensor) -> torch.Tensor:
        calls.append(lane.vae.dtype)
        return own(lane, values) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr(SD1, "_read", once)
    assert np.array_equal(draw(KINDS[kind]()), before)
    assert len(calls) == 2


def test_the_picture_between_two_passes_is_decoded_again_in_float32_and_the_job_says_so(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = SD1.decode, []

    def once(lane: SD1, latents: torch.Tensor, **options: bool) -> torch.Tensor:
        calls.append(options)
        return own(lane, latents, **options) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr(SD1, "decode", once)
    assert finished(executor, KINDS["hires, picture"]()).warnings == (pixels.DECODED_AGAIN,)
    assert calls == [{}, {"precise": True}, {}]
