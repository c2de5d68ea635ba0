"""Civitai on 127.0.0.1 as far as a LoRA shop sees it: its API, and its redirects to a host of large files, ``fake_hub``'s."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub import Hub, Repository, hub

KEY = "civit-secret-key"


@dataclass
class Civitai:
    """``models`` by number, as the API tells of them; ``faults`` befall the next answers of the API: ``status:429``, ``html``,
    ``text:...``. Large files are on ``large``, which has faults of its own. ``signed_in``: a file takes the key.
    ``elsewhere`` is where downloads lead, in place of ``large``.
    """

    large: Hub
    models: dict[int, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    retry_after: str = "3"
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    signed_in: bool = False
    elsewhere: str = ""
    url: str = ""

    @property
    def files(self) -> dict[str, bytes]:
        """The large files, by the numbers of their versions."""
        return self.large.repositories["civitai/files"].files

    def publish(self, number: int, title: str, content: bytes, **other: Any) -> None:
        """A model with one version and one safetensors file; ``other`` are fields of the model, of the version or the file."""
        version, name = number * 10, other.pop("name", "file.safetensors")
        self.files[str(version)] = content
        digest = hashlib.sha256(content).hexdigest().upper()
        file = {
            "name": name,
            "sizeKB": len(content) / 1024,
            "type": "Model",
            "metadata": {"format": "SafeTensor", "size": None, "fp": None},
            "hashes": other.pop("hashes", {"AutoV2": digest[:10], "SHA256": digest}),
            "downloadUrl": other.pop("downloadUrl", f"{self.url}/api/download/models/{version}"),
        }
        described = {
            "id": version,
            "name": "v1.0",
            "baseModel": other.pop("baseModel", "SD 1.5"),
            "trainedWords": other.pop("trainedWords", ["ink style", " drawing "]),
            "files": other.pop("files", [file | {"name": "samples.zip"}, file]),
        }
        self.models[number] = {
            "id": number,
            "name": title,
            "type": "LORA",
            "nsfw": False,
            "allowNoCredit": True,
            "allowCommercialUse": ["Image", "Sell"],
            "modelVersions": [described, described | {"baseModel": "Other"}],
        } | other


@contextlib.contextmanager
def civitai() -> Iterator[Civitai]:
    """A Civitai without models."""
    with hub() as large:
        large.repositories["civitai/files"] = Repository({})
        state = Civitai(large)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                state.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                split = urlsplit(self.path)
                parts = unquote(split.path).strip("/").split("/")
                if parts[:3] == ["api", "v1", "models"]:
                    self.api(parts[3] if len(parts) > 3 else "", parse_qs(split.query))
                elif parts[:3] == ["api", "download", "models"] and parts[3] in state.files:
                    self.download(parts[3])
                else:
                    self.answer(404, b"{}")

            def api(self, number: str, query: dict[str, list[str]]) -> None:
                kind, _, value = (state.faults.pop(0) if state.faults else "").partition(":")
                if kind == "status":
                    self.answer(int(value), b"{}", {"Retry-After": state.retry_after})
                elif kind == "html":
                    self.answer(200, b"<!doctype html><title>Busy</title>", {"Content-Type": "text/html"})
                elif kind == "text":
                    self.answer(200, value.encode())
                elif number:
                    found = state.models.get(int(number))
                    self.answer(
                        200 if found else 404, json.dumps(found or {"error": f"No model with id {number}"}).encode()
                    )
                else:
                    words = query["query"][0].lower().replace("_", " ").split()
                    rows = [row for row in state.models.values() if all(word in row["name"].lower() for word in words)]
                    self.answer(200, json.dumps({"items": rows, "metadata": {}}).encode())

            def download(self, version: str) -> None:
                if state.signed_in and self.headers.get("Authorization") != f"Bearer {KEY}":
                    self.answer(401, b'{"error": "Unauthorized"}')
                    return
                digest = hashlib.sha256(state.files[version]).hexdigest()
                self.answer(
                    307, b"", {"Location": state.elsewhere or f"{state.large.cdn}/blob/{digest}?X-Signature=now"}
                )

            def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
