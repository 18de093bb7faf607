"""From looks at the driver's utilisation samples to windows of measured time.

Pure: one `SampleReader` a device, fed with what `Driver.process_look` or `Driver.device_look` gave.

What a sample is (recorded on a real device by `tests/bench/gpu_samples.py`): at every tick, 0.2 s apart on an H200,
the driver notes for what part of the time since the last tick the device was busy, in whole percent rounded down, and
the one process whose context was on it last. Asked for everything since a time (the *cursor*), it merges what it
noted: for each process that still lives, the mean over ALL ticks since the cursor of those that were its own, with the
time of its last one. It keeps some 70 ticks. The device's own samples come one by one. So:

    busy time of a process = its mean x (newest tick - cursor)

whatever the period is, as long as the cursor is a tick itself. Where it is not (the first look, or after silence) the
means stand for whole periods, counted by the period that was learnt.

What a process did since the cursor is forgotten when it ends. The device's own samples of the same ticks (`whole`)
still have it: what is left of them when the living have got theirs is the ended ones' together (`Window.ended_ns`).

Ticks are stamped by the wall clock, tasks by the monotonic one; both are taken at every look, and their difference
maps one to the other. When it jumps, somebody set the clock: ticks before and after cannot be told apart, so the time
until they have left the driver's buffer is a gap. Gaps are windows too: what was not measured is never guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ngpu_node.gpus.driver import Look, Sample

DEFAULT_PERIOD_US = 200_000
_PERIOD_RANGE_US = (5_000, 2_000_000)
#: Ask for no more than the driver surely still has: it keeps 14 s on an H200.
HORIZON_US = 10_000_000
#: After a step back of the clock, old ticks look new until they have left the buffer.
BLIND_US = 20_000_000
#: A difference of the clocks' difference beyond this is a step; below it is slewing or a slow call.
STEP_US = 100_000
#: A tick is to be seen this long after it at the latest (16 ms were measured).
SETTLE_US = 60_000


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of monotonic time and what is known of it.

    Attributes:
        busy_ns: by process, or under None for the device as a whole; None instead of the mapping where nothing is
            known: a gap.
        why: the reason of a gap.
        ended_ns: what processes did that have ended since, all of them together.
    """

    from_ns: int
    to_ns: int
    busy_ns: Mapping[int | None, int] | None
    why: str = ""
    ended_ns: int = 0


