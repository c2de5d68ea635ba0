"""Pictures at URLs: which hosts are asked, what they may answer, and that nothing else is connected to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fake_models import diffusers_folder
from PIL import Image
from receiving import endless_body, endless_head, free_port, hang_up, misbehaving, receiving, silence
from serving import Program, run, serving

from diffusion_api.blobs import name_of
from diffusion_api.errors import InvalidImage, TooLarge, Unreachable, UrlRefused
from diffusion_api.fetch import REDIRECTS, Fetcher, origins
from diffusion_api.remote_pictures import RemotePictures, is_url

PATIENT = 60.0
"""Seconds; for what shall not run out of time."""

HOSTILE = (
    *("http://127.0.0.1/", "http://0.0.0.0/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://2130706433/"),
    *("http://0177.1/", "http://0x7f.1/", "http://127.1/", "http://0/", "http://169.254.169.254/latest/meta-data/"),
    *("http://[fd00::1]/", "http://[fd00:ec2::254]/", "http://100.64.0.1/", "http://10.0.0.1/", "http://192.168.1.1/"),
    *("http://[fe80::1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://224.0.0.1/"),
    *("http://localhost/", "http://localhost./", "http://localhost:8000/", "http://metadata.google.internal/"),
    *("file:///etc/passwd", "file://pictures.example/etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL"),
    *("ftp://pictures.example/a.png", "dict://127.0.0.1:11211/", "data://pictures.example/", "unix://run/docker.sock"),
    *("http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "http://①②⑦.0.0.1/", "http://127。0。0。1/", "https://pictures.ex\u0430mple/a.png"),
    *("https://pictures.example@127.0.0.1/", "https://user:password@pictures.example/", "https://pictures.example:22/"),
    *("https://pictures.example.evil.example/", "https://evil.example/?https://pictures.example/", "https:///a.png"),
    *("https://pictures.example\\@127.0.0.1/", "http://127.0.0.1#@pictures.example/", "https://pictures.example./"),
    *("HTTP://127.0.0.1/", "  http://127.0.0.1/", "https://127.0.0.1.nip.io/", "https://pictures.example%00.evil/"),
)
INSIDE = (
    *("127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fd00::1", "100.64.0.1", "10.0.0.1"),
    *("192.168.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "fe80::1", "224.0.0.1"),
)
connected: list[str] = []
"""Hosts to which this process has tried to connect, as the interpreter itself reports them."""


def _report(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        connected.append(str(arguments[1][0]))


sys.addaudithook(_report)


def nobody(host: str, port: int) -> Sequence[str]:
    raise AssertionError(f"{host} was looked up")


def fetch(
    url: str, hosts: str = "pictures.example", *, max_bytes: int = 10_000, seconds: float = PATIENT, **options: object
) -> bytes:
    fetcher = Fetcher(origins(hosts), setting="DIFFUSION_API_PICTURE_HOSTS", **options)  # type: ignore[arg-type]
    return asyncio.run(RemotePictures(fetcher, max_bytes=max_bytes, seconds=seconds).fetch(url, "image"))


def png(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()


# Where a URL may lead


@pytest.mark.parametrize("url", HOSTILE, ids=ascii)
def test_a_url_that_leads_elsewhere_is_refused_and_nothing_is_connected_to(url: str) -> None:
    connected.clear()
    with pytest.raises(UrlRefused, match=r"^image ") as caught:
        fetch(url, resolve=nobody)
    assert caught.value.field == "image"
    assert "user:password" not in str(caught.value)
    assert connected == []


@pytest.mark.parametrize("url", HOSTILE, ids=ascii)
def test_a_redirect_that_leads_elsewhere_is_refused_too(url: str) -> None:
    with receiving(302, location=url.encode("unicode_escape").decode().strip()) as host:
        connected.clear()
        with pytest.raises(UrlRefused, match=r"^image "):
            fetch(host.url, f"pictures.example,http://{host.host}", resolve=nobody)
        assert connected == ["127.0.0.1"]  # the host itself
        assert len(host.heard) == 1


@pytest.mark.parametrize("address", INSIDE)
def test_a_name_that_leads_inside_is_not_called(address: str) -> None:
    connected.clear()
    with pytest.raises(Unreachable) as caught:
        fetch("https://pictures.example/a.png", resolve=lambda host, port: [address])
    assert "no address that may be called" in str(caught.value)
    assert address not in str(caught.value)
    assert connected == []


def test_a_name_that_changes_its_address_is_called_at_the_one_that_was_checked() -> None:
    answers = [["3ffe::1"], ["127.0.0.1"]]  # of a network that was shut down in 2006
    connected.clear()
    for _ in range(2):
        with pytest.raises(Unreachable):
            fetch("https://pictures.example/a.png", resolve=lambda host, port: answers.pop(0), connect=0.2)
    assert answers == []
    assert connected == ["3ffe::1"]


def test_a_redirect_within_the_list_is_followed_a_few_times() -> None:
    with receiving(302) as host:
        host.location = host.url
        with pytest.raises(InvalidImage, match="answers 204"):
            fetch(host.url, f"http://{host.host}")
        host.answers = [302] * 10
        with pytest.raises(UrlRefused, match="on and on"):
            fetch(host.url, f"http://{host.host}")
    assert len(host.heard) == 2 + REDIRECTS + 1


def test_a_refusal_names_the_choices_and_the_setting() -> None:
    with pytest.raises(UrlRefused) as caught:
        fetch("https://evil.example/a.png?token=secret")
    assert str(caught.value) == (
        "image leads to https://evil.example:443; allowed: https://pictures.example:443; "
        "the operator can allow more: DIFFUSION_API_PICTURE_HOSTS"
    )


@pytest.mark.parametrize(
    "text", ["iVBORw0KGgo=", "data:image/png;base64,iVBORw0KGgo=", "http", "//host/a", "", "a b://c"]
)
def test_a_picture_itself_is_no_url(text: str) -> None:
    assert not is_url(text)


# What a host may answer


@contextlib.contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of a picture that is answered so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/a.png"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def with_body(
    body: bytes, *, length: int | None = None, status: int = 200, **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def from_host(url: str, **options: object) -> bytes:
    return fetch(url, url.removesuffix("/a.png"), **options)  # type: ignore[arg-type]


def test_the_bytes_arrive_as_they_are() -> None:
    with answering(with_body(bytes(range(256)), Content_Encoding="gzip")) as url:
        assert from_host(url) == bytes(range(256))


def test_the_host_is_asked_for_a_picture_and_told_no_more_than_who_asks() -> None:
    with receiving(200) as host:
        fetch(f"{host.url}?a=b%20c", f"http://{host.host}")
    (heard,) = host.heard
    assert (heard.method, heard.path) == ("GET", "/hook?a=b%20c")
    assert heard.headers["accept"] == "image/*"
    assert heard.headers["user-agent"].startswith("DiffusionAPI/")
    assert set(heard.headers) == {"host", "accept", "accept-encoding", "user-agent", "connection"}


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 418, 500])
def test_another_status_is_told(status: int) -> None:
    with answering(with_body(b"", status=status)) as url, pytest.raises(InvalidImage, match=f"answers {status}$"):
        from_host(url)


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    with answering(with_body(b"", length=10_001)) as url, pytest.raises(TooLarge, match="more than the 10000 bytes"):
        from_host(url)


def test_a_body_without_end_is_given_up_at_the_limit() -> None:
    with misbehaving(endless_body) as host, pytest.raises(TooLarge, match="more than the 10000 bytes"):
        fetch(host.url, f"http://{host.host}")


def test_a_body_shorter_than_it_says_is_told() -> None:
    with answering(with_body(b"x" * 10, length=100)) as url, pytest.raises(Unreachable):
        from_host(url)


def drip(connection: object, over: threading.Event) -> None:
    """A byte now and then: no pause is long enough to end it."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")  # type: ignore[attr-defined]
    while not over.wait(0.05):
        connection.sendall(b"x")  # type: ignore[attr-defined]


