"""From measured windows to the busy GPU time of each task (design: GPU time).

Pure and in whole numbers: monotonic nanoseconds in, nanoseconds out.

A device's samples say how busy it was with a workspace over a window of time, not with which of its tasks. While n
tasks of the workspace run, its work is theirs alike. So a `BusyClock` (one device, one workspace on it) keeps the
virtual time V of `execution.meter`, which advances by dt / n(t) while n(t) > 0, so that a task's share of any stretch
is V(end) - V(begin), and all shares together are the time A in which a task ran. A window in which the device was busy
for b with that workspace turns V into billed time at the rate

    r = min(1, b / A)

for every task alike. Hence, exactly: busy <= reserved for each task, and over all tasks the sum is at most b. Work
beyond A is the workspace's own, done while it had no task: nobody pays for it.

Samples come late, a receipt cannot wait for them. What a task ran after the last known window, its tail, is unknown
when it ends. Its rate is known a fraction of a second later, and then stands in an account: so much tail, of which so
much was busy. The next task to end exchanges its own tail for as much of that. So every measured nanosecond is billed
once, to tasks of the workspace that did it, and the sums above still hold; a single task may be short by its tail.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

#: V counts in this part of a nanosecond, so that n tasks' shares do not lose what n does not divide.
_SCALE = 1 << 20


@dataclass(slots=True, eq=False)
class Mark:
    """A running task's place on a clock; made by `start`, spent by `stop`.

    Attributes:
        v: V when it began.
        billed, missed: the clock's totals at *v*; unknown (None) until the window it began in is.
    """

    v: int
    billed: int | None = None
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one task had of a device, in nanoseconds.

    Attributes:
        held_ns: device time it held, divided among the workspace's tasks on it.
        busy_ns: of that, measured as busy.
        missed_ns: of that, within gaps of the measurement.
        open_ns: of that, its tail for which nothing could be exchanged.
    """

    held_ns: int
    busy_ns: int
    missed_ns: int
    open_ns: int


@dataclass(slots=True)
class _Event:
    """From *at_ns* on, where V was *v*, *tasks* ran."""

    at_ns: int
    v: int
    tasks: int


@dataclass(slots=True)
class _Account:
    """Tails whose rate became known after their tasks had ended: *share* of V, of which *busy* was busy."""

    share: int = 0
    busy: int = 0


@dataclass(slots=True)
class BusyClock:
    """One device, as one workspace uses it.

    Attributes:
        trace: what happened since the last known window's end, beginning with that end itself.
        billed, missed: V that was busy, and V in gaps, up to there.
        fresh: tasks that began since then.
        tails: stretches of V that ended tasks ran since then.
    """

    trace: list[_Event]
    billed: int = 0
    missed: int = 0
    fresh: set[Mark] = field(default_factory=set)
    tails: list[tuple[int, int]] = field(default_factory=list)
    account: _Account = field(default_factory=_Account)

    @classmethod
    def at(cls, now_ns: int) -> BusyClock:
        """Return a clock that begins now."""
        return cls([_Event(now_ns, 0, 0)])

    @property
    def running(self) -> int:
        return self.trace[-1].tasks

    @property
    def is_settled(self) -> bool:
        """Whether no window is of interest: no task runs, and nothing is unknown about those that did."""
        return not self.running and not self.tails

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def start(self, now_ns: int) -> Mark:
        """Begin a task."""
        if self.is_settled:
            # What the workspace did while it had no task is not to be spread over this one.
            self.trace = [_Event(max(now_ns, self.trace[-1].at_ns), self.trace[-1].v, 0)]
        mark = Mark(self._advance(now_ns, +1))
        self.fresh.add(mark)
        return mark

    def stop(self, mark: Mark, now_ns: int) -> Share:
        """End the task of *mark* and return what it had. A mark can be stopped once."""
        v = self._advance(now_ns, -1)
        known = self.trace[0].v
        if mark.billed is None:
            self.fresh.discard(mark)
            busy, missed, tail = 0, 0, (mark.v, v)
        else:
            busy, missed, tail = max(0, self.billed - mark.billed), self.missed - mark.missed, (known, v)
        length = tail[1] - tail[0]
        exchanged = min(length, self.account.share)
        if exchanged:
            paid = self.account.busy * exchanged // self.account.share
            self.account.share -= exchanged
            self.account.busy -= paid
            busy += paid
        if length:
            self.tails.append(tail)
        return Share(
            held_ns=(v - mark.v) // _SCALE,
            busy_ns=busy // _SCALE,
            missed_ns=missed // _SCALE,
            open_ns=(length - exchanged) // _SCALE,
        )

    def _advance(self, now_ns: int, change: int) -> int:
        last = self.trace[-1]
        at_ns = max(now_ns, last.at_ns)
        v = _v_at(last, at_ns)
        self.trace.append(_Event(at_ns, v, last.tasks + change))
        return v

    # -- windows -------------------------------------------------------------------------------------------------------

    def measured(self, from_ns: int, to_ns: int, busy_ns: int) -> None:
        """Take in that between the two times the device was busy for *busy_ns* with this workspace.

        Windows come in order. What lies between the end of the last and *from_ns* is a gap.
        """
        if from_ns > self.trace[0].at_ns:
            self._close(from_ns, None)
        self._close(to_ns, busy_ns)

    def gap(self, to_ns: int) -> None:
        """Take in that nothing is known from the end of the last window to *to_ns*."""
        self._close(to_ns, None)

    def _close(self, to_ns: int, busy_ns: int | None) -> None:
        begin = self.trace[0]
        if to_ns <= begin.at_ns:
            return
        active_ns, end, rest = _cut(self.trace, to_ns)
        length = end.v - begin.v

        # r as a fraction, at most 1
        over = max(1, active_ns)
        rate = 0 if busy_ns is None else min(max(0, busy_ns), active_ns)

        def rated(share: int) -> int:
            return share * rate // over

        for mark in [mark for mark in self.fresh if mark.v <= end.v]:
            # What was billed before a task began is rounded up, what it is billed is the difference: never too much.
            before = mark.v - begin.v
            mark.billed = self.billed - (-before * rate // over)
            mark.missed = self.missed + (mark.v - begin.v if busy_ns is None else 0)
            self.fresh.discard(mark)
        open_tails: list[tuple[int, int]] = []
        for first, last in self.tails:
            share = max(0, min(last, end.v) - first)
            if share and busy_ns is not None:
                self.account.share += share
                self.account.busy += rated(share)
            if last > end.v:
                open_tails.append((max(first, end.v), last))
        self.tails = open_tails
        self.billed += rated(length)
        self.missed += length if busy_ns is None else 0
        self.trace = [end, *rest]


def _v_at(event: _Event, at_ns: int) -> int:
    return event.v + ((at_ns - event.at_ns) * _SCALE // event.tasks if event.tasks else 0)


def _cut(trace: Iterable[_Event], at_ns: int) -> tuple[int, _Event, list[_Event]]:
    """Return the time in which tasks ran before *at_ns*, the state at *at_ns*, and the events after it."""
    events = list(trace)
    active_ns = 0
    for number, event in enumerate(events):
        following = events[number + 1] if number + 1 < len(events) else None
        if following is None or following.at_ns > at_ns:
            if event.tasks:
                active_ns += at_ns - event.at_ns
            return active_ns, _Event(at_ns, _v_at(event, at_ns), event.tasks), events[number + 1 :]
        if event.tasks:
            active_ns += following.at_ns - event.at_ns
    raise AssertionError("a trace always has its beginning")
