"""The command ``diffusion-api``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_api import __version__, examples, remote
from diffusion_api import settings as configuration
from diffusion_api.errors import DiffusionApiError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

TOOLS = "Look at what is installed"

Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")]
Home = Annotated[Path | None, typer.Option(help="Folder with stable_diffusion/, queue/ and outputs/.")]
Engine = Annotated[str | None, typer.Option(help="diffusers, or stub: no model, for tests.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 (the second card) or mps.")]
Isolated = Annotated[bool | None, typer.Option(help="Run the jobs in a process of their own, which may crash.")]
ModelsFrom = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of A1111, Forge, ComfyUI, the hub's cache or your own, to be read too; may be repeated."),
]
HandedOver = Annotated[str, typer.Option("--handover", hidden=True)]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error of ours is one line on stderr and exit code 1."""
    try:
        app(arguments, prog_name="diffusion-api")
    except DiffusionApiError as error:
        print(f"diffusion-api: {error}", file=sys.stderr)
        sys.exit(1)


def script(path: str) -> None:
    """Run the command that a file is named after, as the files of ``scripts/`` do."""
    main([Path(path).stem.replace("_", "-"), *sys.argv[1:]])


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    home: Home = None,
    engine: Engine = None,
    device: Device = None,
    isolated: Isolated = None,
    models_from: ModelsFrom = None,
    also_listen: Annotated[str | None, typer.Option(help="More ports, with commas: 1234,7866.")] = None,
    worker: Annotated[bool, typer.Option(help="Also run jobs.")] = True,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Ask nobody for a key, on whatever address.")
    ] = False,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Private key, to serve https.")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, to serve https.")] = None,
    handover: HandedOver = "{}",
) -> None:
    """Serve the API and run its jobs."""
    from diffusion_api.restart import Handover
    from diffusion_api.server import run

    settings = _settings(
        host=host, port=port, home=home, engine=engine, device=device, isolated=isolated, models_from=models_from,
        also_listen=also_listen, require_auth=False if allow_anonymous else None,
        ssl_keyfile=ssl_keyfile, ssl_certfile=ssl_certfile,
    )  # fmt: skip
    run(settings, worker=worker, handover=Handover.model_validate_json(handover))


@app.command()
def worker(
    home: Home = None,
    engine: Engine = None,
    device: Device = None,
    models_from: ModelsFrom = None,
    handover: HandedOver = "{}",
) -> None:
    """Run jobs of a queue folder, without an API."""
    from diffusion_api.restart import Handover
    from diffusion_api.server import work

    work(
        _settings(home=home, engine=engine, device=device, models_from=models_from),
        Handover.model_validate_json(handover),
    )


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a large red circle on a blue background",
    home: Home = None,
) -> None:
    """Start the service, post one job, show its picture's path and infotext, stop the service."""
    from rich.console import Console

    from diffusion_api.demo import run_demo

    raise typer.Exit(run_demo(prompt, home or Path.cwd(), Console()))


@app.command(rich_help_panel=TOOLS)
def list_models(home: Home = None, models_from: ModelsFrom = None) -> None:
    """List the labels of models, and the names that they stand for."""
    from diffusion_api import listing
    from diffusion_api.server import build_library

    print(listing.labels(build_library(_settings(home=home, models_from=models_from))))


@app.command(rich_help_panel=TOOLS)
def list_available_models_loras(home: Home = None, models_from: ModelsFrom = None) -> None:
    """List the installed models and LoRAs with their files."""
    from diffusion_api import listing
    from diffusion_api.server import build_library

    print(listing.available(build_library(_settings(home=home, models_from=models_from))))


@app.command("test-lora-compatibility", rich_help_panel=TOOLS)
def lora_compatibility(
    model: Annotated[str | None, typer.Option(help="Name or label of a model; all, when left out.")] = None,
    lora: Annotated[str | None, typer.Option(help="File or name of a LoRA; all installed ones, when left out.")] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="Folder with LoRAs, in place of the installed ones.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the report goes, beside the screen.")] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Prove each LoRA that fits by a picture, beside one without it.")
    ] = False,
    home: Home = None,
    device: Device = None,
    models_from: ModelsFrom = None,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", hidden=True)] = False,  # of the original tool
) -> None:
    """Say which LoRAs fit which models, from the shapes in their files. Without options: all of them.

    The report on all goes into lora_compatibility_report.txt if --output names no other file. The exit status is 1 when there
    is nothing to test, or when --lora fits none of the models.
    """
    from diffusion_api.lora_report import run_test

    settings = _settings(home=home, device=device, models_from=models_from)
    raise typer.Exit(run_test(settings, model=model, lora=lora, folder=lora_dir, output=output, render=render))


