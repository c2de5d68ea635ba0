"""What Prometheus is told, by a service in each of its modes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import plain
from fake_models import diffusers_folder
from prometheus_client.parser import text_string_to_metric_families
from serving import Program, eventually, serving, started

from diffusion_api.engine.base import Finished
from diffusion_api.errors import QueueUnusable
from diffusion_api.metrics import JobMetrics, Metrics
from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.schema.report import DeviceReport, WorkerReport

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Values by name and labels, but for the label of the worker."""
    return {
        (sample.name, frozenset(item for item in sample.labels.items() if item[0] != "worker")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"diffusion_api_{name}", frozenset(labels.items())), 0.0)


def scrape(server: Program) -> Samples:
    answer = server.get("/metrics", headers={"Accept": "text/plain"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(answer.text)


def run(job: Job, *events: Progress | Finished, pause: float = 0.0) -> Samples:
    """What a worker has counted after one run."""
    metrics = JobMetrics()

    def happening() -> Iterator[Progress | Finished]:
        for event in events:
            yield event
            time.sleep(pause)

    assert list(metrics.watched(job, happening())) == list(events)
    return read(metrics.render())


# one worker's jobs


def generation(step: int, steps: int = 4) -> Progress:
    return Progress(state=State.PROCESSING, phase="generation", step=step, steps=steps)


def test_the_time_of_a_job_is_told_by_phase() -> None:
    job = Job(request=plain(), created=time.time() - 100)
    events = [Progress(), Progress(), generation(0), *(generation(i) for i in range(1, 5)), Finished((), ())]
    samples = run(job, *events, pause=0.05)
    spent = {p: value(samples, "job_phase_seconds_sum", phase=p) for p in ("load", "generation", "decode")}
    assert 0.1 <= spent["load"] < spent["generation"]
    assert 0.05 <= spent["decode"] < spent["generation"]
    assert spent["generation"] >= 0.2
    assert value(samples, "job_phase_seconds_count", phase="generation") == 1
    assert 100 <= value(samples, "job_wait_seconds_sum") < 200
    assert value(samples, "steps_total") == 4
    speed = value(samples, "steps_per_second", model="small")
    assert speed == pytest.approx(4 / spent["generation"])


def test_the_steps_of_each_picture_count() -> None:
    samples = run(Job(request=plain(count=2)), generation(0), generation(4), generation(0), generation(4))
    assert value(samples, "steps_total") == 8


def test_a_run_that_breaks_counts_as_far_as_it_came() -> None:
    metrics = JobMetrics()

    def broken() -> Iterator[Progress]:
        yield generation(3)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        list(metrics.watched(Job(request=plain()), broken()))
    assert value(read(metrics.render()), "steps_total") == 3


@pytest.mark.parametrize(("cached", "hits", "misses"), [(True, 1, 0), (False, 0, 1), (None, 0, 0)])
def test_models_that_were_loaded_already_are_told(cached: bool | None, hits: int, misses: int) -> None:
    samples = run(Job(request=plain()), Progress(), Finished((), (), model_cached=cached, memory_after_mb=3))
    assert value(samples, "model_requests_total", cache="hit") == hits
    assert value(samples, "model_requests_total", cache="miss") == misses
    assert value(samples, "device_memory_bytes") == 3 * 2**20


def test_ends_are_counted_by_the_class_of_the_error() -> None:
    metrics, job = JobMetrics(), Job(request=plain())
    metrics.ended(job.failed("OutOfMemory", "a message that differs each time"))
    metrics.ended(job.cancelled())
    samples = read(metrics.render())
    assert value(samples, "jobs_ended_total", state="error", error="OutOfMemory") == 1
    assert value(samples, "jobs_ended_total", state="cancelled", error="JobCancelled") == 1


# the service


def test_services_in_one_process_share_no_counts() -> None:
    one, other = (Metrics(lambda: {State.QUEUED: 0}, lambda: []) for _ in range(2))
    one.request("GET", "/hello", 200)
    assert value(read(one.render().decode()), "http_requests_total", method="GET", route="/hello", status="200") == 1
    assert value(read(other.render().decode()), "http_requests_total", method="GET", route="/hello", status="200") == 0


def test_a_queue_that_cannot_be_read_is_told() -> None:
    def unusable() -> dict[State, int]:
        raise QueueUnusable("gone")

    samples = read(Metrics(unusable, lambda: []).render().decode())
    assert value(samples, "queue_readable") == 0
    assert value(read(Metrics(dict, lambda: []).render().decode()), "queue_readable") == 1


def test_each_worker_has_its_own_series() -> None:
    metrics = JobMetrics()
    metrics.ended(Job(request=plain()).cancelled())
    device = DeviceReport("stub", "stub")
    reports = [
        WorkerReport(pid=pid, device=device, event=time.monotonic() - 5, restarts=pid, metrics=metrics.render())
        for pid in (1, 2)
    ]
    text = Metrics(dict, lambda: reports).render().decode()
    assert text.count("# TYPE diffusion_api_jobs_ended_total counter") == 1
    for pid in "12":
        assert f'diffusion_api_jobs_ended_total{{error="JobCancelled",state="cancelled",worker="{pid}"}} 1.0' in text
        assert f'diffusion_api_worker_restarts{{worker="{pid}"}} {pid}.0' in text
    quiet = [line for line in text.splitlines() if line.startswith("diffusion_api_worker_quiet_seconds{")]
    assert [float(line.split()[1]) >= 5 for line in quiet] == [True, True]
    assert value(read(text), "workers") == 2


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with one model of 64 pixels."""
    diffusers_folder(tmp_path / "home" / "stable_diffusion" / "models" / "small", sample_size=8)
    return tmp_path / "home"


@pytest.mark.parametrize("mode", [[], ["--isolated"]], ids=["in one process", "isolated"])
def test_a_service_counts_its_jobs(home: Path, mode: list[str]) -> None:
    with serving(home, *mode) as server:
        server.result(steps=3)
        server.wait(server.submit(prompt="stub:fail", steps=4), "error")
        samples: Samples = eventually(
            lambda: value(s := scrape(server), "jobs_ended_total", state="error", error="InternalError") and s,
            "a count",
        )
        assert value(samples, "jobs_ended_total", state="done", error="") == 1
        assert value(samples, "jobs", state="done") == 1
        assert value(samples, "jobs", state="error") == 1
        assert value(samples, "jobs", state="queued") == 0
        assert value(samples, "job_wait_seconds_count") == 2
        assert value(samples, "job_phase_seconds_count", phase="save") == 1
        assert value(samples, "steps_total") >= 4
        assert value(samples, "workers") == 1
        assert value(samples, "process_memory_bytes") > 10_000_000
        assert value(samples, "worker_memory_bytes") > 10_000_000


def test_without_a_worker_the_queue_is_told_and_with_one_elsewhere_its_jobs(home: Path) -> None:
    with serving(home, "--no-worker") as server:
        job_id = server.submit(steps=1)
        samples = scrape(server)
        assert value(samples, "jobs", state="queued") == 1
        assert value(samples, "workers") == 0
        assert value(samples, "http_requests_total", method="POST", route="/txt2img", status="200") == 1
        with started("worker", home=home):
            server.wait(job_id)
            eventually(
                lambda: value(scrape(server), "jobs_ended_total", state="done", error="") == 1, "the worker's word"
            )


def names(samples: Samples) -> set[Any]:
    return {key for key in samples if key[0].startswith("diffusion_api_http_requests_total")}


def test_what_callers_think_of_makes_no_new_series(stub_server: Program) -> None:
    def ask(number: int) -> None:
        stub_server.get(f"/nope/{number}")
        stub_server.get(f"/queue/{number}")
        stub_server.request(f"BREW{number}", "/hello")
        stub_server.post(model=f"m{number}", steps=number)

    ask(0)
    before = names(scrape(stub_server)) | names(scrape(stub_server))
    for number in range(1, 30):
        ask(number)
    after = scrape(stub_server)
    assert names(after) == before
    assert value(after, "http_requests_total", method="GET", route="/queue/{job_id}", status="404") >= 30
    assert value(after, "http_requests_total", method="GET", route="none", status="404") >= 30
    assert value(after, "http_requests_total", method="other", route="/hello", status="405") >= 30
    assert value(after, "http_requests_in_progress") == 1  # the scrape itself
