"""What a caller is told of memory: estimates at the door, and what was done at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import plain
from serving import Program

from diffusion_api.app import create_app
from diffusion_api.catalog.library import Library
from diffusion_api.dialects import native
from diffusion_api.engine.base import Event, Finished, StopAsked
from diffusion_api.engine.stub import StubEngine
from diffusion_api.outputs import Outputs
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.caller import Caller, Role
from diffusion_api.schema.job import Job, State, dumps, loads
from diffusion_api.schema.report import DeviceReport, Room
from diffusion_api.schema.request import Request
from diffusion_api.server import build_access
from diffusion_api.service import Service
from diffusion_api.settings import DATA, Settings
from diffusion_api.worker import Worker

ADMIN = Caller(id="127.0.0.1", role=Role.ADMIN)


class Card(StubEngine):
    """Says that it has a card of 32 MiB beside 64 MiB of RAM."""

    def report(self) -> DeviceReport:
        return DeviceReport("card", "cuda", room=Room(32 * 2**20, 64 * 2**20, 2))


def ask(tmp_path: Path, **body: Any) -> tuple[httpx.Response, int]:
    """The answer of a service with that card and the shipped model, and how many jobs it then has."""
    settings = Settings(home=tmp_path)
    settings.create_folders()
    queue = MemoryQueue()
    library = Library(tmp_path, settings.models_dir, DATA / "models")
    service = Service(settings, library, queue, Outputs(settings.outputs_dir), Card())
    app = create_app(service, settings, build_access(settings))

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post("/txt2img", json={"prompt": "a red circle", "model": "shapes"} | body)

    answer = asyncio.run(post())
    waiting = queue.counts()[State.QUEUED]
    queue.close()
    return answer, waiting


def test_a_dry_run_says_what_the_job_would_be_and_stores_nothing(tmp_path: Path) -> None:
    answer, waiting = ask(tmp_path, dry_run=True, width=512, height=256, n=2, steps=10, sampler_name="Heun", seed=7)
    assert (answer.status_code, waiting) == (200, 0)
    told = answer.json()
    assert (told["dry_run"], told["model"], told["family"], told["seed"]) == (True, "shapes", "sd1", 7)
    assert [(p["width"], p["height"], p["steps"], p["evaluations"]) for p in told["passes"]] == [(512, 256, 10, 19)] * 2
    assert (told["evaluations"], told["seconds"]) == (38, None)
    memory = told["memory"]
    assert set(memory["weights"]) == {"text_encoder", "unet", "vae"}
    assert memory["peak"] < memory["budget"] == 32 * 2**20
    assert memory["measures"] == ["model offload"]
    assert "job_id" not in told


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_can_never_fit_is_refused_at_once_with_what_would(tmp_path: Path, dry_run: bool) -> None:
    answer, waiting = ask(tmp_path, dry_run=dry_run, width=2048, height=2048)
    assert (answer.status_code, waiting) == (422, 0)
    assert "2048x2048 pixels with model 'shapes' need" in answer.json()["error"]
    width, height = answer.json()["error"].split(": ")[-1].removesuffix(" would fit").split("x")
    taken, waiting = ask(tmp_path, width=width, height=height)
    assert (taken.status_code, waiting) == (200, 1)


def test_where_no_device_is_known_a_dry_run_still_counts(stub_server: Program) -> None:
    told = stub_server.request("POST", "/txt2img", json={"model": "small", "dry_run": True}).json()
    assert told["evaluations"] == 30
    assert told["memory"]["budget"] is None


class Frugal(StubEngine):
    """Says that it had to spare memory."""

    def run(self, request: Request, *, stop: StopAsked) -> Iterator[Event]:
        for event in super().run(request, stop=stop):
            yield replace(event, memory_steps=("decode: VAE tiling",)) if isinstance(event, Finished) else event


def test_what_was_done_for_memory_is_in_the_record_and_the_reply(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.create_folders()
    queue, outputs = MemoryQueue(), Outputs(settings.outputs_dir)
    service = Service(settings, Library(tmp_path, settings.models_dir), queue, outputs, None)
    worker = Worker(queue, Frugal(), outputs)
    worker.start()
    job = service.submit(Job(request=plain()))
    ended = list(service.watch(job.id, 30, ADMIN))[-1].job
    worker.stop(5)
    queue.close()
    assert ended.result
    assert ended.result.memory_steps == ("decode: VAE tiling",)
    assert native.ended(loads(dumps(ended)))["memory_steps"] == ["decode: VAE tiling"]
