"""What the service tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "m5_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "m5_request_seconds",
            "Until the answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram("m5_batch_size", "Asks in a pass of the model.", buckets=SIZES, registry=self.registry)
        self.waiting = Gauge("m5_waiting", "Asks that wait for the model.", registry=self.registry)
        self.titles = Counter("m5_titles", "Titles recommended.", ["kind"], registry=self.registry)
        self.short = Counter("m5_short_answers", "Answers of fewer titles than asked for.", registry=self.registry)
        self.unknown = Counter(
            "m5_ignored", "Titles and values of requests that are not known.", ["what"], registry=self.registry
        )
        self.reloads = Counter("m5_reloads", "New artifacts.", ["outcome"], registry=self.registry)
        self.artifact = Gauge("m5_artifact", "1 for the artifact that answers.", ["digest"], registry=self.registry)
        self.age = Gauge("m5_artifact_age_seconds", "Since it was taken over.", registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
