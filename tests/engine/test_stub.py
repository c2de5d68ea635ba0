"""The engine without a model."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest
from asking import plain
from PIL import Image
from serving import ROOT, environment

from diffusion_api.engine.base import Engine, Event, Finished, Preview, Stop, StopAsked
from diffusion_api.engine.stub import StubEngine
from diffusion_api.errors import DeviceLost, Interrupted, NotFinite, OutOfMemory
from diffusion_api.schema.job import Progress, State
from diffusion_api.schema.request import Output, Txt2Img, Upscale


def request(prompt: str = "a lighthouse", **fields: Any) -> Txt2Img:
    return plain(prompt=prompt, height=48, **fields)


def events(asked: Txt2Img, stop: StopAsked = lambda: None) -> list[Event]:
    engine: Engine = StubEngine()
    engine.start()
    engine.wait()
    found = list(engine.run(asked, stop=stop))
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


def test_previews_come_where_they_are_asked_for_and_change_no_picture() -> None:
    told = events(request(steps=5, preview_every=2))
    assert [type(event) for event in told].count(Preview) == 2
    assert np.array_equal(finished(request(preview_every=2)).images[0], finished(request()).images[0])


def test_an_upscaled_picture_has_the_size_that_was_asked_and_no_seed() -> None:
    asked = Upscale(image="a", upscaler="Lanczos", width=61, height=40, output=Output())
    *_, last = StubEngine(lambda name: Image.new("RGB", (20, 10))).run(asked, stop=lambda: None)
    assert isinstance(last, Finished)
    assert (last.images[0].shape, last.seeds) == ((40, 61, 3), (None,))


def test_a_picture_does_not_depend_on_its_company() -> None:
    together = finished(request(count=3)).images[2]
    assert np.array_equal(together, finished(request(seed=3)).images[0])


def test_it_has_no_device() -> None:
    report = StubEngine().report()
    assert (report.name, report.kind) == ("stub", "stub")
    assert report.facts["device_name"] == "stub"


def steps_until_the_end(asked: Txt2Img, engine: StubEngine | None = None) -> tuple[list[int], Exception | None]:
    """The steps that were told, and what ended the job early."""
    seen: list[int] = []
    try:
        for event in (engine or StubEngine()).run(asked, stop=lambda: None):
            if isinstance(event, Progress) and event.state is State.PROCESSING:
                seen.append(event.step)
    except Exception as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize(
    ("hook", "kind", "done"),
    [
        ("fail", RuntimeError, [1, 2]),
        ("fail=1", RuntimeError, []),
        ("fail=4", RuntimeError, [1, 2, 3]),
        ("oom=3", OutOfMemory, [1, 2]),
        ("oom=load", OutOfMemory, []),
        ("memory=1000000000", OutOfMemory, []),
        ("nan=2", NotFinite, [1, 2, 3, 4]),
    ],
)
def test_a_job_can_be_told_to_fail_and_the_next_one_works(hook: str, kind: type[Exception], done: list[int]) -> None:
    engine = StubEngine()
    seen, error = steps_until_the_end(request(f"a stub:{hook} b"), engine)
    assert (seen, type(error)) == (done, kind)
    assert steps_until_the_end(request(), engine) == ([1, 2, 3, 4], None)


def test_a_job_of_one_step_fails_in_it() -> None:
    assert isinstance(steps_until_the_end(request("stub:fail", steps=1))[1], RuntimeError)


def test_a_fault_beyond_the_last_step_does_not_happen() -> None:
    assert steps_until_the_end(request("stub:fail=5 stub:nan=5")) == ([1, 2, 3, 4], None)


def test_a_lost_device_stays_lost() -> None:
    engine = StubEngine()
    seen, error = steps_until_the_end(request("stub:lost=2"), engine)
    assert (seen, type(error)) == ([1], DeviceLost)
    with pytest.raises(DeviceLost):
        next(engine.run(request(), stop=lambda: None))


def test_the_memory_of_a_job_is_used_and_given_back() -> None:
    process = psutil.Process()
    base = process.memory_info().rss
    running = StubEngine().run(request("stub:memory=200"), stop=lambda: None)
    for _ in range(3):
        next(running)
    within = process.memory_info().rss
    list(running)
    after = process.memory_info().rss
    assert within - base > 150 * 2**20
    assert after - base < 50 * 2**20


def run_alone(hook: str) -> subprocess.Popen[str]:
    """A process that runs one job of four steps and prints each step."""
    program = """
