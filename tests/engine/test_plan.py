"""Requests become passes."""

from __future__ import annotations

from itertools import pairwise

from diffusion_api.engine.plan import plan
from diffusion_api.schema.request import MAX_SEED, Output, Txt2Img


def request(**changes: object) -> Txt2Img:
    fields: dict[str, object] = dict(
        model="shapes", prompt="a", negative_prompt="b", steps=7, guidance_scale=5, width=64, height=96,
        sampler="heun", schedule="karras", seed=3, output=Output(),
    )  # fmt: skip
    return Txt2Img.model_validate(fields | changes)


def test_each_picture_is_a_pass_with_the_next_seed() -> None:
    assert [stage.seed for stage in plan(request(count=3))] == [3, 4, 5]


def test_seeds_go_around_at_the_end() -> None:
    assert [stage.seed for stage in plan(request(count=2, seed=MAX_SEED))] == [MAX_SEED, 0]


def test_the_passes_share_the_progress_without_gaps() -> None:
    stages = plan(request(count=4))
    assert stages[0].begins == 0
    assert stages[-1].ends == 1
    assert all(a.ends == b.begins for a, b in pairwise(stages))


def test_a_corrector_is_not_needed_for_the_last_step() -> None:
    (stage,) = plan(request())
    assert stage.evaluations == 13
