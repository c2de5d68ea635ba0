"""What must be so once all jobs of an installation have ended, whatever happened to it before."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from driving import ENDS, leftovers, places
from PIL import Image

from diffusion_api.schema.job import Job, State, loads


def ended(home: Path, job_id: str) -> Job:
    """The record of a job that has ended."""
    (path,) = (path for state in ENDS for path in (home / "queue" / state).glob(f"{job_id}.json"))
    return loads(path.read_bytes())


def all_is_well(home: Path, accepted: Iterable[str], *, max_attempts: int = 3) -> Counter[str]:
    """Check every job whose POST was answered, and what else lies about; how many ended how. Nothing may run now."""
    lies = places(home)
    lost = {job_id for job_id in accepted if not lies.get(job_id)}
    assert lost == set()
    assert {job_id: where for job_id, where in lies.items() if len(where) != 1 or where[0] not in ENDS} == {}
    assert leftovers(home) == []
    jobs = [ended(home, job_id) for job_id in lies]
    assert [job.id for job in jobs if job.attempts > max_attempts] == []
    published = [image.path for job in jobs if job.result for image in job.result.images]
    assert len(published) == len(set(published))
    for job in jobs:
        assert job.state == lies[job.id][0]
        for image in job.result.images if job.result else ():
            data = (home / image.path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == image.sha256, job.id
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
                assert picture.size == (image.width, image.height)
    assert max(Counter(told_as_done(home)).values(), default=0) <= 1
    return Counter(job.error.kind if job.state is State.ERROR and job.error else job.state.value for job in jobs)


def told_as_done(home: Path) -> list[str]:
    """The ids of jobs, each as often as the log says that it was done."""
    logs = "".join(path.read_text() for path in home.glob("*.log"))
    return re.findall(r"job (\S+) done in", logs)
