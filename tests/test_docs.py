"""What the documents say of the code is so."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import counting
import pytest
import typer
from serving import ROOT

from diffusion_api import cli
from diffusion_api.catalog import samplers
from diffusion_api.dialects.native.bodies import Img2ImgBody, Txt2ImgBody, UpscaleBody
from diffusion_api.server import build_app
from diffusion_api.settings import Settings

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in _source(path)] == []


def _source(path: str) -> str:
    file = ROOT / path
    return file.read_text("utf-8") if file.exists() else ""


def test_the_operating_guide_names_every_setting() -> None:
    text = (ROOT / "docs" / "operating.md").read_text("utf-8")
    missing = [n for n in Settings.model_fields if not re.search(rf"`(DIFFUSION_API)?_{n.upper()}`", text)]
    assert missing == []


def test_the_operating_guide_names_no_setting_that_does_not_exist() -> None:
    text = (ROOT / "docs" / "operating.md").read_text("utf-8")
    named = set(re.findall(r"DIFFUSION_API_([A-Z_]+)", text))
    assert {n.lower() for n in named} <= set(Settings.model_fields)


def test_every_route_has_a_page() -> None:
    with tempfile.TemporaryDirectory() as home:
        document = build_app(Settings(home=Path(home), engine="stub"), worker=False).openapi()
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    pages = "\n".join(page.read_text("utf-8") for page in PAGES)
    assert [route for route in routes if not re.search(rf"\b{re.escape(route)}(?![\w/])", pages)] == []


def test_the_page_of_the_jobs_names_every_field() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text("utf-8")
    bodies = (Txt2ImgBody, Img2ImgBody, UpscaleBody)
    assert [name for body in bodies for name in body.model_fields if f"`{name}`" not in text] == []


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name, command


COMMANDS = dict(_commands(typer.main.get_command(cli.app)))
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text("utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_the_command_line_names_every_option(name: str) -> None:
    section = re.search(
        rf"^### `diffusion-api {name.split()[0]}\b.*?(?=^##)", f"{CLI_PAGE}\n##", re.MULTILINE | re.DOTALL
    )
    assert section
    assert name in section[0]
    common = CLI_PAGE[: CLI_PAGE.index("\n## ")]
    options = [
        p.opts + p.secondary_opts for p in COMMANDS[name].params if p.param_type_name == "option" and not p.hidden
    ]
    assert [names for names in options if not any(f"`{n}`" in section[0] + common for n in names)] == []


def test_the_page_of_the_command_line_names_no_option_that_does_not_exist() -> None:
    options = {n for command in COMMANDS.values() for p in command.params for n in (*p.opts, *p.secondary_opts)}
    options |= {"--help", "--version", "--install-completion", "--show-completion"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", CLI_PAGE)) - options == set()


def test_the_architecture_page_names_every_module_at_the_top() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    modules = {p.stem for p in (ROOT / "diffusion_api").glob("*.py")} - {"__init__"}
    folders = {p.name for p in (ROOT / "diffusion_api").iterdir() if (p / "__init__.py").exists()}
    assert [m for m in sorted(modules) if f"`{m}`" not in text] == []
    assert [f for f in sorted(folders) if f"`{f}/`" not in text] == []


def test_the_figures_of_the_readme_are_those_of_the_bench() -> None:
    table = re.search(r"<!-- figures -->(.*)<!-- /figures -->", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert table
    service = _figures("service")
    startup = _figures("startup")
    text = _figures("text")
    models = _figures("models")
    loras = _figures("loras")
    upscale = _figures("upscale")
    for figure in (
        upscale["seconds"],
        upscale["peak_mib_over_start"],
        upscale["result_mib"],
        service["ratio_median"],
        startup["import_above_fastapi_ms"],
        startup["hello_seconds_median"],
        text["first_ms"],
        text["again_ms"],
        models["load_ratio_median"],
        models["switch_ms_median"],
        *(loras[name] for name in ("another_ms", "again_ms", "none_ms")),
    ):
        assert str(figure) in table[1]


def test_a_prompt_that_comes_again_costs_a_millisecond_at_most() -> None:
    text: dict[str, Any] = _figures("text")
    assert text["again_ms"] <= 1


def test_thousands_of_brackets_cost_milliseconds() -> None:
    text: dict[str, Any] = _figures("text")
    assert max(text["brackets_2000_ms"], text["groups_500_ms"]) < 20


def test_the_speeds_that_are_promised_were_measured() -> None:
    models = _figures("models")
    assert models["load_ratio_median"] <= 1.1
    assert models["switch_ms_median"] <= 20
    memory = _figures("memory")
    assert memory["jobs"] >= 200
    assert memory["slope_kib_per_job"] < 50


def test_the_counts_of_the_page_on_reliability_are_those_of_the_runs() -> None:
    assert counting.shown((ROOT / "docs" / "reliability.md").read_text("utf-8")) == counting.table(
        counting.counts_kept()
    )


def test_the_page_on_reliability_has_every_fault() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    numbers = re.findall(r"^\| (\d+) \|.*`tests/\S+::\w+`.*\|$", text, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 48)]


def test_the_table_of_the_samplers_is_that_of_the_bench() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text("utf-8")
    table = re.search(r"<!-- figures -->(.*)<!-- /figures -->", page, re.DOTALL)
    assert table
    known = {cells[1].strip(): cells[3:6] for row in table[1].splitlines() if len(cells := row.split("|")) > 5}
    measured = _figures("samplers")
    assert measured["lowest_db"] >= 50
    for row in samplers.SAMPLERS:
        by_schedule = measured["psnr_db"][row.name].values()
        cells = [" / ".join(map(str, decibels)) for decibels in by_schedule]
        assert [cell.strip() for cell in known[row.label]][: len(cells)] == cells
    for name, share in measured["overhead_percent"].items():
        assert f"{samplers.sampler(name).label} {share} %" in table[1]
        assert share <= 2
    assert f"(512 pixels: {measured['overhead_percent_sde_512']} %)" in table[1]
    assert measured["overhead_percent_sde_512"] <= 2


def test_the_page_of_the_samplers_names_all_of_them() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text("utf-8")
    assert [row.name for row in samplers.SCHEDULES if f"| `{row.name}` | {row.label} |" not in page] == []


def _figures(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["figures"]
    return figures


def test_the_changelog_has_an_entry() -> None:
    assert re.search(r"## .*\n+### Added\n+- ", (ROOT / "CHANGELOG.md").read_text("utf-8"))
