"""UniDiffuser, on a tiny folder with the structure of the published model, against diffusers' own pipeline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from asking import events, finished, request
from diffusers import UniDiffuserPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import ROOT

from diffusion_api.canvas import resized
from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import Embeddings, Finished, Stop, StopAsked
from diffusion_api.engine.executor import Executor
from diffusion_api.errors import Interrupted, InvalidRequest
from diffusion_api.schema.job import Progress
from diffusion_api.schema.request import Caption, Embed, Txt2Img
from diffusion_api.settings import DATA

NAME = "unidiffuser-v1"


def drawn(seed: int) -> Image.Image:
    """A picture that is not square, of colours that lie side by side."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((320, 240), Image.Resampling.NEAREST)


PICTURES = {"one": drawn(1), "other": drawn(2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "models" / NAME
    tiny_pipelines.save(tiny_pipelines.unidiffuser(), folder)
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    for part in ("unet", "text_decoder"):  # as the published model names them
        parts[part][0] = "unidiffuser"
    index.write_text(json.dumps(parts))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Executor]:
    library = Library(folder.parents[1], folder.parent, shipped=DATA / "models")
    engine = Executor(library, device="cpu", tokenizer=DATA / "clip", picture=PICTURES.__getitem__)
    engine.start()
    engine.wait()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> UniDiffuserPipeline:
    """The pipeline as diffusers itself loads it, which no longer finds its parts by the published names."""
    copy = tmp_path_factory.mktemp("theirs") / NAME
    shutil.copytree(folder, copy)
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace('["unidiffuser"', '["diffusers"'))
    pipeline = UniDiffuserPipeline.from_pretrained(copy, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(**changes: object) -> Txt2Img:
    fields: dict[str, object] = {"model": NAME, "steps": 3, "width": 512, "height": 512, "sampler": "euler"}
    return request(**{"prompt": "a red cat", "guidance_scale": 7.5} | fields | changes)


def caption(**changes: Any) -> Caption:
    fields = {"model": NAME, "image": "one", "width": 512, "height": 512, "seed": 1, "steps": 3, "guidance_scale": 7.5}
    return Caption(**fields | changes)


def embed(**changes: Any) -> Embed:
    return Embed(**{"model": NAME, "image": "one", "width": 512, "height": 512, "seed": 1} | changes)


def numbers(engine: Executor, **changes: Any) -> Embeddings:
    found = finished(engine, embed(**changes)).embeddings
    assert found is not None
    return found


def after_looks(number: int, how: Stop) -> StopAsked:
    """Ends a job when it is asked for the time after so many."""
    looks = iter([None] * number)
    return lambda: next(looks, how)


def test_a_picture_is_that_of_the_pipeline_of_diffusers(engine: Executor, theirs: UniDiffuserPipeline) -> None:
    made = finished(engine, picture(seed=5))
    wanted = theirs(
        prompt="a red cat", num_inference_steps=3, guidance_scale=7.5, generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]  # fmt: skip
    assert made.seeds == (5,)
    assert wanted.std() > 0.1
    assert np.abs(made.images[0].astype(float) / 255 - wanted).max() <= 1 / 255


def test_a_picture_depends_on_its_own_seed_alone(engine: Executor) -> None:
    both = finished(engine, picture(seed=5, count=2))
    assert both.seeds == (5, 6)
    assert np.array_equal(finished(engine, picture(seed=6)).images[0], both.images[1])
    assert not np.array_equal(*both.images)


@pytest.mark.parametrize(
    "changes", [{}, {"seed": 2}, {"guidance_scale": 1.0}, {"image": "other"}, {"steps": 2}], ids=str
)
def test_a_caption_is_that_of_the_pipeline_of_diffusers(
    engine: Executor, theirs: UniDiffuserPipeline, changes: dict[str, Any]
) -> None:
    asked = caption(**changes)
    made = finished(engine, asked)
    wanted = theirs(
        image=resized(PICTURES[asked.image], 512, 512, "just resize"), num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale, generator=torch.Generator().manual_seed(asked.seed),
    ).text[0]  # fmt: skip
    assert made.caption == wanted.strip()
    assert made.images == ()


def test_seed_guidance_and_picture_show_in_a_caption(engine: Executor) -> None:
    changed = ({}, {"seed": 2}, {"guidance_scale": 1.0}, {"image": "other"})
    said = [finished(engine, caption(**changes)).caption for changes in changed]
    assert len(set(said)) == len(said)
    assert finished(engine, caption()).caption == said[0]


def test_steps_are_told_of_and_a_caption_is_cancelled_between_them(engine: Executor) -> None:
    *told, last = events(engine, caption(steps=4))
    assert isinstance(last, Finished)
    assert [p.step for p in told if isinstance(p, Progress) and p.phase == "captioning"] == [0, 1, 2, 3, 4]
    for how in Stop:
        with pytest.raises(Interrupted):
            list(engine.run(caption(steps=200), stop=after_looks(5, how)))


def test_embeddings_are_those_of_the_pipelines_parts(engine: Executor, theirs: UniDiffuserPipeline) -> None:
    found = numbers(engine)
    seen = resized(PICTURES["one"], 512, 512, "just resize")
    pixels = 2 * torch.from_numpy(np.asarray(seen, np.float32) / 255).permute(2, 0, 1)[None] - 1
    with torch.no_grad():
        latents = theirs.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1)) * 1.5
        clip = theirs.image_encoder(**theirs.clip_image_processor(seen, return_tensors="pt")).image_embeds[0]
    assert found.clip.shape == (512,)
    assert found.vae.shape == (4, 64, 64)
    assert np.abs(found.clip - clip.numpy()).max() <= 1e-5
    assert latents.std() > 1
    assert np.abs(found.vae - latents[0].numpy()).max() <= 0.01  # the sums are done in another order


