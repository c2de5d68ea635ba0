"""Writes ``fixtures/<version>/``: what this release leaves in a queue's folder, one of each kind, for later ones to read.

Run as a program, once before a release, after the last change to what is stored. All times are one moment, and ids say
what became of the jobs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from unittest import mock

from diffusion_api import __version__
from diffusion_api.queues._file import workers
from diffusion_api.queues.base import Control, Key
from diffusion_api.queues.file import FileQueue
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Image, Job, Progress, Result, State
from diffusion_api.schema.request import Caption, Embed, Img2Img, Mask, Output, Txt2Img, Upscale

NOW = 1_800_000_000.0
BOOT = "00000000-0000-0000-0000-000000000000"
EXPIRED, READ, KEYED = (f"{digit * 8}-{digit * 4}-4{digit * 3}-8{digit * 3}-{digit * 12}" for digit in "120")


def new_job(job_id: str, **fields: object) -> Job:
    """A job with something in every field that its caller can fill."""
    request = Txt2Img(
        model="shapes", prompt="a large red circle, gro\u00df", negative_prompt="blur", steps=20, guidance_scale=7.5,
        width=256, height=192, sampler="dpmpp_2m", schedule="karras", seed=7, count=2, output=Output(),
    )  # fmt: skip
    told: dict[str, object] = {"request": request}
    told |= {"payload": {"prompt": request.prompt, "n": 2}, "warnings": ("no LoRA yet",), "deadline": 600.0}
    told |= {"caller": "ann", "webhook": "https://example.org/told", "created": NOW}
    return Job(id=job_id, **(told | fields))  # type: ignore[arg-type]


def result_of(job: Job) -> Result:
    image = Image(path=f"outputs/{job.id}.png", width=256, height=192, seed=7, sha256="0" * 64, infotext="a circle")
    return Result(images=(image,), seconds=1.5, memory_before_mb=100.0, memory_after_mb=200.0)


ENDS = {
    "done": lambda job: job.succeeded(result_of(job), ("clipped",)),
    "error": lambda job: job.failed("OutOfMemory", "out of memory: 256x192 pixels"),
    "cancelled-running": lambda job: job.cancelled(),
    "cancelled-partial": lambda job: job.cancelled(result_of(job)),
}


def end(queue: FileQueue, *ids: str) -> None:
    """Have these jobs run to their ends."""

    def handle(job: Job, control: Control) -> None:
        control.commit(ENDS.get(job.id, ENDS["done"])(control.started()))
        if job.id == ids[-1]:
            queue.stop()

    for job_id in ids:
        queue.enqueue(new_job(job_id))
    queue.serve(handle)
    queue.close()


def crash(root: Path, job_id: str) -> Path:
    """Have a worker die while it runs this job; its folder."""
    queue = FileQueue(root)
    queue.enqueue(new_job(job_id))

    def handle(job: Job, control: Control) -> None:
        control.started()
        control.progress(Progress(state=State.PROCESSING, fraction=0.5, phase="denoising", step=10, steps=20))
        queue.cancel(job_id, partial=True) if job_id == "running-cancelled" else None
        raise InterruptedError

    with contextlib.suppress(InterruptedError):
        queue.serve(handle, wants=lambda job: job.id == job_id)
    queue.close()
    (folder,) = (root / "running").iterdir()
    return folder


def write(root: Path) -> None:
    """Do all that leaves something behind."""
    end(FileQueue(root), EXPIRED)
    FileQueue(root).sweep(Limits(seconds=0), now=(root / "done" / f"{EXPIRED}.json").stat().st_mtime + 1)
    end(FileQueue(root), READ)
    FileQueue(root).forget(READ)
    end(FileQueue(root), *ENDS)
    aside = root / "aside"
    aside.mkdir()
    for job_id in ("running", "running-cancelled"):
        crash(root, job_id).rename(aside / job_id)
    crash(root, "suspect")
    queue = FileQueue(root, pause_after_crashes=1)
    queue.stop()
    queue.serve(lambda job, control: None)
    for number, folder in enumerate(sorted(aside.iterdir()), 1):
        folder.rename(root / "running" / str(uuid.UUID(int=number)))
    aside.rmdir()
    queue.enqueue(new_job("waiting"))
    queue.enqueue(new_job("urgent", priority=9))
    queue.enqueue(new_job("cancelled"))
    queue.cancel("cancelled")
    queue.enqueue(new_job(KEYED), key=Key.of("k", {}))
    image, mask = (queue.store_input(data) for data in (b"a picture", b"a mask"))
    drawn = new_job("painted").request.model_dump(exclude={"kind", "hires"})
    painted = Img2Img(**drawn, image=image, strength=0.5, mask=Mask(image=mask))
    queue.enqueue(new_job("painted", request=painted))
    upscaled = Upscale(image=image, upscaler="Lanczos", width=512, height=384, output=Output())
    queue.enqueue(new_job("upscaled", request=upscaled))
    seen = {"model": "unidiffuser-v1", "image": image, "width": 512, "height": 512, "seed": 7}
    queue.enqueue(new_job("captioned", request=Caption(**seen, steps=20, guidance_scale=7.5)))
    queue.enqueue(new_job("embedded", request=Embed(**seen)))
    queue.close()


def main() -> None:
    target = Path(__file__).with_name("fixtures") / __version__
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(time, "time", return_value=NOW),
        mock.patch.object(time, "time_ns", side_effect=itertools.count(int(NOW * 1e9))),
        mock.patch.object(workers, "boot_id", return_value=BOOT),
        mock.patch("diffusion_api.queues.file.boot_id", return_value=BOOT),
    ):
        root = Path(folder) / "queue"
        write(root)
        for path in (root / "workers").iterdir():
            path.unlink()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(root, target)
    for path in target.iterdir():
        if path.is_dir() and not os.listdir(path):
            path.rmdir()


if __name__ == "__main__":
    main()
