"""The line of calls that wait for a slot of one workspace: by priority, then first come, first served.

A priority is the client's own word among the tasks of its own workspace (0 to 9, higher first), so it can starve nobody
else's. Most calls have none, and nobody ever looks at everyone.

Three queues share one numbering. *Clients* wait on their connections, *promised* tasks wait in the store; a call of
either kind takes any slot, so only the heads of the two are ever looked at. *Picky* calls cannot take any slot, since
they tried some nodes already or stick to one; each is offered a slot before the heads that came later, so that it waits
no longer for being picky than its nodes make it wait. Joining and leaving cost the same however long the line is.
"Before" means a higher priority, or the same one and an earlier coming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

HostT = TypeVar("HostT")
SlotT = TypeVar("SlotT")

POSITIONS_FRESH_MS = 250
"""Positions are counted anew at most this often: asking for them costs a walk along the line."""


@dataclass(eq=False, slots=True)
class Waiter(Generic[HostT, SlotT]):
    """A call that waits.

    Attributes:
        key: under which its place is asked for: its task id.
        tried: hosts it does not go to.
        only: the host it sticks to; None for any.
        affinity: the key it says, empty for none: it follows the first of its key that gets a slot.
        promised: it is in the store.
        priority: higher goes first.
        granted: called with its slot when its turn came.
        number: its place in the order of coming.
    """

    key: str
    granted: Callable[[SlotT], None]
    tried: Collection[HostT] = ()
    only: HostT | None = None
    promised: bool = False
    priority: int = 0
    affinity: bytes = b""
    number: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """What the line is ordered by, lowest first."""
        return -self.priority, self.number

    @property
    def is_picky(self) -> bool:
        return bool(self.tried) or self.only is not None


class _Queue(Generic[HostT, SlotT]):
    """Waiters in order of place: a row in order of coming for each priority that waits, and mostly that is one."""

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: dict[int, OrderedDict[int, Waiter[HostT, SlotT]]] = {}

    def __iter__(self) -> Iterator[Waiter[HostT, SlotT]]:
        for priority in sorted(self._rows, reverse=True):
            yield from self._rows[priority].values()

    def first(self) -> Waiter[HostT, SlotT] | None:
        return next(iter(self._rows[max(self._rows)].values())) if self._rows else None

    def put(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Put in *waiter*, at its place even when it came earlier than some that are there."""
        row = self._rows.setdefault(waiter.priority, OrderedDict())
        row[waiter.number] = waiter
        later = list(_from_the_end(row, waiter.number))
        for other in reversed(later):
            row.move_to_end(other)

    def remove(self, waiter: Waiter[HostT, SlotT]) -> bool:
        """Take *waiter* out; return whether it was there."""
        row = self._rows.get(waiter.priority)
        if row is None or row.pop(waiter.number, None) is None:
            return False
        if not row:
            del self._rows[waiter.priority]
        return True


def _from_the_end(row: OrderedDict[int, Waiter[HostT, SlotT]], number: int) -> Iterator[int]:
    """Yield the numbers after *number* in *row*, whose last it is, the last first."""
    for other in reversed(row):
        if other < number:
            return
        if other > number:
            yield other


@dataclass(eq=False, slots=True)
class Line(Generic[HostT, SlotT]):
    """The calls that wait for one workspace.

    Attributes:
        clients_waiting: those of clients, picky ones included.
        turn: when this line last got a slot, counted over all lines: what is fair between workspaces goes by it.
    """

    clients_waiting: int = 0
    turn: int = 0
    _came: int = 0
    _waiting: int = 0
    _clients: _Queue[HostT, SlotT] = field(default_factory=_Queue)
    _promised: _Queue[HostT, SlotT] = field(default_factory=_Queue)
    _picky: _Queue[HostT, SlotT] = field(default_factory=_Queue)
    _keyed: dict[bytes, dict[int, Waiter[HostT, SlotT]]] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)
    _places_at_ms: int = -POSITIONS_FRESH_MS

    def __len__(self) -> int:
        return self._waiting

    def join(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Put *waiter* behind those that came before it with no lower priority."""
        self._came += 1
        waiter.number = self._came
        self._queue_of(waiter).put(waiter)
        self._waiting += 1
        if waiter.affinity:
            self._keyed.setdefault(waiter.affinity, {})[waiter.number] = waiter
        if not waiter.promised:
            self.clients_waiting += 1

    def leave(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Take *waiter* out, wherever it stands; nothing when it is not there."""
        if self._queue_of(waiter).remove(waiter):
            self._waiting -= 1
            if waiter.affinity:
                alike = self._keyed[waiter.affinity]
                del alike[waiter.number]
                if not alike:
                    del self._keyed[waiter.affinity]
            self.clients_waiting -= not waiter.promised

    def head(self, *, promised: bool) -> Waiter[HostT, SlotT] | None:
        """Return who is first of those that take any slot; *promised*: with the promised ones."""
        client = self._clients.first()
        task = self._promised.first() if promised else None
        if client is None or task is None:
            return client or task
        return client if client.place < task.place else task

    def picky_before(self, head: Waiter[HostT, SlotT] | None, *, promised: bool) -> Iterator[Waiter[HostT, SlotT]]:
        """Yield the picky ones that are before *head*, all of them for None, in their order."""
        for waiter in self._picky:
            if head is not None and waiter.place > head.place:
                return
            if promised or not waiter.promised:
                yield waiter

    def stick(self, key: bytes, host: HostT) -> None:
        """Have those that say *key* and do not stick anywhere yet wait for *host*, at their place."""
        for waiter in self._keyed.get(key, {}).values():
            if waiter.only is None and host not in waiter.tried:
                self._queue_of(waiter).remove(waiter)
                waiter.only = host
                self._picky.put(waiter)

    def unstick(self, host: HostT) -> None:
        """Let those that stick to *host* take any slot: it is gone. They keep their place."""
        freed = [waiter for waiter in self._picky if waiter.only is host]
        for waiter in freed:
            self._picky.remove(waiter)
            waiter.only = None
            self._queue_of(waiter).put(waiter)

    def place_of(self, key: str, now_ms: int) -> int | None:
        """Return how many wait before the call *key* does, as of a moment ago; None when it does not wait."""
        if now_ms - self._places_at_ms >= POSITIONS_FRESH_MS:
            self._places_at_ms = now_ms
            waiting = sorted([*self._clients, *self._promised, *self._picky], key=_place)
            self._places = {waiter.key: place for place, waiter in enumerate(waiting)}
        return self._places.get(key)

    def _queue_of(self, waiter: Waiter[HostT, SlotT]) -> _Queue[HostT, SlotT]:
        if waiter.is_picky:
            return self._picky
        return self._promised if waiter.promised else self._clients


def _place(waiter: Waiter[HostT, SlotT]) -> tuple[int, int]:
    return waiter.place
