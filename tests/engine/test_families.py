"""Model families against diffusers' own pipelines: the same noise and steps give the same latents. With small random models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from asking import request
from ldm_layout import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_api.catalog.detect import file_family, folder_family
from diffusion_api.engine import denoise, devices
from diffusion_api.engine.estimate import Measures
from diffusion_api.engine.executor import _computed
from diffusion_api.engine.families.base import UNetLane
from diffusion_api.engine.families.sd2 import SD2
from diffusion_api.engine.noise import streams
from diffusion_api.engine.plan import Pass, plan
from diffusion_api.engine.samplers.sigmas import ALMOST_NOTHING
from diffusion_api.engine.text import Conditioning
from diffusion_api.engine.weights import FAMILIES
from diffusion_api.schema.request import Txt2Img
from diffusion_api.settings import DATA

CLOSE = 1e-4
CPU = devices.choose("cpu")
SIZE = {"width": 64, "height": 96}


def asked(**changes: object) -> Txt2Img:
    """Ten steps at timesteps that are whole numbers, where diffusers and k-diffusion have the same levels."""
    return request(**SIZE | {"steps": 10, "sampler": "euler", "schedule": "default"} | changes)  # type: ignore[arg-type]


def stage(wanted: Txt2Img) -> Pass:
    (only,) = plan(wanted)
    return only


def latents(lane: Any, wanted: Txt2Img) -> Tensor:
    """The latents that a lane makes of a request."""
    asks = denoise.denoised(denoise.Seat(lane), stage(wanted), lambda progress: None, lambda: None)
    answer = None
    with torch.inference_mode():
        while True:
            try:
                answer = _computed(asks.send(answer), Measures())
            except StopIteration as end:
                found: Tensor = end.value[0]
                return found


def diffusers_latents(pipeline: Any, lane: Any, wanted: Txt2Img, **options: Any) -> Tensor:
    """The latents that diffusers makes of the same request and noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise, _ = streams(stage(wanted), lane.latent_shape)
    found: Tensor = pipeline(
        wanted.prompt, negative_prompt=wanted.negative_prompt or None, num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale, output_type="latent", **{"latents": noise.clone(), **SIZE, **options},
    ).images  # fmt: skip
    return found


def loaded(folder: Path, **options: Any) -> UNetLane:
    family, _ = folder_family(folder)
    return FAMILIES[family].from_folder(folder, CPU, **options)


def single(folder: Path, path: Path) -> UNetLane:
    """The model of a folder, written as a single file and loaded from that."""
    family, _ = folder_family(folder)
    write_checkpoint(folder, DATA / "clip" / "vocab.json", path, family)
    assert file_family(path)[0] == family
    return FAMILIES[family].from_checkpoint(path, DATA / "clip", CPU)


