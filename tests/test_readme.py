"""Every command of the README runs. One that no test here runs fails, so that none is added unseen."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import ROOT, Program, environment

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
INLINE = re.findall(r"`((?:make|\.venv/bin/diffusion-api) [^`]*)`", README)
EXAMPLE_URL = "http://127.0.0.1:8000"
EXAMPLE_ID = "242d6f93-…"


def commands() -> list[str]:
    """Each command once, without comments, continued lines and loops joined."""
    found = []
    for block in BLOCKS:
        text = re.sub(r"\\\n\s*", "", block)
        lines = [re.sub(r"(^|\s+)#.*", "", line) for line in text.splitlines()]
        script = "\n".join(line for line in lines if line.strip())
        found += [script] if "for " in script else script.splitlines()
    return list(dict.fromkeys(found + INLINE))


def shell(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
        **options,  # type: ignore[call-overload]
    )


def in_own_environment() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("runs from .venv, as `make test` does; this is another environment")


def demo(command: str, server: Program) -> None:
    in_own_environment()
    output = shell(command).stdout
    found = re.search(r"Image: (\S+\.png)", output)
    assert found, output
    assert "Steps: " in output
    picture = Path(found[1])
    assert picture.is_file()
    picture.unlink()


def serve(command: str, server: Program) -> None:
    """It keeps running, and the curl line that it prints works when pasted."""
    in_own_environment()
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command} PORT=0"],
        cwd=ROOT,
        env=environment(engine="stub"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(2)]
        assert "serves http://127.0.0.1:" in lines[0]
        assert json.loads(shell(lines[1]).stdout)["status"] == "queued"
    finally:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        for child in children.stdout.split():
            os.kill(int(child), 15)
        process.terminate()
        process.wait(60)


def post(command: str, server: Program) -> None:
    answers = shell(command.replace(EXAMPLE_URL, server.url)).stdout
    ids = re.findall(r'"job_id":"([^"]+)"', answers)
    assert ids
    for job_id in ids:
        assert server.wait(job_id)["image"]


def poll(command: str, server: Program) -> None:
    job_id = server.submit(prompt="a cat", steps=1)
    answer = shell(command.replace(EXAMPLE_URL, server.url).replace(EXAMPLE_ID, job_id))
    assert json.loads(answer.stdout)["job_id"] == job_id


def succeed(command: str, server: Program) -> None:
    in_own_environment()
    assert shell(command).stdout


def cpu_build(command: str, server: Program) -> None:
    """Installing another build needs PyTorch's own index: here only what make would do is looked at."""
    assert "--torch-backend cpu" in shell(command.replace("make", "make -n -B")).stdout


def itself(command: str, server: Program) -> None:
    """``make test`` is what runs this; ``make lint`` runs after it, ``make audit`` asks PyPI, ``make bench`` takes minutes."""
    assert shell(command.replace("make", "make -n")).stdout


RUNNERS: tuple[tuple[str, Callable[[str, Program], None]], ...] = (
    (r"make demo", demo),
    (r"make serve", serve),
    (r"(make demo|make setup) TORCH=cpu", cpu_build),
    (r"make (test|lint|audit|bench)", itself),
    (r"make help", succeed),
    (r"\.venv/bin/diffusion-api doctor", succeed),
    (r"(?s)(for prompt in .*)?curl .*/txt2img .*", post),
    (r"curl .*/queue/\S+", poll),
)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, stub_server: Program) -> None:
    runner = next((run for pattern, run in RUNNERS if re.fullmatch(pattern, command)), None)
    assert runner, f"no test runs {command!r}"
    runner(command, stub_server)


def test_the_readme_has_the_commands_that_a_newcomer_needs() -> None:
    found = commands()
    assert found[:2] == ["make demo", "make serve"]
    assert any(shlex.split(c)[0] == "curl" for c in found if "\n" not in c)
