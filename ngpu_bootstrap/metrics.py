"""What a bootstrap counts and measures, by the names Prometheus sees (`docs/operations.md` lists them)."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ngpu_daemon.metrics import new_registry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The bootstrap's own registry; parts count through its methods, which bind their labels once."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = new_registry("ngpu-bootstrap")
        self._tasks = Counter("ngpu_tasks", "Tasks that ended.", ["api", "state"], registry=self.registry)
        self._attempts = Counter("ngpu_attempts", "Attempts that ended.", ["how"], registry=self.registry)
        self._verdicts = Counter("ngpu_verdicts", "Receipts judged.", ["verdict", "rule"], registry=self.registry)
        self._task_seconds = Histogram(
            "ngpu_task_seconds", "From acceptance to the end.", ["api"], buckets=_SECONDS, registry=self.registry
        )
        self._first_byte_seconds = Histogram(
            "ngpu_first_byte_seconds",
            "From sending an order to the first byte of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._refusals = Counter("ngpu_refusals", "Calls not served.", ["reason"], registry=self.registry)
        self._children: dict[tuple[str, ...], Counter] = {}
        self._histograms: dict[str, Histogram] = {}

    def task_ended(self, api: str, state: str, seconds: float) -> None:
        """Count a task that ended; *api* is `proxy`, `sync` or `async` (clients' own names would be endless labels)."""
        self._child(self._tasks, "tasks", api, state).inc()
        histogram = self._histograms.get(api)
        if histogram is None:
            histogram = self._histograms[api] = self._task_seconds.labels(api)
        histogram.observe(seconds)

    def attempt_ended(self, how: str, first_byte_s: float | None) -> None:
        """Count an attempt that ended; *first_byte_s* None when no answer began."""
        self._child(self._attempts, "attempts", how).inc()
        if first_byte_s is not None:
            self._first_byte_seconds.observe(first_byte_s)

    def judged(self, verdict: str, rule: str) -> None:
        """Count a receipt."""
        self._child(self._verdicts, "verdicts", verdict, rule).inc()

    def refused(self, reason: str) -> None:
        """Count a call that was not served."""
        self._child(self._refusals, "refusals", reason).inc()

    def gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Show what *value* returns whenever metrics are read."""
        Gauge(name, description, registry=self.registry).set_function(value)

    def _child(self, counter: Counter, *labels: str) -> Counter:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = counter.labels(*labels[1:])
        return child
