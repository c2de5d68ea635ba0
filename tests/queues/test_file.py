"""What only a queue on disk can promise: it outlives its processes, and shares its folder with others."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffusion_api
from diffusion_api import disk
from diffusion_api.errors import DiskFull, InvalidRequest, QueueFull, QueueUnusable, TooLarge
from diffusion_api.queues._file.workers import boot_id
from diffusion_api.queues.base import Control, Snapshot
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job, Progress, Result, State, dumps, loads

PLACES = ("queued", "running/*", "done", "error", "cancelled")
NURSERY = Path(__file__).with_name("nursery.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "queue"


@pytest.fixture
def queue(root: Path) -> Iterator[FileQueue]:
    made = FileQueue(root, recover_every=0.1)
    yield made
    made.close()


class Nursery:
    """Spawns and kills processes that use a queue; ``lines`` is what they say they have done."""

    def __init__(self, root: Path, journal: Path) -> None:
        self._root, self._journal = root, journal
        journal.touch()
        package = str(Path(diffusion_api.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": package}
        self._process = subprocess.Popen(
            [sys.executable, NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._alive: set[int] = set()

    def spawn(self, role: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(role, self._root, self._journal, file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        self._alive.add(child)
        return child

    def kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        self.wait(child)

    def wait(self, child: int) -> None:
        deadline = time.monotonic() + 20
        while _exists(child):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self._alive.discard(child)

    def lines(self, word: str) -> list[list[str]]:
        said = (line.split() for line in self._journal.read_text().splitlines())
        return [rest for first, *rest in said if first == word]

    def close(self) -> None:
        for child in list(self._alive):
            if _exists(child):
                self.kill(child)
        self._process.communicate()


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def nursery(root: Path, tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(root, tmp_path / "journal")
    yield made
    made.close()


def records(root: Path) -> dict[str, list[str]]:
    """Where the records of each job lie."""
    found: dict[str, list[str]] = {}
    for place in PLACES:
        for path in root.glob(f"{place}/*.json"):
            found.setdefault(loads(path.read_bytes()).id, []).append(path.parent.relative_to(root).parts[0])
    return found


def names(root: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (root / folder).iterdir())


def record_name(job_id: str, *, turn: int = 0, sequence: int | None = None) -> str:
    """How a waiting or claimed record of priority 0 and of the caller without a name is named."""
    return f"09-{turn:010d}-{time.time_ns() if sequence is None else sequence:020d}-e3b0c442-{job_id}.json"


def dead_worker(root: Path, job: Job) -> Path:
    """The folder of a worker that died with that job in hand; the path of the record."""
    worker = str(uuid.uuid4())
    (root / "workers" / f"{worker}.lock").touch()
    (root / "running" / worker).mkdir()
    path = root / "running" / worker / record_name(job.id)
    path.write_bytes(dumps(job))
    return path


def recover(root: Path, **options: Any) -> None:
    """One look for dead workers, and no work."""
    queue = FileQueue(root, **options)
    queue.stop()
    queue.serve(lambda job, control: pytest.fail("claimed after the stop"))
    queue.close()


def finish(result: Result) -> Any:
    return lambda job, control: control.commit(job.succeeded(result))


# the folder


def test_the_folders_are_made_for_this_user_only(root: Path, queue: FileQueue, new_job: Any) -> None:
    queue.enqueue(new_job())
    expected = "cancelled done error gone inputs keys progress queued running tmp workers".split()
    assert names(root, ".") == expected
    assert all((root / name).stat().st_mode & 0o777 == 0o700 for name in expected)
    [record] = (root / "queued").iterdir()
    assert record.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_used_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "queue").touch()
    with pytest.raises(QueueUnusable) as raised:
        FileQueue(tmp_path / "queue")
    assert str(tmp_path) not in str(raised.value)


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:40 / {home}/on\\040nfs rw shared:1 - nfs4 server:/home rw,vers=4.2
41 27 0:41 / {home}/host rw - 9p host rw
42 27 0:42 / {home}/cloud rw master:7 propagate_from:2 - fuse.sshfs someone@host: rw
43 27 0:43 / {home}/disk rw - cifs //server/share rw
44 27 0:44 / {home}/disk rw - xfs /dev/vdb rw
45 27 0:45 / {home}/usb rw - fuse.ntfs-3g /dev/sdb rw
46 27 0:46 / {home}/n rw - nfs server:/n rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("on nfs", "nfs4"), ("on nfs/deep/er", "nfs4"), ("host", "9p"), ("cloud", "fuse.sshfs"), ("link", "nfs4")]
    + [(local, None) for local in ("here", "disk", "usb", "nn")],
)
def test_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, kind: str | None
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(home=tmp_path))
    monkeypatch.setattr(disk, "_MOUNTS", mounts)
    (tmp_path / "on nfs").mkdir()
    (tmp_path / "link").symlink_to("on nfs")
    if kind is None:
        FileQueue(tmp_path / folder / "queue")
        return
    with pytest.raises(QueueUnusable, match=re.escape(f"network file system ({kind})")) as raised:
        FileQueue(tmp_path / folder / "queue")
    assert str(tmp_path) not in str(raised.value)


def test_a_system_that_tells_no_mounts_is_trusted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_MOUNTS", root / "none")
    FileQueue(root)


def test_a_job_outlives_its_process(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job(payload={"prompt": "ä" * 1000})
    queue.enqueue(job)
    queue.close()
    assert FileQueue(root).get(job.id) == Snapshot(job, position=0)


def test_instances_see_each_others_jobs_at_once(root: Path, queue: FileQueue, new_job: Any) -> None:
    other = FileQueue(root)
    for _ in range(3):
        job = new_job()
        other.enqueue(job)
        snapshot = queue.get(job.id)
        assert snapshot is not None
        assert snapshot.job == job
        assert other.cancel(job.id) == queue.get(job.id)


def test_what_could_not_be_read_back_is_refused(root: Path, queue: FileQueue, new_job: Any) -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    refused = {
        InvalidRequest: [new_job(payload={"x": deep}), new_job(payload={"x": "\ud800"}), new_job(id="../x")],
        TooLarge: [new_job(payload={"x": "y" * 3_000_000})],
    }
    for error, jobs in refused.items():
        for job in jobs:
            with pytest.raises(error):
                queue.enqueue(job)
    assert names(root, "queued") == names(root, "tmp") == []


# order


def test_the_order_survives_a_clock_set_back(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [new_job(id=f"job-{n}") for n in range(6)]
    clock = time.time_ns()
    for job, at in zip(jobs[:3], (clock, clock - 10**12, clock - 10**13), strict=True):
        monkeypatch.setattr(time, "time_ns", lambda at=at: at)
        queue.enqueue(job)
    other = FileQueue(root)
    for job in jobs[3:]:
        other.enqueue(job)
    assert names(root, "queued") == sorted(names(root, "queued"), key=lambda name: name[-6])
    assert [job.id for job in FileQueue(root).jobs()] == [job.id for job in jobs]


def test_the_order_takes_in_what_runs(root: Path, new_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = new_job(), new_job()
    FileQueue(root)
    dead_worker(root, old)
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    queue = FileQueue(root)
    queue.enqueue(new)
    recover(root)
    assert [job.id for job in queue.jobs()] == [old.id, new.id]


def test_a_stray_name_does_not_break_the_sequence(root: Path, queue: FileQueue, new_job: Any) -> None:
    stray, job = new_job(), new_job()
    (root / "queued" / record_name(stray.id, turn=10**10 - 1, sequence=10**20 - 1)).write_bytes(dumps(stray))
    FileQueue(root).enqueue(job)
    assert [found.id for found in queue.jobs()] == [job.id, stray.id]


def test_a_job_has_its_place_before_it_is_written(root: Path, new_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, job, late, write = FileQueue(root, max_waiting=1), new_job(), new_job(), disk.write_whole

    def write_late(target: Path, data: bytes, **options: Any) -> None:
        assert queue.get("nobody") is None
        with pytest.raises(QueueFull):
            queue.enqueue(late)
        assert queue.get(job.id) is None
        write(target, data, **options)

    monkeypatch.setattr(disk, "write_whole", write_late)
    queue.enqueue(job)
    assert queue.jobs() == [job]


# several processes


def test_each_job_goes_to_one_worker(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, eventually: Any
) -> None:
    jobs = [new_job() for _ in range(300)]
    for job in jobs:
        _drop(root, job)
    for _ in range(3):
        nursery.spawn("work")
    eventually(lambda: len(nursery.lines("ended")) >= len(jobs))
    claimed = nursery.lines("claimed")
    assert sorted(job_id for job_id, _ in claimed) == sorted(job.id for job in jobs)
    assert len({process for _, process in claimed}) == 3
    assert records(root) == {job.id: ["done"] for job in jobs}
    assert names(root, "progress") == names(root, "tmp") == []


def test_progress_and_cancelling_cross_processes(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, eventually: Any
) -> None:
    job = new_job()
    nursery.spawn("hang")
    queue.enqueue(job)
    eventually(lambda: nursery.lines("started"))
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert snapshot.progress == Progress(state=State.PROCESSING, fraction=0.5, phase="hanging")
    assert snapshot.job.attempts == 1
    assert [(found.id, found.state) for found in queue.jobs()] == [(job.id, State.PROCESSING)]
    cancelled = queue.cancel(job.id)
    assert cancelled is not None
    assert cancelled.state is State.PROCESSING
    eventually(lambda: nursery.lines("told"))


def test_how_a_job_shall_stop_crosses_processes(
    root: Path, queue: FileQueue, new_job: Any, serving: Any, eventually: Any
) -> None:
    other, told = FileQueue(root), {}

    def handle(job: Job, control: Control) -> None:
        control.started()
        other.cancel(job.id, partial=job.id == "partial")
        eventually(lambda: control.cancelled)
        told[job.id] = control.partial
        control.commit(job.cancelled())

    queue.enqueue(new_job(id="plain"))
    queue.enqueue(new_job(id="partial"))
    with serving(queue, handle):
        eventually(lambda: len(names(root, "cancelled")) == 2)
    assert told == {"plain": False, "partial": True}


def test_a_cancelled_job_whose_worker_died_ends_cancelled(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, eventually: Any
) -> None:
    job = new_job()
    queue.enqueue(job)
    child = nursery.spawn("hang")
    eventually(lambda: nursery.lines("started"))
    queue.cancel(job.id)
    nursery.kill(child)
    recover(root)
    assert queue.get(job.id) is not None
    assert records(root) == {job.id: ["cancelled"]}
    assert names(root, "running") == names(root, "workers") == names(root, "progress") == []


def test_a_surviving_worker_takes_over_what_a_dead_one_ran(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job, handled = new_job(), []

    def handle(job: Job, control: Control) -> None:
        handled.append((job.id, job.attempts))
        control.commit(control.started().succeeded(result))

    queue.enqueue(job)
    child = nursery.spawn("hang")
    eventually(lambda: nursery.lines("started"))
    with serving(queue, handle):
        time.sleep(0.3)
        assert handled == []
        nursery.kill(child)
        eventually(lambda: handled)
        assert [snapshot.state for snapshot in queue.watch(job.id, timeout=20)][-1] is State.DONE
    assert handled == [(job.id, 1)]
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert (snapshot.job.attempts, snapshot.job.suspect) == (2, False)


def test_a_job_that_kills_its_worker_ends_in_error(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, eventually: Any
) -> None:
    job = new_job()
    queue.enqueue(job)
    for attempts in (1, 2, 3):
        nursery.wait(nursery.spawn("die_when_started"))
        snapshot = queue.get(job.id)
        assert snapshot is not None
        assert (snapshot.state, snapshot.job.attempts) == (State.LOADING, attempts)
    recover(root)
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert snapshot.state is State.ERROR
    assert snapshot.job.error is not None
    assert snapshot.job.error.kind == "WorkerDied"
    assert snapshot.job.error.message == "the service stopped 3 times while running this job"
    assert records(root) == {job.id: ["error"]}


def test_two_that_were_running_are_tried_alone_and_the_innocent_passes(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    innocent, poison = new_job(id="innocent"), new_job(id="poison")
    queue.enqueue(innocent)
    queue.enqueue(poison)
    nursery.wait(nursery.spawn("die_with_two"))
    nursery.wait(nursery.spawn("die_with_two"))
    assert nursery.lines("started") == [["innocent"], ["poison"], ["innocent"]]
    recover(root)
    assert [(job.id, job.attempts, job.suspect) for job in queue.jobs()] == [("innocent", 2, True), ("poison", 1, True)]

    def handle(job: Job, control: Control) -> None:
        control.commit(control.started().succeeded(result))

    with serving(queue, handle, wants=lambda job: job.id == "innocent"):
        eventually(lambda: names(root, "done"))
    snapshot = queue.get("innocent")
    assert snapshot is not None
    assert (snapshot.job.attempts, snapshot.job.suspect) == (2, False)
    nursery.wait(nursery.spawn("die_with_two"))
    nursery.wait(nursery.spawn("die_with_two"))
    recover(root)
    snapshot = queue.get("poison")
    assert snapshot is not None
    assert snapshot.job.error is not None
    assert snapshot.job.error.message == "the service stopped 3 times while running this job"
    assert records(root) == {"innocent": ["done"], "poison": ["error"]}


def test_the_attempt_of_another_boot_is_given_back(root: Path, queue: FileQueue, new_job: Any) -> None:
    jobs = {
        "this boot": new_job(attempts=1).charged(boot_id()),
        "another boot": new_job(attempts=1).charged("00000000-0000-0000-0000-000000000000"),
    }
    for job in jobs.values():
        dead_worker(root, job)
    recover(root, pause_after_crashes=2)
    found = {name: queue.get(job.id).job for name, job in jobs.items()}  # type: ignore[union-attr]
    assert {name: (job.attempts, job.suspect, job.started) for name, job in found.items()} == {
        "this boot": (2, True, None),
        "another boot": (1, False, None),
    }
    assert queue.paused is None


def test_a_crash_during_recovery_charges_nothing_twice(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(attempts=1).charged(boot_id())
    dead_worker(root, job)

    def die(source: Path, target: Path) -> None:
        raise SystemExit("killed between the writing and the rename")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename_durably", die)
        with pytest.raises(SystemExit):
            recover(root)
    recover(root)
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.job.attempts, snapshot.job.suspect) == (State.QUEUED, 2, True)


# pausing


def test_a_pause_outlives_its_process_and_holds_for_all(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, eventually: Any
) -> None:
    queue.pause("a new card is coming")
    queue.close()
    queue = FileQueue(root)
    job = new_job()
    queue.enqueue(job)
    nursery.spawn("work")
    time.sleep(1)
    assert (queue.paused, nursery.lines("claimed")) == ("a new card is coming", [])
    queue.resume()
    eventually(lambda: nursery.lines("ended"))


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_whatever_is_named_paused_pauses(root: Path, queue: FileQueue, make: Any) -> None:
    make(root / "paused")
    assert queue.paused == "the queue was paused by its operator"


def crash(nursery: Nursery, queue: FileQueue, new_job: Any) -> None:
    """Have a worker die of a new job."""
    queue.enqueue(new_job())
    nursery.wait(nursery.spawn("die_when_started"))


def test_the_queue_pauses_itself_after_crashes_in_a_row(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, caplog: pytest.LogCaptureFixture
) -> None:
    crash(nursery, queue, new_job)
    recover(root, pause_after_crashes=2)
    assert queue.paused is None
    crash(nursery, queue, new_job)
    recover(root)
    assert queue.paused is None
    crash(nursery, queue, new_job)
    recover(root, pause_after_crashes=2)
    reason = "crashes in a row while jobs ran: 3"
    assert queue.paused == reason
    assert f"no job will run until the queue is resumed: {reason}" in caplog.text
    queue.resume()
    recover(root, pause_after_crashes=2)
    assert queue.paused is None
    assert not (root / "crashes.json").exists()


def test_crashes_do_not_hide_why_the_operator_paused(root: Path, queue: FileQueue, new_job: Any) -> None:
    queue.pause("a new card is coming")
    dead_worker(root, new_job().charged(boot_id()))
    recover(root, pause_after_crashes=1)
    assert queue.paused == "a new card is coming"


def test_a_job_that_ends_ends_the_row_of_crashes(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    crash(nursery, queue, new_job)
    with serving(queue, finish(result)):
        eventually(lambda: names(root, "done"))
    crash(nursery, FileQueue(root), new_job)
    recover(root, pause_after_crashes=2)
    assert queue.paused is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99, "in_a_row": 50}', '{"in_a_row": -1}'])
def test_a_count_of_crashes_that_cannot_be_read_is_begun_anew(
    root: Path, queue: FileQueue, new_job: Any, content: str
) -> None:
    (root / "crashes.json").write_text(content)
    dead_worker(root, new_job().charged(boot_id()))
    recover(root, pause_after_crashes=2)
    assert queue.paused is None
    assert json.loads((root / "crashes.json").read_text()) == {"version": 1, "in_a_row": 1}


def test_who_could_start_nothing_did_not_crash(root: Path, queue: FileQueue, new_job: Any, result: Result) -> None:
    dead_worker(root, new_job())
    dead_worker(root, new_job().charged(boot_id()).succeeded(result))
    recover(root, pause_after_crashes=1)
    assert queue.paused is None


def test_a_claim_without_device_work_costs_no_attempt(
    root: Path, queue: FileQueue, nursery: Nursery, new_job: Any, eventually: Any
) -> None:
    first, second = new_job(), new_job()
    queue.enqueue(first)
    queue.enqueue(second)
    for claims in (1, 2, 3, 4):
        child = nursery.spawn("claim")
        eventually(lambda claims=claims: len(nursery.lines("claimed")) == claims)
        nursery.kill(child)
    recover(root)
    assert {job_id for job_id, _ in nursery.lines("claimed")} == {first.id}
    assert queue.get(first.id) == Snapshot(first, position=0)


def test_no_kill_loses_or_doubles_a_job(
    root: Path, queue: FileQueue, nursery: Nursery, serving: Any, eventually: Any, result: Result
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    roles = ["write_and_work", "write_and_work", "work"]
    children = [nursery.spawn(role) for role in roles]
    for _ in range(40):
        time.sleep(chance.uniform(0.01, 0.15))
        n = chance.randrange(len(children))
        nursery.kill(children[n])
        children[n] = nursery.spawn(roles[n])
    for child in children:
        nursery.kill(child)
    accepted = {job_id for (job_id,) in nursery.lines("accepted")}
    assert len(accepted) >= 40
    assert accepted <= set(records(root))
    assert all(len(places) == 1 for places in records(root).values())
    last = FileQueue(root, max_attempts=1000, recover_every=0.2)
    with serving(last, finish(result), slots=2):
        while before := _unended(last):  # there may be thousands: wait for each to end, not for all in a time
            eventually(lambda before=before: _unended(last) < before)
    last.close()
    outcome = records(root)
    assert accepted <= set(outcome)
    assert Counter(place for places in outcome.values() for place in places).keys() <= {"done", "error"}
    assert all(len(places) == 1 for places in outcome.values())
    assert max(Counter(job_id for job_id, _ in nursery.lines("ended")).values()) == 1
    assert not list((root / "error").glob("*.unreadable"))
    for folder in ("tmp", "running", "workers", "progress", "queued"):
        assert names(root, folder) == []


def _unended(queue: FileQueue) -> int:
    counts = queue.counts()
    return counts[State.QUEUED] + counts[State.PROCESSING]


# states a crash leaves behind


def test_a_commit_cut_in_half_is_finished(root: Path, queue: FileQueue, new_job: Any, result: Result) -> None:
    job = new_job(attempts=5)
    path = dead_worker(root, job.succeeded(result))
    path.with_suffix(".cancel").touch()
    (root / "progress" / f"{job.id}.json").write_text(Progress(state=State.PROCESSING).model_dump_json())
    before = queue.get(job.id)
    recover(root)
    after = queue.get(job.id)
    assert before == after
    assert after is not None
    assert after.state is State.DONE
    assert records(root) == {job.id: ["done"]}
    assert names(root, "running") == names(root, "workers") == names(root, "progress") == []


def test_a_cancelling_cut_in_half_holds(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job()
    (root / "cancelled" / f"{job.id}.json").write_bytes(dumps(job))
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert snapshot == queue.get(job.id)
    assert (snapshot.state, snapshot.job.finished is None) == (State.CANCELLED, False)
    assert [found.state for found in queue.jobs()] == [State.CANCELLED]


def test_a_note_left_behind_finds_its_job(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job()
    queue.enqueue(job)
    path = dead_worker(root, job)
    path.rename(path.with_suffix(".cancel"))
    recover(root)
    assert records(root) == {job.id: ["cancelled"]}
    assert names(root, "running") == []


def test_a_worker_without_its_lock_file_is_dead(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job()
    path = dead_worker(root, job)
    (root / "workers" / f"{path.parent.name}.lock").unlink()
    recover(root)
    assert records(root) == {job.id: ["queued"]}
    assert names(root, "workers") == []


def test_what_belongs_to_nobody_is_cleared_away(root: Path, queue: FileQueue) -> None:
    live = os.open(root / "tmp" / "written-now", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    (root / "tmp" / "abandoned").touch()
    (root / "workers" / "dead.lock").touch()
    (root / "progress" / "gone.json").touch()
    recover(root)
    assert names(root, "tmp") == ["written-now"]
    assert names(root, "workers") == names(root, "progress") == []
    os.close(live)


def test_recovery_leaves_the_living_alone(
    root: Path, queue: FileQueue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = new_job()

    def handle(job: Job, control: Control) -> None:
        job = control.started()
        recover(root)
        assert not control.cancelled
        control.commit(job.succeeded(result))

    queue.enqueue(job)
    with serving(queue, handle):
        eventually(lambda: names(root, "done"))
    queue.close()
    assert records(root) == {job.id: ["done"]}
    assert names(root, "running") == names(root, "workers") == []


def test_a_failed_handlers_job_is_recovered(root: Path, queue: FileQueue, new_job: Any, result: Result) -> None:
    job = new_job()
    queue.enqueue(job)

    def fail(job: Job, control: Control) -> None:
        control.started()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        queue.serve(fail)
    assert names(root, "queued") == []
    recover(root)
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.job.attempts, snapshot.job.started) == (State.QUEUED, 1, None)


# the fence


def test_a_lost_claim_writes_nothing(
    root: Path, queue: FileQueue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job, over = new_job(), threading.Event()

    def handle(job: Job, control: Control) -> None:
        if over.is_set():
            control.commit(job.succeeded(result))
            return
        [path] = (root / "running").glob("*/*.json")
        queue.stop()
        path.rename(root / "queued" / path.name)
        control.progress(Progress(state=State.PROCESSING))
        assert queue.get(job.id) == Snapshot(job, position=0)
        assert control.started() == job
        control.commit(job.failed("Late", "not mine"))
        control.release()
        assert control.cancelled
        over.set()

    queue.enqueue(job)
    with serving(queue, handle):
        assert over.wait(20)
    assert queue.get(job.id) == Snapshot(job, position=0)
    assert records(root) == {job.id: ["queued"]}
    assert names(root, "progress") == names(root, "tmp") == []


def test_closing_gives_up_the_jobs_in_hand(
    root: Path, queue: FileQueue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job, in_hand, recovered = new_job(), threading.Event(), threading.Event()

    def handle(job: Job, control: Control) -> None:
        job = control.started()
        in_hand.set()
        assert recovered.wait(20)
        assert control.cancelled
        control.commit(job.succeeded(result))

    queue.enqueue(job)
    with serving(queue, handle):
        assert in_hand.wait(20)
        queue.close()
        recover(root)
        recovered.set()
    assert records(root) == {job.id: ["queued"]}
    snapshot = FileQueue(root).get(job.id)
    assert snapshot is not None
    assert snapshot.job.attempts == 1


def test_a_worker_whose_folder_was_removed_ends(root: Path, queue: FileQueue, new_job: Any, serving: Any) -> None:
    def remove_folder_then_enqueue() -> None:
        while not (found := list((root / "running").iterdir())):
            time.sleep(0.01)
        found[0].rmdir()
        queue.enqueue(new_job())

    removing = threading.Thread(target=remove_folder_then_enqueue)
    removing.start()
    with pytest.raises(QueueUnusable):
        queue.serve(lambda job, control: pytest.fail("claimed into nowhere"))
    removing.join()


def test_a_job_is_found_at_any_moment_of_its_cancelling(
    queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.enqueue(new_job())
    found: list[Snapshot | None] = []
    rename = disk.rename_durably

    def looked_at(source: Path, target: Path) -> None:
        found.append(queue.get(job.id))
        rename(source, target)
        found.append(queue.get(job.id))

    for _ in range(3):  # until the folder has not changed for so long that it is not listed again
        time.sleep(0.1)
        assert [each.id for each in queue.jobs()] == [job.id]
    monkeypatch.setattr(disk, "rename_durably", looked_at)
    queue.cancel(job.id)
    assert [each and each.state for each in found] == [State.QUEUED, State.CANCELLED]


def test_a_cancelling_that_cannot_be_done_says_so(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job()
    queue.enqueue(job)
    (root / "cancelled").rmdir()
    with pytest.raises(QueueUnusable):
        queue.cancel(job.id)
    assert records(root) == {job.id: ["queued"]}


def test_a_cancelling_follows_a_job_that_moves_meanwhile(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, really_rename = new_job(), os.rename
    record = dead_worker(root, job)

    def release_first(source: Any, target: Any) -> None:
        if str(target).endswith(".cancel"):
            really_rename(record, root / "queued" / record.name)
        really_rename(source, target)

    monkeypatch.setattr(os, "rename", release_first)
    snapshot = queue.cancel(job.id)
    assert snapshot is not None
    assert snapshot.state is State.CANCELLED
    assert list((root / "running").glob("*/*")) == []


def test_a_record_changed_by_another_process_is_read_again(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job()
    queue.enqueue(job)
    assert queue.get(job.id) == Snapshot(job, position=0)
    [name] = names(root, "queued")
    path = dead_worker(root, job.charged(boot_id()))
    path.rename(path.with_name(name))
    recover(root)
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert snapshot.job.attempts == 1


# what is no record


def test_a_passing_shortage_sets_nothing_aside(
    root: Path,
    queue: FileQueue,
    new_job: Any,
    serving: Any,
    eventually: Any,
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, really_open, refused = new_job(), os.open, []

    def open_later(path: Any, *arguments: Any, **options: Any) -> int:
        if "/running/" in str(path) and str(path).endswith(".json") and len(refused) < 2:
            refused.append(path)
            raise OSError(errno.EMFILE, "too many open files")
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_later)
    queue.enqueue(job)
    with serving(queue, finish(result)):
        eventually(lambda: names(root, "done"))
    assert len(refused) == 2
    assert names(root, "error") == []


def test_what_is_no_record_is_set_aside_and_work_goes_on(
    root: Path, queue: FileQueue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    good, queued = new_job(), root / "queued"
    newer = json.loads(dumps(new_job(id="newer"))) | {"version": 99}
    (root / "secret").write_bytes(dumps(new_job(id="link")))
    listening = socket.socket(socket.AF_UNIX)

    def place(job_id: str) -> Path:
        return queued / record_name(job_id)

    place("broken").write_text('{"version": 1, "id": "bro')
    place("empty").touch()
    place("newer").write_text(json.dumps(newer))
    place("link").symlink_to(root / "secret")
    os.mkfifo(place("pipe"))
    place("folder").mkdir()
    place("large").write_bytes(b" " * (4 * 2**20 + 1))
    place("other").write_bytes(dumps(new_job()))
    place("ended").write_bytes(dumps(new_job(id="ended").succeeded(result)))
    place("binary").write_bytes(os.urandom(100))
    place("deep").write_text("[" * 10**5)
    place("deeper").write_text('{"payload": ' * 10**5)
    place("bom").write_bytes(b"\xef\xbb\xbf" + dumps(new_job(id="bom")))
    place("nul").write_bytes(dumps(new_job(id="nul")).replace(b"lighthouse", b"light\0house"))
    with place("sparse").open("wb") as sparse:
        sparse.truncate(2**30)
    (queued / "notes.txt").write_text("hello")
    (queued / "a folder").mkdir()
    (queued / "dangling").symlink_to("/nowhere")
    os.mkfifo(queued / "pipe")
    here = os.getcwd()
    os.chdir(queued)
    listening.bind(place("socket").name)
    os.chdir(here)
    strays = names(root, "queued")
    queue.enqueue(good)

    with serving(queue, finish(result)):
        eventually(lambda: names(root, "done"))
        eventually(lambda: not names(root, "queued"))
    listening.close()
    assert records(root) == {good.id: ["done"]}
    assert names(root, "running") == names(root, "tmp") == []
    aside = sorted((root / "error").glob("*.unreadable"))
    assert [path.name.removesuffix(".unreadable") for path in aside] == strays
    reasons = {path.name: path.with_suffix(".reason").read_text() for path in aside}
    assert all(reasons.values())
    assert "newer release" in next(reason for name, reason in reasons.items() if "-newer." in name)
    assert "regular file" in next(reason for name, reason in reasons.items() if "-pipe." in name)
    assert (root / "secret").read_bytes() == dumps(
        new_job(id="link", created=loads((root / "secret").read_bytes()).created)
    )
    assert queue.counts()[State.ERROR] == 0
    assert queue.jobs() == [queue.get(good.id).job]  # type: ignore[union-attr]


def test_unreadable_records_elsewhere_do_no_harm(root: Path, queue: FileQueue, new_job: Any) -> None:
    job = new_job()
    (root / "done" / f"{job.id}.json").write_text("{")
    (root / "done" / "notes.txt").touch()
    (root / "running" / "junk").touch()
    path = dead_worker(root, new_job(id="broken"))
    path.write_text("{")
    (path.parent / "junk").mkdir()
    assert queue.get(job.id) is None
    assert queue.get("broken") is None
    assert queue.jobs() == []
    recover(root)
    assert names(root, "running") == names(root, "workers") == []
    assert {path.name for path in (root / "error").glob("*.unreadable")} == {
        f"{path.name}.unreadable",
        "junk.unreadable",
        *(path.name for path in (root / "error").glob("junk.*.unreadable")),
    }
    assert len(list((root / "error").glob("junk*.unreadable"))) == 2


# durability


@pytest.fixture
def calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, by place, in order."""
    made: list[str] = []
    fsync, rename = os.fsync, os.rename

    def place(path: str | Path) -> str:
        parts = Path(os.path.relpath(path, root)).parts
        if parts[:1] == ("running",) and len(parts) > 1:
            return "/".join(["running/*", *("record" for _ in parts[2:])])
        return "/".join([*parts[:1], *("record" for _ in parts[1:])]) or "."

    def record_fsync(fd: int) -> None:
        made.append(f"fsync {place(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def record_rename(source: str | Path, target: str | Path) -> None:
        made.append(f"{place(source)} -> {place(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    return made


WRITE_RUNNING = ["fsync tmp/record", "tmp/record -> running/*/record", "fsync running/*"]
WRITE_CANCELLED = ["fsync tmp/record", "tmp/record -> cancelled/record", "fsync cancelled"]


def test_every_step_is_durable_before_the_next(
    root: Path, calls: list[str], new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    def taken() -> list[str]:
        found = calls.copy()
        calls.clear()
        return found

    queue = FileQueue(root)
    assert taken() == ["fsync .", "fsync ..", "fsync tmp/record"]
    cancelled, ran = new_job(), new_job()
    queue.enqueue(cancelled)
    assert taken() == ["fsync tmp/record", "tmp/record -> queued/record", "fsync queued"]
    queue.cancel(cancelled.id)
    assert taken() == ["queued/record -> cancelled/record", "fsync cancelled", "fsync queued", *WRITE_CANCELLED]
    queue.enqueue(ran)
    taken()
    steps: dict[str, list[str]] = {}

    def handle(job: Job, control: Control) -> None:
        steps["claim"] = taken()
        if "release" in steps:
            job = control.started()
            steps["started"] = taken()
            control.progress(Progress(state=State.PROCESSING))
            steps["progress"] = taken()
            queue.cancel(job.id)
            steps["cancel"] = taken()
            control.commit(job.succeeded(result))
            steps["commit"] = taken()
        else:
            control.release()
            steps["release"] = taken()

    with serving(queue, handle, slots=1):
        eventually(lambda: "commit" in steps)
    assert steps == {
        "claim": ["queued/record -> running/*/record"],
        "release": [*WRITE_RUNNING, "running/*/record -> queued/record", "fsync queued", "fsync running/*"],
        "started": [*WRITE_RUNNING, "fsync queued"],
        "progress": ["tmp/record -> progress/record"],
        "cancel": WRITE_RUNNING,
        "commit": [*WRITE_RUNNING, "running/*/record -> done/record", "fsync done", "fsync running/*"],
    }
    dead_worker(root, new_job(attempts=3))
    taken()
    recover(root)
    assert taken()[3:] == [
        "fsync running",
        *WRITE_RUNNING,
        "running/*/record -> error/record",
        "fsync error",
        "fsync running/*",
        "fsync running/*",  # before the folder of the dead worker is removed
        "fsync running/*",  # and our own
    ]


@pytest.mark.parametrize("broken", ["write", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch, broken: str, number: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "/home/somebody/queue")

    job = new_job()
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(QueueUnusable if number == errno.EIO else DiskFull) as raised:
            queue.enqueue(job)
    assert "somebody" not in str(raised.value)
    assert names(root, "tmp") == names(root, "queued") == []
    assert queue.get(job.id) is None
    queue.enqueue(job)
    assert queue.get(job.id) == Snapshot(job, position=0)


def test_a_job_that_could_not_be_made_durable_is_taken_back(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "fsync_dir", fail)
        with pytest.raises(QueueUnusable):
            queue.enqueue(new_job())
    assert names(root, "tmp") == names(root, "queued") == []


class Flushes:
    """Lets the flushes of the waiting jobs' folder take long; ``broken`` ones fail. Remembers what happened when."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.broken = False
        fsync, rename = os.fsync, os.rename

        def flush(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}") != str(root / "queued"):
                fsync(fd)
                return
            self.events.append("flush")
            time.sleep(0.05)
            if self.broken:
                raise OSError(errno.EIO, "input/output error")
            fsync(fd)
            self.events.append("flushed")

        def move(source: str | Path, target: str | Path) -> None:
            rename(source, target)
            if Path(target).parent == root / "queued":
                self.events.append(Path(target).stem[-4:])

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "rename", move)


def test_submissions_that_arrive_together_share_a_flush(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes(root, monkeypatch)
    jobs = [new_job(id=f"job-{n:04d}") for n in range(32)]

    def give(job: Job) -> None:
        queue.enqueue(job)
        flushes.events.append(f"stored {job.id[-4:]}")

    givers = [threading.Thread(target=give, args=(job,)) for job in jobs]
    for giver in givers:
        giver.start()
    for giver in givers:
        giver.join()
    events = flushes.events
    assert events.count("flush") < len(jobs) / 2
    for job in jobs:
        between = events[events.index(job.id[-4:]) : events.index(f"stored {job.id[-4:]}")]
        assert "flushed" in between[between.index("flush") :]


def test_a_shared_flush_that_failed_has_failed_for_all(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes(root, monkeypatch)
    flushes.broken = True
    refused = []

    def give() -> None:
        with pytest.raises(QueueUnusable):
            queue.enqueue(new_job())
        refused.append(1)

    givers = [threading.Thread(target=give) for _ in range(8)]
    for giver in givers:
        giver.start()
    for giver in givers:
        giver.join()
    assert len(refused) == 8
    assert names(root, "queued") == names(root, "tmp") == []
    assert queue.counts()[State.QUEUED] == 0
    flushes.broken = False
    job = new_job()
    queue.enqueue(job)
    assert queue.get(job.id) == Snapshot(job, position=0)


def test_an_unfinished_file_is_never_that_of_another(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = uuid.uuid4()
    (root / "tmp" / taken.hex).write_text("of another")
    with monkeypatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: taken)
        with pytest.raises(QueueUnusable):
            queue.enqueue(new_job(id="job"))
    assert (root / "tmp" / taken.hex).read_text() == "of another"


def test_short_writes_are_continued(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.write, os.read
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:100]))
    monkeypatch.setattr(os, "read", lambda fd, size: read(fd, min(size, 70)))
    job = new_job()
    queue.enqueue(job)
    assert FileQueue(root).get(job.id) == Snapshot(job, position=0)


def test_a_limit_of_the_system_leaves_nothing(root: Path, queue: FileQueue, nursery: Nursery) -> None:
    nursery.wait(nursery.spawn("hit_a_limit"))
    assert len(nursery.lines("refused")) == 1
    assert names(root, "tmp") == names(root, "queued") == []


def fill(folder: Path) -> None:
    """Leave no room on the disk of that folder."""
    with (folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 1024)


def test_a_full_disk_loses_nothing(
    small_disk: Path, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    root = small_disk / "queue"
    queue = FileQueue(root)
    accepted: list[Job] = []

    def enqueue_for_ever() -> None:
        while True:
            job = new_job(payload={"x": "y" * 2000})
            queue.enqueue(job)
            accepted.append(job)

    (small_disk / "spare").write_bytes(b"x" * 20_000)
    with pytest.raises(DiskFull):
        enqueue_for_ever()
    fill(small_disk)
    assert len(accepted) > 3
    assert names(root, "tmp") == []
    assert [job.id for job in queue.jobs()] == [job.id for job in accepted]
    cancelled = queue.cancel(accepted[-1].id)
    assert cancelled is not None
    assert cancelled.state is State.CANCELLED
    ended = []

    def handle(job: Job, control: Control) -> None:
        if not ended:
            with pytest.raises(DiskFull):
                control.started()
            with pytest.raises(DiskFull):
                control.commit(job.succeeded(result))
            assert queue.get(job.id) == Snapshot(job, progress=Progress())
            control.progress(Progress(state=State.PROCESSING))
            (small_disk / "spare").unlink()
        control.commit(control.started().succeeded(result))
        ended.append(job.id)

    with serving(queue, handle):
        eventually(lambda: len(ended) == len(accepted) - 1)
    assert names(root, "tmp") == []
    assert queue.counts() == {
        State.QUEUED: 0,
        State.PROCESSING: 0,
        State.DONE: len(accepted) - 1,
        State.ERROR: 0,
        State.CANCELLED: 1,
    }
    queue.close()


def test_new_jobs_leave_room_for_those_at_hand(
    small_disk: Path, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    root = small_disk / "queue"
    queue = FileQueue(root, reserve=60 * 1024)
    job = new_job()
    queue.enqueue(job)
    (small_disk / "others").write_bytes(b"x" * 20 * 1024)
    queue.check()
    (small_disk / "more").write_bytes(b"x" * 20 * 1024)
    with pytest.raises(DiskFull):
        queue.check()
    with pytest.raises(DiskFull, match="kept for the jobs at hand"):
        queue.enqueue(new_job())
    assert names(root, "tmp") == []
    with serving(queue, finish(result)):
        eventually(lambda: names(root, "done"))
    (small_disk / "more").unlink()
    queue.enqueue(new_job())
    queue.close()


def test_a_full_disk_does_not_stop_recovery_for_good(small_disk: Path, new_job: Any) -> None:
    root = small_disk / "queue"
    queue = FileQueue(root, max_attempts=1)
    job = new_job(attempts=1)
    dead_worker(root, job)
    fill(small_disk)
    recover(root, max_attempts=1)
    assert records(root) == {job.id: ["running"]}
    (small_disk / "filler").unlink()
    recover(root, max_attempts=1)
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert snapshot.state is State.ERROR


# many jobs


def _drop(root: Path, job: Job) -> None:
    """A waiting record, written the quick way."""
    (root / "queued" / record_name(job.id)).write_bytes(dumps(job))


def test_thousands_of_waiting_jobs_cost_little(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_job()
    for n in range(5000):
        _drop(root, model.model_copy(update={"id": f"job-{n}"}))
    opened, listed = [], []
    really_open, really_list = os.open, os.listdir

    def count_open(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".json"):
            opened.append(str(path))
        return really_open(path, *arguments, **options)

    def count_list(path: Any) -> list[str]:
        listed.append(str(path))
        return really_list(path)

    monkeypatch.setattr(os, "open", count_open)
    monkeypatch.setattr(os, "listdir", count_list)
    queue = FileQueue(root)
    began = time.monotonic()
    snapshot = queue.get("job-4321")
    assert snapshot is not None
    assert snapshot.position == 4321
    assert len(opened) == 1
    for n in range(100):
        queue.enqueue(new_job())
        assert queue.get(f"job-{n}") is not None
        assert queue.counts()[State.QUEUED] == 5001 + n
    assert len(opened) == 101
    assert listed.count(str(root / "queued")) <= 2 + (time.monotonic() - began) / 0.2
    assert queue.get("nobody") is None
    assert len(opened) <= 101 + 3 * 3


def test_an_unchanged_folder_is_not_listed_again(
    root: Path, queue: FileQueue, new_job: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, other, names_in = [], FileQueue(root), disk.names
    queue.enqueue(new_job())

    def count(folder: Path) -> list[str]:
        listed.append(folder)
        return names_in(folder)

    def looks() -> int:
        before = listed.count(root / "queued")
        queue.get("nobody")
        return listed.count(root / "queued") - before

    monkeypatch.setattr(disk, "names", count)
    eventually(lambda: looks() == 0)
    assert [looks() for _ in range(20)] == [0] * 20
    job = new_job()
    other.enqueue(job)
    assert queue.get(job.id) == Snapshot(job, position=1)


def test_a_folder_whose_time_moves_slowly_is_not_mistaken_for_an_unchanged_one(
    root: Path, queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modified, tick = disk.modified, 30_000_000
    monkeypatch.setattr(disk, "modified", lambda folder: modified(folder) // tick * tick)
    other = FileQueue(root)
    for _ in range(60):
        job = new_job()
        other.enqueue(job)
        assert queue.get(job.id) is not None
        time.sleep(0.001)


def test_progress_is_written_sparingly(
    root: Path, queue: FileQueue, calls: list[str], new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    done = threading.Event()
    other = FileQueue(root)

    def handle(job: Job, control: Control) -> None:
        calls.clear()
        began = time.monotonic()
        for step in range(1, 301):
            control.progress(Progress(state=State.PROCESSING, phase="denoising", step=step, steps=300))
        most = 2 + (time.monotonic() - began) / 0.1
        assert 1 <= calls.count("tmp/record -> progress/record") <= most
        control.progress(Progress(state=State.PROCESSING, phase="decoding", step=300, steps=300))
        for instance in (queue, other):
            snapshot = instance.get(job.id)
            assert snapshot is not None
            assert snapshot.progress is not None
            assert snapshot.progress.phase == "decoding"
        control.commit(job.succeeded(result))
        done.set()

    queue.enqueue(new_job())
    with serving(queue, handle):
        assert done.wait(20)


def test_progress_that_cannot_be_written_fails_no_job(
    root: Path, queue: FileQueue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = new_job()

    def handle(job: Job, control: Control) -> None:
        (root / "progress").rmdir()
        control.progress(Progress(state=State.PROCESSING))
        control.commit(control.started().succeeded(result))

    queue.enqueue(job)
    with serving(queue, handle):
        eventually(lambda: names(root, "done"))


def test_the_newest_jobs_are_found_without_reading_old_records(
    root: Path, queue: FileQueue, new_job: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Those cannot be read, which would be in the log."""
    now = time.time()
    for n in range(40):
        job = new_job(id=f"j{n}", created=now - 1000 + n)
        queue.enqueue(job)
        queue.cancel(job.id)
        record = root / "cancelled" / f"j{n}.json"
        if n < 20:
            record.write_text("none")
        os.utime(record, (job.created + 5, job.created + 5))
    found = queue.newest(lambda _: True, states=frozenset({State.CANCELLED}), limit=10)
    assert [snapshot.job.id for snapshot in found] == [f"j{n}" for n in range(39, 29, -1)]
    assert caplog.text == ""
