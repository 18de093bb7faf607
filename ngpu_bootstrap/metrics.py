"""What a bootstrap counts and measures, by the names Prometheus sees (`docs/operations.md` lists them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ngpu_daemon.metrics import Seconds, new_registry, seconds_family

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Labels = tuple[str, ...]


class Metrics(Collector):
    """The bootstrap's own registry; parts count through its methods, all on the daemon's loop."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = new_registry("ngpu-bootstrap")
        self._tasks: Counter[Labels] = Counter()
        self._attempts: Counter[Labels] = Counter()
        self._verdicts: Counter[Labels] = Counter()
        self._refusals: Counter[Labels] = Counter()
        self._rechecks: Counter[Labels] = Counter()
        self._challenges: Counter[Labels] = Counter()
        self._task_seconds: dict[str, Seconds] = {}
        self._first_byte_seconds = Seconds(_BOUNDS)
        self.registry.register(self)

    def task_ended(self, api: str, state: str, seconds: float) -> None:
        """Count a task that ended; *api* is `proxy`, `sync` or `async` (clients' own names would be endless labels)."""
        self._tasks[api, state] += 1
        taken = self._task_seconds.get(api)
        if taken is None:
            taken = self._task_seconds[api] = Seconds(_BOUNDS)
        taken.observe(seconds)

    def attempt_ended(self, how: str, first_byte_s: float | None) -> None:
        """Count an attempt that ended; *first_byte_s* None when no answer began."""
        self._attempts[how,] += 1
        if first_byte_s is not None:
            self._first_byte_seconds.observe(first_byte_s)

    def judged(self, verdict: str, rule: str) -> None:
        """Count a receipt."""
        self._verdicts[verdict, rule] += 1

    def rechecked(self, outcome: str) -> None:
        """Count a task that was run again."""
        self._rechecks[outcome,] += 1

    def challenged(self, finding: str) -> None:
        """Count a challenge."""
        self._challenges[finding,] += 1

    def refused(self, reason: str) -> None:
        """Count a call that was not served."""
        self._refusals[reason,] += 1

    def gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Show what *value* returns whenever metrics are read."""
        Gauge(name, description, registry=self.registry).set_function(value)

    def collect(self) -> Iterator[Metric]:
        """Return everything counted here (called by the registry)."""
        yield _counter("ngpu_tasks", "Tasks that ended.", ("api", "state"), self._tasks)
        yield _counter("ngpu_attempts", "Attempts that ended.", ("how",), self._attempts)
        yield _counter("ngpu_verdicts", "Receipts judged.", ("verdict", "rule"), self._verdicts)
        yield _counter("ngpu_rechecks", "Tasks run again elsewhere.", ("outcome",), self._rechecks)
        yield _counter("ngpu_challenges", "GPU challenges held.", ("finding",), self._challenges)
        yield _counter("ngpu_refusals", "Calls not served.", ("reason",), self._refusals)
        taken = HistogramMetricFamily("ngpu_task_seconds", "From acceptance to the end.", labels=["api"])
        for api, seconds in self._task_seconds.items():
            seconds.add_to(taken, [api])
        yield taken
        text = "From sending an order to the first byte of its answer."
        yield seconds_family("ngpu_first_byte_seconds", text, self._first_byte_seconds)


def _counter(name: str, text: str, labels: Sequence[str], counts: Counter[Labels]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family