@app.command()
def info(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="PNG, JPEG, WebP, AVIF or GIF.")],
) -> None:
    """Say what a picture says of itself. The exit status is 1 when that is nothing."""
    from diffusion_api import metadata

    text, found = metadata.info(image)
    print(text)
    raise typer.Exit(not found)


@app.command("test-metadata")
def metadata_test(
    folder: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Where the pictures are written.")
    ] = Path(),
) -> None:
    """Write a picture of each format with all that it may have to say, read it back, and show a text of the web UI."""
    from diffusion_api import metadata

    text, well = metadata.test(folder)
    print(text)
    raise typer.Exit(not well)


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(help="org/name[@revision], org/name/file.safetensors, an https URL, or civitai:NUMBER.")
    ],
    sha256: Annotated[str | None, typer.Option(help="SHA-256 that the file must have.")] = None,
    home: Home = None,
) -> None:
    """Fetch a model, LoRA, VAE, embedding or upscaler into the home folder."""
    from rich.console import Console

    from diffusion_api.pulling import run_pull

    raise typer.Exit(run_pull(_settings(home=home), source, sha256, Console()))


@app.command()
def certificate(
    names: Annotated[list[str] | None, typer.Argument(help="Host names and addresses beside localhost's.")] = None,
    home: Home = None,
) -> None:
    """Make a self-signed certificate for https, and say how to use it."""
    from diffusion_api.certificates import DAYS, self_signed

    folder = _settings(home=home).access_dir
    key, cert = self_signed(folder, ("localhost", "127.0.0.1", "::1", *(names or ())))
    print(f"{key} and {cert} were made, for {DAYS} days. Use them with")
    print(f"  diffusion-api serve --ssl-keyfile {key} --ssl-certfile {cert}")
    print(f"  curl --cacert {cert} https://localhost:8000/hello")


keys = typer.Typer(no_args_is_help=True, help="Say who may call: docs/access.md.")
app.add_typer(keys, name="keys")


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is: a person or a program.")],
    admin: Annotated[bool, typer.Option("--admin", help="It also pauses the queue, and sees all jobs.")] = False,
    home: Home = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept. It holds at once, also for a service that runs."""
    from diffusion_api.schema.caller import Role
    from diffusion_api.server import build_keyring

    print(build_keyring(_settings(home=home)).add(name, Role.ADMIN if admin else Role.USER))


@keys.command("list")
def keys_list(home: Home = None) -> None:
    """List the keys, but for those that the settings list."""
    from datetime import datetime

    from diffusion_api.server import build_keyring

    for key in build_keyring(_settings(home=home)).kept():
        made = datetime.fromtimestamp(key.created).strftime("%Y-%m-%d %H:%M")
        print(f"{key.id}  {key.role:5}  {made}  {key.name}")


@keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="The name or the id of a key, as `keys list` shows them.")],
    home: Home = None,
) -> None:
    """Take a key away. It opens nothing any more, also for a service that runs."""
    from diffusion_api.server import build_keyring

    keyring = build_keyring(_settings(home=home))
    key = keyring.revoke(name)
    print(f"the key {key.name!r} ({key.id}) opens nothing any more")
    if not len(keyring):
        print("it was the last: a service on loopback is open to everybody on this machine now, and others to nobody")


@app.command()
def doctor(home: Home = None, models_from: ModelsFrom = None) -> None:
    """Say what was found (device, memory, folders, models, versions) and what to do about it."""
    from diffusion_api.doctor import examine

    raise typer.Exit(examine(_settings(home=home, models_from=models_from)))


@app.command()
def config(
    host: Host = None,
    port: Port = None,
    home: Home = None,
    engine: Engine = None,
    device: Device = None,
    isolated: Isolated = None,
    models_from: ModelsFrom = None,
) -> None:
    """Print every setting, its value and where it came from."""
    flags = {
        "host": host, "port": port, "home": home, "engine": engine, "device": device, "isolated": isolated,
        "models_from": models_from,
    }  # fmt: skip
    found = _settings(**flags)
    where = configuration.sources(found, flags)
    for name in type(found).model_fields:
        value = getattr(found, name)
        text = os.pathsep.join(map(str, value)) if isinstance(value, tuple) else str(value)
        print(f"{name:16} {text:24} {where[name]}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


app.add_typer(remote.app)
app.add_typer(examples.app)


def _version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A job-queue REST service for image generation."""


def _settings(**flags: Any) -> configuration.Settings:
    """The settings in force; a wrong value is told in one line."""
    from pydantic import ValidationError

    from diffusion_api.errors import Misconfigured

    try:
        return configuration.load(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        variable = configuration.variable(name) or configuration.PREFIX + name.upper()
        raise Misconfigured(f"setting {name} ({variable}) is {first['input']!r}: {first['msg']}") from error
