"""Room on nodes: what this bootstrap runs there, which it knows, and what others do, which the node leaves over.

A heartbeat says how many slots are free, with the attempts of every bootstrap in it, ours included; it does not say
whose they are, and some of ours may have begun or ended while it was on its way. So what others run is taken to be what
is in use less the most of ours that ran at once in the interval before, and never less than nothing. The guess errs
towards free: a wrong one costs one refusal, which is retried elsewhere at once.
"""

from __future__ import annotations


class Room:
    """Slots of one thing: of a node over all workspaces, or of one workspace on it.

    Attributes:
        slots: in all.
        others: of those, believed to be in use by others.
        in_flight: our attempts there now.
    """

    __slots__ = ("_counted", "_free_said", "_peak", "in_flight", "others", "slots")

    def __init__(self, slots: int = 0) -> None:
        self.slots = slots
        self.others = 0
        self.in_flight = 0
        self._peak = 0
        self._counted = 0
        self._free_said = slots

    @property
    def free(self) -> int:
        """Slots believed free; below zero when more is in use than there should be."""
        return self.slots - self.others - self.in_flight

    def take(self) -> None:
        """Count an attempt of ours that begins."""
        self.in_flight += 1
        if self.in_flight > self._peak:
            self._peak = self.in_flight

    def give_back(self) -> None:
        """Count one that ended."""
        self.in_flight -= 1

    def hear(self, slots: int, free: int) -> None:
        """Take over what the node says is free now."""
        self.slots = slots
        self._free_said = free
        self._counted, self._peak = self._peak, self.in_flight
        others = slots - free - self._counted
        self.others = others if others > 0 else 0

    def resize(self, slots: int) -> None:
        """Take over another number of slots, on what the node said last."""
        self.slots = slots
        self.others = max(0, slots - self._free_said - self._counted)
