"""What the service answers, and how it refuses, as the client has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import httpx

from diffusion_api.errors import DiffusionApiError
from diffusion_api.schema.job import State


class ApiError(DiffusionApiError):
    """The service refused. ``status_code`` is HTTP's; ``message`` is the service's own text.

    ``retry_after`` are the seconds after which it may take the same request, None where it does not say so.

        ApiError
        ├── BadRequest      400, 413, 415, 422: the request is wrong; the text has the field, the value and the choices
        ├── NotAllowed      401, 403: a key is missing, wrong, or not enough
        ├── NotThere        404, 410: no such job or picture, or no longer
        ├── WrongState      409: the job has not ended yet, or has already
        └── Busy            429, 503, 507: not now
    """

    def __init__(self, status_code: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} (HTTP {status_code})")
        self.status_code = status_code
        self.message = message
        self.retry_after = retry_after


class BadRequest(ApiError):
    """The request is wrong."""


class NotAllowed(ApiError):
    """A key is missing, wrong, or not enough."""


class NotThere(ApiError):
    """There is no such job or picture, or no longer."""


class WrongState(ApiError):
    """The job is in no state for that."""


class Busy(ApiError):
    """Not now."""


KINDS: dict[int, type[ApiError]] = {
    **dict.fromkeys((400, 413, 415, 422), BadRequest),
    **dict.fromkeys((401, 403), NotAllowed),
    **dict.fromkeys((404, 410), NotThere),
    409: WrongState,
    **dict.fromkeys((429, 503, 507), Busy),
}


class JobFailed(DiffusionApiError):
    """The job ended without a picture; ``status`` is its last one."""

    def __init__(self, status: Status) -> None:
        super().__init__(f"job {status['job_id']} ended without a picture: {status['error']}")
        self.status = status


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""


@dataclass(frozen=True)
class Submitted:
    """A job that the service took. ``seed`` is the one it will use, drawn by the service if the request had none; None for a
    job that draws nothing. ``warnings`` say what was rounded, skipped or not understood.
    """

    job_id: str
    status: str
    seed: int | None
    warnings: tuple[str, ...] = ()


class Status(TypedDict, total=False):
    """What ``GET /queue/{id}`` answers. ``progress`` is 0 to 100; the keys from ``payload`` on come with the end."""

    status: str
    job_id: str
    progress: float
    current_phase: str
    state: str
    error: str | None
    detail: str
    warnings: list[str]
    payload: dict[str, Any]
    image: str
    """The file, in base64."""
    images: list[str]
    """All of them, where there are several."""
    image_url: str
    image_urls: list[str]
    output_path: str
    """Where the service keeps it, from its home folder."""
    output_paths: list[str]
    width: int
    height: int
    file_type: str
    jpeg_quality: int | None
    generation_time_sec: float
    memory_before_mb: float
    memory_after_mb: float
    seed: int
    position: int
    """While it waits: how many are before it."""
    eta_seconds: float | None
    """While it waits or runs: seconds until it will probably have ended; None when that is not known."""
    cancelled: bool
    """There, and true, if it was cancelled: ``state`` is ``error`` then."""


@dataclass(frozen=True)
class Event:
    """What happened to a job. ``name`` is ``state`` or ``progress``, and ``data`` then the status without pictures, or
    ``preview``, with a small JPEG in base64 under that name.
    """

    name: str
    data: dict[str, Any]

    @property
    def last(self) -> bool:
        """Whether the job has ended."""
        return self.name == "state" and State(self.data["state"]).terminal


Row = dict[str, Any]
"""A job, a model, a LoRA, … in a list, with the keys that the service's manual has."""


def refusal(response: httpx.Response) -> ApiError:
    """The error of an answer that is none."""
    kind = KINDS.get(response.status_code, ApiError)
    return kind(response.status_code, _reason(response), _retry_after(response))


def value(response: httpx.Response) -> Any:
    """What a JSON answer holds. Raises ApiError."""
    try:
        return response.json()
    except ValueError as error:
        asked = response.request
        text = f"{asked.method} {asked.url.path}: not JSON: {response.text[:200]!r}"
        raise ApiError(response.status_code, text) from error


def fields(response: httpx.Response) -> dict[str, Any]:
    """What a JSON answer holds that must be an object. Raises ApiError."""
    found = value(response)
    if not isinstance(found, dict):
        asked = response.request
        raise ApiError(200, f"{asked.method} {asked.url.path}: an object was expected, not {str(found)[:200]!r}")
    return found


def _reason(response: httpx.Response) -> str:
    """The service's reason; the start of the body where something else answered."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        for key in ("error", "detail"):
            if body.get(key):
                return str(body[key])
    return response.text[:200].strip() or response.reason_phrase


def _retry_after(response: httpx.Response) -> float | None:
    said = response.headers.get("Retry-After", "")
    return float(said) if KINDS.get(response.status_code) is Busy and said.isdecimal() else None
