"""``GET /queue/{job_id}/events``, heard over real connections."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asking import plain
from fake_models import diffusers_folder
from serving import Program, eventually, serving

from diffusion_api.dialects.native import events
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job
from diffusion_api.waiters import Waiters

Told = tuple[str, dict[str, Any], str]
"""An event's name, its data and its id."""


def told(lines: Iterator[str]) -> Iterator[Told]:
    """The events in a stream, read as the standard says."""
    name, data, last = "message", "", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value
        elif field == "id":
            last = value
        elif not line and data:
            yield name, json.loads(data), last
            name, data = "message", ""


def heard(server: Program, job_id: str, **headers: str) -> list[Told]:
    with httpx.stream("GET", f"{server.url}/queue/{job_id}/events", timeout=120, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-store"
        return list(told(answer.iter_lines()))


def test_a_job_is_told_from_its_beginning_to_its_end(stub_server: Program) -> None:
    busy = stub_server.submit(prompt="stub:seconds=0.3", model="small", steps=4)
    job_id = stub_server.submit(prompt="stub:seconds=0.3", model="small", steps=10, preview_every=1)
    found = heard(stub_server, job_id)
    assert stub_server.status(busy)["state"] == "done"
    states = [data["state"] for name, data, _ in found if name == "state"]
    assert [state for state, _ in itertools.groupby(states)] == states
    assert states[0] == "queued"
    assert states[-2:] == ["processing", "done"]
    progress = [data["progress"] for name, data, _ in found if name != "preview"]
    assert progress == sorted(progress)
    assert len({data["progress"] for name, data, _ in found if name == "progress"}) > 2
    previews = [data["preview"] for name, data, _ in found if name == "preview"]
    assert previews
    assert all(base64.b64decode(preview).startswith(b"\xff\xd8") for preview in previews)
    last, status = found[-1], stub_server.get(f"/queue/{job_id}", params={"image": "false"}).json()
    assert last == ("state", status, "end")


def test_the_events_of_a_job_that_has_ended_are_its_end(stub_server: Program) -> None:
    job_id = stub_server.result(prompt="x", model="small", steps=1)["job_id"]
    status = stub_server.get(f"/queue/{job_id}", params={"image": "false"}).json()
    for last_seen in ({}, {"Last-Event-ID": "5"}, {"Last-Event-ID": "..;;"}):
        assert heard(stub_server, job_id, **last_seen) == [("state", status, "end")]
    after = stub_server.get(f"/queue/{job_id}/events", headers={"Last-Event-ID": "end"})
    assert (after.status_code, after.content) == (204, b"")


def test_the_events_of_an_unknown_job_are_refused(stub_server: Program) -> None:
    answer = stub_server.get("/queue/nobody/events")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "Job nobody not found"


def test_listeners_hold_no_thread_and_may_hang_up(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path) as server:
        job_id = server.submit(prompt="stub:seconds=1", model="small", steps=150)
        eventually(lambda: server.status(job_id)["state"] == "processing", "the job")
        process = psutil.Process(server.process.pid)
        idle = len(process.net_connections())
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=server.url, timeout=120, limits=limits) as client:
            streams = [client.build_request("GET", f"/queue/{job_id}/events") for _ in range(60)]
            answers = [client.send(stream, stream=True) for stream in streams]
            streamed = [told(answer.iter_lines()) for answer in answers]
            for each in streamed:
                assert next(each)[1]["state"] == "processing"
            assert process.num_threads() < 60  # the pool for blocking calls has 40
            for answer in answers[1:]:
                answer.close()
            eventually(lambda: len(process.net_connections()) <= idle + 2, "those who hung up to be forgotten")
            server.request("DELETE", f"/queue/{job_id}")
            assert list(streamed[0])[-1][1]["cancelled"]
        assert server.get("/hello").json() == {"ok": True}
        assert "Traceback" not in server.log


def test_a_stream_ends_when_the_service_does(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path, grace=0) as server:
        job_id = server.submit(prompt="stub:seconds=1", model="small", steps=150)
        with httpx.stream("GET", f"{server.url}/queue/{job_id}/events", timeout=120) as answer:
            lines = answer.iter_lines()
            assert next(told(lines))[0] == "state"
            server.signal(15)
            assert all(data["state"] not in ("done", "error") for name, data, _ in told(lines) if name == "state")
        assert server.ended() == 0


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[FileQueue]:
    """A queue on disk, which nobody serves."""
    queue = FileQueue(tmp_path / "queue")
    yield queue
    queue.close()


def test_who_hears_nothing_new_is_pinged(queue: FileQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING", 0.05)
    job = Job(request=plain())
    queue.enqueue(job)
    waiters = Waiters(queue)

    async def main() -> list[str]:
        stream = events._stream(job.id, Listened(waiters))  # type: ignore[arg-type] # all of the service that it asks
        first = [await anext(stream) for _ in range(3)]
        queue.cancel(job.id)
        return first + [text async for text in stream if text != events.PINGED]

    state, *pings, end = asyncio.run(main())
    assert "event: state" in state
    assert pings == [events.PINGED] * 2
    assert end.startswith("id: end\nevent: state\n")


class Listened:
    """A service that knows how jobs stand, and nothing else."""

    def __init__(self, waiters: Waiters) -> None:
        self.changes = waiters.changes

    def seconds_left(self, snapshot: object) -> None:
        """Not known."""

    def webhook(self, job: object) -> None:
        """None."""

    def links(self, job: object) -> list[str]:
        """None."""
        return []
