"""The commands that ask a service: post a job, watch it, list and cancel jobs, list what is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_api.errors import InvalidImage, Misconfigured, Unavailable

if TYPE_CHECKING:
    from diffusion_api.client import Client, Kind, Row, Status

app = typer.Typer()

HERE = "http://127.0.0.1:8000"
PANEL = "Ask a service"
UNFINISHED = ("queued", "loading", "processing")
STOPPED = 130
"""Exit status of a command that Ctrl-C ended."""

Url = Annotated[str, typer.Option(envvar="DIFFUSION_API_URL", help="The service.")]
Key = Annotated[str | None, typer.Option(envvar="DIFFUSION_API_KEY", help="API key, if the service asks for one.")]
Picture = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The picture to begin with.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Name or label of a model.", autocompletion=lambda ctx: _names(ctx, "models", "name")
    ),
]
Strength = Annotated[float | None, typer.Option(min=0, max=1, help="How much is drawn anew.")]
Negative = Annotated[str | None, typer.Option(help="What should not be there.")]
Steps = Annotated[int | None, typer.Option(min=1, help="More take longer; up to a point they draw better.")]
Seed = Annotated[int | None, typer.Option(help="The same seed makes the same picture; -1 draws one.")]
Count = Annotated[int | None, typer.Option("-n", min=1, help="How many pictures.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="NAME or NAME:STRENGTH; may be repeated.",
        autocompletion=lambda ctx: _names(ctx, "loras", "name"),
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the API, as --set sampler_name='Euler a'."),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show the progress, and save the picture.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder or file that --watch saves to.")]


@app.command(rich_help_panel=PANEL)
def txt2img(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    negative: Negative = None,
    model: Model = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, as 768x512.")] = None,
    steps: Steps = None,
    seed: Seed = None,
    n: Count = None,
    lora: Loras = None,
    fields: Fields = None,
    watch: Watch = False,
    output: Output = Path(),
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Draw a picture from words.

    Without --watch the job's id is printed, and the picture stays at the service.
    """
    width, height = _size(size)
    body = dict(
        prompt=prompt, negative_prompt=negative, model=model, width=width, height=height, steps=steps, seed=seed, n=n
    )
    _post("txt2img", body | {"loras": _loras(lora)} | _fields(fields), watch, output, url, key)


