"""What /metrics reports, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
GAUGES = ("running", "waiting", "pages", "pages_held")  # of the workers' stats; the others count


class Metrics:
    """Counts of one server. Workers' own counts are read when they are asked for."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        self.models = models
        self.registry = CollectorRegistry()
        self.registry.register(self)
        options: dict[str, Any] = {"namespace": "fastattn", "registry": self.registry}
        self.requests = Counter("http_requests", "Answered requests.", ["route", "status"], **options)
        self.seconds = Histogram(
            "http_request_seconds", "Time of requests.", ["route"], buckets=SECONDS, **options
        )
        self.first = Histogram(
            "time_to_first_token_seconds", "Time to the first output.", ["model"], buckets=SECONDS, **options
        )
        self.between = Histogram(
            "time_between_tokens_seconds", "Time between outputs.", ["model"], buckets=SECONDS, **options
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request has its answer; status 0 where the client left before."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def collect(self) -> Iterator[Any]:
        """The counts of the workers."""
        stats = {name: model.worker.stats() for name, model in self.models.items()}
        for key in sorted({key for each in stats.values() for key in each}):
            make = GaugeMetricFamily if key in GAUGES else CounterMetricFamily
            family = make(f"fastattn_{key}", f"{key.replace('_', ' ').capitalize()}.", labels=["model"])
            for name, each in stats.items():
                if key in each:
                    family.add_metric([name], each[key])
            yield family

    def text(self) -> bytes:
        """What /metrics returns."""
        return generate_latest(self.registry)
