"""What the clients ask and in which order, without asking it: the same for the one that blocks and the one that awaits."""

from __future__ import annotations

import base64
import json
import math
import time
import uuid
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import httpx

from diffusion_api.client.answers import (
    ApiError,
    Event,
    JobCancelled,
    JobFailed,
    NotThere,
    Row,
    Status,
    Submitted,
    fields,
    refusal,
)
from diffusion_api.errors import InvalidRequest
from diffusion_api.schema.job import State

LONGEST_WAIT = 30.0
"""Seconds that one request waits for the end of a job."""

PAGE = 200
"""Rows of a list that one request asks for at most."""

Kind = Literal["txt2img", "img2img", "inpaint", "upscale"]
"""What a job is: the route that takes it."""

OnProgress: TypeAlias = Callable[[Status], None]

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """A request to be sent; ``wait`` are seconds that its answer may take longer than others."""

    method: str
    path: str
    json: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0


@dataclass(frozen=True)
class Pause:
    """So many seconds to be waited."""

    seconds: float


Flow: TypeAlias = Generator[Ask | Pause, Any, T]
"""Yields what is to be done, is sent the answer to each request, and returns what came of it."""


def patient(flow: Flow[T], patience: float) -> Flow[T]:
    """The flow, whose requests are sent again while the service is busy and says when, each for ``patience`` seconds at most.

    Raises ApiError.
    """
    answer = None
    while True:
        try:
            step = flow.send(answer)
        except StopIteration as end:
            found: T = end.value
            return found
        answer = None
        if isinstance(step, Pause):
            yield step
        else:
            answer = yield from _taken(step, patience)


def _taken(ask: Ask, patience: float) -> Flow[httpx.Response]:
    until = time.monotonic() + patience
    while True:
        response: httpx.Response = yield ask
        if response.is_success:
            return response
        error = refusal(response)
        if error.retry_after is None or time.monotonic() + error.retry_after > until:
            raise error
        yield Pause(max(error.retry_after, 0.1))


def told(path: str, **params: str | None) -> Flow[dict[str, Any]]:
    """What a route answers; a parameter that is None is left out."""
    return fields((yield Ask("GET", path, params={name: value for name, value in params.items() if value is not None})))


def rows(path: str, key: str) -> Flow[list[Row]]:
    """What a route lists under this key."""
    found: list[Row] = fields((yield Ask("GET", path)))[key]
    return found


def asked(path: str, body: Mapping[str, Any] | None = None) -> Flow[dict[str, Any]]:
    """What a route answers to a POST that makes no job."""
    return fields((yield Ask("POST", path, json=_sendable(body))))


def load(model: str) -> Flow[str]:
    """Have a model loaded, by any of its names; the name that it has at the service."""
    name: str = (yield from asked(f"/models/{quote(model, safe='')}/load"))["model"]
    return name


def reproduce(job_id: str, key: str | None) -> Flow[Submitted]:
    """Make the pictures of a job again."""
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    return _submitted((yield Ask("POST", f"{path_of(job_id)}/reproduce", headers=headers)))


def submit(kind: Kind, body: Mapping[str, Any], key: str | None) -> Flow[Submitted]:
    """Post a job under a key by which the service knows it again, so that it becomes one job however often it is sent.

    Raises InvalidRequest for a dry run, which is no job.
    """
    if body.get("dry_run"):
        raise InvalidRequest("dry_run makes no job; POST it yourself, as docs/jobs.md shows", field="dry_run")
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    response = yield Ask("POST", f"/{kind}", json=_sendable(body), headers=headers)
    return _submitted(response)


def _submitted(response: httpx.Response) -> Submitted:
    answer = fields(response)
    return Submitted(answer["job_id"], answer["status"], answer.get("seed"), tuple(answer.get("warnings", ())))


def job(job_id: str, wait: float, pictures: bool) -> Flow[Status]:
    """Where a job stands: now, or once it has ended, at the latest after ``wait`` seconds."""
    params = ({"wait": f"{wait:g}"} if wait else {}) | ({} if pictures else {"image": "false"})
    response = yield Ask("GET", path_of(job_id), params=params, wait=wait)
    status: Any = fields(response)
    found: Status = status
    return found


