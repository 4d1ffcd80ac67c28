"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server. They hold no prompt and no key."""

    def __init__(self) -> None:
        own = CollectorRegistry()
        ProcessCollector(registry=own)
        self._registry = own
        self._requests = Counter("teefusion_requests", "Requests for pictures, by status.", ["status"], registry=own)
        self._seconds = Histogram(
            "teefusion_request_seconds", "From a request to its answer.", buckets=_SECONDS, registry=own
        )
        self.pictures = Counter("teefusion_pictures", "Pictures drawn.", registry=own)
        self.batch = Histogram("teefusion_batch_pictures", "Pictures drawn together.", buckets=_BATCHES, registry=own)
        self.dropped = Counter("teefusion_dropped_pictures", "Pictures nobody waited for any more.", registry=own)
        self.swaps = Counter("teefusion_swaps", "Students that took another's place.", registry=own)
        self.refused = Gauge(
            "teefusion_alias_refused", "1 while the alias means a version that cannot be served.", registry=own
        )
        self.unreachable = Counter("teefusion_registry_errors", "Looks at the alias that failed.", registry=own)
        self._waiting = Gauge("teefusion_waiting_pictures", "Pictures that wait to be drawn.", registry=own)
        self._student = Gauge(
            "teefusion_student", "1 for the student that is served.", ["name", "version", "digest"], registry=own
        )

    def finished(self, status: int, seconds: float) -> None:
        """Count a request for pictures that was answered."""
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Ask ``waiting`` for the queue's length whenever it is read."""
        self._waiting.set_function(waiting)

    def serving(self, name: str, version: str | None, digest: str | None) -> None:
        """Name the student that is served from now on."""
        self._student.clear()
        self._student.labels(name, version or "", digest or "").set(1)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
