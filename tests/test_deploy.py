"""What ``deploy/`` says is so, as far as it shows without a container engine and without systemd as process 1."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
import yaml
from serving import ROOT, Program, environment, eventually

from diffusion_api.settings import Settings
from diffusion_api.supervisor import CLEARING

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "diffusion-api.service"
INSTALLED = "/opt/diffusion-api/bin/diffusion-api"
# Another user, who may read everything (this Python may lie in a folder of root's) but write only what is his.
NOBODY = 65534
AS_NOBODY = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"),
    *(
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    ),
]

FOLDERS = ("stable_diffusion", "queue", "outputs", "access")
"""What the program writes to."""

LONGEST_STOP = Settings.model_fields["grace"].default + CLEARING


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, a pair for each instruction; continued lines are joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]]


def the_last(word: str) -> str:
    """What an instruction says in the final stage."""
    return [rest for found, rest in instructions() if found == word][-1]


def ignored(path: PurePosixPath) -> bool:
    """What ``.dockerignore`` says of a path, or of a folder above it: the last line that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        parts = path.parts if "**/" in line else path.parts[:1]
        if any(fnmatch.fnmatch(part, pattern) for part in parts):
            verdict = not line.startswith("!")
    return verdict


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """The build's context: what git tracks, without what is ignored."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    folder = tmp_path / "context"
    for name in filter(None, listed.stdout.split("\0")):
        if not ignored(PurePosixPath(name)) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of root's that others may read; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# The image


def test_what_the_image_copies_is_in_the_context_and_nothing_else_is(context: Path) -> None:
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    }
    assert copied == {path.name for path in context.iterdir()}
    assert ignored(PurePosixPath("diffusion_api/__pycache__/cli.cpython-311.pyc"))


def test_stages_copy_from_earlier_stages_only() -> None:
    names: list[str] = []
    for word, rest in instructions():
        if word == "FROM":
            names.append(rest.partition(" AS ")[2])
        if found := re.search(r"--from=(\S+)", rest):
            assert found[1] in names[:-1]
    assert len(names) == 2


def test_every_download_is_checked_against_its_hash() -> None:
    installs = [part for word, rest in instructions() if word == "RUN" for part in rest.split("&&") if "pip" in part]
    assert installs
    assert all("--require-hashes -r" in part or "--no-index" in part for part in installs)


def test_every_dependency_is_locked() -> None:
    """The package is installed without looking for dependencies: the lock must have them all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = re.findall(r"^([a-z0-9_.-]+)==", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    named = {re.match(r"[a-z0-9_.-]+", dependency)[0] for dependency in project["dependencies"]}  # type: ignore[index]
    assert named - set(locked) == set()


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed")
def test_the_wheel_is_built_from_the_context_alone(context: Path) -> None:
    (command,) = (
        part.strip() for word, rest in instructions() if word == "RUN" for part in rest.split("&&") if "hatch" in part
    )
    program, *arguments = shlex.split(command)
    assert PurePosixPath(program).name == "python"
    subprocess.run([sys.executable, *arguments], cwd=context, env=environment(), check=True, capture_output=True)
    (wheel,) = (context / "dist").glob("*.whl")
    assert wheel.stat().st_size > 2**20


def test_it_runs_as_a_user_who_may_write_to_the_volumes_only() -> None:
    user, _, group = the_last("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    (made,) = (rest for word, rest in instructions() if word == "RUN" and "useradd" in rest)
    assert f"--uid {user} --user-group" in made
    home = re.search(r"DIFFUSION_API_HOME=(\S+)", the_last("ENV"))
    assert home
    volumes = json.loads(the_last("VOLUME"))
    assert volumes == [f"{home[1]}/{name}" for name in FOLDERS]
    owned = re.search(r"chown \S+ (.*)", made)
    assert owned
    assert owned[1].split() == volumes
    assert the_last("WORKDIR") == home[1]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_its_command_and_its_check_work_for_a_user_with_no_home(home: Path, tmp_path: Path) -> None:
    """As in the image: another user, folders made beforehand in a home that is not his, an environment of its own."""
    for name in FOLDERS:
        (home / name).mkdir(parents=True)
        os.chown(home / name, NOBODY, NOBODY)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    image = dict(part.split("=", 1) for part in shlex.split(the_last("ENV")) if not part.startswith("PATH="))
    theirs = {"API_PORT": str(port), "LOG_LEVEL": "INFO", "API_KEY": "", "RATE_LIMIT_REQUESTS": "100", "WORKERS": "1"}
    settings = (
        environment(engine="stub") | image | theirs
    )  # as a compose file has it that was written for another program
    settings |= {"DIFFUSION_API_HOME": str(home), "HOME": "/nonexistent"}
    assert json.loads(the_last("ENTRYPOINT")) == ["diffusion-api"]
    command = [sys.executable, "-m", "diffusion_api", *json.loads(the_last("CMD"))]
    check = json.loads(the_last("HEALTHCHECK").partition(" CMD ")[2])
    check[0] = sys.executable
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*AS_NOBODY, *command], cwd=home, env=settings, stdout=file, stderr=file, text=True)
    try:
        eventually(lambda: "serves http" in log.read_text() or process.poll() is not None, "it to listen")
        assert process.poll() is None, log.read_text()
        key = re.search(r"dapi_\S+", log.read_text())
        assert key, "the key of the first start"
        server = Program(process, home, log, f"http://127.0.0.1:{port}", key=key[0])

        def healthy() -> bool:
            return subprocess.run([*AS_NOBODY, *check], env=settings, check=False).returncode == 0

        assert healthy()
        assert server.result(prompt="a lighthouse")["state"] == "done"
        drawn = server.request("POST", "/generate", json={"prompt": "a lighthouse", "num_inference_steps": 1})
        assert drawn.json()["images"][0].startswith("data:image/png;base64,")
        server.signal(signal.SIGTERM)
        assert server.ended() == 0, log.read_text()
        assert not healthy()
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_the_list_of_loras_is_where_that_user_may_write(home: Path) -> None:
    (home / "stable_diffusion").mkdir()
    os.chown(home / "stable_diffusion", NOBODY, NOBODY)
    put = (
        "import sys; from pathlib import Path; from diffusion_api.catalog import lora_list as l; "
        "l.put(l.place(Path(sys.argv[1])), 'ink', l.Listed(model_id=7), print)"
    )
    subprocess.run([*AS_NOBODY, sys.executable, "-c", put, home], env=environment(), check=True)
    assert list(json.loads((home / "stable_diffusion" / "lora_list.json").read_text())) == ["ink"]


