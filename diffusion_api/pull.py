"""Models, LoRAs and the like fetched on demand: from the hub, at one commit, or from an https URL; safetensors only."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, Field, ValidationError

from diffusion_api import disk
from diffusion_api.catalog import detect
from diffusion_api.catalog.kinds import kind_of
from diffusion_api.catalog.layouts import Kind
from diffusion_api.catalog.library import OWN_FOLDERS, PLAIN_NAMES
from diffusion_api.downloads import Downloads, Remote, Tell
from diffusion_api.errors import BrokenDownload, Conflict, DiffusionApiError, DiskFull, Gated, InvalidRequest, NotFound
from diffusion_api.fetch import masked

HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<file>(/[\w-][^/\\@]*)+)?(@(?P<revision>[\w-][\w./-]*))?")
MAX_ANSWER = 32 * 2**20
"""Bytes of what the hub says of a repository."""

PARTS = (".json", ".txt", ".safetensors", ".model", ".jinja")
"""Endings of what a diffusers folder needs."""

VARIANT = re.compile(
    r"(?P<stem>(diffusion_pytorch_model|model))\.(?!safetensors)[\w]+(?P<rest>(-\d+-of-\d+)?\.safetensors)"
)
"""Weights again, in another precision: fp16, ema, ..."""

FOLDERS: dict[Kind, str] = {kind: name for name, kind in OWN_FOLDERS.items()}
NO_SAFETENSORS = "is no .safetensors file, and nothing else is fetched"
SOURCES = "org/name, org/name@revision, org/name/file.safetensors, or https://host/file.safetensors"


@dataclass(frozen=True)
class Plan:
    """What a pull will fetch. ``files`` go into one folder of the hub's layout if it is one of diffusers, else there is one.

    ``licence`` is what the model card says, ``commit`` the revision as a name that never moves; None for a URL. With ``kind``
    a file of another kind is refused; ``name`` is that of the only file once it is here, without a suffix.
    """

    source: str
    files: tuple[Remote, ...]
    repository: str | None = None
    revision: str | None = None
    commit: str | None = None
    licence: str | None = None
    folder: bool = False
    kind: Kind | None = None
    name: str | None = None

    @property
    def size(self) -> int | None:
        """Bytes in all, None where the host has not said so yet."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)


@dataclass(frozen=True)
class Pulled:
    """What is there now: ``name`` and ``kind`` as in the library, ``path`` on the disk. ``already`` if it was before."""

    kind: Kind
    name: str
    path: Path
    already: bool = False


class _Lfs(BaseModel):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int


class _File(BaseModel):
    rfilename: str
    size: int | None = None
    lfs: _Lfs | None = None


class _Repository(BaseModel):
    """What the hub says of a repository, as far as it matters here."""

    sha: str = Field(pattern=r"^[0-9a-f]{40}$")
    siblings: list[_File]
    cardData: dict[str, Any] | None = None


