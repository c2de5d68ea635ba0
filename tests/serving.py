"""A real service as a process of its own, for tests: on a free port, its log in a file, ended by its own process id."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0
"""Seconds after which a test gives up waiting for what should take a moment."""


MODES = {"in-process": (), "isolated": ("--isolated",)}
"""The two ways in which ``serve`` runs jobs, as arguments."""


FOREIGN = r"DIFFUSION_API_|((ADMIN_)?API_KEY|API_HOST|API_PORT|LOG_LEVEL|LOG_FILE|RATE_LIMIT_REQUESTS|MODEL_CACHE_DIR)$"
"""Variables that mean something to the service."""


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with no setting of the service in it but these, named as in ``Settings``."""
    plain = {name: value for name, value in os.environ.items() if not re.match(FOREIGN, name)}
    wanted = {f"DIFFUSION_API_{name.upper()}": str(value) for name, value in settings.items()}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return plain | {"PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "200"} | wanted


def command(*arguments: object) -> list[str]:
    """The command line of ``diffusion-api``."""
    return [sys.executable, "-m", "diffusion_api", *map(str, arguments)]


def run(*arguments: object, cwd: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def eventually(holds: Callable[[], object], what: str = "it", timeout: float = PATIENCE) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


@dataclass
class Program:
    """A running ``serve`` or ``worker``. ``url`` is empty for a worker."""

    process: subprocess.Popen[str]
    home: Path
    log_path: Path
    url: str = ""
    said: str = ""
    """What it printed before it greeted."""
    key: str = ""
    """What requests bear, if anything."""

    @cached_property
    def _client(self) -> httpx.Client:
        limits = httpx.Limits(max_keepalive_connections=0)
        headers = {"X-API-Key": self.key} if self.key else {}
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, limits=limits, headers=headers)

    @property
    def log(self) -> str:
        """What it has written to stderr so far."""
        return self.log_path.read_text()

    def get(self, path: str, **options: Any) -> httpx.Response:
        """The answer to GET."""
        return self.request("GET", path, **options)

    def post(self, **fields: Any) -> httpx.Response:
        """The answer to ``POST /txt2img`` with these fields."""
        return self.request("POST", "/txt2img", json=fields)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer to a request on a connection of its own."""
        return self._client.request(method, path, **options)

    def submit(self, **fields: Any) -> str:
        """Post a job that must be taken; its id."""
        answer = self.post(**fields)
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["job_id"]
        return job_id

    def status(self, job_id: str) -> dict[str, Any]:
        """``GET /queue/{id}``."""
        answer = self.get(f"/queue/{job_id}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def wait(self, job_id: str, state: str = "done") -> dict[str, Any]:
        """The status of a job once it is in that state; fails when it ends in another."""

        def reached() -> dict[str, Any] | None:
            status = self.status(job_id)
            assert status["state"] == state or status["state"] not in ("done", "error"), status
            return status if status["state"] == state else None

        found: dict[str, Any] = eventually(reached, f"{job_id} to be {state}")
        return found

    def result(self, **fields: Any) -> dict[str, Any]:
        """Post a job and wait for its end."""
        return self.wait(self.submit(**fields))

    def worker(self) -> psutil.Process:
        """The process that runs the jobs of an isolated service, once it serves the queue."""

        def found() -> psutil.Process | None:
            serving = self.get("/health").json()["workers"]
            children = psutil.Process(self.process.pid).children()
            return children[0] if serving and len(children) == 1 else None

        worker: psutil.Process = eventually(found, "the worker process")
        return worker

    def signal(self, number: int) -> None:
        """Send a signal to this one process."""
        self.process.send_signal(number)

    def ended(self, timeout: float = PATIENCE) -> int:
        """Wait for its end: its exit code, negative for a signal."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def started(*arguments: object, home: Path, **settings: object) -> Iterator[Program]:
    """A program on this home, with the stub engine if no other is named; killed in the end if it still runs."""
    home.mkdir(parents=True, exist_ok=True)
    log_path = home / f"{arguments[0]}.log"
    with log_path.open("a") as log:
        process = subprocess.Popen(
            command(*arguments, "--home", home),
            cwd=home,
            env=environment(**{"engine": "stub", "shipped_models": False} | settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield Program(process, home, log_path)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def serving(home: Path, *arguments: object, **settings: object) -> Iterator[Program]:
    """A service that has said where it listens."""
    with started("serve", "--port", 0, *arguments, home=home, **settings) as program:
        assert program.process.stdout is not None
        while not (found := re.search(r"serves (https?://\S+)", line := program.process.stdout.readline())):
            assert line, f"no address in {program.said!r}; its log: {program.log}"
            program.said += line
        program.url = found[1]
        yield program
