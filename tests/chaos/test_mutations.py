"""The tests are tested: each flush, lock and fence of the queue is taken away, one at a time, and a test must notice."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import counting
import pytest
from serving import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

PACKAGE = ROOT / "diffusion_api"
MODULES = [PACKAGE / "disk.py", PACKAGE / "outputs.py", PACKAGE / "queues" / "file.py"]
MODULES += sorted((PACKAGE / "queues" / "_file").glob("*.py"))
FLUSHES = {"fsync", "fsync_dir"}
TESTS = [f"tests/queues/test_{name}.py" for name in ("crashes", "file", "keeping", "reports")]

REPLACED = {
    "O_EXCL": ("disk.py", "os.O_CREAT | os.O_EXCL |", "os.O_CREAT |"),
    "the lock of a worker and of an unfinished file": (
        "disk.py",
        "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
    ),
    "the look for a lock whose name is gone": ("disk.py", "os.fstat(fd).st_nlink == 0", "False"),
    "the look whether a worker lives": ("disk.py", "fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)", "pass"),
    "the fence of a claim": ("queues/file.py", "if self.over or not self.here:", "if self.over:"),
    "the charging of an attempt": ("queues/file.py", "            self._places.write(self.path, dumps(charged))\n", ""),
    "the temporary file": (
        "disk.py",
        "    path, fd = _open_temporary(tmp)\n    try:\n        _write_all(fd, data)",
        "    path, fd = target, os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)\n    try:\n        _write_all(fd, data)",
    ),
}
"""Where, what, and what stands there instead."""


def flushes() -> Iterator[tuple[str, Path, ast.stmt]]:
    """Every statement that flushes a file or a folder."""
    for module in MODULES:
        for function in ast.walk(ast.parse(module.read_text())):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                called = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
                if isinstance(node, ast.Expr) and {getattr(f, "attr", getattr(f, "id", "")) for f in called} & FLUSHES:
                    place = module.relative_to(PACKAGE).as_posix()
                    yield f"{ast.unparse(node)} in {function.name} of {place}", module, node


def without(source: str, node: ast.stmt) -> str:
    """The source with ``pass`` in the place of that statement."""
    lines = source.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + "pass\n"]
    return "".join(lines)


def noticed(folder: Path) -> str | None:
    """The first test that fails there, None if none does."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found = re.search(r"^FAILED \S*?::(.+?)( - |$)", run.stdout, re.MULTILINE)
    assert bool(found) == (run.returncode == 1), run.stdout
    return found[1] if found else None


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests, to be changed."""
    folder = tmp_path / "copy"
    for name in ("diffusion_api", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "models", "chaos"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_nothing_is_noticed_where_nothing_was_taken_away(copy: Path) -> None:
    assert noticed(copy) is None


@pytest.mark.parametrize(("what", "module", "node"), list(flushes()), ids=[f[0] for f in flushes()])
def test_a_flush_that_is_taken_away_is_noticed(copy: Path, what: str, module: Path, node: ast.stmt) -> None:
    (copy / module.relative_to(ROOT)).write_text(without(module.read_text(), node))
    by = noticed(copy)
    assert by
    counting.keep(f"without {what}", fails=by)


@pytest.mark.parametrize("what", REPLACED)
def test_what_else_is_taken_away_is_noticed(copy: Path, what: str) -> None:
    place, old, new = REPLACED[what]
    source = (PACKAGE / place).read_text()
    assert source.count(old) == 1
    (copy / "diffusion_api" / place).write_text(source.replace(old, new))
    by = noticed(copy)
    assert by
    counting.keep(f"without {what}", fails=by)