class Puller:
    """Fetches into the folders of one installation. ``endpoint`` is the hub or a mirror, ``token`` the operator's there."""

    def __init__(self, downloads: Downloads, home: Path, *, endpoint: str, token: str = "") -> None:
        self._downloads, self._own = downloads, home / "stable_diffusion"
        self._endpoint = endpoint.rstrip("/")
        self._secrets = {"Authorization": f"Bearer {token}"} if token else {}

    async def plan(self, source: str, *, sha256: str | None = None) -> Plan:
        """What a source means; nothing is fetched yet but what the hub says of it. ``sha256`` is that of a single file.

        Raises InvalidRequest, NotFound, Gated, Unreachable, BrokenDownload.
        """
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise InvalidRequest(f"sha256 is {sha256!r}; 64 hexadecimal digits are expected", field="sha256")
        if re.match("https?://", source):
            name = unquote(PurePosixPath(urlsplit(source).path).name) or "download"
            plan = Plan(masked(source), (Remote(source, name),))
        elif found := HUB.fullmatch(source):
            plan = await self._hub_plan(found["repo"], (found["file"] or "").lstrip("/"), found["revision"] or "main")
        else:
            raise InvalidRequest(f"source is {source!r}; it may be {SOURCES}", field="source")
        if sha256 is None:
            return plan
        if len(plan.files) > 1:
            raise InvalidRequest("sha256 is that of one file, and the source has several", field="sha256")
        return replace(plan, files=(replace(plan.files[0], sha256=sha256.lower()),))

    async def fetch(self, plan: Plan, tell: Tell) -> Pulled:
        """Fetch what was planned, verify it, and put it where the library finds it, whole or not at all. What another try
        had fetched already is not fetched again.

        Raises Unreachable, BrokenDownload, DiskFull, Gated, NotFound, and Conflict when another file has the name already or
        another process fetches the same.
        """
        if plan.folder and (target := self._snapshot(plan)).exists():
            return Pulled("model", target.parents[1].name, target, already=True)
        if plan.kind and plan.name and self.has(plan.kind, plan.name, plan.files[0].sha256):
            return Pulled(plan.kind, plan.name, self.target(plan.kind, plan.name), already=True)
        with self._staging(plan) as folder:
            self._check_room(plan, folder)
            return await (self._fetch_folder if plan.folder else self._fetch_file)(plan, folder, tell)

    def target(self, kind: Kind, name: str) -> Path:
        """Where a file of that kind and name goes."""
        return self._own / FOLDERS[kind] / f"{name}.safetensors"

    def has(self, kind: Kind, name: str, sha256: str | None) -> bool:
        """Whether the file of that SHA-256 is there already; it is read for that."""
        target = self.target(kind, name)
        return sha256 is not None and target.is_file() and _sha256(target) == sha256

    async def _fetch_folder(self, plan: Plan, folder: Path, tell: Tell) -> Pulled:
        for remote in plan.files:
            path = folder / remote.name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                await self._downloads.file(remote, path, tell)
            _verify(path)
        target = self._snapshot(plan)
        _record(plan, folder / "pulled.json")
        _move(folder, target)
        refs = target.parents[1] / "refs"
        refs.mkdir(exist_ok=True)
        disk.write_whole(refs / "main", (plan.commit or "").encode(), tmp=refs)
        return Pulled("model", target.parents[1].name, target)

    async def _fetch_file(self, plan: Plan, folder: Path, tell: Tell) -> Pulled:
        (remote,) = plan.files
        staged = folder / "download.safetensors"
        hint = ""
        if not staged.exists():
            hint = await self._downloads.file(remote, staged, tell)
        name = _file_name(plan, remote, hint)
        kind = _verify(staged, name) or "model"
        if plan.kind and kind != plan.kind:
            disk.remove(staged)
            raise BrokenDownload(f"{name} holds no {plan.kind}, by the names of its tensors; what came was removed")
        target = self.target(kind, name.removesuffix(".safetensors"))
        if target.exists():
            if _sha256(target) != _sha256(staged):
                shown = target.relative_to(self._own.parent).as_posix()
                raise Conflict(f"{shown} is there already, and is another file; move it away first")
            return Pulled(kind, target.stem, target, already=True)
        _record(plan, folder / "pulled.json")
        _move(staged, target)
        _move(folder / "pulled.json", target.with_suffix(".pulled.json"))
        return Pulled(kind, target.stem, target)

    async def _hub_plan(self, repository: str, file: str, revision: str) -> Plan:
        info = await self._info(repository, revision)
        names = {each.rfilename: each for each in info.siblings if _is_safe(each.rfilename)}
        plan = Plan(
            source=repository + (f"/{file}" if file else ""),
            files=(),
            repository=repository,
            revision=revision,
            commit=info.sha,
            licence=_licence(info.cardData or {}),
            folder=not file and "model_index.json" in names,
        )
        if plan.folder:
            wanted = await self._parts(plan, names)
        else:
            wanted = [file or _only_file(repository, names)]
        if missing := [name for name in wanted if name not in names]:
            choices = ", ".join(name for name in names if name.endswith(".safetensors")) or "none"
            raise NotFound(f"{repository} has no file {missing[0]!r}; its safetensors files: {choices}")
        if not plan.folder and not wanted[0].endswith(".safetensors"):
            raise InvalidRequest(f"{wanted[0]} {NO_SAFETENSORS}{_own_way(wanted[0])}", field="source")
        return replace(plan, files=tuple(self._remote(plan, names[name]) for name in wanted))

    async def _parts(self, plan: Plan, names: Mapping[str, _File]) -> list[str]:
        """The files of a diffusers folder: what its index names, each weight in one precision."""
        index = await self._json(self._remote(plan, names["model_index.json"]))
        components = {name for name, value in index.items() if isinstance(value, list) and None not in value}
        found = [
            name
            for name in names
            if name == "model_index.json" or (name.split("/")[0] in components and name.count("/") == 1)
        ]
        found = [name for name in found if name.endswith(PARTS)]
        plain = {_plain(name) for name in found if _plain(name) == name}
        return [
            name for name in found if _plain(name) == name or _first_part(_plain(name)) not in map(_first_part, plain)
        ]

    def _remote(self, plan: Plan, file: _File) -> Remote:
        return Remote(
            f"{self._endpoint}/{plan.repository}/resolve/{plan.commit}/{quote(file.rfilename)}",
            file.rfilename,
            file.lfs.size if file.lfs else file.size,
            file.lfs.sha256 if file.lfs else None,
            self._secrets,
            partial(self._refusal, plan.repository or "", plan.revision or ""),
        )

    async def _info(self, repository: str, revision: str) -> _Repository:
        url = f"{self._endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        explain = partial(self._refusal, repository, revision)
        try:
            return _Repository.model_validate(
                await self._json(Remote(url, repository, None, None, self._secrets, explain))
            )
        except ValidationError as error:
            raise BrokenDownload(f"what the hub says of {repository} cannot be understood") from error

    async def _json(self, remote: Remote) -> dict[str, Any]:
        try:
            content = json.loads(await self._downloads.read(remote, MAX_ANSWER))
        except ValueError as error:
            raise BrokenDownload(f"{remote.name}: what the hub answered is no JSON") from error
        if not isinstance(content, dict):
            raise BrokenDownload(f"{remote.name}: what the hub answered is no JSON object")
        return content

    def _refusal(self, repository: str, revision: str, status: int, headers: Mapping[str, str]) -> DiffusionApiError:
        """What the hub means, by its own error code where it sends one."""
        code, page = headers.get("x-error-code", ""), f"{self._endpoint}/{repository}"
        if code == "GatedRepo" or (status == 403 and not code):
            if not self._secrets:
                return Gated(
                    f"{repository} is gated: accept its terms at {page}, then set HF_TOKEN to a token of yours "
                    f"({self._endpoint}/settings/tokens)"
                )
            return Gated(f"{repository} is gated, and your HF_TOKEN does not open it: accept its terms at {page}")
        if code == "RevisionNotFound":
            return NotFound(f"{repository} has no revision {revision!r}")
        if code == "EntryNotFound":
            return NotFound(f"{repository} has no such file at revision {revision!r}")
        if status in (401, 404):
            who = "your HF_TOKEN does not open it" if self._secrets else "it is private: then set HF_TOKEN"
            return NotFound(f"the hub has no {repository}, or {who}")
        return BrokenDownload(f"{repository}: the hub answered {status}")

    def _snapshot(self, plan: Plan) -> Path:
        folder = "models--" + (plan.repository or "").replace("/", "--")
        return self._own / "models" / folder / "snapshots" / (plan.commit or "")

    @contextmanager
    def _staging(self, plan: Plan) -> Iterator[Path]:
        """A folder for this plan alone, which outlives a failure, so that another try goes on where this one ended."""
        key = hashlib.sha256("\n".join(file.url for file in plan.files).encode()).hexdigest()[:16]
        folder = self._own / ".pull" / key
        folder.mkdir(parents=True, exist_ok=True)
        lock = disk.lock(folder.with_suffix(".lock"))
        if lock is None:
            raise Conflict(f"{plan.source} is being fetched already, by another process")
        done = False
        try:
            yield folder
            done = True
        finally:
            if done or not _worth_keeping(folder):
                shutil.rmtree(folder, ignore_errors=True)
                disk.remove(folder.with_suffix(".lock"))
            disk.unlock(lock)

    def _check_room(self, plan: Plan, folder: Path) -> None:
        """Raises DiskFull before the first byte of something that will not fit."""
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        free = disk.free(folder)
        if plan.size is not None and plan.size - there > free:
            gib = 2**30
            raise DiskFull(
                f"{plan.source} needs {(plan.size - there) / gib:.2f} GiB, and {free / gib:.2f} GiB are free"
            )


