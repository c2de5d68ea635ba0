"""What Prometheus is told: by the service of its queue and its callers, by each worker of its jobs.

A worker may be another process. It keeps its own counts and sends them along with its report, as text; the service
shows those of all living workers, each with its process id as the label ``worker``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from diffusion_api.engine.base import Event, Finished
from diffusion_api.errors import QueueUnusable
from diffusion_api.schema.job import Job, Progress, State
from diffusion_api.schema.report import WorkerReport
from diffusion_api.schema.request import Sampling

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time of birth beside every counter doubles the text and says nothing

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MIB = 2**20

SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)


class Metrics:
    """The service's own counts, and on demand those of the queue and its workers."""

    def __init__(self, counts: Callable[[], Mapping[State, int]], workers: Callable[[], list[WorkerReport]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_QueueCollector(counts, workers))
        self._requests = Counter(
            "diffusion_api_http_requests", "Requests that were answered; 499 is a client that left before.",
            ("method", "route", "status"), registry=self._registry,
        )  # fmt: skip
        self._in_progress = Gauge(
            "diffusion_api_http_requests_in_progress", "Requests that are being answered.", registry=self._registry
        )
        _resident_memory(self._registry, "diffusion_api_process_memory_bytes", "Resident memory of the API's process.")

    def request_in_progress(self) -> AbstractContextManager[None]:
        """Within, a request is being answered."""
        return self._in_progress.track_inprogress()

    def request(self, method: str, route: str, status: int) -> None:
        """A request was answered. ``route`` is the template; what is not one of HTTP's methods counts as ``other``."""
        self._requests.labels(method if method in METHODS else "other", route, status).inc()

    def render(self) -> bytes:
        """Everything, in the text format of :data:`CONTENT_TYPE`."""
        return generate_latest(self._registry)


class JobMetrics:
    """What one worker counts of its jobs. Labels are names of installed models, of states and of our errors."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._waits = Histogram(
            "diffusion_api_job_wait_seconds", "From a job's arrival to its start.", buckets=SECONDS, registry=registry
        )
        self._phases = Histogram(
            "diffusion_api_job_phase_seconds", "What jobs spent in load, generation, decode and save.",
            ("phase",), buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._ended = Counter(
            "diffusion_api_jobs_ended", "Jobs by how they ended; error is the class of the error.",
            ("state", "error"), registry=registry,
        )  # fmt: skip
        self._steps = Counter("diffusion_api_steps", "Steps that were done.", registry=registry)
        self._speed = Gauge(
            "diffusion_api_steps_per_second", "Of the last job with that model.", ("model",), registry=registry
        )
        self._models = Counter(
            "diffusion_api_model_requests", "Jobs that found their model loaded (hit), or had to load it (miss).",
            ("cache",), registry=registry,
        )  # fmt: skip
        self._memory = Gauge(
            "diffusion_api_device_memory_bytes", "After the last job: allocated on a GPU, resident on a CPU.",
            registry=registry,
        )  # fmt: skip
        _resident_memory(registry, "diffusion_api_worker_memory_bytes", "Resident memory of the worker's process.")

    def watched(self, job: Job, events: Iterator[Event]) -> Iterator[Event]:
        """The events of a job's run as they come, counted."""
        spent: defaultdict[str, float] = defaultdict(float)
        phase, since, step, steps = "", 0.0, 0, 0
        try:
            for event in events:
                now = time.monotonic()
                if phase:
                    spent[phase] += now - since
                else:
                    self._waits.observe(max(0.0, time.time() - job.created))
                since = now
                if isinstance(event, Finished):
                    self._finished(job, event, steps, spent["generation"])
                elif isinstance(event, Progress):
                    steps += event.step - step if event.step >= step else event.step  # each picture counts from 0
                    step = event.step
                    phase = _phase(event.state, decoding=event.steps > 0 and event.step == event.steps)
                yield event
        finally:
            self._steps.inc(steps)
            for name, seconds in spent.items():
                self._phases.labels(name).observe(seconds)

    def saving(self) -> AbstractContextManager[object]:
        """Within, the pictures of a job are encoded and written."""
        return self._phases.labels("save").time()

    def ended(self, job: Job) -> None:
        """The end of a job was written."""
        self._ended.labels(job.state.value, job.error.kind if job.error else "").inc()

    def render(self) -> str:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry).decode()

    def _finished(self, job: Job, finished: Finished, steps: int, seconds: float) -> None:
        self._memory.set(finished.memory_after_mb * MIB)
        if seconds > 0 and isinstance(job.request, Sampling):
            self._speed.labels(job.request.model).set(steps / seconds)
        if finished.model_cached is not None:
            self._models.labels("hit" if finished.model_cached else "miss").inc()


class _QueueCollector(Collector):
    """The queue and its workers, read when they are asked for."""

    def __init__(self, counts: Callable[[], Mapping[State, int]], workers: Callable[[], list[WorkerReport]]) -> None:
        self._counts, self._workers = counts, workers

    def collect(self) -> Iterator[Metric]:
        """All families. A queue that cannot be read is told, not raised."""
        readable = GaugeMetricFamily("diffusion_api_queue_readable", "1 while the queue can be read.", 1)
        try:
            counts, reports = self._counts(), self._workers()
        except QueueUnusable:
            counts, reports = {}, []
            readable.samples[0] = readable.samples[0]._replace(value=0)
        yield readable
        jobs = GaugeMetricFamily("diffusion_api_jobs", "Jobs in the queue's records.", labels=["state"])
        for state, count in counts.items():
            jobs.add_metric([state.value], count)
        yield jobs
        yield from _of_workers(reports)


def _of_workers(reports: list[WorkerReport]) -> Iterator[Metric]:
    yield GaugeMetricFamily("diffusion_api_workers", "Processes that serve the queue.", len(reports))
    quiet = GaugeMetricFamily("diffusion_api_worker_quiet_seconds", "Since a job last moved.", labels=["worker"])
    restarts = GaugeMetricFamily("diffusion_api_worker_restarts", "How often it began again.", labels=["worker"])
    families: dict[str, Metric] = {quiet.name: quiet, restarts.name: restarts}
    for report in reports:
        quiet.add_metric([str(report.pid)], report.quiet)
        restarts.add_metric([str(report.pid)], report.restarts)
        for family in text_string_to_metric_families(report.metrics):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                known.add_sample(sample.name, {**sample.labels, "worker": str(report.pid)}, sample.value)
    yield from families.values()


def _phase(state: State, *, decoding: bool) -> str:
    """What the time after such an event is spent on."""
    if state is State.LOADING:
        return "load"
    return "decode" if decoding else "generation"


def _resident_memory(registry: CollectorRegistry, name: str, help_text: str) -> None:
    def resident() -> float:
        import psutil

        return float(psutil.Process().memory_info().rss)

    Gauge(name, help_text, registry=registry).set_function(resident)
