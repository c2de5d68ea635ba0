"""A job: a request with its history. Every change makes a new value; :func:`dumps` and :func:`loads` are its form on disk."""

from __future__ import annotations

import time
import uuid
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, ValidationError

from diffusion_api.schema.request import AnyRequest, Frozen

VERSION = 1


class State(StrEnum):
    """Where a job stands. ``LOADING`` and ``PROCESSING`` are told apart by its progress, not by its record."""

    QUEUED = "queued"
    LOADING = "loading"
    PROCESSING = "processing"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """True when nothing more will happen to the job."""
        return self in (State.DONE, State.ERROR, State.CANCELLED)


class Progress(Frozen):
    """How far a running job is. ``fraction`` is 0 to 1; ``phase`` is what it does, as callers are shown it.

    ``preview`` is a small picture of what is drawn, a JPEG in base64; None for a job that asked for none.
    """

    state: State = State.LOADING
    fraction: float = 0.0
    phase: str = "loading"
    step: int = 0
    steps: int = 0
    preview: str | None = None


class Image(Frozen):
    """One stored picture: its path relative to the installation's home, size in pixels, seed if it was drawn, its hash, and
    the hash of its ``pixels``, which is the same in any format.
    """

    path: str
    width: int
    height: int
    seed: int | None
    sha256: str
    pixels: str = ""
    infotext: str


class File(Frozen):
    """A stored file that is no picture: its path relative to the installation's home, and its hash."""

    path: str
    sha256: str


class LoraApplied(Frozen):
    """A LoRA that worked on a picture, and how strongly on the denoiser and on the text encoders."""

    name: str
    scale: float
    text_scale: float


def lora_skipped(name: str, reason: str) -> str:
    """How a caller is told that a LoRA did nothing."""
    return f"LoRA {name!r} was skipped: {reason}"


class LoraSkipped(Frozen):
    """A LoRA that was asked for in vain."""

    name: str
    reason: str


class Safety(Frozen):
    """What was done about pictures that a safety checker flags, and which of them it ``flagged``: of each picture whether, or
    nothing at all where none was looked at, which is ``off``.
    """

    applied: Literal["off", "blur", "refuse"] = "off"
    flagged: tuple[bool, ...] = ()

    @property
    def on(self) -> bool:
        """Whether the pictures were checked."""
        return self.applied != "off"


class Result(Frozen):
    """What a finished job made: pictures, a ``caption``, or a file of ``embeddings``. Times in seconds, memory in MiB (resident
    on a CPU, allocated on a GPU); ``memory_steps`` is what was done so that it fitted. ``made_with`` are the device and the
    versions of libraries.
    """

    images: tuple[Image, ...] = ()
    caption: str | None = None
    embeddings: File | None = None
    seconds: float
    memory_before_mb: float
    memory_after_mb: float
    loras_applied: tuple[LoraApplied, ...] = ()
    loras_skipped: tuple[LoraSkipped, ...] = ()
    memory_steps: tuple[str, ...] = ()
    made_with: dict[str, str] = Field(default_factory=dict)
    safety: Safety = Safety()

    def same_as(self, other: Result) -> bool:
        """Whether both made the same: the same pixels, words and numbers."""
        return self._made == other._made

    @property
    def _made(self) -> tuple[object, ...]:
        numbers = self.embeddings and self.embeddings.sha256
        return tuple(image.pixels for image in self.images), self.caption, numbers


class Earlier(Frozen):
    """What a job is to make again: the id of the job that made it first, and its result."""

    id: str
    result: Result


class Failure(Frozen):
    """Why a job ended without a result. ``kind`` is the error's class name, ``message`` may be shown to the caller."""

    kind: str
    message: str


