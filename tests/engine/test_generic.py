"""Pipelines of families without a lane of their own, on tiny folders with the structure of the published models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from asking import events, finished, request
from diffusers import (
    AutoPipelineForText2Image,
    FluxPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    ZImageModularPipeline,
)
from safetensors.torch import load_file, save_file

from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import Finished, Stop
from diffusion_api.engine.devices import Device
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.families.generic import Generic
from diffusion_api.engine.plan import plan
from diffusion_api.errors import Interrupted, InvalidRequest, ModelUnreadable, NotFinite, OutOfMemory, UnknownModel
from diffusion_api.schema.job import Progress
from diffusion_api.schema.request import LoraUse, Txt2Img
from diffusion_api.settings import DATA

CPU = Device(torch.device("cpu"), torch.float32)
GUIDANCE = {
    "flux": {"guidance_scale": 3.5},
    "flux2-klein": {"guidance_scale": 3.5},
    "sd35": {"guidance_scale": 3.5, "negative_prompt": "a dog"},
    "z-image": {"guidance_scale": 3.5, "negative_prompt": "a dog"},
    "qwen-image": {"true_cfg_scale": 3.5, "negative_prompt": "a dog"},
}
"""How each family is told what a request calls guidance_scale and negative_prompt."""

SIDES = {"A": (4, 32), "B": (32, 4)}
"""Shapes of a LoRA of rank 4 for a layer that is 32 wide."""

families = pytest.mark.parametrize("family", list(tiny_pipelines.PIPELINES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a family."""
    root = tmp_path_factory.mktemp("pipelines") / "models"
    for name, make in tiny_pipelines.PIPELINES.items():
        tiny_pipelines.save(make(), root / name)
    tiny_pipelines.save_modular(root / "z-image", root / "modular")
    return root


@pytest.fixture(scope="module")
def engine(folders: Path) -> Iterator[Executor]:
    engine = Executor(Library(folders.parent, folders), device="cpu", tokenizer=DATA / "clip")
    engine.start()
    engine.wait()
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _seen(engine: Executor) -> None:
    """Tests add models: have the library look again."""
    engine._library._scanned = float("-inf")


def asked(family: str, **changes: object) -> Txt2Img:
    fields: dict[str, object] = {"model": family, "steps": 3, "width": 64, "height": 48, "sampler": "euler"}
    return request(**{"prompt": "a red cat"} | fields | {"guidance_scale": 3.5} | changes)


@families
def test_a_picture_is_that_of_the_pipeline_of_diffusers(folders: Path, family: str) -> None:
    wanted = asked(family, negative_prompt="a dog")
    (stage,) = plan(wanted)
    ours = Generic.from_folder(folders / family, CPU).paint(stage, lambda share: False)
    assert ours is not None
    pipeline = AutoPipelineForText2Image.from_pretrained(folders / family, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=wanted.prompt, width=64, height=48, num_inference_steps=3, generator=torch.Generator().manual_seed(1),
        output_type="pt", **GUIDANCE[family],
    ).images  # fmt: skip
    assert theirs.shape == (1, 3, 48, 64)
    assert theirs.std() > 0.01
    assert (ours.values / 2 + 0.5 - theirs).abs().max() <= 1e-4


@families
def test_each_step_is_told_of(engine: Executor, family: str) -> None:
    *told, last = events(engine, asked(family, count=2))
    assert isinstance(last, Finished)
    steps = [p.step for p in told if isinstance(p, Progress) and p.phase == "generation"]
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]
    assert told[-1].fraction == 1.0  # type: ignore[union-attr]


@families
def test_the_same_request_gives_the_same_bytes_and_each_picture_its_own_seed(engine: Executor, family: str) -> None:
    batch = finished(engine, asked(family, count=2))
    assert batch.seeds == (1, 2)
    assert batch.infotext["RNG"] == "CPU"
    assert not np.array_equal(*batch.images)
    assert np.array_equal(finished(engine, asked(family, seed=2)).images[0], batch.images[1])


@families
def test_words_and_guidance_show_in_the_picture(engine: Executor, family: str) -> None:
    pictures = [finished(engine, asked(family, **changes)).images[0] for changes in ({}, {"guidance_scale": 9.0})]
    other = finished(engine, asked(family, prompt="xyz 12345")).images[0]
    assert not np.array_equal(*pictures)
    assert not np.array_equal(pictures[0], other)


