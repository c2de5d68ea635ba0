"""The service below the dialects: limits, lookups and health."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import plain
from fake_models import LORA_KEYS, checkpoint, diffusers_folder

from diffusion_api import storage
from diffusion_api.catalog.library import Library
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.stub import StubEngine
from diffusion_api.errors import Conflict, InvalidRequest, NotFound, ShuttingDown, TooLarge, UnknownModel
from diffusion_api.outputs import Outputs
from diffusion_api.queues.file import FileQueue
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.schema.caller import Caller, Role
from diffusion_api.schema.job import Image, Job, State, loads
from diffusion_api.schema.request import Embed
from diffusion_api.service import Readiness, Service
from diffusion_api.settings import Settings
from diffusion_api.worker import Worker


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service whose queue nobody works on. It has one model, ``small``."""
    settings = Settings(home=tmp_path, max_steps=10, max_batch=2, max_pixels=128 * 128, max_prompt=100)
    settings.create_folders()
    diffusers_folder(settings.models_dir / "small")
    queue = FileQueue(settings.queue_dir)
    library = Library(settings.home, settings.models_dir)
    yield Service(settings, library, queue, Outputs(settings.outputs_dir), StubEngine())
    queue.close()


ADMIN = Caller(id="127.0.0.1", role=Role.ADMIN)


def new_job(**fields: Any) -> Job:
    return Job(request=plain(), **fields)


def test_a_submitted_job_is_on_disk_and_found(service: Service) -> None:
    job = service.submit(new_job(payload={"prompt": "a lighthouse"}, warnings=("w",), dialect="other"))
    (record,) = (service.settings.queue_dir / "queued").iterdir()
    assert loads(record.read_bytes()) == job
    snapshot = service.get(job.id, ADMIN)
    assert snapshot.job == job
    assert (snapshot.state, snapshot.position) == (State.QUEUED, 0)
    assert (job.payload, job.warnings, job.dialect) == ({"prompt": "a lighthouse"}, ("w",), "other")