def _is_safe(name: str) -> bool:
    """False for a name that would lead out of its folder, or that a scan would not see."""
    parts = name.split("/")
    return "\\" not in name and all(part and not part.startswith(".") and part.isprintable() for part in parts)


def _worth_keeping(folder: Path) -> bool:
    """Whether another try could go on with what lies there."""
    return any(file.suffix != ".etag" and file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _own_way(name: str) -> str:
    """How a checkpoint that can hold code is used nevertheless."""
    if not name.endswith(".ckpt"):
        return ""
    return (
        "; one that you put into stable_diffusion/models yourself is read with DIFFUSION_API_ALLOW_PICKLE_MODELS=true"
    )


def _only_file(repository: str, names: Mapping[str, _File]) -> str:
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"{repository} holds no safetensors files and no diffusers folder; nothing else is fetched")
    choices = ", ".join(f"{repository}/{name}" for name in found)
    raise InvalidRequest(f"{repository} holds several files; name one of {choices}", field="source")


def _plain(name: str) -> str:
    """The name of weights without their precision."""
    folder, _, file = name.rpartition("/")
    found = VARIANT.fullmatch(file)
    return f"{folder}/{found['stem']}{found['rest']}" if found else name


def _first_part(name: str) -> str:
    """Weights in one file and in several are the same weights."""
    return re.sub(r"-\d+-of-\d+", "", name)