@families
def test_an_interrupted_job_ends_within_a_step(engine: Executor, family: str) -> None:
    seen: list[int] = []
    run = engine.run(asked(family, steps=50), stop=lambda: Stop.NOW if 2 in seen else None)
    with pytest.raises(Interrupted):
        seen.extend(event.step or 0 for event in run)  # type: ignore[union-attr]
    assert max(seen) <= 4
    assert finished(engine, asked(family, steps=1)).partial is None


def test_a_job_that_is_told_to_show_what_it_has_shows_the_present_guess(engine: Executor, folders: Path) -> None:
    seen: list[int] = []
    run = engine.run(
        asked("flux", steps=8, count=2), stop=lambda: Stop.WITH_PICTURE if seen and seen[-1] == 4 else None
    )
    last: Any = None
    for last in run:
        seen.append(getattr(last, "step", None) or 0)
    assert isinstance(last, Finished)
    assert last.partial
    assert 4 <= last.partial <= 8
    assert len(last.images) == 1

    pipeline = FluxPipeline.from_pretrained(folders / "flux", local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    noisy: list[torch.Tensor] = []

    def ended(_: object, step: int, time: object, told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        noisy.append(told["latents"])
        if step + 1 < last.partial:
            return {}
        pipeline._interrupt = True
        before, after = pipeline.scheduler.sigmas[step : step + 2]
        return {"latents": noisy[-1] - after * (noisy[-1] - noisy[-2]) / (after - before)}

    theirs = pipeline(
        prompt="a red cat", width=64, height=48, num_inference_steps=8, guidance_scale=3.5, output_type="np",
        generator=torch.Generator().manual_seed(1), callback_on_step_end=ended,
    ).images[0]  # fmt: skip
    assert np.abs(last.images[0] / 255 - theirs).max() < 0.6 / 255


def test_a_modular_pipeline_draws_what_diffusers_draws_with_it(engine: Executor, folders: Path) -> None:
    pipeline = ZImageModularPipeline(pretrained_model_name_or_path=str(folders / "modular"), local_files_only=True)
    pipeline.load_components(local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guider.enable()
    for guidance in (4.5, 9.0):
        pipeline.guider.guidance_scale = guidance
        wanted = asked("modular", negative_prompt="a dog", guidance_scale=guidance)
        theirs = pipeline(
            prompt=wanted.prompt, negative_prompt="a dog", width=64, height=48, num_inference_steps=3, output="images",
            output_type="pt", generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        (stage,) = plan(wanted)
        ours = Generic.from_folder(folders / "modular", CPU).paint(stage, lambda share: False)
        assert ours is not None
        assert ours.warnings == ()
        assert (ours.values / 2 + 0.5 - theirs).abs().max() <= 1e-4
    assert finished(engine, asked("modular", guidance_scale=1)).images[0].std() > 1


def test_a_modular_pipeline_that_is_told_to_show_what_it_has_has_nothing(engine: Executor) -> None:
    seen: list[int] = []
    run = engine.run(asked("modular", steps=8), stop=lambda: Stop.WITH_PICTURE if 2 in seen else None)
    with pytest.raises(Interrupted, match="before there was a picture"):
        seen.extend(event.step or 0 for event in run)  # type: ignore[union-attr]
    assert max(seen) <= 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "flux1-dev-fp8.safetensors"])
def test_float8_stays_float8_in_memory_and_is_computed_with_as_is(
    engine: Executor, folders: Path, dtype: torch.dtype, file: str
) -> None:
    _copy(folders, "flux", "eighths", {})
    own = folders / "eighths" / "transformer" / "diffusion_pytorch_model.safetensors"
    eighths = {name: tensor.to(dtype) for name, tensor in load_file(own).items()}
    eighths["x_embedder.bias"] = load_file(own)["x_embedder.bias"]
    own.unlink()
    save_file(eighths, own.with_name(file))
    model = Generic.from_folder(folders / "eighths", CPU)
    transformer = model.pipeline.transformer
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype is dtype
    assert transformer.x_embedder.weight.dtype is torch.float32, "its bias would be rounded"
    _copy(folders, "flux", "rounded", {})
    save_file(
        {name: tensor.float() for name, tensor in eighths.items()},
        folders / "rounded" / own.relative_to(own.parents[1]),
    )
    rounded = Generic.from_folder(folders / "rounded", CPU)
    ours, theirs = (_painted(each) for each in (model, rounded))
    assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, _painted(Generic.from_folder(folders / "flux", CPU)))
    assert finished(engine, asked("eighths")).images[0].shape == (48, 64, 3)


def test_float8_with_scales_is_refused_and_not_drawn_wrongly(engine: Executor, folders: Path) -> None:
    _copy(folders, "flux", "scaled", {})
    own = folders / "scaled" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(own) | {"x_embedder.scale_weight": torch.ones(1)}, own)
    with pytest.raises(ModelUnreadable, match=r"has scales beside its weights \(x_embedder.scale_weight\)"):
        finished(engine, asked("scaled"))


