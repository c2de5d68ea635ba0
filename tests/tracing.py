"""Faults in the system calls of a running process, put there by strace.

A fault is written as strace has it: ``fsync:signal=KILL:when=2``, ``/^rename:error=ENOSPC``. Each thread counts its own
calls for ``when``. Threads and children that come later are traced too.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def arguments(fault: str, log: Path) -> list[str]:
    """The start of a command line of strace."""
    if not shutil.which("strace"):
        pytest.skip("needs strace (Debian: apt-get install strace)")
    calls = fault.partition(":")[0]
    traced = f"trace={calls},openat,close" if "error=" in fault else f"trace={calls}"
    return ["strace", "-f", "-y", "-o", str(log), "-e", traced, "-e", f"inject={fault}", "-e", "signal=none"]


@contextmanager
def injected(fault: str, process: int, log: Path) -> Iterator[None]:
    """That process has the fault as long as this lasts. Skips the test where no process may be traced."""
    strace = subprocess.Popen([*arguments(fault, log), "-p", str(process)], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    try:
        said = strace.stderr.readline()
        if "Operation not permitted" in said:
            pytest.skip("strace may not trace here: ptrace is not allowed (containers need the capability SYS_PTRACE)")
        assert "attached" in said, said
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.communicate()


def failed_flushes(log: Path) -> list[tuple[str, str]]:
    """Which thread's flush of what failed, by the record of strace, in order."""
    return re.findall(r"^(\d+) +fsync\(\d+<([^>]*)>\) += -1 EIO", log.read_text(), re.MULTILINE)
