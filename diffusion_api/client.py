"""A client of the service, over HTTP.

client = Client("http://127.0.0.1:8000")
job = client.txt2img(prompt="a large red circle on a blue background", fileType="png")
status = client.wait(job.job_id)
picture = base64.b64decode(status["image"])
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict
from urllib.parse import quote

import httpx

from diffusion_api.errors import DiffusionApiError, Unavailable
from diffusion_api.schema.job import State


class ApiError(DiffusionApiError):
    """The service refused. ``status_code`` is HTTP's; ``message`` is the service's own text."""

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(f"{message} (HTTP {status_code})")
        self.status_code = status_code
        self.message = message


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


class Client:
    """Talks to the service at ``base_url``; ``timeout`` is seconds per request.

    Methods raise :class:`ApiError` when the service refuses, Unavailable when it does not answer. Proxies that the
    environment names are used, except for the machine itself.
    """

    def __init__(self, base_url: str, timeout: float = 30) -> None:
        url = httpx.URL(base_url)
        self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=not _is_loopback(url.host))

    def hello(self) -> dict[str, Any]:
        """``{"ok": true}`` from a service that is up."""
        return self._object("GET", "/hello")

    def models(self) -> Any:
        """The models that the service offers, as it lists them."""
        return self._call("GET", "/models")

    def txt2img(self, **fields: Any) -> Submitted:
        """Post a job; ``fields`` are those of ``POST /txt2img``, of which ``prompt`` is the one that must be there."""
        answer = self._object("POST", "/txt2img", json=fields)
        return Submitted(job_id=answer["job_id"], status=answer["status"], seed=answer["seed"])

    def job(self, job_id: str) -> Status:
        """Where a job stands."""
        answer: Any = self._object("GET", f"/queue/{quote(job_id, safe='')}")
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
        """Ask every ``interval`` seconds until the job has ended, well or not, and return its last status.

        ``on_progress`` gets every status, the last one too. Raises TimeoutError after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.job(job_id)
            if on_progress:
                on_progress(status)
            if State(status["state"]).terminal:
                return status
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is {status['state']} after {timeout:g} seconds")
            time.sleep(interval)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _object(self, method: str, path: str, json: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._call(method, path, json)
        if not isinstance(answer, dict):
            raise ApiError(200, f"{method} {path}: an object was expected, not {str(answer)[:200]!r}")
        return answer

    def _call(self, method: str, path: str, json: dict[str, Any] | None = None) -> Any:
        try:
            response = self._http.request(method, path, json=json)
        except httpx.TransportError as error:
            raise Unavailable(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error
        if not response.is_success:
            raise ApiError(response.status_code, _refusal(response))
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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
