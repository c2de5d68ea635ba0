"""The command ``diffusion-api``, as processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_models import SD1_KEYS, checkpoint, diffusers_folder
from serving import PATIENCE, Program, command, environment, run

from diffusion_api import __version__


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model."""
    folder = tmp_path / "home"
    diffusers_folder(folder / "stable_diffusion" / "models" / "models--mirroring--pastel-mix")
    return folder


def complaint(*arguments: object, cwd: Path, **settings: object) -> str:
    """What a command that must fail says: one line on stderr, nothing else."""
    done = run(*arguments, cwd=cwd, **settings)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def table(*arguments: object, cwd: Path, **settings: object) -> dict[str, list[str]]:
    """What ``config`` prints, by setting."""
    done = run("config", *arguments, cwd=cwd, **settings)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("way", ["version", "--version"])
def test_it_tells_its_version(tmp_path: Path, way: str) -> None:
    told = run(way, cwd=tmp_path)
    assert (told.stdout, told.returncode) == (f"{__version__}\n", 0)


def test_help_names_every_command(tmp_path: Path) -> None:
    printed = run("--help", cwd=tmp_path).stdout
    assert [c for c in "serve worker demo models doctor config version".split() if c not in printed] == []


def test_models_of_other_programs_are_listed_too(tmp_path: Path) -> None:
    checkpoint(tmp_path / "webui" / "models" / "Stable-diffusion" / "dream.safetensors", SD1_KEYS)
    checkpoint(tmp_path / "ComfyUI" / "models" / "checkpoints" / "base.safetensors", SD1_KEYS)
    roots = [tmp_path / "webui", tmp_path / "ComfyUI"]
    flags = [argument for root in roots for argument in ("--models-from", root)]
    listing = "list-available-models-loras"
    flagged = run(listing, *flags, cwd=tmp_path, shipped_models=False)
    named = run(listing, cwd=tmp_path, shipped_models=False, models_from=os.pathsep.join(map(str, roots)))
    assert named.stdout == flagged.stdout
    assert re.findall(r"Path: (\S+)", named.stdout) == [
        "ComfyUI/models/checkpoints/base.safetensors",
        "webui/models/Stable-diffusion/dream.safetensors",
    ]
    assert table(*flags, cwd=tmp_path)["models_from"] == [os.pathsep.join(map(str, roots)), "flag"]


def test_a_file_that_is_no_model_is_told_beside_the_list(home: Path, tmp_path: Path) -> None:
    (home / "stable_diffusion" / "models" / "bad.safetensors").write_bytes(b"<html>")
    done = run("list-available-models-loras", "--home", home, cwd=tmp_path, shipped_models=False)
    assert done.returncode == 0
    assert "MODELS (1 found)" in done.stdout
    assert "bad.safetensors is not listed" in done.stderr


