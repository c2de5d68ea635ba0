"""A hub on 127.0.0.1 as far as a download sees it: its API, its redirects to another host for large files, its refusals."""

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

TOKEN = "hf_secret"


@dataclass
class Repository:
    """Files by name, at one commit."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    licence: dict[str, str] = field(default_factory=lambda: {"license": "mit"})
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)


@dataclass
class Hub:
    """The hub and the host of its large files. ``faults`` befall the next requests for large files, one each: ``cut:N``
    after N bytes, ``slow:N`` seconds of nothing in its middle, ``status:429``, ``html``, ``wrong`` (other bytes),
    ``no-range``, ``no-length``, ``name:x`` (what the host calls it).
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    retry_after: str = "7"
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set, it lets nobody wait any longer."""

    def blob(self, digest: str) -> bytes:
        """The large file with that SHA-256."""
        contents = (content for repository in self.repositories.values() for content in repository.files.values())
        return next(content for content in contents if hashlib.sha256(content).hexdigest() == digest)

    def ranges(self) -> list[str]:
        """What was asked of the large files: the ``Range`` of each request, empty for all of it."""
        return [headers.get("range", "") for path, headers in self.heard if path.startswith("/blob/")]


@contextlib.contextmanager
def hub(**repositories: Repository) -> Iterator[Hub]:
    """A hub with these repositories; ``org__name`` stands for ``org/name``."""
    state = Hub({name.replace("__", "/").replace("_", "-"): each for name, each in repositories.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            split = urlsplit(self.path)
            parts = unquote(split.path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.info("/".join(parts[2:4]), "/".join(parts[5:]), parse_qs(split.query))
            elif parts[0] == "blob":
                self.large(parts[1])
            elif len(parts) > 4 and parts[2] == "resolve":
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.refuse(404)

        def found(self, name: str, revision: str) -> Repository | None:
            repository = state.repositories.get(name)
            if repository is None:
                self.refuse(401, "RepoNotFound")
                return None
            if revision not in (*repository.revisions, repository.commit):
                self.refuse(404, "RevisionNotFound")
                return None
            return repository

        def info(self, name: str, revision: str, query: dict[str, list[str]]) -> None:
            if repository := self.found(name, revision):
                assert query == {"blobs": ["true"]}
                siblings = [{"rfilename": file, **described(file, data)} for file, data in repository.files.items()]
                body = {"id": name, "sha": repository.commit, "siblings": siblings, "cardData": repository.licence}
                self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def resolve(self, name: str, revision: str, file: str) -> None:
            repository = self.found(name, revision)
            if not repository:
                return
            if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
            elif file not in repository.files:
                self.refuse(404, "EntryNotFound")
            elif not file.endswith(".safetensors"):
                self.answer(200, repository.files[file], {"Content-Type": "text/plain"})
            else:
                digest = hashlib.sha256(repository.files[file]).hexdigest()
                self.answer(302, b"", {"Location": f"{state.cdn}/blob/{digest}?X-Signature=of-this-hour"})

        def large(self, digest: str) -> None:
            content, fault = state.blob(digest), state.faults.pop(0) if state.faults else ""
            kind, _, value = fault.partition(":")
            if kind == "status":
                self.answer(int(value), b"", {"Retry-After": state.retry_after})
                return
            if kind == "html":
                self.answer(200, b"<!doctype html><title>Sign in</title>", {"Content-Type": value or "text/html"})
                return
            if kind == "wrong":
                content = content[:-1] + bytes([content[-1] ^ 1])
            headers = {"ETag": f'"{digest}"', "Content-Type": "application/octet-stream"}
            if kind == "name":
                headers["Content-Disposition"] = f'attachment; filename="{value}"'
            if kind == "no-length":
                headers["Connection"] = "close"
            start, asked = 0, self.headers.get("Range", "")
            if asked and kind != "no-range" and self.headers.get("If-Range") in (None, headers["ETag"]):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            slow = float(value) if kind == "slow" else 0
            self.answer(206 if start else 200, body, headers, cut=int(value) if kind == "cut" else None, slow=slow)

        def refuse(self, status: int, code: str = "") -> None:
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})

        def answer(
            self, status: int, body: bytes, headers: dict[str, Any], cut: int | None = None, slow: float = 0
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Connection" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if slow:
                half = len(body) // 2
                self.wfile.write(body[:half])
                body = body[half:]
                state.stopped.wait(slow)
            with contextlib.suppress(OSError):  # who asked did not wait
                self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    threads = [
        threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True) for each in servers
    ]
    for thread in threads:
        thread.start()
    state.url, state.cdn = (f"http://127.0.0.1:{each.server_address[1]}" for each in servers)
    try:
        yield state
    finally:
        state.stopped.set()
        for each, thread in zip(servers, threads, strict=True):
            each.shutdown()
            each.server_close()
            thread.join()


def described(name: str, content: bytes) -> dict[str, Any]:
    """What the API says of a file: size, and for a large one its SHA-256."""
    if not name.endswith(".safetensors"):
        return {"size": len(content)}
    return {"size": len(content), "lfs": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
