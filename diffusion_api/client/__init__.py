"""A client of the service, over HTTP: :class:`Client` blocks, :class:`AsyncClient` awaits.

with Client("http://127.0.0.1:8000") as client:
    job = client.txt2img(prompt="a large red circle on a blue background")
    client.result(job.job_id)
    client.save(job.job_id)
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import httpx

from diffusion_api.client import flows
from diffusion_api.client.answers import (
    ApiError,
    BadRequest,
    Busy,
    Event,
    JobCancelled,
    JobFailed,
    NotAllowed,
    NotThere,
    Row,
    Status,
    Submitted,
    WrongState,
    refusal,
)
from diffusion_api.client.flows import Ask, Flow, Kind, OnProgress, Pause
from diffusion_api.errors import Unavailable

__all__ = [
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Busy",
    "Client",
    "Event",
    "JobCancelled",
    "JobFailed",
    "Kind",
    "NotAllowed",
    "NotThere",
    "Row",
    "Status",
    "Submitted",
    "Unavailable",
    "WrongState",
]

T = TypeVar("T")


class Client:
    """Talks to the service at ``base_url`` with ``key``, if it asks for one; ``timeout`` is seconds per request.

    What the service has no room for now (429, 503 or 507 with ``Retry-After``) is asked again when it says, for at most
    ``patience`` seconds. A job bears a key by which the service knows it again, so that it becomes one job.

    Methods raise :class:`ApiError` when the service refuses, Unavailable when it does not answer. Proxies that the
    environment names are used, except for the machine itself.
    """

    def __init__(self, base_url: str, timeout: float = 30, *, key: str | None = None, patience: float = 60) -> None:
        self._http = httpx.Client(**_options(base_url, timeout, key))
        self._timeout, self._patience = timeout, patience

    def hello(self) -> dict[str, Any]:
        """``{"ok": true}`` from a service that is up."""
        return self._run(flows.told("/hello"))

    def health(self) -> dict[str, Any]:
        """How the service is: its device, its workers, its folders, what it warns of."""
        return self._run(flows.told("/health"))

    def models(self) -> list[Row]:
        """The installed models."""
        return self._run(flows.rows("/models", "models"))

    def loras(self) -> list[Row]:
        """The installed LoRAs."""
        return self._run(flows.rows("/loras", "loras"))

    def upscalers(self) -> list[Row]:
        """The upscalers."""
        return self._run(flows.rows("/upscalers", "upscalers"))

    def sampling_methods(self) -> dict[str, Any]:
        """The names of samplers and schedules."""
        return self._run(flows.told("/sampling_methods"))

    def capabilities(self, model: str | None = None) -> dict[str, Any]:
        """What may be asked of a model, or of the default one: its features, parameters and limits."""
        return self._run(flows.told("/capabilities", model=model))

    def submit(self, kind: Kind, body: dict[str, Any], *, key: str | None = None) -> Submitted:
        """Post a job. Pictures in the body may be base64, bytes or the path of a file.

        ``key`` is an Idempotency-Key of your own; the same key within a day is the same job.
        """
        return self._run(flows.submit(kind, body, key))

    def txt2img(self, **body: Any) -> Submitted:
        """Post a job; ``body`` has the fields of ``POST /txt2img``, of which ``prompt`` is the one that must be there."""
        return self.submit("txt2img", body)

    def img2img(self, **body: Any) -> Submitted:
        """Post a job that begins from the picture ``image``."""
        return self.submit("img2img", body)

    def inpaint(self, **body: Any) -> Submitted:
        """Post a job that paints a part of ``image`` anew, where ``mask`` is white."""
        return self.submit("inpaint", body)

    def upscale(self, **body: Any) -> Submitted:
        """Post a job that makes ``image`` larger."""
        return self.submit("upscale", body)

    def job(self, job_id: str, *, wait: float = 0, pictures: bool = True) -> Status:
        """Where a job stands: now, or once it has ended, at the latest after ``wait`` seconds (0 to 60).

        Without ``pictures`` the files are left out of the answer.
        """
        return self._run(flows.job(job_id, wait, pictures))

    def jobs(self, *states: str, limit: int = 50) -> list[Row]:
        """The newest jobs in these states, or in any, without their pictures."""
        return self._run(flows.jobs(states, limit))

    def cancel(self, job_id: str, *, partial: bool = False) -> Status:
        """End a job that waits or runs; with ``partial``, a running one with the picture that it has so far.

        Raises NotThere for an unknown job, WrongState for one that has ended already.
        """
        return self._run(flows.cancel(job_id, partial))

    def wait(
        self,
        job_id: str,
        on_progress: OnProgress | None = None,
        *,
        interval: float = 0.2,
        timeout: float | None = None,
        pictures: bool = True,
    ) -> Status:
        """Wait until the job has ended, well or not, and return its last status.

        ``on_progress`` gets every status, the first at once, then one every ``interval`` seconds, then the last. Raises
        TimeoutError after ``timeout`` seconds.
        """
        return self._run(flows.wait(job_id, on_progress, interval, timeout, pictures))

    def result(
        self,
        job_id: str,
        on_progress: OnProgress | None = None,
        *,
        interval: float = 0.2,
        timeout: float | None = None,
        pictures: bool = True,
    ) -> Status:
        """Like :meth:`wait`, for a job that must have made a picture. Raises JobFailed, or JobCancelled."""
        return self._run(flows.result(job_id, on_progress, interval, timeout, pictures))

    def picture(self, job_id: str, number: int = 0) -> bytes:
        """The file of a finished picture; ``number`` is which one of several, from 0."""
        return self._run(flows.picture(job_id, number))

    def save(self, job_id: str, to: Path = Path()) -> list[Path]:
        """Write the pictures of a job into the folder ``to``, made if need be; into a file of that name if it has an ending.

        Raises OSError.
        """
        return self._run(flows.save(job_id, to))

    def events(self, job_id: str) -> Iterator[Event]:
        """What happens to a job, from how it stands now to its end, as it happens.

        Raises Unavailable when the connection breaks before that; asked again, it begins with how the job then stands.
        """
        reader = flows.Events()
        try:
            with self._http.stream("GET", f"{flows.path_of(job_id)}/events") as response:
                if not response.is_success:
                    response.read()
                    raise refusal(response)
                for line in response.iter_lines():
                    if event := reader.read(line):
                        yield event
                        if event.last:
                            return
        except httpx.TransportError as error:
            raise _silence(self._http.base_url, error) from error
        raise Unavailable(f"the events of job {job_id} broke off before its end")

    def reproduce(self, job_id: str, *, key: str | None = None) -> Submitted:
        """Make the pictures of a done job again; ``reproduces`` in the new one's last status says whether they matched.

        ``key`` is an Idempotency-Key of your own.
        """
        return self._run(flows.reproduce(job_id, key))

    def img_info(self, image: Any) -> dict[str, Any]:
        """What a picture says of itself; ``image`` may be base64, bytes or the path of a file."""
        return self._run(flows.asked("/img-info", {"image": image}))

    def pause(self) -> None:
        """Let no job begin; only an admin may."""
        self._run(flows.asked("/queue/pause"))

    def resume(self) -> None:
        """Let jobs begin again; only an admin may."""
        self._run(flows.asked("/queue/resume"))

    def load(self, model: str) -> str:
        """Have a model loaded before a job asks for it, by any of its names; its own name. Only an admin may."""
        return self._run(flows.load(model))

    def ready(self) -> dict[str, Any]:
        """Whether a job would be run now. Raises Busy with the reasons where it would not."""
        return self._run(flows.told("/ready"))

    def aliases(self) -> list[Row]:
        """The labels that may stand for names of models, installed or not."""
        return self._run(flows.rows("/models/aliases", "models"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        flow, answer = flows.patient(flow, self._patience), None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                found: T = end.value
                return found
            answer = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                answer = self._answer(step)

    def _answer(self, ask: Ask) -> httpx.Response:
        try:
            return self._http.request(ask.method, ask.path, **_arguments(ask, self._timeout))
        except httpx.TransportError as error:
            raise _silence(self._http.base_url, error) from error


class AsyncClient:
    """:class:`Client` with methods to be awaited, on asyncio or trio; several jobs may be waited for at a time."""

    def __init__(self, base_url: str, timeout: float = 30, *, key: str | None = None, patience: float = 60) -> None:
        self._http = httpx.AsyncClient(**_options(base_url, timeout, key))
        self._timeout, self._patience = timeout, patience

    async def hello(self) -> dict[str, Any]:
        """``{"ok": true}`` from a service that is up."""
        return await self._run(flows.told("/hello"))

    async def health(self) -> dict[str, Any]:
        """How the service is."""
        return await self._run(flows.told("/health"))

    async def models(self) -> list[Row]:
        """The installed models."""
        return await self._run(flows.rows("/models", "models"))

    async def loras(self) -> list[Row]:
        """The installed LoRAs."""
        return await self._run(flows.rows("/loras", "loras"))

    async def upscalers(self) -> list[Row]:
        """The upscalers."""
        return await self._run(flows.rows("/upscalers", "upscalers"))

    async def sampling_methods(self) -> dict[str, Any]:
        """The names of samplers and schedules."""
        return await self._run(flows.told("/sampling_methods"))

    async def capabilities(self, model: str | None = None) -> dict[str, Any]:
        """What may be asked of a model."""
        return await self._run(flows.told("/capabilities", model=model))

    async def submit(self, kind: Kind, body: dict[str, Any], *, key: str | None = None) -> Submitted:
        """Post a job; see :meth:`Client.submit`."""
        return await self._run(flows.submit(kind, body, key))

    async def txt2img(self, **body: Any) -> Submitted:
        """Post a job that draws from words."""
        return await self.submit("txt2img", body)

    async def img2img(self, **body: Any) -> Submitted:
        """Post a job that begins from the picture ``image``."""
        return await self.submit("img2img", body)

    async def inpaint(self, **body: Any) -> Submitted:
        """Post a job that paints a part of ``image`` anew, where ``mask`` is white."""
        return await self.submit("inpaint", body)

    async def upscale(self, **body: Any) -> Submitted:
        """Post a job that makes ``image`` larger."""
        return await self.submit("upscale", body)

    async def job(self, job_id: str, *, wait: float = 0, pictures: bool = True) -> Status:
        """Where a job stands; see :meth:`Client.job`."""
        return await self._run(flows.job(job_id, wait, pictures))

    async def jobs(self, *states: str, limit: int = 50) -> list[Row]:
        """The newest jobs in these states, or in any, without their pictures."""
        return await self._run(flows.jobs(states, limit))

    async def cancel(self, job_id: str, *, partial: bool = False) -> Status:
        """End a job; see :meth:`Client.cancel`."""
        return await self._run(flows.cancel(job_id, partial))

    async def wait(
        self,
        job_id: str,
        on_progress: OnProgress | None = None,
        *,
        interval: float = 0.2,
        timeout: float | None = None,
        pictures: bool = True,
    ) -> Status:
        """Wait until the job has ended; see :meth:`Client.wait`."""
        return await self._run(flows.wait(job_id, on_progress, interval, timeout, pictures))

    async def result(
        self,
        job_id: str,
        on_progress: OnProgress | None = None,
        *,
        interval: float = 0.2,
        timeout: float | None = None,
        pictures: bool = True,
    ) -> Status:
        """Like :meth:`wait`, for a job that must have made a picture. Raises JobFailed, or JobCancelled."""
        return await self._run(flows.result(job_id, on_progress, interval, timeout, pictures))

    async def picture(self, job_id: str, number: int = 0) -> bytes:
        """The file of a finished picture; ``number`` is which one of several, from 0."""
        return await self._run(flows.picture(job_id, number))

    async def save(self, job_id: str, to: Path = Path()) -> list[Path]:
        """Write the pictures of a job into the folder ``to``, made if need be; into a file of that name if it has an ending.

        Raises OSError.
        """
        return await self._run(flows.save(job_id, to))

    async def events(self, job_id: str) -> AsyncIterator[Event]:
        """What happens to a job; see :meth:`Client.events`."""
        reader = flows.Events()
        try:
            async with self._http.stream("GET", f"{flows.path_of(job_id)}/events") as response:
                if not response.is_success:
                    await response.aread()
                    raise refusal(response)
                async for line in response.aiter_lines():
                    if event := reader.read(line):
                        yield event
                        if event.last:
                            return
        except httpx.TransportError as error:
            raise _silence(self._http.base_url, error) from error
        raise Unavailable(f"the events of job {job_id} broke off before its end")

    async def reproduce(self, job_id: str, *, key: str | None = None) -> Submitted:
        """Make the pictures of a done job again; see :meth:`Client.reproduce`."""
        return await self._run(flows.reproduce(job_id, key))

    async def img_info(self, image: Any) -> dict[str, Any]:
        """What a picture says of itself; ``image`` may be base64, bytes or the path of a file."""
        return await self._run(flows.asked("/img-info", {"image": image}))

    async def pause(self) -> None:
        """Let no job begin; only an admin may."""
        await self._run(flows.asked("/queue/pause"))

    async def resume(self) -> None:
        """Let jobs begin again; only an admin may."""
        await self._run(flows.asked("/queue/resume"))

    async def load(self, model: str) -> str:
        """Have a model loaded before a job asks for it, by any of its names; its own name. Only an admin may."""
        return await self._run(flows.load(model))

    async def ready(self) -> dict[str, Any]:
        """Whether a job would be run now. Raises Busy with the reasons where it would not."""
        return await self._run(flows.told("/ready"))

    async def aliases(self) -> list[Row]:
        """The labels that may stand for names of models, installed or not."""
        return await self._run(flows.rows("/models/aliases", "models"))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        flow, answer = flows.patient(flow, self._patience), None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                found: T = end.value
                return found
            answer = None
            if isinstance(step, Pause):
                await anyio.sleep(step.seconds)
            else:
                answer = await self._answer(step)

    async def _answer(self, ask: Ask) -> httpx.Response:
        try:
            return await self._http.request(ask.method, ask.path, **_arguments(ask, self._timeout))
        except httpx.TransportError as error:
            raise _silence(self._http.base_url, error) from error


def _options(base_url: str, timeout: float, key: str | None) -> dict[str, Any]:
    url = httpx.URL(base_url)
    headers = {"X-API-Key": key} if key else {}
    return {"base_url": url, "timeout": timeout, "headers": headers, "trust_env": not _is_loopback(url.host)}


def _arguments(ask: Ask, timeout: float) -> dict[str, Any]:
    return {"json": ask.json, "params": ask.params, "headers": ask.headers, "timeout": timeout + ask.wait}


def _silence(url: httpx.URL, error: httpx.TransportError) -> Unavailable:
    return Unavailable(f"no answer from {url}: {error or type(error).__name__}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
