"""Each call with which the queue changes its folders is, once, the last one before a kill or a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from driving import CAP, Process, leftovers, places
from forgetful import Chance, Disk, Killed

from diffusion_api.errors import QueueUnusable
from diffusion_api.queues._file import workers
from diffusion_api.queues.base import Control
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job, State, dumps

CRASHES: dict[str, Chance | None] = {
    "kill": None,
    "power cut": lambda: False,
    "kind power cut": lambda: True,
}

STEPS = {
    "submit": "",
    "submit_with_key": "",
    "send_the_key_again": "submit_with_key",
    "serve": "submit",
    "claim": "submit serve",
    "start": "submit serve claim",
    "release": "submit serve claim start",
    "publish": "submit serve claim start",
    "publish_into_a_new_folder": "submit serve claim start lose_the_pictures",
    "cancel": "submit",
    "cancel_running": "submit serve claim start",
    "end_cancelled": "submit serve claim start cancel_running",
    "take_over": "submit serve claim start die",
    "take_over_what_had_just_ended": "submit serve claim start end_without_a_flush die take_over die",
    "take_over_cancelled": "submit serve claim start cancel_running die",
    "take_over_the_last_attempt": "submit serve claim start die take_over claim start die take_over claim start die",
    "forget": "submit serve claim start publish",
    "sweep": "submit serve claim start publish",
    "pause": "submit",
    "resume": "submit pause",
}
"""What happens, and what has happened before."""


class Scene:
    """An installation with one job. What was promised of it so far: ``answered``, ``ended``, ``paused``."""

    job: Job
    control: Control

    def __init__(self, home: Path, disk: Disk) -> None:
        self.home, self.disk = home, disk
        self.answered = False
        self.ended: set[State] = set()
        self.paused: bool | None = False
        self.process = Process(home)

    def do(self, step: str) -> None:
        getattr(self, step)()

    def submit(self) -> None:
        self.process.submit("job")
        self.answered = True

    def submit_with_key(self) -> None:
        self.answered = self.process.submit("job", key="k") == "job"

    def send_the_key_again(self) -> None:
        assert self.process.submit("other", key="k") == "job"

    def serve(self) -> None:
        self.process.serve()

    def claim(self) -> None:
        claimed = self.process.claim()
        assert claimed
        self.job, self.control = claimed

    def start(self) -> None:
        self.job = self.control.started()

    def release(self) -> None:
        self.control.release()

    def publish(self) -> None:
        self.process.publish(self.job, self.control)
        self.ended = {State.DONE}

    publish_into_a_new_folder = publish

    def lose_the_pictures(self) -> None:
        self.process.outputs.check()
        for folder in (self.home / "outputs" / ".tmp", self.home / "outputs"):
            folder.rmdir()

    def cancel(self) -> None:
        self.process.queue.cancel("job")
        self.ended = {State.CANCELLED}

    def cancel_running(self) -> None:
        self.process.queue.cancel("job")
        self.ended = {State.CANCELLED, State.DONE}

    def end_cancelled(self) -> None:
        self.control.commit(self.job.cancelled())

    def die(self) -> None:
        self.disk.kill(None)
        self.process = Process(self.home)

    def take_over(self) -> None:
        self.process.serve()

    take_over_cancelled = take_over_the_last_attempt = take_over_what_had_just_ended = take_over

    def end_without_a_flush(self) -> None:
        (path,) = self.home.glob("queue/running/*/*.json")
        self.process.queue._places.write(path, dumps(self.job.failed("Oops", "no picture")))
        os.rename(path, self.home / "queue" / "error" / "job.json")
        self.ended = {State.ERROR}

    def forget(self) -> None:
        self.process.queue.forget("job")

    def sweep(self) -> None:
        self.process.queue.sweep(Limits(count=0), now=0)

    def pause(self) -> None:
        self.paused = None
        self.process.queue.pause()
        self.paused = True

    def resume(self) -> None:
        self.paused = None
        self.process.queue.resume()
        self.paused = False


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """A fresh one in that folder, on a disk that forgets, in the first boot of the machine."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder / "home", patch)
        patch.setattr(workers, "_BOOT", folder / "boot")
        (folder / "boot").write_text("first")
        made = Scene(disk.root, disk)
        yield made
        disk.kill(None)


@pytest.mark.parametrize("crash", ["kill", "power cut", pytest.param("kind power cut", marks=pytest.mark.chaos)])
@pytest.mark.parametrize("step", STEPS)
def test_no_crash_at_any_call_loses_or_doubles_a_job(tmp_path: Path, step: str, crash: str) -> None:
    for at in count():
        with scene(tmp_path / str(at)) as now:
            for before in STEPS[step].split():
                now.do(before)
            over = False
            try:
                with now.disk.running(None, killed_at=at):
                    now.do(step)
                    over = True
            except Killed:
                pass
            survives = CRASHES[crash]
            if survives is None:
                now.disk.kill(None)
            else:
                now.disk.cut(survives)
                (tmp_path / str(at) / "boot").write_text("second")
            assert len(places(now.home).get("job", [])) in ((1,) if now.answered else (0, 1)), f"call {at}"
            after = Process(now.home)
            after.serve()
            assert now.paused in (None, after.queue.paused is not None)
            after.queue.resume()
            after.work_off()
            lies = places(now.home).get("job", [])
            assert len(lies) == (1 if now.answered else len(lies)) <= 1
            assert set(places(now.home)) <= {"job"}
            if lies not in ([], ["gone"]):
                snapshot = after.queue.get("job")
                assert snapshot
                assert snapshot.state.terminal
                assert snapshot.state in (now.ended or {snapshot.state})
                assert snapshot.job.attempts <= CAP
                assert snapshot.state is not State.DONE or after.is_published(snapshot.job)
            assert leftovers(now.home) == []
        if over:
            assert at > 0 or step in ("claim", "send_the_key_again")
            return


@pytest.mark.parametrize("first", ["is killed before the flush", "has a flush that fails"])
def test_a_key_whose_first_try_was_not_flushed_stands_for_one_job_through_a_power_cut(
    tmp_path: Path, first: str
) -> None:
    with scene(tmp_path / "scene") as now:
        now.disk.failing = 1 if "fails" in first else 0
        with (
            contextlib.suppress(Killed, QueueUnusable),
            now.disk.running(None, killed_at=3 if "killed" in first else None),
        ):
            now.submit_with_key()
        assert not now.answered
        now.disk.kill(None)
        assert Process(now.home).submit("second", key="k") == "job"
        now.disk.cut(lambda: False)
        assert Process(now.home).submit("third", key="k") == "job"
