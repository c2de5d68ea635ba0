"""All that a dialect may call."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from diffusion_api import logs, prompt
from diffusion_api.blobs import name_of
from diffusion_api.catalog import styles
from diffusion_api.catalog.detect import Unrecognised
from diffusion_api.catalog.finder import Finder
from diffusion_api.engine.estimate import Estimate, estimate
from diffusion_api.errors import (
    Conflict,
    Gone,
    InputLost,
    InvalidImage,
    InvalidRequest,
    Misconfigured,
    NoChecker,
    NotFound,
    QueueUnusable,
    ShuttingDown,
    TooLarge,
    UnknownModel,
    Unreachable,
    UrlRefused,
)
from diffusion_api.links import FOREVER, NO_BLOB
from diffusion_api.pace import Forecast
from diffusion_api.quotas import Minutes
from diffusion_api.schema.caller import Caller
from diffusion_api.schema.job import Earlier, File, Image, Job, State
from diffusion_api.schema.request import (
    Caption,
    Embed,
    Img2Img,
    Reading,
    Request,
    Sampling,
    Txt2Img,
    Upscale,
    model_of,
    policy_for,
)
from diffusion_api.storage import Storage
from diffusion_api.usage import Usage, Use
from diffusion_api.waiters import Waiters

if TYPE_CHECKING:
    from diffusion_api.catalog.layouts import Kind
    from diffusion_api.catalog.library import Asset, Library, Model
    from diffusion_api.catalog.lora_list import Listed
    from diffusion_api.catalog.styles import Style
    from diffusion_api.engine.base import Engine
    from diffusion_api.links import Links
    from diffusion_api.llm import Llm
    from diffusion_api.lora_shop import LoraShop
    from diffusion_api.outputs import Outputs
    from diffusion_api.pace import Pace
    from diffusion_api.queues.base import Key, Place, Queue, Snapshot, Wanted
    from diffusion_api.remote_pictures import RemotePictures
    from diffusion_api.schema.report import DeviceReport, HeldModel, Room, WorkerReport
    from diffusion_api.settings import Settings
    from diffusion_api.webhooks import Webhooks

log = logging.getLogger(__name__)

GIB = 2**30
MAX_PARTS = 32
"""Parts of a prompt between ANDs; each is an evaluation at every step."""

MAX_NETWORKS = 64
"""LoRAs of one job; each is read and added to the weights."""

MAX_TEXTS = 200_000
"""Characters of all the texts that a prompt is at its steps; each is encoded before the first one."""

DECODED_AT_ONCE = 2
"""Pictures that are being looked at; each may take ten bytes for a pixel."""

NO_CHECKER = (
    "the operator requires that every picture is checked, and no safety checker is installed; the operator can install one: "
    "the files of CompVis/stable-diffusion-safety-checker in stable_diffusion/safety_checker/ (docs/safety.md)"
)
SHUTTING_DOWN = "the service is shutting down"


@dataclass(frozen=True)
class Health:
    """The state of the box, in the words of ``GET /health``. Sizes in GiB, shares in percent."""

    cpu_count: int
    memory_total_gb: float
    memory_available_gb: float
    memory_percent: float
    disk_usage_percent: float
    outputs_available: bool
    outputs_free_gb: float
    active_jobs: int | None
    models: int
    loras: int
    device: DeviceReport | None
    workers: tuple[WorkerReport, ...]
    paused: bool
    disk: Mapping[str, Use]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Readiness:
    """Whether a job would be run if it was posted now: not for any of the ``reasons``, and later while ``loading``."""

    reasons: tuple[str, ...] = ()
    loading: bool = False
    paused: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture that a request brings along: the name that it will be stored by, its bytes, its size in pixels, upright."""

    name: str
    data: bytes
    width: int
    height: int


