"""LoRAs from Civitai: looked up by number or words, fetched as `pull` fetches, and written into ``lora_list.json``."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import unicodedata
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, Field, ValidationError

from diffusion_api.catalog import lora_list
from diffusion_api.catalog.labels import BASE_MODELS
from diffusion_api.catalog.library import Library
from diffusion_api.catalog.lora_list import Listed
from diffusion_api.downloads import Downloads, Remote, Tell
from diffusion_api.errors import (
    BrokenDownload,
    DiffusionApiError,
    Gated,
    InvalidRequest,
    NotFound,
    ShuttingDown,
    Unreachable,
)
from diffusion_api.pull import Plan, Pulled, Puller

log = logging.getLogger(__name__)

MAX_ANSWER = 16 * 2**20
"""Bytes of what Civitai says of models."""

LONGEST_NAME = 80
LONGEST = 500
"""Characters of what is searched for, and of a title or a trigger word: anybody can publish anything there."""

LORAS = ("LORA", "LoCon", "DoRA")
"""Civitai's types of models that are LoRAs here."""


class _Hashes(BaseModel):
    SHA256: str | None = Field(default=None, pattern=r"^[0-9A-Fa-f]{64}$")


class _File(BaseModel):
    name: str = ""
    downloadUrl: str
    hashes: _Hashes = _Hashes()


class _Version(BaseModel):
    baseModel: str = ""
    trainedWords: list[str] | None = None
    files: list[_File] = []


class _Model(BaseModel):
    """What Civitai says of a model, as far as it matters here."""

    id: int
    name: str
    type: str
    allowNoCredit: bool | None = None
    allowCommercialUse: list[str] | str | None = None
    modelVersions: list[_Version] = []


