"""What queues keep, and for how long: results, the keys of submissions, the memory of what there was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from driving import Process, places
from forgetful import Disk, Killed

import diffusion_api
from diffusion_api import disk, retention
from diffusion_api.errors import Gone, KeyReused, QueueFull, TooLarge, Unavailable
from diffusion_api.queues.base import DAY, Control, Key, Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job, Result, State, dumps

FIXTURES = Path(__file__).with_name("fixtures")
FOR_EVER = Limits()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "queue"


@pytest.fixture
def file_queue(root: Path) -> Iterator[FileQueue]:
    made = FileQueue(root)
    yield made
    made.close()


@pytest.fixture
def ended(new_job: Any, serving: Any, eventually: Any, result: Result) -> Callable[..., list[Job]]:
    """Jobs of a queue that have been done, one after the other."""

    def do(queue: Queue, *jobs: Job) -> list[Job]:
        for job in jobs:
            queue.enqueue(job)
        with serving(queue, lambda job, control: control.commit(control.started().succeeded(result))):
            eventually(lambda: queue.counts()[State.DONE] == len(jobs))
        return list(jobs)

    return do


def key_of(text: str = "k", **body: Any) -> Key:
    return Key.of(text, body)


def waiting(queue: Queue) -> list[str]:
    return [job.id for job in queue.jobs(frozenset({State.QUEUED}))]


def seeded(job: Job, seed: int) -> Job:
    return job.model_copy(update={"request": job.request.model_copy(update={"seed": seed})})


# keys


def test_a_key_makes_one_job_however_often_it_is_sent(queue: Queue, new_job: Any) -> None:
    first = seeded(new_job(warnings=("w",)), 7)
    assert queue.enqueue(first, key=key_of(prompt="x")) == first
    for seed in range(3):
        assert queue.enqueue(seeded(new_job(), seed), key=key_of(prompt="x")) == first
    assert waiting(queue) == [first.id]


def test_a_key_stands_for_the_job_as_it_is_now(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = queue.enqueue(new_job(), key=key_of())
    with serving(queue, lambda job, control: control.commit(job.succeeded(result))):
        eventually(lambda: queue.counts()[State.DONE] == 1)
    assert queue.enqueue(new_job(), key=key_of()).result == result
    assert queue.enqueue(new_job(), key=key_of()).id == job.id


def test_the_order_of_fields_does_not_matter_and_their_values_do() -> None:
    assert Key.of("k", {"a": 1, "b": {"c": 2, "d": 3}}) == Key.of("k", {"b": {"d": 3, "c": 2}, "a": 1})
    different: list[dict[str, Any]] = [{}, {"a": 1}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": "\ud800"}, {"b": 1}]
    assert len({Key.of("k", body).fingerprint for body in different}) == len(different)


def test_a_key_with_another_body_is_refused(queue: Queue, new_job: Any) -> None:
    first = queue.enqueue(new_job(), key=key_of("mine", prompt="x"))
    with pytest.raises(KeyReused, match="'mine' was sent before with another body"):
        queue.enqueue(new_job(), key=key_of("mine", prompt="y"))
    assert waiting(queue) == [first.id]


def test_keys_belong_to_their_callers(queue: Queue, new_job: Any) -> None:
    jobs = [queue.enqueue(new_job(caller=caller), key=key_of(text)) for caller, text in ANYBODY]
    assert len({job.id for job in jobs}) == len(ANYBODY)
    assert [queue.enqueue(new_job(caller=c), key=key_of(t)).id for c, t in ANYBODY] == [job.id for job in jobs]


ANYBODY = [("ann", "k"), ("bob", "k"), ("ann", "K"), ("", "k"), ("ann", "../k"), ("annk", ""), ("ann", "x" * 255)]


def test_a_key_stands_for_a_day(queue: Queue, new_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, clock = queue.enqueue(new_job(), key=key_of(prompt="x")), time.time()
    monkeypatch.setattr(time, "time", lambda: clock + DAY - 60)
    queue.sweep(FOR_EVER, now=clock + DAY - 60)
    assert queue.enqueue(new_job(), key=key_of(prompt="x")).id == first.id
    monkeypatch.setattr(time, "time", lambda: clock + DAY + 60)
    second = queue.enqueue(new_job(), key=key_of(prompt="y"))
    assert second.id != first.id
    assert queue.enqueue(new_job(), key=key_of(prompt="y")).id == second.id


def test_a_clock_set_back_forgets_no_key(queue: Queue, new_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, clock = queue.enqueue(new_job(), key=key_of()), time.time()
    monkeypatch.setattr(time, "time", lambda: clock - 2 * DAY)
    queue.sweep(FOR_EVER, now=clock - 2 * DAY)
    assert queue.enqueue(new_job(), key=key_of()).id == first.id


def test_one_key_sent_by_many_at_once_makes_one_job(queue: Queue, new_job: Any) -> None:
    start = threading.Barrier(50)

    def send(_: int) -> str:
        start.wait(20)
        return queue.enqueue(new_job(), key=key_of()).id

    with ThreadPoolExecutor(50) as threads:
        answers = set(threads.map(send, range(50)))
    assert list(answers) == waiting(queue)


def test_a_full_queue_refuses_new_keys_and_knows_the_old(tmp_path: Path, new_job: Any) -> None:
    for queue in (FileQueue(tmp_path / "queue", max_waiting=1), MemoryQueue(max_waiting=1)):
        job = queue.enqueue(new_job(), key=key_of("old"))
        with pytest.raises(QueueFull):
            queue.enqueue(new_job(), key=key_of("new", size=1))
        assert queue.enqueue(new_job(), key=key_of("old")).id == job.id
        queue.cancel(job.id)
        assert queue.enqueue(new_job(), key=key_of("new", size=2)).id in waiting(queue)
        queue.close()
    assert len(keys(tmp_path / "queue")) == 2


@pytest.mark.parametrize("way", ["expired", "forgotten"])
def test_a_key_outlives_the_result_of_its_job(queue: Queue, new_job: Any, way: str) -> None:
    job = queue.enqueue(seeded(new_job(), 7), key=key_of())
    queue.cancel(job.id)
    if way == "forgotten":
        assert queue.forget(job.id)
    else:
        queue.sweep(Limits(seconds=60), now=time.time() + 120)
    again = queue.enqueue(seeded(new_job(), 8), key=key_of())
    assert (again.id, again.request.seed) == (job.id, 7)
    assert queue.jobs() == []


# results


def test_results_are_kept_for_a_time(queue: Queue, new_job: Any, ended: Any) -> None:
    (job,) = ended(queue, new_job())
    queue.sweep(Limits(seconds=60), now=time.time() + 50)
    assert queue.get(job.id) is not None
    queue.sweep(Limits(seconds=60), now=time.time() + 70)
    for look in (queue.get, queue.cancel):
        with pytest.raises(Gone, match=f"Job {job.id} has ended, and its result is no longer kept"):
            look(job.id)
    with pytest.raises(Gone):
        next(queue.watch(job.id, timeout=5))
    assert queue.jobs() == []
    assert set(queue.counts().values()) == {0}


def test_results_are_kept_up_to_a_count_the_newest_first(queue: Queue, new_job: Any, ended: Any) -> None:
    jobs = ended(queue, *(new_job() for _ in range(5)))
    queue.sweep(Limits(count=2), now=time.time())
    assert [job.id for job in queue.jobs()] == [jobs[4].id, jobs[3].id]


def test_every_end_counts_and_nothing_else(queue: Queue, new_job: Any, serving: Any, eventually: Any) -> None:
    failed, cancelled, held, waits = (new_job(id=name) for name in ("failed", "cancelled", "held", "waits"))
    for job in (cancelled, failed, held, waits):
        queue.enqueue(job)
    queue.cancel(cancelled.id)
    in_hand, let_go = threading.Event(), threading.Event()

    def handle(job: Job, control: Any) -> None:
        if job.id == failed.id:
            control.commit(job.failed("Oops", "no picture"))
            return
        in_hand.set()
        assert let_go.wait(20)
        control.release()

    with serving(queue, handle, wants=lambda job: job.id != waits.id):
        assert in_hand.wait(20)
        queue.sweep(Limits(seconds=0, count=1), now=time.time() + 9 * DAY)
        left = {job.id for job in queue.jobs()}
        queue.stop()
        let_go.set()
    assert left == {held.id, waits.id}


def test_what_is_without_limits_is_kept(queue: Queue, new_job: Any, ended: Any) -> None:
    jobs = ended(queue, *(new_job() for _ in range(3)))
    queue.sweep(FOR_EVER, now=time.time() + 10_000 * DAY)
    assert len(queue.jobs()) == len(jobs)


def test_a_clock_set_wrong_by_years_costs_no_more_than_a_part(
    queue: Queue, new_job: Any, ended: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retention, "AT_ONCE", 2)
    jobs = ended(queue, *(new_job() for _ in range(5)))
    queue.sweep(Limits(seconds=7 * DAY), now=time.time() + 3650 * DAY)
    assert [job.id for job in queue.jobs()] == [job.id for job in reversed(jobs[2:])]
    assert "5 results are beyond what is kept; 2 go now" in caplog.text


def test_results_from_the_future_are_new(queue: Queue, new_job: Any, ended: Any) -> None:
    ended(queue, new_job())
    queue.sweep(Limits(seconds=0), now=time.time() - 2 * 3600)
    assert len(queue.jobs()) == 1


def test_it_is_known_for_a_month_that_there_was_a_result(queue: Queue, new_job: Any, ended: Any) -> None:
    (job,) = ended(queue, new_job())
    gone = time.time() + 60
    queue.sweep(Limits(seconds=0), now=gone)
    queue.sweep(FOR_EVER, now=gone + 29 * DAY)
    with pytest.raises(Gone):
        queue.get(job.id)
    queue.sweep(FOR_EVER, now=gone + 31 * DAY)
    assert queue.get(job.id) is None


def test_a_job_that_is_forgotten_is_unknown(queue: Queue, new_job: Any, ended: Any) -> None:
    job, kept = ended(queue, new_job(), new_job())
    assert queue.forget(job.id)
    assert not queue.forget(job.id)
    assert queue.get(job.id) is None
    assert queue.cancel(job.id) is None
    assert [job.id for job in queue.jobs()] == [kept.id]


@pytest.mark.parametrize("job_id", ["nobody", "", "../queued", "a/b", "x" * 65, "nul\0"])
def test_nothing_is_forgotten_of_an_unknown_job(queue: Queue, job_id: str) -> None:
    assert not queue.forget(job_id)


def test_only_jobs_that_have_ended_are_forgotten(queue: Queue, new_job: Any, serving: Any, eventually: Any) -> None:
    running, waits = new_job(), new_job()
    queue.enqueue(running)
    queue.enqueue(waits)
    forgotten = []

    def handle(job: Job, control: Any) -> None:
        control.started()
        forgotten.extend(queue.forget(job.id) for job in (running, waits))
        queue.stop()
        control.release()

    with serving(queue, handle):
        eventually(lambda: len(forgotten) == 2)
    assert forgotten == [False, False]
    assert len(queue.jobs()) == 2


def test_one_of_many_forgets_a_job(queue: Queue, new_job: Any, ended: Any) -> None:
    (job,) = ended(queue, new_job())
    start = threading.Barrier(8)

    def forget(_: int) -> bool:
        start.wait(20)
        return queue.forget(job.id)

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(forget, range(8))) == [False] * 7 + [True]


# what only files can do


def keys(root: Path) -> list[Path]:
    return sorted((root / "keys").iterdir())


def test_a_key_is_known_to_the_next_process(root: Path, file_queue: FileQueue, new_job: Any) -> None:
    job = file_queue.enqueue(new_job(), key=key_of())
    file_queue.close()
    later = FileQueue(root)
    assert later.enqueue(new_job(), key=key_of()).id == job.id
    later.close()


SENDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import nursery
from diffusion_api.queues.base import Key
from diffusion_api.queues.file import FileQueue
queue = FileQueue(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(*(queue.enqueue(nursery.job(), key=Key.of(f"key {n}", {"n": n})).id for n in range(25)))
queue.close()
"""


