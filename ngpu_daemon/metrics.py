"""The Prometheus exposition: one registry for each daemon, made by it and passed down.

The library's global registry is not used: two daemons in one test process would share it.

What happens for each request is counted in plain numbers on the daemon's one loop and becomes a metric when somebody
asks: the library's own counters take a lock each time, and its histograms look at every bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, GCCollector, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def software_version() -> str:
    """Return the version of the installed distribution, or `0+checkout` when it runs without being installed."""
    try:
        return version("ngpu")
    except PackageNotFoundError:
        return "0+checkout"


def new_registry(daemon: str) -> CollectorRegistry:
    """Return a registry that holds what every daemon reports: process, garbage collector, platform and build."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    Info("ngpu_build", "What is running.", registry=registry).info({"daemon": daemon, "version": software_version()})
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """Return the body of `GET /metrics`, to be sent as `CONTENT_TYPE`."""
    return generate_latest(registry)


class Seconds:
    """How long something took, counted by upper *bounds*, which rise."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one that took *seconds*."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Add this histogram to its family."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


def seconds_family(name: str, text: str, seconds: Seconds) -> HistogramMetricFamily:
    """Return *seconds* as a histogram without labels."""
    family = HistogramMetricFamily(name, text)
    seconds.add_to(family)
    return family
