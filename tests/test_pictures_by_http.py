"""A real service with the shipped model: pictures in, pictures out, by HTTP alone."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from semantics import COLOURS, asked, seen
from serving import Program, eventually, serving

from diffusion_api import images

PROMPT = "a large red circle on a blue background"
OTHER = "a large yellow square on a blue background"
FIELDS = {"model": "shapes", "steps": 10, "cfg_scale": 5, "seed": 3, "fileType": "png", "sampler_name": "Euler"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("shapes")
    with serving(home, engine="diffusers", device="cpu", shipped_models=True) as program:
        yield program


@pytest.fixture(scope="module")
def first(server: Program) -> Image.Image:
    """A picture of 128 pixels that the service drew."""
    return made(server, "/txt2img", prompt=PROMPT, width=128, height=128)


def result(server: Program, path: str, **fields: Any) -> dict[str, Any]:
    answer = server.request("POST", path, json=FIELDS | fields)
    assert answer.status_code == 200, answer.text
    return server.wait(answer.json()["job_id"])


def opened(status: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(status["image"]))).convert("RGB")


def made(server: Program, path: str, **fields: Any) -> Image.Image:
    return opened(result(server, path, **fields))


def b64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def close(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures, in levels."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


def test_hires_doubles_the_size_and_keeps_the_content(server: Program, first: Image.Image) -> None:
    hires = {"enabled": True, "scale": 2, "upscaler": "Latent", "steps": 6, "denoising_strength": 0.4}
    large = made(server, "/txt2img", prompt=PROMPT, width=128, height=128, hires=hires)
    assert large.size == (256, 256)
    assert seen(np.asarray(large)).agrees(asked(PROMPT), shape=True)
    assert close(large.resize((128, 128), Image.Resampling.BOX), first) < 20


def test_a_picture_without_any_size_keeps_its_own(server: Program) -> None:
    drawn = Image.new("RGB", (136, 104), COLOURS["blue"])
    ImageDraw.Draw(drawn).ellipse((38, 22, 98, 82), fill=COLOURS["green"])
    kept = made(server, "/img2img", prompt=PROMPT, image=b64(drawn), denoising_strength=0.1)
    assert kept.size == (136, 104)
    assert seen(np.asarray(kept)).colour == "green"
    assert close(kept, drawn) < 12


def test_inpainting_leaves_every_pixel_outside_the_blurred_mask_as_it_was(server: Program, first: Image.Image) -> None:
    mask = Image.new("L", first.size)
    ImageDraw.Draw(mask).rectangle((64, 0, 127, 127), fill=255)
    fields = {"prompt": OTHER, "image": b64(first), "mask": b64(mask), "denoising_strength": 0.95, "mask_blur": 4}
    anew = made(server, "/inpaint", **fields)
    assert anew.size == first.size
    reach = int(2.5 * 4 + 0.5)
    before, after = (np.asarray(image)[:, : 64 - reach] for image in (first, anew))
    assert np.array_equal(before, after)
    assert close(first.crop((72, 0, 128, 128)), anew.crop((72, 0, 128, 128))) > 10


def test_only_what_is_masked_is_drawn_at_its_own_size_and_pasted_back(server: Program, first: Image.Image) -> None:
    mask = Image.new("RGBA", first.size)
    ImageDraw.Draw(mask).rectangle((88, 88, 120, 120), fill=(0, 0, 0, 255))
    fields = {"image": b64(first), "mask": b64(mask), "mask_blur": 0, "only_masked": True, "mask_padding": 0}
    anew = made(server, "/inpaint", prompt=OTHER, width=64, height=64, denoising_strength=1, **fields)
    differs = np.any(np.asarray(first) != np.asarray(anew), axis=2)
    rows, columns = np.nonzero(differs)
    assert (rows.min() >= 88, columns.min() >= 88, rows.max() <= 120, columns.max() <= 120) == (True,) * 4
    assert differs.mean() > 0.02


@pytest.mark.parametrize("path", ["/img2img", "/inpaint"])
def test_the_infotext_and_the_same_picture_make_the_same_pixels(server: Program, first: Image.Image, path: str) -> None:
    mask = Image.new("L", first.size, 255)
    pictures = {"image": b64(first)} | ({"mask": b64(mask.crop((0, 0, 128, 128)))} if path == "/inpaint" else {})
    asked_for = {
        "prompt": OTHER,
        "denoising_strength": 0.65,
        "resize_by": 0.75,
        "resize_mode": "crop and resize",
        "sampler_name": "Euler a",
        "initial_noise_multiplier": 1.05,
        "mask_blur": 0,
        "mask_fill": "original",
        "tiling": True,
        "loras": ["shapes-ink"],
        "apply_loras": True,
    }
    status = result(server, path, **asked_for, **pictures)
    text = images.read_infotext(base64.b64decode(status["image"]))
    answer = server.request("POST", path, json={"infotext": text, "fileType": "png"} | pictures)
    assert answer.status_code == 200, answer.text
    again = server.wait(answer.json()["job_id"])
    assert answer.json()["warnings"] == []
    assert np.array_equal(np.asarray(opened(status)), np.asarray(opened(again)))
    assert images.read_infotext(base64.b64decode(again["image"])) == text


def test_the_preview_of_a_running_job_shows_what_it_draws(server: Program) -> None:
    fields = {"prompt": PROMPT, "width": 128, "height": 128, "steps": 30, "preview_every": 1}
    job_id = server.submit(**FIELDS | fields)
    shown = eventually(lambda: server.status(job_id).get("preview"), "a preview")
    small = Image.open(io.BytesIO(base64.b64decode(shown)))
    assert (small.format, max(small.size) <= 128) == ("JPEG", True)
    assert "preview" not in server.wait(job_id)


def test_a_picture_is_upscaled_by_the_shipped_model(server: Program, first: Image.Image) -> None:
    names = [row["name"] for row in server.get("/upscalers").json()["upscalers"] if row["type"] == "external"]
    status = result(server, "/upscale", image=b64(first), upscaler=names[0], scale=2)
    assert opened(status).size == (256, 256)
    assert seen(np.asarray(opened(status))).agrees(asked(PROMPT), shape=True)
    assert status["current_phase"] == "done"


def test_a_picture_that_the_installed_checker_flags_is_blurred_where_that_is_asked(
    server: Program, first: Image.Image
) -> None:
    """``tests/engine/test_safety.py`` has the rest."""
    import checkers  # torch: others here have no need of it

    other = made(server, "/txt2img", prompt=OTHER, width=128, height=128)
    installed = server.home / "stable_diffusion" / "safety_checker"
    checkers.save(checkers.checker(np.asarray(first), [np.asarray(other)]), installed)
    asked_for = {"width": 128, "height": 128, "safety_filter": True}
    statuses = [result(server, "/txt2img", prompt=prompt, **asked_for) for prompt in (PROMPT, OTHER)]
    shutil.rmtree(installed)
    assert [status["safety"] for status in statuses] == [
        {"applied": "blur", "flagged": [True]},
        {"applied": "blur", "flagged": [False]},
    ]
    blurred, untouched = map(opened, statuses)
    assert close(untouched, other) == 0
    steps = [np.abs(np.diff(np.asarray(image, np.float64), axis=1)).max() for image in (first, blurred)]
    assert steps[1] < steps[0] / 10


# what the tests of the original API expect of real pictures


def test_the_first_pass_ends_at_half_and_the_second_begins_there(server: Program) -> None:
    hires = {"enabled": True, "scale": 1.5, "upscaler": "Latent", "steps": 6, "denoising_strength": 0.9}
    job_id = server.submit(**FIELDS | {"prompt": PROMPT, "width": 128, "height": 128, "hires": hires})
    told: list[dict[str, Any]] = []

    def ended() -> bool:
        told.append(server.status(job_id))
        return bool(told[-1]["state"] in ("done", "error"))

    eventually(ended, "the picture")
    progress = [status["progress"] for status in told]
    assert progress == sorted(progress)
    passes = {
        phase: {status["progress"] for status in told if status["current_phase"] == phase}
        for phase in ("initial generation", "upscaling")
    }
    assert all(passes.values()), "no status was read while a pass ran"
    assert max(passes["initial generation"]) <= 50 <= min(passes["upscaling"])
    assert (told[-1]["state"], told[-1]["width"]) == ("done", 192)


def test_a_low_strength_keeps_the_picture_the_less_the_higher_it_is(server: Program, first: Image.Image) -> None:
    """Of test_image_preservation, with its strengths and the likeness that it has for each."""
    found = []
    for strength, likeness in ((0.05, 0.9), (0.1, 0.8), (0.3, 0.5)):
        asked_for = {"image": b64(first), "prompt": PROMPT, "denoising_strength": strength, "steps": 25}
        second = made(server, "/img2img", **asked_for)
        assert second.size == first.size
        found.append(alike(first, second))
        assert found[-1] >= likeness
    other = made(server, "/img2img", image=b64(first), prompt=OTHER, denoising_strength=0.95)
    found.append(alike(first, other))
    assert found == sorted(found, reverse=True), found
    assert found[-1] < 0.8 < found[-2], found


def alike(one: Image.Image, other: Image.Image) -> float:
    """The mean structural similarity of two pictures in grey (Wang et al. 2004), over squares of 8 pixels; 1 if equal."""
    x, y = (
        np.asarray(image.convert("L"), np.float64).reshape(image.height // 8, 8, image.width // 8, 8).swapaxes(1, 2)
        for image in (one, other)
    )
    mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
    both = (x * y).mean((2, 3)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * both + c2) / (x.var((2, 3)) + y.var((2, 3)) + c2)
    return float((light * structure).mean())


def test_the_device_that_draws_is_told_in_the_words_of_the_original(server: Program) -> None:
    """Of test_gpu_detection; the service of these tests was told to take the CPU."""
    gpu = server.get("/health").json()["gpu"]
    assert gpu == {"cuda_available": False, "mps_available": False, "device_name": "CPU"}


SMALL = {
    "model": "shapes",
    "width": 64,
    "height": 64,
    "steps": 4,
    "sampler_name": "Euler a",
    "scheduler_type": "karras",
}
KINDS: dict[str, dict[str, Any]] = {
    "words": {"negative_prompt": "blurry", "cfg_scale": 5.5},
    "a second pass": {"hires": {"enabled": True, "scale": 1.5, "steps": 3, "denoising_strength": 0.6}},
    "a second pass after an upscaler": {
        "hires": {
            "enabled": True,
            "width": 96,
            "height": 104,
            "upscaler": "shapes-2x",
            "steps": 2,
            "prompt": "a blue ring",
        }
    },
    "a refiner": {"model": "shapes-xl", "refiner_checkpoint": "shapes-xl-refiner", "refiner_switch_at": 0.5},
    "a LoRA in the prompt": {"prompt": f"{PROMPT} <lora:shapes-ink:0.7>"},
    "LoRAs in a list": {"loras": [{"name": "shapes-ink", "scale": 0.8, "text_scale": 0.25}]},
    "a variation": {"variation_seed": 9, "variation_strength": 0.3, "rng": "cpu", "ensd": 5},
    "weights and schedules": {
        "prompt": "a [red:(blue:1.3):0.5] circle AND a large star :0.4",
        "clip_skip": 2,
        "tiling": True,
    },
    "a sampler's options": {"sampler_name": "DPM++ 2M SDE", "scheduler_type": "polyexponential", "rho": 2, "eta": 0.5},
}


def pixels(status: dict[str, Any], number: int = 0) -> bytes:
    data = base64.b64decode((status.get("images") or [status["image"]])[number])
    return images.decode(data, max_pixels=2**24).convert("RGB").tobytes()


def posted_back(server: Program, status: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """What the picture of a job makes when it is all that is posted, in its own format."""
    picture = (status.get("images") or [status["image"]])[number]
    answer = server.request("POST", "/txt2img", json={"image": picture, "fileType": status["file_type"]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == []
    return server.wait(answer.json()["job_id"])


@pytest.fixture(scope="module")
def plain(server: Program) -> bytes:
    """The pixels of a request that asks for nothing special."""
    return pixels(result(server, "/txt2img", **{"prompt": PROMPT} | SMALL))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_posted_back_makes_itself_again(server: Program, plain: bytes, kind: str) -> None:
    first = result(server, "/txt2img", **{"prompt": PROMPT} | SMALL | KINDS[kind])
    assert first.get("loras_skipped", []) == []
    assert pixels(posted_back(server, first)) == pixels(first) != plain


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "avif", "gif"])
def test_a_picture_of_any_format_that_is_posted_back_makes_itself_again(server: Program, format: str) -> None:
    first = result(server, "/txt2img", **{"prompt": PROMPT} | SMALL | {"fileType": format, "n": 2})
    for number in range(2):
        again = posted_back(server, first, number)
        assert again["seed"] == first["seed"] + number
        assert pixels(again) == pixels(first, number)
    assert pixels(first, 0) != pixels(first, 1)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/img2img", {"denoising_strength": 0.6, "resize_mode": "crop and resize", "width": 72, "height": 64}),
        ("/inpaint", {"denoising_strength": 0.9, "mask_blur": 2, "mask_fill": "original"}),
        ("/inpaint", {"denoising_strength": 0.8, "only_masked": True, "mask_padding": 8, "mask_invert": True}),
    ],
)
def test_a_text_posted_with_the_picture_that_it_began_with_makes_the_same_again(
    server: Program, first: Image.Image, path: str, fields: dict[str, Any]
) -> None:
    mask = Image.new("L", first.size)
    ImageDraw.Draw(mask).rectangle((32, 32, 96, 96), fill=255)
    brought = {"image": b64(first)} | ({"mask": b64(mask)} if path == "/inpaint" else {})
    done = result(server, path, **{"prompt": OTHER, "steps": 6} | fields | brought)
    text = server.request("POST", "/img-info", json={"image": done["image"]}).json()["info"]
    answer = server.request("POST", path, json={"infotext": text, "fileType": "png"} | brought)
    assert answer.status_code == 200, answer.text
    assert pixels(server.wait(answer.json()["job_id"])) == pixels(done)


def test_an_enlarged_picture_is_refused_where_words_are_drawn(server: Program, first: Image.Image) -> None:
    done = result(server, "/upscale", image=b64(first), model=None, upscaler="shapes-2x")
    answer = server.request("POST", "/txt2img", json={"image": done["image"]})
    assert answer.status_code == 400
    assert "POST /upscale takes that" in answer.json()["error"]


@pytest.mark.chaos
def test_a_low_strength_keeps_a_picture_of_512_pixels(server: Program) -> None:
    """Of test_image_preservation and test_simple_preservation: their size, steps, strengths and likenesses."""
    drawn = Image.new("RGB", (512, 512), COLOURS["blue"])
    ImageDraw.Draw(drawn).ellipse((128, 128, 384, 384), fill=COLOURS["red"])
    for strength, least in ((0.05, 0.9), (0.1, 0.8), (0.3, 0.5)):
        kept = made(server, "/img2img", prompt=PROMPT, image=b64(drawn), denoising_strength=strength, steps=25)
        assert kept.size == (512, 512)
        assert alike(kept, drawn) >= least, strength
