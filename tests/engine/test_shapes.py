"""The shipped model obeys its prompt: held-out scenes, checked by what the pictures show."""

from __future__ import annotations

import random

import pytest
from asking import Draw
from semantics import asked, held_out, seen

PROMPTS = random.Random(0).sample(held_out(), 40)
PARAPHRASES = (
    ("Large red circle, blue background", "a large red circle on a blue background"),
    (
        "a big GREEN square on a white background, masterpiece, best quality",
        "a large green square on a white background",
    ),
    ("yellow background with a tiny black cross to the left", "a small black cross on a yellow background on the left"),
    ("photo of a huge orange ring on black background", "a large orange ring on a black background"),
    (
        "a little purple triangle on a white background, right",
        "a small purple triangle on a white background on the right",
    ),
)


@pytest.mark.parametrize("size", [128, 256])
def test_held_out_prompts_are_followed(draw: Draw, size: int) -> None:
    wrong = []
    for number, prompt in enumerate(PROMPTS):
        shown = seen(draw(prompt, width=size, height=size, seed=number))
        if not shown.agrees(asked(prompt)):
            wrong.append(f"{prompt}: {shown}")
    assert len(PROMPTS) >= 40
    assert len(wrong) <= 0.05 * len(PROMPTS), wrong


def test_most_held_out_prompts_get_their_very_shape(draw: Draw) -> None:
    prompts = [p for p in PROMPTS if " large " in p]
    right = sum(seen(draw(p, seed=100 + n)).agrees(asked(p), shape=True) for n, p in enumerate(prompts))
    assert right >= 0.8 * len(prompts), (right, len(prompts))


@pytest.mark.parametrize(("prompt", "plain"), PARAPHRASES)
def test_a_sloppy_prompt_works(draw: Draw, prompt: str, plain: str) -> None:
    shown = [seen(draw(prompt, seed=seed)).agrees(asked(plain)) for seed in range(3)]
    assert sum(shown) >= 2


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 128), (128, 192), (200, 200)])
def test_other_sizes_work_too(draw: Draw, width: int, height: int) -> None:
    prompt = "a large green circle on a black background"
    picture = draw(prompt, width=width, height=height)
    assert picture.shape == (height, width, 3)
    assert seen(picture).agrees(asked(prompt))
