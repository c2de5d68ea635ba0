"""The TypeScript client: its types, against the OpenAPI document and the compiler; its code, run by Node against a service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_models import diffusers_folder
from serving import PATIENCE, ROOT, Program, serving

CLIENT = ROOT / "clients" / "typescript"
SOURCE = (CLIENT / "diffusion-api.ts").read_text("utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    home = tmp_path_factory.mktemp("typescript")
    diffusers_folder(home / "stable_diffusion" / "models" / "small", sample_size=8)
    with serving(home) as program:
        yield program


@pytest.fixture(scope="module")
def document(server: Program) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/openapi.json").json()
    return found


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(argument) for argument in arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.fixture(scope="module")
def tsc() -> list[object]:
    """The compiler, in the version that package-lock.json has; fetched once, and kept beside it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js and npm are not installed")
    pinned = json.loads((CLIENT / "package.json").read_text())["devDependencies"]["typescript"]
    package = CLIENT / "node_modules" / "typescript"
    if not package.exists() or json.loads((package / "package.json").read_text())["version"] != pinned:
        fetched = run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=CLIENT)
        if fetched.returncode != 0:
            pytest.skip(f"npm cannot fetch typescript {pinned}: {fetched.stderr.strip()[-200:]}")
    return ["node", package / "bin" / "tsc"]


