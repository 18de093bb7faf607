"""Room for calls of one kind: so many at once, so many waiting, the next refused.

Owns a declared route's `at_once`, `queue` and `queue_wait_s`. Callers get places in turn (`scheduling.waiting`), and
none keeps others out of the queue: one that is alone may fill it, and once it is full, who has the most in it gives up
its newest for whoever has two fewer (longest queue drop; see Suter et al., *Buffer management schemes for supporting
TCP in gigabit routers with per-flow queueing*, 1999). So a queue is as long as its declaration says whoever comes, and
what each has in a full one comes to be the same.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.scheduling.waiting import Lines, Waiter


class Places:
    """So many places, and a bounded queue for them."""

    def __init__(self, at_once: int, queue: int, wait_s: float) -> None:
        self._at_once = at_once
        self._queue = queue
        self._wait_s = wait_s
        self._lines: Lines[None, bool] = Lines()
        self.taken = 0

    @property
    def waiting(self) -> int:
        return len(self._lines)

    @asynccontextmanager
    async def one(self, caller: str) -> AsyncIterator[None]:
        """Hold a place for the block.

        Args:
            caller: whose call it is.

        Raises:
            NotServed: 429; the queue is full, or the wait was too long.
        """
        await self._take(caller)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, caller: str) -> None:
        if self.taken < self._at_once and not len(self._lines):
            self.taken += 1
            return
        if len(self._lines) >= self._queue:
            waiter = self._lines.last_of_longest(caller)
            if waiter is None:
                raise self._full()
            self._lines.leave(waiter)
            waiter.granted(False)
        turn, given = trio.Event(), False

        def granted(place: bool) -> None:
            nonlocal given
            given = place
            turn.set()

        waiter = Waiter("", granted, caller=caller)
        self._lines.join(waiter)
        try:
            with trio.move_on_after(self._wait_s):
                await turn.wait()
        except BaseException:
            if given:
                self._give_back()
            raise
        finally:
            self._lines.leave(waiter)
        if not turn.is_set():
            raise self._refusal("no_free_slot", f"no place for this call became free within {self._wait_s:g} s")
        if not given:
            raise self._full()

    def _give_back(self) -> None:
        self.taken -= 1
        while self.taken < self._at_once and len(self._lines):
            waiter = next(self._lines.in_turn()).head(promised=False)
            assert waiter is not None
            self._lines.serve(waiter)
            self.taken += 1
            waiter.granted(True)

    def _full(self) -> NotServed:
        return self._refusal(
            "queue_full", f"{self.taken} of these calls run and {len(self._lines)} wait already; come again later"
        )

    def _refusal(self, reason: str, words: str) -> NotServed:
        return NotServed(429, reason, words, retry_after_s=math.ceil(max(1.0, min(self._wait_s, 10.0))))
