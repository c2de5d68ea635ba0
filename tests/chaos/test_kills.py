"""Fault 8: the service is killed again and again, at any time, while callers post and jobs run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import counting
import httpx
import psutil
import pytest
from aftermath import all_is_well
from fake_models import diffusers_folder
from serving import MODES, Program, eventually, serving, started

from diffusion_api.schema.job import loads

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(4 * 3600)]

KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
"""Of processes that have a job on the device."""
JOBS = KILLS * 5 // 2
AHEAD = 6
"""Jobs that wait, so that there is always one to kill."""


class Caller:
    """Posts jobs one after the other, each with a key, and sends what was not answered again to the next life."""

    def __init__(self) -> None:
        self.accepted: dict[str, str] = {}
        self.unanswered: list[str] = []
        self.repeated = 0

    def post_until_it_dies(self, server: Program, enough: threading.Event) -> None:
        """Keep a few jobs waiting."""
        with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
            while not enough.is_set():
                key = self.unanswered.pop() if self.unanswered else str(uuid.uuid4())
                try:
                    answer = client.post("/txt2img", json=_job(key), headers={"Idempotency-Key": key})
                    assert answer.status_code == 200, answer.text
                    self.repeated += "Idempotency-Replayed" in answer.headers
                    self.accepted[key] = answer.json()["job_id"]
                    while client.get(f"/queue/{self.accepted[key]}").json().get("position", 0) > AHEAD:
                        time.sleep(0.05)
                except httpx.TransportError:
                    if key not in self.accepted:
                        self.unanswered.append(key)
                    return


def _job(key: str) -> dict[str, object]:
    chance = random.Random(key)
    seconds = chance.choice([0.01, 0.02, 0.05])
    return {
        "prompt": f"stub:seconds={seconds}",
        "steps": chance.randint(2, 12),
        "seed": 1,
        "n": chance.choice([1, 1, 2]),
    }


def died_on_the_device(home: Path) -> bool:
    """True if a worker left a job behind that it had started and not ended."""
    for path in (home / "queue" / "running").glob("*/*.json"):
        with contextlib.suppress(FileNotFoundError):
            job = loads(path.read_bytes())
            if job.started is not None and not job.state.terminal:
                return True
    return False


def let_some_end(home: Path, chance: random.Random) -> None:
    """Wait for the end of a few jobs and a moment more. In jobs and not in seconds, so that a busy machine runs as many."""

    def ended() -> int:
        return sum(len(os.listdir(home / "queue" / state)) for state in ("done", "error"))

    enough = ended() + chance.randint(0, 5)
    eventually(lambda: ended() >= enough, "jobs to end")
    time.sleep(chance.uniform(0, 0.3))


@pytest.mark.parametrize("mode", MODES)
def test_no_kill_loses_or_doubles_a_job(tmp_path: Path, mode: str) -> None:
    home, caller, counts = tmp_path / "home", Caller(), Counter[str]()
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    print(f"seed {seed}")
    began = time.monotonic()
    while counts["kills in a job"] < KILLS or len(caller.accepted) < JOBS:
        if chance.random() < 0.1:
            with started("serve", "--port", 0, *MODES[mode], home=home) as server:
                time.sleep(chance.uniform(0, 2))
                server.kill()
            counts["kills at a start"] += 1
            continue
        with serving(home, *MODES[mode]) as server:
            enough = threading.Event()
            posting = threading.Thread(target=caller.post_until_it_dies, args=(server, enough))
            posting.start()
            for _ in range(chance.randint(0, 2) if mode == "isolated" else 0):
                worker = server.worker()
                let_some_end(home, chance)
                worker.kill()
                worker.wait(30)
                counts["kills in a job"] += died_on_the_device(home)
                counts["kills of the worker alone"] += 1
            let_some_end(home, chance)
            server.kill()
            counts["kills in a job"] += died_on_the_device(home)
            counts["kills of the service"] += 1
            posting.join()
        print(f"\r{mode}: {dict(counts)} {len(caller.accepted)} jobs, {time.monotonic() - began:.0f} s", end="")
    with serving(home, *MODES[mode]) as server:
        caller.accepted["warm"] = server.submit(**_job("warm"))
        server.wait(caller.accepted["warm"])
        before = _held(server, mode)
        for key in caller.unanswered:
            answer = server.request("POST", "/txt2img", json=_job(key), headers={"Idempotency-Key": key})
            caller.accepted[key] = answer.json()["job_id"]
        for job_id in caller.accepted.values():
            eventually(
                lambda job_id=job_id: server.get(f"/queue/{job_id}?wait=20").json()["state"] in ("done", "error")
            )
        eventually(
            lambda: all(n <= before[what] + 2 for what, n in _held(server, mode).items()), "threads to be let go"
        )
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    ends = all_is_well(home, caller.accepted.values())
    assert len(set(caller.accepted.values())) == len(caller.accepted)
    assert ends.keys() <= {"done", "WorkerDied"}
    assert ends.total() == len(caller.accepted)
    counting.keep(
        f"kills, {mode}",
        **dict(sorted(counts.items())),
        jobs=len(caller.accepted),
        answered_only_when_sent_again=caller.repeated,
        **{f"ended as {end}": ends[end] for end in ("WorkerDied", "done")},
        lost=0,
        torn=0,
        twice=0,
        minutes=round((time.monotonic() - began) / 60, 1),
    )


def _held(server: Program, mode: str) -> dict[str, int]:
    """Descriptors and threads of the service, and of its worker."""
    server.get("/health")
    processes = [psutil.Process(server.process.pid), *([server.worker()] if mode == "isolated" else [])]
    return {
        "descriptors": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
    }