class Job(Frozen):
    """One job. ``payload`` is the body as the client sent it (pictures replaced); times are epoch seconds.

    ``session`` is what its events are sent to, where the dialect has such. ``deadline`` is the seconds that it may run,
    ``webhook`` the URL that is told of its end. ``boot`` is the boot of the machine in which it was ``started``; a
    ``suspect`` had begun when its worker died, so it runs alone, and ``shared`` of its attempts ended so when others had
    begun as well. ``reproduces`` is the job that it makes again.
    """

    version: int = VERSION
    id: str = Field(default_factory=lambda: str(uuid.uuid4()))
    request: AnyRequest
    dialect: str = "native"
    payload: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    caller: str = ""
    session: str = ""
    priority: int = Field(default=0, ge=-9, le=9)
    deadline: float | None = Field(default=None, gt=0)
    webhook: str | None = None
    reproduces: Earlier | None = None
    created: float = Field(default_factory=time.time)
    state: State = State.QUEUED
    attempts: int = 0
    boot: str = ""
    suspect: bool = False
    shared: int = 0
    started: float | None = None
    finished: float | None = None
    result: Result | None = None
    error: Failure | None = None

    @property
    def begun(self) -> bool:
        """True while the job runs: it was charged and has not ended."""
        return self.started is not None and not self.state.terminal

    @property
    def matched(self) -> bool | None:
        """Whether it made the same again; None while that is not known."""
        if self.reproduces is None or self.result is None or self.state is not State.DONE:
            return None
        return self.result.same_as(self.reproduces.result)

    def charged(self, boot: str = "") -> Job:
        """The job with one more attempt on its account, about to use the device in that boot of the machine."""
        return self.model_copy(update={"attempts": self.attempts + 1, "started": time.time(), "boot": boot})

    def requeued(self) -> Job:
        """The job as it waits again."""
        return self.model_copy(update={"state": State.QUEUED, "started": None, "boot": ""})

    def uncharged(self) -> Job:
        """The job with its last attempt given back: it was stopped through no fault of its own."""
        return self.requeued().model_copy(update={"attempts": max(0, self.attempts - 1)})

    def succeeded(self, result: Result, warnings: tuple[str, ...] = ()) -> Job:
        """The job, done."""
        return self._ended(State.DONE, result=result, warnings=tuple(dict.fromkeys(self.warnings + warnings)))

    def failed(self, kind: str, message: str) -> Job:
        """The job, ended without a picture."""
        return self._ended(State.ERROR, error=Failure(kind=kind, message=message))

    def cancelled(self, result: Result | None = None) -> Job:
        """The job, cancelled by its caller; ``result`` is what there was so far, if the caller asked for it."""
        return self._ended(State.CANCELLED, error=Failure(kind="JobCancelled", message="cancelled"), result=result)

    def orphaned(self, *, max_attempts: int, alone: bool, boot: str = "") -> Job:
        """The job after the death of its worker, found in that ``boot``: waiting again, or ended without a picture.

        An attempt charged in another boot is given back: a reboot is nobody's fault. Otherwise the job may be what the
        worker died of, ``alone`` or one of several that had begun: it is a suspect until it passes alone, or its attempts
        are used up.
        """
        if self.started is not None and self.boot != boot:
            return self.uncharged()
        if self.attempts >= max_attempts:
            return self.failed("WorkerDied", f"the service stopped {self.attempts} times while running this job")
        if self.started is None:
            return self.requeued()
        return self.requeued().model_copy(update={"suspect": True, "shared": self.shared + (not alone)})

    def acquitted(self) -> Job:
        """The job with the attempts given back that ended in a crash beside others: it ended, so the crash was theirs."""
        return self.model_copy(update={"suspect": False, "shared": 0, "attempts": self.attempts - self.shared})

    def _ended(self, state: State, **changes: Any) -> Job:
        return self.model_copy(update={"state": state, "finished": time.time(), **changes})


class UnreadableRecord(ValueError):
    """Bytes that are no job record, or one of a newer version than this program writes."""


def dumps(job: Job) -> bytes:
    """The record as it is written to disk: UTF-8 JSON, one line."""
    return job.model_dump_json().encode()


def loads(data: bytes) -> Job:
    """The job in a record. Raises :class:`UnreadableRecord`."""
    try:
        job = Job.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnreadableRecord(f"not a job record: {where}: {first['msg']}") from error
    if job.version > VERSION:
        raise UnreadableRecord(
            f"written by a newer release: record version {job.version}, this one reads up to {VERSION}"
        )
    return job
