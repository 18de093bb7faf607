"""Room for calls of one kind: so many at once, so many waiting, the next refused.

Owns a declared route's `at_once`, `queue` and `queue_wait_s`. Who waited longest goes first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ngpu_bootstrap.errors import NotServed


class Places:
    """So many places, and a bounded queue for them."""

    def __init__(self, at_once: int, queue: int, wait_s: float) -> None:
        self._at_once = at_once
        self._queue = queue
        self._wait_s = wait_s
        self._waiting: OrderedDict[int, trio.Event] = OrderedDict()
        self._number = 0
        self.taken = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold a place for the block.

        Raises:
            NotServed: 429; the queue is full, or the wait was too long.
        """
        await self._take()
        try:
            yield
        finally:
            self._give_back()

    async def _take(self) -> None:
        if self.taken < self._at_once and not self._waiting:
            self.taken += 1
            return
        if len(self._waiting) >= self._queue:
            raise self._refusal(
                "queue_full", f"{self.taken} of these calls run and {len(self._waiting)} wait already; come again later"
            )
        self._number += 1
        number, turn = self._number, trio.Event()
        self._waiting[number] = turn
        try:
            with trio.move_on_after(self._wait_s):
                await turn.wait()
        except BaseException:
            if turn.is_set():
                self._give_back()
            raise
        finally:
            self._waiting.pop(number, None)
        if not turn.is_set():
            raise self._refusal("no_free_slot", f"no place for this call became free within {self._wait_s:g} s")

    def _give_back(self) -> None:
        self.taken -= 1
        while self._waiting and self.taken < self._at_once:
            _, turn = self._waiting.popitem(last=False)
            self.taken += 1
            turn.set()

    def _refusal(self, reason: str, words: str) -> NotServed:
        return NotServed(429, reason, words, retry_after_s=math.ceil(max(1.0, min(self._wait_s, 10.0))))