import sys
from diffusion_api.engine.stub import StubEngine
from diffusion_api.schema.request import Output, Txt2Img
asked = Txt2Img(model="m", prompt=sys.argv[1], negative_prompt="", steps=4, guidance_scale=1, width=8, height=8,
                sampler="euler", schedule="karras", seed=1, output=Output())
for event in StubEngine().run(asked, stop=lambda: None):
    print(getattr(event, "step", "end"), flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, hook], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("hook", "number", "told"),
    [
        ("stub:die", signal.SIGKILL, ["0", "1", "2"]),
        ("stub:die=1", signal.SIGKILL, ["0"]),
        ("stub:segfault=2", signal.SIGSEGV, ["0", "1"]),
    ],
)
def test_a_job_can_be_told_to_end_the_process(hook: str, number: signal.Signals, told: list[str]) -> None:
    process = run_alone(hook)
    assert process.communicate()[0].split() == told
    assert process.returncode == -number


def test_a_step_that_hangs_listens_to_nobody() -> None:
    stopped = threading.Event()
    running = StubEngine().run(request("stub:hang=2"), stop=lambda: Stop.NOW if stopped.is_set() else None)
    assert [getattr(next(running), "step", None) for _ in range(2)] == [0, 1]
    thread = threading.Thread(target=lambda: next(running), daemon=True)
    thread.start()
    stopped.set()
    thread.join(0.3)
    assert thread.is_alive()


def test_a_job_can_hold_the_interpreter() -> None:
    longest = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal longest
        while not done.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            longest = max(longest, time.monotonic() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    finished(request("stub:gil=1"))
    done.set()
    thread.join()
    assert longest > 0.9


def test_a_job_stops_at_the_step_at_which_it_is_told_to() -> None:
    looks = iter([None] * 5)
    running = StubEngine().run(request(steps=100), stop=lambda: next(looks, Stop.NOW))
    seen = [next(running) for _ in range(6)]
    assert seen[-1].step == 5  # type: ignore[union-attr]
    with pytest.raises(Interrupted, match="while it ran"):
        next(running)


def test_a_job_that_is_stopped_with_a_picture_shows_what_it_has() -> None:
    looks = iter([None] * 3)
    last = events(request(steps=100, count=2), stop=lambda: next(looks, Stop.WITH_PICTURE))[-1]
    assert isinstance(last, Finished)
    assert (last.partial, last.seeds) == (3, (1, 2))
    assert np.array_equal(last.images[0], finished(request(steps=3)).images[0])
    with pytest.raises(Interrupted):
        events(request(), stop=lambda: Stop.WITH_PICTURE)


def test_a_job_that_was_left_to_finish_is_whole() -> None:
    assert finished(request()).partial is None


def test_jobs_run_one_after_the_other_and_a_waiting_one_can_be_stopped() -> None:
    engine, stop = StubEngine(), threading.Event()
    running = engine.run(request(), stop=lambda: None)
    next(running)
    reasons: list[str] = []

    def wait() -> None:
        try:
            next(engine.run(request(), stop=lambda: Stop.NOW if stop.is_set() else None))
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
    assert isinstance(next(engine.run(request(), stop=lambda: None)), Progress)


def test_the_next_job_may_begin_while_a_picture_is_saved() -> None:
    engine = StubEngine()
    saving = engine.run(request(), stop=lambda: None)
    assert any(isinstance(event, Finished) for event in saving)
    assert isinstance(next(engine.run(request(), stop=lambda: Stop.NOW)), Progress)


def test_a_job_that_failed_frees_the_engine() -> None:
    engine = StubEngine()
    with pytest.raises(RuntimeError):
        list(engine.run(request("stub:fail"), stop=lambda: None))
    assert isinstance(list(engine.run(request(), stop=lambda: None))[-1], Finished)
