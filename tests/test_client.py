"""The client and the demo, against small real HTTP servers that answer like the service."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from serving import serving

from diffusion_api.client import ApiError, Client, Status
from diffusion_api.demo import run_demo
from diffusion_api.errors import Unavailable

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]
Routes = dict[str, Callable[[Any], Answer]]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts servers that answer ``"METHOD /path"`` with a status and a JSON value, or with bytes, and with headers.

    What is asked, each as ``METHOD /path?query``, and with which headers, is kept in the second argument.
    """
    servers: list[ThreadingHTTPServer] = []

    def start(routes: Routes, asked: list[tuple[str, Message]] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if asked is not None:
                    asked.append((f"{self.command} {self.path}", self.headers))
                route = routes[f"{self.command} {self.path.partition('?')[0]}"]
                status, value, *headers = route(json.loads(body) if body else None)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, text in headers[0].items() if headers else ():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_txt2img_posts_the_fields_and_returns_id_and_seed(serve: Callable[..., str]) -> None:
    seen: list[Any] = []

    def submit(body: Any) -> Answer:
        seen.append(body)
        return 200, {"job_id": "abc", "status": "queued", "seed": 4294967295}

    with Client(serve({"POST /txt2img": submit})) as client:
        job = client.txt2img(prompt="a circle", steps=4, fileType="png")
    assert (job.job_id, job.status, job.seed) == ("abc", "queued", 4294967295)
    assert seen == [{"prompt": "a circle", "steps": 4, "fileType": "png"}]


def test_wait_reports_every_status_and_returns_the_last(serve: Callable[..., str]) -> None:
    picture = base64.b64encode(b"the file").decode()
    answers = iter(
        [
            {"state": "queued", "progress": 0},
            {"state": "loading", "progress": 0},
            {"state": "processing", "progress": 50},
            {"state": "done", "progress": 100, "image": picture},
        ]
    )
    seen: list[Status] = []
    with Client(serve({"GET /queue/abc": lambda _: (200, next(answers))})) as client:
        status = client.wait("abc", seen.append, interval=0.01)
    assert [s["state"] for s in seen] == ["queued", "loading", "processing", "done"]
    assert base64.b64decode(status["image"]) == b"the file"


@pytest.mark.parametrize("state", ["error", "cancelled"])
def test_wait_returns_a_job_that_ended_without_a_picture(serve: Callable[..., str], state: str) -> None:
    url = serve({"GET /queue/abc": lambda _: (200, {"state": state, "progress": 0, "error": "no memory"})})
    with Client(url) as client:
        assert client.wait("abc")["error"] == "no memory"


def test_wait_gives_up_after_its_timeout(serve: Callable[..., str]) -> None:
    url = serve({"GET /queue/abc": lambda _: (200, {"state": "queued", "progress": 0})})
    with Client(url) as client, pytest.raises(TimeoutError, match=r"abc is queued after 0\.1 seconds"):
        client.wait("abc", interval=0.02, timeout=0.1)


def test_wait_lets_the_service_do_the_waiting(serve: Callable[..., str]) -> None:
    answers = iter([{"state": "queued"}, {"state": "processing"}, {"state": "done"}])
    asked: list[tuple[str, Message]] = []
    with Client(serve({"GET /queue/abc": lambda _: (200, next(answers))}, asked)) as client:
        assert client.wait("abc", interval=0)["state"] == "done"
    assert [request for request, _ in asked] == ["GET /queue/abc", *["GET /queue/abc?wait=30"] * 2]


def test_wait_never_asks_for_longer_than_is_left(serve: Callable[..., str]) -> None:
    asked: list[tuple[str, Message]] = []
    url = serve({"GET /queue/abc": lambda _: (200, {"state": "queued"})}, asked)
    with Client(url) as client, pytest.raises(TimeoutError):
        client.wait("abc", interval=0.01, timeout=0.2)
    waits = [float(request.partition("wait=")[2]) for request, _ in asked[1:]]
    assert waits
    assert all(0 < wait <= 0.2 for wait in waits)


def test_wait_asks_a_service_that_cannot_wait_no_more_often_than_its_interval(serve: Callable[..., str]) -> None:
    asked: list[tuple[str, Message]] = []
    url = serve({"GET /queue/abc": lambda _: (200, {"state": "queued"})}, asked)
    with Client(url) as client, pytest.raises(TimeoutError):
        client.wait("abc", interval=0.2, timeout=1)
    assert len(asked) <= 8


@pytest.mark.parametrize("status", [429, 503, 507])
def test_a_job_is_posted_again_with_its_key_when_there_may_be_room(serve: Callable[..., str], status: int) -> None:
    full: Answer = (status, {"error": "no room"}, {"Retry-After": "0"})
    answers = iter([full, full, (200, {"job_id": "abc", "status": "queued", "seed": 1})])
    asked: list[tuple[str, Message]] = []
    with Client(serve({"POST /txt2img": lambda _: next(answers)}, asked)) as client:
        assert client.txt2img(prompt="a circle").job_id == "abc"
        keys = [headers["Idempotency-Key"] for _, headers in asked]
        assert len(keys) == 3
        assert len(set(keys)) == 1
        answers = iter([(200, {"job_id": "def", "status": "queued", "seed": 1})])
        client.txt2img(prompt="a circle")
    assert asked[-1][1]["Idempotency-Key"] != keys[0]


def test_a_poll_that_comes_too_often_is_sent_again_when_the_service_says(serve: Callable[..., str]) -> None:
    answers = iter([(429, {"error": "too many requests"}, {"Retry-After": "0"}), (200, {"state": "done"})])
    with Client(serve({"GET /queue/abc": lambda _: next(answers)})) as client:
        assert client.wait("abc")["state"] == "done"


def test_a_job_is_posted_once_when_the_service_would_have_it_wait_too_long(serve: Callable[..., str]) -> None:
    asked: list[tuple[str, Message]] = []
    url = serve({"POST /txt2img": lambda _: (503, {"error": "the queue is full"}, {"Retry-After": "10"})}, asked)
    began = time.monotonic()
    with Client(url, patience=1) as client, pytest.raises(ApiError, match="the queue is full") as caught:
        client.txt2img(prompt="a circle")
    assert time.monotonic() - began < 8
    assert (caught.value.status_code, caught.value.retry_after, len(asked)) == (503, 10, 1)


@pytest.mark.parametrize(
    "answer",
    [
        (503, {"error": "no"}, {}),
        (503, {"error": "no"}, {"Retry-After": "soon"}),
        (400, {"error": "no"}, {"Retry-After": "0"}),
        (500, {"error": "no"}, {"Retry-After": "0"}),
    ],
    ids=str,
)
def test_what_may_not_be_tried_again_is_not(serve: Callable[..., str], answer: Answer) -> None:
    asked: list[tuple[str, Message]] = []
    with Client(serve({"POST /txt2img": lambda _: answer}, asked)) as client, pytest.raises(ApiError):
        client.txt2img(prompt="a circle")
    assert len(asked) == 1


def test_a_job_is_cancelled(serve: Callable[..., str]) -> None:
    asked: list[tuple[str, Message]] = []
    url = serve({"DELETE /queue/abc": lambda _: (200, {"state": "error", "cancelled": True})}, asked)
    with Client(url) as client:
        assert client.cancel("abc")["cancelled"] is True
        client.cancel("abc", partial=True)
    assert [request for request, _ in asked] == ["DELETE /queue/abc", "DELETE /queue/abc?partial=true"]


def test_a_job_that_has_ended_is_not_cancelled(serve: Callable[..., str]) -> None:
    url = serve({"DELETE /queue/abc": lambda _: (409, {"error": "job abc has ended: it is done"})})
    with Client(url) as client, pytest.raises(ApiError, match=r"it is done \(HTTP 409\)"):
        client.cancel("abc")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((422, {"status": "error", "detail": "steps: too many", "error": "steps: 151"}), "steps: 151"),
        ((404, {"detail": "no job 'abc'"}), "no job 'abc'"),
        ((502, b"<html>Bad gateway"), "<html>Bad gateway"),
        ((503, b""), "Service Unavailable"),
    ],
)
def test_a_refusal_is_an_api_error_with_the_services_own_text(
    serve: Callable[..., str], answer: Answer, message: str
) -> None:
    with Client(serve({"GET /queue/abc": lambda _: answer})) as client, pytest.raises(ApiError) as caught:
        client.job("abc")
    assert (caught.value.status_code, caught.value.message) == (answer[0], message)


