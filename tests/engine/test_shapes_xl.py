"""Whether the shipped SDXL models draw what their prompts say, and what the refiner adds to it."""

from __future__ import annotations

import random

import numpy as np
from asking import SCENE, Draw, finished, request
from semantics import asked, held_out, seen

from diffusion_api.engine.executor import Executor
from diffusion_api.schema.request import Refiner

PROMPTS = random.Random(0).sample(held_out(), 20)


def test_held_out_prompts_are_followed(draw: Draw) -> None:
    wrong = []
    for number, prompt in enumerate(PROMPTS):
        shown = seen(draw(prompt, model="shapes-xl", seed=number))
        if not shown.agrees(asked(prompt)):
            wrong.append(f"{prompt}: {shown}")
    assert len(wrong) <= 0.05 * len(PROMPTS), wrong


def test_the_refiner_draws_the_end_and_keeps_what_is_drawn(draw: Draw) -> None:
    alone = draw(model="shapes-xl")
    refined = draw(model="shapes-xl", refiner=Refiner(model="shapes-xl-refiner", switch_at=0.7))
    assert np.abs(alone.astype(int) - refined).max() > 8
    assert seen(refined).agrees(asked(SCENE), shape=True)


def test_the_same_seed_gives_the_same_picture(executor: Executor) -> None:
    refiner = Refiner(model="shapes-xl-refiner", switch_at=0.7)
    one, two = (finished(executor, request(model="shapes-xl", steps=6, refiner=refiner)).images[0] for _ in range(2))
    assert np.array_equal(one, two)
