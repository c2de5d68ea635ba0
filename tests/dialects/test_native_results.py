"""The list of jobs, and pictures as files, over HTTP."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import diffusers_folder
from serving import Program, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with the stub engine, whose jobs are those of this file."""
    home = tmp_path_factory.mktemp("results")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home) as program:
        yield program


@pytest.fixture(scope="module")
def done(server: Program) -> str:
    """The id of a job with two pictures."""
    job_id = server.submit(prompt="two of them " * 50, n=2, steps=2, seed=7, fileType="png")
    server.wait(job_id)
    return job_id


def listed(server: Program, **query: Any) -> dict[str, Any]:
    answer = server.get("/queue", params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_job_is_listed_with_what_it_is_and_without_its_pictures(server: Program, done: str) -> None:
    (row,) = [row for row in listed(server)["jobs"] if row["job_id"] == done]
    assert row["created"] <= row["started"] <= row["finished"]
    told = {name: value for name, value in row.items() if name not in ("created", "started", "finished", "prompt")}
    assert told.pop("generation_time_sec") >= 0
    assert told == {
        **{"job_id": done, "kind": "txt2img", "state": "done", "cancelled": False, "progress": 100, "error": None},
        **{"current_phase": "done", "position": None, "model": "small", "width": 64, "height": 64, "steps": 2},
        **{"seed": 7, "n": 2, "priority": 0, "pictures": 2},
    }
    assert row["prompt"] == ("two of them " * 50)[:200]


def test_pages_and_states_of_the_list(server: Program, done: str) -> None:
    server.request("POST", "/queue/pause")
    waiting = [server.submit(prompt=f"number {n}") for n in range(5)]
    server.request("DELETE", f"/queue/{waiting[0]}")
    try:
        seen: list[str] = []
        page = listed(server, limit=2)
        while True:
            seen += [row["job_id"] for row in page["jobs"]]
            if page["next"] is None:
                break
            page = listed(server, limit=2, cursor=page["next"])
        assert seen[:5] == waiting[::-1]
        assert len(set(seen)) == len(seen)
        assert done in seen
        queued = listed(server, state="queued")["jobs"]
        assert [row["job_id"] for row in queued] == waiting[:0:-1]
        assert [row["position"] for row in queued] == [3, 2, 1, 0]
        for state in ("error", "cancelled"):
            (row,) = listed(server, state=state)["jobs"]
            assert (row["job_id"], row["state"], row["cancelled"]) == (waiting[0], "error", True)
        assert {row["state"] for row in listed(server, state=["done", "queued"])["jobs"]} == {"done", "queued"}
    finally:
        for job_id in waiting[1:]:
            server.request("DELETE", f"/queue/{job_id}")
        server.request("POST", "/queue/resume")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"state": "ready"}, "state is 'ready': "),
        ({"limit": 0}, "limit is '0': "),
        ({"limit": 201}, "limit is '201': "),
        ({"cursor": "2"}, "cursor is '2'; it must be the next of another answer"),
    ],
)
def test_a_wrong_question_is_refused(server: Program, query: dict[str, Any], reason: str) -> None:
    answer = server.get("/queue", params=query)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(reason)


def test_a_picture_is_a_file(server: Program, done: str) -> None:
    whole = server.status(done)
    for path, encoded in (("", whole["image"]), ("/0", whole["images"][0]), ("/1", whole["images"][1])):
        answer = server.get(f"/queue/{done}/image{path}")
        assert answer.content == base64.b64decode(encoded)
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Content-Disposition"] == f'inline; filename="{done}-{path[1:] or 0}.png"'
        assert "no-store" not in answer.headers["Cache-Control"]


def test_a_picture_that_the_caller_has_is_not_sent_again(server: Program, done: str) -> None:
    path = f"/queue/{done}/image"
    tag = server.get(path).headers["ETag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = server.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert server.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    assert server.get(f"{path}/1").headers["ETag"] != tag


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-9", 0, 9), ("5-", 5, -1), ("-7", -7, -1), ("10-99999999", 10, -1), ("0-0", 0, 0), ("-99999999", 0, -1)],
)
def test_a_part_of_a_picture(server: Program, done: str, asked: str, first: int, last: int) -> None:
    whole = server.get(f"/queue/{done}/image").content
    first, last = (place % len(whole) for place in (first, last))
    answer = server.get(f"/queue/{done}/image", headers={"Range": f"bytes={asked}"})
    assert (answer.status_code, answer.content) == (206, whole[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(whole)}"


@pytest.mark.parametrize("asked", ["bytes=9-3", "bytes=-", "bytes=0-1,4-5", "lines=0-1", "bytes=x"])
def test_a_range_that_is_none_is_ignored(server: Program, done: str, asked: str) -> None:
    answer = server.get(f"/queue/{done}/image", headers={"Range": asked})
    assert (answer.status_code, len(answer.content)) == (200, int(answer.headers["Content-Length"]))


def test_a_part_that_is_not_there_is_refused(server: Program, done: str) -> None:
    size = len(server.get(f"/queue/{done}/image").content)
    for asked in (f"bytes={size}-", "bytes=-0"):
        answer = server.get(f"/queue/{done}/image", headers={"Range": asked})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert answer.json()["status"] == "error"


def test_a_part_of_another_file_is_not_given(server: Program, done: str) -> None:
    path, part = f"/queue/{done}/image", {"Range": "bytes=0-1"}
    tag = server.get(path).headers["ETag"]
    assert server.get(path, headers=part | {"If-Range": tag}).status_code == 206
    assert server.get(path, headers=part | {"If-Range": '"other"'}).status_code == 200


def test_a_picture_that_is_not_there_is_refused_with_the_reason(server: Program, done: str) -> None:
    server.request("POST", "/queue/pause")
    waiting = server.submit(prompt="a circle")
    early = server.get(f"/queue/{waiting}/image")
    server.request("DELETE", f"/queue/{waiting}")
    server.request("POST", "/queue/resume")
    assert (early.status_code, early.json()["error"]) == (409, f"job {waiting} has no picture yet: its state is queued")
    for path, status, reason in (
        (f"{waiting}/image", 404, f"job {waiting} ended without a picture"),
        (f"{done}/image/2", 404, f"job {done} has no picture 2; there are 2, from 0"),
        (f"{done}/image/-1", 400, "n is '-1': Input should be greater than or equal to 0"),
        ("nobody/image", 404, "Job nobody not found"),
    ):
        answer = server.get(f"/queue/{path}")
        assert (answer.status_code, answer.json()["error"]) == (status, reason)


def test_a_picture_that_was_deleted_is_gone(server: Program) -> None:
    job_id = server.submit(prompt="a circle", steps=1)
    Path(server.home / server.wait(job_id)["output_path"]).unlink()
    answer = server.get(f"/queue/{job_id}/image")
    assert (answer.status_code, answer.json()["error"]) == (410, f"the picture of job {job_id} was deleted")


def test_the_pictures_may_be_left_out_of_a_status(server: Program, done: str) -> None:
    whole = server.status(done)
    short = server.get(f"/queue/{done}?image=false&wait=1").json()
    assert short == {name: value for name, value in whole.items() if name not in ("image", "images")}


def test_a_status_without_pictures_is_no_reading_of_the_result(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path, delete_after_read=True) as server:
        job_id = server.submit(prompt="a circle", steps=1)
        for _ in range(2):
            assert server.get(f"/queue/{job_id}?wait=60&image=false").json()["state"] == "done"
            assert server.get(f"/queue/{job_id}/image").status_code == 200
        assert server.status(job_id)["image"]
        assert server.get(f"/queue/{job_id}/image").status_code == 404
