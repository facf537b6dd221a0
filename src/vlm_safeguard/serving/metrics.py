"""What is counted, for Prometheus: numbers and names of ours, nothing that a client wrote."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.receipt_object import decision, opened_by

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_ANSWERS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        """All at nought."""
        self._registry = registry = CollectorRegistry()
        prefix = "vlm_safeguard"
        self.requests = Counter(
            f"{prefix}_requests", "Requests.", ["endpoint", "status"], registry=registry
        )
        self.seconds = Histogram(
            f"{prefix}_request_seconds",
            "From a request's arrival to its answer's end.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            f"{prefix}_first_token_seconds",
            "From a request's arrival to its gate's decision, a token later at most.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.gate = Counter(
            f"{prefix}_gate",
            "Requests by what the gate decided, and the criterion that opened it.",
            ["decision", "criterion"],
            registry=registry,
        )
        self.refusals = Counter(
            f"{prefix}_refusals", "Answers that read as refusals.", registry=registry
        )
        self.tokens = Counter(f"{prefix}_tokens", "Tokens.", ["kind"], registry=registry)
        self.batch_answers = Histogram(
            f"{prefix}_batch_answers", "Answers in a batch.", buckets=_ANSWERS, registry=registry
        )
        self.faults = Counter(
            f"{prefix}_faults", "Batches that failed under the guard.", registry=registry
        )
        self._queue = Gauge(f"{prefix}_queue", "Requests that wait for a batch.", registry=registry)
        self._running = Gauge(
            f"{prefix}_requests_in_progress", "Requests that are not over.", registry=registry
        )

    def watch(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Where the gauges are read."""
        self._queue.set_function(waiting)
        self._running.set_function(running)

    def decided(self, receipt: Receipt) -> None:
        """Count a request by its receipt."""
        self.gate.labels(decision(receipt), opened_by(receipt) or "").inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