def test_a_gguf_transformer_draws_what_diffusers_draws_with_it(engine: Executor, folders: Path) -> None:
    import gguf

    _copy(folders, "flux", "packed", {})
    own = folders / "packed" / "transformer" / "diffusion_pytorch_model.safetensors"
    file = own.with_name("flux1-dev-Q8_0.gguf")
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in load_file(own).items():
        if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0:
            packed = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own.unlink()
    transformer = FluxTransformer2DModel.from_single_file(
        str(file), config=str(file.parent), dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    reference = FluxPipeline.from_pretrained(folders / "flux", transformer=transformer, local_files_only=True)
    reference.set_progress_bar_config(disable=True)
    theirs = reference(
        prompt="a red cat", width=64, height=48, num_inference_steps=3, guidance_scale=3.5, output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    model = Generic.from_folder(folders / "packed", CPU)
    assert model.pipeline.transformer.transformer_blocks[0].attn.to_q.weight.dtype is torch.uint8
    assert (_painted(model) / 2 + 0.5 - theirs).abs().max() <= 1e-4
    assert finished(engine, asked("packed")).images[0].shape == (48, 64, 3)


def _painted(model: Generic) -> torch.Tensor:
    (stage,) = plan(asked("flux"))
    painted = model.paint(stage, lambda share: False)
    assert painted is not None
    return painted.values


def test_what_a_family_cannot_honour_is_said_and_changes_nothing(engine: Executor) -> None:
    plain = finished(engine, asked("flux"))
    assert plain.warnings == ()
    assert plain.infotext == {"RNG": "CPU", "Sampler": "Euler", "Schedule type": "Simple"}
    odd = finished(
        engine,
        asked(
            "flux", negative_prompt="a dog", sampler="dpmpp_2m", clip_skip=2, eta=0.5, emphasis="ignore", s_noise=1.1
        ),
    )
    assert np.array_equal(odd.images[0], plain.images[0])
    assert odd.warnings == (
        "the negative prompt is not used: FluxPipeline has none with this guidance",
        "sampler DPM++ 2M is not used: the model has its own, FlowMatchEulerDiscreteScheduler",
        "clip_skip 2 is not used: FluxPipeline has no such option",
        "eta 0.5 is not used: FluxPipeline has no such option",
        "s_noise 1.1 is not used: FluxPipeline has no such option",
        "emphasis ignore is not used: FluxPipeline has no such option",
    )


def test_a_size_that_the_pipeline_rounds_is_said(engine: Executor) -> None:
    found = finished(engine, asked("flux", width=72))
    assert found.images[0].shape == (48, 64, 3)
    assert found.warnings == ("the picture is 64x48: FluxPipeline makes no 72x48",)
    assert found.infotext["Size"] == "64x48"


def test_a_request_that_the_pipeline_refuses_is_the_callers(engine: Executor) -> None:
    with pytest.raises(InvalidRequest, match=r"StableDiffusion3Pipeline cannot do that: .*divisible by 16"):
        finished(engine, asked("sd35", width=72))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"_class_name": ["my_pipeline", "Mine"]}, "and only pipelines of diffusers are run"),
        ({"transformer": ["my_module", "Transformer"]}, "names my_module.Transformer, and only code of diffusers"),
    ],
)
def test_a_model_that_brings_code_is_refused_with_the_reason(
    engine: Executor, folders: Path, change: dict[str, Any], why: str
) -> None:
    _copy(folders, "flux", "own-code", change)
    with pytest.raises(UnknownModel, match=f"model 'own-code' cannot be used: .*{why}"):
        finished(engine, asked("own-code"))


