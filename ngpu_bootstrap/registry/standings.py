"""Every node's standing: counted as receipts are judged, kept in the store, known at start.

Owns which standing counts (`scheduling.standing` says what one is) and when it is written. A verified one is counted
in memory and written with others every `FLUSH_S`; a dispute is written at once. So a crash costs a few seconds' good
words and never a bad one. Several bootstraps on one database each write their own row and read all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import structlog
import trio

from ngpu_bootstrap.scheduling.standing import (
    Standing,
    joined,
    with_dispute,
    with_good_word,
    with_skewed,
    with_verified,
)
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.identity import Address

log = structlog.get_logger(__name__)

FLUSH_S = 5.0
RELOAD_S = 60.0
NEW = Standing()


class Standings:
    """What is known of nodes by their receipts.

    Args:
        own: this bootstrap's address.
        changed: called when a dispute, or what others found, changed a node's standing.
    """

    def __init__(
        self, *, own: Address, store: Store, now_ms: Callable[[], int], changed: Callable[[Address], None]
    ) -> None:
        self._own = own
        self._store = store
        self._now_ms = now_ms
        self._changed = changed
        self._mine: dict[Address, Standing] = {}
        self._others: Mapping[Address, Standing] = {}
        self._verified: Counter[Address] = Counter()
        self._skewed: Counter[Address] = Counter()
        self._unwritten: set[Address] = set()
        self._disputed = trio.Event()

    async def load(self) -> None:
        """Read all standings from the store."""
        others: dict[Address, Standing] = {}
        for bootstrap, node, standing in await self._store.standings():
            if bootstrap != self._own:
                others[node] = joined(others[node], standing) if node in others else standing
            elif node not in self._mine:
                self._mine[node] = standing
        before, self._others = self._others, others
        for node in others:
            if others[node] != before.get(node):
                self._changed(node)

    def of(self, node: Address) -> Standing:
        """Return a node's standing; a new one for a node without receipts."""
        self._fold(node)
        mine, others = self._mine.get(node, NEW), self._others.get(node)
        return mine if others is None else joined(mine, others)

    def in_short(self, node: Address) -> tuple[float, bool]:
        """Return a node's score, and whether it is trusted."""
        mine, others = self._mine.get(node), self._others.get(node)
        if not (mine is not None and mine.bad) and not (others is not None and others.bad):
            return 1.0, True  # most nodes, at each of their heartbeats
        standing, now_ms = self.of(node), self._now_ms()
        return standing.score(now_ms), standing.is_trusted(now_ms)

    def judged(self, node: Address, verdict: VerdictKind, *, rule: str, task_id: str) -> None:
        """Count a receipt that was judged. A forged one says nothing about the node it names."""
        if verdict is VerdictKind.VERIFIED:
            self._verified[node] += 1
        elif verdict is VerdictKind.SKEW:
            self._skewed[node] += 1
        elif rule != "signer":
            self.disputed(node, rule=rule, task_id=task_id)

    def disputed(self, node: Address, *, rule: str, task_id: str, times: int = 1) -> None:
        """Count something that a node did wrong, as *times* disputed receipts; it is written at once."""
        self._fold(node)
        after = self._mine.get(node, NEW)
        for _ in range(times):
            after = with_dispute(after, rule=rule, task_id=task_id, now_ms=self._now_ms())
        self._mine[node] = after
        self._unwritten.add(node)
        self._disputed.set()
        log.warning(
            "standing_lowered",
            node=node,
            rule=rule,
            task_id=task_id,
            standing=round(after.score(self._now_ms()), 2),
            trusted=after.is_trusted(self._now_ms()),
        )
        self._changed(node)

    def spoken_for(self, node: Address, worth: int) -> None:
        """Count something that speaks for a node, as *worth* verified receipts."""
        self._fold(node)
        self._mine[node] = with_good_word(self._mine.get(node, NEW), worth, self._now_ms())
        self._unwritten.add(node)
        self._changed(node)

    async def run(self) -> None:
        """Write what changed, and read what others wrote; for ever."""
        reload_at_s = trio.current_time() + RELOAD_S
        while True:
            with trio.move_on_after(FLUSH_S):
                await self._disputed.wait()
            self._disputed = trio.Event()
            try:
                await self.flush()
                if trio.current_time() >= reload_at_s:
                    reload_at_s = trio.current_time() + RELOAD_S
                    await self.load()
            except StoreError as error:
                log.error("standings_not_stored", reason=str(error))
                await trio.sleep(1.0)

    async def flush(self) -> None:
        """Write every standing that changed."""
        for node in [*self._verified, *self._skewed]:
            self._fold(node)
        while self._unwritten:
            node = self._unwritten.pop()
            try:
                await self._store.keep_standing(node, self._mine[node])
            except BaseException:
                self._unwritten.add(node)
                raise

    def _fold(self, node: Address) -> None:
        """Take the receipts counted since into the standing."""
        verified, skewed = self._verified.pop(node, 0), self._skewed.pop(node, 0)
        if verified:
            self._mine[node] = with_verified(self._mine.get(node, NEW), verified, self._now_ms())
        if skewed:
            self._mine[node] = with_skewed(self._mine.get(node, NEW), skewed)
        if verified or skewed:
            self._unwritten.add(node)