def test_processes_that_send_the_same_keys_get_the_same_jobs(root: Path, file_queue: FileQueue) -> None:
    senders = [
        subprocess.Popen(
            [sys.executable, "-c", SENDER, root, Path(__file__).parent],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(diffusion_api.__file__).parents[1])},
        )
        for _ in range(3)
    ]
    for sender in senders:
        assert sender.stdout
        assert sender.stdout.readline() == "ready\n"
    for sender in senders:
        assert sender.stdin
        sender.stdin.write("\n")
        sender.stdin.flush()
    answers = {sender.communicate(timeout=60)[0] for sender in senders}
    assert len(answers) == 1
    assert sorted(answers.pop().split()) == sorted(waiting(file_queue))
    assert file_queue.counts()[State.QUEUED] == 25


def test_a_crash_between_key_and_job_stores_the_job_as_it_was_announced(
    root: Path, file_queue: FileQueue, new_job: Any
) -> None:
    job = file_queue.enqueue(seeded(new_job(), 7), key=key_of())
    (record,) = (root / "queued").iterdir()
    record.unlink()
    later = FileQueue(root)
    again = later.enqueue(seeded(new_job(), 8), key=key_of())
    assert (again.id, again.request.seed) == (job.id, 7)
    assert waiting(later) == [job.id]
    later.close()


