"""Samplers against k-diffusion's own functions, against references written from the papers, and against an exact solution.

For clean data that is normal with mean M and deviation S the best denoiser is known, and the path of the probability-flow
equation too: (x - M) / sqrt(S^2 + sigma^2) is constant. So a sampler's error can be measured and must fall with the order
that its paper proves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial

import diffusers
import numpy as np
import pytest
import references
import torch
from asking import Draw, events, request
from sampling import CONFIG, LEVELS, STOCHASTIC, THEIRS, Model, psnr, sample, theirs, two_clouds
from semantics import asked, seen
from torch import Tensor

from diffusion_api.catalog import samplers as catalog
from diffusion_api.engine import denoise, devices
from diffusion_api.engine.base import Event, Finished, Pixels
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.engine.noise import Cpu, Nvidia
from diffusion_api.engine.plan import plan
from diffusion_api.engine.samplers import SAMPLERS, Options
from diffusion_api.engine.samplers.brownian import Brownian
from diffusion_api.engine.samplers.euler import restarted
from diffusion_api.engine.samplers.sigmas import SCHEDULES, NoiseLevels, spacing
from diffusion_api.schema.job import Progress
from diffusion_api.schema.request import Txt2Img
from diffusion_api.settings import DATA

MEAN, DEVIATION = 0.7, 0.5
TOP = 10.0
STEPS = (8, 20, 50)
COMPARED = ("default", "karras", "exponential")
NAMES = [row.name for row in catalog.SAMPLERS]


def geometric(steps: int, end: float) -> list[float]:
    return [TOP * (end / TOP) ** (i / steps) for i in range(steps + 1)]


def one_cloud(x: Tensor, sigma: float) -> Tensor:
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def error(name: str, steps: int) -> float:
    x = torch.tensor([[[[MEAN + 1.3 * math.hypot(DEVIATION, TOP)]]]], dtype=torch.float64)
    end = 0.05
    result = sample(name, Model(one_cloud), x, geometric(steps, end), Options(eta=0))
    return abs(result.item() - (MEAN + 1.3 * math.hypot(DEVIATION, end)))


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_catalog_and_the_engine_know_the_same_names() -> None:
    assert set(SAMPLERS) == set(NAMES)
    assert set(SCHEDULES) == {s.name for s in catalog.SCHEDULES}


@pytest.mark.parametrize("schedule", COMPARED)
@pytest.mark.parametrize("name", THEIRS)
def test_a_sampler_is_k_diffusions(name: str, schedule: str) -> None:
    for steps in STEPS:
        sigmas = spacing(LEVELS, name, schedule, steps)
        x = noise(1, 4, 8, 8) * sigmas[0]
        eta = {"eta": 1.0} if catalog.sampler(name).ends_only else {}  # A1111's, where k-diffusion's own is 0
        assert psnr(sample(name, Model(two_clouds), x, sigmas), theirs(name, two_clouds, x, sigmas, **eta)) > 80


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_eta_and_s_noise_mean_what_they_do_there(name: str, eta: float) -> None:
    sigmas = spacing(LEVELS, name, "karras", 12)
    x = noise(1, 4, 8, 8) * sigmas[0]
    ours = sample(name, Model(two_clouds), x, sigmas, Options(eta=eta, s_noise=0.9))
    assert psnr(ours, theirs(name, two_clouds, x, sigmas, eta=eta, s_noise=0.9)) > 60
    if eta:
        assert psnr(ours, theirs(name, two_clouds, x, sigmas, eta=1, s_noise=0.9)) < 50
        assert psnr(ours, theirs(name, two_clouds, x, sigmas, eta=eta, s_noise=1)) < 50


@pytest.mark.parametrize("limits", [{}, {"s_tmin": 0.3, "s_tmax": 5.0}])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_means_what_it_does_there(name: str, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = spacing(LEVELS, name, "karras", 12)
    x = noise(1, 4, 8, 8) * sigmas[0]
    drawn = torch.Generator().manual_seed(7)
    monkeypatch.setattr(
        references.k_diffusion().torch, "randn_like", lambda x: torch.randn(x.shape, generator=drawn, dtype=x.dtype)
    )
    ours = sample(name, Model(two_clouds), x, sigmas, Options(s_churn=4, s_noise=1.1, **limits))
    assert psnr(ours, theirs(name, two_clouds, x, sigmas, s_churn=4, s_noise=1.1, **limits)) > 80
    assert psnr(ours, sample(name, Model(two_clouds), x, sigmas)) < 50


@pytest.mark.parametrize("name", ["ddim", "ddim_cfgpp", "plms", "unipc", "lcm", "restart"])
def test_a_sampler_is_that_of_its_paper(name: str) -> None:
    for schedule, steps in itertools.product(COMPARED, STEPS):
        sigmas = spacing(LEVELS, name, schedule, steps)
        x = noise(1, 4, 8, 8) * sigmas[0]
        ours = sample(name, Model(two_clouds, one_cloud), x, sigmas)
        theirs = references.PAPERS[name](two_clouds, one_cloud, x, sigmas, references.Noises(x))
        assert psnr(ours, theirs) > 80, (schedule, steps)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [("ddim", "DDIMScheduler", {"clip_sample": False}), ("plms", "PNDMScheduler", {"skip_prk_steps": True})],
)
def test_samplers_of_trained_timesteps_are_those_of_diffusers(
    name: str, scheduler: str, options: dict[str, bool], steps: int
) -> None:
    made = getattr(diffusers, scheduler).from_config(CONFIG | options | {"steps_offset": 1, "set_alpha_to_one": False})
    made.set_timesteps(steps)
    start = x = noise(1, 4, 8, 8)
    for time in made.timesteps.tolist():
        sigma = LEVELS.sigmas[time].item()
        bar = 1 / (1 + sigma**2)
        eps = (x - bar**0.5 * two_clouds(x / bar**0.5, sigma)) / (1 - bar) ** 0.5
        x = made.step(eps, time, x).prev_sample
    sigmas = spacing(LEVELS, name, "default", steps)
    ours = sample(name, Model(two_clouds), start * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    assert psnr(ours / (1 + sigmas[-1] ** 2) ** 0.5, x) > 80


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ["ddim", "ddim_cfgpp"])
def test_eta_is_that_of_the_paper(name: str, eta: float) -> None:
    sigmas = spacing(LEVELS, name, "default", 20)
    x = noise(1, 4, 8, 8) * sigmas[0]
    ours = sample(name, Model(two_clouds, one_cloud), x, sigmas, Options(eta=eta))
    theirs = references.PAPERS[name](two_clouds, one_cloud, x, sigmas, references.Noises(x), eta)
    assert psnr(ours, theirs) > 80


def test_consistency_models_are_told_the_timesteps_that_they_were_distilled_at() -> None:
    model = Model(two_clouds)
    sample("lcm", model, noise(1, 1, 2, 2), spacing(LEVELS, "lcm", "karras", 8))
    told = [timestep for _, timestep in model.asked]
    assert told[0] == 999
    assert all(timestep in range(19, 1000, 20) for timestep in told)


def test_what_restart_does_again() -> None:
    for steps in (20, 30, 36, 50):
        pairs = restarted(spacing(LEVELS, "restart", "karras", steps))
        again, times = (9, 1) if steps < 36 else (steps // 4, 2)
        jumps = [(a[1], b[0]) for a, b in itertools.pairwise(pairs) if b[0] > a[1]]
        assert len(pairs) == steps
        assert len(jumps) == times
        for low, high in jumps:
            assert 0.05 < low < 0.2
            assert 1.2 < high < 3
            assert len([p for p in pairs if p[0] == high]) == times + 1, again
    assert restarted([2.0, 1.0, 0.0]) == [(2.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1), ("ddim", 1), ("ddim_cfgpp", 1), ("heun", 2), ("restart", 2), ("dpm_2", 2), ("dpmpp_2m", 2),
        ("dpmpp_2s_a", 2), ("dpmpp_sde", 2), ("dpmpp_2m_sde", 2), ("dpmpp_2m_sde_heun", 2),
    ],
)  # fmt: skip
def test_the_error_falls_with_the_order_of_the_method(name: str, order: int) -> None:
    steps = (40, 80) if name != "restart" else (10, 19)  # from 20 steps on it does something else
    ratio = error(name, steps[0]) / error(name, steps[1])
    assert ratio == pytest.approx((steps[1] / steps[0]) ** order, rel=0.25)


@pytest.mark.parametrize(
    "name",
    [n for n in NAMES if n not in ("euler", "ddim", "ddim_cfgpp", "euler_a", "restart", "lcm", "plms", "dpm_adaptive")],
)
def test_higher_orders_are_closer(name: str) -> None:
    assert error(name, 40) < error("euler", 40) / 5


@pytest.mark.parametrize("name", ["euler_a", "dpm_2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_noise_that_is_added_leaves_the_data_as_they_are(name: str) -> None:
    start = noise(1, 1, 200, 200, seed=1) * TOP
    result = sample(name, Model(one_cloud), start, [*geometric(60, 0.05), 0.0])
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(DEVIATION, abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_used_by_the_samplers_that_draw_some(name: str) -> None:
    sigmas = [*geometric(19, 0.05), *([] if catalog.sampler(name).ends_only else [0.0])]
    one, other = (sample(name, Model(one_cloud), torch.full((1, 1, 1, 1), 3.0), sigmas, seed=seed) for seed in (1, 2))
    assert torch.equal(one, other) == (name not in (*STOCHASTIC, "lcm", "restart"))


@pytest.mark.parametrize("row", catalog.SAMPLERS, ids=lambda row: row.name)
def test_the_catalog_tells_how_often_a_sampler_asks(row: catalog.Sampler) -> None:
    for steps in (1, 2, 3, 10, 20, 36):
        model = Model(one_cloud)
        sample(row.name, model, torch.ones(1, 1, 1, 1), spacing(LEVELS, row.name, "karras", steps))
        if not row.adaptive:
            assert len(model.asked) == steps * row.evaluations - (row.evaluations - 1) + (
                row.name == "plms" and steps > 1
            )


def test_dpm_adaptive_asks_as_often_as_it_needs() -> None:
    asked = []
    for steps in (1, 20, 50):
        model = Model(two_clouds)
        sample("dpm_adaptive", model, noise(1, 4, 8, 8) * 14, spacing(LEVELS, "dpm_adaptive", "karras", steps))
        asked.append(len(model.asked))
    assert asked[0] == asked[1] == asked[2]
    assert 20 < asked[0] < 100


def test_dpm_adaptive_ends_when_numbers_overflow() -> None:
    model = Model(lambda x, sigma: x * math.nan)
    result = sample("dpm_adaptive", model, noise(1, 1, 2, 2), spacing(LEVELS, "dpm_adaptive", "karras", 20))
    assert not result.isfinite().any()
    assert len(model.asked) < 10


@pytest.mark.parametrize("name", [row.name for row in catalog.SAMPLERS if not row.ends_only])
def test_the_last_step_into_zero_is_the_denoised_picture(name: str) -> None:
    result = sample(name, Model(one_cloud), torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64), [2.0, 0.0])
    assert result.item() == pytest.approx((DEVIATION**2 * 1.5 + 4 * MEAN) / (DEVIATION**2 + 4), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["default", "karras", "sgm_uniform", "kl_optimal", "ddim", "simple"])
def test_a_first_level_without_any_signal_gives_numbers(name: str, schedule: str) -> None:
    zero = NoiseLevels.from_config(CONFIG | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    assert zero.highest > 4000

    def by_v(x: Tensor, sigma: float) -> Tensor:
        """The guess by way of what a model of v predicts, in single precision."""
        whole = 1 + sigma**2
        v = (x / whole - two_clouds(x, sigma)) * (math.sqrt(whole) / sigma)
        return zero.estimate(x, sigma, v)

    sigmas = spacing(zero, name, schedule, 20)
    x = noise(1, 4, 8, 8).float() * sigmas[0]
    result = sample(name, Model(by_v, levels=zero), x, sigmas)
    assert result.isfinite().all()
    assert 0.5 < result.abs().mean().item() < 2


def test_no_sampler_is_another_in_disguise() -> None:
    x = noise(1, 4, 8, 8)
    made = {}
    for name in NAMES:
        sigmas = spacing(LEVELS, name, "karras", 20)
        made[name] = sample(name, Model(two_clouds, one_cloud), x * sigmas[0], sigmas)
    close = [(a, b) for a, b in itertools.combinations(NAMES, 2) if psnr(made[a], made[b]) > 60]
    # Without its own spacing and with no noise of its own, DDIM is Euler.
    assert close == [("euler", "ddim")]


PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def drawn(executor: Executor) -> Callable[[str], list[Event]]:
    """The course of a job that draws with the shipped model and a sampler, each only once.

    DPM fast, whose steps are long ones, needs more of them.
    """

    @cache
    def events_of(name: str) -> list[Event]:
        row, schedule = catalog.resolve(name, "automatic")
        steps = 30 if name == "dpm_fast" else 20
        return events(executor, request(PROMPT, sampler=row.name, schedule=schedule.name, steps=steps))

    return events_of


def picture(course: list[Event]) -> Pixels:
    last = course[-1]
    assert isinstance(last, Finished)
    return last.images[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_draws_what_is_asked(name: str, drawn: Callable[[str], list[Event]]) -> None:
    assert seen(picture(drawn(name))).agrees(asked(PROMPT), shape=True)


def test_no_picture_is_another_ones(drawn: Callable[[str], list[Event]]) -> None:
    pictures = {name: picture(drawn(name)) for name in NAMES}
    same = [(a, b) for a, b in itertools.combinations(NAMES, 2) if (pictures[a] == pictures[b]).all()]
    assert same == []


def test_dpm_adaptive_tells_how_far_it_is(drawn: Callable[[str], list[Event]]) -> None:
    fractions = [event.fraction for event in drawn("dpm_adaptive") if isinstance(event, Progress)]
    assert len(fractions) > 40
    assert fractions == sorted(fractions)
    assert 0.95 < fractions[-1] <= 1


@pytest.mark.parametrize("schedule", [row.name for row in catalog.SCHEDULES])
def test_every_schedule_draws_what_is_asked(schedule: str, draw: Draw) -> None:
    assert seen(draw(PROMPT, sampler="dpmpp_2m", schedule=schedule, steps=10)).agrees(asked(PROMPT), shape=True)


@pytest.mark.parametrize(
    ("name", "options", "changes"),
    [
        ("euler_a", {"eta": 0.5}, True),
        ("ddim", {"eta": 0.5}, True),
        ("euler", {"eta": 0.5}, False),
        ("euler_a", {"s_noise": 0.9}, True),
        ("euler", {"s_noise": 0.9}, False),
        ("heun", {"s_churn": 2}, True),
        ("heun", {"s_churn": 2, "s_tmin": 100}, False),
        ("heun", {"s_churn": 2, "s_tmax": 0.001}, False),
        ("dpmpp_2m", {"s_churn": 2}, False),
        ("euler", {"discard_next_to_last_sigma": True}, True),
        ("dpm_2", {"discard_next_to_last_sigma": True}, False),
    ],
)
def test_options_of_a_job_change_the_samplers_that_heed_them(
    name: str, options: dict[str, object], changes: bool, draw: Draw
) -> None:
    small = {"sampler": name, "steps": 3, "width": 64, "height": 64}
    assert (draw(PROMPT, **small) != draw(PROMPT, **small | options)).any() == changes


@pytest.mark.parametrize(
    ("schedule", "asked"),
    [
        ("karras", {"sigma_min": 0.2, "sigma_max": 5}),
        ("karras", {"rho": 3}),
        ("exponential", {"sigma_max": 5}),
        ("polyexponential", {"rho": 0.5}),
    ],
)
@torch.inference_mode()
def test_a_job_goes_through_the_levels_that_it_asks_for(lane: SD1, schedule: str, asked: dict[str, float]) -> None:
    """By the timesteps that the model is told, against k-diffusion's own spacing."""
    job = request(PROMPT, sampler="euler", schedule=schedule, steps=4, width=64, height=64, **asked)
    steps, told, answer = (
        denoise.denoised(denoise.Seat(lane), plan(job)[0], lambda progress: None, lambda: None),
        [],
        None,
    )
    with suppress(StopIteration):
        while True:
            question = steps.send(answer)
            if isinstance(question, denoise.Run):
                answer = question.work()
            else:
                told.append(question.timestep)
                answer = torch.zeros(len(question.conditionings), *question.latents.shape[1:])
    between = {"sigma_min": LEVELS.lowest, "sigma_max": LEVELS.highest} | asked
    theirs = getattr(references.k_diffusion(), f"get_sigmas_{schedule}")(4, **between)
    assert told == pytest.approx([LEVELS.timestep(sigma) for sigma in theirs[:-1].tolist()], abs=0.01)


