"""Fault 21: ten thousand jobs wait, and the service answers as if there were none."""

from __future__ import annotations

import time
from pathlib import Path

import counting
import psutil
import pytest
from asking import plain
from fake_models import diffusers_folder
from serving import Program, serving

from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

WAITING = 10_000
ROOM = 50 * 2**20
"""Bytes by which the memory of the service may grow."""


def took(answers: list[float], share: float) -> float:
    """Milliseconds within which that share of the answers came."""
    return round(1000 * sorted(answers)[int(share * len(answers))], 1)


def timed(server: Program, method: str, path: str, **options: object) -> float:
    began = time.perf_counter()
    assert server.request(method, path, **options).status_code == 200
    return time.perf_counter() - began


def memory(server: Program) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def test_ten_thousand_waiting_jobs_keep_their_order_and_cost_little(tmp_path: Path) -> None:
    home = tmp_path / "home"
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    settings = {"max_queue": 0, "max_attempts": 1}
    with serving(home, "--no-worker", **settings) as server:
        assert server.get("/health").status_code == 200
        alone = memory(server)
    queue = FileQueue(home / "queue")
    jobs = [queue.enqueue(Job(request=plain(model="small"))).id for _ in range(WAITING)]
    queue.close()
    began = time.perf_counter()
    with serving(home, "--no-worker", **settings) as server:
        started = round(time.perf_counter() - began, 2)
        assert [server.status(jobs[n])["position"] for n in range(0, WAITING, 100)] == list(range(0, WAITING, 100))
        body = {"prompt": "a lighthouse", "seed": 1}
        polls = [timed(server, "GET", f"/queue/{jobs[(7 * n) % WAITING]}") for n in range(1000)]
        posts = [timed(server, "POST", "/txt2img", json=body) for _ in range(300)]
        grown = memory(server) - alone
        assert grown < ROOM
    counting.keep(
        "10000 jobs that wait",
        start_seconds=started,
        poll_ms_p50=took(polls, 0.5),
        poll_ms_p99=took(polls, 0.99),
        post_ms_p50=took(posts, 0.5),
        post_ms_p99=took(posts, 0.99),
        memory_mib=round(grown / 2**20, 1),
    )
