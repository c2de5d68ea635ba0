"""A client of the service, over HTTP.

client = Client("http://127.0.0.1:8000")
job = client.txt2img(prompt="a large red circle on a blue background", fileType="png")
status = client.wait(job.job_id)
picture = base64.b64decode(status["image"])
"""

from __future__ import annotations

import ipaddress
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict
from urllib.parse import quote

import httpx

from diffusion_api.errors import DiffusionApiError, Unavailable
from diffusion_api.schema.job import State

LONGEST_WAIT = 30.0
"""Seconds that one request waits for the end of a job."""


class ApiError(DiffusionApiError):
    """The service refused. ``status_code`` is HTTP's; ``message`` is the service's own text.

    ``retry_after`` are the seconds after which it may take the same request, None where it does not say so.
    """

    def __init__(self, status_code: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} (HTTP {status_code})")
        self.status_code = status_code
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True)
class Submitted:
    """A job that the service took. ``seed`` is the one it will use, drawn by the service if the request had none."""

    job_id: str
    status: str
    seed: int


class Status(TypedDict, total=False):
    """What ``GET /queue/{id}`` answers. ``progress`` is 0 to 100; the keys from ``payload`` on come with the end."""

    status: str
    job_id: str
    progress: float
    current_phase: str
    state: str
    error: str | None
    payload: dict[str, Any]
    image: str
    """The file, in base64."""
    output_path: str
    """Where the service keeps it, from its home folder."""
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


class Client:
    """Talks to the service at ``base_url``; ``timeout`` is seconds per request.

    A job that the service has no room for now (503 or 507 with ``Retry-After``) is posted again when it says, for at most
    ``patience`` seconds. It bears a key by which the service knows it again, so that it becomes one job.

    Methods raise :class:`ApiError` when the service refuses, Unavailable when it does not answer. Proxies that the
    environment names are used, except for the machine itself.
    """

    def __init__(self, base_url: str, timeout: float = 30, *, patience: float = 60) -> None:
        url = httpx.URL(base_url)
        self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=not _is_loopback(url.host))
        self._timeout, self._patience = timeout, patience

    def hello(self) -> dict[str, Any]:
        """``{"ok": true}`` from a service that is up."""
        return self._object("GET", "/hello")

    def models(self) -> Any:
        """The models that the service offers, as it lists them."""
        return self._call("GET", "/models")

    def txt2img(self, **fields: Any) -> Submitted:
        """Post a job; ``fields`` are those of ``POST /txt2img``, of which ``prompt`` is the one that must be there."""
        key, until = str(uuid.uuid4()), time.monotonic() + self._patience
        while True:
            try:
                answer = self._object("POST", "/txt2img", json=fields, headers={"Idempotency-Key": key})
            except ApiError as error:
                if error.retry_after is None or time.monotonic() + error.retry_after > until:
                    raise
                time.sleep(max(error.retry_after, 0.1))
            else:
                return Submitted(job_id=answer["job_id"], status=answer["status"], seed=answer["seed"])

    def job(self, job_id: str, *, wait: float = 0) -> Status:
        """Where a job stands: now, or once it has ended, at the latest after ``wait`` seconds (0 to 60)."""
        parameters = {"wait": f"{wait:g}"} if wait else None
        answer: Any = self._object("GET", _path(job_id), params=parameters, timeout=self._timeout + wait)
        status: Status = answer
        return status

    def cancel(self, job_id: str, *, partial: bool = False) -> Status:
        """End a job that waits or runs; with ``partial``, a running one with the picture that it has so far.

        Raises ApiError 404 for an unknown job, 409 for one that has ended already.
        """
        answer: Any = self._object("DELETE", _path(job_id), params={"partial": "true"} if partial else None)
        status: Status = answer
        return status

    def wait(
        self,
        job_id: str,
        on_progress: Callable[[Status], None] | None = None,
        *,
        interval: float = 0.2,
        timeout: float | None = None,
    ) -> Status:
        """Wait until the job has ended, well or not, and return its last status.

        ``on_progress`` gets every status, the first at once, then one every ``interval`` seconds, then the last. Raises
        TimeoutError after ``timeout`` seconds.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        wait = 0.0
        while True:
            asked = time.monotonic()
            status = self.job(job_id, wait=wait)
            if on_progress:
                on_progress(status)
            if State(status["state"]).terminal:
                return status
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"job {job_id} is {status['state']} after {timeout:g} seconds")
            if wait:  # a service that cannot wait for us has answered at once
                time.sleep(max(0.0, min(interval - (time.monotonic() - asked), left)))
            wait = min(interval if on_progress else LONGEST_WAIT, left)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _object(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self._call(method, path, **options)
        if not isinstance(answer, dict):
            raise ApiError(200, f"{method} {path}: an object was expected, not {str(answer)[:200]!r}")
        return answer

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise Unavailable(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error
        if not response.is_success:
            raise ApiError(response.status_code, _refusal(response), _retry_after(response))
        try:
            return response.json()
        except ValueError as error:
            raise ApiError(response.status_code, f"{method} {path}: not JSON: {response.text[:200]!r}") from error


def _refusal(response: httpx.Response) -> str:
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
    return float(said) if response.status_code in (503, 507) and said.isdecimal() else None


def _path(job_id: str) -> str:
    return f"/queue/{quote(job_id, safe='')}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
