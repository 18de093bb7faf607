"""The line of calls that wait for a slot of one workspace: first come, first served, and nobody looks at everyone.

Three queues share one numbering. *Clients* wait on their connections, *promised* tasks wait in the store; a call of
either kind takes any slot, so only the heads of the two are ever looked at. *Picky* calls cannot take any slot, since
they tried some nodes already or stick to one; each is offered a slot before the heads that came later, so that it waits
no longer for being picky than its nodes make it wait. Joining and leaving cost the same however long the line is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
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
        promised: it is in the store.
        granted: called with its slot when its turn came.
        number: its place in the order of coming.
    """

    key: str
    granted: Callable[[SlotT], None]
    tried: Collection[HostT] = ()
    only: HostT | None = None
    promised: bool = False
    number: int = 0

    @property
    def is_picky(self) -> bool:
        return bool(self.tried) or self.only is not None


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
    _clients: OrderedDict[int, Waiter[HostT, SlotT]] = field(default_factory=OrderedDict)
    _promised: OrderedDict[int, Waiter[HostT, SlotT]] = field(default_factory=OrderedDict)
    _picky: OrderedDict[int, Waiter[HostT, SlotT]] = field(default_factory=OrderedDict)
    _places: dict[str, int] = field(default_factory=dict)
    _places_at_ms: int = -POSITIONS_FRESH_MS

    def __len__(self) -> int:
        return len(self._clients) + len(self._promised) + len(self._picky)

    def join(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Put *waiter* at the end."""
        self._came += 1
        waiter.number = self._came
        self._queue_of(waiter)[waiter.number] = waiter
        if not waiter.promised:
            self.clients_waiting += 1

    def leave(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Take *waiter* out, wherever it stands; nothing when it is not there."""
        if self._queue_of(waiter).pop(waiter.number, None) is not None and not waiter.promised:
            self.clients_waiting -= 1

    def head(self, *, promised: bool) -> Waiter[HostT, SlotT] | None:
        """Return who came first of those that take any slot; *promised*: with the promised ones."""
        client = next(iter(self._clients.values()), None)
        task = next(iter(self._promised.values()), None) if promised else None
        if client is None or task is None:
            return client or task
        return client if client.number < task.number else task

    def picky_before(self, head: Waiter[HostT, SlotT] | None, *, promised: bool) -> Iterator[Waiter[HostT, SlotT]]:
        """Yield the picky ones that came before *head*, all of them for None, first come first."""
        for number, waiter in self._picky.items():
            if head is not None and number > head.number:
                return
            if promised or not waiter.promised:
                yield waiter

    def unstick(self, host: HostT) -> None:
        """Let those that stick to *host* take any slot: it is gone. They keep their place."""
        freed = [waiter for waiter in self._picky.values() if waiter.only is host]
        for waiter in freed:
            del self._picky[waiter.number]
            waiter.only = None
            queue = self._queue_of(waiter)
            queue[waiter.number] = waiter
            _put_back_in_order(queue, waiter.number)

    def place_of(self, key: str, now_ms: int) -> int | None:
        """Return how many wait before the call *key* does, as of a moment ago; None when it does not wait."""
        if now_ms - self._places_at_ms >= POSITIONS_FRESH_MS:
            self._places_at_ms = now_ms
            waiting = sorted([*self._clients.values(), *self._promised.values(), *self._picky.values()], key=_number)
            self._places = {waiter.key: place for place, waiter in enumerate(waiting)}
        return self._places.get(key)

    def _queue_of(self, waiter: Waiter[HostT, SlotT]) -> OrderedDict[int, Waiter[HostT, SlotT]]:
        if waiter.is_picky:
            return self._picky
        return self._promised if waiter.promised else self._clients


def _put_back_in_order(queue: OrderedDict[int, Waiter[HostT, SlotT]], number: int) -> None:
    """Move the last of *queue*, which came earlier than some of it, to its place."""
    later: Sequence[int] = [other for other in queue if other > number]
    for other in later:
        queue.move_to_end(other)


def _number(waiter: Waiter[HostT, SlotT]) -> int:
    return waiter.number
