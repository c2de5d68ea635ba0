"""Builds the objects of one process and runs them: the API with its worker, or a worker alone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

import uvicorn

from diffusion_api import connections, door, logs
from diffusion_api.access import Access
from diffusion_api.app import App, create_app
from diffusion_api.catalog.library import Library
from diffusion_api.dialects import native
from diffusion_api.engine.base import Engine, Pictures
from diffusion_api.engine.executor import Budget, Executor
from diffusion_api.errors import InvalidRequest, Misconfigured, QueueUnusable
from diffusion_api.keys import Keyring
from diffusion_api.links import Links
from diffusion_api.outputs import Outputs
from diffusion_api.pace import Pace
from diffusion_api.queues.base import Queue
from diffusion_api.queues.file import FileQueue
from diffusion_api.restart import Handover, restart
from diffusion_api.retention import Limits
from diffusion_api.schema.caller import Role
from diffusion_api.service import Service
from diffusion_api.settings import DATA, Settings
from diffusion_api.supervisor import Supervisor, die_with_supervisor
from diffusion_api.sweeper import Sweeper
from diffusion_api.users import Users
from diffusion_api.worker import HUNG, Worker

if TYPE_CHECKING:
    from types import FrameType

    from PIL.Image import Image

    from diffusion_api.downloads import Downloads
    from diffusion_api.llm import Llm
    from diffusion_api.lora_shop import LoraShop
    from diffusion_api.pull import Puller
    from diffusion_api.remote_pictures import RemotePictures
    from diffusion_api.webhooks import Webhooks

log = logging.getLogger(__name__)

MIB = 2**20
GIB = 2**30
HOPELESS = 2 * HUNG
"""Seconds for which a job may hang beyond its deadline before its process is killed from outside: longer than it takes
that process to notice, if it is still able to."""

PULL_PAUSE = 60.0
"""Seconds without a byte after which a download is begun again where it stopped."""

STOPPING = (signal.SIGINT, signal.SIGTERM)


def build_library(settings: Settings) -> Library:
    """The models of this installation."""
    shipped = DATA / "models" if settings.shipped_models else None
    return Library(
        settings.home,
        settings.models_dir,
        shipped,
        settings.model,
        models_from=settings.models_from,
        pickle_models=settings.allow_pickle_models,
    )


def build_engine(settings: Settings, library: Library, queue: Queue) -> Engine:
    """What makes the pictures."""
    pictures = build_pictures(settings, queue)
    if settings.engine == "stub":
        from diffusion_api.engine.stub import StubEngine

        return StubEngine(pictures, policy=settings.safety, checker=library.checker)
    budget = Budget(
        max_vram=int(settings.max_vram * GIB) or None,
        max_ram=int(settings.max_ram * GIB) or None,
        idle=settings.idle_unload * 60 or None,
        warm_up=tuple(name.strip() for name in settings.warm_up.split(",") if name.strip()),
    )
    return Executor(
        library,
        device=settings.device,
        tokenizer=DATA / "clip",
        budget=budget,
        picture=pictures,
        policy=settings.safety,
    )


def build_pictures(settings: Settings, queue: Queue) -> Pictures:
    """Where the engine has the pictures from that jobs bring along."""

    def picture(name: str) -> Image:
        from diffusion_api import images  # NumPy and Pillow: a third of the time until the service answers

        return images.decode(queue.read_input(name), max_pixels=settings.max_input_pixels)

    return picture


def build_pace(settings: Settings) -> Pace:
    """How long jobs take, as far as it was learned."""
    return Pace(settings.queue_dir / "pace.json", tmp=settings.queue_dir / "tmp")


def build_queue(settings: Settings) -> Queue:
    """Where jobs wait."""
    return FileQueue(
        settings.queue_dir,
        max_attempts=settings.max_attempts,
        max_waiting=settings.max_queue,
        max_waiting_each=settings.max_queue_per_caller,
        reserve=settings.disk_reserve_mb * MIB,
        pause_after_crashes=settings.pause_after_crashes,
    )


def build_outputs(settings: Settings) -> Outputs:
    """Where pictures are kept."""
    return Outputs(settings.outputs_dir, reserve=settings.disk_reserve_mb * MIB)


def build_webhooks(settings: Settings, queue: Queue) -> Webhooks | None:
    """What tells of the ends of jobs, None when the operator allows no hosts. Raises Misconfigured."""
    if not settings.webhook_hosts.strip():
        return None
    from diffusion_api.fetch import Fetcher, origins  # httpx: a tenth of a second until the service answers
    from diffusion_api.webhooks import Webhooks

    secret = settings.webhook_secret.get_secret_value()
    if not secret:
        raise Misconfigured(
            "webhook_hosts is set and webhook_secret is not: set DIFFUSION_API_WEBHOOK_SECRET to a long random text, "
            "such as what `openssl rand -hex 32` prints"
        )
    fetcher = Fetcher(origins(settings.webhook_hosts))
    return Webhooks(settings.queue_dir / "hooks", queue, fetcher, secret=secret, describe=native.ended)


def build_llm(settings: Settings) -> Llm | None:
    """The language model that others run, None when the operator names none. Raises Misconfigured."""
    if not settings.llm_host:
        return None
    from diffusion_api.llm import Llm  # httpx: a tenth of a second until the service answers

    return Llm(settings.llm_url, seconds=settings.llm_seconds)


def build_remote_pictures(settings: Settings) -> RemotePictures | None:
    """What fetches the pictures that requests name by URL, None when the operator allows no hosts. Raises Misconfigured."""
    if not settings.picture_hosts.strip():
        return None
    from diffusion_api.fetch import Fetcher, origins  # httpx: a tenth of a second until the service answers
    from diffusion_api.remote_pictures import RemotePictures

    fetcher = Fetcher(origins(settings.picture_hosts), setting="DIFFUSION_API_PICTURE_HOSTS")
    return RemotePictures(fetcher, max_bytes=settings.max_body)


def build_downloads(settings: Settings, home: str) -> Downloads:
    """What fetches files: from the host of that URL, which may have a path, and from where that leads. Raises Misconfigured."""
    from diffusion_api.downloads import Downloads
    from diffusion_api.fetch import Fetcher, origins

    first = urlsplit(home)
    fetcher = Fetcher(
        origins(f"{first.scheme}://{first.netloc},{settings.pull_hosts}"),
        public=True,
        proxy=settings.pull_proxy or None,
        setting="DIFFUSION_API_PULL_HOSTS",
        total=PULL_PAUSE,
    )
    return Downloads(fetcher)


def build_puller(settings: Settings) -> Puller:
    """What fetches models when it is asked to. Raises Misconfigured."""
    from diffusion_api.pull import Puller

    token = settings.hf_token.get_secret_value()
    downloads = build_downloads(settings, settings.hf_endpoint)
    return Puller(downloads, settings.home, endpoint=settings.hf_endpoint, token=token)


def build_lora_shop(settings: Settings, library: Library) -> LoraShop:
    """What adds LoRAs when it is asked to. Raises Misconfigured."""
    from diffusion_api.lora_shop import LoraShop
    from diffusion_api.pull import Puller

    downloads = build_downloads(settings, settings.civitai_url)
    return LoraShop(
        downloads,
        Puller(downloads, settings.home, endpoint=settings.hf_endpoint),
        library,
        settings.home,
        endpoint=settings.civitai_url,
        key=settings.civit_key.get_secret_value(),
        limit=int(settings.max_lora_mb * MIB),
        seconds=settings.lora_seconds,
    )


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


def build_keyring(settings: Settings) -> Keyring:
    """Who has a key."""
    listed = {Role.USER: settings.api_key, Role.ADMIN: settings.admin_api_key}
    return Keyring(
        settings.access_dir,
        [
            (role, key.strip())
            for role, keys in listed.items()
            for key in keys.get_secret_value().split(",")
            if key.strip()
        ],
    )


def build_access(settings: Settings) -> Access:
    """What lets callers in."""
    return Access(settings, build_keyring(settings), Users(settings.access_dir))


def build_app(settings: Settings, *, worker: bool = True) -> App:
    """The whole service as one ASGI app; its worker starts and stops with the app."""
    if settings.print_link_with_token:
        _show_link(settings, settings.public_url.rstrip("/") or f"http://localhost:{settings.port}")
    return build(settings, worker=worker, handover=None).app


@dataclass(frozen=True)
class Serving:
    """The objects of one serving process. ``drain`` ends the service's work, and may take the grace for it."""

    app: App
    drain: Callable[[], None]
    engine: Engine | None


