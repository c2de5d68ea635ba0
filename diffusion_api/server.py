"""Builds the objects of one process and runs them: the API with its worker, or a worker alone."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from diffusion_api.app import App, create_app
from diffusion_api.catalog.library import Library
from diffusion_api.engine.base import Engine
from diffusion_api.engine.executor import Executor
from diffusion_api.errors import Misconfigured
from diffusion_api.outputs import Outputs
from diffusion_api.queues.base import Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.restart import Handover
from diffusion_api.retention import Limits
from diffusion_api.service import Service
from diffusion_api.settings import DATA, Settings
from diffusion_api.supervisor import Supervisor, die_with_supervisor
from diffusion_api.sweeper import Sweeper
from diffusion_api.worker import Worker

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)


def build_library(settings: Settings) -> Library:
    """The models of this installation."""
    shipped = DATA / "models" if settings.shipped_models else None
    return Library(settings.home, settings.models_dir, shipped, settings.model)


def build_engine(settings: Settings, library: Library) -> Engine:
    """What makes the pictures."""
    if settings.engine == "stub":
        from diffusion_api.engine.stub import StubEngine

        return StubEngine()
    return Executor(library, device=settings.device, tokenizer=DATA / "clip")


def build_queue(settings: Settings) -> Queue:
    """Where jobs wait."""
    return FileQueue(settings.queue_dir, max_attempts=settings.max_attempts)


def build_sweeper(settings: Settings, queue: Queue, outputs: Outputs) -> Sweeper:
    """What lets go of old results, and of old pictures if the operator wants that."""
    return Sweeper(
        queue,
        outputs,
        results=Limits(seconds=settings.keep_results_hours * 3600 or None, count=settings.keep_results or None),
        pictures=Limits(
            seconds=settings.keep_outputs_days * 24 * 3600 or None,
            count=settings.keep_outputs or None,
            size=int(settings.keep_outputs_mb * 2**20) or None,
        ),
    )


def build_app(settings: Settings, *, worker: bool = True) -> App:
    """The whole service as one ASGI app; its worker starts and stops with the app."""
    settings.create_folders()
    library, queue, outputs = build_library(settings), build_queue(settings), Outputs(settings.outputs_dir)
    sweeper = build_sweeper(settings, queue, outputs)
    if not worker:
        service = Service(settings, library, queue, outputs, None)
        return create_app(service, settings, startup=sweeper.start, shutdown=queue.close)
    engine = None if settings.isolated else build_engine(settings, library)
    hand = Worker(queue, engine, outputs) if engine else build_supervisor(settings)

    def start() -> None:
        hand.start()
        sweeper.start()

    def stop() -> None:
        hand.stop(settings.grace)
        queue.close()

    return create_app(Service(settings, library, queue, outputs, engine), settings, startup=start, shutdown=stop)


def build_supervisor(settings: Settings) -> Supervisor:
    """What keeps a worker process running on the same folder; it reads the same settings, but for flags of ours."""
    flags = ("--home", str(settings.home), "--engine", settings.engine)
    return Supervisor((sys.executable, "-m", "diffusion_api", "worker", *flags))


def run(settings: Settings, *, worker: bool) -> None:
    """Serve until told to stop: SIGINT or SIGTERM drain, a second one ends at once. Raises Misconfigured."""
    configure_logging(settings)
    listener = _listen(settings.host, settings.port)
    app = build_app(settings, worker=worker)
    shown_host = "127.0.0.1" if settings.host in ("", "0.0.0.0") else settings.host
    url = f"http://{shown_host}:{listener.getsockname()[1]}"
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    server.greeting = _greeting(url)
    server.run(sockets=[listener])


def work(settings: Settings, handover: Handover) -> None:
    """Run jobs until told to stop, or until our supervisor is gone."""
    configure_logging(settings, mark=f" [worker {os.getpid()}]")
    if handover.lifeline is not None:
        die_with_supervisor(handover.lifeline)
    settings.create_folders()
    queue = build_queue(settings)
    engine = build_engine(settings, build_library(settings))
    hand = Worker(queue, engine, Outputs(settings.outputs_dir), restarts=handover.restarts)
    told = threading.Event()
    for number in STOPPING:
        signal.signal(number, lambda *_: told.set())
    hand.start()
    log.info("worker runs; Ctrl-C stops it")
    told.wait()
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    hand.stop(settings.grace)
    queue.close()


class Server(uvicorn.Server):
    """uvicorn, but it ends with exit code 0 when it was asked to stop, and greets once it listens."""

    greeting = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving, and raise none of them again afterwards."""
        previous = {n: signal.signal(n, self.handle_exit) for n in STOPPING}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. The second meets the default handler and ends the process at once."""
        super().handle_exit(sig, frame)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            print(self.greeting, flush=True)


def configure_logging(settings: Settings, mark: str = "") -> None:
    """Lines to stderr, time and level first, then the mark; also where Python was when native code crashes."""
    faulthandler.enable()
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s [%(levelname)s]{mark} %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for chatty in ("httpx", "httpcore", "PIL", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Misconfigured(
            f"cannot listen on {host}:{port}: {error.strerror}; try --port 0 for a free port"
        ) from error
    listener.set_inheritable(False)
    return listener


def _greeting(url: str) -> str:
    body = '{"prompt": "a large red circle on a blue background", "seed": 1}'
    return (
        f"Diffusion API serves {url} (docs: {url}/docs). Try:\n"
        f"  curl -s {url}/txt2img -H 'Content-Type: application/json' -d '{body}'\n"
        f"  curl -s {url}/queue/<job_id>"
    )
