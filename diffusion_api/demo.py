"""``diffusion-api demo``: a service of its own, one job over HTTP, the picture, and an end to the service."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from diffusion_api.client import Client, Status
from diffusion_api.errors import DiffusionApiError, Unavailable

LOG_LINES = 20
START_TIMEOUT = 120
JOB_TIMEOUT = 1800
MODEL = "shapes"


class ServiceDied(DiffusionApiError):
    """The service ended by itself, or never answered."""


def run_demo(
    prompt: str,
    home: Path,
    console: Console,
    *,
    command: tuple[str, ...] = (sys.executable, "-m", "diffusion_api"),
    grace: float = 10,
) -> int:
    """Make one picture under ``home`` and say where it is; the exit status: 0 only if the picture is there.

    ``command`` is the command line that has ``serve``. The service gets ``grace`` seconds to stop before it is killed.
    Its log is shown if anything fails.
    """
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as log:
        try:
            with _terminate_as_exit(), _service(command, home, log, grace) as (child, url):
                _say(console, f"Starting a service at {url}")
                with Client(url) as client:
                    _wait_for_hello(client, child)
                    status = _one_job(client, prompt, console)
                failure = _report(status, home, console)
        except (DiffusionApiError, TimeoutError) as error:
            failure = str(error)
        if failure is None:
            _say(console, "The service is stopped. To keep one running: make serve, or diffusion-api serve")
            return 0
        _say(console, f"No picture: {failure}")
        _say(console, f"The service's last lines:\n{_tail(log)}")
        return 1


@contextmanager
def _service(
    command: tuple[str, ...], home: Path, log: IO[bytes], grace: float
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service on a free port, and its address; stopped at the end whatever happens."""
    port = _free_port()
    arguments = [*command, "serve", "--host", "127.0.0.1", "--port", str(port)]
    child = subprocess.Popen(  # noqa: S603 - this program
        arguments, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        yield child, f"http://127.0.0.1:{port}"
    finally:
        _stop(child, grace)


def _stop(child: subprocess.Popen[bytes], grace: float) -> None:
    try:
        child.terminate()
        child.wait(grace)
    except subprocess.TimeoutExpired:
        pass  # killed below, as it is after an impatient second Ctrl-C
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Within, SIGTERM ends this process the way an exception does, so that the service is stopped too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_hello(client: Client, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise ServiceDied(f"the service ended with status {child.returncode} before it answered")
        try:
            client.hello()
            return
        except Unavailable:
            time.sleep(0.1)
    raise ServiceDied(f"the service did not answer within {START_TIMEOUT} seconds")


def _one_job(client: Client, prompt: str, console: Console) -> Status:
    """Post the job and draw its progress until it ends."""
    job = client.txt2img(prompt=prompt, model=MODEL, fileType="png", seed=1)
    _say(console, f"POST /txt2img: job {job.job_id}, prompt: {prompt}")
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[phase]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=100, phase="queued")

        def draw(status: Status) -> None:
            bar.update(task, completed=status["progress"], phase=status["current_phase"] or status["state"])

        return client.wait(job.job_id, draw, timeout=JOB_TIMEOUT)


def _report(status: Status, home: Path, console: Console) -> str | None:
    """Say where the picture is and what is in it; or return why there is none."""
    if status["state"] != "done":
        return status["error"] or f"the job is {status['state']}"
    path = home.resolve() / status["output_path"]
    try:
        with Image.open(path) as picture:
            picture.load()
            infotext = picture.info.get("parameters")
    except OSError as error:
        return str(error)
    if not infotext:
        return f"{path} has no infotext"
    size = f"{picture.width}x{picture.height} pixels, {path.stat().st_size:,} bytes"
    _say(console, f"\nImage: {path} ({size}, {status['generation_time_sec']:.1f} s)\n\n{infotext}\n")
    return None


def _say(console: Console, text: str) -> None:
    """Print as it is: prompts and paths may hold brackets, and are not to be wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])
