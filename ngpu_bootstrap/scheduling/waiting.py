"""The calls that wait for a slot of one workspace: a line for each caller, and callers in turn.

Most workspaces have one caller, their own client. A model that any token may call has many, and none of them shall wait
for all that another asked: slots go round the callers that wait, one each, however many calls each has (round robin;
see Shreedhar and Varghese, *Efficient fair queuing using deficit round robin*, 1995). Who begins to wait stands at the
end of the round, so a caller of single calls gets a slot a round too. How many may wait at once: `Lines.has_room`.

Within a line it goes by priority, then first come, first served. A priority is the client's own word among its own
tasks (0 to 9, higher first), so it can starve nobody else's. Most calls have none, and nobody ever looks at everyone.

Three queues of a line share one numbering. *Clients* wait on their connections, *promised* tasks wait in the store; a
call of either kind takes any slot, so only the heads of the two are ever looked at. *Picky* calls cannot take any slot,
since they tried some nodes already or stick to one; each is offered a slot before the heads that came later, so that it
waits no longer for being picky than its nodes make it wait. Joining and leaving cost the same however long the line is.
"Before" means a higher priority, or the same one and an earlier coming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ngpu_bootstrap.fair_share import may_take

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
        caller: whose line it stands in; empty for the workspace's own.
    """

    key: str
    granted: Callable[[SlotT], None]
    tried: Collection[HostT] = ()
    only: HostT | None = None
    promised: bool = False
    priority: int = 0
    affinity: bytes = b""
    number: int = 0
    caller: str = ""

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

    def last(self) -> Waiter[HostT, SlotT] | None:
        return next(reversed(self._rows[min(self._rows)].values())) if self._rows else None

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
    """The calls of one caller that wait.

    Attributes:
        clients_waiting: those that wait on a connection, picky ones included.
    """

    clients_waiting: int = 0
    _waiting: int = 0
    _clients: _Queue[HostT, SlotT] = field(default_factory=_Queue)
    _promised: _Queue[HostT, SlotT] = field(default_factory=_Queue)
    _picky: _Queue[HostT, SlotT] = field(default_factory=_Queue)
    _keyed: dict[bytes, dict[int, Waiter[HostT, SlotT]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Waiter[HostT, SlotT]]:
        """Yield all of them in the order of their places."""
        return iter(sorted([*self._clients, *self._promised, *self._picky], key=_place))

    def last(self) -> Waiter[HostT, SlotT] | None:
        """Return who goes after all others of this line."""
        lasts = (queue.last() for queue in (self._clients, self._promised, self._picky))
        return max((one for one in lasts if one is not None), key=_place, default=None)

    def join(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Put *waiter*, which has its number, behind those that came before it with no lower priority."""
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

    def _queue_of(self, waiter: Waiter[HostT, SlotT]) -> _Queue[HostT, SlotT]:
        if waiter.is_picky:
            return self._picky
        return self._promised if waiter.promised else self._clients


def _place(waiter: Waiter[HostT, SlotT]) -> tuple[int, int]:
    return waiter.place


class Lines(Generic[HostT, SlotT]):
    """The calls that wait for one workspace.

    Attributes:
        clients_waiting: those that wait on a connection, of all callers.
        turn: when one of them last got a slot, counted over all workspaces: what is fair between those goes by it.
    """

    __slots__ = ("_came", "_lines", "_places", "_places_at_ms", "_waiting", "clients_waiting", "turn")

    def __init__(self) -> None:
        self.clients_waiting = 0
        self.turn = 0
        self._came = 0
        self._waiting = 0
        self._lines: OrderedDict[str, Line[HostT, SlotT]] = OrderedDict()  # whose turn it is stands first
        self._places: dict[str, int] = {}
        self._places_at_ms = -POSITIONS_FRESH_MS

    def __len__(self) -> int:
        return self._waiting

    def join(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Have *waiter* wait in the line of its caller."""
        # one numbering for all: who leaves late, when its line is another, must not take somebody else along
        self._came += 1
        waiter.number = self._came
        line = self._lines.get(waiter.caller)
        if line is None:
            line = self._lines[waiter.caller] = Line()
        line.join(waiter)
        self._waiting += 1
        self.clients_waiting += not waiter.promised

    def leave(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Take *waiter* out, wherever it stands; nothing when it is not there."""
        line = self._lines.get(waiter.caller)
        if line is None:
            return
        before = len(line)
        line.leave(waiter)
        if len(line) == before:
            return
        self._waiting -= 1
        self.clients_waiting -= not waiter.promised
        if not len(line):
            del self._lines[waiter.caller]

    def serve(self, waiter: Waiter[HostT, SlotT]) -> None:
        """Take *waiter* out because it gets a slot: its caller's next turn is after everybody else's."""
        self.leave(waiter)
        if waiter.caller in self._lines:
            self._lines.move_to_end(waiter.caller)

    def in_turn(self) -> Iterator[Line[HostT, SlotT]]:
        """Yield the line of each caller that waits, the one whose turn it is first; none may change meanwhile."""
        return iter(self._lines.values())

    def has_head(self, *, promised: bool) -> bool:
        """Return whether anybody waits for any slot; *promised*: promised ones count."""
        return any(line.head(promised=promised) is not None for line in self._lines.values())

    def has_room(self, caller: str, limit: int) -> bool:
        """Return whether one more client's call of *caller* may wait, of *limit* in all.

        A workspace's own client may take every place, others may not (`fair_share`).
        """
        if not caller:
            return self.clients_waiting < limit
        line = self._lines.get(caller)
        return may_take(limit, self.clients_waiting, 0 if line is None else line.clients_waiting)

    def last_of_longest(self, caller: str) -> Waiter[HostT, SlotT] | None:
        """Return who has to give up its place to one more call of *caller*, where the queue is full: the last of the
        longest line, if that has two more than *caller*'s; else None."""
        line = self._lines.get(caller)
        longest = max(self._lines.values(), key=len, default=None)
        if longest is None or len(longest) < (0 if line is None else len(line)) + 2:
            return None
        return longest.last()

    def ahead_of(self, caller: str) -> int:
        """Return how many calls go before one that *caller* would add: all of its own, and as many of each other."""
        line = self._lines.get(caller)
        own = 0 if line is None else len(line)
        return sum(min(len(other), own + 1) for other in self._lines.values() if other is not line) + own

    def stick(self, key: bytes, host: HostT) -> None:
        """Have those that say *key* and do not stick anywhere yet wait for *host*, at their place."""
        for line in self._lines.values():
            line.stick(key, host)

    def unstick(self, host: HostT) -> None:
        """Let those that stick to *host* take any slot: it is gone. They keep their place."""
        for line in self._lines.values():
            line.unstick(host)

    def place_of(self, key: str, now_ms: int) -> int | None:
        """Return how many wait before the call *key* does, as of a moment ago; None when it does not wait."""
        if now_ms - self._places_at_ms >= POSITIONS_FRESH_MS:
            self._places_at_ms = now_ms
            turns = [
                (round_, turn, waiter.key)
                for turn, line in enumerate(self._lines.values())
                for round_, waiter in enumerate(line)
            ]
            self._places = {key: place for place, (_, _, key) in enumerate(sorted(turns))}
        return self._places.get(key)