def test_config_tells_each_value_and_its_source(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DIFFUSION_API_MODEL=small\nDIFFUSION_API_HOST=10.0.0.1\n")
    rows = table("--port", 81, cwd=tmp_path, host="10.0.0.2", grace=5)
    assert rows["port"] == ["81", "flag"]
    assert rows["host"] == ["10.0.0.2", "DIFFUSION_API_HOST"]
    assert rows["grace"] == ["5.0", "DIFFUSION_API_GRACE"]
    assert rows["model"] == ["small", ".env"]
    assert rows["device"] == ["auto", "default"]


def test_a_flag_beats_all_in_config(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DIFFUSION_API_ENGINE=diffusers\n")
    rows = table("--engine", "stub", "--home", tmp_path, "--host", "::1", cwd=tmp_path, engine="diffusers")
    assert rows["engine"] == ["stub", "flag"]
    assert rows["home"] == [str(tmp_path), "flag"]
    assert rows["host"] == ["::1", "flag"]


@pytest.mark.parametrize("command", ["serve", "config"])
def test_a_wrong_setting_is_told_in_one_line(tmp_path: Path, command: str) -> None:
    line = complaint(command, cwd=tmp_path, port="x")
    assert line.startswith("diffusion-api: setting port (DIFFUSION_API_PORT) is 'x': ")


def test_a_wrong_setting_in_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DIFFUSION_API_GRACE=soon\n")
    assert "setting grace (DIFFUSION_API_GRACE) is 'soon'" in complaint("serve", cwd=tmp_path)


def test_an_unknown_engine_is_told_with_the_choices(tmp_path: Path) -> None:
    line = complaint("worker", "--engine", "torch", cwd=tmp_path)
    assert "setting engine (DIFFUSION_API_ENGINE) is 'torch'" in line
    assert "'diffusers' or 'stub'" in line


def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = complaint("serve", "--engine", "stub", "--port", port, cwd=tmp_path)
    assert line == (
        f"diffusion-api: cannot listen on 127.0.0.1:{port}: Address already in use; try --port 0 for a free port"
    )


def test_a_host_that_is_not_ours_is_told_in_one_line(tmp_path: Path) -> None:
    line = complaint("serve", "--engine", "stub", "--host", "192.0.2.1", "--port", 0, cwd=tmp_path)
    assert line.startswith("diffusion-api: cannot listen on 192.0.2.1:0: ")


def test_a_home_that_is_a_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = complaint("serve", "--engine", "stub", "--home", tmp_path / "file", cwd=tmp_path, port=0)
    assert line.startswith(f"diffusion-api: home {tmp_path / 'file'}: ")
    assert "cannot be made: Not a directory" in line


def test_the_doctor_finds_nothing_wrong_and_shows_names_as_they_are(tmp_path: Path) -> None:
    home = tmp_path / "[red]home[/]"
    diffusers_folder(home / "stable_diffusion" / "models" / "[bold]model")
    done = run("doctor", "--home", home, cwd=tmp_path, engine="stub", shipped_models=False)
    assert done.returncode == 0, done.stdout
    assert "everything is well" in done.stdout
    assert "open to everybody on this machine" in done.stdout
    assert f"{home}, " in done.stdout
    assert "[bold]model (sd1, 512 px)" in done.stdout
    assert f"Diffusion API {__version__}, Python {sys.version.split()[0]}" in done.stdout


def test_the_doctor_says_what_to_do(tmp_path: Path) -> None:
    done = run("doctor", "--home", tmp_path, cwd=tmp_path, engine="stub", shipped_models=False)
    assert done.returncode == 1
    assert f"-> put a model into {tmp_path / 'stable_diffusion' / 'models'}" in done.stdout
    assert "2 things to fix" in done.stdout


def test_the_doctor_names_files_that_cannot_be_used_and_does_not_call_that_well(home: Path, tmp_path: Path) -> None:
    folder = home / "stable_diffusion"
    (folder / "models" / "bad.safetensors").write_bytes(b"<html>")
    (folder / "models.toml").write_text("[pastel_mix]\nsize = 3\n")
    done = run("doctor", "--home", home, cwd=tmp_path, engine="stub", shipped_models=False)
    assert done.returncode == 1
    assert "files     bad.safetensors is not listed: models/bad.safetensors is no safetensors file" in done.stdout
    assert "files     models.toml: [pastel_mix] is not used: size is 3" in done.stdout
    assert "-> mend it, or take it away" in done.stdout
    assert "2 things to fix" in done.stdout
    assert "not listed" not in done.stderr


def test_the_doctor_shows_the_size_that_models_toml_says(home: Path, tmp_path: Path) -> None:
    (home / "stable_diffusion" / "models.toml").write_text("[models--mirroring--pastel-mix]\nsize = [512, 768]\n")
    told = run("doctor", "--home", home, cwd=tmp_path, engine="stub", shipped_models=False)
    assert "models--mirroring--pastel-mix (sd1, 512x768 px)" in told.stdout


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"model": "gone"}, "model 'gone' is not installed"),
        ({"home": "/nowhere/at/all"}, "the folder does not exist"),
        ({"host": "0.0.0.0", "require_auth": "false"}, "make a key: `diffusion-api keys add NAME --admin`"),
    ],
)
def test_the_doctor_notices(home: Path, tmp_path: Path, settings: dict[str, str], advice: str) -> None:
    done = run("doctor", cwd=tmp_path, **{"home": str(home), "engine": "stub", "shipped_models": "false"} | settings)
    assert done.returncode == 1
    assert advice in done.stdout


def test_the_doctor_finds_the_device(home: Path, tmp_path: Path) -> None:
    done = run("doctor", "--home", home, cwd=tmp_path, device="cpu", shipped_models=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (device,) = (line for line in done.stdout.splitlines() if " device " in line)
    assert "float32" in device


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_told_how_to_complete(tmp_path: Path, shell: str) -> None:
    done = subprocess.run(
        command("--show-completion", shell),
        cwd=tmp_path,
        env=environment() | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "_DIFFUSION_API_COMPLETE" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, timeout=PATIENCE, check=True)


COMPLETED = {
    "diffusion-api txt": "txt2img",
    "diffusion-api txt2img fog --mod": "--model",
    "diffusion-api txt2img fog --model s": "small stable-diffusion-v1-5",
    "diffusion-api txt2img fog --lora st": "style",
    "diffusion-api upscale x.png --upscaler ES": "ESRGAN_4x",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_what_the_service_has(stub_server: Program, tmp_path: Path) -> None:
    program = tmp_path / "diffusion-api"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command())} "$@"\n')
    program.chmod(0o755)
    asked = """
        eval "$(diffusion-api --show-completion bash)"
        function=$(complete -p diffusion-api | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        while read -ra COMP_WORDS; do
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            $function diffusion-api
            echo "$(printf '%s\\n' "${COMPREPLY[@]}" | sort | xargs)"
        done
    """
    found = environment(url=stub_server.url) | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        ["bash", "-c", asked], input="".join(f"{line}\n" for line in COMPLETED), env=found, capture_output=True, text=True,
        timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == list(COMPLETED.values())


def test_a_service_that_does_not_answer_completes_nothing(tmp_path: Path) -> None:
    asked = {
        "_DIFFUSION_API_COMPLETE": "complete_bash",
        "COMP_WORDS": "diffusion-api txt2img fog --model s",
        "COMP_CWORD": "4",
    }
    found = environment(url="http://127.0.0.1:9") | asked
    done = subprocess.run(
        command(), cwd=tmp_path, env=found, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
