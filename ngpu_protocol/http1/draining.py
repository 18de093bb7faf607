"""The switch that ends a server in good order: running requests finish, idle connections close, nothing new starts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


class Draining:
    """One switch for any number of listeners and connections.

    Attributes:
        active: Whether the switch was thrown.
    """

    def __init__(self) -> None:
        self.active = False
        self._started = trio.Event()
        self._connections: dict[int, Callable[[], None]] = {}
        self._empty = trio.Event()
        self._next = 0

    def start(self) -> None:
        """Throw the switch; a second time changes nothing."""
        if self.active:
            return
        self.active = True
        self._started.set()
        if not self._connections:
            self._empty.set()
        for drain in list(self._connections.values()):
            drain()

    async def wait_started(self) -> None:
        """Wait until the switch is thrown."""
        await self._started.wait()

    async def wait_finished(self) -> None:
        """Wait until the switch is thrown and the last connection has ended. Time limits are the caller's."""
        await self._started.wait()
        await self._empty.wait()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @contextmanager
    def connection(self, drain: Callable[[], None]) -> Iterator[None]:
        """Count a connection for as long as the context lasts; *drain* is called when the switch is thrown."""
        number = self._next
        self._next += 1
        self._connections[number] = drain
        self._empty = trio.Event() if self._empty.is_set() else self._empty
        try:
            yield
        finally:
            del self._connections[number]
            if self.active and not self._connections:
                self._empty.set()
