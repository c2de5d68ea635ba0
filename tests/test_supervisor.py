"""The supervisor, with processes that end as they are told."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from serving import eventually

from diffusion_api import supervisor
from diffusion_api.supervisor import Supervisor

NewSupervisor = Callable[[str], Supervisor]


@pytest.fixture
def new_supervisor() -> Iterator[NewSupervisor]:
    """Starts supervisors of a Python program; they are stopped in the end."""
    made: list[Supervisor] = []

    def start(program: str) -> Supervisor:
        one = Supervisor((sys.executable, "-c", program))
        made.append(one)
        one.start()
        return one

    yield start
    for one in made:
        one.stop(grace=0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(supervisor, "LAST_DELAY", 0.04)


def delays(text: str) -> list[str]:
    return re.findall(r"follows in (\S+) s", text)


def test_the_delay_grows_to_its_limit(new_supervisor: NewSupervisor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    new_supervisor("raise SystemExit(3)")
    eventually(lambda: len(delays(caplog.text)) >= 5, "five deaths")
    assert delays(caplog.text)[:5] == ["0.01", "0.02", "0.04", "0.04", "0.04"]
    assert "ended with exit code 3; start 2 follows" in caplog.text


def test_a_long_life_starts_the_delays_anew(
    new_supervisor: NewSupervisor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LONG_LIFE", 0.0)
    new_supervisor("raise SystemExit(1)")
    eventually(lambda: len(delays(caplog.text)) >= 3, "three deaths")
    assert set(delays(caplog.text)) == {"0.01"}


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("pass", "ended, and nobody here had asked it to"),
        ("raise SystemExit(1)", "could not start"),
        ("raise SystemExit(70)", "broke, or its device cannot be used"),
        ("raise SystemExit(75)", "asked to be started again"),
        ("raise SystemExit(9)", "ended with exit code 9"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL (the kernel does that when memory runs out"),
        ("import os; os.abort()", "was ended by SIGABRT (a crash in native code"),
        ("import os; os.kill(os.getpid(), 40)", "was ended by signal 40;"),
    ],
)
def test_each_end_is_told_in_words(
    new_supervisor: NewSupervisor, caplog: pytest.LogCaptureFixture, program: str, told: str
) -> None:
    new_supervisor(program)
    eventually(lambda: delays(caplog.text), "the end to be told")
    assert re.search(r"worker process \d+ " + re.escape(told), caplog.text)


def test_a_program_that_is_not_there_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    one = Supervisor(("/nowhere/at/all",))
    one.start()
    eventually(lambda: len(delays(caplog.text)) >= 2, "two tries")
    one.stop(grace=0)
    assert "worker process could not be started: No such file or directory" in caplog.text


def commands() -> list[str]:
    """The last argument of each child of this process; other tests have theirs."""
    return [child.cmdline()[-1] for child in psutil.Process().children() if child.cmdline()]


def test_a_stop_is_a_sigterm_and_waits_for_the_end(new_supervisor: NewSupervisor, tmp_path: Path) -> None:
    program = (
        "import signal, sys, time, pathlib\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_):\n    time.sleep(0.3)\n    (here / 'stopped').touch()\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(here / 'runs').touch()\n"
        "while True: time.sleep(1)"
    )
    one = new_supervisor(program)
    eventually((tmp_path / "runs").exists, "the program to run")
    one.stop(grace=60)
    assert (tmp_path / "stopped").exists()
    assert program not in commands()


def test_a_process_that_does_not_stop_is_killed(
    new_supervisor: NewSupervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "CLEARING", 0.2)
    program = (
        "import signal, time, pathlib\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'runs')!r}).touch()\ntime.sleep(600)"
    )
    one = new_supervisor(program)
    eventually((tmp_path / "runs").exists, "the program to run")
    one.stop(grace=0.1)
    assert "does not stop and is killed" in caplog.text
    assert program not in commands()


def test_a_process_that_hangs_is_killed_and_started_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_EVERY", 0.05)
    seen: list[int] = []

    def hangs(pid: int) -> bool:
        seen.append(pid)
        return pid == seen[0]

    one = Supervisor((sys.executable, "-c", "import time; time.sleep(600)"), hangs)
    one.start()
    eventually(lambda: len(set(seen)) == 2, "a second process")
    one.stop(grace=0)
    assert f"worker process {seen[0]} hangs beyond the deadline of its job and is killed" in caplog.text
    assert f"worker process {seen[0]} was ended by SIGKILL" in caplog.text


def test_a_stop_between_two_lives_starts_no_third(
    new_supervisor: NewSupervisor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 600.0)
    one = new_supervisor("raise SystemExit(3)")
    eventually(lambda: delays(caplog.text), "its end")
    one.stop(grace=0)
    assert len(delays(caplog.text)) == 1
