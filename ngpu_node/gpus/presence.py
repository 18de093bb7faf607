"""Who is on a device, from look to look, and whose the work is that no living process did.

Pure; one `Presence` a device. A process belongs to the workspace in whose container it runs; one that runs in none is
the owner's, and nobody's bill.

A process that ends takes its samples with it. Who was on the device at the last look is known, so that one is missed:
what the device did and no living process (the remainder) goes to those that ended, if all of them are one workspace's.
Who is on the device is listed every 2 s, and at each look while processes end. A process that came since the last list,
was idle and ends in the same look as a workspace's is in the remainder too, with what it did in that look's fraction of
a second.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ngpu_node.gpus.driver import Look

#: For so long after a process of a workspace ended, others are expected to.
RESTLESS_US = 10_000_000
#: How old a list of who is there may become.
LIST_EVERY_US = 2_000_000


@dataclass(frozen=True, slots=True)
class Owners:
    """What is known of processes.

    Attributes:
        containers: the containers each process is in, outermost first, none for the owner's own; None for a process
            that cannot be found.
        holders: whose a container is.
    """

    containers: Mapping[int, Sequence[str] | None]
    holders: Mapping[str, Hashable]

    def holder(self, pid: int) -> Hashable | None:
        """Return whose *pid* is; None for nobody's or unknown."""
        for container in self.containers.get(pid) or ():
            if container in self.holders:
                return self.holders[container]
        return None

    def unknown(self, pids: Iterable[int]) -> list[int]:
        """Return those of *pids* that cannot be found."""
        return [pid for pid in pids if self.containers.get(pid) is None]

    def only_holder(self, pids: Iterable[int]) -> Hashable | None:
        """Return whose all of *pids* are; None where there are none, or not all are known to be one workspace's."""
        holders = {self.holder(pid) for pid in pids}
        return holders.pop() if len(holders) == 1 else None


class Presence:
    """The processes of one device."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: who was there is not known any more."""
        self._held: frozenset[int] = frozenset()
        self._containers: dict[int, Sequence[str] | None] = {}
        # Of those that are missed: the first look that missed them, by the wall clock. Their last tick may be to come.
        self._missed_us: dict[int, int] = {}
        self._alone: frozenset[str] = frozenset()
        self._restless_to_us = 0
        self._tried_us: int | None = None
        self._is_listed = False

    @property
    def known(self) -> frozenset[int]:
        """The processes that were there at the last look, or are missed since."""
        return frozenset(self._containers)

    @property
    def held(self) -> frozenset[int]:
        """Those known that are a workspace's; none while it is not known who else is there."""
        return self._held if self._is_listed else frozenset()

    def wants_list(self, wall_us: int) -> bool:
        """Return whether it is time to list who is there."""
        return self._tried_us is None or not 0 <= wall_us - self._tried_us < LIST_EVERY_US

    def alone(self, wall_us: int) -> frozenset[str]:
        """Return the containers of the one workspace on the device while its processes come and go; else nothing."""
        return self._alone if self._is_listed and wall_us < self._restless_to_us else frozenset()

    def saw(self, look: Look, owners: Owners) -> Owners:
        """Take in who is there now; return *owners* of everybody known.

        Args:
            owners: of the processes that are new, at the least.
        """
        everybody = Owners({**self._containers, **owners.containers}, owners.holders)
        if look.pids is not None or self.wants_list(look.wall_us):
            self._tried_us, self._is_listed = look.wall_us, look.pids is not None
        present = {*(look.pids or ()), *(sample.pid for sample in look.samples if sample.pid is not None)}
        for pid in present:
            self._containers[pid] = everybody.containers.get(pid)
            self._missed_us.pop(pid, None)
        if look.pids is not None:
            for pid in self._containers.keys() - present:
                self._missed_us.setdefault(pid, look.wall_us)
                if everybody.holder(pid) is not None:
                    self._restless_to_us = look.wall_us + RESTLESS_US
        return everybody

    def heir(self, owners: Owners, *, of_all: bool) -> Hashable | None:
        """Return whose the remainder of a look with a list is; None for nobody's.

        Args:
            of_all: the remainder is all the device did, not only what no living process did.
        """
        return owners.only_holder(self._containers if of_all else self._missed_us)

    def settle(self, known_to_us: int, owners: Owners, tenants: Sequence[Hashable]) -> None:
        """Drop those whose last tick was read.

        Args:
            known_to_us: up to when ticks were read.
            tenants: who has tasks on the device.
        """
        for pid in [pid for pid, at_us in self._missed_us.items() if at_us <= known_to_us]:
            del self._missed_us[pid], self._containers[pid]
        self._held = frozenset(pid for pid in self._containers if owners.holder(pid) is not None)
        holder = owners.only_holder(self._containers)
        if not self._containers and len(tenants) == 1:
            holder = tenants[0]
        theirs = frozenset(container for container, each in owners.holders.items() if each == holder)
        self._alone = theirs if holder is not None else frozenset()
