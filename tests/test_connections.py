"""Clients that are slow, vanish or talk no HTTP: they cost little, for a while, and no other client notices."""

from __future__ import annotations

import json
import secrets
import select
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import raw
from fake_models import diffusers_folder
from serving import PATIENCE, Program, eventually, serving

BODY = json.dumps({"model": "small", "steps": 1}).encode()
WHOLE = raw.HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
PICTURE = 30 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service of little patience: two seconds for headers, two for a body and to read, unless that moves at 1 MB/s."""
    home = tmp_path_factory.mktemp("connections")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home, header_seconds=2, body_seconds=2, min_rate=10**6, log_level="debug") as program:
        yield program


@pytest.fixture(scope="module")
def large(server: Program) -> str:
    """A job whose answer is 40 MB: somebody put a large file in place of its picture."""
    status = server.result(model="small", steps=1)
    (server.home / status["output_path"]).write_bytes(secrets.token_bytes(PICTURE))
    return str(status["job_id"])


@contextmanager
def nothing_left(server: Program) -> Iterator[None]:
    """Afterwards the service has as many descriptors as before and no request in hand."""
    process = psutil.Process(server.process.pid)

    def in_hand() -> int:
        (line,) = (
            x
            for x in server.get("/metrics?format=prometheus").text.splitlines()
            if x.startswith("diffusion_api_http_requests_in")
        )
        return int(float(line.split()[1])) - 1  # the question itself

    eventually(lambda: in_hand() == 0, "earlier requests to end")
    before = process.num_fds()
    yield
    eventually(lambda: in_hand() == 0, "all requests to end")
    eventually(lambda: process.num_fds() <= before, "all descriptors to be closed")


def jobs(server: Program) -> int:
    """How many jobs were ever taken."""
    eventually(lambda: server.get("/health").json()["queue"]["active_jobs"] == 0, "all jobs to end")
    return sum(1 for _ in (server.home / "queue" / "done").glob("*.json"))


def drip(connection: socket.socket, data: bytes) -> None:
    """Send byte by byte until the other side has had enough."""
    with suppress(OSError):
        for byte in data:
            if select.select([connection], [], [], 0.1)[0]:
                return
            connection.send(bytes([byte]))


# slow clients


def test_headers_that_never_end_are_not_waited_for(server: Program) -> None:
    with nothing_left(server), raw.connected(server) as connection:
        drip(connection, raw.HEAD + b"X-Slow: " + b"x" * 10_000)
        status, headers, body = raw.answer(connection)
        assert (status, body["error"]) == (408, "the headers took too long")
        assert headers["connection"] == "close"
        assert headers["x-content-type-options"] == "nosniff"


def test_a_connection_on_which_nothing_is_said_is_closed(server: Program) -> None:
    with nothing_left(server), raw.connected(server) as connection:
        assert raw.answer(connection) == (0, {}, None)


def test_a_body_that_never_ends_is_not_waited_for_and_makes_no_job(server: Program) -> None:
    before = jobs(server)
    with nothing_left(server), raw.connected(server) as connection:
        connection.sendall(raw.HEAD + b"Content-Length: 20000\r\n\r\n")
        drip(connection, b'{"prompt": "' + b"x" * 10_000)
        status, _, body = raw.answer(connection)
        assert (status, body["error"]) == (408, "the body took too long")
    assert jobs(server) == before


def test_a_body_that_moves_is_waited_for_however_long_it_takes(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(tmp_path, body_seconds=1, min_rate=100) as server, raw.connected(server) as connection:
        body = BODY.ljust(4000)
        connection.sendall(raw.HEAD + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 100):
            connection.sendall(body[start : start + 100])
            time.sleep(0.1)
        status, _, answer = raw.answer(connection)
        assert (status, answer["status"]) == (200, "queued")


def test_a_reader_that_does_not_read_is_given_up(server: Program, large: str) -> None:
    request = f"GET /queue/{large} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with nothing_left(server), ExitStack() as stack:
        readers = [stack.enter_context(raw.connected(server, window=4096)) for _ in range(3)]
        for reader in readers:
            reader.sendall(request)
        eventually(lambda: server.log.count("gave up on the reading of the answer") >= 3, "the service to give up")


def test_a_reader_that_reads_gets_all_of_it_however_long_it_takes(server: Program, large: str) -> None:
    with raw.connected(server, window=2**16) as connection:
        connection.sendall(f"GET /queue/{large} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        began, size = time.monotonic(), 0
        while piece := connection.recv(2**18):
            size += len(piece)
            time.sleep(max(0.0, began + size / 8e6 - time.monotonic()))  # 8 MB/s: five seconds
    assert size > PICTURE * 4 / 3


def test_a_connection_that_is_used_now_and_then_is_kept(server: Program) -> None:
    with raw.connected(server) as connection:
        for _ in range(8):
            connection.sendall(b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"ok":true}'):
                answer += connection.recv(2**16)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


def test_a_caller_that_waits_for_a_job_is_not_taken_for_a_slow_one(server: Program) -> None:
    job_id = server.submit(prompt="stub:seconds=0.1", model="small", steps=60)
    assert server.get(f"/queue/{job_id}?wait=50").json()["state"] == "done"


def test_a_client_that_was_answered_early_gets_to_read_that(stub_server: Program) -> None:
    with raw.connected(stub_server) as connection:
        connection.sendall(raw.HEAD + b"Connection: close\r\nContent-Length: 3000000\r\n\r\n")
        status, _, _ = raw.answer(connection)
    assert status == 413


def test_a_client_that_was_answered_early_cannot_go_on_for_ever(server: Program) -> None:
    with nothing_left(server), raw.connected(server) as connection:
        connection.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        drip(connection, b"x")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 404")
        drip(connection, b"x" * 10_000)
        assert eventually(lambda: raw.closed(connection), "the connection to be closed")


def latencies(server: Program, count: int = 60) -> float:
    """The time of a small request, seconds: the slowest of the quicker nine in ten."""

    def one() -> float:
        began = time.monotonic()
        assert server.get("/hello").status_code == 200
        return time.monotonic() - began

    return statistics.quantiles([one() for _ in range(count)], n=10)[-1]


def test_two_hundred_slow_clients_are_not_noticed_by_others(server: Program) -> None:
    undisturbed = latencies(server)
    with nothing_left(server), ExitStack() as stack:
        slow = [stack.enter_context(raw.connected(server)) for _ in range(200)]
        over = threading.Event()

        def torment() -> None:
            for connection in slow[:100]:
                connection.sendall(b"GET /hello HTTP/1.1\r\nX-Slow: ")
            for connection in slow[100:]:
                connection.sendall(raw.HEAD + b"Content-Length: 100000\r\n\r\n")
            while not over.wait(0.5):
                for connection in slow:
                    with suppress(OSError):
                        connection.send(b"x")

        thread = threading.Thread(target=torment)
        thread.start()
        try:
            disturbed = latencies(server)
            assert server.result(model="small", steps=1)["state"] == "done"
            eventually(lambda: all(map(raw.closed, slow)), "all slow connections to be closed")
        finally:
            over.set()
            thread.join()
    assert disturbed < 20 * undisturbed + 0.5


# too many


def test_connections_have_a_limit_and_places_become_free(tmp_path: Path) -> None:
    with serving(tmp_path, max_connections=5, header_seconds=PATIENCE) as server:
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(raw.connected(server))
            refused = stack.enter_context(raw.connected(server))
            status, headers, body = raw.answer(refused)
            assert (status, headers["retry-after"]) == (503, "10")
            assert body["error"] == "too many connections; try again later"
        eventually(lambda: server.get("/hello").status_code == 200, "a place")


# clients that vanish


REQUEST_THEN = {
    "before its headers end": raw.HEAD,
    "before its body": raw.HEAD + b"Content-Length: 500\r\n\r\n",
    "in its body": raw.HEAD + b"Content-Length: 500\r\n\r\n" + BODY,
    "in a chunk": raw.HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
}


@pytest.mark.parametrize("leave", [socket.socket.close, raw.cut], ids=["closes", "resets"])
@pytest.mark.parametrize("sent", REQUEST_THEN.values(), ids=REQUEST_THEN)
def test_a_client_that_goes_before_its_request_is_whole_makes_no_job(
    server: Program, sent: bytes, leave: Callable[[socket.socket], None]
) -> None:
    before = jobs(server)
    with nothing_left(server):
        for _ in range(20):
            with raw.connected(server) as connection:
                connection.sendall(sent)
                leave(connection)
    assert jobs(server) == before


@pytest.mark.parametrize("leave", [socket.socket.close, raw.cut], ids=["closes", "resets"])
def test_a_client_that_goes_after_its_request_leaves_a_job_that_is_done(
    server: Program, leave: Callable[[socket.socket], None]
) -> None:
    before = jobs(server)
    with nothing_left(server):
        for _ in range(20):
            with raw.connected(server) as connection:
                connection.sendall(WHOLE)
                if leave is raw.cut:  # a reset takes back what the service has not read yet
                    connection.recv(1)
                leave(connection)
        eventually(lambda: jobs(server) == before + 20, "the jobs")


@pytest.mark.parametrize("leave", [socket.socket.close, raw.cut], ids=["closes", "resets"])
def test_a_client_that_goes_during_a_download_leaves_nothing_behind(
    server: Program, large: str, leave: Callable[[socket.socket], None]
) -> None:
    with nothing_left(server):
        for _ in range(10):
            with raw.connected(server, window=2**16) as connection:
                connection.sendall(f"GET /queue/{large} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert connection.recv(2**16)
                leave(connection)


def test_a_client_that_goes_while_it_waits_for_a_job_leaves_the_job_alone(server: Program) -> None:
    job_id = server.submit(prompt="stub:seconds=0.1", model="small", steps=20)
    with nothing_left(server):
        for _ in range(20):
            with raw.connected(server) as connection:
                connection.sendall(f"GET /queue/{job_id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                time.sleep(0.01)
    assert server.wait(job_id)["state"] == "done"


def test_the_log_and_the_metrics_know_a_client_that_left(server: Program) -> None:
    with raw.connected(server) as connection:
        connection.sendall(raw.HEAD + b"X-Request-ID: left-1\r\nContent-Length: 500\r\n\r\n{")
    eventually(lambda: "[request left-1] 127.0.0.1 POST /txt2img 499 in" in server.log, "the line")
    assert 'route="/txt2img",status="499"' in server.get("/metrics?format=prometheus").text


# what is no HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Name: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        raw.HEAD + b"Content-Length: -5\r\n\r\n",
        raw.HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        raw.HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        raw.HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        raw.HEAD + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n",
    ],
    ids=lambda sent: repr(sent[-30:]),
)
def test_what_is_no_http_is_refused_like_everything_else(server: Program, sent: bytes) -> None:
    with nothing_left(server), raw.connected(server) as connection:
        connection.sendall(sent)
        status, headers, body = raw.answer(connection)
        assert status in (400, 501, 505)
        assert body["error"].startswith("this is no HTTP request that can be read: ")
        assert headers["content-type"] == "application/json"
        assert headers["x-content-type-options"] == "nosniff"
    assert server.get("/hello").status_code == 200