# Compose


def test_the_compose_file_fits_the_image() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert {name: service["profiles"] for name, service in compose["services"].items()} == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
    }
    for service in compose["services"].values():
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
        mounts = dict(volume.split(":", 1) for volume in service["volumes"])
        assert list(mounts.values()) == json.loads(the_last("VOLUME"))
        assert mounts.keys() == compose["volumes"].keys()
        (port,) = service["ports"]
        assert port == f"127.0.0.1:8000:{the_last('EXPOSE')}"
        assert int(service["stop_grace_period"].removesuffix("s")) > LONGEST_STOP
        assert (service["init"], service["read_only"], service["cap_drop"]) == (True, True, ["ALL"])
        wanted = {name.removeprefix("DIFFUSION_API_").lower() for name in service["environment"]}
        assert wanted <= set(Settings.model_fields)
    (gpu,) = compose["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (gpu["driver"], gpu["capabilities"]) == ("nvidia", ["gpu"])


# systemd


def unit(key: str) -> str:
    """A line of the unit."""
    (value,) = re.findall(rf"^{key}=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return str(value)


def test_the_unit_stops_and_restarts_as_the_service_does() -> None:
    assert int(unit("TimeoutStopSec")) > LONGEST_STOP
    assert (unit("KillMode"), unit("Restart"), unit("OOMPolicy")) == ("mixed", "on-failure", "continue")
    assert unit("ReadWritePaths") == unit("Environment").partition("=")[2]
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_api", *shlex.split(unit("ExecStart"))[1:], "--help"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit_and_finds_it_well_locked_up(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(INSTALLED, sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", copy],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stdout[-500:]
