"""Receipts that are missing from a node's chain: asked for, and disputed when they do not come.

Receipts overtake each other by milliseconds, so what is missing at two looks in a row, `GAP_CHECK_S` apart, is asked
for, at every look from then on. When that has gone on for `GAP_DISPUTED_S` it is a dispute: a signed claim
(`ngpu_protocol.gap_claims`), which the node is told with the next question, and the chain goes on beyond the gap. The
receipts are taken all the same when they come later.

Since when a gap is asked for is in the store: neither the end of a connection nor a restart of either side begins the
hour anew, and what is left of a gap that was filled in part is as old as the whole. A node that was away is not
disputed before it had `ANSWER_S` to answer on this connection. One that withholds a receipt and sends a great many
after it (`HELD_UP`) has that time and no more, since this bootstrap has to remember them all.

Pure but for `GapWatch`, which is the rhythm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import structlog
import trio

from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.records import AskedGap, Gap, Missing
from ngpu_bootstrap.store.store import Store
from ngpu_protocol import control
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.gap_claims import ClaimedGap, sign_gap_claim
from ngpu_protocol.identity import Account, Address

log = structlog.get_logger(__name__)

GAP_CHECK_S = 15.0
GAP_DISPUTED_S = 3600.0
ANSWER_S = 60.0
GAPS_ASKED = 16
HELD_UP = 50_000

Say = Callable[[control.Gap], None]


def still_missing(missing: Iterable[Gap], before: Sequence[Gap], asked: Sequence[AskedGap]) -> list[Gap]:
    """Return what of *missing* was missing at the look *before* too, or is asked for already; lowest first."""
    known = [*before, *(one.gap for one in asked)]
    return [gap for gap in missing if any(gap.lies_in(one) for one in known)]


def asked_now(gaps: Sequence[Gap], asked: Sequence[AskedGap], now_ms: int) -> list[AskedGap]:
    """Return the gaps to ask for, lowest first, each as old as the one it was part of.

    Not disputed ones at most `GAPS_ASKED`: the lowest, since nothing is disputed before what is below it.
    """
    made = []
    for gap in gaps[:GAPS_ASKED]:
        part_of = next((one for one in asked if not one.claim and gap.lies_in(one.gap)), None)
        made.append(AskedGap(gap, now_ms if part_of is None else part_of.asked_at_ms))
    return made


def overdue(gap: AskedGap, *, now_ms: int, answerable_s: float, held_up: int) -> bool:
    """Return whether *gap* is to be disputed.

    Args:
        answerable_s: for how long the node could answer on this connection.
        held_up: receipts beyond the first gap.
    """
    if answerable_s < ANSWER_S:
        return False
    return now_ms - gap.asked_at_ms > GAP_DISPUTED_S * 1000 or held_up > HELD_UP


class GapWatch:
    """Looks after the gaps in the chains of this bootstrap's orders.

    Args:
        account: signs claims.
    """

    def __init__(
        self,
        *,
        account: Account,
        chain_id: int,
        standings: Standings,
        store: Store,
        metrics: Metrics,
        now_ms: Callable[[], int],
    ) -> None:
        self._account = account
        self._chain_id = chain_id
        self._standings = standings
        self._store = store
        self._metrics = metrics
        self._now_ms = now_ms

    async def run(self, node: Address, say: Say) -> None:
        """Ask *node* by *say* for what is missing, for ever."""
        before: list[Gap] = []
        asked: list[AskedGap] | None = None
        began_s = trio.current_time()
        while True:
            await trio.sleep(GAP_CHECK_S)
            with contextlib.suppress(StoreError):
                if asked is None:
                    asked = await self._store.asked_gaps(node)
                    for one in asked:
                        if one.claim:  # once on each connection: it may come after all, or is told what is claimed
                            say(control.Gap(one.gap.from_sequence, one.gap.to_sequence, one.claim))
                    asked = [one for one in asked if not one.claim]
                missing = await self._store.missing(node)
                wanted = still_missing(missing.gaps, before, asked)
                before = list(missing.gaps)
                now = asked_now(wanted, asked, self._now_ms())
                if now != asked:
                    await self._store.keep_asked_gaps(node, now)
                    asked = now
                answerable_s = trio.current_time() - began_s
                asked = await self._ask(node, asked, missing, answerable_s, say)

    async def _ask(
        self, node: Address, asked: list[AskedGap], missing: Missing, answerable_s: float, say: Say
    ) -> list[AskedGap]:
        """Ask for each gap, dispute those that are due, and return the others."""
        left: list[AskedGap] = []
        for one in asked:
            gap, claim = one.gap, b""
            late = not left and overdue(one, now_ms=self._now_ms(), answerable_s=answerable_s, held_up=missing.held_up)
            if late:
                claim = await self._dispute(node, one, missing.previous_of[gap.to_sequence + 1])
            else:
                left.append(one)
            (log.warning if late else log.info)(
                "receipts_missing", node=node, first=gap.from_sequence, last=gap.to_sequence, disputed=late
            )
            say(control.Gap(gap.from_sequence, gap.to_sequence, claim))
        return left

    async def _dispute(self, node: Address, one: AskedGap, missing_hash: bytes) -> bytes:
        now_ms = self._now_ms()
        claim = sign_gap_claim(
            ClaimedGap(one.gap.from_sequence, one.gap.to_sequence, one.asked_at_ms),
            missing_hash,
            node=node,
            account=self._account,
            chain_id=self._chain_id,
            now_ms=now_ms,
        ).wire
        await self._store.write_off(node, one, missing_hash, claim, now_ms)
        self._metrics.judged(VerdictKind.DISPUTED.value, "chain")
        self._standings.judged(node, VerdictKind.DISPUTED, rule="chain", task_id="")
        return claim
