"""The busy GPU time of tasks, for their receipts: what `execution.meter` asks, what `sampling` feeds.

Pure; the caller gives the times. Owns one `busy.BusyClock` for each device and workspace on it. A device is metered
while somebody says how (`method`); a task that held a device which was not, or of which too much was missed, is
reported as `Method.NONE`, with nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ngpu_node.gpus.busy import BusyClock, Mark, Share
from ngpu_node.gpus.samples import Window

_NS_PER_MS = 1_000_000
#: Shorter stretches without measurement than this are what any sampling has.
RESOLUTION_NS = 300 * _NS_PER_MS
#: Of a longer task this part may be missing; beyond it the figure would not be what a receipt promises.
MISSING_PART = 0.05
#: A clock that nobody fed for so long is told that this was a gap, so that it does not remember for ever.
FORGOTTEN_NS = 60_000 * _NS_PER_MS


class Method(StrEnum):
    """How busy time is found; the words of receipts (`ngpu_protocol.receipts.Meter`)."""

    PROCESS = "nvml-process"
    """By the samples of the workspace's own processes."""
    DEVICE = "nvml-device"
    """By the samples of the device, which the workspace has alone."""
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Busy:
    """What a task's receipt says: never more than the time it held its devices."""

    busy_ns: int
    method: Method


@dataclass(frozen=True, slots=True, eq=False)
class Metered:
    """A running task's places; made by `BusyMeter.start`, spent by `BusyMeter.stop`."""

    places: tuple[tuple[BusyClock, Mark, Method], ...]
    has_unmetered: bool


class BusyMeter:
    """The busy clocks of one node, by device and by the workspace that uses it (its *holder*)."""

    def __init__(self) -> None:
        self._methods: dict[Hashable, Method] = {}
        self._clocks: dict[Hashable, dict[Hashable, BusyClock]] = {}

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def start(self, devices: Sequence[Hashable], holder: Hashable, now_ns: int) -> Metered:
        """Begin a task of *holder* on *devices*."""
        places: list[tuple[BusyClock, Mark, Method]] = []
        for device in devices:
            method = self._methods.get(device, Method.NONE)
            if method is Method.NONE:
                continue
            holders = self._clocks.setdefault(device, {})
            clock = holders.get(holder)
            if clock is None:
                clock = holders[holder] = BusyClock.at(now_ns)
            _remember_less(clock, now_ns)
            places.append((clock, clock.start(now_ns), method))
        return Metered(tuple(places), has_unmetered=len(places) < len(devices) or not devices)

    def stop(self, metered: Metered, now_ns: int) -> Busy:
        """End a task and return what it had."""
        shares = [clock.stop(mark, now_ns) for clock, mark, _ in metered.places]
        methods = {method for _, _, method in metered.places}
        if metered.has_unmetered or not all(_is_known(share) for share in shares):
            return Busy(0, Method.NONE)
        method = Method.DEVICE if Method.DEVICE in methods else Method.PROCESS
        return Busy(sum(share.busy_ns for share in shares), method)

    # -- measurement ---------------------------------------------------------------------------------------------------

    def method(self, device: Hashable, method: Method) -> None:
        """Say how *device* is metered from now on; tasks that run on it keep the method they began with."""
        self._methods[device] = method

    def wanted(self) -> list[Hashable]:
        """Return the devices whose samples are of interest now."""
        return [
            device
            for device, holders in self._clocks.items()
            if any(not clock.is_settled for clock in holders.values())
        ]

    def since_ns(self, device: Hashable) -> int:
        """Return from when on something about *device* is unknown."""
        return min((clock.trace[0].at_ns for clock in self._open(device)), default=0)

    def holders(self, device: Hashable) -> list[Hashable]:
        """Return whose tasks are on *device*, or were a moment ago."""
        return [holder for holder, clock in self._clocks.get(device, {}).items() if not clock.is_settled]

    def measured(self, device: Hashable, window: Window, holders: Mapping[int | None, Hashable]) -> None:
        """Take in one window of *device*.

        Args:
            holders: whose each process of the window is; processes that are nobody's are left out. For a window of
                the device as a whole, whose None is.
        """
        for holder, clock in self._clocks.get(device, {}).items():
            if clock.is_settled:
                continue
            if window.busy_ns is None:
                clock.gap(window.to_ns)
                continue
            busy_ns = sum(ns for pid, ns in window.busy_ns.items() if holders.get(pid) == holder)
            clock.measured(window.from_ns, window.to_ns, busy_ns)

    def missed(self, device: Hashable, to_ns: int) -> None:
        """Take in that nothing is known about *device* up to *to_ns*."""
        for clock in self._open(device):
            clock.gap(to_ns)

    def forget(self, holder: Hashable) -> None:
        """Drop what is kept for *holder*, which is gone; its last tails stay unpaid."""
        for holders in self._clocks.values():
            if holder in holders and not holders[holder].running:
                del holders[holder]

    def _open(self, device: Hashable) -> Iterable[BusyClock]:
        return [clock for clock in self._clocks.get(device, {}).values() if not clock.is_settled]


def _is_known(share: Share) -> bool:
    """Tell whether enough of a task was measured for its figure to be one."""
    missing_ns = share.missed_ns + share.open_ns
    if share.held_ns and missing_ns >= share.held_ns:
        return False
    return share.missed_ns <= max(RESOLUTION_NS, int(share.held_ns * MISSING_PART))


def _remember_less(clock: BusyClock, now_ns: int) -> None:
    if now_ns - clock.trace[0].at_ns > FORGOTTEN_NS and not clock.is_settled:
        clock.gap(now_ns - FORGOTTEN_NS // 2)
