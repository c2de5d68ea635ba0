"""The clients, the one that blocks and the one that awaits, against a real service."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import diffusers_folder
from PIL import Image
from serving import ROOT, Program, serving

from diffusion_api import client
from diffusion_api.client import (
    AsyncClient,
    BadRequest,
    Busy,
    Client,
    Event,
    JobCancelled,
    JobFailed,
    NotAllowed,
    NotThere,
    Status,
    Unavailable,
    WrongState,
)
from diffusion_api.keys import Keyring
from diffusion_api.schema.caller import Role

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("clients")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home) as program:
        yield program


def blocking(url: str, name: str, *arguments: Any, **options: Any) -> Any:
    with Client(url, patience=1) as client:
        return getattr(client, name)(*arguments, **options)


def awaiting(url: str, name: str, *arguments: Any, **options: Any) -> Any:
    async def call() -> Any:
        async with AsyncClient(url, patience=1) as client:
            return await getattr(client, name)(*arguments, **options)

    return asyncio.run(call())


@pytest.fixture(params=[blocking, awaiting])
def call(request: pytest.FixtureRequest, server: Program) -> Call:
    """Calls a method of a client by its name."""
    return lambda name, *arguments, **options: request.param(server.url, name, *arguments, **options)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: [*inspect.signature(each).parameters] for name, each in found if not name.startswith("__")}

    assert methods(Client) == methods(AsyncClient)


def test_a_job_is_posted_watched_and_saved(call: Call, tmp_path: Path) -> None:
    job = call("txt2img", prompt="stub:seconds=0.05", steps=10, seed=5, fileType="png", stepz=1)
    assert job.seed == 5
    assert "unknown field 'stepz' was ignored" in job.warnings[0]
    seen: list[Status] = []
    status = call("result", job.job_id, seen.append, interval=0.05)
    assert len(seen) > 2
    assert [each["progress"] for each in seen] == sorted(each["progress"] for each in seen)
    assert status["state"] == "done"
    (path,) = call("save", job.job_id, tmp_path)
    assert path == tmp_path / f"{job.job_id}.png"
    assert path.read_bytes() == base64.b64decode(status["image"]) == call("picture", job.job_id)
    assert Image.open(path).size == (64, 64)


def told_at_once(url: str, job_id: str) -> list[Event]:
    with Client(url) as client:
        return list(client.events(job_id))


def told_awaited(url: str, job_id: str) -> list[Event]:
    async def listen() -> list[Event]:
        async with AsyncClient(url) as client:
            return [event async for event in client.events(job_id)]

    return asyncio.run(listen())


@pytest.mark.parametrize("listen", [told_at_once, told_awaited])
def test_a_job_tells_what_happens_to_it_until_its_end(
    server: Program, listen: Callable[[str, str], list[Event]]
) -> None:
    with Client(server.url) as client:
        job = client.txt2img(prompt="stub:seconds=0.05", steps=8, preview_every=2, model="small")
    events = listen(server.url, job.job_id)
    assert {event.name for event in events} == {"state", "progress", "preview"}
    assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].data["state"] == "done"
    shown = next(event.data["preview"] for event in events if event.name == "preview")
    assert Image.open(io.BytesIO(base64.b64decode(shown))).format == "JPEG"
    with pytest.raises(NotThere):
        listen(server.url, "nobody")
    with pytest.raises(Unavailable):
        listen("http://127.0.0.1:9", job.job_id)


@pytest.mark.parametrize("listen", [told_at_once, told_awaited])
def test_events_that_break_off_are_an_error(tmp_path: Path, listen: Callable[[str, str], list[Event]]) -> None:
    with serving(tmp_path / "home") as program:
        diffusers_folder(tmp_path / "home" / "stable_diffusion" / "models" / "small", sample_size=8)
        job_id = program.submit(prompt="stub:seconds=0.2", steps=100, model="small")
        threading.Timer(1, program.kill).start()
        with pytest.raises(Unavailable):
            listen(program.url, job_id)


def test_a_picture_is_read_and_made_again(call: Call) -> None:
    job = call("txt2img", prompt="a lighthouse", steps=4, seed=42, fileType="png", model="small")
    call("result", job.job_id)
    info = call("img_info", call("picture", job.job_id))
    assert info["parameters"]["Seed"] == 42
    again = call("reproduce", job.job_id, key=f"again-{job.job_id}")
    assert call("reproduce", job.job_id, key=f"again-{job.job_id}") == again
    assert call("result", again.job_id)["reproduces"] == {"job_id": job.job_id, "matched": True, "differences": []}


def test_an_admin_pauses_resumes_and_loads(call: Call) -> None:
    call("pause")
    with pytest.raises(Busy, match="paused"):
        call("ready")
    call("resume")
    assert call("ready")["ready"] is True
    assert call("load", "SMALL") == "small"


def test_several_pictures_are_saved_by_number(call: Call, tmp_path: Path) -> None:
    job = call("txt2img", prompt="two", steps=1, n=2)
    assert "image" not in call("result", job.job_id, pictures=False)
    assert [path.name for path in call("save", job.job_id, tmp_path)] == [f"{job.job_id}-{n}.jpg" for n in (0, 1)]
    named = call("save", job.job_id, tmp_path / "mine.jpg")
    assert [path.name for path in named] == ["mine-0.jpg", "mine-1.jpg"]
    assert named[1].read_bytes() == call("picture", job.job_id, 1)


def test_what_is_installed_is_listed(call: Call) -> None:
    assert "MeinaMix V11" in [row["label"] for row in call("aliases")]
    assert call("hello") == {"ok": True}
    assert "small" in [row["name"] for row in call("models")]
    assert call("upscalers")[0]["name"] == "Latent"
    assert call("loras") == []
    assert "Euler a" in call("sampling_methods")["sampling_methods"]
    assert call("capabilities", "small")["model"]["name"] == "small"
    assert call("capabilities")["model"]["name"] == call("models")[0]["name"]
    assert call("health")["queue"]["paused"] is False


def test_jobs_are_listed_over_several_pages(server: Program, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_api.client.flows.PAGE", 2)
    posted = [call("txt2img", prompt=f"number {n}", steps=1).job_id for n in range(5)]
    for job_id in posted:
        call("wait", job_id)
    assert [row["job_id"] for row in call("jobs", limit=5)] == posted[::-1]
    assert [row["job_id"] for row in call("jobs", "done", limit=3)] == posted[:1:-1]
    assert call("jobs", "queued", "processing") == []


def test_a_job_that_is_cancelled_or_fails_is_an_error_of_its_own(call: Call) -> None:
    job = call("txt2img", prompt="stub:seconds=0.2", steps=100)
    assert call("cancel", job.job_id)["cancelled"] is True
    with pytest.raises(JobCancelled, match="ended without a picture: cancelled"):
        call("result", job.job_id)
    with pytest.raises(NotThere, match="no picture"):
        call("save", job.job_id)
    failing = call("txt2img", prompt="stub:oom")
    with pytest.raises(JobFailed, match="out of memory") as caught:
        call("result", failing.job_id)
    assert not isinstance(caught.value, JobCancelled)
    assert call("wait", failing.job_id)["state"] == "error"


def test_each_refusal_is_an_error_of_its_own(call: Call) -> None:
    with pytest.raises(BadRequest, match=r"steps is 0: .* \(HTTP 400\)"):
        call("txt2img", steps=0)
    with pytest.raises(NotThere, match="Job nobody not found"):
        call("job", "nobody")
    job = call("txt2img", prompt="a circle", steps=1)
    call("wait", job.job_id)
    with pytest.raises(WrongState, match="its state is done"):
        call("cancel", job.job_id)


def test_the_same_key_is_the_same_job(call: Call) -> None:
    one, other = (call("submit", "txt2img", {"prompt": "once", "steps": 1}, key=f"{id(call)}") for _ in range(2))
    assert one == other
    with pytest.raises(BadRequest, match="was sent before with another body"):
        call("submit", "txt2img", {"prompt": "twice"}, key=f"{id(call)}")


@pytest.mark.parametrize("way", [blocking, awaiting])
def test_a_full_queue_is_waited_for(tmp_path: Path, way: Call) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path, max_queue=1) as server:
        server.request("POST", "/queue/pause")
        server.submit(prompt="a circle", steps=1)
        with pytest.raises(Busy, match="at most 1 may") as caught:
            way(server.url, "txt2img", prompt="a square")
        assert caught.value.retry_after == 10


def test_a_service_with_keys_wants_one(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    key = Keyring(tmp_path / "access").add("ann", Role.USER)
    with serving(tmp_path, secret_key="s" * 64) as server:
        with Client(server.url) as client, pytest.raises(NotAllowed, match="Missing API key"):
            client.models()
        with Client(server.url, key=key) as client:
            assert client.models()[0]["name"] == "small"


def test_many_jobs_are_awaited_at_a_time(server: Program) -> None:
    async def draw() -> list[Status]:
        async with AsyncClient(server.url) as client:
            jobs = [await client.txt2img(prompt=f"number {n}", steps=1, seed=n) for n in range(4)]
            return await asyncio.gather(*(client.result(job.job_id) for job in jobs))

    assert [status["seed"] for status in asyncio.run(draw())] == [0, 1, 2, 3]


def test_the_programs_of_the_page_run(server: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(programs) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in programs:
        exec(program.replace("http://127.0.0.1:8000", server.url), names)
    assert Image.open(names["path"]).size == (64, 64)
    assert base64.b64decode(names["status"]["image"])
    assert [status["state"] for status in names["statuses"]] == ["done", "done"]


def test_the_page_names_every_method_and_error() -> None:
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    methods = [name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]
    errors = [name for name in client.__all__ if isinstance(getattr(client, name), type)]
    wanted = {*methods, *errors} - {"close", "Status", "Submitted", "Row"}
    assert [name for name in wanted if not re.search(rf"`{name}[`(]", page)] == []


def test_nobody_who_answers_is_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        awaiting("http://127.0.0.1:9", "hello")


def test_pictures_are_sent_as_base64(tmp_path: Path) -> None:
    """Whatever a route does with them: here it is none at all."""
    import http.server
    import json

    bodies: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
            answer = json.dumps({"job_id": "abc", "status": "queued", "seed": None}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    (tmp_path / "in.png").write_bytes(stream.getvalue())
    encoded = base64.b64encode(stream.getvalue()).decode()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as fake:
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        with Client(f"http://127.0.0.1:{fake.server_port}") as client:
            client.img2img(prompt="a circle", image=tmp_path / "in.png")
            client.inpaint(prompt="a circle", image=stream.getvalue(), mask=encoded)
            assert client.upscale(image=tmp_path / "in.png", resize_by=2).seed is None
        fake.shutdown()
    assert [(body["path"], body["image"]) for body in bodies] == [
        (f"/{kind}", encoded) for kind in ("img2img", "inpaint", "upscale")
    ]
    assert bodies[1]["mask"] == encoded
