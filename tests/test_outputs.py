"""Pictures saved and read back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import plain

from diffusion_api import __version__, images, infotext
from diffusion_api.engine.base import Embeddings, Finished
from diffusion_api.errors import DiskFull, OutputsUnusable
from diffusion_api.outputs import Outputs
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Image, Job
from diffusion_api.schema.request import Embed, Output


def new_job(**fields: Any) -> Job:
    changes = {"guidance_scale": 7.5, "height": 48, "sampler": "dpmpp_2m", "seed": 7, "output": Output(format="png")}
    return Job(request=plain(negative_prompt="fog", **changes | fields))


def pictures(job: Job) -> Finished:
    made = tuple(np.full((48, 64, 3), seed % 251, np.uint8) for seed in job.request.seeds)
    return Finished(images=made, seeds=job.request.seeds, model_hash="0123456789")


def test_a_picture_is_saved_under_its_job_and_comes_back(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job()
    (image,) = outputs.save(job, pictures(job))
    data = (tmp_path / "outputs" / f"{job.id}.png").read_bytes()
    assert image.path == f"outputs/{job.id}.png"
    assert (image.width, image.height, image.seed) == (64, 48, 7)
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert outputs.read(image) == data
    assert np.array_equal(np.asarray(images.decode(data, max_pixels=10**6)), pictures(job).images[0])


def test_the_infotext_is_in_the_file_and_in_the_record(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs")
    for output in (Output(format="png"), Output(format="jpeg")):
        job = new_job(output=output)
        (image,) = outputs.save(job, pictures(job))
        assert images.read_infotext(outputs.read(image) or b"") == image.infotext
        fields = infotext.parse(image.infotext).fields
        assert (fields["Sampler"], fields["Schedule type"]) == ("DPM++ 2M", "Karras")
        assert (fields["Model"], fields["Model hash"]) == ("small", "0123456789")
        assert fields["Version"] == f"DiffusionAPI v{__version__}"


def test_several_pictures_have_numbers_and_their_own_seeds(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job(count=3, output=Output())
    saved = outputs.save(job, pictures(job))
    assert [image.path for image in saved] == [f"outputs/{job.id}-{number}.jpg" for number in range(3)]
    assert [image.seed for image in saved] == [7, 8, 9]
    assert [infotext.parse(image.infotext).fields["Seed"] for image in saved] == [7, 8, 9]


def test_a_job_run_again_writes_over_its_own_picture(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job()
    assert outputs.save(job, pictures(job)) == outputs.save(job, pictures(job))
    assert [path.name for path in outputs.folder.iterdir() if path.is_file()] == [f"{job.id}.png"]


def test_numbers_of_a_picture_are_a_file_of_their_job(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs")
    job = Job(request=Embed(model="m", image="0", width=512, height=512, seed=0))
    numbers = Embeddings(clip=np.float32([0.1, -2]), vae=np.zeros((1, 2, 2), np.float32))
    stored = outputs.save_embeddings(job, numbers)
    assert stored == outputs.save_embeddings(job, numbers)
    data = outputs.read(stored) or b""
    assert json.loads(data) == {"CLIP_embeddings": [np.float32(0.1), -2.0], "vae_emb": [[[0.0, 0.0], [0.0, 0.0]]]}
    assert (stored.path, stored.sha256) == (f"outputs/{job.id}.json", hashlib.sha256(data).hexdigest())
    assert [path.name for path in outputs.folder.iterdir() if path.is_file()] == [f"{job.id}.json"]
    outputs.sweep(Limits(seconds=0), now=time.time() + 1, in_use=set)
    assert outputs.read(stored) is None


def test_a_picture_that_was_deleted_is_none(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job()
    (image,) = outputs.save(job, pictures(job))
    (tmp_path / image.path).unlink()
    assert outputs.read(image) is None


def test_the_unfinished_files_of_a_process_that_died_are_removed(tmp_path: Path) -> None:
    abandoned = Outputs(tmp_path / "outputs").folder / ".tmp" / "half"
    abandoned.write_bytes(b"half a picture")
    Outputs(tmp_path / "outputs")
    assert not abandoned.exists()


@pytest.mark.parametrize("path", ["../secret", "outputs/../../secret", "/etc/hostname", "outputs/.."])
def test_nothing_outside_the_folder_is_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    outputs = Outputs(tmp_path / "outputs")
    image = Image(path=path, width=8, height=8, seed=1, sha256="", infotext="")
    try:
        found = outputs.read(image)
    except IsADirectoryError:
        found = None
    assert found is None


def test_a_full_disk_is_told_and_leaves_no_half_picture(small_disk: Path) -> None:
    outputs, job = Outputs(small_disk / "outputs"), new_job()
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    with pytest.raises(DiskFull, match="the disk is full: the picture could not be saved"):
        outputs.save(job, Finished(images=(noise,), seeds=(1,)))
    assert [path.name for path in outputs.folder.rglob("*")] == [".tmp"]


def swept(tmp_path: Path, limits: Limits, *, now: float, in_use: set[str] | None = None) -> list[str]:
    """What is left of the folder."""
    outputs = Outputs(tmp_path / "outputs")
    outputs.sweep(limits, now=now, in_use=lambda: in_use or set())
    return sorted(path.name for path in outputs.folder.iterdir() if path.name != ".tmp")


def test_pictures_beyond_what_is_kept_are_deleted_the_oldest_first(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs")
    names = [f"{uuid.uuid4()}{tail}" for tail in (".png", "-0.png", "-12.jpg", ".jpg")]
    for age, name in enumerate(names):
        (outputs.folder / name).write_bytes(b"x" * 1000)
        os.utime(outputs.folder / name, (1000 - age,) * 2)
    assert swept(tmp_path, Limits(), now=10**9) == sorted(names)
    assert swept(tmp_path, Limits(seconds=10.5), now=1008) == sorted(names[:3])
    assert swept(tmp_path, Limits(count=2), now=0) == sorted(names[:2])
    assert swept(tmp_path, Limits(size=1999), now=0) == names[:1]


def test_pictures_of_jobs_in_use_are_spared(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job(count=2)
    outputs.save(job, pictures(job))
    assert len(swept(tmp_path, Limits(count=0), now=0, in_use={job.id})) == 2
    assert swept(tmp_path, Limits(count=0), now=0) == []


def test_only_pictures_of_the_service_are_deleted(tmp_path: Path) -> None:
    outputs, name = Outputs(tmp_path / "outputs"), str(uuid.uuid4())
    (tmp_path / "mine").write_bytes(b"mine")
    others = ["favourite.png", "notes.txt", f"{name}.txt", f"{name}.png.bak", f"{name} copy.jpg", f"x{name}.jpg"]
    for other in others:
        (outputs.folder / other).write_bytes(b"x")
    (outputs.folder / f"{name}.png").symlink_to(tmp_path / "mine")
    (outputs.folder / f"{name}.jpg").mkdir()
    (outputs.folder / f"{name}.jpg" / f"{name}.jpg").write_bytes(b"x")
    left = swept(tmp_path, Limits(seconds=0, count=0, size=0), now=10**10)
    assert left == sorted([*others, f"{name}.png", f"{name}.jpg"])
    assert (outputs.folder / f"{name}.jpg" / f"{name}.jpg").exists()
    assert (tmp_path / "mine").exists()


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job()
    shutil.rmtree(tmp_path / "outputs")
    (image,) = outputs.save(job, pictures(job))
    assert outputs.read(image)
    shutil.rmtree(tmp_path / "outputs")
    outputs.check()


def test_a_folder_from_which_a_disk_went_is_not_filled(tmp_path: Path) -> None:
    outputs, job = Outputs(tmp_path / "outputs"), new_job()
    (tmp_path / "outputs" / ".tmp").rmdir()
    with pytest.raises(OutputsUnusable):
        outputs.save(job, pictures(job))
    with pytest.raises(OutputsUnusable):
        outputs.check()


def test_a_folder_that_cannot_be_written_is_told_so_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputsUnusable, match=r"^the folder of outputs cannot be used: Not a directory$"):
        Outputs(tmp_path / "file" / "outputs")
