"""A program for ``test_fetch``: a public address on the loopback device of a network namespace, and a name that moves.

Prints what became of two POSTs to one name, whose resolver first gives the public address and then 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import threading

from diffusion_api.errors import Unreachable
from diffusion_api.fetch import Fetcher, origins

PUBLIC = "93.184.216.34"
NAME = "hooks.example.com"


def main(pem: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{PUBLIC}/32", "dev", "lo"], check=True)
    heard: list[tuple[str, str, str]] = []
    inside = [0]
    public = socket.create_server((PUBLIC, 443))
    threading.Thread(target=serve, args=(public, pem, heard), daemon=True).start()
    loopback = socket.create_server(("127.0.0.1", 443))

    def count() -> None:
        while True:
            loopback.accept()
            inside[0] += 1

    threading.Thread(target=count, daemon=True).start()
    answers = [[PUBLIC], ["127.0.0.1"]]
    fetcher = Fetcher(
        origins(NAME), resolve=lambda host, port: answers.pop(0), tls=ssl.create_default_context(cafile=pem), total=60
    )

    async def post() -> int | str:
        try:
            return await fetcher.post(f"https://{NAME}/", b"{}", {}, field="webhook")
        except Unreachable as error:
            return str(error)

    first, second = asyncio.run(post()), asyncio.run(post())
    print(json.dumps({"first": first, "second": second, "heard": heard, "loopback": inside[0]}))


def serve(listener: socket.socket, pem: str, heard: list[tuple[str, str, str]]) -> None:
    """Answer one request over TLS, and note the name in TLS, the one in Host, and the address."""
    names: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.sni_callback = lambda connection, name, context: names.append(name)
    with context.wrap_socket(listener, server_side=True) as secure:
        connection = secure.accept()[0]
        request = b""
        while not request.endswith(b"\r\n\r\n{}"):
            request += connection.recv(2**16)
        lines = request.decode().split("\r\n")
        host = next(line.split(": ")[1] for line in lines if line.lower().startswith("host:"))
        heard.append((names[0], host, connection.getsockname()[0]))
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        connection.close()


main(sys.argv[1])
