"""How one device is sampled: what to ask the driver next, and what its answer means for the workspaces on it.

Pure: `watch` asks and brings the answers, tests bring synthetic ones. Looks follow the driver's ticks while tasks run
on the device, one each or, where a look is dear, one every few; they cease once everything about ended tasks is known.
A device without tasks costs nothing.

Whose a sample is, is decided here. A process belongs to the workspace in whose container it runs; one that runs in
none is the owner's, and nobody's bill. A process that cannot be found at all (this daemon lives in a PID namespace of
its own, say) makes the window a gap, since its work may be a workspace's. Where the driver has no samples by process,
the device's own are taken for the workspace that has it alone, as far as the list of processes proves that.

What a process did that ended meanwhile is found as `presence` says, by a second call of the driver (`looks`). Where it
is not to be known whose it was, or the call cannot be afforded, it is nobody's: the receipt says less, never more.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace

from ngpu_node.gpus.driver import DriverFault, FaultKind, Look
from ngpu_node.gpus.looks import Ask
from ngpu_node.gpus.metering import BusyMeter, Method
from ngpu_node.gpus.presence import Owners, Presence
from ngpu_node.gpus.samples import SampleReader, Window

#: A part of a core that looking at one device may take; beyond it, looks become rarer than ticks.
COST_PART = 0.0043
#: The same with looks at the end of tasks and of processes, which are made as far as this goes.
MOST_COST_PART = 0.0046
#: For how many such looks at once may be saved up.
SAVED_LOOKS = 3
_SLOWEST_US = 5_000_000


class DeviceSampling:
    """The sampling of one device.

    Attributes:
        method: how it is metered.
        looks, gaps: how often it was looked at, and how often for nothing.
        last_gap: why the last gap was one.
    """

    def __init__(self, uuid: str, meter: BusyMeter, method: Method, *, continuous: bool = False) -> None:
        """Begin at rest.

        Args:
            continuous: the device has counters instead of ticks (`driver.Look`).
        """
        self.uuid = uuid
        self.method = method
        self.looks = 0
        self.gaps = 0
        self.last_gap = ""
        self._meter = meter
        self._reader: SampleReader | None = None
        self._awake = False
        self._due_us = 0
        self._cost_us = 0.0
        self._spare_us = 0.0
        self._looked_us = 0
        self._empty = 0
        self._continuous = continuous
        self._presence = Presence()
        meter.method(uuid, method)

    @property
    def is_resting(self) -> bool:
        return not self._awake

    @property
    def period_us(self) -> int | None:
        """How far apart the driver's ticks are; None before the first look."""
        return self._reader.period_us if self._reader is not None else None

    def learn(self, look: Look) -> None:
        """Learn from the device's own samples of any age how far apart ticks are."""
        self._reader = self._reader or SampleReader(look.wall_us, look.monotonic_ns)
        self._reader.learn(look.samples)

    def wake(self, wall_us: int, monotonic_ns: int) -> None:
        """Begin to look, unless that was begun: tasks run on the device."""
        if self._awake:
            return
        since_ns = self._meter.since_ns(self.uuid) or monotonic_ns
        since_us = wall_us - (monotonic_ns - since_ns) // 1000
        if self._reader is None:
            self._reader = SampleReader(since_us, since_ns)
        else:
            self._reader.begin(since_us, since_ns)
        self._presence.forget()
        # Counters are to be read at the beginning; a tick says itself what was since the last.
        self._awake, self._due_us = True, wall_us if self._continuous else self._reader.tick_seen_us(1)

    def rest(self) -> None:
        """Look no more until woken."""
        self._awake = False

    def delay_s(self, wall_us: int) -> float | None:
        """Return for how long the next look may wait; None while resting."""
        if not self._awake or self._reader is None or self.method is Method.NONE:
            return None
        # Bounded, because the wall clock may have been set back since.
        return min(max(0, self._due_us - wall_us), (1 + self.ticks_a_look) * self._reader.period_us) / 1e6

    @property
    def ticks_a_look(self) -> int:
        """How many of the driver's ticks pass from look to look: one, or as many as keep the cost within bounds."""
        if self._reader is None:
            return 1
        pace_us = min(_SLOWEST_US, self._cost_us / COST_PART)
        return max(1, math.ceil(pace_us / self._reader.period_us))

    @property
    def interval_us(self) -> int | None:
        """How far apart looks are, which is how long the end of a task may go unseen; None before the first look."""
        return None if self._reader is None else self.ticks_a_look * self._reader.period_us

    def ask(self, wall_us: int) -> Ask | None:
        """Return the look to be had now, or None where there is none to be had."""
        if not self._awake or self._reader is None or self.method is Method.NONE:
            return None
        return Ask(
            self.uuid,
            self.method,
            self._reader.since_us(wall_us),
            known=self._presence.known,
            held=self._presence.held,
            may_look_twice=self._spare(wall_us) >= 2 * self._cost_us,
            wants_list=self._presence.wants_list(wall_us),
            alone=self._presence.alone(wall_us),
        )

    def took(
        self, look: Look, owners: Owners, *, whole: Look | None = None, calls: int = 1, cost_us: float = 0.0
    ) -> None:
        """Take in the answer to `ask` (`looks.Looked` says what each is)."""
        if self._reader is None:
            return
        self.looks += 1
        self._spend(look.wall_us, cost_us, calls)
        owners = self._presence.saw(look, owners)
        heir = None
        if whole is not None and look.pids is not None:
            heir = self._presence.heir(owners, of_all=calls == 1)
        for window in self._reader.read(look, whole):
            self._apply(self._judged(window, look, owners), owners, heir)
        self._presence.settle(self._reader.known_to_us, owners, self._meter.holders(self.uuid))
        # No samples: a little early for the tick, which is soon there, or nothing runs, which may stay so.
        self._empty = 0 if look.samples or (whole and whole.samples) else self._empty + 1
        again = (0.25, 0.5)[self._empty] if self._empty < 2 else self.ticks_a_look
        again_us = round(again * self._reader.period_us)
        self._due_us = max(self._reader.tick_seen_us(self.ticks_a_look), look.wall_us + again_us)

    def _spend(self, wall_us: int, cost_us: float, calls: int) -> None:
        each_us = cost_us / calls
        self._cost_us = each_us if not self._cost_us else 0.9 * self._cost_us + 0.1 * each_us
        self._spare_us = min(SAVED_LOOKS * self._cost_us, self._spare(wall_us)) - cost_us
        self._looked_us = wall_us

    def _spare(self, wall_us: int) -> float:
        return self._spare_us + max(0, wall_us - self._looked_us) * MOST_COST_PART

    def is_worth_a_look(self, wall_us: int) -> bool:
        """Tell whether a look right now would show a tick that the last one did not, and may be afforded.

        At the end of a task it shortens what is unknown of it from a look's interval to a tick's.
        """
        if self._reader is None or self.ask(wall_us) is None:
            return False
        return wall_us >= self._reader.tick_seen_us(1) and self._spare(wall_us) >= self._cost_us

    def failed(self, fault: DriverFault, wall_us: int, monotonic_ns: int) -> None:
        """Take in that the driver did not answer: nothing is known up to now, and another look is due soon."""
        self.looks += 1
        self._note_gap(fault.text)
        self._meter.missed(self.uuid, monotonic_ns)
        self._presence.forget()
        if self._reader is not None:
            self._reader.begin(wall_us, monotonic_ns)
            self._due_us = wall_us + self._reader.period_us
        if fault.kind is FaultKind.UNSUPPORTED:
            self.use(Method.NONE)

    def use(self, method: Method) -> None:
        """Meter by *method* from now on."""
        self.method = method
        self._meter.method(self.uuid, method)

    # -- whose it is ---------------------------------------------------------------------------------------------------

    def _judged(self, window: Window, look: Look, owners: Owners) -> Window:
        """Return *window*, or a gap where it cannot be told whose its work is."""
        if window.busy_ns is None:
            return window
        if self.method is Method.DEVICE:
            why = self._not_alone(look, owners)
        else:
            busy = [pid for pid, ns in window.busy_ns.items() if ns and pid is not None]
            lost = owners.unknown(busy)
            why = f"process {lost[0]} cannot be found: does this daemon see all processes?" if lost else ""
        return Window(window.from_ns, window.to_ns, None, why) if why else window

    def _not_alone(self, look: Look, owners: Owners) -> str:
        """Return why the device's work cannot be one workspace's, empty where it can."""
        holders = self._meter.holders(self.uuid)
        if len(holders) != 1:
            return "several workspaces are on the device"
        if look.pids is None:
            return "the driver does not list the processes on the device"
        if owners.unknown(look.pids):
            return "a process on the device cannot be found"
        if any(owners.holder(pid) != holders[0] for pid in look.pids):
            return "other processes are on the device"
        return ""

    def _apply(self, window: Window, owners: Owners, heir: Hashable | None) -> None:
        if window.busy_ns is None:
            self._note_gap(window.why)
            self._meter.measured(self.uuid, window, {})
            return
        if self.method is Method.DEVICE:
            holders: dict[int | None, Hashable] = {None: self._meter.holders(self.uuid)[0]}
        else:
            found = {pid: owners.holder(pid) for pid in window.busy_ns if pid is not None}
            holders = {pid: holder for pid, holder in found.items() if holder is not None}
            if window.ended_ns and heir is not None:
                window = replace(window, busy_ns={**window.busy_ns, None: window.ended_ns})
                holders[None] = heir
        self._meter.measured(self.uuid, window, holders)

    def _note_gap(self, why: str) -> None:
        self.gaps += 1
        self.last_gap = why
