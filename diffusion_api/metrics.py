"""What Prometheus is told."""

from __future__ import annotations

from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class Metrics:
    """Draft."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "diffusion_api_http_requests", "Answers.", ("method", "route", "status"), registry=self._registry
        )
        self._in_progress = Gauge(
            "diffusion_api_http_requests_in_progress", "Requests being answered.", registry=self._registry
        )

    def request_in_progress(self) -> AbstractContextManager[None]:
        return self._in_progress.track_inprogress()

    def request(self, method: str, route: str, status: int) -> None:
        self._requests.labels(method, route, status).inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)
