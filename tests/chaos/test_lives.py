"""Faults 23 and 44: the next life of a service finds another clock, other limits, or a model less."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import counting
import pytest
from aftermath import all_is_well, ended
from fake_models import diffusers_folder
from serving import MODES, eventually, serving

from diffusion_api.settings import DATA

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SET_CLOCK = """
import time
for name, one in (("time", 1), ("time_ns", 10**9)):
    setattr(time, name, lambda real=getattr(time, name), one=one: real() + {seconds} * one)
"""
"""Sets the clock of a process ahead. Under faketime 0.9.10 Python's own ``time.sleep`` fails (clock_nanosleep, EINVAL)."""


@pytest.mark.parametrize("mode", MODES)
def test_clocks_that_leap_between_lives_change_no_order_and_lose_nothing(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs: list[str] = []
    for hours in (0, 2, -2, 24, -24):
        (tmp_path / "sitecustomize.py").write_text(SET_CLOCK.format(seconds=3600 * hours))
        with serving(home, "--no-worker") as server:
            jobs += [server.submit(prompt="a lighthouse", steps=2, seed=len(jobs)) for _ in range(4)]
            assert [server.status(job_id)["position"] for job_id in jobs] == list(range(len(jobs)))
    with serving(home, *MODES[mode]) as server:
        for job_id in jobs:
            server.wait(job_id)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    records = [ended(home, job_id) for job_id in jobs]
    assert sorted(jobs, key=lambda job_id: ended(home, job_id).started or 0) == jobs
    assert all_is_well(home, jobs) == {"done": len(jobs)}
    assert [job.attempts for job in records] == [1] * len(jobs)
    counting.keep(f"another life, {mode}", **{"clocks that leap by hours and days": f"{len(jobs)} jobs in order"})


@pytest.mark.parametrize("mode", MODES)
def test_what_waits_is_run_under_other_limits_and_fails_alone_without_its_model(tmp_path: Path, mode: str) -> None:
    home = tmp_path / "home"
    removed = home / "stable_diffusion" / "models" / "removed"
    shutil.copytree(DATA / "models" / "shapes", removed)
    job = {"prompt": "a large red circle", "steps": 2, "width": 64, "height": 64, "seed": 1}
    with serving(home, shipped_models=True) as server:
        running = server.submit(**job | {"model": "shapes", "prompt": "stub:seconds=60"})
        eventually(lambda: server.status(running)["state"] == "processing" or server.status(running)["progress"], "it")
        jobs = {server.submit(**job, model=model): model for model in ["shapes", "removed"] * 50}
        server.kill()
    shutil.rmtree(removed)
    with serving(home, *MODES[mode], shipped_models=True, engine="diffusers", max_steps=1) as server:
        assert server.post(**job, model="shapes").status_code == 400
        for job_id, model in jobs.items():
            told = server.wait(job_id, "done" if model == "shapes" else "error")
            assert model == "shapes" or "'removed'" in told["error"]
        server.wait(running)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert all_is_well(home, [running, *jobs]) == {"done": 51, "UnknownModel": 50}
    counting.keep(
        f"another life, {mode}",
        **{
            "100 waiting and 1 running, smaller limits, a model removed": "51 done, 50 told that their model is unknown"
        },
    )