@pytest.mark.parametrize("scheduler", [{}, {"rescale_betas_zero_snr": True}], ids=["v", "zero terminal SNR"])
def test_sd2_that_predicts_v_is_the_pipeline_of_diffusers(tmp_path: Path, scheduler: dict[str, object]) -> None:
    pipeline = tiny.pipeline("sd2", prediction_type="v_prediction", **scheduler)
    lane = loaded(tiny.save(pipeline, tmp_path / "model"))
    if scheduler:
        # diffusers puts 2^-24 where Algorithm 1 has 0 and the level would be infinite; A1111 another number.
        pipeline.scheduler.alphas_cumprod[-1] = ALMOST_NOTHING
    wanted = asked(negative_prompt="green")
    theirs = diffusers_latents(pipeline, lane, wanted)
    assert torch.allclose(latents(lane, wanted), theirs, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("negative", ["", "green"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sdxl_is_the_pipeline_of_diffusers(tmp_path: Path, negative: str, prediction: str) -> None:
    pipeline = tiny.pipeline("sdxl", prediction_type=prediction)
    lane = loaded(tiny.save(pipeline, tmp_path / "model"))
    wanted = asked(negative_prompt=negative)
    assert torch.allclose(latents(lane, wanted), diffusers_latents(pipeline, lane, wanted), atol=CLOSE, rtol=0)


def test_the_refiner_is_the_pipeline_of_diffusers(tmp_path: Path) -> None:
    pipeline = tiny.pipeline("sdxl-refiner")
    lane = loaded(tiny.save(pipeline, tmp_path / "model"))
    wanted = asked(negative_prompt="green", rng="cpu")
    empty = torch.zeros(lane.latent_shape(**SIZE))
    theirs = diffusers_latents(
        pipeline, lane, wanted, image=empty, strength=1, generator=torch.Generator().manual_seed(1), latents=None,
        width=None, height=None, original_size=(96, 64), target_size=(96, 64),
    )  # fmt: skip
    assert torch.allclose(latents(lane, wanted), theirs, atol=CLOSE, rtol=0)


def test_an_inpainting_model_is_the_pipeline_of_diffusers_with_everything_masked(tmp_path: Path) -> None:
    pipeline = tiny.pipeline("sd1", inpainting=True)
    lane = loaded(tiny.save(pipeline, tmp_path / "model"))
    wanted = asked(negative_prompt="green")
    with torch.inference_mode():
        extra = lane.blank(**SIZE)
    assert extra is not None
    theirs = diffusers_latents(
        pipeline, lane, wanted, image=torch.zeros(1, 3, 96, 64), mask_image=torch.ones(1, 1, 96, 64), strength=1.0,
        masked_image_latents=extra[:, 1:],
    )  # fmt: skip
    assert extra[:, 0].eq(1).all()
    assert torch.allclose(latents(lane, wanted), theirs, atol=CLOSE, rtol=0)


def test_what_an_inpainting_model_reads_of_a_picture_is_what_diffusers_has_it_read(tmp_path: Path) -> None:
    pipeline = tiny.pipeline("sd1", inpainting=True)
    lane = loaded(tiny.save(pipeline, tmp_path / "model"))
    picture = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 96, 64)
    mask[:, :, 32:] = 1
    with torch.inference_mode():
        extra = lane.masked(picture, mask)
        hidden = pipeline.vae.encode(picture * (mask < 0.5)).latent_dist.mode() * pipeline.vae.config.scaling_factor
        small, latents = pipeline.prepare_mask_latents(
            mask, hidden, 1, 96, 64, torch.float32, torch.device("cpu"), None, do_classifier_free_guidance=False
        )
    assert extra is not None
    assert torch.equal(extra, torch.cat([small, latents], 1))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", {"inpainting": True}),
        ("sd2", {"prediction_type": "v_prediction"}),
        ("sdxl", {}),
        ("sdxl-refiner", {}),
    ],
)
def test_a_single_file_is_the_model_of_its_folder_to_the_last_bit(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    folder = tiny.save(tiny.pipeline(family, **options), tmp_path / "model")
    wanted = asked(steps=2, negative_prompt="green")
    assert torch.equal(latents(loaded(folder), wanted), latents(single(folder, tmp_path / "file.safetensors"), wanted))


def test_a_folder_in_shards_and_half_precision_variants_is_the_same_model(tmp_path: Path) -> None:
    folder = tiny.save(tiny.pipeline("sdxl"), tmp_path / "model")
    wanted = asked(steps=2)
    before = latents(loaded(folder), wanted)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = sorted(tensors := load_file(unet))
    for number, part in enumerate((names[:100], names[100:]), 1):
        shard = unet.with_name(f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shard)
    unet.unlink()
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part / "model.safetensors").rename(folder / part / "model.fp16.safetensors")
    assert torch.equal(latents(loaded(folder), wanted), before)


def test_the_operator_has_the_last_word_on_how_a_model_predicts(tmp_path: Path) -> None:
    folder = tiny.save(tiny.pipeline("sd2", prediction_type="v_prediction"), tmp_path / "model")
    told = {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    assert loaded(folder).levels.prediction == "v"
    assert loaded(folder).levels.highest < 15
    assert loaded(folder, schedule=told).levels.prediction == "epsilon"
    assert loaded(folder, schedule=told).levels.highest > 4000


class SaysV(SD2):
    """The same model, in other words: v in place of epsilon."""

    def predict(
        self, latents: Tensor, timestep: float, conditionings: Sequence[Conditioning], extra: Tensor | None = None
    ) -> Tensor:
        epsilon = super().predict(latents, timestep, conditionings, extra)
        sigma = self.levels.sigma(timestep)
        return (epsilon * (sigma**2 + 1) ** 0.5 - latents * sigma).float()


@pytest.mark.parametrize(("kind", "prediction"), [(SD2, "epsilon"), (SaysV, "v_prediction")])
def test_what_an_sd2_file_predicts_is_found_by_asking_it(kind: type[SD2], prediction: str) -> None:
    shapes = loaded(tiny.SHAPES)
    parts = {name: getattr(shapes, name) for name in ("unet", "vae", "levels", "device", "tokenizer", "text_encoder")}
    assert kind(**parts)._probed() == {"prediction_type": prediction}
