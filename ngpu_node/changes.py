"""A counter that tasks can wait on: how the parts of a node tell whoever reports them that there is news.

Nothing is queued: a reader that was busy sees one change where there were ten, and then looks at the parts themselves.
"""

from __future__ import annotations

import trio


class Changes:
    """Counts changes; every waiter is woken by each."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def announce(self) -> None:
        """Say that something changed."""
        self.count += 1
        self._waiting.unpark_all()

    async def beyond(self, count: int) -> int:
        """Wait until more than *count* changes were announced; return how many there are now."""
        while self.count <= count:
            await self._waiting.park()
        return self.count
