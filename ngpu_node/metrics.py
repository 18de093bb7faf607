"""The node's own figures for Prometheus, named in one place.

What the hot path counts are plain numbers, made into metrics only when somebody asks (`ngpu_daemon.metrics` says why).
What can be read when asked for (peers, streams, deployments) costs nothing in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ngpu_daemon.metrics import Seconds, seconds_family
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.wire_errors import Reason

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class NodeMetrics(Collector):
    """What the parts of a node count.

    Attributes:
        running: attempts that run now.
        attempt_seconds: from admission to the last byte of the answer.
        ledger_seconds: waiting for a receipt to be durable.
        offers: receipts offered again.
        sessions: times a bootstrap welcomed this node.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._attempts: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
        self._refusals: Counter[str] = Counter({reason.value: 0 for reason in Reason})
        self._verdicts: Counter[str] = Counter({verdict.value: 0 for verdict in VerdictKind})
        self.running = 0
        self.attempt_seconds = Seconds(_BOUNDS)
        self.ledger_seconds = Seconds(_BOUNDS)
        self.offers = 0
        self.sessions = 0
        registry.register(self)

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """Count an attempt that ended after *seconds*."""
        self._attempts[outcome] += 1
        self.attempt_seconds.observe(seconds)

    def refused(self, reason: Reason) -> None:
        """Count an order that was refused."""
        self._refusals[reason] += 1

    def acknowledged(self, verdict: str) -> None:
        """Count an acknowledgement; a later version's verdict counts nowhere."""
        if verdict in self._verdicts:
            self._verdicts[verdict] += 1

    def gauge(self, name: str, text: str, label: str | None, read: Callable[[], Iterable[tuple[str, float]]]) -> None:
        """Export what *read* returns whenever asked: pairs of label value and number (one pair without a label)."""
        self._registry.register(_OnDemand(name, text, label, read))

    def collect(self) -> Iterator[Metric]:
        """Return everything counted here (called by the registry)."""
        yield _counter("ngpu_node_attempts", "Attempts that ended, by outcome.", "outcome", self._attempts)
        yield _counter("ngpu_node_refusals", "Orders refused, by reason.", "reason", self._refusals)
        text = "Acknowledgements received, by verdict."
        yield _counter("ngpu_node_acknowledgements", text, "verdict", self._verdicts)
        yield CounterMetricFamily("ngpu_node_receipt_offers", "Receipts offered again.", self.offers)
        text = "Times a bootstrap welcomed this node."
        yield CounterMetricFamily("ngpu_node_bootstrap_sessions", text, self.sessions)
        yield GaugeMetricFamily("ngpu_node_attempts_running", "Attempts that run now.", self.running)
        text = "From admission to the last byte of the answer."
        yield seconds_family("ngpu_node_attempt_seconds", text, self.attempt_seconds)
        yield seconds_family("ngpu_node_ledger_seconds", "Waiting for a receipt to be durable.", self.ledger_seconds)


class _OnDemand(Collector):
    def __init__(
        self, name: str, text: str, label: str | None, read: Callable[[], Iterable[tuple[str, float]]]
    ) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._read = read

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, number in self._read():
            family.add_metric([value] if self._label else [], number)
        yield family

    def describe(self) -> Iterable[Metric]:
        # Without this the registry would read everything once at registration.
        return [GaugeMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])]


def _counter(name: str, text: str, label: str, counts: Counter[str]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
