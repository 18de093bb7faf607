"""Room on nodes: what this bootstrap runs there, which it knows, and what others do, which the node leaves over.

A heartbeat says how many slots are free, with the attempts of every bootstrap in it, and how many of those are ours.
Some of ours may have begun or ended while it was on its way, which does not matter: what others run is what is in use
less ours, both as the node saw them. Of what it calls ours, no more counts than ran at once in the interval before:
the rest are attempts we no longer hold (lost detached ones, those of an earlier run), which take their slots all the
same. An older node does not say whose they are; then that most stands for ours, which errs towards free: a wrong guess
costs one refusal, which is retried elsewhere at once.
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

    def hear(self, slots: int, free: int, ours: int | None = None) -> None:
        """Take over what the node says is free now, and how many attempts of ours run there; None: it does not say."""
        self.slots = slots
        self._free_said = free
        peak, self._peak = self._peak, self.in_flight
        self._counted = peak if ours is None or ours > peak else ours
        others = slots - free - self._counted
        self.others = others if others > 0 else 0

    def resize(self, slots: int) -> None:
        """Take over another number of slots, on what the node said last."""
        self.slots = slots
        self.others = max(0, slots - self._free_said - self._counted)
