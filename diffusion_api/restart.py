"""How a process begins again when its device needs a fresh one, and what one life hands to the next."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import NoReturn

from diffusion_api.schema.request import Frozen

log = logging.getLogger(__name__)

EXIT_RESTART = 75
"""Exit code of a process that wants to be started again."""

LIMIT, WITHIN = 3, 600.0
"""So many restarts in so many seconds are borne; after them the process ends."""

OPTION = "--handover"


class Handover(Frozen):
    """What a process is told by the one that it takes over from, or by its supervisor, in the option ``--handover``.

    ``restarts`` counts all of them, ``recent`` are the times of the last few on the machine's monotonic clock.
    ``listeners`` are the descriptors of the sockets that listen, ``lifeline`` one whose end is that of the supervisor.
    """

    restarts: int = 0
    recent: tuple[float, ...] = ()
    listeners: tuple[int, ...] = ()
    lifeline: int | None = None


def restart(handover: Handover | None, reason: str) -> NoReturn:
    """Have this process begin again with the command line that it was started with, at once and in the same place.

    No lock, thread or memory outlives this, but the sockets that listen do: who connects meanwhile waits, who waited
    for an answer gets none. A process with a supervisor ends with EXIT_RESTART instead, and so does one that restarts
    too often, whose program is gone, or that has no handover because its command line is not ours.
    """
    if handover is None or handover.lifeline is not None:
        log.critical("%s; this process ends to be started again", reason)
        os._exit(EXIT_RESTART)
    now = time.monotonic()
    recent = tuple(at for at in handover.recent if now - at < WITHIN)
    if len(recent) >= LIMIT:
        log.critical("%s; this process ends: it began again %d times in %.0f minutes", reason, LIMIT, WITHIN / 60)
        os._exit(EXIT_RESTART)
    log.critical("%s; this process begins again", reason)
    after = handover.model_copy(update={"restarts": handover.restarts + 1, "recent": (*recent, now)})
    for listener in after.listeners:
        os.set_inheritable(listener, True)
    command = [sys.executable, *_arguments(sys.orig_argv[1:]), OPTION, after.model_dump_json()]
    try:
        os.execv(sys.executable, command)  # noqa: S606
    except OSError as error:  # the program was moved or removed meanwhile
        log.critical("%s cannot be started again: %s; this process ends", sys.executable, error.strerror)
        os._exit(EXIT_RESTART)


def _arguments(given: list[str]) -> list[str]:
    """The command line without what an earlier life handed over, which stands last."""
    return given[: given.index(OPTION)] if OPTION in given else given
