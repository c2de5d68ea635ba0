"""What the prompt language does to pictures, with the shipped model; and which text is asked for when."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from asking import Draw, hires, request
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from semantics import asked, seen
from torch import Tensor

from diffusion_api.engine import denoise, devices
from diffusion_api.engine.denoise import Evaluate
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.engine.plan import plan
from diffusion_api.engine.samplers.sigmas import NoiseLevels
from diffusion_api.engine.text import Conditioning
from diffusion_api.settings import DATA

RED, BLUE = "a large red circle on a white background", "a large blue circle on a white background"


def colour(draw: Draw, prompt: str, **changes: object) -> str:
    return seen(draw(prompt, steps=10, **changes)).colour


def test_a_prompt_without_syntax_is_what_the_plain_encoder_says() -> None:
    lane = SD1.from_folder(DATA / "models" / "shapes", devices.choose("cpu"))
    for prompt in ("", RED, "Large red circle, blue background"):
        with torch.inference_mode():
            ids = lane.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
            assert torch.equal(lane.encode((prompt,))[0].hidden, lane.text_encoder(ids).last_hidden_state)


def test_clip_skip_2_is_what_the_text_encoder_says_without_its_last_layer() -> None:
    lane = SD1.from_folder(DATA / "models" / "shapes", devices.choose("cpu"))
    with torch.inference_mode():
        skipped, last, beyond = (lane.encode((RED,), clip_skip=skip)[0].hidden for skip in (2, 1, 12))
        lane.text_encoder.encoder.layers = lane.text_encoder.encoder.layers[:-1]
        ids = lane.tokenizer(RED, padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(skipped, lane.text_encoder(ids).last_hidden_state)
    assert not torch.equal(skipped, last)
    assert torch.equal(beyond, skipped)  # this model has two layers


def test_clip_skip_and_emphasis_reach_the_picture(draw: Draw) -> None:
    small = {"steps": 3, "width": 64, "height": 64}
    prompt = f"({RED}:1.5) [{BLUE}]"
    pictures = [
        draw(prompt, **small | options)
        for options in ({}, {"clip_skip": 2}, *({"emphasis": mode} for mode in ("no norm", "ignore", "none")))
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert np.array_equal(pictures[3], draw(f"{RED} {BLUE}", **small))


@pytest.mark.parametrize(("red", "blue", "wins"), [(1.4, 0.6, "red"), (0.6, 1.4, "blue")])
def test_the_heavier_words_win(draw: Draw, red: float, blue: float, wins: str) -> None:
    assert colour(draw, f"({RED}:{red}) BREAK ({BLUE}:{blue})") == wins


@pytest.mark.parametrize(
    ("prompt", "shows"),
    [
        ("a large [red:green:3] circle on a white background", "green"),
        ("a large [red:green:9] circle on a white background", "red"),
        ("a large [red:green:0.9] circle on a white background", "red"),
        ("a large [red::1] (green:1) circle on a white background", "green"),
    ],
)
def test_prompt_editing_turns_the_colour_at_its_step(draw: Draw, prompt: str, shows: str) -> None:
    assert colour(draw, prompt) == shows


def test_a_schedule_that_never_switches_is_its_first_text(draw: Draw) -> None:
    first, second = (draw(f"a [{RED}:{BLUE}:{when}]", steps=3, width=64, height=64) for when in ("1.0", "0"))
    assert np.array_equal(first, draw(f"a {RED}", steps=3, width=64, height=64))
    assert np.array_equal(second, draw(f"a {BLUE}", steps=3, width=64, height=64))


def test_alternation_draws_neither_of_both(draw: Draw) -> None:
    pictures = [draw(f"a large {c} circle on a white background", steps=10) for c in ("[red|yellow]", "red", "yellow")]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert seen(pictures[0]).colour in ("red", "orange", "yellow")


def test_and_shows_both(draw: Draw) -> None:
    both = draw("a large red circle AND a green background", steps=10)
    assert seen(both).agrees(asked("a large red circle on a green background"), shape=True)


def test_break_keeps_what_is_on_both_sides(draw: Draw) -> None:
    both = draw("a large red circle BREAK on a green background", steps=10)
    assert seen(both).agrees(asked("a large red circle on a green background"), shape=True)


@pytest.mark.parametrize(("red", "blue", "wins"), [(1.2, 0.2, "red"), (0.2, 1.2, "blue")])
def test_the_heavier_prompt_wins(draw: Draw, red: float, blue: float, wins: str) -> None:
    assert colour(draw, f"{RED} :{red} AND {BLUE} :{blue}") == wins


def test_the_negative_prompt_removes(draw: Draw) -> None:
    prompt = "a circle on a white background"
    assert colour(draw, prompt) == "red"
    assert colour(draw, prompt, negative_prompt="red") != "red"


def test_networks_and_comments_leave_no_trace(draw: Draw) -> None:
    plain, marked = (draw(p, steps=3, width=64, height=64) for p in (RED, f"<lora:one:0.8>{RED}# (blue:1.5)"))
    assert np.array_equal(plain, marked)


class Notes:
    """A lane that predicts nothing, and whose conditionings are numbers that stand for texts; BREAK makes them longer."""

    levels = NoiseLevels.from_config({})
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], **options: object) -> tuple[Conditioning, ...]:
        self.texts += texts
        return tuple(Conditioning(torch.full((1, 1 + t.count("BREAK"), 1), float(self.texts.index(t)))) for t in texts)

    def blank(self, width: int, height: int) -> None: ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        return 1, 4, height // 8, width // 8

    def asked(self, prompt: str, **changes: object) -> list[list[str]]:
        """The texts of each evaluation that the last pass asks for."""
        *_, stage = plan(request(prompt, **({"guidance_scale": 1, "steps": 4, "sampler": "euler"} | changes)))
        asks = denoise.denoised(denoise.Seat(self), stage, lambda progress: None, lambda: None)  # type: ignore[arg-type]
        found, answer = [], None
        while True:
            try:
                question = asks.send(answer)
            except StopIteration:
                return found
            if isinstance(question, Evaluate):
                rows = torch.cat([row.hidden for row in question.conditionings])
                found.append([self.texts[int(row[0, 0])] for row in rows])
                answer = torch.zeros(len(rows), *question.latents.shape[1:])
            else:
                answer = question.work()


@pytest.mark.parametrize(
    ("prompt", "changes", "texts"),
    [
        ("a", {}, "aaaa"),
        ("[a:b:2]", {}, "aaab"),
        ("[a:b:0.5]", {}, "aaab"),
        ("[a:b:0]", {}, "bbbb"),
        ("[a:b:0.5]", {"sampler": "heun"}, "aaaaabb"),
        ("[a:b:2]", {"sampler": "heun"}, "aaabbbb"),
        ("[a|b]", {}, "aaba"),
        ("[a|b|c]", {"steps": 7}, "aabcabc"),
    ],
)
def test_each_evaluation_has_its_text(prompt: str, changes: dict[str, object], texts: str) -> None:
    assert Notes().asked(prompt, **changes) == [[text] for text in texts]


@pytest.mark.parametrize(
    ("prompt", "changes", "texts"),
    [
        ("[a:b:0.5]", {}, "bbbb"),
        ("[a:b:1.5]", {}, "aaab"),
        ("[a:b:8]", {"steps": 6}, "aaab"),
        ("[a:b:14]", {"steps": 6, "sampler": "heun"}, "aaab"),
        ("[a|b]", {}, "aaba"),
    ],
)
def test_a_second_pass_goes_on_where_the_schedules_of_the_first_ended(
    prompt: str, changes: dict[str, object], texts: str
) -> None:
    second = hires(prompt=prompt, steps=4, strength=1, sampler="euler")
    assert Notes().asked(prompt, hires=second, **changes) == [[text] for text in texts]


def test_beyond_the_steps_the_first_text_comes_back() -> None:
    schedule = denoise.Schedule((2, 4), (Conditioning(torch.zeros(1)), Conditioning(torch.ones(1))))
    assert [int(schedule.at(evaluation).hidden) for evaluation in range(7)] == [0, 0, 0, 1, 1, 0, 0]


def test_the_negative_prompt_has_a_schedule_of_its_own() -> None:
    asked = Notes().asked("[a:b:1]", negative_prompt="[c:d:2]", guidance_scale=5)
    assert asked == [["c", "a"], ["c", "a"], ["c", "b"], ["d", "b"]]


def test_a_negative_prompt_of_another_length_is_asked_for_apart() -> None:
    assert Notes().asked("a BREAK b AND c", negative_prompt="d", guidance_scale=5, steps=1) == [
        ["d"],
        ["a BREAK b", "c"],
    ]


@pytest.mark.parametrize(
    ("prompt", "guidance_scale", "rows"),
    [("a", 1, 1), ("a :0.5", 2, 1), ("a", 2, 2), ("a :2", 1, 2), ("a AND b", 1, 3)],
)
def test_the_negative_prompt_is_left_out_where_it_would_change_nothing(
    prompt: str, guidance_scale: float, rows: int
) -> None:
    assert [len(row) for row in Notes().asked(prompt, guidance_scale=guidance_scale, steps=1)] == [rows]


def test_guidance_is_the_sum_over_the_prompts() -> None:
    nothing = denoise.Schedule((1,), (Conditioning(torch.zeros(1, 1, 1)),))
    guidance = denoise.Guidance((nothing,) * 2, (1.0, -0.5), nothing, 2)
    asks = guidance.predicted(0, lambda conditionings: conditionings)  # type: ignore[arg-type, return-value]
    assert len(next(asks)) == 3  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as end:
        asks.send(torch.tensor([1.0, 5.0, 3.0]).reshape(3, 1, 1, 1))
    predicted = end.value.value
    assert predicted.guided(2).item() == 1 + 2 * (5 - 1) - (3 - 1)
    assert predicted.guided(1).item() == 1 + (5 - 1) - 0.5 * (3 - 1)
    assert predicted.unguided.item() == 1


@pytest.mark.parametrize("share", [0.3, 1])
def test_guidance_rescale_is_that_of_diffusers_for_models_that_predict_v(share: float) -> None:
    sigma = 2.5
    clean, noise, guided, plain = torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = clean + sigma * noise
    alpha = 1 / math.sqrt(sigma**2 + 1)

    def picture(v: Tensor) -> Tensor:
        return x * alpha**2 - v * sigma * alpha

    ours = denoise.rescaled(x, sigma, picture(guided), picture(plain), share)
    assert torch.allclose(ours, picture(rescale_noise_cfg(guided, plain, share)), atol=1e-5)


def test_guidance_rescale_brings_an_overexposed_picture_back(draw: Draw) -> None:
    def glare(rescale: float) -> float:
        picture = draw(RED, steps=10, sampler="euler", guidance_scale=15, guidance_rescale=rescale)
        assert seen(picture).agrees(asked(RED))
        return float((picture > 248).mean())  # brighter than any colour that the model learned

    assert glare(0) > 2 * glare(0.4) > 4 * glare(0.7)
