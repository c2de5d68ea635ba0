"""The rules that keep the house in order, read from the source without importing it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "diffusion_api"

# Imports point down this list, or stay in the same row or folder. A name is a module or a folder of the package.
LAYERS = (
    (
        "cli",
        "__main__",
        "asgi",
        "demo",
        "doctor",
        "pulling",
        "listing",
        "metadata",
        "lora_report",
        "remote",
        "examples",
    ),
    ("server",),
    ("supervisor",),
    ("app", "connections"),
    ("documentation", "door"),
    ("client",),
    ("dialects",),
    ("access", "users"),
    ("keys", "certificates", "ledger"),
    ("service",),
    ("worker", "waiters", "sweeper"),
    ("presence", "pace", "restart"),
    ("metrics",),
    ("webhooks", "lora_shop", "pull", "downloads", "fetch", "llm", "quotas", "links", "remote_pictures"),
    ("queues",),
    ("outputs", "blobs"),
    ("engine",),
    ("images", "canvas"),
    ("infotext",),
    ("tokens",),
    ("prompt",),
    ("catalog",),
    ("wire",),
    ("logs",),
    ("settings",),
    ("schema",),
    ("disk", "retention", "storage", "usage"),
    ("errors", "nearest"),
    ("",),  # the package itself: its version
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}

# Distributions of others, and the only places that may import them.
HOMES = {
    "torch": ("engine",),
    "numba": ("engine",),
    "torchvision": ("engine",),
    "diffusers": ("engine",),
    "transformers": ("engine",),
    "peft": ("engine",),
    "spandrel": ("engine",),
    "fastapi": ("dialects", "app", "access"),
    "fastapi_offline": ("app",),
    "starlette": ("dialects", "app", "access", "door", "connections"),
    "uvicorn": ("server", "connections"),
    "prometheus_client": ("metrics",),
    "argon2": ("keys",),
    "jwt": ("access",),
    "limits": ("quotas",),
    "cryptography": ("certificates",),
}

# In these folders modules do not know each other, only what their folder shares.
SIBLINGS = ("dialects", "queues", "engine.families")
SHARED = ("__init__", "base", "_base", "_forms", "_health", "_jobs", "disk")

# Each of them opens what a string names, be it a path or a URL, or runs code that comes with a file.
UNSAFE = {"load_image", "load_video", "trust_remote_code", "custom_pipeline", "pickle", "torch.load", "eval", "exec"}

# The one place that reads files which could hold code, and how it does: as data.
READS_PICKLES, AS_DATA = "engine.families.base", "weights_only=True"

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}

Source = dict[str, ast.Module]
"""Modules by dotted name within the package; a folder's own module ends with ``__init__``."""

Rule = Callable[[Source], list[str]]
"""Finds what breaks a rule, as sentences."""


def read(package: Path) -> Source:
    modules = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return modules