@pytest.fixture(scope="module")
def lane() -> SD1:
    """The shipped model."""
    return SD1.from_folder(DATA / "models" / "shapes", devices.choose("cpu"))


@pytest.mark.parametrize("name", ["lms", "euler_a", "dpmpp_2m_sde", "ddim", "ddim_cfgpp"])
@pytest.mark.filterwarnings("ignore:Should have")  # of times that were rounded
@torch.inference_mode()
def test_a_whole_pass_is_the_reference(name: str, lane: SD1) -> None:
    """Noise, levels, timesteps, guidance and what is around the sampler, against all of it put together by hand."""
    job = request(PROMPT, sampler=name, schedule="default", steps=8, width=64, height=64, rng="cpu", guidance_scale=4)
    latents = passed(lane, job)
    row = catalog.sampler(name)
    (positive,), (negative,) = lane.encode((PROMPT,)), lane.encode(("",), negative=True)

    def predicted(x: Tensor, sigma: float, scale: float) -> Tensor:
        time = LEVELS.timestep(sigma)
        without, told = (lane.predict(x / (1 + sigma**2) ** 0.5, time, [words]) for words in (negative, positive))
        return x - sigma * (without + scale * (told - without))

    def guess(x: Tensor, sigma: float) -> Tensor:
        return predicted(x, sigma, 4 / row.guidance_divisor)

    drawn = torch.Generator().manual_seed(job.seed)
    noise = torch.randn(1, 4, 8, 8, generator=drawn)
    sigmas = spacing(LEVELS, name, "default", 8)
    if name in references.PAPERS:
        start = noise * (1 + sigmas[0] ** 2) ** 0.5
        x = references.PAPERS[name](
            guess, lambda x, sigma: predicted(x, sigma, 0), start, sigmas, references.Noises(noise)
        )
        expected = x / (1 + sigmas[-1] ** 2) ** 0.5
    elif row.brownian:
        tree = references.k_diffusion().BrownianTreeNoiseSampler(noise, min(sigmas[:-1]), sigmas[0], seed=job.seed)
        expected = theirs(name, guess, noise * sigmas[0], sigmas, tree)
    else:
        again = lambda *_: torch.randn(1, 4, 8, 8, generator=drawn)  # noqa: E731
        expected = theirs(name, guess, noise * sigmas[0], sigmas, again)
    assert psnr(lane.decode(latents).clamp(-1, 1), lane.decode(expected).clamp(-1, 1)) > 50


