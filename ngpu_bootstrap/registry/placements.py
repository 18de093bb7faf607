"""Why attempts went where they did, beyond this run: written from memory to the store now and then, read from both.

Owns when and how much is written: every `WRITE_S`, in small transactions, so that no call waits for it. A crash costs
the last seconds' explanations and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import structlog
import trio

from ngpu_bootstrap.scheduling.placement import Placement, PlacementLog, pack, unpack
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store

log = structlog.get_logger(__name__)

WRITE_S = 1.0
SEEN_S = 1.5
"""How old a placement is when it is written: candidates that were not compared are photographed after the choice."""
TOGETHER = 16
"""Placements in one transaction."""
KEPT = 100_000
TRIM_S = 300.0


class Placements:
    """The placements of this run and earlier ones, of this bootstrap and its siblings on one database."""

    def __init__(self, *, recent: PlacementLog, store: Store, now_ms: Callable[[], int]) -> None:
        self._recent = recent
        self._store = store
        self._now_ms = now_ms

    async def of(self, task_id: str, attempts: int) -> list[Placement]:
        """Return what is known of a task that had so many *attempts*, first attempt first."""
        known = {one.attempt: one for one in self._recent.of(task_id)}
        if len(known) < attempts:
            for attempt, packed in await self._store.placements(task_id):
                if attempt not in known:
                    known[attempt] = unpack(attempt, packed)
        return [known[attempt] for attempt in sorted(known)]

    async def run(self) -> None:
        """Write what is due, and forget the oldest; for ever."""
        trim_at_s = trio.current_time()
        while True:
            await trio.sleep(WRITE_S)
            try:
                await self.flush(self._now_ms() - int(SEEN_S * 1000))
                if trio.current_time() >= trim_at_s:
                    trim_at_s = trio.current_time() + TRIM_S
                    await self._store.trim_placements(KEPT)
            except StoreError as error:
                log.error("placements_not_stored", reason=str(error))

    async def flush(self, before_ms: int) -> None:
        """Write what waits to be written of the time before *before_ms*."""
        due = self._recent.due(before_ms)
        while together := list(itertools.islice(due, TOGETHER)):
            await self._store.keep_placements(
                [(task_id, one.attempt, one.at_ms, pack(one)) for task_id, one in together]
            )
