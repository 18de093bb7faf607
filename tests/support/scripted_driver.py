"""A `Driver` whose answers a test sets, at the node's own seam: no library, no state file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ngpu_node.gpus.driver import (
    DeviceReading,
    DeviceState,
    DriverFault,
    FaultKind,
    Look,
    Round,
    Sample,
    Survey,
    Vitals,
    XidEvent,
)

GIB = 2**30


def reading(number: int = 0, **changes: object) -> DeviceReading:
    """Return a healthy device."""
    values: dict[str, object] = {
        "uuid": f"GPU-{number:08x}",
        "model": "NVIDIA H200",
        "memory_total_bytes": 141 * GIB,
        "memory_free_bytes": 141 * GIB,
        "index": number,
        "pci_address": f"0000:0{number}:00.0",
        **changes,
    }
    return DeviceReading(**values)  # type: ignore[arg-type]


def survey(*devices: DeviceReading, **changes: object) -> Survey:
    """Return what a driver with *devices* shows."""
    values: dict[str, object] = {
        "driver_version": "580.1",
        "nvml_version": "13.580.1",
        "cuda_version": "13.0",
        "count": len(devices),
        "devices": devices,
        **changes,
    }
    return Survey(**values)  # type: ignore[arg-type]


def fault(kind: FaultKind, text: str = "the driver's words") -> DriverFault:
    return DriverFault(kind, "call", text)


@dataclass
class ScriptedDriver:
    """Answers what its attributes say.

    Attributes:
        wait: called in the thread before every answer; may block.
        vitals: by UUID; a fault is raised for that device alone.
    """

    found: Survey | DriverFault
    vitals: dict[str, Vitals | DriverFault] = field(default_factory=dict)
    events: list[XidEvent] = field(default_factory=list)
    by_process: Sequence[Sample] | DriverFault = ()
    device: Sequence[Sample] | DriverFault = ()
    pids: tuple[int, ...] | None = ()
    wait: Callable[[], None] = lambda: None
    opened: int = 0
    calls: list[str] = field(default_factory=list)
    _is_open: bool = False

    def open(self) -> None:
        self.wait()
        if not self._is_open:
            self._is_open = True
            self.opened += 1

    def close(self) -> None:
        self._is_open = False

    def survey(self) -> Survey:
        self.calls.append("survey")
        if isinstance(self.found, DriverFault):
            raise self.found
        return self.found

    def round(self, uuids: Sequence[str]) -> Round:
        self.calls.append("round")
        if isinstance(self.found, DriverFault):
            raise self.found
        events, self.events = tuple(self.events), []
        return Round(tuple(self._state(uuid) for uuid in uuids), events)

    def _state(self, uuid: str) -> DeviceState:
        known = not isinstance(self.found, DriverFault) and any(each.uuid == uuid for each in self.found.devices)
        answer = self.vitals.get(uuid, Vitals(memory_used_bytes=0) if known else fault(FaultKind.GONE, "not there"))
        if isinstance(answer, DriverFault):
            return DeviceState(uuid, fault=answer)
        return DeviceState(uuid, answer)

    def process_look(self, uuid: str, since_us: int) -> Look:
        self.calls.append("process_look")
        return self._look(self.by_process, since_us)

    def device_look(self, uuid: str, since_us: int) -> Look:
        self.calls.append("device_look")
        return replace(self._look(self.device, since_us), pids=self.pids)

    def processes(self, uuid: str) -> tuple[int, ...] | None:
        self.calls.append("processes")
        return self.pids

    def _look(self, samples: Sequence[Sample] | DriverFault, since_us: int) -> Look:
        if isinstance(samples, DriverFault):
            raise samples
        fresh = tuple(sample for sample in samples if sample.at_us > since_us)
        return Look(fresh, time.time_ns() // 1000, time.monotonic_ns())