def passed(lane: SD1, asked: Txt2Img) -> Tensor:
    """The latents that a request's pass ends with."""
    asks = denoise.denoised(denoise.Seat(lane), plan(asked)[0], lambda progress: None, lambda: None)
    answer = None
    try:
        while True:
            question = asks.send(answer)
            if isinstance(question, denoise.Run):
                answer = question.work()
            else:
                rows = question.latents.expand(len(question.conditionings), -1, -1, -1)
                answer = lane.predict(rows, question.timestep, question.conditionings)
    except StopIteration as end:
        latents: Tensor = end.value[0]
        return latents


@pytest.mark.filterwarnings("ignore:Should have")
def test_brownian_noise_is_k_diffusions() -> None:
    like = torch.zeros(1, 4, 8, 8)
    sigmas = torch.tensor(spacing(LEVELS, "dpmpp_sde", "karras", 12)[:-1])

    draw = partial(Cpu.firsts, shape=like.shape)
    low, high = sigmas[-1].item(), sigmas[0].item()
    theirs = references.k_diffusion().BrownianTreeNoiseSampler(like, sigmas[-1], sigmas[0], seed=1234)
    ours = Brownian(low, high, 1234, draw)
    for sigma, following in itertools.pairwise(sigmas):
        middle = (sigma * following).sqrt()
        for end in (middle, following):
            expected = theirs(sigma, end)
            assert torch.allclose(ours(sigma.item(), end.item()), expected, atol=1e-4)
            assert expected.std().item() == pytest.approx(1, abs=0.2)


