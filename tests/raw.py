"""Connections as a client has them that httpx would not let be: half requests, slow ones, cut ones."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving import PATIENCE, Program

HEAD = b"POST /txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
"""The start of a request whose headers have not ended."""


def address(server: Program) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


@contextmanager
def connected(server: Program, *, window: int | None = None) -> Iterator[socket.socket]:
    """A connection; ``window`` is the bytes that wait for the client at most, as the kernel understands it."""
    with socket.socket() as connection:
        if window:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        connection.settimeout(PATIENCE)
        connection.connect(address(server))
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of all that comes until the connection is closed; status 0 when nothing comes."""
    data = b""
    try:
        while piece := connection.recv(2**16):
            data += piece
    except ConnectionResetError:
        pass
    if not data:
        return 0, {}, None
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), headers, json.loads(body)


def closed(connection: socket.socket) -> bool:
    """True once the server has ended the connection. What it sent before is thrown away."""
    try:
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(2**16):
                return True
    except OSError:
        return True
    return False


def cut(connection: socket.socket) -> None:
    """End the connection as a crash of the client would: with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
