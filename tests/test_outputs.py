"""Pictures saved and read back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import plain

from diffusion_api import __version__, images, infotext
from diffusion_api.engine.base import Finished
from diffusion_api.errors import DiskFull
from diffusion_api.outputs import Outputs
from diffusion_api.schema.job import Image, Job
from diffusion_api.schema.request import Output


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
