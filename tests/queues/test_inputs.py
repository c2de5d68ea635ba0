"""Pictures that jobs bring along: stored once, durably before their job, and kept for as long as a job names them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from asking import FIELDS
from forgetful import Disk, Killed

from diffusion_api import blobs, retention
from diffusion_api.errors import InputLost, QueueFull
from diffusion_api.queues.base import Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job, Result, State
from diffusion_api.schema.request import Img2Img, Mask
from diffusion_api.usage import Usage

WEEK = Limits(seconds=7 * 24 * 60 * 60.0)
LATER = 8 * 24 * 60 * 60.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "queue"


@pytest.fixture
def file_queue(root: Path) -> Iterator[FileQueue]:
    made = FileQueue(root)
    yield made
    made.close()


def bringing(image: str, mask: str | None = None, **fields: Any) -> Job:
    """A job that brings these stored pictures along."""
    asked = Img2Img(**FIELDS | {"image": image, "strength": 0.5, "mask": Mask(image=mask) if mask else None})
    return Job(request=asked, **fields)


def is_there(queue: Queue, name: str) -> bool:
    try:
        queue.read_input(name)
    except InputLost:
        return False
    return True


def test_what_is_stored_is_read_back(queue: Queue) -> None:
    names = [queue.store_input(data) for data in (b"one", b"two", b"one", b"")]
    assert [queue.read_input(name) for name in names] == [b"one", b"two", b"one", b""]
    assert names[0] == names[2]


@pytest.mark.parametrize("name", ["0" * 64, "", "..", "../pace.json", "A" * 64])
def test_what_was_never_stored_is_lost(queue: Queue, name: str) -> None:
    with pytest.raises(InputLost, match="send the job again"):
        queue.read_input(name)


def test_nothing_is_stored_for_a_queue_that_is_full(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(max_waiting=1)
    queue.enqueue(bringing(queue.store_input(b"one")))
    with pytest.raises(QueueFull):
        queue.store_input(b"two")
    assert not is_there(queue, blobs.name_of(b"two"))


def test_an_input_stays_as_long_as_a_job_names_it(queue: Queue, serving: Any, eventually: Any, result: Result) -> None:
    waits, mask, runs, ended, nobodys = (queue.store_input(f"{n}".encode()) for n in range(5))
    queue.cancel(queue.enqueue(bringing(ended)).id)
    running = queue.enqueue(bringing(runs, priority=9))
    queue.enqueue(bringing(waits, mask))
    swept = []

    def handle(job: Job, control: Any) -> None:
        if job.id == running.id:
            control.started()
            queue.sweep(Limits(), now=time.time() + LATER)
            swept.extend(name for name in (waits, mask, runs, ended, nobodys) if not is_there(queue, name))
        control.commit(job.succeeded(result))

    with serving(queue, handle):
        eventually(lambda: queue.counts()[State.DONE] == 2)
    assert swept == [nobodys]
    queue.sweep(WEEK, now=time.time() + LATER)
    assert not any(is_there(queue, name) for name in (waits, mask, runs, ended))


@pytest.mark.parametrize(
    ("kept", "age", "stays"),
    [
        (WEEK, 6 * 24 * 3600, True),
        (WEEK, 8 * 24 * 3600, False),
        (Limits(), 3000, True),
        (Limits(), 4000, False),
        (Limits(seconds=0, count=0), 3000, True),
    ],
)
def test_an_input_of_no_job_stays_for_a_time(queue: Queue, kept: Limits, age: float, stays: bool) -> None:
    name = queue.store_input(b"a picture")
    queue.sweep(kept, now=time.time() + age)
    assert is_there(queue, name) is stays


def test_an_input_that_is_stored_again_while_it_is_swept_stays(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    name = queue.store_input(b"a picture")
    again: list[str] = []

    def due_but_wanted(*args: Any, **options: Any) -> list[retention.Entry]:
        found = retention.due(*args, **options)
        again.append(queue.store_input(b"a picture"))
        return found

    monkeypatch.setattr(blobs, "due", due_but_wanted)
    queue.sweep(WEEK, now=time.time() + LATER)
    assert again == [name, name]
    assert is_there(queue, name)


# what only files can do


def stored(root: Path) -> list[Path]:
    return list((root / "inputs").iterdir())


def test_the_same_picture_lies_there_once(root: Path, file_queue: FileQueue) -> None:
    file_queue.store_input(b"a picture")
    (path,) = stored(root)
    os.utime(path, (0, 0))
    file_queue.store_input(b"a picture")
    assert stored(root) == [path]
    assert time.time() - path.stat().st_mtime < 3600


@pytest.mark.parametrize("damage", [b"", b"a pic", b"A picture", b"a picture and more"])
def test_a_damaged_input_is_told_and_mended_by_sending_it_again(
    root: Path, file_queue: FileQueue, damage: bytes
) -> None:
    name = file_queue.store_input(b"a picture")
    (path,) = stored(root)
    path.write_bytes(damage)
    with pytest.raises(InputLost, match="damaged on the disk"):
        file_queue.read_input(name)
    file_queue.store_input(b"a picture")
    assert file_queue.read_input(name) == b"a picture"


def test_inputs_count_as_what_the_queue_takes_of_the_disk(root: Path, file_queue: FileQueue) -> None:
    before = Usage({"queue": root}).now()["queue"]
    file_queue.store_input(os.urandom(2**20))
    after = Usage({"queue": root}).now()["queue"]
    assert (after.files - before.files, after.bytes - before.bytes >= 2**20) == (1, True)


def test_no_link_is_followed(root: Path, file_queue: FileQueue, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    link = root / "inputs" / blobs.name_of(b"mine")
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(InputLost):
        file_queue.read_input(link.name)
    file_queue.sweep(WEEK, now=time.time() + LATER)
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("before", "crash"),
    [
        ("nothing", "kill"),
        ("nothing", "power cut that spares nothing"),
        ("the same picture", "power cut that spares nothing"),
        ("a torn one", "power cut that spares all"),
    ],
)
def test_a_job_that_was_stored_has_its_picture_wherever_the_process_ended(
    tmp_path: Path, before: str, crash: str
) -> None:
    for at in count():
        stored = False
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(tmp_path / str(at), patch)
            queue = FileQueue(disk.root / "queue")
            if before != "nothing":
                queue.store_input(b"a picture")
            if before == "a torn one":
                (disk.root / "queue" / "inputs" / blobs.name_of(b"a picture")).write_bytes(b"a pic")
            try:
                with disk.running(None, killed_at=at):
                    queue.enqueue(bringing(queue.store_input(b"a picture")))
                    stored = True
            except Killed:
                pass
            if crash == "kill":
                disk.kill(None)
            else:
                disk.cut(lambda: crash == "power cut that spares all")
            later = FileQueue(disk.root / "queue")
            jobs = later.jobs()
            assert len(jobs) == 1 or not stored
            assert all(later.read_input(name) == b"a picture" for job in jobs for name in job.request.inputs), at
            disk.kill(None)
        if stored:
            assert at > 3
            return


def test_a_picture_that_another_left_unflushed_is_flushed(tmp_path: Path) -> None:
    for at in count():
        finished = False
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(tmp_path / str(at), patch)
            first, second = (FileQueue(disk.root / "queue") for _ in range(2))
            try:
                with disk.running("first", killed_at=at):
                    first.store_input(b"a picture")
                    finished = True
            except Killed:
                pass
            second.enqueue(bringing(second.store_input(b"a picture")))
            disk.cut(lambda: False)
            (job,) = FileQueue(disk.root / "queue").jobs()
            assert second.read_input(job.request.inputs[0]) == b"a picture", at
        if finished:
            assert at > 3
            return
