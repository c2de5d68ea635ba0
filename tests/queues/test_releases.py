"""What earlier releases left on disk is understood, and what a later one left does no harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusion_api import __version__
from diffusion_api.errors import Gone
from diffusion_api.queues.base import Control
from diffusion_api.queues.file import FileQueue
from diffusion_api.schema.job import VERSION, Job, Result, State

FIXTURES = Path(__file__).with_name("fixtures")
EXPIRED = "11111111-1111-4111-8111-111111111111"
READ = "22222222-2222-4222-8222-222222222222"
KEYED = "00000000-0000-4000-8000-000000000000"
WAITING = ["urgent", "running", "suspect", "waiting", KEYED]
"""The jobs that wait in every fixture once the dead are recovered, in their order."""

BRINGING = ["painted", "upscaled", "captioned", "embedded"]
"""Jobs that wait after those, and bring pictures along."""

ENDED = {
    "done": State.DONE,
    "error": State.ERROR,
    "cancelled": State.CANCELLED,
    "cancelled-running": State.CANCELLED,
    "cancelled-partial": State.CANCELLED,
}


@pytest.fixture(params=sorted(folder.name for folder in FIXTURES.iterdir()))
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder as that release left it."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "queue"))


def recovered(root: Path) -> FileQueue:
    """The queue after a look for dead workers."""
    queue = FileQueue(root)
    queue.stop()
    queue.serve(lambda job, control: pytest.fail("claimed after the stop"))
    return FileQueue(root)


def job_in(queue: FileQueue, job_id: str) -> Job:
    snapshot = queue.get(job_id)
    assert snapshot is not None
    return snapshot.job


def test_every_record_of_every_release_is_understood(root: Path) -> None:
    queue = FileQueue(root)
    assert {job_id: job_in(queue, job_id).state for job_id in ENDED} == ENDED
    assert job_in(queue, "running").attempts == 1
    for job_id in (*WAITING, *ENDED):
        job = job_in(queue, job_id)
        assert (job.caller, job.request.prompt, job.request.seed) == ("ann", "a large red circle, groß", 7)
        assert (job.payload["n"], job.deadline, job.webhook) == (2, 600.0, "https://example.org/told")
    done, error = job_in(queue, "done"), job_in(queue, "error")
    assert done.result is not None
    assert done.result == job_in(queue, "cancelled-partial").result.model_copy(  # type: ignore[union-attr]
        update={"images": done.result.images}
    )
    assert [image.path for image in done.result.images] == ["outputs/done.png"]
    assert done.warnings == ("no LoRA yet", "clipped")
    assert error.error is not None
    assert error.error.kind == "OutOfMemory"
    with pytest.raises(Gone):
        queue.get(EXPIRED)
    assert queue.get(READ) is None


def test_what_jobs_of_every_release_brought_along_is_found(root: Path) -> None:
    queue = FileQueue(root)
    found = {job_id: [queue.read_input(name) for name in job_in(queue, job_id).request.inputs] for job_id in BRINGING}
    assert found == {"painted": [b"a picture", b"a mask"]} | {name: [b"a picture"] for name in BRINGING[1:]}


def test_work_goes_on_where_every_release_left_it(
    root: Path, serving: Any, eventually: Any, result: Result, caplog: pytest.LogCaptureFixture
) -> None:
    queue, handled = recovered(root), []
    assert [(job.id, job.attempts, job.suspect) for job in queue.jobs(frozenset({State.QUEUED}))] == [
        (job_id, 1 if job_id == "suspect" else 0, job_id == "suspect") for job_id in WAITING + BRINGING
    ]
    assert queue.paused == "crashes in a row while jobs ran: 1"
    assert json.loads((root / "crashes.json").read_text())["in_a_row"] == 1
    assert job_in(queue, "running-cancelled").state is State.CANCELLED

    def handle(job: Job, control: Control) -> None:
        handled.append(job.id)
        control.commit(control.started().succeeded(result))

    queue.resume()
    with serving(queue, handle, slots=2):
        eventually(lambda: len(handled) == len(WAITING + BRINGING))
    assert handled == WAITING + BRINGING
    assert list((root / "error").glob("*.unreadable")) == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_newer_releases_records_are_set_aside_and_kept(root: Path, serving: Any, eventually: Any) -> None:
    records = {path: path.read_text() for path in (*root.glob("queued/*.json"), *root.glob("running/*/*.json"))}
    for path, text in records.items():
        path.write_text(text.replace(f'"version":{VERSION}', f'"version":{VERSION + 1}', 1))
    (root / "paused").unlink()
    with serving(FileQueue(root), lambda job, control: pytest.fail("ran what it cannot understand")):
        eventually(lambda: len(list((root / "error").glob("*.unreadable"))) == len(records))
    for path, text in records.items():
        aside = root / "error" / f"{path.name}.unreadable"
        assert aside.read_text() == text.replace(f'"version":{VERSION}', f'"version":{VERSION + 1}', 1)
        eventually(aside.with_suffix(".reason").exists)
        assert "newer release" in aside.with_suffix(".reason").read_text()


def test_the_fixture_of_this_release_is_what_it_writes() -> None:
    """After a change of what is stored: ``python tests/queues/write_fixtures.py``."""
    folder = FIXTURES / __version__
    records = [*folder.glob("done/*.json"), *folder.glob("queued/*.json"), *folder.glob("running/*/*.json")]
    assert records
    for path in records:
        record = json.loads(path.read_text())
        assert record == json.loads(Job.model_validate(record).model_dump_json()), path.name