def cancel(job_id: str, partial: bool) -> Flow[Status]:
    """End a job."""
    params = {"partial": "true"} if partial else {}
    response = yield Ask("DELETE", path_of(job_id), params=params)
    status: Any = fields(response)
    found: Status = status
    return found


def wait(
    job_id: str, on_progress: OnProgress | None, interval: float, timeout: float | None, pictures: bool
) -> Flow[Status]:
    """Ask for a job until it has ended; the service does the waiting. Raises TimeoutError."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    seconds = 0.0
    while True:
        began = time.monotonic()
        status = yield from job(job_id, seconds, pictures)
        if on_progress:
            on_progress(status)
        if State(status["state"]).terminal:
            return status
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"job {job_id} is {status['state']} after {timeout:g} seconds")
        if seconds:  # a service that cannot wait for us has answered at once
            yield Pause(max(0.0, min(interval - (time.monotonic() - began), left)))
        seconds = min(interval if on_progress else LONGEST_WAIT, left)


def result(*arguments: Any) -> Flow[Status]:
    """Like :func:`wait`, but a job without a picture is an error. Raises JobFailed."""
    status = yield from wait(*arguments)
    if "output_path" not in status:
        raise (JobCancelled if status.get("cancelled") else JobFailed)(status)
    return status


def jobs(states: Collection[str], limit: int) -> Flow[list[Row]]:
    """The newest jobs in these states, page by page."""
    found: list[Row] = []
    cursor = None
    while len(found) < limit:
        params = {"state": list(states), "limit": min(PAGE, limit - len(found))}
        params |= {"cursor": cursor} if cursor else {}
        page = fields((yield Ask("GET", "/queue", params=params)))
        found += page["jobs"]
        cursor = page["next"]
        if cursor is None:
            break
    return found


def picture(job_id: str, number: int) -> Flow[bytes]:
    """The file of a picture."""
    response: httpx.Response = yield Ask("GET", f"{path_of(job_id)}/image/{number}")
    return response.content


def save(job_id: str, to: Path) -> Flow[list[Path]]:
    """Write the pictures of a job into a folder, made if need be, or into files of this name if it has an ending."""
    status = yield from job(job_id, 0, False)
    if "output_path" not in status:
        raise NotThere(404, f"job {job_id} has no picture: its state is {status['state']}")
    in_folder = to.is_dir() or not to.suffix
    if in_folder:
        to.mkdir(parents=True, exist_ok=True)
    names = [PurePosixPath(path).name for path in status.get("output_paths", [status["output_path"]])]
    saved = []
    for number, name in enumerate(names):
        numbered = to.with_stem(f"{to.stem}-{number}") if len(names) > 1 else to
        path = to / name if in_folder else numbered
        path.write_bytes((yield from picture(job_id, number)))
        saved.append(path)
    return saved


class Events:
    """Reads the events of a job from the lines of a stream (HTML Living Standard, 9.2.6)."""

    def __init__(self) -> None:
        self._name, self._data = "", ""

    def read(self, line: str) -> Event | None:
        """The event that ends with this line, if one does. Raises ApiError for what is none of ours."""
        name, _, text = line.partition(":")
        if name == "event":
            self._name = text.strip()
        elif name == "data":
            self._data += text.strip()
        elif not line and self._data:
            try:
                event = Event(self._name, json.loads(self._data))
            except ValueError as error:
                raise ApiError(200, f"an event is no JSON: {self._data[:200]!r}") from error
            self._data = ""
            return event
        return None


def path_of(job_id: str) -> str:
    """The path of a job, whatever its id holds."""
    return f"/queue/{quote(job_id, safe='')}"


def _sendable(content: Any) -> Any:
    """A body with its pictures as the service takes them: files and bytes become base64."""
    match content:
        case Path():
            return _sendable(content.read_bytes())
        case bytes():
            return base64.b64encode(content).decode()
        case Mapping():
            return {name: _sendable(part) for name, part in content.items()}
        case list() | tuple():
            return [_sendable(part) for part in content]
    return content
