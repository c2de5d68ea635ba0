"""The service against the bare diffusers pipeline: seconds for a picture, same model, same process, interleaved.

Both make the same pictures (shapes, Euler, 20 steps, 256 px, PNG on disk) from the same noise. The service's time is from
``submit`` to the committed record: file queue with its fsyncs, worker, executor, PNG with infotext. What is reported is the
median of the ratios of neighbouring pairs, with the same figure for the pipeline against itself (the noise floor).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from results import write

from diffusion_api import server
from diffusion_api.outputs import Outputs
from diffusion_api.schema.job import Job
from diffusion_api.schema.request import Output, Txt2Img
from diffusion_api.service import Service
from diffusion_api.settings import DATA, Settings
from diffusion_api.worker import Worker

PROMPT = "a large red circle on a blue background"
STEPS, SIZE, GUIDANCE = 20, 256, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        settings = Settings(home=home, device="cpu")
        settings.create_folders()
        library, queue = server.build_library(settings), server.build_queue(settings)
        outputs, engine = Outputs(settings.outputs_dir), server.build_engine(settings, library, queue)
        service = Service(settings, library, queue, outputs, engine)
        worker = Worker(queue, engine, outputs)
        worker.start()
        pipeline = StableDiffusionPipeline.from_pretrained(
            DATA / "models" / "shapes", local_files_only=True, dtype=torch.float32, low_cpu_mem_usage=False
        )
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
        pipeline.set_progress_bar_config(disable=True)

        def bare(seed: int) -> float:
            began = time.perf_counter()
            image = pipeline(
                PROMPT, width=SIZE, height=SIZE, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            image.save(home / f"bare-{seed}.png")
            return time.perf_counter() - began

        def served(seed: int) -> float:
            request = Txt2Img(
                model="shapes", prompt=PROMPT, negative_prompt="", steps=STEPS, guidance_scale=GUIDANCE, width=SIZE,
                height=SIZE, sampler="euler", schedule="default", seed=seed, output=Output(format="png"),
            )  # fmt: skip
            began = time.perf_counter()
            job = service.submit(Job(request=request))
            last = list(service.watch(job.id, 600))[-1]
            seconds = time.perf_counter() - began
            assert last.job.result, last.job.error
            Image.open(home / last.job.result.images[0].path).save(home / f"served-{seed}.png")
            return seconds

        for warm in (0, 1):
            bare(warm), served(warm)
        difference = np.abs(_pixels(home / "bare-1.png") - _pixels(home / "served-1.png")).max()
        ratios, floor, bares, serveds = [], [], [], []
        for pair in range(options.pairs):
            one, two, three = bare(pair + 2), served(pair + 2), bare(pair + 2)
            bares += [one, three]
            serveds.append(two)
            ratios.append(two / ((one + three) / 2))
            floor.append(three / one)
            print(
                f"pair {pair + 1}/{options.pairs}: bare {one:.2f} s, service {two:.2f} s, bare {three:.2f} s",
                flush=True,
            )
        worker.stop(5)
        queue.close()
    write(
        "service",
        {
            "job": f"shapes, Euler, {STEPS} steps, {SIZE} px, PNG",
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
            "bare_against_itself": [round(min(floor), 4), round(max(floor), 4)],
            "bare_seconds_median": round(statistics.median(bares), 4),
            "service_seconds_median": round(statistics.median(serveds), 4),
            "largest_pixel_difference": int(difference),
        },
    )


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


if __name__ == "__main__":
    main()
