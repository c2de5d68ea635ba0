"""The commands that ask a service, as processes, against a service in another."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_models import LORA_KEYS, checkpoint, diffusers_folder
from inside import run
from PIL import Image
from serving import PATIENCE, Program, command, environment, eventually, serving

from diffusion_api.keys import Keyring
from diffusion_api.schema.caller import Role


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("remote")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    checkpoint(home / "stable_diffusion" / "loras" / "style.safetensors", LORA_KEYS)
    with serving(home, log_level="debug") as program:
        yield program


def said(server: Program, *arguments: object, cwd: Path) -> str:
    """What a command prints that must succeed."""
    done = run(*arguments, cwd=cwd, url=server.url)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_picture_is_drawn_watched_and_saved(server: Program, tmp_path: Path) -> None:
    done = run("txt2img", "a red circle", "--watch", cwd=tmp_path, url=server.url)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.strip()
    assert re.fullmatch(r"[0-9a-f-]{36}\.jpg", path.name)
    assert Image.open(path).size == (64, 64)
    assert "100%" in done.stderr


def test_every_option_reaches_the_service(server: Program, tmp_path: Path) -> None:
    options = [
        *("--negative", "blurry", "--model", "SMALL", "--size", "72x64", "--steps", 3, "--seed", 9, "-n", 2),
        *("--lora", "style:0.5", "--lora", "other", "--set", "sampler_name=Euler a", "--set", "clip_skip=2"),
        *("--set", "fileType=png", "-w", "-o", "out/mine.png"),
    ]
    (tmp_path / "out").mkdir()
    done = run("txt2img", "a star", *options, cwd=tmp_path, url=server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/mine-0.png", "out/mine-1.png"]
    assert "warning: LoRA 'other' was skipped: it is not installed" in done.stderr
    text = Image.open(tmp_path / "out" / "mine-0.png").info["parameters"]
    for part in (
        "a star",
        "Negative prompt: blurry",
        "Steps: 3",
        "Sampler: Euler a",
        "Seed: 9",
        "Size: 72x64",
        "Clip skip: 2",
    ):
        assert part in text
    newest = server.get("/queue?limit=1").json()["jobs"][0]
    payload = server.status(newest["job_id"])["payload"]
    assert payload["loras"] == [{"name": "style", "scale": 0.5}, {"name": "other"}]


def test_a_picture_is_drawn_from_a_picture_and_made_larger(server: Program, tmp_path: Path) -> None:
    Image.new("RGB", (64, 72), "red").save(tmp_path / "in.png")
    drawn = said(server, "img2img", "in.png", "a star", "--strength", 0.5, "--steps", 2, "-w", cwd=tmp_path).strip()
    assert Image.open(tmp_path / drawn).size == (64, 72)
    larger = said(
        server, "upscale", "in.png", "--scale", 3, "--upscaler", "nearest", "-w", "-o", "big.jpg", cwd=tmp_path
    )
    assert Image.open(tmp_path / larger.strip()).size == (192, 216)
    kinds = [row["kind"] for row in server.get("/queue?limit=2").json()["jobs"]]
    assert kinds == ["upscale", "img2img"]


def test_a_part_is_painted_anew_and_a_picture_gets_a_width(server: Program, tmp_path: Path) -> None:
    Image.new("RGB", (64, 72), "red").save(tmp_path / "in.png")
    Image.new("L", (64, 72), 255).save(tmp_path / "mask.png")
    options = ("--strength", 0.5, "--blur", 2, "--only-masked", "--steps", 2, "-w", "--set", "fileType=png")
    drawn = said(server, "inpaint", "in.png", "mask.png", "a star", *options, cwd=tmp_path).strip()
    newest = server.get("/queue?limit=1").json()["jobs"][0]
    payload = server.status(newest["job_id"])["payload"]
    assert {name: payload[name] for name in ("mask_blur", "only_masked", "denoising_strength")} == {
        "mask_blur": 2, "only_masked": True, "denoising_strength": 0.5,
    }  # fmt: skip
    wide = said(
        server, "upscale", "in.png", "--width", 32, "-w", "-o", "small.png", "--set", "fileType=png", cwd=tmp_path
    )
    assert Image.open(tmp_path / wide.strip()).size == (32, 36)
    for path in (drawn, wide.strip()):
        done = run("reproduce", path, cwd=tmp_path, url=server.url)
        assert (done.returncode, done.stdout) == (1, "")
        assert "cannot be made again: it was " in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_job_is_posted_listed_and_cancelled(server: Program, tmp_path: Path) -> None:
    posted = said(server, "txt2img", "stub:seconds=0.2 many\nwords", "--steps", 100, cwd=tmp_path).strip()
    eventually(lambda: server.status(posted)["state"] == "processing", "the job to run")
    head, row = said(server, "jobs", "--limit", 1, cwd=tmp_path).splitlines()
    assert head.split() == ["JOB", "POSTED", "STATE", "KIND", "MODEL", "SIZE", "SEED", "PROMPT"]
    assert re.fullmatch(rf"{posted}  [\d-]+ [\d:]+  \d+ %\s+txt2img  small\s+64x64  \d+\s+stub:\S+ many words", row)
    assert posted in said(server, "jobs", "--state", "processing", "--state", "queued", cwd=tmp_path)
    assert posted not in said(server, "jobs", "--state", "done", cwd=tmp_path)
    assert said(server, "cancel", posted, "--partial", cwd=tmp_path).startswith(
        "cancelled; the picture so far is outputs/"
    )
    again = run("cancel", "nobody", cwd=tmp_path, url=server.url)
    assert (again.returncode, again.stderr) == (1, "diffusion-api: Job nobody not found (HTTP 404)\n")
    assert "  cancelled  " in said(server, "jobs", "--state", "cancelled", cwd=tmp_path)


def test_what_is_installed_is_listed(server: Program, tmp_path: Path) -> None:
    models = said(server, "models", cwd=tmp_path)
    assert models.splitlines()[1].split() == ["small", "small", "sd1", "stable_diffusion/models/small"]
    loras = said(server, "loras", "--url", server.url, cwd=tmp_path)
    assert loras.splitlines()[1].split() == ["style", "sd1", "?", "stable_diffusion/loras/style.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (("txt2img", "x", "--steps", "151"), 1, "diffusion-api: steps is 151; it may be 1 to 150 (HTTP 400)"),
        (("txt2img", "x", "-m", "gone"), 1, "diffusion-api: model 'gone' is not installed; one of small"),
        (("txt2img", "x", "--size", "64"), 2, "'64' is no size; write it as 768x512"),
        (("txt2img", "x", "--set", "steps"), 2, "'steps' is no FIELD=VALUE"),
        (("txt2img", "stub:oom", "-w"), 1, "ended without a picture: out of memory"),
        (("txt2img", "x", "-w", "-o", "/proc/none/x.png"), 1, "the picture cannot be written to /proc/none/x.png"),
        (("upscale", "gone.png"), 2, "'gone.png' does not exist"),
        (("jobs", "--state", "ready"), 1, "diffusion-api: state is 'ready'"),
    ],
)
def test_a_mistake_is_told(
    server: Program, tmp_path: Path, arguments: tuple[str, ...], status: int, reason: str
) -> None:
    done = run(*arguments, cwd=tmp_path, url=server.url)
    assert done.returncode == status
    assert reason in " ".join(re.sub("[│╭╰─╮╯]", "", done.stderr).split())
    assert "Traceback" not in done.stderr


def test_a_service_that_does_not_run_is_told_with_what_to_do(tmp_path: Path) -> None:
    done = run("jobs", cwd=tmp_path, url="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("diffusion-api: no answer from http://127.0.0.1:9: ")
    assert done.stderr.endswith("; `diffusion-api serve` starts a service, --url names another\n")


def test_a_key_opens_a_service_that_wants_one(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    key = Keyring(tmp_path / "access").add("ann", Role.USER)
    with serving(tmp_path, secret_key="s" * 64) as server:
        assert run("models", cwd=tmp_path, url=server.url).returncode == 1
        assert "small" in run("models", cwd=tmp_path, url=server.url, key=key).stdout


def test_who_stops_watching_does_not_stop_the_job(server: Program, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("txt2img", "stub:seconds=0.3", "--set", "steps=100", "--watch"),
        cwd=tmp_path, env=environment(url=server.url), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as watching:  # fmt: skip
        (job,) = eventually(lambda: server.get("/queue?state=processing").json()["jobs"], "the job to run")
        eventually(lambda: f"GET /queue/{job['job_id']}" in server.log, "it to be watched")
        watching.send_signal(signal.SIGINT)
        _, told = watching.communicate(timeout=PATIENCE)
    assert watching.returncode == 130, told
    assert f"To end it: diffusion-api cancel {job['job_id']}" in told
    assert server.status(job["job_id"])["state"] == "processing"
    said(server, "cancel", job["job_id"], cwd=tmp_path)


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    asked = {"_DIFFUSION_API_COMPLETE": "complete_bash", "COMP_WORDS": "diffusion-api ca", "COMP_CWORD": "1"}
    for variables, answer in ((asked, "cancel\n"), ({"_DIFFUSION_API_COMPLETE": "source_bash"}, "complete -o default")):
        done = subprocess.run(
            command(), cwd=tmp_path, env=environment() | variables, capture_output=True, text=True, check=False
        )
        assert answer in done.stdout


def test_a_dry_run_is_refused_in_one_line(server: Program, tmp_path: Path) -> None:
    done = run("txt2img", "x", "--set", "dry_run=true", cwd=tmp_path, url=server.url)
    assert done.returncode == 1
    assert "dry_run makes no job" in done.stderr
    assert "Traceback" not in done.stderr