class Service:
    """Submits, looks up and cancels jobs; knows what is installed."""

    def __init__(
        self,
        settings: Settings,
        library: Library,
        queue: Queue,
        outputs: Outputs,
        engine: Engine | None,
        *,
        pace: Pace | None = None,
        webhooks: Webhooks | None = None,
        links: Links | None = None,
        remote: RemotePictures | None = None,
        shop: Callable[[], LoraShop] | None = None,
        llm: Llm | None = None,
    ) -> None:
        self.settings = settings
        self._links = links
        self._remote, self._llm = remote, llm
        self._build_shop = shop
        self._shop: LoraShop | None = None
        self._opening = threading.Lock()
        self._webhooks = webhooks
        self._library, self._queue, self._outputs, self._engine = library, queue, outputs, engine
        self._finder = Finder(library)
        self._pace = pace
        self._forecast = Forecast(queue, pace) if pace else None
        self._waiters = Waiters(queue)
        self._storage = Storage(queue.check, outputs.check)
        self._usage = Usage({folder.relative_to(settings.home).as_posix(): folder for folder in settings.folders})
        self._decoding = threading.Semaphore(DECODED_AT_ONCE)
        self._pixels = Minutes(settings.pixels_per_minute, "pixels")
        self._draining = False

    def submit(self, job: Job, *, key: Key | None = None, pictures: Iterable[Picture] = ()) -> Job:
        """Store a new job, and the ``pictures`` that it brings along before it; when this returns it is on disk. The job as
        stored: without the pictures in its payload, and with the operator's deadline if it had none. It is an earlier job,
        with another id, if its caller sent that with the same ``key``. Raises InvalidRequest, TooLarge, OutOfMemory,
        NoChecker, KeyReused, RateLimited, ShuttingDown, DiskFull, QueueUnusable.
        """
        from diffusion_api.images import sanitized

        if self._draining:
            raise ShuttingDown(SHUTTING_DOWN)
        job = job.model_copy(update={"request": self._guarded(job.request)})
        self.check(job.request)
        self._fits(job.request)
        self._pixels.take(job.caller, _pixels(job.request))
        stored = job.model_copy(update={"payload": sanitized(job.payload), "deadline": self._deadline(job)})
        with self._promised(stored):
            for picture in pictures:
                self._queue.store_input(picture.data)
            kept = self._queue.enqueue(stored, key=key)
        if kept.id == stored.id and kept.error:
            log.info("job %s ended before it began: %s", kept.id, kept.error.message)
        elif kept.id == stored.id:
            self._log_queued(kept)
        else:
            self._repeated(stored, kept)
        return kept

    def reproduce(self, job_id: str, caller: Caller, *, key: Key | None = None) -> tuple[Job, bool]:
        """Store a new job with the request of one that is done; once it is done as well, it knows whether it made the same
        pixels. The job, and whether it is new and not one of the same ``key``. Raises what :meth:`get` and :meth:`submit`
        raise, Conflict for a job that is not done, and UnknownModel.
        """
        earlier = self.get(job_id, caller).job
        if earlier.state is not State.DONE or earlier.result is None:
            raise Conflict(f"job {job_id} has no whole picture that could be made again: its state is {earlier.state}")
        if not isinstance(earlier.request, Upscale):
            self.model(earlier.request.model)
        made = Earlier(id=earlier.id, result=earlier.result)
        again = Job(request=earlier.request, payload=earlier.payload, caller=caller.id, reproduces=made)
        stored = self.submit(again, key=key)
        return stored, stored.id == again.id

    def picture(self, text: str, field: str) -> Picture:
        """The picture in base64 or a data URL, looked at to its last pixel. Raises InvalidImage and TooLarge of that field."""
        from diffusion_api import images

        return self.picture_of(images.from_base64(text, max_bytes=self.settings.max_body, field=field), field)

    def picture_of(self, data: bytes, field: str) -> Picture:
        """The same of a picture's bytes."""
        from diffusion_api import images

        try:
            with self._decoding:
                image = images.decode(data, max_pixels=self.settings.max_input_pixels)
        except InvalidImage as error:
            raise InvalidImage(f"{field}: {error}", field=field) from error
        except TooLarge as error:
            raise TooLarge(f"{field}: {error}") from error
        return Picture(name_of(data), data, *image.size)

    async def picture_at(self, url: str, field: str) -> Picture:
        """The same of a picture at a URL: a blob of ours, under whatever name we are called, or what lies on a host that the
        operator listed. No thread is held while it is fetched. Raises UrlRefused, Unreachable, InvalidImage and TooLarge of
        that field.
        """
        with suppress(NotFound):
            data = await anyio.to_thread.run_sync(self.blob, url.partition("?")[0].rpartition("/blob/")[2])
            return await anyio.to_thread.run_sync(self.picture_of, data, field)
        if self._remote is None:
            raise UrlRefused(
                f"{field} is a URL, and the operator of this service allows no hosts (setting picture_hosts); "
                "send the picture itself, in base64, or upload it to /blob",
                field=field,
            )
        data = await self._remote.fetch(url, field)
        return await anyio.to_thread.run_sync(self.picture_of, data, field)

    def estimate(self, request: Txt2Img | Img2Img) -> Estimate:
        """What a drawing would do and take. Raises InvalidRequest, TooLarge, and OutOfMemory for one that cannot fit."""
        self.check(request)
        model = self._library.resolve(request.model)
        try:
            return estimate(model, request, self._room())
        except Unrecognised as error:
            raise UnknownModel(f"model {model.name!r} cannot be used: {error}", field="model") from error

    def seconds(self, request: Request) -> float | None:
        """How long a job would run, from those before it; None when that cannot be known."""
        return self._pace.seconds(request) if self._pace else None

    def get(self, job_id: str, caller: Caller) -> Snapshot:
        """The job as it stands, if it is this caller's matter. Raises NotFound, Gone."""
        snapshot = self._queue.get(job_id)
        return self._found(job_id, snapshot if snapshot and caller.may_see(snapshot.job.caller) else None)

    def seconds_left(self, snapshot: Snapshot) -> float | None:
        """Seconds until a job that has not ended will have; None when that cannot be known."""
        return self._forecast.seconds_left(snapshot) if self._forecast else None

    def was_read(self, snapshot: Snapshot) -> None:
        """Let go of a result that may be read once, if it is one. Raises NotFound if another has read it meanwhile."""
        job_id = snapshot.job.id
        if not self.settings.delete_after_read or not snapshot.state.terminal:
            return
        if self._webhooks and snapshot.job.webhook:
            self._webhooks.settle(snapshot.job)
        if not self._queue.forget(job_id):
            # still there when its worker died in the middle of ending it: then it is read once more
            self._found(job_id, self._queue.get(job_id))

    async def wait(self, job_id: str, seconds: float, caller: Caller) -> None:
        """Return when the job has ended or there is none for this caller, or after ``seconds``. No thread is held
        meanwhile. Raises NotFound, Gone.
        """
        if not caller.admin:
            await anyio.to_thread.run_sync(self.get, job_id, caller)
        await self._waiters.ended(job_id, seconds)

    def changes(self, job_id: str, every: float) -> AsyncGenerator[Snapshot | None]:
        """A job that :meth:`get` has given to its caller, now and after each change, None for each ``every`` seconds without
        one. Ends when the job has, or is gone. No thread is held meanwhile.
        """
        return self._waiters.changes(job_id, every)

    def watch(self, job_id: str, timeout: float, caller: Caller) -> Iterator[Snapshot]:
        """Snapshots as the job changes, for at most ``timeout`` seconds. Raises NotFound, Gone."""
        if not caller.admin:
            self.get(job_id, caller)
        return self._queue.watch(job_id, timeout)

    def jobs(
        self, wanted: Wanted, caller: Caller, *, states: frozenset[State], limit: int, before: Place | None = None
    ) -> list[Snapshot]:
        """The newest jobs in these states that are wanted and this caller's matter; see :meth:`Queue.newest`.

        Raises QueueUnusable.
        """

        def visible(snapshot: Snapshot) -> bool:
            return caller.may_see(snapshot.job.caller) and wanted(snapshot)

        return self._queue.newest(visible, states=states, limit=limit, before=before)

    def cancel(self, job_id: str, caller: Caller, *, partial: bool = False) -> Snapshot:
        """Cancel a job: a waiting one ends at once, a running one at its next step, with the picture so far if
        ``partial``. Raises NotFound, Gone, and Conflict when it has ended otherwise already.
        """
        if not caller.admin:
            self.get(job_id, caller)
        snapshot = self._found(job_id, self._queue.cancel(job_id, partial=partial))
        if snapshot.state in (State.DONE, State.ERROR):
            raise Conflict(f"job {job_id} cannot be cancelled: its state is {snapshot.state}")
        return snapshot

    def pause(self) -> None:
        """Let no job begin until :meth:`resume`, also after a restart."""
        self._queue.pause()

    def resume(self) -> None:
        """Let jobs begin again."""
        self._queue.resume()

    def image(self, image: Image) -> bytes | None:
        """The file of a finished picture, None when it was deleted."""
        return self._outputs.read(image)

    def embeddings(self, file: File) -> bytes | None:
        """The file of a picture's numbers, JSON, None when it was deleted."""
        return self._outputs.read(file)

    def links(self, job: Job) -> list[str]:
        """For each picture of a job a URL that opens it for a day without a key; a path where the service does not know under
        which URL it is called. None at all where they cannot be signed.
        """
        if self._links is None or job.result is None:
            return []
        paths = [self._links.link(job.id, number) for number in range(len(job.result.images))]
        return [self.settings.public_url.rstrip("/") + path for path in paths if path]

    def linked(self, link: str) -> tuple[Snapshot, int]:
        """The job and the number of the picture that the end of such a URL opens. Raises NotFound, Gone, Misconfigured."""
        if self._links is None:
            raise NotFound("this service makes no links")
        job_id, number = self._links.opened(link)
        return self._found(job_id, self._queue.get(job_id)), number

    def upload(self, data: bytes, field: str) -> str:
        """Keep a picture for later requests; the path of its blob. Raises InvalidImage and TooLarge of that field, QueueFull,
        DiskFull, QueueUnusable, Misconfigured.
        """
        name = self._queue.store_input(self.picture_of(data, field).data)
        return self._blob(name, time.time())

    def blob_of(self, job: Job) -> str:
        """The path of the blob that is the first picture of a job that is done; always the same. Raises Misconfigured."""
        return self._blob(f"{job.id}.0", job.finished or job.created)

    def blob(self, text: str) -> bytes:
        """The picture that the end of such a path opens. Raises NotFound, Misconfigured."""
        if self._links is None:
            raise NotFound(NO_BLOB)
        name, _, number = self._links.blob_opened(text).partition(".")
        try:
            data = self._made(name, int(number)) if number else self._queue.read_input(name)
        except (Gone, InputLost):
            data = None
        if data is None:
            raise NotFound(NO_BLOB)
        return data

    def _made(self, job_id: str, number: int) -> bytes | None:
        snapshot = self._queue.get(job_id)
        images = snapshot.job.result.images if snapshot and snapshot.job.result else ()
        return self.image(images[number]) if number < len(images) else None

    def _blob(self, name: str, since: float) -> str:
        if self._links is None:
            raise Misconfigured("this service makes no links")
        hours = self.settings.keep_blobs_hours
        return self._links.blob(name, int(since + hours * 3600) if hours else FOREVER)

    def webhook(self, job: Job) -> dict[str, Any] | None:
        """Where the end of this job is told and how that went, None for a job that asked for nothing of the kind."""
        return self._webhooks.report(job) if self._webhooks and job.webhook else None

    async def ask(self, path: str, question: Mapping[str, str]) -> str:
        """What the operator's language model answers there. Raises Unreachable, also where there is none, BrokenDownload and
        UrlRefused.
        """
        if self._llm is None:
            raise Unreachable("the operator has named none: DIFFUSION_API_LLM_HOST")
        return await self._llm.ask(path, question)

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state. Raises QueueUnusable."""
        return self._queue.counts()

    def held(self) -> tuple[HeldModel, ...]:
        """The models in memory, in whatever process jobs run."""
        if self._engine:
            return self._engine.held
        return tuple(held for worker in self._workers() if worker.device for held in worker.device.models)

    def workers(self) -> list[WorkerReport]:
        """The last word of every worker that serves the queue. Raises QueueUnusable."""
        return self._queue.workers()

    def device(self) -> DeviceReport | None:
        """What a worker says of its device; None while none has."""
        if self._engine:
            return self._engine.report()
        return next((worker.device for worker in self._workers() if worker.device), None)

    def models(self) -> list[Model]:
        """Installed models."""
        return self._library.models()

    def labels(self) -> list[tuple[str, str]]:
        """Names of models with labels that may stand for them, by label."""
        return self._library.labels()

    def assets(self, kind: Kind) -> list[Asset]:
        """Installed LoRAs, VAEs, upscalers or embeddings."""
        return self._library.assets(kind)

    def asset(self, kind: Kind, name: str) -> Asset | None:
        """The file of that kind that a caller means."""
        return self._library.find_asset(kind, name)

    def hash_soon(self, kind: Kind) -> None:
        """Have the hashes of all files of a kind made by and by, on a thread of their own."""
        self._finder.hash_soon(kind)

    def lora_list(self) -> dict[str, Listed]:
        """What is known of LoRAs by name: those of ``lora_list.json``, and those of which there is only the file."""
        return self._library.lora_list()

    async def add_lora(self, wanted: str) -> str:
        """Have a LoRA of Civitai, by number or words: see :meth:`LoraShop.add`. Raises what that raises, and ShuttingDown."""
        shop = await anyio.to_thread.run_sync(self._opened_shop)
        return await shop.add(wanted)

    def told(self, kind: Kind, name: str, hashed: str | None) -> tuple[Asset | None, bool]:
        """The file that a text means: by the hash that it tells, else by its name; and whether it was the hash."""
        return self._finder.find(kind, name, hashed)

    def warm_up(self, name: str) -> Model:
        """Have a model loaded before a job asks for it; it is loaded when the jobs at hand are done. Raises UnknownModel, and
        Conflict where the jobs run in other processes.
        """
        model = self._library.resolve(name)
        if self._engine is None:
            raise Conflict(
                "the jobs run in other processes; DIFFUSION_API_WARM_UP says what these load when they start"
            )
        self._engine.warm_up(model.name)
        return model

    def absence(self, name: str) -> str:
        """Why no file has that name, as the end of a sentence."""
        return self._library.absence(name)

    def model(self, name: str | None) -> Model:
        """The model that a request means. Raises UnknownModel."""
        return self._library.resolve(name)

    def chosen(self, name: str | None) -> tuple[Model, list[str]]:
        """The model that a drawing is made with, and what its caller should know of that: where the operator allows it, the
        default one stands in for one that is not installed. Raises UnknownModel with the choices.
        """
        try:
            return self._library.resolve(name), []
        except UnknownModel:
            if name is None or not self.settings.model_fallback:
                raise
        model = self._library.default()
        return model, [f"model {name!r} {self.absence(name)}: {model.name!r} was used in its place"]

    def styles(self) -> Mapping[str, Style]:
        """Installed styles by name."""
        return styles.read(self._library.styles_files())

    def drain(self) -> None:
        """Take no new job from now on; everything else is answered as before."""
        self._draining = True

    def close(self) -> None:
        """Let nobody wait any longer. May be called from any thread."""
        self._waiters.close()
        with self._opening:
            if self._shop:
                self._shop.close()

    def readiness(self) -> Readiness:
        """Whether a job would be run if it was posted now. What it takes to find out is done every few seconds only."""
        reasons = [SHUTTING_DOWN] if self._draining else []
        workers = self._workers()
        paused = self._queue.paused
        if paused:
            reasons.append(paused)
        if self._engine is None and not workers:
            reasons.append("no worker runs")
        silent = max((worker.quiet for worker in workers if worker.jobs), default=0.0)
        if silent > self.settings.stuck_after:
            reasons.append(f"the running job is stuck: nothing was heard of it for {silent:.0f} seconds")
        return Readiness(
            paused=paused is not None,
            reasons=(*reasons, *self._storage.reasons()),
            loading=self._engine is not None and self._engine.report() is None,
        )

    def health(self) -> Health:
        """Real numbers, read now. A queue that cannot be read makes a warning and no error."""
        import psutil

        memory = psutil.virtual_memory()
        settings = self.settings
        used, free = _space(settings.home)
        workers = self._workers()
        outputs_available = settings.outputs_dir.is_dir() and os.access(settings.outputs_dir, os.W_OK)
        models = len(self._library.models())
        found = (
            (memory.percent > 90, "High memory usage"),
            (used > 90, "High disk usage"),
            (models == 0, "No models found"),
            (not outputs_available, "Outputs directory not accessible"),
            (free < 1, "Low disk space for outputs"),
        )
        readiness = self.readiness()
        return Health(
            cpu_count=psutil.cpu_count() or 1,
            memory_total_gb=round(memory.total / GIB, 2),
            memory_available_gb=round(memory.available / GIB, 2),
            memory_percent=memory.percent,
            disk_usage_percent=round(used, 1),
            outputs_available=outputs_available,
            outputs_free_gb=round(free, 2),
            active_jobs=self._active_jobs(),
            models=models,
            loras=len(self._library.assets("lora")),
            device=self.device(),
            workers=tuple(workers),
            paused=readiness.paused,
            disk=self._usage.now(),
            warnings=(*(text for wrong, text in found if wrong), *readiness.reasons),
        )

    def _opened_shop(self) -> LoraShop:
        """The shop, which is built for the first who asks. Raises NotFound, ShuttingDown, Misconfigured."""
        if self._build_shop is None:
            raise NotFound("this service adds no LoRAs")
        with self._opening:
            if self._draining:
                raise ShuttingDown(SHUTTING_DOWN)
            self._shop = self._shop or self._build_shop()
            return self._shop

    def _found(self, job_id: str, snapshot: Snapshot | None) -> Snapshot:
        if snapshot is None:
            raise NotFound(f"Job {job_id} not found")
        return snapshot

    def _workers(self) -> list[WorkerReport]:
        try:
            return self._queue.workers()
        except QueueUnusable:
            return []

    def _active_jobs(self) -> int | None:
        try:
            counts = self._queue.counts()
        except QueueUnusable:
            return None
        return counts[State.QUEUED] + counts[State.PROCESSING]

    def _log_queued(self, job: Job) -> None:
        request = job.request
        size = f"{request.width}x{request.height}"
        if isinstance(request, Upscale):
            log.info("job %s queued: %s, upscaled to %s", job.id, request.upscaler, size)
            return
        if isinstance(request, Reading):
            log.info("job %s queued: %s, %s of a picture", job.id, request.model, request.kind)
            return
        prompt = repr(request.prompt) if self.settings.log_prompts else f"a prompt of {len(request.prompt)} characters"
        with logs.about(job.id, *request.prompts):
            log.info(
                "job %s queued: %s, %s, %d steps, n %d, %s",
                job.id, request.model, size, request.steps, request.count, prompt,
            )  # fmt: skip

    def _repeated(self, job: Job, earlier: Job) -> None:
        log.info("job %s sent again with its Idempotency-Key", earlier.id)
        if self._webhooks and job.webhook:
            self._webhooks.turn(job, earlier)

    def _deadline(self, job: Job) -> float | None:
        """Seconds that the job may run, within what the operator allows. Raises InvalidRequest."""
        longest = self.settings.max_seconds
        if longest and job.deadline and job.deadline > longest:
            raise InvalidRequest(
                f"deadline is {job.deadline:g}; at most {longest:g} seconds are allowed", field="deadline"
            )
        return job.deadline or longest or None

    def _promised(self, job: Job) -> AbstractContextManager[None]:
        """The context in which a job is stored, so that its webhook is promised exactly if it is. Raises InvalidRequest."""
        if job.webhook is None:
            return nullcontext()
        if self._webhooks is None:
            raise InvalidRequest(
                "webhook is refused: the operator of this service allows no hosts (setting webhook_hosts)",
                field="webhook",
            )
        return self._webhooks.promised(job)

    def check_length(self, prompt: str, negative_prompt: str) -> None:
        """Raises TooLarge for prompts beyond the operator's limit."""
        longest = self.settings.max_prompt
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if len(text) > longest:
                raise TooLarge(f"{name} has {len(text)} characters; at most {longest} are allowed")

    def _room(self) -> Room | None:
        """The memory of the worker that has most of it; None while none is known."""
        reports = [self._engine.report()] if self._engine else [worker.device for worker in self._workers()]
        return max((r.room for r in reports if r and r.room), key=lambda room: room.device, default=None)

    def checks(self, model: str | None) -> bool:
        """Whether a safety checker is installed for pictures of that model; None: for those of any."""
        return self._library.checker(model) is not None

    def _guarded(self, request: Request) -> Request:
        """The request under the operator's policy about pictures, where that is stricter than what it asks for itself."""
        if isinstance(request, Reading):
            return request
        return request.model_copy(update={"safety": policy_for(request, self.settings.safety)})

    def _fits(self, request: Request) -> None:
        """Refuse what can never fit. What cannot be known is left to the worker. Raises OutOfMemory."""
        if isinstance(request, Upscale):
            return
        room = self._room()
        for model in filter(None, map(self._library.find, dict.fromkeys(request.models))):
            if room:
                with suppress(Unrecognised):
                    estimate(model, request, room)

    def check(self, request: Request) -> None:
        """The operator's limits and the format's, before anything is written. Raises InvalidRequest, TooLarge, NoChecker."""
        limits = self.settings
        if isinstance(request, Reading):
            self._check_teller(request)
            return
        self._check_format(request)
        if policy_for(request, limits.safety) == "required" and not self.checks(model_of(request)):
            raise NoChecker(NO_CHECKER)
        if isinstance(request, Upscale):
            if request.width * request.height > limits.max_upscaled_pixels:
                raise InvalidRequest(
                    f"the picture would have {request.width}x{request.height} = {request.width * request.height} pixels; "
                    f"at most {limits.max_upscaled_pixels} are allowed",
                    field="width",
                )
            return
        self._check_steps(request)
        self._check_size(request)
        if request.count > limits.max_batch:
            raise InvalidRequest(f"n is {request.count}; it may be 1 to {limits.max_batch}", field="n")
        if request.width * request.height > limits.max_pixels:
            raise InvalidRequest(
                f"width x height is {request.width}x{request.height} = {request.width * request.height} pixels; "
                f"at most {limits.max_pixels} are allowed",
                field="width",
            )
        if request.seed_resize_width * request.seed_resize_height > limits.max_pixels:
            raise InvalidRequest(
                f"seed_resize_width x seed_resize_height is {request.seed_resize_width}x{request.seed_resize_height}; "
                f"at most {limits.max_pixels} pixels are allowed",
                field="seed_resize_width",
            )
        hires = request.hires if isinstance(request, Txt2Img) else None
        if hires and hires.width * hires.height > limits.max_pixels:
            raise InvalidRequest(
                f"hires makes {hires.width}x{hires.height} = {hires.width * hires.height} pixels; "
                f"at most {limits.max_pixels} are allowed",
                field="hires",
            )
        if hires and hires.steps > limits.max_steps:
            raise InvalidRequest(f"hires.steps is {hires.steps}; it may be 0 to {limits.max_steps}", field="hires")
        second = hires.width * hires.height * hires.steps if hires else 0
        work = (request.width * request.height * request.steps + second) * request.count / 1e6
        if work > limits.max_work and hires:
            raise InvalidRequest(
                f"both passes together are {work:.1f} megapixel-steps; at most {limits.max_work:g} are allowed",
                field="hires",
            )
        if work > limits.max_work:
            raise InvalidRequest(
                f"width x height x steps x n is {request.width}x{request.height}x{request.steps}x{request.count} = "
                f"{work:.1f} megapixel-steps; at most {limits.max_work:g} are allowed",
                field="steps",
            )
        self._check_texts(request, request.prompt, request.negative_prompt)
        if hires and (hires.prompt, hires.negative_prompt) != (request.prompt, request.negative_prompt):
            self._check_texts(request, hires.prompt, hires.negative_prompt)

    def _check_steps(self, request: Sampling | Caption) -> None:
        most = self.settings.max_steps
        if request.steps > most:
            raise InvalidRequest(f"steps is {request.steps}; it may be 1 to {most}", field="steps")

    def _check_size(self, request: Sampling) -> None:
        """A size that the model does not make: see :attr:`Model.tells`."""
        model = self._library.find(request.model)
        size = request.width, request.height
        if model and model.tells and size != model.default_size:
            width, height = model.default_size
            raise InvalidRequest(
                f"width x height is {size[0]}x{size[1]}; model {model.name!r} makes {width}x{height} and no other size",
                field="width",
            )

    def _check_teller(self, request: Caption | Embed) -> None:
        """Raises InvalidRequest for a model that tells nothing of pictures."""
        model = self._library.find(request.model)
        if model and not model.tells:
            others = ", ".join(each.name for each in self.models() if each.tells)
            choices = f"one of {others}" if others else "none is installed that does"
            raise InvalidRequest(f"model {model.name!r} tells nothing of pictures; {choices}", field="model")
        if isinstance(request, Caption):
            self._check_steps(request)

    def _check_format(self, request: Sampling | Upscale) -> None:
        from diffusion_api.images import MAX_SIDE  # NumPy and Pillow: a third of the time until the service answers

        last = (isinstance(request, Txt2Img) and request.hires) or request
        side, longest = max(last.width, last.height), MAX_SIDE[request.output.format]
        if side > longest:
            raise InvalidRequest(
                f"fileType is {request.output.format}, which holds {longest} pixels per side at most, not {side}; png does",
                field="fileType",
            )

    def _check_texts(self, request: Sampling, positive: str, negative: str) -> None:
        self.check_length(positive, negative)
        parsed = prompt.parse(positive)
        parts, networks = parsed.parts, len(request.loras) + len(parsed.networks)
        if networks > MAX_NETWORKS:
            raise TooLarge(f"the job asks for {networks} LoRAs; at most {MAX_NETWORKS} are allowed")
        if len(parts) > MAX_PARTS:
            raise TooLarge(f"prompt joins {len(parts)} parts by AND; at most {MAX_PARTS} are allowed")
        for name, each in (("prompt", parts), ("negative_prompt", (prompt.parse_negative(negative),))):
            size = sum(len(text) for part in each for _, text in part.schedule(request.steps))
            if size > MAX_TEXTS:
                raise TooLarge(
                    f"{name} changes so often that its texts have {size} characters in all; at most {MAX_TEXTS} are allowed"
                )


def _pixels(request: Request) -> int:
    """The pixels that a job makes in all, those of a second pass too."""
    if isinstance(request, Upscale | Reading):
        return request.width * request.height
    hires = request.hires if isinstance(request, Txt2Img) else None
    return (request.width * request.height + (hires.width * hires.height if hires else 0)) * request.count


def _space(folder: Path) -> tuple[float, float]:
    """How full the disk of a folder is, in percent, and the GiB that are free. One that cannot be asked counts as full."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return 100.0, 0.0
    return 100 * disk.used / disk.total, disk.free / GIB