@pytest.mark.parametrize("body", [b"hello", b"[1]"])
def test_an_answer_that_is_no_object_is_an_api_error(serve: Callable[..., str], body: bytes) -> None:
    with Client(serve({"GET /hello": lambda _: (200, body)})) as client, pytest.raises(ApiError, match="GET /hello"):
        client.hello()


def test_a_service_that_is_not_there_is_unavailable() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        client.hello()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(serve({"GET /hello": lambda _: (200, {"ok": True})})) as client:
        assert client.hello() == {"ok": True}


SERVICE = """
import json, os, pathlib, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FAULT = {fault!r}
pathlib.Path("pid").write_text(str(os.getpid()))
print("the service says this", flush=True)
if FAULT == "dies":
    sys.exit(3)
if FAULT == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
polls = 0

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(dict(job_id="abc", status="queued", seed=1))

    def do_GET(self):
        global polls
        if self.path == "/hello":
            return self.reply(dict(ok=True))
        polls += 1
        if polls == 1 or FAULT == "hangs":
            return self.reply(dict(state="processing", progress=40, current_phase="step 2 of 5"))
        if FAULT == "fails":
            return self.reply(dict(state="error", progress=40, current_phase="error", error="out of memory"))
        text = PngInfo()
        if FAULT != "no infotext":
            text.add_text("parameters", "a [red] circle\\nSteps: 5, Seed: 1")
        os.makedirs("outputs", exist_ok=True)
        if FAULT != "no file":
            Image.new("RGB", (24, 16)).save("outputs/1.png", pnginfo=text)
        self.reply(dict(state="done", progress=100, current_phase="done", output_path="outputs/1.png",
                        generation_time_sec=1.5))

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def service(folder: Path, fault: str = "") -> tuple[str, str]:
    """A command that understands ``serve --host … --port …``, with a fault."""
    script = folder / "service.py"
    script.write_text(SERVICE.replace("{fault!r}", repr(fault)))
    return sys.executable, str(script)


def demo(folder: Path, fault: str = "", grace: float = 5) -> tuple[int, str]:
    """The demo's exit status and what it printed, after a check that its service is gone."""
    printed = io.StringIO()
    home = folder / "home"
    status = run_demo(
        "a [red] circle", home, Console(file=printed, width=60), command=service(folder, fault), grace=grace
    )
    assert not alive(int((home / "pid").read_text()))
    return status, printed.getvalue()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_demo_shows_the_picture_and_its_infotext(tmp_path: Path) -> None:
    status, printed = demo(tmp_path)
    assert status == 0
    assert f"{tmp_path / 'home' / 'outputs' / '1.png'} (24x16 pixels" in printed
    assert "a [red] circle\nSteps: 5, Seed: 1" in printed
    assert "100%" in printed
    assert "make serve" in printed
    assert "the service says this" not in printed


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("dies", "ended with status 3 before it answered"),
        ("fails", "out of memory"),
        ("no file", "No such file"),
        ("no infotext", "no infotext"),
    ],
)
def test_the_demo_fails_with_the_reason_and_the_services_log(tmp_path: Path, fault: str, reason: str) -> None:
    status, printed = demo(tmp_path, fault)
    assert status == 1
    assert reason in printed
    assert "the service says this" in printed


def test_the_demo_kills_a_service_that_does_not_stop(tmp_path: Path) -> None:
    assert demo(tmp_path, "deaf", grace=0.5)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_service(tmp_path: Path, number: signal.Signals) -> None:
    program = textwrap.dedent(f"""
        import signal, sys
        from pathlib import Path
        from rich.console import Console
        from diffusion_api.demo import run_demo
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
        sys.exit(run_demo("a circle", Path("home"), Console(), command={service(tmp_path, "hangs")!r}))
    """)
    root = Path(__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    while b"POST /txt2img" not in child.stdout.readline():
        assert child.poll() is None
    time.sleep(0.3)
    child.send_signal(number)
    assert child.wait(20) != 0
    child.stdout.close()
    assert not alive(int((tmp_path / "home" / "pid").read_text()))


def test_it_sends_the_key_that_it_is_given(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="ann") as server:
        with Client(server.url) as client, pytest.raises(ApiError, match="Missing API key") as refused:
            client.models()
        assert refused.value.status_code == 401
        with Client(server.url, key="ann") as client:
            assert client.models() == []
