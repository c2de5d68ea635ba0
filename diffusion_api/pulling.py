"""``diffusion-api pull``: says what will come and under which licence, shows how far it is, and what it can be used as."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from diffusion_api.downloads import Tell
from diffusion_api.lora_shop import Offer
from diffusion_api.pull import Plan, Pulled
from diffusion_api.server import build_library, build_lora_shop, build_puller
from diffusion_api.settings import Settings

CIVITAI = "civitai:"
"""Stands before Civitai's number of a LoRA, or before words to search there."""

STOPPED = 130
"""Exit status of a command that Ctrl-C ended."""


def run_pull(settings: Settings, source: str, sha256: str | None, console: Console) -> int:
    """Fetch a source into the home folder; the exit status. Raises what :class:`Puller` raises."""
    try:
        pulled, offer = asyncio.run(_pull(settings, source, sha256, console))
    except KeyboardInterrupt:
        _say(console, "Stopped. The same command goes on from there.")
        return STOPPED
    where = pulled.path.relative_to(settings.home).as_posix()
    _say(console, f"{'Already there' if pulled.already else 'Fetched'}: {where} ({pulled.kind})")
    if pulled.kind == "model":
        library = build_library(settings)
        found = library.find(pulled.name)
        _say(console, f'Use it with "model": "{found.name}"' if found else f"It {library.absence(pulled.name)}")
    if offer:
        words = ", ".join(offer.listed.trigger_words) or "none"
        _say(console, f"Use it with <lora:{pulled.name}:1>; its trigger words: {words}")
    return 0


async def _pull(settings: Settings, source: str, sha256: str | None, console: Console) -> tuple[Pulled, Offer | None]:
    """What was fetched, and what Civitai says of it where it came from there."""
    if source.startswith(CIVITAI):
        shop = build_lora_shop(settings, build_library(settings))
        offer = await shop.offer(source.removeprefix(CIVITAI))
        _say(console, _described(offer.plan))
        with _shown(console) as tell:
            return await shop.fetch(offer, tell), offer
    puller = build_puller(settings)
    plan = await puller.plan(source, sha256=sha256)
    _say(console, _described(plan))
    with _shown(console) as tell:
        return await puller.fetch(plan, tell), None


@contextmanager
def _shown(console: Console) -> Iterator[Tell]:
    """Within, how far each file is is shown."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name.replace("[", r"\["), total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield tell


def _described(plan: Plan) -> str:
    size = "size not known yet" if plan.size is None else f"{plan.size / 2**20:.1f} MiB"
    commit = f" at commit {plan.commit}" if plan.commit else ""
    licence = plan.licence or "not said; look at the page that it is from"
    return f"{plan.source}{commit}: {len(plan.files)} files, {size}\nLicence: {licence}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
