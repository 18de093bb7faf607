"""Which connection a request gets: bounded, last used first, waiters in order.

The pool knows nothing of HTTP or streams. `acquire` yields a kept connection or leave to open one; whoever got either
gives it back exactly once, by `release` (usable again) or `forget` (closed). A waiter that is cancelled between being
served and noticing passes on what it was given.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from ngpu_protocol.http1.errors import PoolTimeoutError

T = TypeVar("T")


class _Waiter(Generic[T]):
    __slots__ = ("connection", "event", "served")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.served = False
        self.connection: T | None = None


class Pool(Generic[T]):
    """At most *max_connections* at once, kept no longer than *max_idle_s* without use.

    Args:
        max_connections: Bound of open connections, those in use included.
        max_idle_s: A connection idle for longer is not used again.
        is_usable: Asked once more just before a kept connection is used.
        now: The clock of idle times, in seconds.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        max_idle_s: float,
        is_usable: Callable[[T], bool],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self.max_connections = max_connections
        self.max_idle_s = max_idle_s
        self._is_usable = is_usable
        self._now = now
        self._idle: deque[tuple[T, float]] = deque()
        self._dropped: list[T] = []
        self._waiters: deque[_Waiter[T]] = deque()
        self.open = 0

    @property
    def idle(self) -> int:
        """How many connections wait for use."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        return len(self._waiters)

    def take(self) -> tuple[T | None, bool]:
        """Return a kept connection, (None, True) for leave to open one, or (None, False) to make the caller wait."""
        if not self._waiters:
            while self._idle:
                connection, since_s = self._idle.pop()
                if self._now() - since_s <= self.max_idle_s and self._is_usable(connection):
                    return connection, True
                self._dropped.append(connection)
                self.open -= 1
            if self.open < self.max_connections:
                self.open += 1
                return None, True
        return None, False

    async def wait(self, timeout_s: float) -> T | None:
        """Wait in line for a connection; None is leave to open one.

        Raises:
            PoolTimeoutError: Nothing became free in *timeout_s*.
        """
        waiter: _Waiter[T] = _Waiter()
        self._waiters.append(waiter)
        try:
            with trio.move_on_after(timeout_s):
                await waiter.event.wait()
        except BaseException:
            self._leave(waiter)
            if waiter.served:
                self._pass_on(waiter.connection)
            raise
        if not waiter.served:
            self._leave(waiter)
            raise PoolTimeoutError(
                f"all {self.max_connections} connections stayed busy for {timeout_s:g} s; "
                "raise the pool's size or send fewer requests at once"
            )
        return waiter.connection

    def release(self, connection: T) -> None:
        """Give back a connection that can carry another request."""
        if self._waiters:
            self._serve(connection)
        else:
            self._idle.append((connection, self._now()))

    def forget(self) -> None:
        """Give back the place of a connection that was closed, or was not opened after all."""
        if self._waiters:
            self._serve(None)
        else:
            self.open -= 1

    def dropped(self) -> list[T]:
        """Return, once, the connections that left the pool; the caller closes them. Expires idle ones first."""
        while self._idle and self._now() - self._idle[0][1] > self.max_idle_s:
            self._dropped.append(self._idle.popleft()[0])
            self.open -= 1
        if not self._dropped:
            return []
        dropped, self._dropped = self._dropped, []
        return dropped

    def clear(self) -> list[T]:
        """Take out and return all idle connections, to be closed by the caller."""
        connections = [connection for connection, _ in self._idle]
        self._idle.clear()
        self.open -= len(connections)
        return connections + self.dropped()

    def _serve(self, connection: T | None) -> None:
        waiter = self._waiters.popleft()
        waiter.served = True
        waiter.connection = connection
        waiter.event.set()

    def _pass_on(self, connection: T | None) -> None:
        if connection is None:
            self.forget()
        else:
            self.release(connection)

    def _leave(self, waiter: _Waiter[T]) -> None:
        if not waiter.served:
            self._waiters.remove(waiter)