class _Found(BaseModel):
    items: list[_Model]


Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class Offer:
    """A LoRA that can be had: ``plan`` fetches it, ``listed`` is what the list will say. ``steps`` tell how it was found."""

    title: str
    plan: Plan
    listed: Listed
    steps: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called here."""
        return self.plan.name or ""


class LoraShop:
    """Adds LoRAs to one installation. ``endpoint`` is Civitai or what speaks like it, ``key`` the operator's there; ``limit``
    is the bytes of one LoRA, ``seconds`` how long one may take to come.

    Downloads run on a thread of their own: who waits for one holds no other.
    """

    def __init__(
        self,
        downloads: Downloads,
        puller: Puller,
        library: Library,
        home: Path,
        *,
        endpoint: str,
        key: str,
        limit: int,
        seconds: float,
    ) -> None:
        self._downloads, self._puller, self._library = downloads, puller, library
        self._list = lora_list.place(home)
        self._endpoint = endpoint.rstrip("/")
        self._secrets = {"Authorization": f"Bearer {key}"} if key else {}
        self._limit, self._seconds = limit, seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._coming: dict[int, asyncio.Task[str]] = {}

    async def add(self, wanted: str) -> str:
        """Have a LoRA, by Civitai's number of it or by words, of which the first hit is taken: a line for each step, nothing
        when it was here. Asked for by several it comes once, and when nobody waits any longer it comes nevertheless.

        Raises InvalidRequest, NotFound, Conflict, TooLarge, Gated, Unreachable, BrokenDownload, DiskFull, ShuttingDown.
        """
        return await asyncio.wrap_future(self._start(wanted))

    async def offer(self, wanted: str) -> Offer:
        """What Civitai has for a number or for words; nothing is fetched yet but what it says of it.

        Raises InvalidRequest, NotFound, Unreachable, BrokenDownload.
        """
        if not 0 < len(wanted) <= LONGEST:
            raise InvalidRequest(f"name has {len(wanted)} characters; it may have 1 to {LONGEST}", field="name")
        if _is_number(wanted):
            model = await self._model(wanted)
            return self._offer(model, (f"collecting model {model.id}: {_line(model.name)}",))
        found = await self._search(wanted)
        searched = f"searchterm {_line(wanted)} lead to {len(found)} models"
        if not found:
            raise NotFound(searched)
        return self._offer(found[0], (searched, f"collecting the first one: {_line(found[0].name)}"))

    async def fetch(self, offer: Offer, tell: Tell) -> Pulled:
        """Fetch what was offered and list it; nothing of it stays if that fails, but for what another try goes on with.

        Raises what :meth:`Puller.fetch` raises, TooLarge, and Misconfigured when the list cannot be written.
        """
        pulled = await self._puller.fetch(offer.plan, tell)
        lora_list.put(self._list, offer.name, offer.listed, log.warning)
        return pulled

    def close(self) -> None:
        """Fetch nothing any more; what came of unfinished files is kept. May be called from any thread."""
        with self._lock:
            ending, self._closed = not self._closed, True
        if ending and self._loop:
            asyncio.run_coroutine_threadsafe(self._end(self._loop), self._loop)

    # on the thread of the downloads

    async def _add(self, wanted: str) -> str:
        if self._known(wanted):
            return ""
        try:
            async with asyncio.timeout(self._seconds):
                offer = await self.offer(wanted)
            here = self._known(str(offer.listed.model_id))
            if here is None:
                here = await asyncio.shield(self._on_its_way(offer))
        except TimeoutError:
            raise Unreachable(f"Civitai did not say what it has within {self._seconds:g} s") from None
        except asyncio.CancelledError:
            if self._closed:
                raise ShuttingDown("the service stops; asked again later, the download goes on") from None
            raise
        listed = offer.listed
        words = ", ".join(listed.trigger_words) or "none"
        told = f"base model: {listed.base_model}; trigger words: {words}; usage rights: {listed.usage_rights}"
        return "\n".join([*offer.steps, f"here as {here}", told])

    def _on_its_way(self, offer: Offer) -> asyncio.Task[str]:
        """The one download of a model, begun if it is not under way."""
        number = offer.listed.model_id
        task = self._coming.get(number)
        if task is None:
            task = self._coming[number] = asyncio.create_task(self._come(offer))
            task.add_done_callback(lambda done: self._came(number, done))
        return task

    async def _come(self, offer: Offer) -> str:
        log.info("LoRA %s: %s is fetched", offer.name, offer.plan.source)
        try:
            async with asyncio.timeout(self._seconds):
                await self.fetch(offer, lambda *_: None)
        except TimeoutError:
            raise Unreachable(
                f"{offer.title} did not come within {self._seconds:g} s; asked again, it goes on from there"
            ) from None
        return offer.name

    def _came(self, number: int, task: asyncio.Task[str]) -> None:
        """Tell how a download ended, as perhaps nobody waits for it any longer."""
        self._coming.pop(number)
        if task.cancelled():
            return
        if error := task.exception():
            log.warning("LoRA of model %d: %s", number, error, exc_info=not isinstance(error, DiffusionApiError))
        else:
            log.info("LoRA %s is here", task.result())

    def _start(self, wanted: str) -> Future[str]:
        with self._lock:
            if self._closed:
                raise ShuttingDown("the service is shutting down")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), name="lora-shop", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(self._add(wanted), self._loop)

    async def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        loop.stop()

    # what Civitai says

    async def _model(self, number: str) -> _Model:
        return await self._ask(_Model, f"/api/v1/models/{number}", f"model {number}")

    async def _search(self, words: str) -> list[_Model]:
        types = "".join(f"&types={each}" for each in LORAS)
        path = f"/api/v1/models?query={quote(words, safe='')}&nsfw=false{types}"
        return (await self._ask(_Found, path, f"models for {_line(words)!r}")).items

    async def _ask(self, kind: type[Answer], path: str, what: str) -> Answer:
        name, explain = f"what Civitai says of {what}", partial(self._refusal, what)
        remote = Remote(self._endpoint + path, name, secrets=self._secrets, explain=explain)
        content = await self._downloads.read(remote, MAX_ANSWER)
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise BrokenDownload(f"{name} cannot be understood") from error

    def _refusal(self, what: str, status: int, headers: Mapping[str, str]) -> DiffusionApiError:
        if status in (401, 403):
            more = "your CIVIT_KEY does not open it" if self._secrets else "set CIVIT_KEY to a key of yours there"
            return Gated(f"Civitai gives {what} to those only who sign in: {more}")
        if status == 404:
            return NotFound(f"Civitai has no {what}")
        return BrokenDownload(f"{what}: Civitai answered {status}")

    def _offer(self, model: _Model, steps: tuple[str, ...]) -> Offer:
        title = _line(model.name)
        wrong = f"something did go wrong with model {title}!"
        if model.type not in LORAS:
            raise InvalidRequest(f"{wrong} It is no LoRA, but of type {model.type!r}", field="name")
        version = model.modelVersions[0] if model.modelVersions else _Version()
        base = BASE_MODELS.get(version.baseModel)
        if base is None:
            known = ", ".join(BASE_MODELS)
            raise InvalidRequest(f"{wrong} Its base model is {version.baseModel!r}; known: {known}", field="name")
        file = next((each for each in version.files if each.name.lower().endswith(".safetensors")), None)
        if file is None:
            raise InvalidRequest(f"{wrong} It has no .safetensors file, and nothing else is fetched", field="name")
        digest = file.hashes.SHA256.lower() if file.hashes.SHA256 else None
        listed = Listed(
            model_id=model.id,
            base_model=base,
            lora_path=file.downloadUrl,
            trigger_words=tuple(filter(None, map(_line, version.trainedWords or []))),
            allow_no_mention=bool(model.allowNoCredit),
            usage_rights=_rights(model.allowCommercialUse),
        )
        remote = Remote(
            file.downloadUrl,
            title,
            sha256=digest,
            secrets=self._secrets if _origin(file.downloadUrl) == _origin(self._endpoint) else {},
            explain=partial(self._refusal, title),
            limit=self._limit,
        )
        plan = Plan(
            source=f"{self._endpoint}/models/{model.id}",
            files=(remote,),
            licence=listed.usage_rights,
            kind="lora",
            name=self._name(model, digest),
        )
        return Offer(title, plan, listed, steps)

    # what is here

    def _known(self, wanted: str) -> str | None:
        """The name of the LoRA that is listed and here under that number, or under exactly that name."""
        for row in self._library.assets("lora"):
            if row.listed and wanted == (str(row.listed.model_id) if _is_number(wanted) else row.name):
                return row.name
        return None

    def _name(self, model: _Model, digest: str | None) -> str:
        """The title as a name, with its number where another LoRA has that name already."""
        name = normalised(model.name)
        other = self._library.lora_list().get(name)
        if name and other and other.model_id == lora_list.NOT_FOUND:
            free = name not in (row.name for row in self._library.assets("lora")) or self._puller.has(
                "lora", name, digest
            )
        else:
            free = bool(name) and (other is None or other.model_id == model.id)
        return name if free else f"{name or 'lora'}_{model.id}"


def normalised(title: str) -> str:
    """A title as a name: in ASCII and lower case, with ``_`` for blanks, and nothing but letters, digits and ``_``; empty
    where it has neither letters nor digits.
    """
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9_]", "", re.sub(r"\s", "_", plain.strip()))[:LONGEST_NAME]
    return name if name.strip("_") else ""


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _is_number(wanted: str) -> bool:
    return wanted.isascii() and wanted.isdecimal()


def _origin(url: str) -> tuple[str, str]:
    split = urlsplit(url)
    return split.scheme, split.netloc


def _line(text: str) -> str:
    """What anybody may have written, as a part of one line."""
    printable = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(printable.split())[:LONGEST]


def _rights(told: list[str] | str | None) -> str:
    """What may be sold, in Civitai's words: one, several, or a set as its database writes it."""
    words = told.strip("{}").split(",") if isinstance(told, str) else told or []
    return ", ".join(filter(None, map(_line, words))) or "None"
