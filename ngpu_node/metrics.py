"""The node's own figures for Prometheus, named in one place.

Counters that the hot path touches are resolved to their children once; what can be read when asked for (peers,
streams, deployments) is collected then and costs nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.wire_errors import Reason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class NodeMetrics:
    """What the parts of a node count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        attempts = Counter("ngpu_node_attempts", "Attempts that ended, by outcome.", ["outcome"], registry=registry)
        self._attempts = {outcome: attempts.labels(outcome.value) for outcome in Outcome}
        refusals = Counter("ngpu_node_refusals", "Orders refused, by reason.", ["reason"], registry=registry)
        self._refusals = {reason: refusals.labels(reason.value) for reason in Reason}
        verdicts = Counter(
            "ngpu_node_acknowledgements", "Acknowledgements received, by verdict.", ["verdict"], registry=registry
        )
        self._verdicts = {verdict: verdicts.labels(verdict.value) for verdict in VerdictKind}
        self.running = Gauge("ngpu_node_attempts_running", "Attempts that run now.", registry=registry)
        self.seconds = Histogram(
            "ngpu_node_attempt_seconds",
            "From admission to the last byte of the answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.ledger_seconds = Histogram(
            "ngpu_node_ledger_seconds", "Waiting for a receipt to be durable.", buckets=_SECONDS, registry=registry
        )
        self.offers = Counter("ngpu_node_receipt_offers", "Receipts offered again.", registry=registry)
        self.connects = Counter(
            "ngpu_node_bootstrap_sessions", "Times a bootstrap welcomed this node.", registry=registry
        )

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """Count an attempt that ended after *seconds*."""
        self._attempts[outcome].inc()
        self.seconds.observe(seconds)

    def refused(self, reason: Reason) -> None:
        """Count an order that was refused."""
        self._refusals[reason].inc()

    def acknowledged(self, verdict: str) -> None:
        """Count an acknowledgement; a later version's verdict counts nowhere."""
        if verdict in self._verdicts:
            self._verdicts[VerdictKind(verdict)].inc()

    def gauge(self, name: str, text: str, label: str | None, read: Callable[[], Iterable[tuple[str, float]]]) -> None:
        """Export what *read* returns whenever asked: pairs of label value and number (one pair without a label)."""
        self._registry.register(_OnDemand(name, text, label, read))


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