@pytest.mark.parametrize("behave", [silence, endless_head, drip], ids=lambda f: f.__name__)
def test_a_host_that_takes_its_time_is_given_up(behave: Callable[..., None]) -> None:
    began = time.monotonic()
    with misbehaving(behave) as host, pytest.raises(Unreachable, match=r"^image: "):
        fetch(host.url, f"http://{host.host}", seconds=0.5)
    assert time.monotonic() - began < PATIENT


def test_a_host_that_hangs_up_or_is_not_there_is_told() -> None:
    with (
        misbehaving(hang_up) as host,
        pytest.raises(Unreachable, match=r"^image: the picture's host does not answer: "),
    ):
        fetch(host.url, f"http://{host.host}")
    port = free_port()
    with pytest.raises(Unreachable, match="connection refused"):
        fetch(f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}")


# The service


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """The URL of a host with pictures and other things."""
    answers = {
        "/a.png": with_body(png(96, 64), Content_Type="text/plain"),
        "/mask.png": with_body(png(96, 64)),
        "/page.png": with_body(b"<!DOCTYPE html><p>not found", Content_Type="image/png"),
        "/cut.png": with_body(png()[:100]),
        "/inside": with_body(b"", status=302, Location="http://127.0.0.1:1/a.png"),
        "/moved": with_body(b"", status=301, Location="/a.png"),
    }
    with answering(lambda handler: answers[handler.path.partition("?")[0]](handler)) as url:
        yield url.removesuffix("/a.png")


