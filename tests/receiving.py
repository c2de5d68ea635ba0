"""Real receivers on 127.0.0.1: one that listens and answers as told, and ones that misbehave."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Heard:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """``answers`` are the statuses to come; after them it is 204. With ``location`` each answer names it."""

    port: int
    answers: list[int] = field(default_factory=list)
    location: str = ""
    heard: list[Heard] = field(default_factory=list)

    @property
    def host(self) -> str:
        """As the operator names it."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """As a caller names it."""
        return f"http://{self.host}/hook"


@contextlib.contextmanager
def receiving(*answers: int, port: int = 0, location: str = "") -> Iterator[Receiver]:
    """A receiver on a free port, or on this one."""

    class Handler(BaseHTTPRequestHandler):
        def _hear(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.heard.append(Heard(self.command, self.path, headers, body))
            self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
            if receiver.location:
                self.send_header("Location", receiver.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_CONNECT = _hear

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    receiver = Receiver(server.server_address[1], list(answers), location)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def silence(connection: socket.socket, over: threading.Event) -> None:
    """Take what comes and never answer."""
    over.wait()


def endless_head(connection: socket.socket, over: threading.Event) -> None:
    """Begin an answer and never come to its body."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not over.wait(0.05):
        connection.sendall(b"X-More: 1\r\n")


def endless_interim(connection: socket.socket, over: threading.Event) -> None:
    """Say that the answer is being worked on, without end."""
    while not over.wait(0.02):
        connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")


def endless_body(connection: socket.socket, over: threading.Event) -> None:
    """Answer, with a body that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not over.wait(0.01):
        connection.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")


def huge_head(connection: socket.socket, over: threading.Event) -> None:
    """Answer with as large a head as is taken."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not over.is_set():
        connection.sendall(b"X-More: " + b"x" * 100_000 + b"\r\n")


def no_http(connection: socket.socket, over: threading.Event) -> None:
    """Answer in another protocol."""
    connection.sendall(b"220 mail.example.com ESMTP\r\n")


def hang_up(connection: socket.socket, over: threading.Event) -> None:
    """Close without a word."""


@contextlib.contextmanager
def misbehaving(behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[Receiver]:
    """A receiver that reads a request and then behaves so. What it heard stays empty."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(2**16)
            behave(connection, over)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield Receiver(listener.getsockname()[1])
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextlib.contextmanager
def speaking_tls(pem: Path) -> Iterator[int]:
    """The port of a listener that offers this certificate and ends each connection after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                with connection, contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                    pass

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def certificate(folder: Path, name: str = "hooks.example.com") -> Path:
    """A new key with a certificate for that name, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    pem = folder / "certificate.pem"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-keyout", pem)
    about = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2")
    made = subprocess.run(["openssl", "req", "-x509", *key, *about], check=True, capture_output=True)
    with pem.open("ab") as file:
        file.write(made.stdout)
    return pem


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
