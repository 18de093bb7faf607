"""The Prometheus exposition: one registry for each daemon, made by it and passed down.

The library's global registry is not used: two daemons in one test process would share it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, GCCollector, Info, PlatformCollector, ProcessCollector
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