@pytest.fixture(scope="module")
def server(host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("remote")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home, picture_hosts=host) as program:
        yield program


def ask(server: Program, path: str, **fields: object) -> httpx.Response:
    return server.request("POST", path, json={"prompt": "a lighthouse", "steps": 2, "seed": 7} | fields)


def test_a_job_begins_with_the_picture_at_a_url(server: Program, host: str) -> None:
    answer = ask(server, "/img2img", image=f"{host}/moved?token=secret")
    assert answer.status_code == 200, answer.text
    status = server.wait(answer.json()["job_id"])
    assert (status["width"], status["height"]) == (96, 64)
    assert status["payload"]["image"] == f"{host}/moved?token=***"
    assert (server.home / "queue" / "inputs" / name_of(png(96, 64))).exists()
    assert "secret" not in server.log


def test_it_draws_what_the_picture_itself_draws(server: Program, host: str) -> None:
    held = ask(server, "/img2img", image=base64.b64encode(png(96, 64)).decode())
    named = ask(server, "/img2img", image=f"{host}/a.png")
    pictures = [server.wait(answer.json()["job_id"])["image"] for answer in (held, named)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(("path", "fields"), [("/inpaint", {"mask": "mask.png"}), ("/upscale", {})])
def test_masks_and_upscaling_take_urls_too(server: Program, host: str, path: str, fields: dict[str, str]) -> None:
    urls = {name: f"{host}/{file}" for name, file in ({"init_image": "a.png"} | fields).items()}
    answer = ask(server, path, **urls)
    assert answer.status_code == 200, answer.text
    server.wait(answer.json()["job_id"])


@pytest.mark.parametrize(
    ("path", "says"),
    [("page.png", "image: "), ("cut.png", "image: "), ("inside", "image leads to http://127.0.0.1:1; allowed: ")],
)
def test_what_is_no_picture_is_refused_and_not_stored(server: Program, host: str, path: str, says: str) -> None:
    before = set((server.home / "queue" / "inputs").iterdir())
    answer = ask(server, "/img2img", image=f"{host}/{path}")
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(says)
    assert set((server.home / "queue" / "inputs").iterdir()) == before


def test_a_dry_run_looks_at_it_too(server: Program, host: str) -> None:
    answer = ask(server, "/img2img", image=f"{host}/a.png", dry_run=True)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ["/img2img", "/inpaint", "/upscale"])
def test_without_the_operators_list_no_url_is_fetched(stub_server: Program, host: str, path: str) -> None:
    answer = ask(stub_server, path, image=f"{host}/a.png", mask=f"{host}/mask.png")
    assert answer.status_code == 400
    assert "setting picture_hosts" in answer.json()["detail"]


def test_a_wrong_list_is_told_at_the_start(tmp_path: Path) -> None:
    done = run("serve", "--port", 0, "--home", tmp_path, cwd=tmp_path, picture_hosts="169.254.169.254")
    assert done.returncode != 0
    assert "link-local addresses are never called" in done.stderr