def test_a_class_that_this_diffusers_lacks_is_named(engine: Executor, folders: Path) -> None:
    _copy(folders, "flux", "newer", {"_class_name": "Flux9Pipeline"})
    with pytest.raises(
        ModelUnreadable, match=r"names diffusers.Flux9Pipeline, which is no class of diffusers 0\."
    ) as told:
        finished(engine, asked("newer"))
    assert str(folders) not in str(told.value)


def test_numbers_that_overflow_are_an_error_and_no_black_picture(engine: Executor, folders: Path) -> None:
    _copy(folders, "flux", "overflowing", {})
    file = folders / "overflowing" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(NotFinite, match="overflowed"):
        finished(engine, asked("overflowing"))


def test_memory_that_runs_out_is_come_by_in_steps(engine: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = finished(engine, asked("flux"))
    failures = 2
    paint = Generic.paint

    def short(self: Generic, *arguments: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paint(self, *arguments)

    monkeypatch.setattr(Generic, "paint", short)
    done = finished(engine, asked("flux"))
    assert done.memory_steps == ("paint: caches freed", "paint: attention slicing")
    assert np.abs(done.images[0].astype(int) - before.images[0]).max() <= 1
    failures = 9
    with pytest.raises(OutOfMemory, match=r"out of memory: 64x48 pixels.*tried paint: caches freed, paint: attention"):
        finished(engine, asked("flux"))


@pytest.mark.parametrize(
    ("kind", "why"),
    [("WanPipeline", "WanPipeline makes videos, and no pictures"), ("DanceDiffusionPipeline", "no pictures of words")],
)
def test_a_pipeline_that_makes_no_pictures_says_so(engine: Executor, folders: Path, kind: str, why: str) -> None:
    _copy(folders, "flux", "other", {"_class_name": kind})
    with pytest.raises(ModelUnreadable, match=why):
        finished(engine, asked("other"))


def test_a_lora_of_the_transformer_is_applied_and_taken_off_again(engine: Executor, folders: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = "transformer.transformer_blocks.0.attn.to_q.lora"
    lora = {f"{layer}_{side}.weight": torch.randn(shape, generator=generator) for side, shape in SIDES.items()}
    file = folders.parent / "stable_diffusion" / "loras" / "bent.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora, file)
    before = finished(engine, asked("flux")).images[0]
    bent = finished(engine, asked("flux", loras=(LoraUse(name="bent", scale=0.7),)))
    assert [each.name for each in bent.loras_applied] == ["bent"]
    pipeline = FluxPipeline.from_pretrained(folders / "flux", local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
        weight += 0.7 * lora[f"{layer}_B.weight"] @ lora[f"{layer}_A.weight"]
    theirs = pipeline(
        prompt="a red cat", width=64, height=48, num_inference_steps=3, guidance_scale=3.5, output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert np.abs(bent.images[0] / 255 - theirs).max() < 0.6 / 255
    assert not np.array_equal(bent.images[0], before)
    assert np.array_equal(finished(engine, asked("flux")).images[0], before)


def test_a_variant_in_half_precision_is_weights_too(engine: Executor, folders: Path) -> None:
    _copy(folders, "flux", "half", {})
    for network in (folders / "half").glob("*/*.safetensors"):
        network.rename(network.with_suffix(".fp16.safetensors"))
    ours, theirs = (finished(engine, asked(name)).images[0] for name in ("half", "flux"))
    assert np.array_equal(ours, theirs)


def test_the_index_of_an_editing_pipeline_draws_from_words_too(engine: Executor, folders: Path) -> None:
    _copy(folders, "flux", "editing", {"_class_name": "FluxImg2ImgPipeline"})
    ours, theirs = (finished(engine, asked(name)).images[0] for name in ("editing", "flux"))
    assert np.array_equal(ours, theirs)


def test_a_missing_tensor_is_an_error_and_no_random_number(engine: Executor, folders: Path) -> None:
    _copy(folders, "z-image", "lacking", {})
    file = folders / "lacking" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["cap_embedder.1.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelUnreadable, match=r"its ZImageTransformer2DModel lacks cap_embedder\.1\.weight"):
        finished(engine, asked("lacking"))


def _copy(folders: Path, source: str, name: str, change: dict[str, Any]) -> None:
    """A model like another but for what its index says."""
    shutil.rmtree(folders / name, ignore_errors=True)
    shutil.copytree(folders / source, folders / name)
    index = folders / name / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