def halved(low: float, high: float, seed: int, sigma: float) -> Tensor:
    """The motion up to ``sigma``, halved from the whole way down with the noise of one seed after the other."""

    def noise(*key: int) -> Tensor:
        drawn = np.random.SeedSequence(seed, spawn_key=key, pool_size=24).generate_state(1)[0]
        return Nvidia(int(drawn))((1, 4, 8, 8)).double()

    start, end, place, depth = round(low, 6), round(high, 6), 0, 0
    change = noise() * math.sqrt(high - low)
    before = change * 0
    while sigma not in (start, end):
        middle = round((start + end) / 2, 6)
        left, right = middle - start, end - middle
        first = change * (left / (end - start)) + noise(place, depth) * math.sqrt(left * right / (end - start))
        place, depth = 2 * place, depth + 1
        if sigma < middle:
            end, change = middle, first
        else:
            start, place, before, change = middle, place + 1, before + first, change - first
    return before if sigma == start else before + change


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_not_a_bit_of_brownian_noise_depends_on_how_it_is_computed(seed: int) -> None:
    sigmas = [4000.5, 80.0, *spacing(LEVELS, "dpmpp_sde", "karras", 8)[:-1]]
    motion = Brownian(sigmas[-1], sigmas[0], seed, partial(Nvidia.firsts, shape=(1, 4, 8, 8)))
    for sigma, following in itertools.pairwise(sigmas):
        for end in (math.sqrt(sigma * following), following):
            ends = (halved(sigmas[-1], sigmas[0], seed, round(level, 6)) for level in (end, sigma))
            expected = torch.sub(*ends) / math.sqrt(sigma - end)
            assert torch.equal(motion(sigma, end), expected.float())


