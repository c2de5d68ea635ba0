"""A worker process that is kept running: started again whenever it dies, and gone with its parent."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from diffusion_api.restart import EXIT_RESTART, OPTION, Handover
from diffusion_api.worker import EXIT_WORKER_DIED

log = logging.getLogger(__name__)

FIRST_DELAY, LAST_DELAY = 0.5, 30.0
"""Seconds before the first restart, doubled with each further one up to the last."""

LONG_LIFE = 60.0
"""A process that lived for so many seconds starts the delays anew."""

CLEARING = 20.0
"""Seconds beyond the grace after which a process that was told to stop is killed."""

LOOK_EVERY = 2.0
"""Seconds between two looks at whether the process hangs."""

PR_SET_PDEATHSIG = 1

EXITS = {
    0: "ended, and nobody here had asked it to",
    1: "could not start; its line above says why",
    EXIT_WORKER_DIED: "broke, or its device cannot be used; its log above says why",
    EXIT_RESTART: "asked to be started again",
}
SIGNALS = {number.value: number.name for number in signal.Signals}
CRASH = " (a crash in native code; where Python was then is above)"
HINTS: dict[int, str] = {
    signal.SIGKILL: " (the kernel does that when memory runs out; its log says so then)",
    signal.SIGSEGV: CRASH,
    signal.SIGBUS: CRASH,
    signal.SIGABRT: CRASH,
}


class Supervisor:
    """Keeps a process running that is started by ``command`` and takes ``--handover``; has the two verbs of a Worker.

    ``hangs`` says whether the process with that id is beyond hope; it is killed then.
    """

    def __init__(self, command: Sequence[str], hangs: Callable[[int], bool] = lambda pid: False) -> None:
        self._command, self._hangs = tuple(command), hangs
        self._child: subprocess.Popen[bytes] | None = None
        self._restarts = 0
        self._guard = threading.Lock()
        self._told = threading.Event()
        # The kernel ends the child with the thread that started it: this one must live for as long as the child.
        self._thread = threading.Thread(target=self._main, name="supervisor", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="supervisor-watchdog", daemon=True)

    def start(self) -> None:
        """Start the process, and go on doing so; returns at once."""
        self._thread.start()
        self._watchdog.start()

    def stop(self, grace: float) -> None:
        """Have the process stop as on SIGTERM; one that is still there well after ``grace`` seconds is killed. Blocks."""
        with self._guard:
            self._told.set()
            if self._child:
                self._child.terminate()
        self._thread.join(grace + CLEARING)
        if self._thread.is_alive() and self._child:
            log.critical("worker process %d does not stop and is killed", self._child.pid)
            self._child.kill()
        self._thread.join()

    def _main(self) -> None:
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            end = self._life()
            if self._told.is_set():
                return
            if time.monotonic() - began >= LONG_LIFE:
                delay = FIRST_DELAY
            self._restarts += 1
            log.critical("worker process %s; start %d follows in %g s", end, self._restarts + 1, delay)
            if self._told.wait(delay):
                return
            delay = min(2 * delay, LAST_DELAY)

    def _watch(self) -> None:
        while not self._told.wait(LOOK_EVERY):
            child = self._child
            if child and self._hangs(child.pid):
                log.critical("worker process %d hangs beyond the deadline of its job and is killed", child.pid)
                child.kill()

    def _life(self) -> str:
        """Run the process once, to its end: what became of it."""
        try:
            lifeline, ours = os.pipe()
        except OSError as error:
            return f"could not be started: {error.strerror}"
        try:
            child = self._spawn(lifeline)
            return "was not started" if child is None else f"{child.pid} {_meaning(child.wait())}"
        except OSError as error:
            return f"could not be started: {error.strerror}"
        finally:
            os.close(ours)

    def _spawn(self, lifeline: int) -> subprocess.Popen[bytes] | None:
        """The process, in a group of its own so that Ctrl-C reaches it through us; None once we were told to stop."""
        handover = Handover(restarts=self._restarts, lifeline=lifeline)
        try:
            with self._guard:
                if self._told.is_set():
                    return None
                self._child = subprocess.Popen(  # noqa: S603 - this program
                    [*self._command, OPTION, handover.model_dump_json()],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[lifeline],
                    process_group=0,
                )
                return self._child
        finally:
            os.close(lifeline)


def die_with_supervisor(lifeline: int) -> None:
    """In the supervised process: end at once when the supervisor does, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # works even while the interpreter's lock is held

    def wait() -> None:
        os.read(lifeline, 1)  # nothing is ever written: this returns at the end of the pipe
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _meaning(code: int) -> str:
    """What an exit code tells; a negative one is a signal's."""
    if code < 0:
        return f"was ended by {SIGNALS.get(-code, f'signal {-code}')}{HINTS.get(-code, '')}"
    return EXITS.get(code, f"ended with exit code {code}")