@app.command(rich_help_panel=PANEL)
def img2img(
    image: Picture,
    prompt: Annotated[str, typer.Argument(help="What to make of it.")],
    strength: Strength = None,
    negative: Negative = None,
    model: Model = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; that of the picture when left out.")] = None,
    steps: Steps = None,
    seed: Seed = None,
    n: Count = None,
    fields: Fields = None,
    watch: Watch = False,
    output: Output = Path(),
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Draw a picture from words and a picture."""
    width, height = _size(size)
    body = dict(prompt=prompt, image=image, denoising_strength=strength, negative_prompt=negative, model=model)
    body |= dict(width=width, height=height, steps=steps, seed=seed, n=n)
    _post("img2img", body | _fields(fields), watch, output, url, key)


@app.command(rich_help_panel=PANEL)
def inpaint(
    image: Picture,
    mask: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A picture of the same size: white is painted anew."),
    ],
    prompt: Annotated[str, typer.Argument(help="What to paint there.")],
    strength: Strength = None,
    blur: Annotated[float | None, typer.Option(min=0, help="Of the mask's edge, pixels; 4 when left out.")] = None,
    only_masked: Annotated[
        bool, typer.Option("--only-masked", help="Draw only what is around the mask, and paste it back.")
    ] = False,
    negative: Negative = None,
    model: Model = None,
    steps: Steps = None,
    seed: Seed = None,
    n: Count = None,
    lora: Loras = None,
    fields: Fields = None,
    watch: Watch = False,
    output: Output = Path(),
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Paint a part of a picture anew."""
    body = dict(prompt=prompt, image=image, mask=mask, denoising_strength=strength, mask_blur=blur, model=model)
    body |= dict(negative_prompt=negative, steps=steps, seed=seed, n=n, only_masked=only_masked or None)
    _post("inpaint", body | {"loras": _loras(lora)} | _fields(fields), watch, output, url, key)


@app.command(rich_help_panel=PANEL)
def upscale(
    image: Picture,
    scale: Annotated[
        float | None, typer.Option(min=1, help="How many times as wide and as high; 2 when left out.")
    ] = None,
    upscaler: Annotated[
        str | None,
        typer.Option(help="A name of GET /upscalers.", autocompletion=lambda ctx: _names(ctx, "upscalers", "name")),
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels, in place of --scale.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; one alone keeps the proportions.")] = None,
    fields: Fields = None,
    watch: Watch = False,
    output: Output = Path(),
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Make a picture larger."""
    body = dict(image=image, scale=scale, upscaler=upscaler, width=width, height=height)
    _post("upscale", body | _fields(fields), watch, output, url, key)


@app.command(rich_help_panel=PANEL)
def reproduce(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A picture that says how it was made.")],
    output: Output = Path(),
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Make a picture again from what it says of itself, and say whether the pixels are the same.

    The new one is a PNG. The exit status is 1 when a picture without loss came out otherwise.
    """
    from diffusion_api import metadata

    if why := metadata.unmade(image):
        raise InvalidImage(f"{image} cannot be made again: {why}")
    paths = _post("txt2img", dict(image=image, fileType="png"), True, output, url, key)
    text, well = metadata.compared(image, paths[0])
    print(text)
    raise typer.Exit(not well)


@app.command(rich_help_panel=PANEL)
def jobs(
    state: Annotated[
        list[str] | None,
        typer.Option(help="queued, loading, processing, done, error or cancelled; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """List the jobs of a service, newest first."""
    with service(url, key) as client:
        found = client.jobs(*(state or ()), limit=limit)
    _table([_job(row) for row in found], ("JOB", "POSTED", "STATE", "KIND", "MODEL", "SIZE", "SEED", "PROMPT"))


@app.command(rich_help_panel=PANEL)
def cancel(
    job_id: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="The job's id.", autocompletion=lambda ctx: _names(ctx, "jobs", "job_id", *UNFINISHED)
        ),
    ],
    partial: Annotated[bool, typer.Option("--partial", help="End it with the picture that it has so far.")] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Cancel a job that waits or runs."""
    with service(url, key) as client:
        status = client.cancel(job_id, partial=partial)
    kept = status.get("output_path")
    print(f"cancelled; the picture so far is {kept} at the service" if kept else "cancelled")


@app.command(rich_help_panel=PANEL)
def models(url: Url = HERE, key: Key = None) -> None:
    """List the models of a service."""
    with service(url, key) as client:
        found = client.models()
    _table(
        [[row["label"], row["name"], row["family"], row["path"]] for row in found], ("LABEL", "NAME", "FAMILY", "PATH")
    )


@app.command(rich_help_panel=PANEL)
def loras(url: Url = HERE, key: Key = None) -> None:
    """List the LoRAs of a service."""
    with service(url, key) as client:
        found = client.loras()
    rows = [
        [row["name"], row["family"] or "?", ", ".join(row["trigger_words"]), row["usage_rights"] or "?", row["path"]]
        for row in found
    ]
    _table(rows, ("NAME", "FAMILY", "TRIGGER WORDS", "USAGE RIGHTS", "PATH"))


@contextmanager
def service(url: str, key: str | None) -> Iterator[Client]:
    """A client; a service that does not answer is told with what can be done about it."""
    from diffusion_api.client import Client

    try:
        with Client(url, key=key) as client:
            yield client
    except Unavailable as error:
        raise Unavailable(f"{error}; `diffusion-api serve` starts a service, --url names another") from error


def _names(context: typer.Context, listed: str, key: str, *arguments: str) -> list[str]:
    """What the shell completes: names that the service lists now; none when it does not answer within a second."""
    from diffusion_api.client import Client
    from diffusion_api.errors import DiffusionApiError

    options = context.params  # with what the environment says of them
    try:
        with Client(options.get("url") or HERE, timeout=1, key=options.get("key"), patience=0) as client:
            return [row[key] for row in getattr(client, listed)(*arguments)]
    except DiffusionApiError:
        return []


def _post(kind: Kind, body: dict[str, Any], watch: bool, output: Path, url: str, key: str | None) -> list[Path]:
    """Post a job; print its id, or watch it and print where its pictures were saved, which is also the value."""
    with service(url, key) as client:
        job = client.submit(kind, {name: value for name, value in body.items() if value is not None})
        for warning in job.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if not watch:
            print(job.job_id)
            return []
        try:
            _watch(client, job.job_id)
            paths = client.save(job.job_id, output)
        except KeyboardInterrupt:
            print(f"No longer watched; it goes on. To end it: diffusion-api cancel {job.job_id}", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
        except OSError as error:
            raise Misconfigured(
                f"the picture cannot be written to {output}: {error.strerror}; job {job.job_id}"
            ) from error
    print(*paths, sep="\n")
    return paths


def _watch(client: Client, job_id: str) -> None:
    """Draw the progress of a job until it has ended. Raises JobFailed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[phase]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=100, phase="queued")

        def draw(status: Status) -> None:
            waits = f", {status['position']} before it" if status.get("position") else ""
            bar.update(task, completed=status["progress"], phase=status["current_phase"] + waits)

        client.result(job_id, draw, pictures=False)


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"{text!r} is no size; write it as 768x512", param_hint="--size")
    return int(width), int(height)


def _loras(texts: Sequence[str] | None) -> list[dict[str, Any]] | None:
    return [_lora(text) for text in texts] if texts else None


def _lora(text: str) -> dict[str, Any]:
    """``name:0.8``; a name may have a colon too, so what follows the last one counts if it is a number."""
    name, _, strength = text.rpartition(":")
    try:
        return {"name": name, "scale": float(strength)} if name else {"name": text}
    except ValueError:
        return {"name": text}


def _fields(texts: Sequence[str] | None) -> dict[str, Any]:
    """Fields of the body: each value as JSON where it is some, else as text."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is no FIELD=VALUE", param_hint="--set")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _job(row: Row) -> list[str]:
    state = f"{row['progress']:.0f} %" if row["state"] == "processing" else row["state"]
    return [
        row["job_id"],
        f"{datetime.fromtimestamp(row['created']):%Y-%m-%d %H:%M:%S}",
        "cancelled" if row["cancelled"] else state,
        row["kind"],
        row["model"] or "-",
        f"{row['width']}x{row['height']}",
        "-" if row["seed"] is None else str(row["seed"]),
        " ".join((row["prompt"] or "-").split())[:60],
    ]


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> None:
    """Columns as wide as what is in them, so that ids can be copied and lines cut by other programs."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
