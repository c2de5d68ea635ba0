"""A job's history, and its record on disk."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import pytest
from asking import FIELDS, plain
from pydantic import ValidationError

from diffusion_api.schema.job import VERSION, Image, Job, Result, State, UnreadableRecord, dumps, loads
from diffusion_api.schema.request import MAX_SEED, Output, Txt2Img

RESULT = Result(
    images=(Image(path="outputs/x.jpg", width=64, height=64, seed=1, sha256="00", infotext="a"),),
    seconds=1.5,
    memory_before_mb=1.0,
    memory_after_mb=2.0,
)


def new_job(**fields: Any) -> Job:
    return Job(request=plain(prompt="a lighthouse 🦀"), **fields)


def test_a_new_job_waits() -> None:
    job = new_job()
    assert uuid.UUID(job.id).version == 4
    assert (job.state, job.attempts, job.started, job.finished) == (State.QUEUED, 0, None, None)
    assert abs(job.created - time.time()) < 10


def test_an_attempt_is_charged_and_can_be_given_back() -> None:
    charged = new_job().charged()
    assert charged.attempts == 1
    assert charged.started is not None
    again = charged.requeued()
    assert (again.attempts, again.started, again.state) == (1, None, State.QUEUED)
    assert again.charged().uncharged().attempts == 1
    assert new_job().uncharged().attempts == 0


def test_a_job_of_a_dead_worker_is_suspect_until_its_attempts_are_used_up() -> None:
    job = new_job().charged("boot")
    for attempts in (1, 2):
        job = job.orphaned(max_attempts=3, alone=True, boot="boot")
        assert (job.state, job.attempts, job.suspect, job.started) == (State.QUEUED, attempts, True, None)
        job = job.charged("boot")
    ended = job.orphaned(max_attempts=3, alone=True, boot="boot")
    assert ended.state is State.ERROR
    assert ended.error.message == "the service stopped 3 times while running this job"


def test_a_job_that_had_not_started_is_no_suspect() -> None:
    job = new_job(attempts=1)
    assert job.orphaned(max_attempts=3, alone=True, boot="boot") == job
    assert new_job(attempts=1, suspect=True).orphaned(max_attempts=3, alone=True).suspect


def test_a_reboot_is_no_jobs_fault() -> None:
    job = new_job(attempts=2)
    assert job.charged("boot").orphaned(max_attempts=3, alone=True, boot="another") == job


@pytest.mark.parametrize(("alone", "attempts"), [(True, 2), (False, 1)])
def test_an_attempt_is_given_back_when_another_may_have_killed_the_worker(alone: bool, attempts: int) -> None:
    orphan = new_job().charged().orphaned(max_attempts=3, alone=alone)
    assert (orphan.state, orphan.attempts, orphan.suspect) == (State.QUEUED, 1, True)
    passed = orphan.charged().acquitted()
    assert (passed.attempts, passed.suspect) == (attempts, False)


@pytest.mark.parametrize(
    ("end", "state", "kind"),
    [
        (lambda job: job.succeeded(RESULT), State.DONE, None),
        (lambda job: job.failed("DiskFull", "no room"), State.ERROR, "DiskFull"),
        (lambda job: job.cancelled(), State.CANCELLED, "JobCancelled"),
    ],
    ids=["done", "error", "cancelled"],
)
def test_an_ended_job_has_a_time_and_a_result_or_a_reason(end: Any, state: State, kind: str | None) -> None:
    job = end(new_job().charged())
    assert job.state is state
    assert job.state.terminal
    assert job.finished >= job.started
    assert (job.error.kind if job.error else None) == kind
    assert job.result == (RESULT if state is State.DONE else None)


def test_warnings_are_added_to() -> None:
    assert new_job(warnings=("one",)).succeeded(RESULT, ("two",)).warnings == ("one", "two")


def test_three_states_are_terminal() -> None:
    assert [state for state in State if state.terminal] == [State.DONE, State.ERROR, State.CANCELLED]


def test_a_job_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        new_job().state = State.DONE


@pytest.mark.parametrize(
    "job",
    [
        new_job(),
        new_job(payload={"prompt": "ü", "deep": [{"a": None}]}, warnings=("w",), caller="me", priority=-9),
        new_job().charged().succeeded(RESULT),
        new_job().failed("KindOfError", "text"),
    ],
    ids=["new", "full", "done", "error"],
)
def test_a_record_is_one_line_and_comes_back(job: Job) -> None:
    record = dumps(job)
    assert b"\n" not in record
    assert loads(record) == job


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"{}",
        dumps(new_job())[:-1],
        dumps(new_job()).replace(b'"seed":1', b'"seed":-1'),
    ],
)
def test_what_is_no_record_is_told_so(record: bytes) -> None:
    with pytest.raises(UnreadableRecord, match="not a job record"):
        loads(record)


def test_a_record_with_a_field_of_another_release_is_told_so() -> None:
    record = json.loads(dumps(new_job()))
    with pytest.raises(UnreadableRecord, match="mystery"):
        loads(json.dumps(record | {"mystery": 1}).encode())


def test_a_record_of_a_newer_release_is_told_so() -> None:
    record = json.loads(dumps(new_job())) | {"version": VERSION + 1}
    with pytest.raises(UnreadableRecord, match="newer release"):
        loads(json.dumps(record).encode())


def test_the_seeds_follow_each_other_and_go_round() -> None:
    assert plain(seed=MAX_SEED - 1, count=3).seeds == (MAX_SEED - 1, MAX_SEED, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"guidance_scale": -0.1},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"width": 0},
        {"width": 60},
        {"height": 4},
        {"seed": -1},
        {"seed": 2**32},
        {"count": 0},
        {"mystery": 1},
        {"kind": "img2img"},
    ],
    ids=str,
)
def test_a_request_has_no_wrong_values(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Txt2Img(**FIELDS | change)


@pytest.mark.parametrize("name", list(FIELDS))
def test_a_request_has_no_holes(name: str) -> None:
    with pytest.raises(ValidationError):
        Txt2Img(**{key: value for key, value in FIELDS.items() if key != name})


@pytest.mark.parametrize("change", [{"quality": 0}, {"quality": 101}, {"format": "bmp"}], ids=str)
def test_an_output_has_no_wrong_values(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Output(**change)
