"""Passes after the first, and those that begin with a picture, by what they draw."""

from __future__ import annotations

import numpy as np
import pytest
from asking import Draw, events, finished, from_picture, hires, request
from PIL import Image, ImageDraw
from semantics import asked, seen

from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.engine.base import Finished, Pixels
from diffusion_api.engine.executor import Executor
from diffusion_api.schema.job import Progress
from diffusion_api.schema.request import Mask

PROMPT = "a large red circle on a blue background"


def close(one: Pixels, other: Pixels) -> float:
    """Mean absolute difference of two pictures, 0 to 255."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("upscaler", ["Latent", "Latent (nearest-exact)", "Lanczos", "shapes-2x"])
def test_hires_doubles_the_size_and_keeps_the_content(draw: Draw, upscaler: str) -> None:
    strength = 0.6 if upscaler.startswith("Latent") else 0.4  # enlarged latents are blurred until they are drawn anew
    large = draw(PROMPT, hires=hires(upscaler, strength=strength))
    assert large.shape == (256, 256, 3)
    assert seen(large).agrees(asked(PROMPT), shape=True)
    small = np.asarray(Image.fromarray(large).resize((128, 128)))
    assert close(small, draw(PROMPT)) < 20


def test_every_upscaler_of_the_catalog_is_one_of_its_own(draw: Draw) -> None:
    drawn = {
        name: draw(PROMPT, steps=4, hires=hires(name, width=192, height=192, steps=2)).tobytes()
        for name in (*INTERNAL, "shapes-2x")
    }
    assert drawn.pop("None") == drawn["Lanczos"]
    assert len(set(drawn.values())) == len(drawn)


def test_hires_can_have_another_shape_and_is_cut_to_it(draw: Draw) -> None:
    for upscaler in ("Latent", "Lanczos"):
        large = draw(PROMPT, steps=8, hires=hires(upscaler, width=256, height=192, steps=5))
        assert large.shape == (192, 256, 3)
        assert seen(large).background == "blue"


def test_the_second_pass_may_have_a_prompt_of_its_own(draw: Draw) -> None:
    other = "a large yellow circle on a blue background"
    assert seen(draw(PROMPT, hires=hires("Lanczos", strength=0.9, prompt=other, steps=20))).colour == "yellow"


def test_hires_goes_from_half_to_all_in_its_second_pass(executor: Executor) -> None:
    told = [e for e in events(executor, request(steps=6, hires=hires(steps=4))) if isinstance(e, Progress)]
    first = [p for p in told if p.phase == "initial generation"]
    second = [p for p in told if p.phase == "upscaling"]
    assert max(p.fraction for p in first) == 0.5
    assert min(p.fraction for p in second) == 0.5
    assert second[-1].fraction == 1
    assert (second[-1].step, second[-1].steps) == (4, 4)
    assert [p.fraction for p in told] == sorted(p.fraction for p in told)


def test_hires_of_no_strength_only_enlarges(draw: Draw) -> None:
    small = draw(PROMPT)
    large = draw(PROMPT, hires=hires("shapes-2x", strength=0))
    assert close(np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX)), small) < 4


def scene(colour: str = "green", side: int = 128) -> Image.Image:
    """A disc in the middle of a white picture."""
    image = Image.new("RGB", (side, side), (245, 245, 245))
    fill = {"green": (40, 180, 60), "red": (220, 40, 40)}[colour]
    ImageDraw.Draw(image).ellipse((side * 0.2, side * 0.2, side * 0.8, side * 0.8), fill=fill)
    return image


def test_a_little_strength_keeps_the_picture_and_much_follows_the_prompt(
    executor: Executor, pictures: dict[str, Image.Image]
) -> None:
    pictures["green"] = scene()
    kept, drawn = (
        finished(executor, from_picture("a large red circle on a white background", "green", strength=s)).images[0]
        for s in (0.2, 0.9)
    )
    assert seen(kept).colour == "green"
    assert close(kept, np.asarray(scene())) < 12
    assert seen(drawn).colour == "red"


@pytest.mark.parametrize(("strength", "steps"), [(0.75, 16), (0.0, 1), (1.0, 20), (0.5, 11)])
def test_strength_is_a_share_of_the_steps_and_one_more(
    executor: Executor, pictures: dict[str, Image.Image], strength: float, steps: int
) -> None:
    pictures["green"] = scene()
    asked_for = from_picture(PROMPT, "green", strength=strength, steps=20, sampler="euler", schedule="default")
    told = [e for e in events(executor, asked_for) if isinstance(e, Progress) and e.phase == "generation"]
    assert len({p.fraction for p in told} - {0.0}) == steps


def test_a_batch_from_a_picture_is_what_its_seeds_give_alone(
    executor: Executor, pictures: dict[str, Image.Image]
) -> None:
    pictures["green"] = scene()
    fields = {"steps": 5, "sampler": "euler_a"}
    batch = finished(executor, from_picture(PROMPT, "green", count=2, **fields))
    for seed, image in zip(batch.seeds, batch.images, strict=True):
        assert np.array_equal(image, finished(executor, from_picture(PROMPT, "green", seed=seed, **fields)).images[0])


@pytest.mark.parametrize("mode", ["just resize", "crop and resize", "resize and fill", "latent"])
def test_a_picture_of_another_size_is_brought_to_the_one_asked_for(
    executor: Executor, pictures: dict[str, Image.Image], mode: str
) -> None:
    pictures["wide"] = scene().resize((200, 100))
    made = finished(executor, from_picture(PROMPT, "wide", resize_mode=mode, strength=0.1, steps=10)).images[0]
    assert made.shape == (128, 128, 3)
    assert seen(made).colour == "green"


def masked(**changes: object) -> Mask:
    return Mask.model_validate({"image": "mask"} | changes)


@pytest.fixture
def two(pictures: dict[str, Image.Image]) -> Image.Image:
    """A green disc left and a green disc right; the mask covers the right half."""
    image = Image.new("RGB", (256, 128), (245, 245, 245))
    pen = ImageDraw.Draw(image)
    for left in (30, 158):
        pen.ellipse((left, 30, left + 68, 98), fill=(40, 180, 60))
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((132, 4, 251, 123), fill=255)
    pictures["two"], pictures["mask"] = image, mask
    return image


def half(pixels: Pixels, *, right: bool) -> Pixels:
    return pixels[:, 128:] if right else pixels[:, :128]


@pytest.mark.parametrize("changes", [{}, {"fill": "original"}, {"fill": "latent noise"}, {"fill": "latent nothing"},
                                     {"only_masked": True}], ids=str)  # fmt: skip
def test_only_what_is_masked_is_painted_anew(executor: Executor, two: Image.Image, changes: dict[str, object]) -> None:
    size = (128, 128) if changes.get("only_masked") else (256, 128)
    request_ = from_picture(
        "a large red circle on a white background", "two", mask=masked(**changes), strength=0.95,
        width=size[0], height=size[1],
    )  # fmt: skip
    made = finished(executor, request_).images[0]
    assert made.shape == (128, 256, 3)
    original = np.asarray(two)
    assert np.array_equal(half(made, right=False)[:, :110], half(original, right=False)[:, :110])
    assert seen(half(made, right=False)).colour == "green"
    assert seen(half(made, right=True)).colour == "red"


def test_an_inverted_mask_paints_the_rest(executor: Executor, two: Image.Image) -> None:
    asked_for = from_picture(
        "a large red circle on a white background",
        "two",
        mask=masked(invert=True),
        strength=0.95,
        width=256,
        height=128,
    )
    made = finished(executor, asked_for).images[0]
    assert np.array_equal(half(made, right=True)[16:112, 20:108], half(np.asarray(two), right=True)[16:112, 20:108])
    assert close(half(made, right=False), half(np.asarray(two), right=False)) > 5


def test_a_blank_mask_of_only_masked_draws_the_whole_picture(
    executor: Executor, pictures: dict[str, Image.Image]
) -> None:
    pictures["green"], pictures["blank"] = scene(), Image.new("L", (128, 128))
    mask = Mask(image="blank", only_masked=True)
    with_mask, without = (
        finished(executor, from_picture(PROMPT, "green", mask=m, steps=4)).images[0] for m in (mask, None)
    )
    assert np.array_equal(with_mask, without)


def test_the_last_event_has_the_picture_of_every_seed(executor: Executor, two: Image.Image) -> None:
    last = events(executor, from_picture(PROMPT, "two", mask=masked(), count=2, steps=4, width=256))[-1]
    assert isinstance(last, Finished)
    assert len(last.images) == 2
    assert close(*last.images) > 0.1
