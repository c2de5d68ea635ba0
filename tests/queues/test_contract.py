"""What every queue promises, whatever it is made of."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from diffusion_api.errors import QueueFull, RateLimited
from diffusion_api.queues.base import Control, Key, Place, Queue, Snapshot
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job, Progress, Result, State
from diffusion_api.schema.report import DeviceReport, WorkerReport


def state_of(queue: Queue, job: Job) -> State:
    snapshot = queue.get(job.id)
    assert snapshot is not None
    return snapshot.state


def is_ended(queue: Queue, *jobs: Job) -> Callable[[], bool]:
    return lambda: all(state_of(queue, job).terminal for job in jobs)


def started_in_order(queue: Queue, serving: Any, eventually: Any, result: Result, ids: list[str]) -> list[str]:
    """Serve these jobs with one slot: their ids in the order in which they started."""
    handled = []

    def handle(job: Job, control: Control) -> None:
        handled.append(control.started().id)
        control.commit(job.succeeded(result))

    with serving(queue, handle):
        eventually(lambda: len(handled) == len(ids))
    return handled


def test_a_job_is_kept_as_it_was_given(queue: Queue, new_job: Any) -> None:
    job = new_job(payload={"prompt": "a lighthouse", "odd": [1, None, "é"]}, caller="ann", warnings=("w",))
    queue.enqueue(job)
    assert queue.get(job.id) == Snapshot(job, position=0)


def test_a_job_that_has_ended_already_is_kept_as_it_ended_and_never_runs(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job, next_job = new_job().failed("InvalidImage", "it is no picture"), new_job()
    queue.enqueue(job, key=Key("once", "f"))
    assert queue.enqueue(new_job(), key=Key("once", "f")).id == job.id
    assert queue.get(job.id) == Snapshot(job)
    assert queue.counts()[State.ERROR] == 1
    queue.enqueue(next_job)
    assert started_in_order(queue, serving, eventually, result, [next_job.id]) == [next_job.id]


@pytest.mark.parametrize("job_id", ["nobody", "", "../queued", "a/b", "x" * 65, "line\n", "nul\0", "é"])
def test_an_unknown_id_is_nothing(queue: Queue, job_id: str) -> None:
    assert queue.get(job_id) is None
    assert queue.cancel(job_id) is None
    assert list(queue.watch(job_id, timeout=5)) == []


def test_jobs_run_by_priority_then_by_age(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    jobs = [new_job(priority=priority) for priority in (0, -9, 0, 9, -1, 9, 1)]
    for job in jobs:
        queue.enqueue(job)
    expected = [jobs[n].id for n in (3, 5, 6, 0, 2, 4, 1)]
    assert [job.id for job in queue.jobs(frozenset({State.QUEUED}))] == expected
    positions = {job_id: snapshot.position for job_id in expected if (snapshot := queue.get(job_id))}
    assert list(positions.values()) == list(range(len(jobs)))
    handled = []

    def handle(job: Job, control: Control) -> None:
        handled.append(job.id)
        control.commit(job.succeeded(result))

    with serving(queue, handle):
        eventually(is_ended(queue, *jobs))
    assert handled == expected


def test_callers_take_turns(queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result) -> None:
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1", "a5", "c2"):
        queue.enqueue(new_job(id=name, caller=name[0]))
    queue.enqueue(new_job(id="urgent", caller="a", priority=1))
    expected = ["urgent", "a1", "b1", "c1", "a2", "b2", "c2", "a3", "a4", "a5"]
    assert [job.id for job in queue.jobs(frozenset({State.QUEUED}))] == expected
    assert [snapshot.position for name in expected if (snapshot := queue.get(name))] == list(range(len(expected)))
    assert started_in_order(queue, serving, eventually, result, expected) == expected


def test_a_newcomer_is_served_within_two(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    busy = [new_job(caller="busy") for _ in range(60)]
    for job in busy:
        queue.enqueue(job)
    handled: list[str] = []
    newcomers: dict[str, int] = {}

    def handle(job: Job, control: Control) -> None:
        handled.append(job.id)
        if len(handled) in (1, 20, 40):
            newcomer = new_job(caller=f"caller {len(handled)}")
            queue.enqueue(newcomer)
            newcomers[newcomer.id] = len(handled)
        control.commit(control.started().succeeded(result))

    with serving(queue, handle):
        eventually(lambda: len(handled) == 63)
    assert [handled.index(job_id) + 1 - came for job_id, came in newcomers.items()] == [2, 2, 2]
    assert [job_id for job_id in handled if job_id not in newcomers] == [job.id for job in busy]


def test_who_asks_for_one_at_a_time_does_not_starve_who_asked_for_many(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    handled: list[str] = []
    for _ in range(10):
        queue.enqueue(new_job(caller="many"))
    queue.enqueue(new_job(caller="one"))

    def handle(job: Job, control: Control) -> None:
        handled.append(job.caller)
        if job.caller == "one":
            queue.enqueue(new_job(caller="one"))
        control.commit(control.started().succeeded(result))

    with serving(queue, handle):
        eventually(lambda: len(handled) >= 20)
    assert handled[:20] == ["many", "one"] * 10


def test_a_job_that_comes_back_is_before_those_that_came_meanwhile(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    first, held, other = new_job(caller="a"), new_job(caller="a"), new_job(caller="b")
    handled: list[str] = []
    queue.enqueue(first)
    queue.enqueue(held)

    def handle(job: Job, control: Control) -> None:
        handled.append(job.id)
        if handled == [first.id, held.id]:
            queue.enqueue(other)
            control.release()
        else:
            control.commit(control.started().succeeded(result))

    with serving(queue, handle):
        eventually(is_ended(queue, first, held, other))
    assert handled == [first.id, held.id, held.id, other.id]


def test_no_more_jobs_wait_than_may(
    make_queue: Any, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    queue = make_queue(max_waiting=20)
    accepted: list[Job] = []
    refused: list[str] = []

    def give() -> None:
        for _ in range(5):
            job = new_job()
            try:
                queue.enqueue(job)
                accepted.append(job)
            except QueueFull as error:
                refused.append(str(error))

    givers = [threading.Thread(target=give) for _ in range(8)]
    for giver in givers:
        giver.start()
    for giver in givers:
        giver.join()
    assert (len(accepted), len(refused)) == (20, 20)
    assert set(refused) == {"20 jobs wait already; at most 20 may"}
    with pytest.raises(QueueFull):
        queue.check()
    assert {job.id for job in queue.jobs()} == {job.id for job in accepted}
    with serving(queue, lambda job, control: control.commit(job.succeeded(result))):
        eventually(is_ended(queue, *accepted))
        queue.check()
        queue.enqueue(new_job())


def test_no_more_jobs_of_one_caller_wait_than_may(make_queue: Any, new_job: Any) -> None:
    queue = make_queue(max_waiting_each=2)
    for priority in (0, 5):
        queue.enqueue(new_job(caller="ann", priority=priority))
    with pytest.raises(RateLimited, match="2 jobs of this caller wait already; at most 2 may") as refused:
        queue.enqueue(new_job(caller="ann"), key=Key.of("k", {}))
    assert refused.value.retry_after == 10
    other = new_job(caller="bob")
    queue.enqueue(other)
    queue.cancel(other.id)
    queue.enqueue(new_job(caller="bob"))
    queue.cancel(next(job.id for job in queue.jobs() if job.caller == "ann"))
    queue.enqueue(new_job(caller="ann"), key=Key.of("k", {}))


def test_a_job_in_hand_takes_no_place_among_the_waiting(
    make_queue: Any, new_job: Any, serving: Any, eventually: Any
) -> None:
    queue, in_hand, let_go = make_queue(max_waiting=1), threading.Event(), threading.Event()
    job = new_job()
    queue.enqueue(job)

    def handle(job: Job, control: Control) -> None:
        in_hand.set()
        assert let_go.wait(20)
        control.release()

    with serving(queue, handle):
        assert in_hand.wait(20)
        queue.enqueue(new_job())
        with pytest.raises(QueueFull):
            queue.enqueue(new_job())
        queue.stop()
        let_go.set()
    assert queue.counts()[State.QUEUED] == 2


def test_a_paused_queue_takes_jobs_and_starts_none(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    running, waiting, late = new_job(), new_job(), new_job()
    in_hand, go_on = threading.Event(), threading.Event()

    def handle(job: Job, control: Control) -> None:
        job = control.started()
        in_hand.set()
        assert go_on.wait(20)
        control.commit(job.succeeded(result))

    assert queue.paused is None
    queue.enqueue(running)
    with serving(queue, handle, slots=2):
        assert in_hand.wait(20)
        queue.pause()
        assert queue.paused == "the queue was paused by its operator"
        queue.pause("a new card is coming")
        assert queue.paused == "a new card is coming"
        queue.enqueue(waiting)
        go_on.set()
        eventually(is_ended(queue, running))
        queue.enqueue(late)
        time.sleep(0.6)
        assert [state_of(queue, job) for job in (waiting, late)] == [State.QUEUED] * 2
        assert queue.get(late.id) == Snapshot(late, position=1)
        queue.resume()
        assert queue.paused is None
        eventually(is_ended(queue, waiting, late))
        queue.resume()


def test_nothing_is_claimed_while_the_worker_is_not_ready(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    asked, ready = threading.Event(), threading.Event()

    def is_ready() -> bool:
        asked.set()
        return ready.is_set()

    with serving(queue, lambda job, control: control.commit(job.succeeded(result)), ready=is_ready, slots=2):
        time.sleep(0.3)
        assert not asked.is_set()  # there is nothing to be ready for
        jobs = [new_job(), new_job()]
        for job in jobs:
            queue.enqueue(job)
        assert asked.wait(20)
        time.sleep(0.3)
        assert [queue.get(job.id) for job in jobs] == [Snapshot(job, position=n) for n, job in enumerate(jobs)]
        ready.set()
        eventually(is_ended(queue, *jobs))


def test_nothing_is_claimed_after_the_pause_was_said(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def wants(job: Job) -> bool:
        asked.set()
        return answer.wait(20)

    pausing, being_claimed = threading.Thread(target=queue.pause), new_job()
    queue.enqueue(being_claimed)
    with serving(queue, lambda job, control: control.commit(job.succeeded(result)), wants=wants):
        assert asked.wait(20)
        pausing.start()
        pausing.join(0.2)
        assert pausing.is_alive()
        answer.set()
        pausing.join()
        late = new_job()
        queue.enqueue(late)
        eventually(is_ended(queue, being_claimed))
        time.sleep(0.5)
    assert queue.get(late.id) == Snapshot(late, position=0)


def test_a_watcher_sees_a_job_through_its_states(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job, seen = new_job(), []
    report = Progress(state=State.PROCESSING, fraction=0.5, phase="denoising", step=2, steps=4)

    def handle(job: Job, control: Control) -> None:
        eventually(lambda: seen[-1].progress == Progress())
        control.progress(report)
        eventually(lambda: seen[-1].progress == report)
        control.commit(control.started().succeeded(result))

    def watch() -> None:
        for snapshot in queue.watch(job.id, timeout=20):
            seen.append(snapshot)

    queue.enqueue(job)
    watcher = threading.Thread(target=watch)
    watcher.start()
    eventually(lambda: seen)
    with serving(queue, handle):
        watcher.join(20)
    states = [snapshot.state for snapshot in seen]
    assert [state for state, _ in groupby(states)] == [State.QUEUED, State.LOADING, State.PROCESSING, State.DONE]
    ended = seen[-1]
    assert ended == queue.get(job.id)
    assert (ended.progress, ended.position, ended.job.result, ended.job.attempts) == (None, None, result, 1)


def test_watching_ends_in_time(queue: Queue, new_job: Any) -> None:
    job = new_job()
    queue.enqueue(job)
    began = time.monotonic()
    assert [snapshot.state for snapshot in queue.watch(job.id, timeout=0.3)] == [State.QUEUED]
    assert 0.3 <= time.monotonic() - began < 5
    assert len(list(queue.watch(job.id, timeout=0))) == 1


def test_closing_ends_the_watching(queue: Queue, new_job: Any) -> None:
    job = new_job()
    queue.enqueue(job)
    closing = threading.Timer(0.1, queue.close)
    closing.start()
    assert len(list(queue.watch(job.id, timeout=60))) == 1
    closing.join()


def test_a_waiting_job_is_cancelled_at_once(queue: Queue, new_job: Any, serving: Any) -> None:
    kept, cancelled = new_job(), new_job()
    queue.enqueue(cancelled)
    queue.enqueue(kept)
    snapshot = queue.cancel(cancelled.id)
    assert snapshot is not None
    assert snapshot == queue.get(cancelled.id)
    assert snapshot.state is State.CANCELLED
    assert snapshot.job.error is not None
    assert snapshot.job.error.kind == "JobCancelled"
    assert queue.get(kept.id) == Snapshot(kept, position=0)
    assert queue.counts() == {
        State.QUEUED: 1,
        State.PROCESSING: 0,
        State.DONE: 0,
        State.ERROR: 0,
        State.CANCELLED: 1,
    }


def test_a_running_job_is_told_that_it_is_cancelled(queue: Queue, new_job: Any, serving: Any, eventually: Any) -> None:
    job, in_hand = new_job(), threading.Event()

    def handle(job: Job, control: Control) -> None:
        assert not control.cancelled
        job = control.started()
        in_hand.set()
        eventually(lambda: control.cancelled)
        control.commit(job.cancelled())

    queue.enqueue(job)
    with serving(queue, handle):
        assert in_hand.wait(20)
        for _ in range(2):
            snapshot = queue.cancel(job.id)
            assert snapshot is not None
            assert snapshot.job.id == job.id
        eventually(is_ended(queue, job))
    assert state_of(queue, job) is State.CANCELLED


def test_a_running_job_is_told_how_to_stop(queue: Queue, new_job: Any, serving: Any, eventually: Any) -> None:
    jobs, told = [new_job(id="plain"), new_job(id="partial"), new_job(id="changed")], {}

    def handle(job: Job, control: Control) -> None:
        assert not control.partial
        control.started()
        queue.cancel(job.id, partial=job.id != "plain")
        if job.id == "changed":
            queue.cancel(job.id)
        eventually(lambda: control.cancelled)
        told[job.id] = control.partial
        control.commit(job.cancelled())

    for job in jobs:
        queue.enqueue(job)
    with serving(queue, handle):
        eventually(is_ended(queue, *jobs))
    assert told == {"plain": False, "partial": True, "changed": False}


def test_a_cancelled_job_may_have_a_result(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = new_job()
    queue.enqueue(job)
    with serving(queue, lambda job, control: control.commit(control.started().cancelled(result))):
        eventually(is_ended(queue, job))
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.job.result) == (State.CANCELLED, result)


def test_a_finished_job_stays_as_it_ended(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = new_job()
    queue.enqueue(job)
    with serving(queue, lambda job, control: control.commit(job.succeeded(result))):
        eventually(is_ended(queue, job))
    before = queue.get(job.id)
    assert queue.cancel(job.id) == before
    assert queue.get(job.id) == before


def test_a_released_job_keeps_its_place_and_its_attempts(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    jobs = [new_job(), new_job(), new_job()]
    for job in jobs:
        queue.enqueue(job)
    handled: list[tuple[str, int]] = []
    positions: list[int | None] = []

    def handle(job: Job, control: Control) -> None:
        handled.append((job.id, job.attempts))
        if len(handled) in (1, 2):
            if len(handled) == 1:
                assert control.started().attempts == 1
            control.release()
            snapshot = queue.get(job.id)
            assert snapshot is not None
            assert (snapshot.state, snapshot.job.started) == (State.QUEUED, None)
            positions.append(snapshot.position)
        else:
            control.commit(job.succeeded(result))

    with serving(queue, handle):
        eventually(is_ended(queue, *jobs))
    assert handled == [(jobs[n].id, 0) for n in (0, 0, 0, 1, 2)]
    assert positions == [0, 0]


def test_a_job_cancelled_before_its_release_ends(queue: Queue, new_job: Any, serving: Any, eventually: Any) -> None:
    job, handled = new_job(), []

    def handle(job: Job, control: Control) -> None:
        handled.append(job.id)
        queue.cancel(job.id)
        control.release()

    queue.enqueue(job)
    with serving(queue, handle):
        eventually(is_ended(queue, job))
    assert state_of(queue, job) is State.CANCELLED
    assert handled == [job.id]


def test_a_cancelling_is_not_lost_to_a_release(queue: Queue, new_job: Any, serving: Any, eventually: Any) -> None:
    jobs = [new_job() for _ in range(20)]
    for job in jobs:
        queue.enqueue(job)
    with serving(queue, lambda job, control: control.release(), slots=2):
        for job in jobs:
            assert queue.cancel(job.id) is not None
        eventually(is_ended(queue, *jobs))
    assert queue.counts()[State.CANCELLED] == len(jobs)


def test_an_attempt_is_charged_once_per_claim(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = new_job(attempts=1)

    def handle(job: Job, control: Control) -> None:
        charged = control.started()
        assert control.started() == charged
        assert (charged.attempts, charged.started is None) == (2, False)
        snapshot = queue.get(job.id)
        assert snapshot is not None
        assert snapshot.job == charged
        control.commit(charged.succeeded(result))

    queue.enqueue(job)
    with serving(queue, handle):
        eventually(is_ended(queue, job))
    assert state_of(queue, job) is State.DONE


def test_jobs_start_in_the_order_of_their_claims(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    jobs = [new_job() for _ in range(40)]
    for job in jobs:
        queue.enqueue(job)
    chance, begun = random.Random(1), []

    def handle(job: Job, control: Control) -> None:
        begun.append(job.id)
        time.sleep(chance.uniform(0, 0.01))
        assert begun[-1] == job.id
        control.started()
        time.sleep(chance.uniform(0, 0.02))
        control.commit(job.succeeded(result))

    with serving(queue, handle, slots=4):
        eventually(is_ended(queue, *jobs))
    assert begun == [job.id for job in jobs]


def test_a_suspect_runs_alone_and_is_acquitted_when_it_ends(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    suspect = {"suspect": True, "attempts": 2, "shared": 1}
    jobs = {
        name: new_job(id=name, **options)
        for name, options in (("before", {}), ("first", suspect), ("second", suspect), ("after", {}), ("last", {}))
    }
    for job in jobs.values():
        queue.enqueue(job)
    in_hand: list[str] = []
    together: dict[str, set[str]] = {name: set() for name in jobs}

    def handle(job: Job, control: Control) -> None:
        in_hand.append(job.id)
        control.started()
        if job.id == "after":
            eventually(lambda: "last" in in_hand)
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            together[job.id].update(in_hand)
            time.sleep(0.005)
        in_hand.remove(job.id)
        ended = queue.get(job.id).job  # type: ignore[union-attr]
        control.commit(ended.failed("Oops", "no picture") if job.id == "second" else ended.succeeded(result))

    with serving(queue, handle, slots=3):
        eventually(is_ended(queue, *jobs.values()))
    assert together["first"] == {"first"}
    assert together["second"] == {"second"}
    assert together["after"] == {"after", "last"}
    for name in jobs:
        snapshot = queue.get(name)
        assert snapshot is not None
        assert (snapshot.job.attempts, snapshot.job.suspect) == (2 if jobs[name].suspect else 1, False)


def test_a_released_suspect_is_one_still(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job = new_job(suspect=True, attempts=1)
    queue.enqueue(job)

    def handle(job: Job, control: Control) -> None:
        assert control.started().attempts == 2
        queue.stop()
        control.release()

    queue.serve(handle)
    assert queue.get(job.id) == Snapshot(job, position=0)


def test_what_the_worker_had_started_is_suspect_after_its_death(
    make_queue: Any, new_job: Any, eventually: Any, result: Result
) -> None:
    queue = make_queue()
    jobs = {name: new_job(id=name) for name in ("first", "second", "claimed", "waiting")}
    for job in jobs.values():
        queue.enqueue(job)
    all_in_hand = threading.Barrier(3)

    def fail(job: Job, control: Control) -> None:
        if job.id != "claimed":
            control.started()
        all_in_hand.wait(20)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        queue.serve(fail, slots=3)
    if isinstance(queue, FileQueue):
        queue = make_queue()
        queue.stop()
        queue.serve(fail)
    found = [(job.id, job.attempts, job.suspect) for job in queue.jobs()]
    assert found == [("first", 1, True), ("second", 1, True), ("claimed", 0, False), ("waiting", 0, False)]


def test_nothing_is_written_after_the_end(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    job, late = new_job(), threading.Event()

    def handle(job: Job, control: Control) -> None:
        job = control.started()
        control.commit(job.succeeded(result))
        control.commit(job.failed("Late", "second commit"))
        control.release()
        control.started()
        control.progress(Progress(state=State.PROCESSING))
        assert control.cancelled
        late.set()

    queue.enqueue(job)
    with serving(queue, handle):
        assert late.wait(20)
    snapshot = queue.get(job.id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.progress, snapshot.job.attempts) == (State.DONE, None, 1)
    assert queue.counts()[State.QUEUED] == 0


def test_only_an_end_can_be_committed(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    other = new_job()

    def handle(job: Job, control: Control) -> None:
        with pytest.raises(ValueError, match="not the end"):
            control.commit(job)
        with pytest.raises(ValueError, match="not the end"):
            control.commit(other.succeeded(result))
        control.commit(job.failed("Oops", "no picture"))

    job = new_job()
    queue.enqueue(job)
    with serving(queue, handle):
        eventually(is_ended(queue, job))
    assert state_of(queue, job) is State.ERROR


def test_jobs_and_counts_agree_with_what_happened(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    ends: dict[str, Callable[[Job], Job]] = {
        "first": lambda job: job.succeeded(result),
        "second": lambda job: job.failed("Oops", "no picture"),
        "third": lambda job: job.succeeded(result),
    }
    for job_id in (*ends, "held", "waiting", "cancelled"):
        queue.enqueue(new_job(id=job_id))
    queue.cancel("cancelled")
    in_hand, let_go = threading.Event(), threading.Event()

    def handle(job: Job, control: Control) -> None:
        if job.id in ends:
            control.commit(ends[job.id](job))
            return
        control.progress(Progress(state=State.PROCESSING))
        in_hand.set()
        assert let_go.wait(20)
        control.release()

    with serving(queue, handle, wants=lambda job: job.id != "waiting"):
        assert in_hand.wait(20)
        listed = {state: [job.id for job in queue.jobs(frozenset({state}))] for state in State}
        everything = [(job.id, job.state) for job in queue.jobs()]
        counts = queue.counts()
        queue.stop()
        let_go.set()
    assert listed == {
        State.QUEUED: ["waiting"],
        State.LOADING: [],
        State.PROCESSING: ["held"],
        State.DONE: ["third", "first"],
        State.ERROR: ["second"],
        State.CANCELLED: ["cancelled"],
    }
    assert everything == [
        ("held", State.PROCESSING),
        ("waiting", State.QUEUED),
        ("third", State.DONE),
        ("second", State.ERROR),
        ("first", State.DONE),
        ("cancelled", State.CANCELLED),
    ]
    assert counts == {
        State.QUEUED: 1,
        State.PROCESSING: 1,
        State.DONE: 2,
        State.ERROR: 1,
        State.CANCELLED: 1,
    }


def test_as_many_jobs_run_at_a_time_as_there_are_slots(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    jobs = [new_job() for _ in range(9)]
    for job in jobs:
        queue.enqueue(job)
    together, most, mutex, meeting = 0, 0, threading.Lock(), threading.Barrier(3)

    def handle(job: Job, control: Control) -> None:
        nonlocal together, most
        job = control.started()
        with mutex:
            together += 1
            most = max(most, together)
        meeting.wait(20)
        with mutex:
            together -= 1
        control.commit(job.succeeded(result))

    with serving(queue, handle, slots=3):
        eventually(is_ended(queue, *jobs))
    assert most == 3


def test_unwanted_jobs_wait_until_they_are_wanted(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    loaded, handled = {"small"}, []
    jobs = [new_job(model=model) for model in ("large", "small", "large", "small")]
    for job in jobs:
        queue.enqueue(job)

    def handle(job: Job, control: Control) -> None:
        handled.append(job.request.model)
        control.commit(job.succeeded(result))

    with serving(queue, handle, wants=lambda job: job.request.model in loaded):
        eventually(lambda: len(handled) == 2)
        loaded.add("large")
        eventually(is_ended(queue, *jobs))
    assert handled == ["small", "small", "large", "large"]


def test_an_idle_worker_notices_a_job_at_once(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    with serving(queue, lambda job, control: control.commit(job.succeeded(result))):
        time.sleep(0.3)
        for _ in range(5):
            job = new_job()
            queue.enqueue(job)
            assert [snapshot.state for snapshot in queue.watch(job.id, timeout=20)][-1] is State.DONE


def test_stopping_claims_no_more_and_waits_for_the_job_in_hand(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    first, second, in_hand = new_job(), new_job(), threading.Event()
    queue.enqueue(first)
    queue.enqueue(second)

    def handle(job: Job, control: Control) -> None:
        in_hand.set()
        time.sleep(0.3)
        control.commit(job.succeeded(result))

    with serving(queue, handle):
        assert in_hand.wait(20)
    assert state_of(queue, first) is State.DONE
    assert queue.get(second.id) == Snapshot(second, position=0)


def test_a_stop_before_serving_is_not_forgotten(queue: Queue, new_job: Any) -> None:
    queue.enqueue(new_job())
    queue.stop()
    queue.serve(lambda job, control: pytest.fail("claimed after the stop"))


def test_only_one_serves_at_a_time(queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result) -> None:
    job = new_job()
    queue.enqueue(job)
    with serving(queue, lambda job, control: control.commit(job.succeeded(result))):
        eventually(is_ended(queue, job))
        with pytest.raises(RuntimeError, match="served already"):
            queue.serve(lambda job, control: None)


def test_what_a_handler_raises_ends_the_serving(queue: Queue, new_job: Any) -> None:
    queue.enqueue(new_job())

    def handle(job: Job, control: Control) -> None:
        raise OSError("from the handler")

    with pytest.raises(OSError, match="from the handler"):
        queue.serve(handle, slots=2)


def test_a_handler_must_end_its_job(queue: Queue, new_job: Any) -> None:
    queue.enqueue(new_job())
    with pytest.raises(RuntimeError, match="without release or commit"):
        queue.serve(lambda job, control: None)


def test_each_job_is_either_cancelled_or_run(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result
) -> None:
    jobs = [new_job() for _ in range(60)]
    for job in jobs:
        queue.enqueue(job)
    claimed: list[str] = []

    def handle(job: Job, control: Control) -> None:
        claimed.append(job.id)
        control.commit(job.succeeded(result))

    answers: dict[str, State] = {}
    with serving(queue, handle, slots=2):
        for job in jobs:
            snapshot = queue.cancel(job.id)
            assert snapshot is not None
            answers[job.id] = snapshot.state
        eventually(is_ended(queue, *jobs))
    assert len(claimed) == len(set(claimed))
    for job in jobs:
        assert state_of(queue, job) is (State.DONE if job.id in claimed else State.CANCELLED)
        assert answers[job.id] is not State.QUEUED
        assert answers[job.id] is not State.CANCELLED or job.id not in claimed


def test_many_hands_do_each_job_once(queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result) -> None:
    done: list[str] = []
    given: list[Job] = []

    def give() -> None:
        for _ in range(25):
            job = new_job()
            queue.enqueue(job)
            given.append(job)

    def handle(job: Job, control: Control) -> None:
        done.append(job.id)
        control.started()
        control.commit(job.succeeded(result))

    givers = [threading.Thread(target=give) for _ in range(4)]
    with serving(queue, handle, slots=4):
        for giver in givers:
            giver.start()
        for giver in givers:
            giver.join()
        eventually(is_ended(queue, *given))
    assert sorted(done) == sorted(job.id for job in given)
    assert queue.counts()[State.DONE] == 100


def test_a_worker_is_seen_for_as_long_as_it_serves(queue: Queue, serving: Any, eventually: Any) -> None:
    report = WorkerReport(pid=1, device=DeviceReport("CPU", "cpu", {"cuda_available": False}), event=2.5, restarts=3)
    queue.report(report)
    assert queue.workers() == []
    with serving(queue, lambda job, control: control.release()):
        eventually(queue.workers)
        assert queue.workers() == [report]
        queue.report(report.model_copy(update={"jobs": ("a", "b")}))
        assert [(seen.state, seen.jobs) for seen in queue.workers()] == [("running", ("a", "b"))]
    assert queue.workers() == []


def everything(queue: Queue, limit: int, **options: Any) -> list[str]:
    """The ids that a caller sees who asks page after page."""
    seen: list[str] = []
    before = None
    while page := queue.newest(lambda _: True, states=frozenset(State), limit=limit, before=before, **options):
        assert len(page) <= limit
        seen += [snapshot.job.id for snapshot in page]
        before = Place.of(page[-1].job)
    return seen


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_pages_of_the_newest_jobs_show_each_job_once(
    queue: Queue, new_job: Any, serving: Any, eventually: Any, result: Result, limit: int
) -> None:
    jobs = [new_job(id=f"j{n}", created=1000.0 + n // 2) for n in range(8)]  # two have the same time
    for job in jobs:
        queue.enqueue(job)
    queue.cancel("j3")

    def handle(job: Job, control: Control) -> None:
        control.commit(control.started().succeeded(result))
        if job.id == "j2":
            queue.stop()

    with serving(queue, handle):
        eventually(is_ended(queue, *jobs[:3]))
    assert everything(queue, limit) == ["j7", "j6", "j5", "j4", "j3", "j2", "j1", "j0"]


def test_the_newest_jobs_are_those_that_are_wanted(queue: Queue, new_job: Any) -> None:
    for n in range(6):
        queue.enqueue(new_job(id=f"j{n}", created=1000.0 + n, caller="ann" if n % 2 else "bob"))
    queue.cancel("j5")
    waiting = queue.newest(
        lambda found: found.job.caller == "ann", states=frozenset({State.QUEUED, State.DONE}), limit=5
    )
    assert [(found.job.id, found.position) for found in waiting] == [("j3", 3), ("j1", 1)]
    (cancelled,) = queue.newest(lambda _: True, states=frozenset({State.CANCELLED}), limit=5)
    assert cancelled.job.id == "j5"


def test_what_happens_between_two_pages_hides_no_job(queue: Queue, new_job: Any) -> None:
    jobs = [new_job(id=f"j{n}", created=1000.0 + n) for n in range(6)]
    for job in jobs:
        queue.enqueue(job)
    first = queue.newest(lambda _: True, states=frozenset(State), limit=2)
    queue.enqueue(new_job(id="later", created=2000.0))
    for job_id in ("j2", "j4"):
        queue.cancel(job_id)
    rest = queue.newest(lambda _: True, states=frozenset(State), limit=9, before=Place.of(first[-1].job))
    assert [found.job.id for found in (*first, *rest)] == ["j5", "j4", "j3", "j2", "j1", "j0"]
