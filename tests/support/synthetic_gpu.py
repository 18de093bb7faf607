"""A GPU whose true busy times are known, seen as the driver's samples show them: a `Driver` on a clock of its own.

It samples as driver 580 does on an H200 (`tests/bench/gpu_samples.py`): a tick each *period_us*; the busy part of the
time since the last one in whole percent, rounded down, never above 99; all of it noted for the process that was on the
device last; 72 ticks kept; merged by process when asked; processes that ended forgotten; visible 16 ms late. And it
takes the processor time that calls took there, about: 1.5 to 2.1 ms for samples, 0.3 ms for the list of processes.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from ngpu_node.gpus.driver import DriverFault, FaultKind, Look, Round, Sample, Survey

KEPT_TICKS = 72
LATE_US = 16_000
WALL_AT_ZERO_US = 1_700_000_000_000_000
SAMPLES_COST_US = (1500, 2100)
LIST_COST_US = 300


@dataclass
class SyntheticGpu:
    """One device.

    Attributes:
        work: (begin, end, pid) of what ran on it, in microseconds of true time, not overlapping within a process.
        alive: (begin, end) of processes that do not live for ever.
        steps: (true time, by how much) the wall clock was set.
        stuck: (begin, end) of true time in which no call returns.
        now_us: true time; also what the monotonic clock shows.
        spent_us: processor time that calls have taken.
    """

    work: Sequence[tuple[int, int, int]]
    period_us: int = 200_000
    phase_us: int = 57_000
    alive: dict[int, tuple[int, int]] = field(default_factory=dict)
    steps: Sequence[tuple[int, int]] = ()
    stuck: Sequence[tuple[int, int]] = ()
    processes_supported: bool = True
    now_us: int = 0
    spent_us: int = 0

    def __post_init__(self) -> None:
        self.work = sorted(self.work)
        self._busy = _union([(begin, end) for begin, end, _ in self.work])
        self._noted: dict[int, tuple[int, int]] = {}
        self._chance = random.Random(580)

    def add(self, begin_us: int, end_us: int, pid: int) -> None:
        """Let a process work, from now or later on."""
        self.work = sorted([*self.work, (begin_us, end_us, pid)])
        self._busy = _union([(begin, end) for begin, end, _ in self.work])

    # -- the truth -----------------------------------------------------------------------------------------------------

    def wall_us(self, at_us: int | None = None) -> int:
        at_us = self.now_us if at_us is None else at_us
        return WALL_AT_ZERO_US + at_us + sum(by for when, by in self.steps if when <= at_us)

    def busy_us(self, begin: int, end: int) -> int:
        """Return for how long of a stretch anything ran."""
        first = max(0, bisect_left(self._busy, (begin, begin)) - 1)
        total = 0
        for start, stop in self._busy[first:]:
            if start >= end:
                break
            total += max(0, min(stop, end) - max(start, begin))
        return total

    # -- what the driver noted -----------------------------------------------------------------------------------------

    def ticks(self) -> list[tuple[int, int, int]]:
        """Return (wall time, pid, percent) of the ticks that are kept, oldest first; pid 0 is nobody's."""
        newest = (self.now_us - LATE_US - self.phase_us) // self.period_us
        found: list[tuple[int, int, int]] = []
        for number in range(max(1, newest - KEPT_TICKS + 1), newest + 1):
            at = self.phase_us + number * self.period_us
            if number not in self._noted:
                self._noted[number] = self._note(at)
            found.append((self.wall_us(at), *self._noted[number]))
        return found

    def _note(self, at: int) -> tuple[int, int]:
        percent = min(99, self.busy_us(at - self.period_us, at) * 100 // self.period_us)
        begun = bisect_left(self.work, (at, 0, 0))
        recent = self.work[max(0, begun - 64) : begun]
        return max(((min(end, at), pid) for _, end, pid in recent), default=(0, 0))[1], percent

    def is_alive(self, pid: int) -> bool:
        begin, end = self.alive.get(pid, (0, 1 << 62))
        return pid != 0 and begin <= self.now_us < end

    # -- the driver ----------------------------------------------------------------------------------------------------

    def open(self) -> None: ...

    def close(self) -> None: ...

    def survey(self) -> Survey:
        raise NotImplementedError

    def round(self, uuids: Sequence[str]) -> Round:
        raise NotImplementedError

    def process_look(self, uuid: str, since_us: int) -> Look:
        self.spent_us += self._chance.randint(*SAMPLES_COST_US)
        if not self.processes_supported:
            raise DriverFault(FaultKind.UNSUPPORTED, "process_look", "not supported")
        wall_us, monotonic_ns = self.wall_us(), self.now_us * 1000
        ticks = [tick for tick in self.ticks() if tick[0] > since_us]
        samples: list[Sample] = []
        for pid in {pid for _, pid, _ in ticks if self.is_alive(pid)}:
            own = [(at, percent) for at, each, percent in ticks if each == pid]
            mean = math.ceil(sum(percent for _, percent in own) / len(ticks))
            samples.append(Sample(pid, max(at for at, _ in own), mean))
        return Look(tuple(samples), wall_us, monotonic_ns)

    def device_look(self, uuid: str, since_us: int) -> Look:
        self.spent_us += self._chance.randint(*SAMPLES_COST_US)
        ticks = [tick for tick in self.ticks() if tick[0] > since_us]
        samples = tuple(Sample(None, at, percent) for at, _, percent in ticks)
        return Look(samples, self.wall_us(), self.now_us * 1000, pids=self.processes(uuid))

    def processes(self, uuid: str) -> tuple[int, ...]:
        self.spent_us += LIST_COST_US
        return tuple({pid for _, _, pid in self.work if self.is_alive(pid)})


def _union(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for begin, end in sorted(stretches):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found
