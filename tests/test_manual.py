"""The page of the native API: every example runs, and is answered with the fields that the page shows."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import ROOT, Program, eventually

from diffusion_api import images

PAGE = (ROOT / "docs" / "native.md").read_text("utf-8")
EXAMPLES = re.findall(r"```bash\n(.*?)\n```(?:\n\n```json\n(.*?)\n```)?", PAGE, re.DOTALL)
EXAMPLE_URL = "http://127.0.0.1:8000"


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
def test_an_example_of_the_page_is_answered_as_it_says(
    stub_server: Program, folder: Path, command: str, documented: str
) -> None:
    job_id = ""
    if "$JOB" in command:
        job_id = stub_server.submit(prompt="stub:seconds=0.1", model="small", steps=40)
        state = "done" if "reproduce" in command else "processing"
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
    answer = json.loads(done.stdout)
    if documented:
        assert shape(answer) == shape(json.loads(documented))
    else:
        assert answer["image"]


def test_the_page_names_every_route(stub_server: Program) -> None:
    document = stub_server.get("/openapi.json").json()
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert [route for route in routes if not any(route in heading.split(", ") for heading in headings)] == []


def test_the_page_names_every_field_of_every_answer(stub_server: Program) -> None:
    schemas = stub_server.get("/openapi.json").json()["components"]["schemas"]
    fields = {name for schema in schemas.values() for name in schema.get("properties", {})}
    assert sorted(name for name in fields if f"`{name}`" not in PAGE and f'"{name}"' not in PAGE) == []


def test_the_page_names_every_refusal(stub_server: Program) -> None:
    document = stub_server.get("/openapi.json").json()
    statuses = {
        status
        for methods in document["paths"].values()
        for operation in methods.values()
        for status in operation["responses"]
        if status not in ("200", "default")
    }
    table = PAGE[PAGE.index("## Refusals") :]
    assert sorted(status for status in statuses if status not in table) == []


def test_the_program_of_the_page_runs(stub_server: Program) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program.replace(EXAMPLE_URL, stub_server.url), names)
    assert images.decode(names["picture"], max_pixels=2**24).size == (512, 512)
