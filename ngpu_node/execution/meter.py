"""GPU time of tasks: reserved, the integral over a task of (GPUs held / tasks running on them), and busy (design).

Pure: the caller gives the monotonic time in nanoseconds with every event. This module knows when tasks held which
GPU; how busy a GPU was is measured by a `BusySource` (`gpus.watch`), without which every reading says `meter = none`.

The integral costs O(GPUs) an event, whatever the number of tasks, by keeping one virtual clock per GPU that advances
by dt / n(t) while n tasks run on it: a task's share is the clock's reading at its end minus that at its start. The
clocks count in integer units of 2**-20 ns and round down, and so does every reading. Hence the invariant, in exact
arithmetic:

    sum over tasks of reserved time on a GPU  <=  the wall time during which the GPU had a task

so overlapping tasks never bill one GPU twice, and reserved <= wall x GPUs for each task.
"""

from collections.abc import Hashable, Sequence
from dataclasses import field
from typing import Any, Protocol

from ngpu_protocol.frozen import dataclass
from ngpu_protocol.receipts import Meter

_SCALE = 1 << 20
_NS_PER_MS = 1_000_000


@dataclass(slots=True)
class _Clock:
    """One GPU's virtual clock: *reading* advances by elapsed / tasks while *tasks* > 0."""

    reading: int = 0
    tasks: int = 0
    at_ns: int = 0

    def advance(self, now_ns: int) -> int:
        if self.tasks:
            # A step back of the caller's clock counts as no time at all rather than as a refund.
            self.reading += max(0, now_ns - self.at_ns) * _SCALE // self.tasks
        self.at_ns = max(self.at_ns, now_ns)
        return self.reading


@dataclass(slots=True)
class Holding:
    """What one running task holds: made by `GpuMeter.start`, spent by `GpuMeter.stop`."""

    gpus: tuple[bytes, ...]
    started_ns: int
    readings: list[int] = field(default_factory=list)
    stopped: bool = False
    busy: Any = None


@dataclass(frozen=True, slots=True)
class Reading:
    """GPU time of one finished task, in whole milliseconds rounded down."""

    gpus: tuple[bytes, ...]
    duration_ms: int
    reserved_gpu_ms: int
    busy_gpu_ms: int
    meter: Meter


class BusyTime(Protocol):
    """What a task used of its GPUs; *method* is a word of `Meter`."""

    @property
    def busy_ns(self) -> int: ...
    @property
    def method(self) -> str: ...


class BusySource(Protocol):
    """Who measures how busy GPUs are with a holder's tasks; what `start` gives is handed to `stop`."""

    def start(self, gpus: Sequence[bytes], holder: Hashable, now_ns: int) -> Any: ...
    def stop(self, started: Any, now_ns: int) -> BusyTime: ...
    async def look_before_stop(self, gpus: Sequence[bytes]) -> None: ...


class GpuMeter:
    """The virtual clocks of all GPUs of this node."""

    def __init__(self, busy: BusySource | None = None) -> None:
        self._clocks: dict[bytes, _Clock] = {}
        self._busy = busy

    def start(self, gpus: Sequence[bytes], now_ns: int, holder: Hashable = None) -> Holding:
        """Begin counting a task of *holder* that holds *gpus* (32-byte names; none for a task without GPUs)."""
        holding = Holding(tuple(gpus), now_ns)
        if holding.gpus and self._busy is not None:
            holding.busy = self._busy.start(holding.gpus, holder, now_ns)
        for gpu in holding.gpus:
            clock = self._clocks.get(gpu)
            if clock is None:
                clock = self._clocks[gpu] = _Clock(at_ns=now_ns)
            holding.readings.append(clock.advance(now_ns))
            clock.tasks += 1
        return holding

    async def look_before_stop(self, holding: Holding) -> None:
        """Have the newest samples of the task's GPUs; takes milliseconds, and cannot be cancelled."""
        if holding.busy is not None and self._busy is not None:
            await self._busy.look_before_stop(holding.gpus)

    def stop(self, holding: Holding, now_ns: int) -> Reading:
        """End the task of *holding* and return its time. A holding can be stopped once.

        Raises:
            ValueError: *holding* was stopped before.
        """
        if holding.stopped:
            raise ValueError("this task's GPU time was already read")
        holding.stopped = True
        reserved = 0
        for gpu, before in zip(holding.gpus, holding.readings, strict=True):
            clock = self._clocks[gpu]
            reserved += clock.advance(now_ns) - before
            clock.tasks -= 1
        duration_ms = max(0, now_ns - holding.started_ns) // _NS_PER_MS
        reserved_ms = reserved // _SCALE // _NS_PER_MS
        # Several GPUs may add their fractions of a millisecond to one that the wall time, rounded down, does not have.
        reserved_ms = min(reserved_ms, duration_ms * len(holding.gpus))
        busy_ms, meter = 0, Meter.NONE
        if holding.busy is not None and self._busy is not None:
            busy = self._busy.stop(holding.busy, now_ns)
            busy_ms, meter = min(busy.busy_ns // _NS_PER_MS, reserved_ms), Meter(busy.method)
        return Reading(holding.gpus, duration_ms, reserved_ms, busy_ms, meter)
