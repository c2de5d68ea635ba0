"""What a running service keeps and for how long: keys of requests, results, pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_models import diffusers_folder
from serving import Program, eventually, serving

DAY = 24 * 3600.0


SET_CLOCK = """
import time
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + {hours} * 3600
time.time_ns = lambda: real_ns() + {hours} * 3600 * 10**9
"""  # libfaketime leaves Python's waiting broken, one way or the other


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "small", sample_size=8)
    return folder


@pytest.fixture
def server(home: Path) -> Iterator[Program]:
    with serving(home) as program:
        yield program


def post(server: Program, key: str, **fields: object) -> httpx.Response:
    return server.request("POST", "/txt2img", json=fields, headers={"Idempotency-Key": key})


def post_at_once(server: Program, key: str, times: int, **fields: object) -> list[httpx.Response]:
    """The answers that came, to requests that were all under way together."""

    def send(_: int) -> list[httpx.Response]:
        try:
            return [post(server, key, **fields)]
        except httpx.TransportError:
            return []

    with ThreadPoolExecutor(times) as threads:
        return [answer for answers in threads.map(send, range(times)) for answer in answers]


def ids(answers: list[httpx.Response]) -> set[str]:
    assert {answer.status_code for answer in answers} <= {200}, answers
    return {answer.json()["job_id"] for answer in answers}


def records(home: Path) -> set[str]:
    """The ids of all jobs on disk, wherever they lie."""
    places = ("queued", "running/*", "done", "error", "cancelled")
    return {path.stem[-36:] for place in places for path in (home / "queue").glob(f"{place}/*.json")}


def age(folder: Path, seconds: float) -> None:
    """Make all files of a folder older."""
    for path in folder.iterdir():
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


@contextmanager
def swept(home: Path, *arguments: object, **settings: object) -> Iterator[Program]:
    """A service that has swept, and had a job since."""
    old = home / "queue" / "gone" / "old"
    old.touch()
    os.utime(old, (1, 1))
    with serving(home, *arguments, **settings) as server:
        eventually(lambda: not old.exists(), "a sweep")
        server.result(prompt="after the sweep")
        yield server


# Idempotency-Key


def test_fifty_posts_with_one_key_at_once_make_one_job(home: Path, server: Program) -> None:
    answers = post_at_once(server, "k", 50, prompt="a lighthouse")
    assert len(answers) == 50
    (job_id,) = ids(answers)
    assert records(home) == {job_id}
    assert len({answer.json()["seed"] for answer in answers}) == 1
    replayed = sorted(answer.headers.get("Idempotency-Replayed", "") for answer in answers)
    assert replayed == ["", *["true"] * 49]
    assert server.wait(job_id)["seed"] == answers[0].json()["seed"]


@pytest.mark.parametrize("isolated", [False, True])
def test_a_key_holds_through_a_kill_in_the_middle_of_it(home: Path, isolated: bool) -> None:
    told: set[str] = set()
    for wait in (0, 0.002, 0.01, 0.03):
        with serving(home, isolated=isolated) as server, ThreadPoolExecutor(1) as thread:
            sending = thread.submit(post_at_once, server, "k", 20, prompt="a lighthouse")
            time.sleep(wait)
            server.kill()
            told |= ids(sending.result())
    with serving(home, isolated=isolated) as server:
        told |= ids(post_at_once(server, "k", 20, prompt="a lighthouse"))
        (job_id,) = told
        server.wait(job_id)
    assert records(home) == {job_id}


def test_a_key_with_another_body_is_refused_by_name(server: Program) -> None:
    first = post(server, "order-66", prompt="a lighthouse", steps=3)
    refused = post(server, "order-66", prompt="a lighthouse", steps=4)
    assert refused.status_code == 422
    assert "Idempotency-Key 'order-66' was sent before with another body" in refused.json()["error"]
    again = post(server, "order-66", steps=3, prompt="a lighthouse")
    assert again.json() == first.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers


def test_posts_without_a_key_are_jobs_of_their_own(server: Program) -> None:
    assert len({server.submit(prompt="a lighthouse", seed=1) for _ in range(3)}) == 3


@pytest.mark.parametrize("key", [b"", b"a b", b"\xe9", b"x" * 256], ids=str)
def test_what_cannot_be_a_key_is_refused(stub_server: Program, key: bytes) -> None:
    headers = [(b"Idempotency-Key", key)]
    answer = stub_server.request("POST", "/txt2img", json={}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("Idempotency-Key is ")
    assert "1 to 255 visible ASCII characters without spaces are allowed" in answer.json()["error"]


@pytest.mark.parametrize("key", ["x", "!~", '"quoted"', "../../etc/passwd", "x" * 255])
def test_what_can_be_a_key_is_one(stub_server: Program, key: str) -> None:
    assert len(ids([post(stub_server, key, prompt="x", nested={"a": [{}]}) for _ in range(2)])) == 1


def test_a_refused_request_leaves_its_key_free(stub_server: Program) -> None:
    assert post(stub_server, "free", prompt="x", steps=10_000).status_code == 400
    assert post(stub_server, "free", prompt="x", steps=10).status_code == 200


def test_a_body_too_deep_for_a_record_is_refused_with_a_key_too(stub_server: Program) -> None:
    deep = "[" * 800 + "]" * 800
    answer = stub_server.request(
        "POST",
        "/txt2img",
        content=f'{{"prompt": "x", "deep": {deep}}}',
        headers={"Idempotency-Key": "deep", "Content-Type": "application/json"},
    )
    assert answer.status_code == 400


# results


def test_a_result_beyond_its_time_is_gone(home: Path) -> None:
    with serving(home) as server:
        old, new = server.submit(prompt="old"), server.submit(prompt="new")
        server.wait(old)
        server.wait(new)
    os.utime(home / "queue" / "done" / f"{old}.json", (time.time() - 8 * DAY,) * 2)
    with serving(home, "--no-worker") as server:
        eventually(lambda: server.get(f"/queue/{old}").status_code == 410, "the result to be gone")
        body = server.get(f"/queue/{old}").json()
        assert body["error"] == body["detail"] == f"Job {old} has ended, and its result is no longer kept"
        assert server.status(new)["image"]
        assert server.get("/queue/nobody").status_code == 404
    assert (home / "outputs" / f"{old}.jpg").exists()


def test_results_beyond_their_number_are_gone_the_oldest_first(home: Path) -> None:
    with serving(home) as server:
        jobs = [server.result(prompt=str(n))["job_id"] for n in range(3)]
    with serving(home, keep_results=1) as server:
        eventually(lambda: server.get(f"/queue/{jobs[1]}").status_code == 410, "the results to be gone")
        assert [server.get(f"/queue/{job_id}").status_code for job_id in jobs] == [410, 410, 200]


def test_results_are_kept_for_ever_if_that_is_wanted(home: Path) -> None:
    with serving(home) as server:
        kept = server.result(prompt="x")["job_id"]
    age(home / "queue" / "done", 5000 * DAY)
    with swept(home, keep_results_hours=0, keep_results=0) as server:
        assert server.status(kept)["state"] == "done"


@pytest.mark.parametrize("hours", [2, -2, -10_000])
def test_a_clock_that_jumps_wipes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    with serving(home) as server:
        job_id = server.result(prompt="x")["job_id"]
        keyed = post(server, "k", prompt="y").json()["job_id"]
        server.wait(keyed)
    (tmp_path / "sitecustomize.py").write_text(SET_CLOCK.format(hours=hours))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with swept(home, keep_outputs_days=7) as server:
        later = server.result(prompt="z")["job_id"]
        assert server.status(job_id)["image"]
        assert post(server, "k", prompt="y").json()["job_id"] == keyed
    monkeypatch.undo()
    with serving(home) as server:
        assert {server.status(each)["state"] for each in (job_id, keyed, later)} == {"done"}


# delete_after_read


def test_a_result_can_be_read_once_if_that_is_wanted(home: Path) -> None:
    with serving(home, delete_after_read=True) as server:
        done = post(server, "k", prompt="x").json()["job_id"]
        failed = server.submit(prompt="stub:fail")
        for job_id, state in ((done, "done"), (failed, "error")):
            assert server.wait(job_id, state)["state"] == state
            assert server.get(f"/queue/{job_id}").status_code == 404
        assert post(server, "k", prompt="x").json()["job_id"] == done
        assert server.get(f"/queue/{done}").status_code == 404
    assert [path.name for path in (home / "outputs").glob("*.jpg")] == [f"{done}.jpg"]
    assert records(home) == set()


@pytest.mark.parametrize("isolated", [False, True])
def test_a_result_is_read_once_however_soon_it_is_asked_for(home: Path, isolated: bool) -> None:
    with serving(home, delete_after_read=True, isolated=isolated) as server:
        for job_id in [server.submit(prompt=str(n), steps=1) for n in range(15)]:
            answers = [server.get(f"/queue/{job_id}")]
            while answers[-1].status_code == 200:
                answers.append(server.get(f"/queue/{job_id}"))
            assert [answer.json()["state"] == "done" for answer in answers[:-1]].count(True) == 1
            assert answers[-1].status_code == 404


def test_looking_at_a_job_before_its_end_takes_nothing_away(home: Path) -> None:
    with serving(home, delete_after_read=True) as server:
        job_id = server.submit(prompt="stub:seconds=0.02", steps=10)
        waited = server.get(f"/queue/{job_id}?wait=30")
        assert waited.json()["state"] == "done"
        assert server.get(f"/queue/{job_id}").status_code == 404


def test_of_many_who_read_a_result_at_once_one_gets_it(home: Path) -> None:
    with serving(home, delete_after_read=True) as server, ThreadPoolExecutor(16) as threads:
        job_id = server.submit(prompt="x")
        eventually(lambda: (home / "queue" / "done" / f"{job_id}.json").exists(), "the end")
        answers = list(threads.map(lambda _: server.get(f"/queue/{job_id}").status_code, range(16)))
    assert sorted(answers) == [200, *[404] * 15]


# pictures


def test_pictures_are_deleted_only_if_that_is_wanted(home: Path) -> None:
    with serving(home) as server:
        jobs = [server.result(prompt=str(n))["job_id"] for n in range(3)]
    (home / "outputs" / "mine.jpg").write_bytes(b"mine")
    age(home / "outputs", 1000 * DAY)
    with swept(home) as server:
        assert [bool(server.status(job_id)["image"]) for job_id in jobs] == [True] * 3
    with serving(home, keep_outputs_days=30) as server:
        eventually(lambda: server.status(jobs[0])["image"] is None, "the pictures to be deleted")
        assert [server.status(job_id)["state"] for job_id in jobs] == ["done"] * 3
        assert not any((home / "outputs" / f"{job_id}.jpg").exists() for job_id in jobs)
    assert (home / "outputs" / "mine.jpg").exists()
