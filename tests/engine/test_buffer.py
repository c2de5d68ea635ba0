"""``/buffer_status`` with the engine in the same process: it tells what is so, and waits for nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import Draw
from serving import PATIENCE

from diffusion_api.app import create_app
from diffusion_api.catalog.library import Library
from diffusion_api.engine.devices import Device
from diffusion_api.engine.executor import Budget, Executor
from diffusion_api.engine.weights import Weights
from diffusion_api.outputs import Outputs
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.server import build_access
from diffusion_api.service import Service
from diffusion_api.settings import Settings

Ask = Callable[[int], list[dict[str, Any]]]


@pytest.fixture
def ask(executor: Executor, models_dir: Path, tmp_path: Path) -> Iterator[Ask]:
    """``ask(n)``: what so many callers at a time are told of the shared engine."""
    settings = Settings(home=tmp_path)
    settings.create_folders()
    queue = MemoryQueue()
    service = Service(settings, Library(tmp_path, models_dir), queue, Outputs(settings.outputs_dir), executor)
    app = create_app(service, settings, build_access(settings))

    async def asked(callers: int) -> list[dict[str, Any]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            answers = await asyncio.gather(*(client.get("/buffer_status/") for _ in range(callers)))
        return [answer.json() for answer in answers]

    yield lambda callers: asyncio.run(asked(callers))
    queue.close()


def test_a_model_that_stays_for_ever_has_no_timer(executor: Executor, draw: Draw, ask: Ask) -> None:
    before = time.time()
    draw("a red circle", steps=1)
    (status,) = ask(1)
    assert (status["is_loaded"], status["timeout_seconds"], status["timer_active"]) == (True, -1, False)
    assert [held.used >= before for held in executor.held][-1]


def test_another_model_starts_the_time_anew(
    executor: Executor, draw: Draw, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_budget", Budget(idle=600))
    draw("a red circle", steps=1)
    (first,) = ask(1)
    draw("a red circle", steps=1, model="shapes-xl")
    (second,) = ask(1)
    assert (second["timeout_seconds"], second["timer_active"]) == (600, True)
    assert second["last_accessed"] > first["last_accessed"]
    assert {held.name for held in executor.held} >= {"shapes", "shapes-xl"}


def test_it_answers_while_the_device_does_not(
    executor: Executor, draw: Draw, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()

    def stuck(_: object) -> None:
        entered.set()
        assert go.wait(PATIENCE)

    for kind, name in ((Weights, "unload"), (Device, "report")):
        monkeypatch.setattr(kind, name, stuck)
    monkeypatch.setattr(executor, "_budget", Budget(idle=0.01))
    draw("a red circle", steps=1)
    assert entered.wait(PATIENCE)
    assert all(status["is_loaded"] for status in ask(60))
    go.set()
