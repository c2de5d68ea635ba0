"""The command line, run in the process of the tests: what a shell would do, without the time that a process takes to start."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from serving import environment

from diffusion_api import cli


@contextlib.contextmanager
def _inside(arguments: list[str], cwd: Path, settings: dict[str, object]) -> Iterator[None]:
    with (
        patch.dict(os.environ, environment(**settings), clear=True),
        patch.object(sys, "argv", arguments),
        contextlib.chdir(cwd),
    ):
        yield


def run(
    *arguments: object, cwd: Path, file: Path | None = None, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end, or with ``file`` that one, with a command's arguments."""
    texts = [str(file or "diffusion-api"), *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with _inside(texts, cwd, settings), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if file:
                runpy.run_path(str(file), run_name="__main__")
            else:
                cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(texts, status, out.getvalue(), err.getvalue())
