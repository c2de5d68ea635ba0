"""Workers of a folder, as other processes see them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_api import disk
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.report import WorkerReport


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "queue"


@pytest.fixture
def queue(root: Path) -> Iterator[FileQueue]:
    """Looks on; others work."""
    made = FileQueue(root, recover_every=0.1)
    yield made
    made.close()


def report_of(pid: int, **fields: Any) -> WorkerReport:
    return WorkerReport(pid=pid, event=1.0, **fields)


def put_report(root: Path, name: str, text: str) -> int:
    """A report with its lock, held until the descriptor is closed."""
    (root / "workers" / f"{name}.json").write_text(text)
    fd = disk.lock(root / "workers" / f"{name}.lock")
    assert fd is not None
    return fd


def test_every_worker_of_a_folder_is_seen(root: Path, queue: FileQueue, serving: Any, eventually: Any) -> None:
    first, second = FileQueue(root), FileQueue(root)
    first.report(report_of(1))
    second.report(report_of(2, restarts=1))
    with serving(first, lambda job, control: None):
        with serving(second, lambda job, control: None):
            eventually(lambda: len(queue.workers()) == 2)
            assert {report.pid for report in queue.workers()} == {1, 2}
        assert [report.pid for report in queue.workers()] == [1]
    assert os.listdir(root / "workers") == []


def test_a_dead_worker_is_not_seen_and_its_report_is_cleared_away(
    root: Path, queue: FileQueue, serving: Any, eventually: Any
) -> None:
    fd = put_report(root, "gone", report_of(1).model_dump_json())
    (root / "running" / "gone").mkdir()
    assert [report.pid for report in queue.workers()] == [1]
    os.close(fd)
    assert queue.workers() == []
    with serving(queue, lambda job, control: None):
        eventually(lambda: not (root / "workers" / "gone.json").exists())
    assert os.listdir(root / "workers") == []


def test_those_who_look_do_not_make_a_dead_worker_look_alive(root: Path, queue: FileQueue) -> None:
    os.close(put_report(root, "gone", report_of(1).model_dump_json()))
    with (root / "workers" / "gone.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert queue.workers() == []


@pytest.mark.parametrize(
    "text", ["", "{", '{"pid": "x"}', report_of(1).model_copy(update={"version": 2}).model_dump_json()]
)
def test_a_report_that_cannot_be_read_is_left_out(root: Path, queue: FileQueue, text: str) -> None:
    fd = put_report(root, "odd", text)
    assert queue.workers() == []
    os.close(fd)


def test_a_report_that_cannot_be_written_harms_nobody(
    root: Path, queue: FileQueue, serving: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(queue, lambda job, control: None):
        queue.report(report_of(1))
        eventually(queue.workers)
        (path,) = (root / "workers").glob("*.json")
        path.unlink()
        path.mkdir()
        for pid in (2, 3):
            queue.report(report_of(pid))
        assert queue.workers() == []
        path.rmdir()
        queue.report(report_of(4))
        assert queue.workers() == [report_of(4)]
    assert caplog.text.count("report: left as it is") == 1