def imports(source: Source, module: str) -> set[str]:
    """Absolute dotted names of what a module imports, wherever in it the import stands."""
    folder = [PACKAGE, *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(source[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def own_imports(source: Source, module: str) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for name in imports(source, module):
        first, *rest = name.split(".")
        if first != PACKAGE:
            continue
        # `from package.module import thing` names the module's content: the longest prefix that is a module counts.
        while rest and ".".join(rest) not in source and ".".join([*rest, "__init__"]) not in source:
            rest.pop()
        dotted = ".".join(rest)
        found.add(dotted if dotted in source else ".".join([*rest, "__init__"]))
    return found - {module}


def layer(module: str) -> str:
    top = module.split(".")[0]
    return "" if top == "__init__" else top


def upward_imports(source: Source) -> list[str]:
    found = []
    for module in source:
        if layer(module) not in DEPTH:
            found.append(f"{module} has no place in LAYERS")
            continue
        for target in own_imports(source, module):
            if DEPTH[layer(module)] > DEPTH.get(layer(target), -1):
                found.append(f"{module} imports {target}")
    return found


def foreign_imports(source: Source) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in source
        for name in imports(source, module)
        if layer(module) not in HOMES.get(name.split(".")[0], (layer(module),))
    ]


def sibling_imports(source: Source) -> list[str]:
    found = []
    for module in source:
        folder, _, name = module.rpartition(".")
        if folder not in SIBLINGS or name in SHARED:
            continue
        for target in own_imports(source, module):
            other_folder, _, other = target.rpartition(".")
            if other_folder == folder and other not in SHARED:
                found.append(f"{module} imports {target}")
    return found


def environment_reads(source: Source) -> list[str]:
    found = []
    for module, tree in source.items():
        if module == "settings":
            continue
        for node in ast.walk(tree):
            uses = isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) == "os"
            takes = (
                isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT & {a.name for a in node.names}
            )
            if uses or takes:
                found.append(f"{module}: {ast.unparse(node)}")
    return found


def unsafe_loading(source: Source) -> list[str]:
    found = []
    for module, tree in source.items():
        allowed = as_data(tree) if module == READS_PICKLES else set()
        for node in ast.walk(tree):
            if node in allowed:
                continue
            match node:
                case ast.Name(id=name) | ast.keyword(arg=name) | ast.alias(name=name):
                    names = {name}
                case ast.Attribute(attr=name):
                    names = {name, ast.unparse(node)} - {"eval"}  # a network's eval() is another thing
                case _:
                    continue
            found += [f"{module} has {name} in line {node.lineno}" for name in sorted(UNSAFE & names)]
    return found


def as_data(tree: ast.Module) -> set[ast.AST]:
    """Mentions of ``torch.load`` that call it in the one harmless way."""
    return {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and AS_DATA in map(ast.unparse, node.keywords)
        if ast.unparse(node.func) == "torch.load"
    }


def fetches(source: Source) -> list[str]:
    """Calls that would ask the hub for what is not there."""
    return [
        f"{module}: {ast.unparse(node)}"
        for module, tree in source.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("from_pretrained")
        and "local_files_only=True" not in map(ast.unparse, node.keywords)
    ]


def cycle(source: Source) -> list[str]:
    graph = {module: own_imports(source, module) for module in source}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


RULES = (upward_imports, foreign_imports, sibling_imports, environment_reads, unsafe_loading, fetches, cycle)


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps(rule: Rule) -> None:
    assert rule(read(ROOT / PACKAGE)) == []


@pytest.mark.parametrize("folder", ["diffusion_api/data", "stable_diffusion", "queue", "outputs"])
def test_data_folders_hold_no_python(folder: str) -> None:
    assert list((ROOT / folder).rglob("*.py")) == []


def test_importing_the_app_leaves_torch_out() -> None:
    program = "import sys, diffusion_api.app; print(*sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("rule", "module", "text", "broken"),
    [
        (upward_imports, "worker", "from diffusion_api.queues.base import Queue", False),
        (upward_imports, "worker", "import diffusion_api.service", True),
        (upward_imports, "worker", "from diffusion_api import service", True),
        (upward_imports, "worker", "def late():\n    from diffusion_api.service import Service", True),
        (upward_imports, "fetch", "import diffusion_api.webhooks", False),
        (upward_imports, "schema.job", "from . import request", False),
        (upward_imports, "schema.job", "from ..errors import DiffusionApiError", False),
        (upward_imports, "schema.job", "from ..service import Service", True),
        (upward_imports, "service", "from diffusion_api import __version__", False),
        (upward_imports, "surprise", "import os", True),
        (foreign_imports, "engine.weights", "import torch.nn.functional as F", False),
        (foreign_imports, "catalog.library", "from torch.nn import Module", True),
        (foreign_imports, "dialects.native", "from fastapi import APIRouter", False),
        (foreign_imports, "service", "from starlette.responses import Response", True),
        (sibling_imports, "queues.memory", "from diffusion_api.queues.base import Queue", False),
        (sibling_imports, "queues.memory", "from diffusion_api.queues.file import FileQueue", True),
        (sibling_imports, "queues.memory", "from .file import FileQueue", True),
        (sibling_imports, "engine.families.sdxl", "from diffusion_api.engine.families import sd1", True),
        (sibling_imports, "engine.families.sdxl", "from diffusion_api.engine.base import Engine", False),
        (environment_reads, "settings", "import os\nos.environ['X']", False),
        (environment_reads, "worker", "import os\nos.environ.get('X')", True),
        (environment_reads, "worker", "from os import getenv", True),
        (unsafe_loading, "engine.families.sd1", "model = Model.from_pretrained(folder).eval()", False),
        (unsafe_loading, "service", "from diffusers.utils import load_image", True),
        (unsafe_loading, "service", "diffusers.utils.load_image(url)", True),
        (unsafe_loading, "engine.families.sd1", "P.from_pretrained(folder, custom_pipeline=name)", True),
        (unsafe_loading, "engine.families.sd1", "torch.load(path, weights_only=True)", True),
        (unsafe_loading, "engine.families.base", "torch.load(path, weights_only=True)", False),
        (unsafe_loading, "engine.families.base", "torch.load(path)", True),
        (unsafe_loading, "engine.families.base", "torch.load(path, weights_only=False)", True),
        (unsafe_loading, "queues.file", "import pickle", True),
        (fetches, "engine.families.sd1", "Model.from_pretrained(folder, local_files_only=True)", False),
        (fetches, "engine.families.sd1", "Model.from_pretrained(folder)", True),
        (fetches, "engine.families.sd1", "Model.from_pretrained(folder, local_files_only=False)", True),
        (cycle, "schema.request", "from diffusion_api.schema.job import Job", True),
        (cycle, "schema.request", "import diffusion_api.errors", False),
    ],
)
def test_a_breach_is_noticed(rule: Rule, module: str, text: str, broken: bool) -> None:
    empty = ast.parse("")
    house = [
        *("__init__", "service", "worker", "fetch", "webhooks", "errors", "schema.__init__", "schema.request"),
        *("queues.base", "queues.file", "engine.base", "engine.families.__init__", "engine.families.sd1"),
    ]
    source = dict.fromkeys(house, empty)
    source["schema.job"] = ast.parse("from diffusion_api.schema.request import Request")
    source[module] = ast.parse(text)
    assert bool(rule(source)) is broken