def build(settings: Settings, *, worker: bool, handover: Handover | None) -> Serving:
    """The service, with a worker in this process, in one of its own, or without.

    A process without a ``handover`` is not ours to start again: it ends where another would begin again.
    """
    settings.create_folders()
    library, queue, outputs = build_library(settings), build_queue(settings), build_outputs(settings)
    pace = build_pace(settings)
    webhooks = build_webhooks(settings, queue)
    sweeper = build_sweeper(settings, queue, outputs)
    engine = build_engine(settings, library, queue) if worker and not settings.isolated else None
    access = build_access(settings)
    links = Links(lambda: access.secret)
    service = Service(
        settings, library, queue, outputs, engine, pace=pace, webhooks=webhooks, links=links,
        remote=build_remote_pictures(settings), shop=partial(build_lora_shop, settings, library), llm=build_llm(settings),
    )  # fmt: skip
    hand: Worker | Supervisor | None = None
    if engine:
        hand = build_worker(queue, engine, outputs, pace, handover)
    elif worker:
        hand = build_supervisor(settings, queue)

    def start() -> None:
        if webhooks:
            webhooks.start()
        if hand:
            hand.start()
        sweeper.start()

    def drain() -> None:
        service.drain()
        if hand:
            hand.stop(settings.grace)
        service.close()

    def stop() -> None:
        drain()
        if webhooks:
            webhooks.stop()
        queue.close()

    app = create_app(service, settings, access, startup=start, shutdown=stop)
    return Serving(app, drain, engine)


