"""The configuration API with the shipped model, in a process of its own: what its pictures show, and when memory comes back."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from PIL import Image
from semantics import asked, seen
from serving import Program, eventually, serving

PROMPT = "a large red circle on a blue background"
IDLE = 3.0
EMPTY = {"is_loaded": False, "loaded_at": None, "last_accessed": None, "timeout_seconds": -1, "timer_active": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("configured")
    real = {"engine": "diffusers", "device": "cpu", "shipped_models": True}
    with serving(home, "--isolated", idle_unload=IDLE / 60, **real) as program:
        yield program


def made(server: Program, files: Any = None, **params: Any) -> Image.Image:
    fixed = {"model_id": "shapes", "width": 64, "height": 64, "seed": 3, "negative_prompt": ""}
    answer = server.request("POST", "/post_config", params={"prompt": PROMPT} | fixed | params, files=files)
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def status(server: Program) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/buffer_status").json()
    return found


# This one comes first, so that nothing is in memory yet.


def test_a_model_is_in_memory_from_its_first_picture_until_nobody_has_asked_for_long(server: Program) -> None:
    worker = server.worker()
    assert status(server) == EMPTY
    made(server, num_inference_steps=1)
    loaded = worker.memory_info().rss
    first = status(server)
    assert (first["is_loaded"], first["timeout_seconds"], first["timer_active"]) == (True, IDLE, True)
    (held,) = server.get("/health").json()["workers"][0]["models_in_memory"]
    used, loaded_at = (datetime.fromisoformat(first[name]) for name in ("last_accessed", "loaded_at"))
    assert loaded_at <= used
    eventually(lambda: not status(server)["is_loaded"], "the model to leave")
    assert time.time() - used.timestamp() >= IDLE
    assert status(server) == EMPTY == server.get("/buffer_status/").json()
    fallen = (loaded - worker.memory_info().rss) / 2**20
    assert fallen > held["mb"] / 2, f"{fallen:.1f} MiB came back of {held}"
    assert server.get("/health").json()["workers"][0]["models_in_memory"] == []
    made(server, num_inference_steps=1)
    assert datetime.fromisoformat(status(server)["loaded_at"]) > used, "it was read again"


def test_each_use_puts_off_the_end(server: Program) -> None:
    made(server, num_inference_steps=1)
    before = status(server)
    made(server, num_inference_steps=1)
    after = status(server)
    assert after["last_accessed"] > before["last_accessed"]


def test_pictures_show_what_the_prompts_say(server: Program) -> None:
    sheet = made(server, count_returned=2)
    for left in (0, 64):
        cell = sheet.crop((left, 0, left + 64, 64))
        assert seen(np.asarray(cell.convert("RGB"))) == asked(PROMPT)


def test_a_picture_becomes_what_the_prompt_says(server: Program) -> None:
    file = io.BytesIO()
    made(server).save(file, "PNG")
    other = "a large yellow square on a blue background"
    drawn = made(server, {"image": ("i.png", file.getvalue(), "multipart/form-data")}, prompt=other)
    assert seen(np.asarray(drawn.convert("RGB"))).colour == "yellow"


def test_words_in_a_prompt_may_have_weights(server: Program) -> None:
    plain = made(server, num_inference_steps=2)
    assert made(server, num_inference_steps=2, prompt=PROMPT.replace("red", "(red:1.0)")).tobytes() == plain.tobytes()
    assert made(server, num_inference_steps=2, prompt=PROMPT.replace("red", "(red:1.4)")).tobytes() != plain.tobytes()


def test_words_beyond_the_77th_token_count(server: Program) -> None:
    long = ", ".join(["a picture"] * 40)
    tokens = server.get("/get_model_embedding", params={"prompt": long}).json()
    assert len(tokens) > 77
    one, other = (made(server, num_inference_steps=2, prompt=f"{long}, {end}") for end in ("red circle", "green star"))
    assert one.tobytes() != other.tobytes()
