"""The engine that runs diffusers models, with the shipped one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import Draw, events, finished, request
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from ldm_layout import write_checkpoint
from serving import ROOT, environment

from diffusion_api.engine.base import Finished, Stop
from diffusion_api.engine.executor import Executor
from diffusion_api.errors import Interrupted, ModelUnreadable, UnknownModel
from diffusion_api.schema.job import Progress, State
from diffusion_api.settings import DATA, OFFLINE

SHAPES = DATA / "models" / "shapes"


def test_the_same_request_gives_the_same_pixels(draw: Draw) -> None:
    assert np.array_equal(draw(steps=5), draw(steps=5))


def test_another_seed_gives_another_picture(draw: Draw) -> None:
    assert not np.array_equal(draw(steps=5), draw(steps=5, seed=2))


def test_each_picture_of_a_batch_is_the_one_its_seed_gives_alone(executor: Executor, draw: Draw) -> None:
    batch = finished(executor, request(steps=5, count=3, sampler="euler_a"))
    assert batch.seeds == (1, 2, 3)
    for seed, picture in zip(batch.seeds, batch.images, strict=True):
        assert np.array_equal(picture, draw(steps=5, seed=seed, sampler="euler_a"))


def test_what_ran_before_leaves_no_trace(executor: Executor, draw: Draw) -> None:
    before = draw(steps=5)
    draw("a small green star on a white background", steps=3, sampler="euler_a", width=64, height=64, guidance_scale=1)
    assert np.array_equal(before, draw(steps=5))


def test_progress_starts_at_loading_and_rises_to_one(executor: Executor) -> None:
    *progress, last = events(executor, request(steps=6, sampler="heun"))
    assert isinstance(last, Finished)
    told = [p for p in progress if isinstance(p, Progress)]
    assert told[0].state is State.LOADING
    assert told[-1].fraction == 1.0
    assert told[-1].step == told[-1].steps == 6
    assert [p.fraction for p in told] == sorted(p.fraction for p in told)
    assert {p.phase for p in told} == {"loading", "generation"}


def test_no_guidance_needs_no_negative_prompt(draw: Draw) -> None:
    one = draw(steps=4, guidance_scale=1, negative_prompt="a green square")
    assert np.array_equal(one, draw(steps=4, guidance_scale=1))


def test_the_negative_prompt_and_the_guidance_change_the_picture(draw: Draw) -> None:
    plain = draw(steps=5)
    assert not np.array_equal(plain, draw(steps=5, negative_prompt="a green square"))
    assert not np.array_equal(plain, draw(steps=5, guidance_scale=7))


def test_words_beyond_the_seventy_fifth_token_count(draw: Draw) -> None:
    filler = "nice " * 90
    assert not np.array_equal(draw(filler + "red", steps=4), draw(filler + "blue", steps=4))


def test_euler_is_the_pipeline_of_diffusers(executor: Executor) -> None:
    asked = request(
        steps=12, sampler="euler", schedule="default", width=128, height=96, negative_prompt="blurry", rng="cpu"
    )
    ours = finished(executor, asked).images[0]
    pipeline = StableDiffusionPipeline.from_pretrained(
        SHAPES, local_files_only=True, dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        asked.prompt, negative_prompt="blurry", width=128, height=96, num_inference_steps=12, guidance_scale=5,
        generator=torch.Generator().manual_seed(1), output_type="np",
    ).images[0]  # fmt: skip
    # diffusers starts from sqrt(sigma^2 + 1) times the noise, k-diffusion from sigma times it: 0.2 % apart.
    error = np.mean((ours / 255 - theirs) ** 2)
    assert 10 * np.log10(1 / error) > 40


def test_a_single_file_in_the_original_layout_is_the_same_model(
    executor: Executor, models_dir: Path, draw: Draw
) -> None:
    write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", models_dir / "single.safetensors")
    result = finished(executor, request(steps=5, model=_fresh(executor, "single")))
    assert np.array_equal(result.images[0], draw(steps=5))
    assert result.model_hash is not None
    assert len(result.model_hash) == 10


def test_a_broken_model_fails_its_own_job_with_the_reason(executor: Executor, models_dir: Path, draw: Draw) -> None:
    before = draw(steps=3)
    broken = models_dir / "broken"
    shutil.copytree(SHAPES, broken)
    config = broken / "unet" / "config.json"
    config.write_text(config.read_text().replace("128", "96"))
    with pytest.raises(ModelUnreadable, match="model 'broken' cannot be read: ") as caught:
        events(executor, request(steps=3, model=_fresh(executor, "broken")))
    assert str(models_dir.parent) not in str(caught.value)
    assert np.array_equal(before, draw(steps=3))


def test_a_model_that_was_removed_meanwhile_is_named(executor: Executor) -> None:
    with pytest.raises(UnknownModel, match="model 'gone' is not installed"):
        events(executor, request(model="gone"))


def test_an_interrupted_job_ends_within_a_step(executor: Executor, draw: Draw) -> None:
    told = threading.Event()
    run = executor.run(request(steps=50), stop=lambda: Stop.NOW if told.is_set() else None)
    while next(run).step < 2:  # type: ignore[union-attr]
        pass
    told.set()
    with pytest.raises(Interrupted):
        assert max(p.step for p in run) <= 4  # type: ignore[union-attr]
    assert draw(steps=2).shape == (128, 128, 3)


def test_a_job_that_waits_for_the_device_can_be_interrupted(executor: Executor) -> None:
    first = executor.run(request(steps=2), stop=lambda: None)
    next(first)
    with pytest.raises(Interrupted, match="before it began"):
        list(executor.run(request(), stop=lambda: Stop.NOW))
    assert isinstance(list(first)[-1], Finished)


def test_nothing_happens_on_the_device_before_the_second_event_is_asked_for(executor: Executor) -> None:
    run = executor.run(request(steps=1), stop=lambda: None)
    assert next(run) == Progress(state=State.LOADING, phase="loading")
    run.close()  # type: ignore[attr-defined]
    assert isinstance(events(executor, request(steps=1))[-1], Finished)


def test_the_libraries_fetch_nothing_and_run_no_code_of_a_model() -> None:
    program = """
import sys
from pathlib import Path
from diffusion_api.catalog.library import Library
from diffusion_api.engine.executor import Executor
assert not {"torch", "diffusers", "huggingface_hub"} & set(sys.modules)
engine = Executor(Library(Path("."), Path(".")), device="cpu", tokenizer=Path("."))
engine.start()
engine.wait()
from diffusers.utils.constants import DIFFUSERS_DISABLE_REMOTE_CODE
from huggingface_hub.constants import is_offline_mode
print(DIFFUSERS_DISABLE_REMOTE_CODE, is_offline_mode())
engine.close()
"""
    bare = {name: value for name, value in environment().items() if name not in OFFLINE}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=bare, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def _fresh(executor: Executor, name: str) -> str:
    """The name, once the library has seen the new file."""
    library = executor._library
    library._scanned = float("-inf")
    assert library.find(name)
    return name
