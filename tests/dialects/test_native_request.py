"""What a body means as a request: infotext, styles and the names that A1111 gives to things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_models import diffusers_folder, transformer_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_api.catalog import samplers
from diffusion_api.catalog.library import Library
from diffusion_api.catalog.upscalers import INTERNAL
from diffusion_api.dialects.native.bodies import Img2ImgBody, Txt2ImgBody
from diffusion_api.dialects.native.examples import PICTURE
from diffusion_api.dialects.native.pictures import img2img, inpaint
from diffusion_api.dialects.native.requests import txt2img
from diffusion_api.engine.stub import StubEngine
from diffusion_api.errors import InvalidRequest, TooLarge, UnknownModel, UnknownSampler
from diffusion_api.infotext import for_request
from diffusion_api.outputs import Outputs
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.request import MAX_SEED, Img2Img, Mask, Refiner, Txt2Img
from diffusion_api.service import Service
from diffusion_api.settings import Settings


@contextmanager
def serving(home: Path, **options: Any) -> Iterator[Service]:
    """A service on that home, with one model, ``small``."""
    settings = Settings(home=home, **options)
    settings.create_folders()
    diffusers_folder(settings.models_dir / "small")
    queue, outputs = MemoryQueue(), Outputs(settings.outputs_dir)
    yield Service(settings, Library(home, settings.models_dir), queue, outputs, StubEngine())
    queue.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one model, ``small``."""
    with serving(tmp_path_factory.mktemp("home")) as service:
        yield service


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that has an SDXL model ``xl``, its ``xl-refiner`` and a ``flux`` too."""
    home = tmp_path_factory.mktemp("rich")
    with serving(home) as service:
        models = service.settings.models_dir
        diffusers_folder(models / "xl", pipeline="StableDiffusionXLPipeline")
        bare = {"text_encoder": [None, None]}
        diffusers_folder(models / "xl-refiner", pipeline="StableDiffusionXLImg2ImgPipeline", index=bare)
        transformer_folder(models / "flux")
        yield service


def meant(service: Service, **fields: Any) -> tuple[Txt2Img, list[str]]:
    found = txt2img(Txt2ImgBody.model_validate(fields), service)
    return found.request, found.warnings


def written(request: Txt2Img | Img2Img, number: int = 0) -> str:
    return for_request(
        request,
        number=number,
        sampler_label=samplers.sampler(request.sampler).label,
        schedule_label=samplers.schedule(request.schedule).label,
        model_name=request.model,
        model_hash=None,
        version="DiffusionAPI v0.1.0",
    )


SEEDS = st.integers(0, MAX_SEED)
NUMBERS = st.floats(0, 1e6)
PROMPTS = (
    st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]))
    .map(lambda text: "\n".join(line.strip() for line in text.split("\n")).strip())
    .filter(lambda text: "Negative prompt:" not in text and "\r" not in text)
)
BODIES = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 150),
        "cfg_scale": st.floats(0, 100),
        "width": st.integers(2, 64).map(lambda n: 8 * n),
        "height": st.integers(2, 64).map(lambda n: 8 * n),
        "sampler_name": st.sampled_from([row.label for row in samplers.SAMPLERS]),
        "scheduler_type": st.sampled_from([None, *samplers.scheduler_types()]),
        "seed": SEEDS,
    },
    optional={
        "prompt": PROMPTS,
        "negative_prompt": PROMPTS,
        "rng": st.sampled_from(["nv", "cpu"]),
        "variation_seed": SEEDS,
        "variation_strength": st.floats(0, 1),
        "seed_resize_width": st.integers(0, 2000),
        "seed_resize_height": st.integers(0, 2000),
        "ensd": st.integers(-MAX_SEED, MAX_SEED),
        "eta": NUMBERS,
        "s_churn": NUMBERS,
        "s_tmin": NUMBERS,
        "s_tmax": NUMBERS,
        "s_noise": NUMBERS,
        "discard_next_to_last_sigma": st.booleans(),
        "sigma_min": st.just(0) | st.floats(0.001, 0.1, exclude_max=True),
        "sigma_max": st.just(0) | st.floats(0.1, 5000),
        "rho": st.just(0) | st.floats(0.1, 100),
        "guidance_rescale": st.floats(0, 1),
        "clip_skip": st.integers(1, 12),
        "tiling": st.booleans(),
        "emphasis": st.sampled_from(["original", "no norm", "ignore", "none"]),
        "hires": st.fixed_dictionaries(
            {"enabled": st.just(True)},
            optional={
                "scale": st.floats(0.5, 3),
                "width": st.integers(1, 200).map(lambda n: 8 * n),
                "height": st.integers(1, 200).map(lambda n: 8 * n),
                "upscaler": st.sampled_from(list(INTERNAL)),
                "steps": st.integers(0, 150),
                "denoising_strength": st.floats(0.01, 1),
                "sampler_name": st.sampled_from([row.label for row in samplers.SAMPLERS]),
                "prompt": PROMPTS,
                "negative_prompt": PROMPTS,
            },
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(fields=BODIES, number=st.integers(0, 2))
def test_the_infotext_of_a_picture_asks_for_it_again(service: Service, fields: dict[str, Any], number: int) -> None:
    request, _ = meant(service, **fields, n=3)
    again, warnings = meant(service, infotext=written(request, number))
    seeds = {"seed": request.seeds[number], "variation_seed": request.variation_seeds[number], "count": 1}
    assert again == request.model_copy(update=seeds)
    assert warnings == []


def drawn_over(service: Service, **fields: Any) -> tuple[Img2Img, list[str]]:
    body = Img2ImgBody.model_validate({"image": PICTURE, "mask": PICTURE} | fields)
    found = inpaint(body, service, {})
    return found.request, found.warnings


OVER = st.fixed_dictionaries(
    {
        "prompt": PROMPTS.filter(bool),
        "denoising_strength": st.floats(0, 1),
        "width": st.integers(2, 64).map(lambda n: 8 * n),
        "height": st.integers(2, 64).map(lambda n: 8 * n),
        "seed": SEEDS,
    },
    optional={
        "resize_mode": st.sampled_from(["just resize", "crop and resize", "resize and fill", "latent"]),
        "initial_noise_multiplier": st.floats(0, 2),
        "mask_blur": st.floats(0, 256),
        "mask_invert": st.booleans(),
        "mask_fill": st.sampled_from(["fill", "original", "latent noise", "latent nothing"]),
        "tiling": st.booleans(),
    },
)


@settings(max_examples=60, deadline=None)
@given(fields=OVER, padding=st.none() | st.integers(0, 2048))
def test_the_infotext_of_a_picture_from_a_picture_asks_for_it_again(
    service: Service, fields: dict[str, Any], padding: int | None
) -> None:
    box = {} if padding is None else {"only_masked": True, "mask_padding": padding}
    request, _ = drawn_over(service, **fields, **box)
    assert drawn_over(service, infotext=written(request)) == (request, [])


@pytest.mark.parametrize(("operator", "body", "applied"), [(True, None, 1), (True, False, 0), (False, True, 1)])
def test_the_body_goes_before_the_operator_in_what_loras_do(
    tmp_path: Path, operator: bool, body: bool | None, applied: int
) -> None:
    with serving(tmp_path, apply_loras=operator) as service:
        asked = {"prompt": "a castle", "image": PICTURE, "loras": ["x"], "apply_loras": body}
        found = img2img(Img2ImgBody.model_validate(asked), service, {})
    assert len(found.request.loras) == applied


def test_what_was_said_of_the_mask_is_of_no_use_without_a_picture(service: Service) -> None:
    request, _ = drawn_over(service, prompt="a castle", seed=1)
    _, warnings = meant(service, infotext=written(request))
    assert warnings == [
        "infotext: Denoising strength, Mask blur, Masked content is not used here",
        "infotext: the picture began with another one, which is not in it; POST /img2img takes that",
    ]


def test_a_second_pass_is_of_no_use_with_a_picture(service: Service) -> None:
    request, _ = meant(service, prompt="a castle", hires={"enabled": True, "denoising_strength": 0.3})
    again, warnings = drawn_over(service, infotext=written(request))
    assert again.strength == 0.75
    assert warnings == ["infotext: Denoising strength, Hires upscale, Hires steps, Hires upscaler is not used here"]


def test_an_infotext_of_a1111_from_a_picture_means_what_it_leaves_out(service: Service) -> None:
    told = f"{A1111}, Denoising strength: 0.5, Mask blur: 8, Version: v1.10.1"
    request, warnings = drawn_over(service, infotext=told)
    assert (request.strength, warnings) == (0.5, [])
    assert request.mask == Mask(image=request.image, blur=8, fill="original")


@pytest.mark.parametrize(
    ("switch", "expected"),
    [(None, Refiner(model="xl-refiner", switch_at=0.8)), (0.5, Refiner(model="xl-refiner", switch_at=0.5))],
)
def test_a_refiner_takes_over_after_a_share_of_the_steps(
    rich: Service, switch: float | None, expected: Refiner
) -> None:
    asked = {"model": "xl", "seed": 1, "refiner_checkpoint": "XL Refiner", "refiner_switch_at": switch}
    for means in (meant, drawn_over):
        request, warnings = means(rich, prompt="a castle", **asked)
        assert (request.refiner, warnings) == (expected, [])
        assert means(rich, infotext=written(request)) == (request, [])


def test_a_refiner_that_is_to_draw_alone_is_told(rich: Service) -> None:
    (warning,) = txt2img(Txt2ImgBody(prompt="a ring", model="xl-refiner", seed=1), rich).warnings
    assert "'xl-refiner' is a refiner" in warning


@pytest.mark.parametrize(("model", "refiner", "none"), [("small", "xl-refiner", "small"), ("xl", "small", "small")])
def test_what_is_no_sdxl_model_is_not_refined_and_refines_nothing(
    rich: Service, model: str, refiner: str, none: str
) -> None:
    request, warnings = meant(rich, prompt="a castle", model=model, refiner_checkpoint=refiner)
    assert request.refiner is None
    assert any("refiner_checkpoint is ignored" in text and repr(none) in text for text in warnings)


def test_a_refiner_that_is_not_there_is_refused_with_its_field(rich: Service) -> None:
    with pytest.raises(UnknownModel, match="refiner_checkpoint: model 'x' is not installed") as refusal:
        meant(rich, model="xl", refiner_checkpoint="x")
    assert refusal.value.field == "refiner_checkpoint"


def test_a_model_that_draws_from_words_alone_takes_no_picture(rich: Service) -> None:
    with pytest.raises(InvalidRequest, match="image: model 'flux' is drawn by a pipeline of its own"):
        drawn_over(rich, prompt="a castle", model="flux")


A1111 = """a castle, (stone:1.2)
Negative prompt: fog
Steps: 12, Sampler: DPM++ 2M, CFG scale: 5.5, Seed: 99, Size: 256x192, Model hash: 0123456789, Model: small"""


def test_an_infotext_of_a1111_without_a_source_means_the_noise_of_an_nvidia_gpu(service: Service) -> None:
    request, warnings = meant(service, infotext=A1111 + ", Version: v1.10.1")
    assert (request.rng, request.sampler, request.schedule) == ("nv", "dpmpp_2m", "karras")
    assert (request.prompt, request.negative_prompt) == ("a castle, (stone:1.2)", "fog")
    assert (request.steps, request.guidance_scale, request.seed) == (12, 5.5, 99)
    assert (request.width, request.height, request.model) == (256, 192, "small")
    assert warnings == []


@pytest.mark.parametrize(("key", "source"), [("CPU", "cpu"), ("NV", "nv"), ("GPU", "nv")])
def test_the_source_of_an_infotext_is_taken(service: Service, key: str, source: str) -> None:
    assert meant(service, infotext=f"{A1111}, RNG: {key}")[0].rng == source


def test_the_combined_names_of_old_versions_are_read(service: Service) -> None:
    request, _ = meant(service, infotext="a\nSteps: 5, Sampler: Euler a Karras, Seed: 1")
    assert (request.sampler, request.schedule) == ("euler_a", "karras")


def test_without_a_schedule_an_infotext_means_the_samplers_own(service: Service) -> None:
    request, _ = meant(service, infotext="a\nSteps: 5, Sampler: Euler a, Seed: 1")
    assert request.schedule == "default"


def test_what_the_body_says_goes_before_its_infotext(service: Service) -> None:
    request, _ = meant(service, infotext=A1111, prompt="a ship", seed=1, cfg_scale=None, negative_prompt="")
    assert (request.prompt, request.negative_prompt, request.seed) == ("a ship", "", 1)
    assert request.guidance_scale == 5.5


def test_what_an_infotext_says_in_vain_is_told(service: Service) -> None:
    _, warnings = meant(service, infotext=A1111 + ", Hypertile U-Net: True, Soft inpainting: True, Version: v1.10.1")
    assert warnings == ["infotext: Hypertile U-Net, Soft inpainting is not used here"]


def test_a_text_without_fields_is_a_prompt(service: Service) -> None:
    request, _ = meant(service, infotext="a castle")
    assert (request.prompt, request.steps) == ("a castle", 30)


def test_a_model_that_the_body_names_must_be_there(service: Service) -> None:
    with pytest.raises(InvalidRequest, match="'other'"):
        meant(service, infotext=A1111, model="other")


@pytest.mark.parametrize(
    ("field", "said"),
    [("Steps: many", "steps is 'many'"), ("Seed: 99999999999", "seed is 99999999999"), ("RNG: dice", "rng is 'dice'")],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_field(service: Service, field: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        meant(service, infotext=f"{A1111}, {field}")


def test_a_sampler_that_is_not_known_is_refused_with_the_choices(service: Service) -> None:
    with pytest.raises(UnknownSampler, match="Euler a"):
        meant(service, infotext=A1111.replace("DPM++ 2M", "Heunish"))


def test_an_infotext_of_a1111_says_between_which_levels_and_how_a_schedule_runs(service: Service) -> None:
    text = f"{A1111}, Schedule max sigma: 10.5, Schedule min sigma: 0.1, Schedule rho: 5"
    request, warnings = meant(service, infotext=text)
    assert (request.sigma_min, request.sigma_max, request.rho) == (0.1, 10.5, 5)
    assert warnings == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sigma_min": 1e-5}, "sigma_min is 1e-05: it may be 0.001 to 10, or 0 for the schedule's own"),
        ({"sigma_max": 6000}, "sigma_max is 6000.0: it may be 0.1 to 5000, or 0 for the schedule's own"),
        ({"sigma_min": 2, "sigma_max": 1}, "sigma_max is 1.0: it must be more than sigma_min, 2"),
        ({"rho": 0.01}, "rho is 0.01: it may be 0.1 to 100, or 0 for the schedule's own"),
    ],
)
def test_levels_that_make_no_schedule_are_refused(service: Service, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        meant(service, **fields)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"subseed": 5, "subseed_strength": 0.5}, {"variation_seed": 5, "variation_strength": 0.5}),
        (
            {"seed_resize_from_w": 70, "seed_resize_from_h": 64},
            {"seed_resize_width": 64, "seed_resize_height": 64},
        ),
        ({"seed_resize_from_w": -1, "seed_resize_from_h": -1}, {"seed_resize_width": 0, "seed_resize_height": 0}),
        ({"CLIP_stop_at_last_layers": 2}, {"clip_skip": 2}),
        ({"eta_noise_seed_delta": 31337}, {"ensd": 31337}),
        ({"randn_source": "GPU"}, {"rng": "nv"}),
        ({"randn_source": "CPU"}, {"rng": "cpu"}),
        ({"always_discard_next_to_last_sigma": True}, {"discard_next_to_last_sigma": True}),
        ({"emphasis": "No norm"}, {"emphasis": "no norm"}),
        ({"subseed": 5, "subseed_strength": 0}, {"variation_seed": None, "variation_strength": 0}),
    ],
)
def test_a1111s_names_are_understood(service: Service, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    request, warnings = meant(service, **theirs)
    assert {name: getattr(request, name) for name in ours} == ours
    assert warnings == []


def test_a_variation_without_a_seed_draws_one(service: Service) -> None:
    drawn = {meant(service, subseed_strength=0.1, subseed=-1)[0].variation_seed for _ in range(5)}
    assert None not in drawn
    assert len(drawn) > 1


def test_a_variation_seed_beyond_the_range_is_refused_by_its_name(service: Service) -> None:
    with pytest.raises(InvalidRequest, match="variation_seed is 4294967296"):
        meant(service, variation_strength=0.1, variation_seed=2**32)


@pytest.fixture
def styled(service: Service) -> Service:
    (service.settings.home / "styles.csv").write_text(
        'name,prompt,negative_prompt\noil,oil painting,photo\nin oil,"an oil painting of {prompt}",\ntwice,{prompt}{prompt},\n'
    )
    return service


def test_styles_are_put_around_the_prompts_in_their_order(styled: Service) -> None:
    request, warnings = meant(styled, prompt="a cat # (black)", negative_prompt="fog", styles=["oil", "in oil"])
    assert (request.prompt, request.negative_prompt) == ("an oil painting of a cat, oil painting", "fog, photo")
    assert warnings == []


def test_styles_are_put_around_the_words_of_a_second_pass_too(styled: Service) -> None:
    words = {"prompt": "a cat", "negative_prompt": "fog", "styles": ["oil"]}
    same, own = (
        meant(styled, **words, hires={"enabled": True, **hires})[0].hires for hires in ({}, {"prompt": "a dog # (red)"})
    )
    assert same
    assert own
    assert (same.prompt, same.negative_prompt) == ("a cat, oil painting", "fog, photo")
    assert (own.prompt, own.negative_prompt) == ("a dog, oil painting", "fog, photo")


def test_a_style_that_is_not_known_is_skipped_with_the_nearest_name(styled: Service) -> None:
    request, warnings = meant(styled, prompt="a cat", styles=["oill", "oil", "x" * 200])
    assert request.prompt == "a cat, oil painting"
    assert warnings[0] == "style 'oill' is not known and was skipped; did you mean 'oil'?"
    assert len(warnings[1]) < 200


def test_styles_cannot_make_a_prompt_beyond_the_limit(styled: Service) -> None:
    with pytest.raises(TooLarge, match="at most 20000"):
        meant(styled, prompt="a cat", styles=["twice"] * 100)


def test_without_styles_a_prompt_stays_as_it_was_sent(service: Service) -> None:
    assert meant(service, prompt=" a cat # (black)")[0].prompt == " a cat # (black)"


def test_hires_is_twice_the_size_with_what_is_left_out_as_in_the_first_pass(service: Service) -> None:
    request, warnings = meant(service, width=128, height=96, prompt="a", hires={"enabled": True, "upscaler": "lanczos"})
    assert request.hires is not None
    assert (request.hires.width, request.hires.height, request.hires.upscaler) == (256, 192, "Lanczos")
    assert (request.hires.steps, request.hires.strength, request.hires.prompt) == (20, 0.4, "a")
    assert (request.hires.model, request.hires.sampler) == (request.model, request.sampler)
    assert warnings == []


def test_a_second_pass_that_is_no_larger_is_left_out_and_told(service: Service) -> None:
    request, warnings = meant(service, width=128, height=128, hires={"enabled": True, "scale": 1})
    assert request.hires is None
    assert "hires is left out: 128x128" in warnings[0]


def test_an_infotext_of_a1111_with_hires_asks_for_both_passes(service: Service) -> None:
    text = (
        A1111
        + ", Denoising strength: 0.55, Hires upscale: 1.5, Hires upscaler: Latent (nearest-exact), Version: v1.10.1"
    )
    request, warnings = meant(service, infotext=text)
    assert request.hires is not None
    assert (request.hires.width, request.hires.height, request.hires.strength) == (384, 288, 0.55)
    assert (request.hires.upscaler, request.hires.steps) == ("Latent (nearest-exact)", 12)
    assert warnings == []


def test_a_second_pass_that_is_not_enabled_is_left_out_and_told(service: Service) -> None:
    request, warnings = meant(service, hires={"scale": 2})
    assert request.hires is None
    assert warnings == ['hires is left out: it is not enabled; add "enabled": true']
    assert meant(service, hires={"enabled": False, "scale": 2})[1] == []


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (", Hires upscale: 2, Hires upscaler: R-ESRGAN 4x+", "upscaler 'R-ESRGAN 4x+' is not installed; none is"),
        (", Sampler: Foo", "sampler_name 'Foo' is not known"),
    ],
)
def test_what_an_infotext_names_in_vain_is_refused_by_that(service: Service, told: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^infotext: ") as caught:
        meant(service, infotext=A1111 + told)
    assert reason in str(caught.value)