def test_embeddings_tell_pictures_apart_and_are_the_same_again(engine: Executor) -> None:
    one, other, again, sampled = (
        numbers(engine),
        numbers(engine, image="other"),
        numbers(engine),
        numbers(engine, seed=2),
    )
    assert np.abs(one.clip - other.clip).max() > 0.01
    assert np.abs(one.vae - other.vae).max() > 0.01
    assert np.array_equal(one.vae, again.vae)
    assert np.array_equal(one.clip, again.clip)
    assert np.array_equal(one.clip, sampled.clip)
    assert not np.array_equal(one.vae, sampled.vae)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_decoder_that_is_stored_with_one_of_its_two_equal_layers_is_whole(
    engine: Executor, folder: Path, kept: int
) -> None:
    tied = ("transformer.transformer.wte.weight", "transformer.lm_head.weight")
    other = folder.with_name(f"one-of-two-{kept}")
    shutil.copytree(folder, other)
    file = other / "text_decoder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors[tied[1 - kept]]
    save_file(tensors, file)
    engine._library._scanned = float("-inf")
    assert finished(engine, caption(model=other.name)).caption == finished(engine, caption()).caption


def test_the_program_of_the_manual_makes_safetensors_of_a_model_in_bin_files(
    engine: Executor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "stable_diffusion" / "models" / NAME
    shutil.copytree(folder, other)
    for file in other.glob("*/*.safetensors"):
        name = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "unidiffuser.md").read_text("utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    other.rename(folder.with_name("converted"))
    engine._library._scanned = float("-inf")
    assert finished(engine, caption(model="converted")).caption == finished(engine, caption()).caption


def test_other_sizes_are_refused_and_the_negative_prompt_is_not_used(engine: Executor) -> None:
    with pytest.raises(InvalidRequest, match=f"width x height is 512x256; '{NAME}' makes 512x512 alone"):
        finished(engine, picture(height=256))
    plain, negative = finished(engine, picture()), finished(engine, picture(negative_prompt="a dog"))
    assert np.array_equal(plain.images[0], negative.images[0])
    assert [note for note in negative.warnings if "negative" in note] == [
        "the negative prompt is not used: UniDiffuser is guided away from any words, not from some"
    ]
    assert not any("negative" in note for note in plain.warnings)


def test_models_that_tell_nothing_are_refused(engine: Executor) -> None:
    for asked in (caption(model="shapes"), embed(model="shapes")):
        with pytest.raises(InvalidRequest, match="model 'shapes' tells nothing of pictures"):
            finished(engine, asked)
