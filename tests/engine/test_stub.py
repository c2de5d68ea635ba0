"""The engine without a model."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asking import plain
from serving import ROOT, environment

from diffusion_api.engine.base import Engine, Event, Finished
from diffusion_api.engine.stub import StubEngine
from diffusion_api.errors import Interrupted
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.request import Txt2Img


def request(prompt: str = "a lighthouse", **fields: Any) -> Txt2Img:
    return plain(prompt=prompt, height=48, **fields)


def events(asked: Txt2Img, interrupted: Callable[[], bool] = lambda: False) -> list[Event]:
    engine: Engine = StubEngine()
    engine.start()
    engine.wait()
    found = list(engine.run(asked, interrupted=interrupted))
    engine.close()
    return found


def finished(asked: Txt2Img) -> Finished:
    last = events(asked)[-1]
    assert isinstance(last, Finished)
    return last


def test_a_job_loads_steps_and_finishes() -> None:
    first, *steps, last = events(request())
    assert first == Progress(state=State.LOADING, phase="loading")
    assert [(e.fraction, e.step, e.steps, e.phase) for e in steps if isinstance(e, Progress)] == [
        (step / 4, step, 4, "generation") for step in (1, 2, 3, 4)
    ]
    assert isinstance(last, Finished)


def test_a_picture_has_the_size_and_count_that_were_asked() -> None:
    made = finished(request(count=3))
    assert [image.shape for image in made.images] == [(48, 64, 3)] * 3
    assert all(image.dtype == np.uint8 for image in made.images)
    assert made.seeds == (1, 2, 3)


def test_a_picture_is_a_function_of_the_request() -> None:
    first, second = finished(request()).images[0], finished(request()).images[0]
    assert np.array_equal(first, second)
    for change in ({"seed": 2}, {"steps": 5}, {"prompt": "b"}, {"sampler": "heun"}):
        assert not np.array_equal(first, finished(request(**change)).images[0])


def test_a_picture_does_not_depend_on_its_company() -> None:
    together = finished(request(count=3)).images[2]
    assert np.array_equal(together, finished(request(seed=3)).images[0])


def test_it_has_no_device() -> None:
    report = StubEngine().report()
    assert (report.name, report.kind) == ("stub", "stub")
    assert report.facts["device_name"] == "stub"


@pytest.mark.parametrize("steps", [1, 4])
def test_a_job_can_be_told_to_fail(steps: int) -> None:
    with pytest.raises(RuntimeError, match="told to fail"):
        events(request("a stub:fail b", steps=steps))


def test_a_job_can_be_told_to_kill_the_process() -> None:
    program = """
from diffusion_api.engine.stub import StubEngine
from diffusion_api.schema.request import Output, Txt2Img
asked = Txt2Img(model="m", prompt="stub:die", negative_prompt="", steps=4, guidance_scale=1, width=8, height=8,
                sampler="euler", schedule="karras", seed=1, output=Output())
for event in StubEngine().run(asked, interrupted=lambda: False):
    print(getattr(event, "step", "end"), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1", "2"]


def test_a_job_stops_at_the_step_at_which_it_is_told_to() -> None:
    looks = iter([False] * 5)
    running = StubEngine().run(request(steps=100), interrupted=lambda: next(looks, True))
    seen = [next(running) for _ in range(6)]
    assert seen[-1].step == 5  # type: ignore[union-attr]
    with pytest.raises(Interrupted, match="while it ran"):
        next(running)


def test_jobs_run_one_after_the_other_and_a_waiting_one_can_be_stopped() -> None:
    engine, stop = StubEngine(), threading.Event()
    running = engine.run(request(), interrupted=lambda: False)
    next(running)
    reasons: list[str] = []

    def wait() -> None:
        try:
            next(engine.run(request(), interrupted=stop.is_set))
        except Interrupted as error:
            reasons.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    stop.set()
    thread.join(20)
    assert reasons == ["stopped before it began"]
    running.close()  # type: ignore[attr-defined]
    assert isinstance(next(engine.run(request(), interrupted=lambda: False)), Progress)


def test_the_next_job_may_begin_while_a_picture_is_saved() -> None:
    engine = StubEngine()
    saving = engine.run(request(), interrupted=lambda: False)
    assert any(isinstance(event, Finished) for event in saving)
    assert isinstance(next(engine.run(request(), interrupted=lambda: True)), Progress)


def test_a_job_that_failed_frees_the_engine() -> None:
    engine = StubEngine()
    with pytest.raises(RuntimeError):
        list(engine.run(request("stub:fail"), interrupted=lambda: False))
    assert isinstance(list(engine.run(request(), interrupted=lambda: False))[-1], Finished)