def build_worker(queue: Queue, engine: Engine, outputs: Outputs, pace: Pace, handover: Handover | None) -> Worker:
    """What runs the jobs, in a process that may have to begin again for it."""
    restarts = handover.restarts if handover else 0
    return Worker(queue, engine, outputs, pace=pace, restart=partial(restart, handover), restarts=restarts)


def build_supervisor(settings: Settings, queue: Queue) -> Supervisor:
    """What keeps a worker process running on the same folder; it reads the same settings, but for flags of ours."""
    flags = ["--home", str(settings.home), "--engine", settings.engine, "--device", settings.device]
    for root in settings.models_from:
        flags += ["--models-from", str(root)]

    def hangs(pid: int) -> bool:
        with contextlib.suppress(QueueUnusable):
            return any(report.pid == pid and report.overdue > HOPELESS for report in queue.workers())
        return False

    return Supervisor((sys.executable, "-m", "diffusion_api", "worker", *flags), hangs)


def run(settings: Settings, *, worker: bool, handover: Handover) -> None:
    """Serve until told to stop: SIGINT or SIGTERM drain, a second one ends at once. Raises Misconfigured."""
    logs.configure(settings)
    ports = (settings.port, *settings.also_listen)
    listeners = [*map(_adopt, handover.listeners)] or [listen(settings.host, port) for port in ports]
    handover = handover.model_copy(update={"listeners": tuple(each.fileno() for each in listeners)})
    scheme = "https" if settings.ssl_certfile else "http"
    here = [f"{scheme}://{_shown_host(settings.host)}:{each.getsockname()[1]}" for each in listeners]
    url = settings.public_url.rstrip("/") or here[0]
    settings.create_folders()
    _show_first_key(settings, url)
    serving = build(settings, worker=worker, handover=handover)
    config = uvicorn.Config(
        serving.app,
        http=connections.protocol(settings),
        ws_max_size=door.MAX_HEADER_BYTES,
        h11_max_incomplete_event_size=door.MAX_HEADER_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        forwarded_allow_ips=settings.trusted_proxies,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
    _load(config)
    log.info("it listens on %s", ", ".join(here))
    if settings.print_link_with_token:
        _show_link(settings, url)
    greeting = _greeting(url, open_to_all=build_access(settings).open, model=settings.model)
    Server(config, drain=serving.drain, greeting=greeting).run(sockets=listeners)
    if serving.engine:
        leave(serving.engine)


def work(settings: Settings, handover: Handover) -> None:
    """Run jobs until told to stop, or until our supervisor is gone."""
    logs.configure(settings, role="worker")
    if handover.lifeline is not None:
        die_with_supervisor(handover.lifeline)
    settings.create_folders()
    queue = build_queue(settings)
    engine = build_engine(settings, build_library(settings), queue)
    outputs, pace = build_outputs(settings), build_pace(settings)
    hand = build_worker(queue, engine, outputs, pace, handover)
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
    leave(engine)


def leave(engine: Engine) -> None:
    """End the process at once if a thread is still in the device, where Python's own end would abort it."""
    if not engine.close(0):
        log.warning("the device is still at work; the process ends without it")
        logging.shutdown()
        os._exit(0)


class Server(uvicorn.Server):
    """uvicorn, but it greets once it listens, answers until the service is drained, and ends with exit code 0."""

    def __init__(self, config: uvicorn.Config, *, drain: Callable[[], None], greeting: str) -> None:
        super().__init__(config)
        self._drain, self._greeting = drain, greeting
        self._told: str | None = None
        self._draining: threading.Thread | None = None

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
        self._told = signal.Signals(sig).name  # no more in here: it may have come in the middle of anything
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)

    async def on_tick(self, counter: int) -> bool:
        """What is done ten times a second: look whether a signal came, and whether all is over."""
        if self._told and self._draining is None:
            log.info("%s: no new jobs; what runs may finish. A second signal ends at once", self._told)
            self._draining = threading.Thread(target=self._drain_and_exit, name="drain", daemon=True)
            self._draining.start()
        return await super().on_tick(counter)

    def _drain_and_exit(self) -> None:
        try:
            self._drain()
        finally:
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)