class SampleReader:
    """Where the reading of one device stands.

    Attributes:
        period_us: how far apart the driver's ticks are.
    """

    def __init__(self, wall_us: int, monotonic_ns: int) -> None:
        """Begin now: what happened before is not asked for."""
        self.period_us = DEFAULT_PERIOD_US
        self._offset_us = 0
        self._cursor_us = 0
        self._boundary_ns = 0
        self._blind_until_ns = 0
        self._on_tick = False
        self._skipped_to_ns: int | None = None
        self.begin(wall_us, monotonic_ns)

    def begin(self, wall_us: int, monotonic_ns: int) -> None:
        """Begin anew after a rest in which nobody was interested."""
        offset_us = wall_us - monotonic_ns // 1000
        # A step during the rest counts as well: old ticks are in the driver's buffer all the same.
        if self._offset_us and offset_us < self._offset_us - STEP_US:
            self._blind_until_ns = monotonic_ns + min(BLIND_US, self._offset_us - offset_us) * 1000
        self._offset_us = offset_us
        self._cursor_us, self._boundary_ns, self._on_tick = wall_us, monotonic_ns, False
        self._skipped_to_ns = None

    def learn(self, samples: Sequence[Sample]) -> None:
        """Learn the period from the device's own samples, of whatever age."""
        times = sorted({sample.at_us for sample in samples})
        steps = [after - before for before, after in pairwise(times)]
        low, high = _PERIOD_RANGE_US
        if len(steps) >= 3 and low <= (period := round(median(steps))) <= high:
            self.period_us = period

    def since_us(self, wall_us: int) -> int:
        """Return the time to ask from, given the wall clock now."""
        if self._cursor_us < wall_us - HORIZON_US:
            # The driver may have dropped what came before; of that part nothing will be known.
            skipped_us = wall_us - HORIZON_US - self._cursor_us
            self._cursor_us += skipped_us
            self._skipped_to_ns = self._boundary_ns + skipped_us * 1000
            self._on_tick = False
        return self._cursor_us

    @property
    def known_to_us(self) -> int:
        """Up to when, by the wall clock, everything was read."""
        return self._cursor_us

    def tick_seen_us(self, ticks: int) -> int:
        """Return when, by the wall clock, so many ticks after the last known one can be seen."""
        return self._cursor_us + ticks * self.period_us + SETTLE_US // 2

    def read(self, look: Look, whole: Look | None = None) -> list[Window]:
        """Return what *look* (asked from `since_us`) tells, oldest first; nothing when there was no tick yet.

        Args:
            whole: the device's own samples, asked for from the same time right after a look by process.
        """
        offset_us = look.wall_us - look.monotonic_ns // 1000
        step_us = offset_us - self._offset_us
        if abs(step_us) > STEP_US:
            blind_us = min(BLIND_US, -step_us) if step_us < 0 else 0
            self._blind_until_ns = max(self._blind_until_ns, look.monotonic_ns + blind_us * 1000)
            return self._gap(look, offset_us, f"the clock was set by {step_us / 1e6:+.1f} s")
        if look.monotonic_ns < self._blind_until_ns:
            return self._gap(look, offset_us, "the clock was set back")
        self._offset_us = offset_us
        windows: list[Window] = []
        if self._skipped_to_ns is not None:
            windows.append(Window(self._boundary_ns, self._skipped_to_ns, None, "the driver was not asked in time"))
            self._boundary_ns, self._skipped_to_ns = self._skipped_to_ns, None
        if look.continuous:
            return windows + self._continuous(look)
        samples = [sample for sample in look.samples if self._sound(sample, look)]
        # A tick after *look* is in the device's samples and in no process's.
        ticks = [] if whole is None else [s for s in whole.samples if self._sound(s, look) and s.at_us <= look.wall_us]
        if not samples and not ticks:
            return windows + self._silence(look)
        newest_us = max(sample.at_us for sample in (*samples, *ticks))
        if newest_us - self._cursor_us > HORIZON_US + HORIZON_US // 4:
            return windows + self._gap(look, offset_us, "the driver took too long to answer")
        busy = self._merged(samples, newest_us)
        ended_ns = 0
        if ticks:
            total_ns = sum(self._merged(ticks, newest_us).values())
            busy = _at_most(total_ns, busy)
            ended_ns = total_ns - sum(busy.values())
        to_ns = max(self._boundary_ns, (newest_us - offset_us) * 1000)
        windows.append(Window(self._boundary_ns, to_ns, busy, ended_ns=ended_ns))
        self._cursor_us, self._boundary_ns, self._on_tick = newest_us, to_ns, True
        return windows

    def _sound(self, sample: Sample, look: Look) -> bool:
        # Drivers were seen to fill in rubbish for processes that were ending: 4 billion percent, year 1970.
        new = self._cursor_us < sample.at_us <= look.wall_us + STEP_US
        return new and 0 <= sample.percent <= 100

    def _gap(self, look: Look, offset_us: int, why: str) -> list[Window]:
        gap = Window(self._boundary_ns, look.monotonic_ns, None, why)
        self._offset_us, self._skipped_to_ns = offset_us, None
        self._cursor_us, self._boundary_ns, self._on_tick = look.wall_us, look.monotonic_ns, False
        return [gap]

    def _silence(self, look: Look) -> list[Window]:
        """Return a window without work, once it is sure that ticks have passed in which no process had any."""
        periods = (look.wall_us - SETTLE_US - self._cursor_us) // self.period_us
        if periods < 2:
            return []
        from_ns = self._boundary_ns
        self._cursor_us += periods * self.period_us
        self._boundary_ns = max(from_ns, (self._cursor_us - self._offset_us) * 1000)
        self._on_tick = False
        return [Window(from_ns, self._boundary_ns, {})]

    def _continuous(self, look: Look) -> list[Window]:
        from_ns = self._boundary_ns
        self._cursor_us, self._boundary_ns = look.wall_us, look.monotonic_ns
        if not look.samples:  # the first: there is nothing to compare the counters with
            return [Window(from_ns, look.monotonic_ns, None, "counters were not read before")]
        percent = look.samples[-1].percent
        if not 0.0 <= percent <= 101.0:  # NaN is not either
            return [Window(from_ns, look.monotonic_ns, None, f"the counters make {percent:g} %: did they wrap?")]
        percent = min(100.0, percent)
        return [Window(from_ns, look.monotonic_ns, {None: int((look.monotonic_ns - from_ns) * percent / 100)})]

    def _merged(self, samples: Sequence[Sample], newest_us: int) -> dict[int | None, int]:
        elapsed_us = newest_us - self._cursor_us
        if self._on_tick:
            ticks = max(1, round(elapsed_us / self.period_us))
            covered_us = elapsed_us
        else:
            ticks = max(1, -(-elapsed_us // self.period_us))
            covered_us = ticks * self.period_us
        one_by_one = any(count > 1 for count in Counter(sample.pid for sample in samples).values())
        busy: dict[int | None, int] = {}
        for sample in samples:
            # One of several of a process stands for a single tick, a merged one for all of them.
            stands_us = covered_us / ticks if one_by_one or sample.pid is None else covered_us
            merged = 1 if one_by_one or sample.pid is None else ticks
            percent = _unrounded(sample.percent, merged)
            busy[sample.pid] = busy.get(sample.pid, 0) + int(stands_us * percent * 10)
        return _at_most(covered_us * 1000, busy)


def _unrounded(percent: float, ticks: int) -> float:
    """Return what *percent*, merged from so many ticks, stands for on the average.

    The driver rounds each tick down, half a percent short where anything was done in it, and the mean of n up again,
    (n - 1) / 2n too much. In how many it worked is not told: the fewest that can hold that much are counted, so that
    work spread thinly is called less rather than more.
    """
    if not 0 < percent < 100:
        return percent
    worked = math.ceil(percent * ticks / 100)
    return percent + (worked - ticks + 1) / (2 * ticks)


def _at_most(most_ns: int, busy: dict[int | None, int]) -> dict[int | None, int]:
    """Return *busy*, made smaller alike where it is more than *most_ns* together."""
    total_ns = sum(busy.values())
    return busy if total_ns <= most_ns else {pid: ns * most_ns // total_ns for pid, ns in busy.items()}
