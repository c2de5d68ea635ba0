"""The pages of the APIs: every example runs, and is answered with the fields that the page shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import ROOT, Program, eventually

from diffusion_api.dialects.native import bodies

NAMES = ("native", "jobs", "results", "metadata", "catalog", "service", "backend-api")
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in NAMES}
ALL = "\n".join(PAGES.values())
EXAMPLES = re.findall(r"```bash\n(.*?)\n```(?:\n\n```json\n(.*?)\n```)?", ALL, re.DOTALL)
EXAMPLE_URL = "http://127.0.0.1:8000"


def programs(language: str) -> list[Any]:
    """The programs of the pages in this language."""
    found = [(name, text) for name in NAMES for text in re.findall(rf"```{language}\n(.*?)```", PAGES[name], re.DOTALL)]
    return [pytest.param(text, id=f"{name}-{number}") for number, (name, text) in enumerate(found)]


def shape(value: Any) -> Any:
    """The keys of an answer, all the way down; what it runs on differs from box to box, and so does its health."""
    if isinstance(value, dict):
        free = ("payload", "gpu", "workers", "warnings", "weights")
        return {key: None if key in free else shape(part) for key, part in value.items() if key != "warnings" or part}
    return [shape(value[0])] if isinstance(value, list) and value else None


@pytest.fixture(scope="module")
def folder(stub_server: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``picture.png``, made by the service as the page says, and a ``mask.png``."""
    status = stub_server.result(
        prompt="a lighthouse",
        model="small",
        steps=4,
        seed=42,
        sampler_name="DPM++ 2M",
        scheduler_type="karras",
        fileType="png",
    )
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "picture.png").write_bytes(base64.b64decode(status["image"]))
    Image.new("RGB", (64, 64), "white").save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(("command", "documented"), EXAMPLES, ids=[command[:60] for command, _ in EXAMPLES])
def test_an_example_of_the_pages_is_answered_as_it_says(
    stub_server: Program, folder: Path, command: str, documented: str
) -> None:
    job_id = ""
    if "$JOB" in command and "JOB=" not in command:
        job_id = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=40)
        state = "done" if re.search("reproduce|image -o", command) else "processing"
        eventually(lambda: stub_server.status(job_id)["state"] == state, f"the job to be {state}")
    done = subprocess.run(
        ["bash", "-euc", command.replace(EXAMPLE_URL, stub_server.url)],
        cwd=folder,
        env={"JOB": job_id, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    if "events" in command:
        assert re.findall(r"^(\w+):", done.stdout, re.MULTILINE)[-3:] == ["id", "event", "data"]
        return
    if "-o picture.jpg" in command:
        assert Image.open(folder / "picture.jpg").size == (64, 64)
        return
    answer = json.loads(done.stdout)
    if documented:
        assert shape(answer) == shape(json.loads(documented))
    else:
        assert answer["image"]


@pytest.mark.parametrize("program", programs("python"))
def test_a_python_program_of_the_pages_runs(stub_server: Program, folder: Path, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program.replace(EXAMPLE_URL, stub_server.url)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
@pytest.mark.parametrize("program", programs("javascript"))
def test_a_javascript_program_of_the_pages_runs(stub_server: Program, folder: Path, program: str) -> None:
    (folder / "program.mjs").write_text(program.replace(EXAMPLE_URL, stub_server.url))
    done = subprocess.run(["node", "program.mjs"], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_examples_for_curl_python_and_javascript(name: str) -> None:
    assert re.search(r"```bash\n[^`]*curl ", PAGES[name])
    assert {"python", "javascript"} <= set(re.findall(r"^```(\w+)", PAGES[name], re.MULTILINE))
    assert f"docs/{name}.md" in (ROOT / "README.md").read_text("utf-8")
    assert f"{name}.md" in PAGES["native"] or name == "native"


def test_the_pages_name_every_field_of_every_answer(stub_server: Program) -> None:
    schemas = stub_server.get("/openapi.json").json()["components"]["schemas"]
    own = [schema for name, schema in schemas.items() if hasattr(bodies, name)]
    fields = {name for schema in own for name in schema.get("properties", {})}
    assert len(fields) > 100
    assert sorted(name for name in fields if f"`{name}`" not in ALL and f'"{name}"' not in ALL) == []


def test_the_page_names_every_refusal(stub_server: Program) -> None:
    document = stub_server.get("/openapi.json").json()
    statuses = {
        status
        for methods in document["paths"].values()
        for operation in methods.values()
        for status in operation["responses"]
        if status not in ("200", "default")
    }
    table = PAGES["native"][PAGES["native"].index("## Refusals") :]
    assert sorted(status for status in statuses if status not in table) == []