def _licence(card: Mapping[str, Any]) -> str | None:
    """The licence as a model card has it: ``other`` has its name and link beside it."""
    words = [str(card[key]) for key in ("license", "license_name", "license_link") if card.get(key)]
    return ", ".join(words) or None


def _file_name(plan: Plan, remote: Remote, hint: str) -> str:
    """What the file shall be called: as its host calls it, or after its repository where that says nothing."""
    if plan.name:
        return f"{plan.name}.safetensors"
    name = hint if hint and not plan.repository else PurePosixPath(remote.name).name
    stem = re.sub(r"[^\w. ()+-]", "_", name.removesuffix(".safetensors")).lstrip(".") or "download"
    if plan.repository and stem in PLAIN_NAMES:
        stem = plan.repository.split("/")[1]
    return f"{stem}.safetensors"


def _verify(path: Path, name: str | None = None) -> Kind | None:
    """The kind of a file of weights, after a look at its header and length; a broken one is removed. Raises BrokenDownload."""
    if path.suffix != ".safetensors":
        return None
    try:
        return kind_of(detect.safetensors_header(path))
    except detect.Unrecognised as error:
        disk.remove(path)
        reason = str(error).removeprefix(f"{path.parent.name}/{path.name} ")
        raise BrokenDownload(f"{name or path.name} {reason}; what came was removed") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(plan: Plan, path: Path) -> None:
    """Write down where the files come from."""
    origin = {
        "source": plan.source,
        "revision": plan.revision,
        "commit": plan.commit,
        "licence": plan.licence,
        "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {file.name: file.sha256 for file in plan.files if file.sha256},
    }
    path.write_text(json.dumps(origin, indent=2) + "\n")


def _move(source: Path, target: Path) -> None:
    """Put a file or folder into place, whole or not at all, also on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        disk.rename_durably(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.pull")
        shutil.rmtree(beside, ignore_errors=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, beside)
        disk.rename_durably(beside, target)