@pytest.mark.parametrize("crash", ["kill", "power cut that spares nothing", "power cut that spares all"])
def test_a_key_makes_one_job_wherever_the_first_try_was_cut_off(tmp_path: Path, crash: str) -> None:
    for at in count():
        answered = False
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(tmp_path / str(at), patch)
            first = Process(disk.root)
            try:
                with disk.running(None, killed_at=at):
                    answered = first.submit("first", key="k") == "first"
            except Killed:
                pass
            if crash == "kill":
                disk.kill(None)
            else:
                disk.cut(lambda: crash == "power cut that spares all")
            told = Process(disk.root).submit("second", key="k")
            assert places(disk.root) == {told: ["queued"]}, f"call {at}"
            assert told == "first" or not answered
            disk.kill(None)
        if answered:
            assert at > 5
            return


def test_a_result_that_was_read_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path / "home", monkeypatch)
    process = Process(disk.root)
    process.submit("job")
    process.queue.cancel("job")
    assert process.queue.forget("job")
    disk.cut(lambda: False)
    assert Process(disk.root).queue.get("job") is None


def test_a_torn_key_is_no_key(root: Path, file_queue: FileQueue, new_job: Any) -> None:
    first = file_queue.enqueue(new_job(), key=key_of())
    (path,) = keys(root)
    whole = path.read_bytes()
    seen = {first.id}
    torn = [whole[:length] for length in range(0, len(whole), 7)]
    for content in [*torn, b"\0" * len(whole), b"[" * 10_000, b"null", b"{}", whole * 2]:
        path.write_bytes(content)
        job = file_queue.enqueue(new_job(), key=key_of())
        assert job.id not in seen
        assert file_queue.enqueue(new_job(), key=key_of()).id == job.id
        seen.add(job.id)