@pytest.fixture(scope="module")
def compiled(tsc: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client as JavaScript, and its declarations."""
    folder = tmp_path_factory.mktemp("compiled")
    done = run(*tsc, "--project", CLIENT, "--outDir", folder, cwd=CLIENT)
    assert done.returncode == 0, done.stdout
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def interfaces() -> dict[str, tuple[str | None, set[str], str | None]]:
    """By name: the schema that an interface is of, its fields, and the interface that it extends."""
    found = re.findall(
        r"(?:/\*\* @openapi (\w+) \*/\n)?export interface (\w+)(?: extends (\w+))? \{\n(.*?)\n\}", SOURCE, re.DOTALL
    )
    return {
        name: (schema or None, set(re.findall(r"^  (\w+)\??:", body, re.MULTILINE)), base or None)
        for schema, name, base, body in found
    }


def fields_of(name: str) -> set[str]:
    _, fields, base = interfaces()[name]
    return fields | (fields_of(base) if base else set())


OF_A_SCHEMA = {name: schema for name, (schema, _, _) in interfaces().items() if schema}


def test_the_bodies_of_the_service_have_interfaces() -> None:
    bodies = {"Txt2ImgBody", "Img2ImgBody", "UpscaleBody", "SubmittedBody", "StatusBody", "JobsBody", "ModelsBody"}
    assert bodies <= set(OF_A_SCHEMA.values())


@pytest.mark.parametrize(("name", "schema"), OF_A_SCHEMA.items())
def test_each_field_of_an_interface_is_in_the_document(document: dict[str, Any], name: str, schema: str) -> None:
    described = document["components"]["schemas"][schema]["properties"]
    assert fields_of(name) - set(described) == set()


def test_each_route_of_the_client_is_in_the_document(document: dict[str, Any]) -> None:
    used = re.findall(r'"(GET|POST|DELETE)", "(/[^"]*)"', SOURCE)
    assert len(used) > 10
    assert [(method, path) for method, path in used if method.lower() not in document["paths"].get(path, {})] == []


def test_each_query_of_the_client_is_in_the_document(document: dict[str, Any]) -> None:
    described = {
        parameter["name"]
        for methods in document["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", ())
    }
    assert {"wait", "image", "state", "limit", "cursor", "partial", "Idempotency-Key"} <= described
    assert set(re.findall(r'\["(\w+)", ', SOURCE)) <= described


def test_the_compiler_knows_the_fields(tsc: list[object], compiled: Path, tmp_path: Path) -> None:
    calls = {
        'txt2img({ prompt: "a circle", steps: 4 })': "",
        "txt2img({ prompt: 1 })": "Type 'number' is not assignable to type 'string'",
        'txt2img({ prompt: "a circle", step: 4 })': "'step' does not exist in type",
        'img2img({ prompt: "a circle" })': "Property 'image' is missing",
    }
    lines = [
        f'import {{ DiffusionAPIClient }} from "{compiled}/diffusion-api.js";',
        "const c = new DiffusionAPIClient();",
    ]
    (tmp_path / "program.ts").write_text("\n".join([*lines, *(f"c.{call};" for call in calls)]))
    options = ("--strict", "--noEmit", "--target", "ES2022", "--module", "ES2022", "--moduleResolution", "bundler")
    told = run(*tsc, *options, "program.ts", cwd=tmp_path).stdout
    for number, mistake in enumerate(calls.values(), 3):
        found = "".join(re.findall(rf"^program\.ts\({number},.*(?:\n  .*)*", told, re.MULTILINE))
        assert (mistake in found) if mistake else not found, told


PAGE = (ROOT / "docs" / "clients.md").read_text("utf-8")
SHOWN = (r"(\d+(\.\d+)?\n)+\d+ image/png 64\n", r"(\d+\n|\w+ \d+(\.\d+)?\n)+")


@pytest.mark.parametrize(
    ("program", "prints"), [*zip(re.findall(r"```typescript\n(.*?)```", PAGE, re.DOTALL), SHOWN, strict=True)]
)
def test_a_program_of_the_page_compiles_and_runs(
    server: Program, tsc: list[object], compiled: Path, program: str, prints: str
) -> None:
    (compiled / "page.ts").write_text(program.replace("http://127.0.0.1:8000", server.url))
    options = ("--strict", "--target", "ES2022", "--module", "ES2022", "--moduleResolution", "bundler")
    done = run(*tsc, *options, "page.ts", cwd=compiled)
    assert done.returncode == 0, done.stdout
    shown = run("node", "page.js", cwd=compiled)
    assert re.fullmatch(prints, shown.stdout), shown.stderr


PROGRAM = """
import { ApiError, DiffusionAPIClient, JobFailed, toBase64 } from "./diffusion-api.js";

const client = new DiffusionAPIClient(process.argv[2] + "/", { patience: 1 });
const said = {};
const caught = async (promise) => promise.then(() => "nothing", (error) => [error.name, error.message]);

const job = await client.txt2img({ prompt: "two", steps: 2, n: 2, seed: 7, fileType: "png" }, "once");
said.again = (await client.txt2img({ prompt: "two", steps: 2, n: 2, seed: 7, fileType: "png" }, "once")).job_id === job.job_id;
const states = [];
const done = await client.result(job.job_id, { onProgress: (now) => states.push(now.state) });
said.seed = done.seed;
said.last = states.at(-1);
said.left_out = done.image === undefined;
const picture = await client.getImage(job.job_id, 1);
const status = await client.getJobStatus(job.job_id);
said.picture = [picture.type, (await toBase64(picture)) === status.images[1]];

const drawn = await client.img2img({ prompt: "a star", image: await toBase64(picture), steps: 2 });
said.drawn = (await client.result(drawn.job_id)).state;
const page = await client.getJobs(["done"], 1);
const rest = await client.getJobs(["done"], 5, page.next);
said.listed = [page.jobs[0].job_id === drawn.job_id, rest.jobs[0].job_id === job.job_id];

const slow = await client.txt2img({ prompt: "stub:seconds=0.2", steps: 100 });
said.cancelled = (await client.cancel(slow.job_id)).cancelled;
said.failed = await caught(client.result(slow.job_id));
said.refused = await caught(client.txt2img({ prompt: "x", steps: 0 }));
said.missing = await caught(client.getJobStatus("no/body"));
said.models = (await client.getModels()).models.map((model) => model.name);
said.upscaler = (await client.getUpscalers()).upscalers[0].name;
said.loras = (await client.getLoRAs()).loras.length;
said.capable = [(await client.getCapabilities("small")).model.name, (await client.getCapabilities()).features[0]];
const shown = await fetch(new URL(done.image_url, process.argv[2]));
said.shown = shown.headers.get("Content-Type");
said.detail = (await client.getJobStatus(slow.job_id)).detail;
said.samplers = (await client.getSamplingMethods()).sampling_methods.includes("Euler a");

const told = await client.txt2img({ prompt: "stub:seconds=0.05", steps: 8, preview_every: 2, model: "small" });
const events = [];
for await (const event of client.events(told.job_id)) events.push(event);
said.events = [[...new Set(events.map((event) => event.name))].sort(), events.at(-1).status.state];
said.preview = atob(events.find((event) => event.name === "preview").preview).slice(6, 10);
said.no_events = await caught(client.events("nobody").next());
said.info = (await client.getImageInfo(await toBase64(picture))).parameters.Seed;
const made = await client.reproduce(job.job_id);
said.matched = (await client.result(made.job_id)).reproduces.matched;
await client.pause();
said.paused = (await client.getHealth()).queue.paused;
await client.resume();
said.loaded = await client.loadModel("SMALL");
said.label = (await client.getModelAliases()).models.some((model) => model.label === "MeinaMix V11");
console.log(JSON.stringify(said));
"""


def test_the_page_names_every_method_of_the_client() -> None:
    methods = set(re.findall(r"^  (?:async )?\*?(\w+)\(.*\{$", SOURCE, re.MULTILINE)) - {"constructor"}
    assert len(methods) > 20
    assert [name for name in methods if f"`{name}`" not in PAGE] == []


def test_node_runs_the_client(server: Program, compiled: Path) -> None:
    (compiled / "program.js").write_text(PROGRAM)
    done = run("node", "program.js", server.url, cwd=compiled)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    refused, missing, failed = said.pop("refused"), said.pop("missing"), said.pop("failed")
    assert said.pop("no_events")[1].endswith("(HTTP 404)")
    assert said == {
        **{"again": True, "seed": 7, "last": "done", "left_out": True, "picture": ["image/png", True], "drawn": "done"},
        **{"listed": [True, True], "cancelled": True, "models": ["small"], "upscaler": "Latent", "loras": 0},
        **{"samplers": True, "capable": ["small", "txt2img"], "shown": "image/png", "detail": "cancelled"},
        **{"events": [["preview", "progress", "state"], "done"], "preview": "JFIF", "info": 8, "matched": True},
        **{"paused": True, "loaded": "small", "label": True},
    }
    assert failed == ["JobFailed", failed[1]]
    assert failed[1].endswith("ended without a picture: cancelled")
    assert refused[0] == "ApiError"
    assert refused[1].startswith("steps is 0: ")
    assert missing == ["ApiError", missing[1]]
    assert missing[1].endswith("(HTTP 404)")
