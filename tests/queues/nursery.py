"""Processes to be killed, as many as a test likes in little time.

Run as a program: forks a child per line of its input (``role root journal``) and answers with the child's process id.
It opens no queue itself, so that no lock is ever inherited. Children write to the journal what they have done, a line
each, after it was done.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from diffusion_api.errors import QueueUnusable
from diffusion_api.queues.base import Control
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import Job, Progress, Result, State
from diffusion_api.schema.request import Output, Txt2Img

RESULT = Result(images=(), seconds=0, memory_before_mb=0, memory_after_mb=0)


class Journal:
    """Lines that several processes append to one file."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


def job() -> Job:
    request = Txt2Img(
        model="tiny",
        prompt="a lighthouse",
        negative_prompt="",
        steps=4,
        guidance_scale=7.0,
        width=64,
        height=64,
        sampler="euler",
        schedule="automatic",
        seed=1,
        output=Output(),
    )
    return Job(request=request)


def write(queue: FileQueue, journal: Journal) -> None:
    """Enqueue for ever."""
    while True:
        made = job()
        queue.enqueue(made)
        journal.write("accepted", made.id)


def work(queue: FileQueue, journal: Journal) -> None:
    """Do jobs for ever."""

    def handle(job: Job, control: Control) -> None:
        journal.write("claimed", job.id, os.getpid())
        job = control.started()
        control.progress(Progress(state=State.PROCESSING))
        time.sleep(random.uniform(0, 0.004))
        control.commit(job.succeeded(RESULT))
        journal.write("ended", job.id, os.getpid())

    queue.serve(handle, slots=2)


def write_and_work(queue: FileQueue, journal: Journal) -> None:
    """Both at once, like the service."""
    threading.Thread(target=write, args=(queue, journal), daemon=True).start()
    work(queue, journal)


def hang(queue: FileQueue, journal: Journal) -> None:
    """Start a job and never end it; one that is cancelled counts as told."""

    def handle(job: Job, control: Control) -> None:
        job = control.started()
        control.progress(Progress(state=State.PROCESSING, fraction=0.5, phase="hanging"))
        journal.write("started", job.id, job.attempts)
        while not control.cancelled:
            time.sleep(0.01)
        journal.write("told", job.id)
        time.sleep(60)

    queue.serve(handle)


def claim(queue: FileQueue, journal: Journal) -> None:
    """Claim a job and do nothing with it."""

    def handle(job: Job, control: Control) -> None:
        journal.write("claimed", job.id, os.getpid())
        time.sleep(60)

    queue.serve(handle)


def die_when_started(queue: FileQueue, journal: Journal) -> None:
    """Kill itself with the attempt just charged."""

    def handle(job: Job, control: Control) -> None:
        control.started()
        os.kill(os.getpid(), signal.SIGKILL)

    queue.serve(handle)


def die_with_two(queue: FileQueue, journal: Journal) -> None:
    """Kill itself with two jobs started, or with one when it gets no other for a while."""
    both = threading.Event()
    started: list[str] = []

    def handle(job: Job, control: Control) -> None:
        control.started()
        journal.write("started", job.id)
        started.append(job.id)
        if len(started) == 2:
            both.set()
        both.wait(1)
        os.kill(os.getpid(), signal.SIGKILL)

    queue.serve(handle, slots=2)


def hit_a_limit(queue: FileQueue, journal: Journal) -> None:
    """Enqueue with no right to write more than a few bytes to a file."""
    made = job()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        queue.enqueue(made)
    except QueueUnusable:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        journal.write("refused", made.id)


ALL = (write, work, write_and_work, hang, claim, die_when_started, die_with_two, hit_a_limit)
ROLES = {role.__name__: role for role in ALL}


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        role, root, journal = line.split()
        child = os.fork()
        if child == 0:
            os.close(0)
            ROLES[role](FileQueue(Path(root), recover_every=0.2), Journal(journal))
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
