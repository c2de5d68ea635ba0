"""Examples to be run and read: what a program does with a service, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_api.remote import HERE, Key, Url, service

if TYPE_CHECKING:
    from diffusion_api.client import Client, Row, Status, Submitted

app = typer.Typer()

PANEL = "Examples"
REFINERS = "sdxl-refiner"
FEW = 3
PROMPTS = (
    "a beautiful landscape, high quality, detailed",
    "a portrait of an old sailor, soft light",
    "a large red circle on a blue background",
)

Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")]
Base = Annotated[str | None, typer.Option("--model", "-m", help="An SDXL model; one that is installed, when left out.")]
Refiner = Annotated[str | None, typer.Option(help="Its refiner; one that is installed, when left out.")]
Image = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="The picture to begin with; one is drawn, when left out."),
]


@app.command(rich_help_panel=PANEL)
def example_usage(output: Folder = Path("pictures"), url: Url = HERE, key: Key = None) -> None:
    """List the models, and draw a picture with each of up to three of them."""
    with service(url, key) as client:
        models = client.models()
        print(f"{len(models)} models are installed:")
        for model in models:
            print(f"  {model['label']} -> {model['name']}")

        for model, prompt in zip(models[:FEW], PROMPTS, strict=False):
            print(f"\n{model['label']}: {prompt}")
            job = client.txt2img(
                prompt=prompt,
                negative_prompt="blurry, low quality",
                model=model["label"],
                steps=20,
                cfg_scale=7,
                seed=-1,
                fileType="jpg",
            )
            _finish(client, job, output)


@app.command(rich_help_panel=PANEL)
def example_metadata_usage(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("pictures"),
) -> None:
    """Write into pictures how they were made, read it back, add to it, and read a text of the web UI. Needs no service."""
    import numpy as np

    from diffusion_api import images, infotext

    output.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((64, 64, 3), np.uint8)
    fields: dict[str, str | int | float | None] = {
        "Steps": 30,
        "Sampler": "Euler a",
        "CFG scale": 7.0,
        "Seed": 123456789,
    }

    print("1. Write a text into a PNG, and read it back")
    text = infotext.render("a beautiful landscape, masterpiece", "blurry, low quality", fields | {"Size": "64x64"})
    path = output / "with_metadata.png"
    path.write_bytes(images.encode(pixels, format="png", quality=85, infotext=text))
    print(images.read_infotext(path.read_bytes()))

    print("\n2. Take it apart")
    for key, value in infotext.parse(text).fields.items():
        print(f"  {key} = {value!r}")

    print("\n3. Say more: what is not known keeps its name, and a comma gets quotes")
    more = {"LoRAs": "anime_style:0.8, detail_enhancer:0.6", "User": "test_user", "Version": "DiffusionAPI v1.0"}
    longer = infotext.render("a beautiful landscape", "", infotext.ordered(fields | {"Project": "spring"} | more))
    path = output / "with_more.jpg"
    path.write_bytes(images.encode(pixels, format="jpeg", quality=90, infotext=longer))
    print(images.read_infotext(path.read_bytes()))

    print("\n4. Read a text of the Stable Diffusion web UI")
    theirs = "a castle, (night:1.2)\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 42, Size: 512x768, Clip skip: 2"
    told, unused = infotext.asked(infotext.parse(theirs))
    print(f"  a request for it: {told}")
    print(f"  not understood: {', '.join(unused) or 'nothing'}")


@app.command(rich_help_panel=PANEL)
def example_img2img_refiner(
    image: Image = None,
    model: Base = None,
    refiner: Refiner = None,
    output: Folder = Path("pictures"),
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Draw a picture from a picture, and one from words, each with an SDXL refiner."""
    with service(url, key) as client:
        base, refining = _pair(client, model, refiner)
        print(f"Model: {base or 'the default one'}, refiner: {refining or 'none is installed'}")
        asked: dict[str, Any] = {
            "model": base,
            "refiner_checkpoint": refining,
            "refiner_switch_at": 0.8,
            "steps": 30,
            "fileType": "png",
        }

        print("\nFrom words:")
        drawn = client.txt2img(prompt="a beautiful landscape", **asked)
        saved = _finish(client, drawn, output)

        print("\nFrom a picture:")
        job = client.img2img(
            prompt="a futuristic cityscape with neon lights, cyberpunk style",
            negative_prompt="blurry, low quality, distorted",
            image=image or saved[0],
            denoising_strength=0.7,
            **asked,
        )
        _finish(client, job, output)


@app.command("test-img2img-refiner", rich_help_panel=PANEL)
def try_img2img_refiner(
    image: Image = None, model: Base = None, refiner: Refiner = None, url: Url = HERE, key: Key = None
) -> None:
    """See whether img2img works, and whether a refiner changes what it draws.

    The exit status is 1 if something does not. Without a refiner at the service only the first is tried.
    """
    with service(url, key) as client:
        base, refining = _pair(client, model, refiner)
        begin: Path | bytes | None = image
        if begin is None:
            first = client.txt2img(prompt=PROMPTS[-1], model=base, steps=10, seed=1, fileType="png")
            client.result(first.job_id, pictures=False)
            begin = client.picture(first.job_id)
        asked: dict[str, Any] = {
            "prompt": PROMPTS[0],
            "image": begin,
            "model": base,
            "steps": 20,
            "seed": 42,
            "fileType": "png",
        }

        plain = _picture(client, client.img2img(**asked))
        print(f"PASS img2img: a picture of {len(plain)} bytes")
        if refining is None:
            print("SKIP refiner: no refiner of SDXL is installed")
            return
        job = client.img2img(**asked, refiner_checkpoint=refining, refiner_switch_at=0.8)
        if any("refiner" in warning for warning in job.warnings):
            print(f"FAIL refiner: {'; '.join(job.warnings)}")
            raise typer.Exit(1)
        if _picture(client, job) == plain:
            print(f"FAIL refiner: {refining} changed nothing")
            raise typer.Exit(1)
        print(f"PASS refiner: {refining} changed the last fifth of the steps")


def _finish(client: Client, job: Submitted, folder: Path) -> list[Path]:
    """Show each new phase of a job, and save its pictures. Raises JobFailed."""
    phases: list[str] = []

    def show(status: Status) -> None:
        if status["current_phase"] not in phases:
            phases.append(status["current_phase"])
            print(f"  {status['current_phase']}")

    for warning in job.warnings:
        print(f"  warning: {warning}")
    status = client.result(job.job_id, show, interval=2, pictures=False)
    saved = client.save(job.job_id, folder)
    print(f"  seed {status['seed']}, {status['generation_time_sec']:.1f} s: {', '.join(map(str, saved))}")
    return saved


def _picture(client: Client, job: Submitted) -> bytes:
    client.result(job.job_id, pictures=False)
    return client.picture(job.job_id)


def _pair(client: Client, model: str | None, refiner: str | None) -> tuple[str | None, str | None]:
    """An SDXL model and a refiner: those that were named, else what is installed."""
    models = client.models()
    return model or _first(models, "sdxl"), refiner or _first(models, REFINERS)


def _first(models: list[Row], family: str) -> str | None:
    return next((str(model["name"]) for model in models if model["family"] == family), None)
