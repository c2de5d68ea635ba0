"""Does memory stay where it is? Jobs that take turns between two models, each of which drives the other one out.

The whole service with the real engine, in this process: file queue, worker, executor, PNG with infotext. Every job loads its
model anew, draws 64 pixels in 3 steps and is read back as a client would. Resident memory is read after each; what is
reported is its slope over the jobs after the first tenth, which fills caches (least squares), and the memory at both ends.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import psutil
from results import write

from diffusion_api import server
from diffusion_api.outputs import Outputs
from diffusion_api.schema.job import Job
from diffusion_api.schema.request import Output, Txt2Img
from diffusion_api.service import Service
from diffusion_api.settings import DATA, Settings
from diffusion_api.worker import Worker

MODELS = ("shapes", "copy")
STEPS, SIZE = 3, 64
MIB = 2**20
FOR_ONE = 0.047
"""GiB of RAM in which one of the models fits, and not both."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    jobs: int = parser.parse_known_args()[0].jobs
    resident: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder), device="cpu", max_ram=FOR_ONE)
        settings.create_folders()
        shutil.copytree(DATA / "models" / "shapes", settings.models_dir / "copy")
        library, queue = server.build_library(settings), server.build_queue(settings)
        outputs, engine = Outputs(settings.outputs_dir), server.build_engine(settings, library, queue)
        service = Service(settings, library, queue, outputs, engine)
        worker = Worker(queue, engine, outputs)
        worker.start()
        for number in range(jobs):
            request = Txt2Img(
                model=MODELS[number % 2], prompt="a large red circle on a blue background", negative_prompt="",
                steps=STEPS, guidance_scale=5, width=SIZE, height=SIZE, sampler="euler", schedule="default",
                seed=number, output=Output(format="png"),
            )  # fmt: skip
            job = service.submit(Job(request=request))
            ended = list(service.watch(job.id, 600))[-1].job
            assert ended.result, ended.error
            assert service.image(ended.result.images[0])
            resident.append(psutil.Process().memory_info().rss / MIB)
            if (number + 1) % 50 == 0:
                print(f"{number + 1} of {jobs} jobs: {resident[-1]:.1f} MiB", flush=True)
        worker.stop(5)
        queue.close()
    tenth = jobs // 10
    warm = resident[tenth:]
    slope, _ = statistics.linear_regression(range(len(warm)), warm)
    write(
        "memory",
        {
            "job": f"shapes and a copy of it in turn, Euler, {STEPS} steps, {SIZE} px, PNG",
            "jobs": jobs,
            "resident_mib_after_a_tenth": round(statistics.median(resident[tenth : 2 * tenth]), 1),
            "resident_mib_at_the_end": round(statistics.median(resident[-tenth:]), 1),
            "slope_kib_per_job": round(slope * 1024, 2),
        },
    )


if __name__ == "__main__":
    main()
