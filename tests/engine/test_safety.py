"""The safety checker: which pictures it flags, what becomes of them, and what happens where it is missing or broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkers
import numpy as np
import pytest
import tiny
import torch
from asking import Draw, events, finished, from_picture, hires, request
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from semantics import seen
from transformers import CLIPImageProcessor

from diffusion_api.catalog.checkers import alone
from diffusion_api.engine.base import Finished, Pixels, Preview, Stop
from diffusion_api.engine.executor import Budget, Executor
from diffusion_api.engine.safety import Checker
from diffusion_api.errors import ModelUnreadable, NoChecker, UnsafePicture
from diffusion_api.schema.job import Safety
from diffusion_api.schema.request import Output, Policy, Upscale
from diffusion_api.settings import DATA

FLAGGED = "a large yellow cross on a blue background"
OTHER = "a small green star on a white background"
NOT_CHECKED = "no picture was checked: "


@pytest.fixture(scope="module")
def installed(executor: Executor, models_dir: Path) -> Iterator[Path]:
    """The folder of a checker that flags ``FLAGGED`` and not ``OTHER``."""
    flagged, spared = (finished(executor, asking(prompt)).images[0] for prompt in (FLAGGED, OTHER))
    folder = models_dir.parent / "stable_diffusion" / "safety_checker"
    checkers.save(checkers.checker(flagged, [spared]), folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def without(installed: Path) -> Iterator[None]:
    """No checker for a while."""
    hidden = installed.rename(installed.with_name("hidden"))
    yield
    hidden.rename(installed)


def asking(prompt: str = FLAGGED, **changes: object) -> Any:
    return request(prompt, **{"steps": 6} | changes)


def sharpness(pixels: Pixels) -> float:
    """The largest step between two pixels side by side."""
    return float(np.abs(np.diff(pixels.astype(float), axis=1)).max())


# What it flags


def test_it_flags_what_diffusers_own_pipeline_flags(executor: Executor, tmp_path: Path) -> None:
    pictures = [
        np.asarray(Image.effect_noise((96, 64), level).convert("RGB").rotate(level)) for level in range(0, 200, 8)
    ]
    made = checkers.checker(pictures[0], [np.full((64, 64, 3), 255, np.uint8)])
    embeds = torch.stack([checkers._embedded(made, pixels) for pixels in pictures])
    with torch.no_grad():
        likeness = torch.cosine_similarity(embeds, made.concept_embeds[:1])
        made.concept_embeds_weights[0] = likeness.median() + 0.005
        made.special_care_embeds[1] = embeds[-1]  # whatever is like it is looked at more strictly
        made.special_care_embeds_weights[1] = torch.cosine_similarity(embeds, embeds[-1:]).median()
    files = alone(checkers.save(made, tmp_path / "safety_checker"), "safety_checker")
    assert files
    ours = Checker.read(files, torch.device("cpu"))
    pipeline = tiny.pipeline("sd1")
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker.from_pretrained(files.folder, local_files_only=True).eval(),
        feature_extractor=CLIPImageProcessor.from_pretrained(files.folder, local_files_only=True),
    )
    flags = [ours.flags(pixels) for pixels in pictures]
    for pixels, flag in zip(pictures, flags, strict=True):
        blackened, (expected,) = pipeline.run_safety_checker(pixels[None] / 255, "cpu", torch.float32)
        assert flag == expected == (not blackened.any())
    assert 5 < sum(flags) < len(flags) - 5


def test_pictures_are_not_touched_by_looking_at_them(installed: Path, draw: Draw) -> None:
    files = alone(installed, "safety_checker")
    assert files
    pixels = np.array(draw(FLAGGED, steps=6))
    before = pixels.copy()
    assert Checker.read(files, torch.device("cpu")).flags(pixels)
    assert np.array_equal(pixels, before)


# What becomes of it


def test_a_flagged_picture_is_blurred_beyond_recognition_and_others_are_not(
    installed: Path, executor: Executor
) -> None:
    plain, blurred = (finished(executor, asking(safety=policy)) for policy in ("off", "blur"))
    assert plain.safety == Safety(applied="off")
    assert blurred.safety == Safety(applied="blur", flagged=(True,))
    assert seen(plain.images[0]).shape == "cross"
    assert sharpness(blurred.images[0]) < sharpness(plain.images[0]) / 10
    assert seen(blurred.images[0]).shape != "cross"
    assert blurred.images[0].shape == plain.images[0].shape
    spared = [finished(executor, asking(OTHER, safety=policy)) for policy in ("off", "blur")]
    assert np.array_equal(spared[0].images[0], spared[1].images[0])
    assert spared[1].safety == Safety(applied="blur", flagged=(False,))
    assert spared[1].warnings == ()


@pytest.mark.parametrize("policy", ["refuse", "required"])
def test_a_flagged_picture_ends_its_job_and_others_do_not(installed: Path, executor: Executor, policy: Policy) -> None:
    with pytest.raises(UnsafePicture, match="flagged a picture"):
        finished(executor, asking(safety=policy))
    spared = finished(executor, asking(OTHER, safety=policy))
    assert spared.safety == Safety(applied="refuse", flagged=(False,))
    assert np.array_equal(spared.images[0], finished(executor, asking(OTHER)).images[0])


def test_each_picture_of_a_batch_is_judged_alone(
    executor: Executor, installed: Path, models_dir: Path, without: None
) -> None:
    seeds = finished(executor, asking(count=2)).images
    folder = checkers.save(checkers.checker(seeds[1], [seeds[0]]), installed)
    try:
        batch = finished(executor, asking(count=2, safety="blur"))
        alone = [finished(executor, asking(seed=seed, safety="blur")) for seed in batch.seeds]
    finally:
        shutil.rmtree(folder)
    assert batch.safety.flagged == (False, True)
    assert [one.safety.flagged[0] for one in alone] == [False, True]
    for one, other, drawn in zip(alone, batch.images, seeds, strict=True):
        assert np.array_equal(one.images[0], other)
        assert np.array_equal(other, drawn) != one.safety.flagged[0]


def test_the_same_request_is_blurred_to_the_same_bits(installed: Path, executor: Executor) -> None:
    first, again = (finished(executor, asking(safety="blur")).images[0] for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("policy", ["blur", "refuse"])
def test_nothing_is_seen_of_a_picture_before_it_was_checked(
    installed: Path, executor: Executor, policy: Policy
) -> None:
    told = events(executor, asking(OTHER, safety=policy, preview_every=1))
    assert not any(isinstance(event, Preview) for event in told)
    assert isinstance(told[-1], Finished)
    assert told[-1].warnings == ("preview_every is ignored: no picture is shown before it was checked",)


def test_a_picture_that_was_broken_off_is_checked_too(installed: Path, executor: Executor) -> None:
    steps = iter(range(1000))
    told = list(
        executor.run(asking(steps=20, safety="blur"), stop=lambda: Stop.WITH_PICTURE if next(steps) > 17 else None)
    )
    assert isinstance(told[-1], Finished)
    assert told[-1].partial
    assert told[-1].safety == Safety(applied="blur", flagged=(True,))


def test_the_last_picture_of_two_passes_is_checked(installed: Path, executor: Executor) -> None:
    second = hires(width=192, height=192, steps=4)
    found = finished(executor, asking(hires=second, safety="blur"))
    assert found.images[0].shape == (192, 192, 3)
    assert found.safety.flagged == (True,)


def test_pictures_that_came_along_are_checked_as_they_leave(
    installed: Path, executor: Executor, draw: Draw, pictures: dict[str, Image.Image]
) -> None:
    pictures["flagged"] = Image.fromarray(draw(FLAGGED, steps=6))
    drawn = from_picture(OTHER, "flagged", strength=0, steps=4, safety="blur")
    assert finished(executor, drawn).safety.flagged == (True,)
    enlarged = Upscale(image="flagged", upscaler="Lanczos", width=128, height=128, output=Output(), safety="refuse")
    with pytest.raises(UnsafePicture):
        finished(executor, enlarged)


def test_the_operators_policy_holds_whatever_a_request_asks(
    installed: Path, models_dir: Path, executor: Executor
) -> None:
    strict = Executor(executor._library, device="cpu", tokenizer=DATA / "clip", policy="refuse")
    strict.start()
    strict.wait()
    try:
        for asked_for in ("off", "blur"):
            with pytest.raises(UnsafePicture):
                finished(strict, asking(safety=asked_for))
    finally:
        strict.close()


# Where it lies, and what it takes


def test_a_model_has_its_own_checker_first(installed: Path, executor: Executor, models_dir: Path, draw: Draw) -> None:
    own = models_dir / "guarded"
    shutil.copytree(DATA / "models" / "shapes", own)
    star, circle = draw(OTHER, steps=6), draw(FLAGGED, steps=6)
    checkers.save(checkers.checker(star, [circle]), own / "safety_checker", processor=own / "feature_extractor")
    executor._library._scanned = float("-inf")  # now, and not when the last scan is no longer believed
    found = {
        (model, prompt): finished(executor, asking(prompt, model=model, safety="blur")).safety.flagged[0]
        for model in ("shapes", "guarded")
        for prompt in (FLAGGED, OTHER)
    }
    shutil.rmtree(own)
    assert found == {
        ("shapes", FLAGGED): True, ("shapes", OTHER): False, ("guarded", FLAGGED): False, ("guarded", OTHER): True,
    }  # fmt: skip


def test_it_is_read_once_and_goes_with_the_models(installed: Path, executor: Executor) -> None:
    weights = executor._weights
    assert weights
    finished(executor, asking(safety="blur"))
    held = weights._checker
    finished(executor, asking(OTHER, safety="blur"))
    assert held
    assert weights._checker is held
    assert weights._on_host() >= held[1].size > 0
    weights.unload()
    assert not weights.occupied
    finished(executor, asking(OTHER))
    assert weights._checker is None  # not for a job that needs none


def test_it_makes_room_for_the_model_and_is_read_again_for_the_picture(
    installed: Path, executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    held = next(held for held in executor._weights._held.values() if held.model.name == "shapes")  # type: ignore[union-attr]
    budget = Budget(max_ram=held.placed.size)
    small = Executor(executor._library, device="cpu", tokenizer=DATA / "clip", budget=budget)
    small.start()
    small.wait()
    caplog.set_level("INFO")
    try:
        found = finished(small, asking(safety="blur"))
    finally:
        small.close()
    assert found.safety == Safety(applied="blur", flagged=(True,))
    assert caplog.text.count("loaded safety checker stable_diffusion/safety_checker on cpu") == 2


# Where it is missing or broken


@pytest.mark.parametrize("policy", ["blur", "refuse"])
def test_without_a_checker_a_job_runs_and_says_that_nothing_was_checked(
    executor: Executor, without: None, policy: Policy
) -> None:
    found = finished(executor, asking(steps=1, safety=policy, preview_every=1))
    assert found.safety == Safety(applied="off")
    assert found.warnings == (f"{NOT_CHECKED}no safety checker is installed",)
    assert np.array_equal(found.images[0], finished(executor, asking(steps=1)).images[0])


def test_without_a_checker_nothing_runs_that_requires_one(executor: Executor, without: None) -> None:
    with pytest.raises(NoChecker):
        finished(executor, asking(safety="required"))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["concept_embeds"]
    save_file(tensors, folder / "model.safetensors")


def without_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["concept_embeds"] = torch.zeros(17, 3)
    save_file(tensors, folder / "model.safetensors")


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}}")


@pytest.mark.parametrize(
    "damage",
    [truncated, lacking, without_numbers, another_shape, no_json, no_processor],
    ids=lambda damage: damage.__name__,
)
def test_a_broken_checker_ends_the_jobs_that_must_be_checked_and_nothing_else(
    executor: Executor, installed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    whole = shutil.copytree(installed, tmp_path / "whole")
    damage(installed)
    try:
        for policy in ("refuse", "required"):
            with pytest.raises(
                ModelUnreadable, match=r"^safety checker stable_diffusion/safety_checker cannot be read: "
            ):
                finished(executor, asking(OTHER, steps=1, safety=policy))
        found = finished(executor, asking(OTHER, steps=1, safety="blur"))
        assert found.safety == Safety(applied="off")
        assert found.warnings[0].startswith(
            f"{NOT_CHECKED}safety checker stable_diffusion/safety_checker cannot be read: "
        )
        assert str(installed) not in found.warnings[0]
        assert finished(executor, asking(OTHER, steps=1)).warnings == ()
    finally:
        shutil.rmtree(installed)
        whole.rename(installed)
