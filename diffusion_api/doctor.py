"""``diffusion-api doctor``: what was found, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape

from diffusion_api import __version__
from diffusion_api.access import is_loopback
from diffusion_api.errors import DiffusionApiError, InvalidRequest
from diffusion_api.schema.report import WorkerReport
from diffusion_api.server import build_access, build_library, build_queue
from diffusion_api.settings import Settings

GIB = 2**30
PACKAGES = (
    *("torch", "diffusers", "transformers", "safetensors"),
    *("fastapi", "starlette", "uvicorn", "pydantic", "pillow"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do when it is not well."""

    subject: str
    text: str
    fix: str | None = None


def examine(settings: Settings) -> int:
    """Print the report; 0 when nothing needs doing, else 1."""
    console = Console(highlight=False, soft_wrap=True)
    findings = [
        *_versions(),
        _memory(),
        *_folders(settings),
        *_models(settings),
        _safety(settings),
        _device(settings),
        _workers(settings),
        _access(settings),
    ]
    for finding in findings:
        mark = "[green]ok  [/]" if finding.fix is None else "[red]fix [/]"
        console.print(f"{mark} [bold]{finding.subject:9}[/] {escape(finding.text)}")
        if finding.fix:
            console.print(f"     [yellow]->[/] {escape(finding.fix)}")
    wrong = sum(f.fix is not None for f in findings)
    console.print(f"{wrong} thing{'s' * (wrong != 1)} to fix" if wrong else "everything is well")
    return 1 if wrong else 0


def _versions() -> list[Finding]:
    running = f"Diffusion API {__version__}, Python {platform.python_version()}, {platform.platform()}"
    have, missing = [], []
    for package in PACKAGES:
        try:
            have.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    fix = f"missing: {', '.join(missing)}; run `make setup`" if missing else None
    return [Finding("version", running), Finding("packages", ", ".join(have), fix)]


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    low = memory.available < 2 * GIB
    return Finding(
        "memory",
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {psutil.cpu_count()} CPU cores",
        "under 2 GiB free: an SD 1.5 model needs about 4 on a CPU; close other programs" if low else None,
    )


def _folders(settings: Settings) -> list[Finding]:
    home = settings.home.resolve()
    if not home.is_dir():
        return [Finding("home", str(home), "the folder does not exist: make it, or name another with --home")]
    free = shutil.disk_usage(home).free
    space = Finding("home", f"{home}, {free / GIB:.1f} GiB free", "under 1 GiB free: make room" if free < GIB else None)
    return [space, *(_folder(f, home) for f in (settings.models_dir, settings.queue_dir, settings.outputs_dir))]


def _folder(folder: Path, home: Path) -> Finding:
    shown = str(folder)
    if not folder.exists():
        writable = os.access(home, os.W_OK)
        return Finding("folder", f"{shown} will be made", None if writable else f"this user may not write to {home}")
    usable = folder.is_dir() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    return Finding("folder", shown, None if usable else f"this user may not write to it: `ls -ld {shown}`")


def _models(settings: Settings) -> list[Finding]:
    logging.getLogger("diffusion_api.catalog").setLevel(logging.ERROR)  # what it warns of is said here
    library = build_library(settings)
    names = [f"{model.name} ({model.family}, {model.shown_size})" for model in library.models()]
    fix = None if names else f"put a model into {settings.models_dir}"
    found = [Finding("models", ", ".join(names) or "none", fix)]
    found += [Finding("files", text, "mend it, or take it away; docs/models.md") for text in library.complaints()]
    try:
        found.append(Finding("default", library.default().name))
    except InvalidRequest as error:
        found.append(Finding("default", str(error), "name one: DIFFUSION_API_MODEL=<name>, or in every request"))
    except DiffusionApiError as error:
        found.append(Finding("default", str(error), "correct DIFFUSION_API_MODEL"))
    return found


def _safety(settings: Settings) -> Finding:
    """What is done about pictures that a safety checker flags, and whether there is one for every model."""
    library = build_library(settings)
    shared = library.checker()
    without = [] if shared else [model.name for model in library.models() if library.checker(model.name) is None]
    found = f"policy {settings.safety}; checker: {shared.shown if shared else 'none for all models'}"
    if settings.safety == "off" or not without:
        return Finding("safety", found)
    then = "their jobs are refused" if settings.safety == "required" else "their pictures are not checked"
    fix = f"{', '.join(without)}: no safety checker is installed, so {then}; docs/safety.md has the line that installs one"
    return Finding("safety", found, fix)


def _workers(settings: Settings) -> Finding:
    """Who serves the queue at this moment: nobody, while the service is not running."""
    if not settings.queue_dir.is_dir():
        return Finding("workers", "none runs: there is no queue yet")
    try:
        queue = build_queue(settings)
        reports = queue.workers()
        queue.close()
    except DiffusionApiError as error:
        return Finding("workers", "not known", str(error))
    return Finding("workers", "; ".join(map(_worker, reports)) or "none runs")


def _worker(report: WorkerReport) -> str:
    device = report.device.name if report.device else "a device not known yet"
    words = f"process {report.pid} on {device}: {report.state}, {report.restarts} restarts"
    return f"{words}, nothing heard for {report.quiet:.0f} s" if report.jobs else words


def _access(settings: Settings) -> Finding:
    """Who may call."""
    try:
        access = build_access(settings)
        keys = len(access.keyring)
        if keys:
            roles = "with one of an admin" if access.keyring.has_admin else "none of an admin"
            return Finding("access", f"by key: {keys}, {roles}")
    except DiffusionApiError as error:
        return Finding("access", "nobody can be let in", str(error))
    if not access.open:
        return Finding("access", f"by key; the first is made when it serves on {settings.host or 'every address'}")
    if is_loopback(settings.host):
        return Finding("access", "open to everybody on this machine; `diffusion-api keys add NAME` changes that")
    fix = "make a key: `diffusion-api keys add NAME --admin`, and leave out --allow-anonymous and REQUIRE_AUTH=false"
    return Finding("access", f"open to everybody who reaches {settings.host or 'any address'}", fix)


def _device(settings: Settings) -> Finding:
    if settings.engine == "stub":
        return Finding("device", "none: the stub engine needs none")
    try:
        from diffusion_api.engine import devices

        device = devices.choose(settings.device)
    except DiffusionApiError as error:
        return Finding("device", "unusable", str(error))
    except (ImportError, OSError) as error:
        return Finding("device", f"torch cannot be imported: {error}", "run `make clean setup`")
    return Finding("device", f"{device.report().name}, models in {str(device.dtype).removeprefix('torch.')}")
