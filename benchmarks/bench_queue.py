"""The file queue on this disk: durable submissions, looking up one of 10,000 waiting jobs, jobs through three processes.

A submission is durable when ``enqueue`` returns; a job through a worker is claimed, charged and committed, all durably,
with nothing done in between. ``--folder`` chooses the disk.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from results import write

from diffusion_api.queues.base import Control
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job, Result, State
from diffusion_api.schema.request import Output, Txt2Img

WAITING, TOGETHER, PROCESSES = 10_000, 16, 3
RESULT = Result(images=(), seconds=0, memory_before_mb=0, memory_after_mb=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the queue lies; by default the place for temporary files")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write("queue", submissions(Path(folder) / "a") | looking(Path(folder) / "b") | running(Path(folder) / "c"))


def submissions(root: Path) -> dict[str, object]:
    """Submissions in a second, one after the other and many at a time, and the milliseconds that each takes."""
    queue, figures = FileQueue(root), {}
    for name, threads, count in (("alone", 1, 500), (f"{TOGETHER}_in_parallel", TOGETHER, 2000)):
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            seconds = list(pool.map(lambda _: timed(lambda: queue.enqueue(job())), range(count)))
            figures[f"enqueue_{name}_per_second"] = round(count / (time.perf_counter() - began))
            figures[f"enqueue_{name}_ms"] = spread(seconds)
    queue.close()
    return figures


def looking(root: Path) -> dict[str, object]:
    """What it takes to open a queue in which many wait, to look one up, and to add one."""
    ids = fill(root, WAITING)
    queue: FileQueue | None = None

    def start() -> None:
        nonlocal queue
        queue = FileQueue(root)
        assert queue.get(ids[-1])

    opening = timed(start)
    assert queue is not None
    gets = [timed(lambda: queue.get(random.choice(ids))) for _ in range(3000)]
    adds = []
    for _ in range(200):
        adds.append(timed(lambda: queue.enqueue(job())))
        gets.append(timed(lambda: queue.get(random.choice(ids))))
    queue.close()
    return {
        f"open_with_{WAITING}_waiting_ms": round(1000 * opening, 1),
        f"get_with_{WAITING}_waiting_ms": spread(gets),
        f"enqueue_with_{WAITING}_waiting_ms": spread(adds),
    }


def running(root: Path) -> dict[str, object]:
    """Jobs in a second through processes that do nothing with them."""
    count = 1000
    fill(root, count)
    queue = FileQueue(root)
    with workers(root):
        ended(queue, 50)
        began, first = time.perf_counter(), ended(queue, 50)
        last = ended(queue, count)
        seconds = time.perf_counter() - began
    queue.close()
    return {f"jobs_through_{PROCESSES}_processes_per_second": round((last - first) / seconds)}


@contextmanager
def workers(root: Path) -> Iterator[None]:
    """Processes that serve the folder."""
    command = [sys.executable, __file__, "--work", str(root)]
    processes = [subprocess.Popen(command) for _ in range(PROCESSES)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def work(root: Path) -> None:
    """Serve the folder until killed."""

    def handle(job: Job, control: Control) -> None:
        control.commit(control.started().succeeded(RESULT))

    FileQueue(root).serve(handle)


def fill(root: Path, count: int) -> list[str]:
    """Have so many jobs wait, soon: submissions whose flushes are left out."""
    queue = FileQueue(root)
    jobs = [job() for _ in range(count)]
    names = [f"09-{n:010d}-{time.time_ns():020d}-e3b0c442-{job.id}.json" for n, job in enumerate(jobs)]
    for name, made in zip(names, jobs, strict=True):
        (root / "queued" / name).write_text(made.model_dump_json())
    queue.close()
    return [made.id for made in jobs]


def ended(queue: FileQueue, count: int) -> int:
    """Wait until so many jobs have ended; how many there are by then."""
    while (found := queue.counts()[State.DONE]) < count:
        time.sleep(0.02)
    return found


def job() -> Job:
    """A job as it is posted."""
    request = Txt2Img(
        model="shapes", prompt="a large red circle on a blue background", negative_prompt="", steps=20, width=256,
        height=256, guidance_scale=5.0, sampler="euler", schedule="default", seed=1, output=Output(),
    )  # fmt: skip
    return Job(request=request, payload={"prompt": request.prompt, "steps": 20, "seed": 1})


def timed(do: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    return {
        "p50": round(1000 * statistics.median(seconds), 2),
        "p99": round(1000 * statistics.quantiles(seconds, n=100)[98], 2),
    }


if __name__ == "__main__":
    main()
