"""Faults 12, 13, 15, 16 and 20: the disk of a running service is full, fails, cannot be written, or loses a folder."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import counting
import pytest
from aftermath import all_is_well
from driving import places
from fake_models import diffusers_folder
from serving import MODES, Program, eventually, run, serving
from tracing import failed_flushes, injected

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

JOB: dict[str, Any] = {"prompt": "a lighthouse", "steps": 2, "seed": 1, "fileType": "png"}


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size in the place of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Nothing in the folder or in those below it can be made, renamed or removed meanwhile."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    if subprocess.run(["chattr", "+i", *folders], capture_output=True, check=False).returncode:
        pytest.skip("needs root and a file system that knows chattr +i")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *folders], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on the disk of that folder."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    return filler


def still_works(server: Program, home: Path, *jobs: str) -> None:
    """The same process runs a job, and stops as asked; everything is as it should be."""
    job_id = server.result(**JOB)["job_id"]
    assert server.process.poll() is None
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
    all_is_well(home, [job_id, *jobs])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """How the service runs its jobs."""
    name: str = request.param
    return name


def test_on_a_full_disk_no_job_is_taken_and_all_else_goes_on(tmp_path: Path, mode: str) -> None:
    with mounted(tmp_path / "home", "4m") as home:
        diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
        with serving(home, *MODES[mode], disk_reserve_mb=0) as server:
            before = server.result(**JOB)["job_id"]
            filler = fill(home)
            for _ in range(20):
                refused = server.post(**JOB)
                assert refused.status_code == 507, refused.text
                assert int(refused.headers["Retry-After"]) > 0
            assert list((home / "queue" / "tmp").iterdir()) == []
            assert server.status(before)["state"] == "done"
            assert server.get("/health").status_code == 200
            eventually(lambda: server.get("/ready").status_code == 503, "the full disk to be noticed")
            server.kill()
        with serving(home, *MODES[mode], disk_reserve_mb=0) as server:
            assert server.status(before)["state"] == "done"
            fill(home)  # what the dead process had held is free
            assert server.post(**JOB).status_code == 507
            filler.unlink()
            eventually(lambda: server.get("/ready").status_code == 200, "the room to be noticed")
            still_works(server, home, before)
    counting.keep(f"disk, {mode}", **{"full at 20 submissions": "20 refused, none half"})


def test_a_picture_for_which_there_is_no_room_fails_its_job_alone(home: Path, mode: str) -> None:
    with mounted(home / "outputs", "256k"), serving(home, *MODES[mode], disk_reserve_mb=0) as server:
        large = server.submit(**JOB | {"width": 2048, "height": 2048})
        assert server.wait(large, "error")["error"] == "the disk is full: the picture could not be saved"
        assert [path.name for path in (home / "outputs").iterdir()] == [".tmp"]
        still_works(server, home, large)
    counting.keep(f"disk, {mode}", **{"full at a picture": "that job is an error, the next one is done"})


def test_jobs_wait_while_the_disk_of_the_pictures_has_no_room(home: Path, mode: str) -> None:
    with mounted(home / "outputs", "2m") as outputs, serving(home, *MODES[mode], disk_reserve_mb=1) as server:
        before = server.result(**JOB)["job_id"]
        filler = fill(outputs)
        eventually(lambda: server.get("/ready").status_code == 503, "the full disk to be noticed")
        assert "0 MiB are left on the disk of the pictures" in server.get("/ready").text
        waiting = [server.submit(**JOB) for _ in range(20)]
        time.sleep(6)
        assert [server.status(job_id)["state"] for job_id in waiting] == ["queued"] * 20
        assert server.log.count("no job begins now") == 1
        filler.unlink()
        for job_id in waiting:
            server.wait(job_id)
        still_works(server, home, before, *waiting)
    counting.keep(f"disk, {mode}", **{"full with 20 jobs waiting": "20 waited, all done when there was room"})


@pytest.mark.parametrize(("number", "what"), [(1, "file"), (2, "folder")])
def test_a_flush_that_fails_takes_no_job_and_is_not_tried_again(
    home: Path, tmp_path: Path, number: int, what: str, mode: str
) -> None:
    with serving(home, *MODES[mode]) as server:
        server.result(**JOB)
        with injected(f"fsync:error=EIO:when={number}", server.process.pid, tmp_path / "strace"):
            refused = server.post(**JOB)
        assert refused.status_code == 503, refused.text
        assert "Input/output error" in refused.json()["error"]
        (failed,) = failed_flushes(tmp_path / "strace")
        assert what == ("folder" if failed[1].endswith("/queued") else "file")
        assert len(places(home)) == 1
        assert list((home / "queue" / "tmp").iterdir()) == []
        still_works(server, home)
    counting.keep(f"disk, {mode}", **{f"a flush of a {what} fails": "refused, nothing of it left, not tried again"})


def test_a_disk_whose_flushes_fail_shows_until_they_do_not(home: Path, tmp_path: Path, mode: str) -> None:
    with serving(home, *MODES[mode]) as server:
        done = server.result(**JOB)["job_id"]
        with injected("fsync:error=EIO", server.process.pid, tmp_path / "strace"):
            assert [server.post(**JOB).status_code for _ in range(3)] == [503] * 3
            eventually(lambda: server.get("/ready").status_code == 503, "it to show")
            assert "Input/output error" in server.get("/ready").text
            assert server.get("/health").status_code == 200
            assert server.status(done)["state"] == "done"
        files = [path for _, path in failed_flushes(tmp_path / "strace") if "/tmp/" in path]
        assert len(files) == len(set(files)) >= 4
        eventually(lambda: server.get("/ready").status_code == 200, "it to show that all is well")
        still_works(server, home, done)
    counting.keep(f"disk, {mode}", **{"all flushes fail": "refused and shown, answers go on, works afterwards"})


def test_a_job_ends_however_long_its_end_cannot_be_flushed(home: Path, tmp_path: Path, mode: str) -> None:
    with serving(home, *MODES[mode]) as server:
        server.result(**JOB)
        pid = server.worker().pid if mode == "isolated" else server.process.pid
        job_id = server.submit(**JOB | {"prompt": "stub:seconds=2"})
        eventually(lambda: server.status(job_id)["state"] == "processing", "it to run")
        with injected("fsync:error=EIO", pid, tmp_path / "strace"):
            time.sleep(6)
            assert len(failed_flushes(tmp_path / "strace")) >= 2
        told = server.wait(job_id, "error")["error"]
        assert told == "the folder of outputs cannot be used: Input/output error"
        still_works(server, home, job_id)
    counting.keep(f"disk, {mode}", **{"flushes fail at the end of a job": "it ends as an error when they work again"})


def test_a_folder_that_cannot_be_written_stops_the_start_in_one_line(home: Path, mode: str) -> None:
    for name, told in (("queue", "the folder of the queue"), ("outputs", "the folder of outputs")):
        with mounted(home / name, "1m"):
            subprocess.run(["mount", "-o", "remount,ro", home / name], check=True)
            ended = run("serve", "--port", 0, *MODES[mode], "--home", home, cwd=home, engine="stub")
        assert ended.returncode == 1
        assert f"diffusion-api: {told} cannot be used: Read-only file system" in ended.stderr.splitlines()
        assert "Traceback" not in ended.stderr
    counting.keep(f"disk, {mode}", **{"read-only at the start": "one line, exit code 1"})


def test_a_folder_that_can_no_longer_be_written_is_borne(home: Path, mode: str) -> None:
    with serving(home, *MODES[mode]) as server:
        done, process = server.result(**JOB)["job_id"], server.process.pid
        worker = server.worker().pid if mode == "isolated" else process
        waiting = server.submit(**JOB | {"prompt": "stub:seconds=1"})
        eventually(lambda: server.status(waiting)["state"] == "processing", "it to run")
        with frozen(home / "queue"):
            refused = server.post(**JOB)
            assert refused.status_code == 503
            assert "Operation not permitted" in refused.json()["error"]
            eventually(lambda: server.get("/ready").status_code == 503, "it to show")
            time.sleep(8)  # looks for dead workers and the end of the running job fall into this
            assert server.get("/health").status_code == 200
            assert server.status(done)["state"] == "done"
        server.wait(waiting)
        assert server.process.poll() is None
        assert mode == "in-process" or server.worker().pid == worker
        still_works(server, home, done, waiting)
    counting.keep(f"disk, {mode}", **{"read-only while it runs": "refused and shown, no restart, works afterwards"})


def test_a_folder_of_pictures_that_is_removed_is_made_again(home: Path, mode: str) -> None:
    with serving(home, *MODES[mode]) as server:
        gone = server.result(**JOB)["job_id"]
        running = server.submit(**JOB | {"prompt": "stub:seconds=1"})
        eventually(lambda: server.status(running)["state"] == "processing", "it to run")
        shutil.rmtree(home / "outputs")
        assert server.wait(running)["image"]
        assert server.status(gone)["image"] is None
        assert server.get("/ready").status_code == 200
    counting.keep(f"disk, {mode}", **{"the folder of pictures is removed": "made again, no job fails"})