def test_pictures_in_a_payload_are_not_kept(service: Service) -> None:
    job = service.submit(new_job(payload={"init": ["A" * 200], "mask": "data:image/png;base64,AA"}))
    assert job.payload == {"init": ["[BASE64_IMAGE_DATA_200_chars]"], "mask": "[BASE64_IMAGE_DATA_24_chars]"}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"steps": 11}, InvalidRequest, "steps is 11; it may be 1 to 10"),
        ({"count": 3}, InvalidRequest, "n is 3; it may be 1 to 2"),
        ({"width": 136, "height": 128}, InvalidRequest, "136x128 = 17408 pixels; at most 16384 are allowed"),
        ({"seed_resize_width": 136, "seed_resize_height": 128}, InvalidRequest, "136x128; at most 16384 pixels are"),
        ({"prompt": "x" * 101}, TooLarge, "prompt has 101 characters; at most 100 are allowed"),
        ({"negative_prompt": "x" * 101}, TooLarge, "negative_prompt has 101 characters"),
    ],
    ids=str,
)
def test_a_job_beyond_the_operators_limits_is_refused(
    service: Service, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        service.submit(Job(request=plain(**fields)))
    assert list((service.settings.queue_dir / "queued").iterdir()) == []


def test_a_model_that_tells_nothing_of_pictures_is_refused_with_those_that_do(service: Service) -> None:
    def refused() -> str:
        with pytest.raises(InvalidRequest) as error:
            service.submit(Job(request=Embed(model="small", image="0", width=512, height=512, seed=0)))
        return str(error.value)

    assert refused() == "model 'small' tells nothing of pictures; none is installed that does"
    diffusers_folder(service.settings.models_dir / "uni", pipeline="UniDiffuserPipeline")
    service._library._scanned = float("-inf")
    assert refused() == "model 'small' tells nothing of pictures; one of uni"


def test_a_job_at_the_operators_limits_is_taken(service: Service) -> None:
    service.submit(Job(request=plain(steps=10, count=2, width=128, height=128, prompt="x" * 100)))


def test_a_job_may_not_run_longer_than_the_operator_allows(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, max_seconds=60)
    queue = MemoryQueue()
    service = Service(settings, Library(tmp_path, settings.models_dir), queue, Outputs(tmp_path / "outputs"), None)
    with pytest.raises(InvalidRequest, match="deadline is 61; at most 60 seconds are allowed"):
        service.submit(new_job(deadline=61))
    assert queue.jobs() == []
    assert [service.submit(new_job(deadline=asked)).deadline for asked in (None, 5, 60)] == [60, 5, 60]
    assert [job.deadline for job in queue.jobs()] == [60, 5, 60]


def test_a_process_that_runs_no_jobs_loads_no_model(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    diffusers_folder(settings.models_dir / "small")
    library = Library(tmp_path, settings.models_dir)
    service = Service(settings, library, MemoryQueue(), Outputs(tmp_path / "outputs"), None)
    with pytest.raises(Conflict, match="DIFFUSION_API_WARM_UP says what these load when they start"):
        service.warm_up("small")


@pytest.mark.parametrize("job_id", ["", "x", "../x", "\0", "x" * 5000, "00000000-0000-4000-8000-000000000000"])
def test_an_unknown_job_is_not_found(service: Service, job_id: str) -> None:
    for look in (service.get, service.cancel):
        with pytest.raises(NotFound) as caught:
            look(job_id, ADMIN)
        assert str(caught.value) == f"Job {job_id} not found"
    assert list(service.watch(job_id, 1, ADMIN)) == []


def test_a_waiting_job_is_cancelled(service: Service) -> None:
    job = service.submit(new_job())
    assert service.cancel(job.id, ADMIN).state is State.CANCELLED
    assert service.health().active_jobs == 0


def test_a_job_is_watched_to_its_end(service: Service, tmp_path: Path) -> None:
    job = service.submit(Job(request=plain(prompt="stub:seconds=0.02")))
    queue = FileQueue(tmp_path / "queue")
    worker = Worker(queue, StubEngine(), Outputs(tmp_path / "outputs"))
    worker.start()
    states = [snapshot.state for snapshot in service.watch(job.id, 30, ADMIN)]
    worker.stop(grace=1)
    queue.close()
    assert states[0] in (State.QUEUED, State.LOADING)
    assert states[-1] is State.DONE
    (image,) = service.get(job.id, ADMIN).job.result.images  # type: ignore[union-attr]
    assert service.image(image) == (tmp_path / image.path).read_bytes()


def test_a_picture_that_is_gone_is_none(service: Service) -> None:
    assert service.image(Image(path="outputs/x.png", width=8, height=8, seed=1, sha256="", infotext="")) is None


def test_models_are_those_of_the_library(service: Service) -> None:
    assert [model.name for model in service.models()] == ["small"]
    assert service.model(None).name == service.model("SMALL").name == "small"
    with pytest.raises(UnknownModel, match="one of small"):
        service.model("nope")


def test_health_counts_what_is_there(service: Service) -> None:
    checkpoint(service.settings.loras_dir / "one.safetensors", LORA_KEYS)
    for name in ("two.pt", "notes.txt"):
        (service.settings.loras_dir / name).touch()
    jobs = [service.submit(new_job()) for _ in range(3)]
    service.cancel(jobs[0].id, ADMIN)
    health = service.health()
    assert (health.models, health.loras, health.active_jobs) == (1, 2, 2)
    assert health.device is not None
    assert health.device.name == "stub"
    assert 0 < health.memory_available_gb < health.memory_total_gb
    assert health.outputs_available
    assert health.outputs_free_gb > 0


def test_health_shows_what_each_folder_takes(service: Service) -> None:
    (service.settings.outputs_dir / "picture.jpg").write_bytes(b"x" * 5000)
    disk = service.health().disk
    assert list(disk) == [f"stable_diffusion/{n}" for n in ("models", "loras", "upscalers")] + ["queue", "outputs"]
    assert disk["outputs"].files == 1
    assert disk["outputs"].bytes >= 5000
    assert disk["stable_diffusion/models"].files > 0


def test_health_warns_of_what_is_missing(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.create_folders()
    queue, outputs = FileQueue(settings.queue_dir), Outputs(settings.outputs_dir)
    service = Service(settings, Library(tmp_path, settings.models_dir), queue, outputs, None)
    (settings.outputs_dir / ".tmp").rmdir()
    settings.outputs_dir.rmdir()
    settings.loras_dir.rmdir()
    health = service.health()
    assert {"No models found", "Outputs directory not accessible"} <= set(health.warnings)
    assert (health.device, health.loras, health.outputs_available) == (None, 0, False)
    queue.close()


def test_it_is_ready_when_nothing_stands_against_a_job(service: Service) -> None:
    assert service.readiness() == Readiness(reasons=(), loading=False)


def test_it_is_ready_while_the_engine_loads(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    library, outputs = Library(tmp_path, settings.models_dir), Outputs(tmp_path / "outputs")
    engine = Executor(library, device="cpu", tokenizer=tmp_path)
    service = Service(settings, library, MemoryQueue(), outputs, engine)
    assert service.readiness() == Readiness(reasons=(), loading=True)


def test_without_a_worker_it_is_not_ready(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    library, outputs = Library(tmp_path, settings.models_dir), Outputs(tmp_path / "outputs")
    service = Service(settings, library, MemoryQueue(), outputs, None)
    assert service.readiness().reasons == ("no worker runs",)


def test_a_service_that_drains_takes_no_job_and_says_so(service: Service) -> None:
    job = service.submit(new_job())
    service.drain()
    with pytest.raises(ShuttingDown, match="the service is shutting down"):
        service.submit(new_job())
    assert service.readiness().reasons == ("the service is shutting down",)
    assert service.get(job.id, ADMIN).state is State.QUEUED
    assert service.cancel(job.id, ADMIN).state is State.CANCELLED


@pytest.mark.parametrize(("folder", "reason"), [("queue/tmp", "queue"), ("outputs/.tmp", "outputs")])
def test_a_folder_that_cannot_be_written_shows_until_it_can(
    service: Service, monkeypatch: pytest.MonkeyPatch, folder: str, reason: str
) -> None:
    path = service.settings.home / folder
    path.rmdir()
    (found,) = service.readiness().reasons
    assert f"the folder of {'the ' if reason == 'queue' else ''}{reason} cannot be used" in found
    assert found in service.health().warnings
    path.mkdir()
    assert service.readiness().reasons == (found,)  # looked at a moment ago
    monkeypatch.setattr(storage, "LOOK_EVERY", 0)
    assert service.readiness().reasons == ()


@pytest.mark.parametrize("folder", ["outputs", "queue/queued", "queue/keys", "queue/done"])
def test_a_folder_into_which_no_file_can_get_shows(
    service: Service, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    path = service.settings.home / folder
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("needs root and a file system with flags")
    try:
        (found,) = service.readiness().reasons
        assert "cannot be used: Operation not permitted" in found
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    monkeypatch.setattr(storage, "LOOK_EVERY", 0)
    assert service.readiness().reasons == ()


def test_health_survives_the_loss_of_everything(service: Service) -> None:
    shutil.rmtree(service.settings.home)
    health = service.health()
    assert (health.active_jobs, health.models, health.outputs_available, health.outputs_free_gb) == (None, 0, False, 0)
    assert len(service.readiness().reasons) == 2


def test_health_survives_a_queue_that_cannot_be_read(service: Service) -> None:
    (service.settings.queue_dir / "running").rename(service.settings.queue_dir / "away")
    (service.settings.queue_dir / "done").rmdir()
    health = service.health()
    assert health.active_jobs is None
    assert health.models == 1


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (" AND ".join("a" * 40), "prompt joins 40 parts by AND; at most 32 are allowed"),
        ("[a|b]" + "c" * 50_000, r"prompt changes so often that its texts have \d+ characters in all"),
    ],
)
def test_a_prompt_that_becomes_too_much_text_is_refused(tmp_path: Path, prompt: str, reason: str) -> None:
    settings = Settings(home=tmp_path, max_prompt=100_000)
    settings.create_folders()
    diffusers_folder(settings.models_dir / "small", sample_size=8)
    queue = FileQueue(settings.queue_dir)
    service = Service(
        settings, Library(tmp_path, settings.models_dir, None, None), queue, Outputs(settings.outputs_dir), None
    )
    with pytest.raises(TooLarge, match=reason):
        service.submit(Job(request=plain(prompt=prompt, steps=20)))
    queue.close()