def test_a_key_of_a_newer_release_is_left_alone(root: Path, file_queue: FileQueue, new_job: Any) -> None:
    file_queue.enqueue(new_job(), key=key_of())
    (path,) = keys(root)
    newer = json.dumps({"version": 2, "jobs": ["a", "b"]})
    path.write_text(newer)
    with pytest.raises(Unavailable, match="stored by a newer release"):
        file_queue.enqueue(new_job(), key=key_of())
    assert path.read_text() == newer
    assert file_queue.counts()[State.QUEUED] == 1


@pytest.mark.parametrize("release", sorted(path.parent.name for path in FIXTURES.glob("*/keys")))
def test_keys_and_tombstones_of_every_release_are_understood(
    tmp_path: Path, new_job: Any, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds what the release wrote for key ``k`` with body ``{}`` of caller ``ann``, and two tombstones."""
    for folder in ("keys", "gone"):
        target = tmp_path / "queue" / folder
        target.mkdir(parents=True)
        for path in (FIXTURES / release / folder).iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    (path,) = keys(tmp_path / "queue")
    known = json.loads(path.read_text())
    monkeypatch.setattr(time, "time", lambda: known["created"] + 60)
    queue = FileQueue(tmp_path / "queue")
    job = queue.enqueue(new_job(caller="ann"), key=key_of())
    assert (job.id, job.request.seed) == (known["job_id"], known["seed"])
    with pytest.raises(Gone):
        queue.get("11111111-1111-4111-8111-111111111111")
    assert queue.get("22222222-2222-4222-8222-222222222222") is None
    queue.close()


def test_a_refused_job_leaves_its_key_free(root: Path, file_queue: FileQueue, new_job: Any) -> None:
    with pytest.raises(TooLarge):
        file_queue.enqueue(new_job(payload={"x": "y" * 3_000_000}), key=key_of(size="large"))
    assert keys(root) == []
    assert file_queue.enqueue(new_job(), key=key_of(size="small")).id in waiting(file_queue)


def test_a_key_that_is_being_stored_for_too_long_is_refused(
    root: Path, file_queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_api.queues._file.keys.PATIENCE", 0.1)
    file_queue.enqueue(new_job(), key=key_of())
    fd = disk.lock(keys(root)[0])
    assert fd is not None
    with pytest.raises(Unavailable, match="still being stored"):
        file_queue.enqueue(new_job(), key=key_of())
    os.close(fd)


def test_keys_are_swept_after_a_day_but_not_those_in_use(root: Path, file_queue: FileQueue, new_job: Any) -> None:
    for text in ("one", "two"):
        file_queue.enqueue(new_job(), key=key_of(text))
    used = keys(root)[0]
    fd = disk.lock(used)
    assert fd is not None
    file_queue.sweep(FOR_EVER, now=time.time() + DAY + 60)
    os.close(fd)
    assert keys(root) == [used]
    file_queue.sweep(FOR_EVER, now=time.time() + DAY + 60)
    assert keys(root) == []
    assert file_queue.counts()[State.QUEUED] == 2


def test_a_key_that_is_sent_again_while_it_is_swept_stays(
    root: Path, file_queue: FileQueue, new_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_queue.enqueue(new_job(), key=key_of())
    later = time.time() + DAY + 60
    sent: list[Job] = []

    def due_but_late(*args: Any, **options: Any) -> list[retention.Entry]:
        found = retention.due(*args, **options)
        monkeypatch.setattr(time, "time", lambda: later)
        sent.append(file_queue.enqueue(new_job(), key=key_of()))
        return found

    monkeypatch.setattr("diffusion_api.queues._file.keys.due", due_but_late)
    file_queue.sweep(FOR_EVER, now=later)
    assert file_queue.enqueue(new_job(), key=key_of()).id == sent[0].id


def test_what_is_let_go_leaves_an_empty_file(root: Path, file_queue: FileQueue, new_job: Any, ended: Any) -> None:
    expired, read = ended(file_queue, new_job(), new_job())
    file_queue.forget(read.id)
    file_queue.sweep(Limits(seconds=0), now=time.time() + 60)
    left = {path.name: path.stat().st_size for path in (root / "gone").iterdir()}
    assert left == {expired.id: 0, f"{read.id}.read": 0}
    assert list((root / "done").iterdir()) == []


def test_a_record_whose_dropping_was_cut_in_half_is_emptied(
    root: Path, file_queue: FileQueue, new_job: Any, ended: Any
) -> None:
    (job,) = ended(file_queue, new_job())
    (root / "done" / f"{job.id}.json").rename(root / "gone" / f"{job.id}.read")
    assert file_queue.get(job.id) is None
    file_queue.sweep(FOR_EVER, now=time.time())
    assert (root / "gone" / f"{job.id}.read").read_bytes() == b""


@pytest.mark.parametrize("place", ["queued", "running"])
@pytest.mark.parametrize("way", ["kept", "expired", "read"])
def test_a_job_that_has_ended_is_not_begun_again(
    root: Path, new_job: Any, serving: Any, eventually: Any, result: Result, way: str, place: str
) -> None:
    job, handled = new_job(), []

    def handle(job: Job, control: Control) -> None:
        handled.append(job.id)
        control.commit(job.succeeded(result))

    first = FileQueue(root)
    first.enqueue(job)
    (record,) = (root / "queued").iterdir()
    with serving(first, handle):
        eventually(lambda: first.counts()[State.DONE] == 1)
    if way == "read":
        first.forget(job.id)
    if way == "expired":
        first.sweep(Limits(count=0), now=time.time())
    first.close()
    twin = record if place == "queued" else root / "running" / "00000000-0000-4000-8000-000000000000" / record.name
    twin.parent.mkdir(exist_ok=True)
    twin.write_bytes(dumps(job.model_copy(update={"attempts": 1})))
    copy = FileQueue(root, max_attempts=1)
    other = copy.enqueue(new_job())
    with serving(copy, handle):
        eventually(lambda: other.id in handled and copy.counts()[State.PROCESSING] == 0)
    assert handled == [job.id, other.id]
    assert copy.counts() == {**dict.fromkeys(copy.counts(), 0), State.DONE: 1 + (way == "kept")}
    copy.close()


def test_a_record_that_is_about_to_be_moved_away_is_waited_for(
    root: Path, file_queue: FileQueue, new_job: Any, result: Result
) -> None:
    job = new_job().succeeded(result)
    worker = root / "running" / "00000000-0000-4000-8000-000000000000"
    worker.mkdir()
    file_queue.enqueue(new_job(id=job.id))
    (name,) = (path.name for path in (root / "queued").iterdir())
    (root / "queued" / name).rename(worker / name)
    (worker / name).write_bytes(dumps(job))
    moving = threading.Timer(0.2, (worker / name).rename, [root / "done" / f"{job.id}.json"])
    moving.start()
    assert file_queue.forget(job.id)
    assert file_queue.get(job.id) is None
    moving.join()


def test_a_sweep_touches_nothing_but_records(root: Path, file_queue: FileQueue, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (root / "done" / "link.json").symlink_to(tmp_path / "mine")
    (root / "done" / "folder.json").mkdir()
    (root / "error" / "broken.json.unreadable").write_text("{")
    (root / "error" / "broken.json.reason").write_text("no record")
    (root / "error" / "not an id.json").write_text("{")
    before = sorted(root.rglob("*"))
    file_queue.sweep(Limits(seconds=0, count=0), now=time.time() + 9 * DAY)
    assert sorted(root.rglob("*")) == before
    assert (tmp_path / "mine").read_text() == "mine"


def test_sweeping_by_several_at_once_is_quiet(
    root: Path, file_queue: FileQueue, new_job: Any, ended: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ended(file_queue, *(new_job() for _ in range(40)))
    caplog.clear()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: file_queue.sweep(Limits(count=0), now=time.time()), range(4)))
    assert len(list((root / "gone").iterdir())) == 40
    assert caplog.text == ""