def test_brownian_noise_between_halves_that_were_met_before_is_the_same() -> None:
    motion = Brownian(1, 9, 3, partial(Nvidia.firsts, shape=(1, 4, 8, 8)))
    for sigma, following in itertools.pairwise([9, 7.5, 7, 5, 3.25, 3, 2, 1, 7.25, 4]):
        ends = (halved(1, 9, 3, level) for level in (following, sigma))
        assert torch.equal(motion(sigma, following), (torch.sub(*ends) / math.sqrt(abs(sigma - following))).float())


def test_brownian_noise_is_the_same_whether_its_points_are_found_together_or_one_by_one() -> None:
    sigmas = spacing(LEVELS, "dpmpp_2m_sde", "exponential", 40)[:-1]
    draw = partial(Nvidia.firsts, shape=(1, 4, 8, 8))
    asked: list[int] = []
    counted = Brownian(sigmas[-1], sigmas[0], 3, lambda seeds: [asked.append(len(seeds)), draw(seeds)][1], sigmas)
    alone = Brownian(sigmas[-1], sigmas[0], 3, draw)
    steps = list(itertools.pairwise(sigmas))
    steps.insert(5, (sigmas[5], math.sqrt(sigmas[5] * sigmas[6])))  # as DPM++ SDE does: one that was not named before
    for sigma, following in steps:
        assert torch.equal(counted(sigma, following), alone(sigma, following))
    assert len(asked) < 8 < max(asked)  # so it was together


def test_brownian_noise_of_a_way_does_not_depend_on_its_steps() -> None:
    draw = partial(Cpu.firsts, shape=(1, 1, 16, 16))
    whole = Brownian(0.03, 14.6, 5, draw)(8, 2) * math.sqrt(6)
    parts = Brownian(0.03, 14.6, 5, draw)
    halves = parts(8, 4) * math.sqrt(4) + parts(4, 2) * math.sqrt(2)
    assert torch.allclose(whole, halves, atol=1e-5)
    assert not torch.allclose(whole, Brownian(0.03, 14.6, 6, draw)(8, 2) * math.sqrt(6), atol=0.1)