def _adopt(descriptor: int) -> socket.socket:
    """The socket that an earlier life of this process listened on."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    return listener


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises Misconfigured."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # by name, or asyncio leaves Nagle on
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


def _shown_host(host: str) -> str:
    """The host of a URL that works on this machine."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - shown, not bound
    return f"[{host}]" if ":" in host else host


def _load(config: uvicorn.Config) -> None:
    """Have uvicorn read what it is to serve with. Raises Misconfigured."""
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise Misconfigured(
            f"https cannot be served with the certificate {config.ssl_certfile} and the key {config.ssl_keyfile}: "
            f"{error.strerror or error}; `diffusion-api certificate` makes a pair"
        ) from error


def _show_first_key(settings: Settings, url: str) -> None:
    """Make the key that an installation needs for its first caller, if it does, and show it. Raises Misconfigured."""
    key = build_access(settings).first_key()
    if key:
        print(
            f"An admin's key was made, as {settings.host or 'every address'} is not loopback. It is shown this once:\n"
            f"  {key}\n"
            f"  curl -s -H 'X-API-Key: {key}' {url}/models\n"
            "Make others with `diffusion-api keys add NAME`; end this one with `diffusion-api keys revoke first`.",
            flush=True,
        )


def _show_link(settings: Settings, url: str) -> None:
    """Print what makes a picture when it is opened in a browser, with a token that is good for four hours.

    Raises Misconfigured, KeysUnreadable.
    """
    query: dict[str, str | int] = {"prompt": "corgi", "steps": 20}
    with contextlib.suppress(InvalidRequest):  # no model is the default: then the link does not name it either
        model = build_library(settings).default()
        query |= {"model": model.name} | dict(zip(("width", "height"), model.default_size, strict=True))
    query["token"] = build_access(settings).starter_token()
    print(f"Try visiting {url}/txt2img?{urlencode(query)}", flush=True)


def _greeting(url: str, *, open_to_all: bool, model: str | None) -> str:
    key = "" if open_to_all else ' -H "X-API-Key: $DIFFUSION_API_KEY"'
    body = '{"prompt": "a large red circle on a blue background", "seed": 1}'
    choice = "" if model else '\nWith several models of your own, add "model": "<name>" or set DIFFUSION_API_MODEL.'
    return (
        f"Diffusion API serves {url} (docs: {url}/docs). Try:\n"
        f"  curl -s {url}/txt2img{key} -H 'Content-Type: application/json' -d '{body}'\n"
        f"  curl -s {url}/queue/<job_id>{key}{choice}"
    )
