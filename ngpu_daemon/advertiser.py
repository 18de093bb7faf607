"""Keeps a peer's record in the DHT true while it runs, and takes it back when it stops.

The record is put again at half its lifetime, and at once when what the peer can be found by changes (a workspace gets
ready, a GPU falls ill); in between, numbers that only drift, such as free slots, wait for the next. Every record has
a higher sequence than all before it, also of earlier runs: the last is kept in a file, and the clock is its lower
bound, so that a lost file does no harm. Capabilities are announced with the record when they are new, and all of them
every ten minutes, which also covers the next epoch before it begins.

What the record says is the daemon's: this asks *describe* for it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import structlog
import trio

from ngpu_protocol.capabilities import Capability, capabilities_of
from ngpu_protocol.identity import Account
from ngpu_protocol.node_records import (
    DEFAULT_LIFETIME_MS,
    MAX_RECORD_BYTES,
    NodeRecord,
    RecordRefused,
    SignedNodeRecord,
    sign_node_record,
)
from ngpu_protocol.p2p.dht import Dht, wall_ms
from ngpu_protocol.p2p.directory import Directory

__all__ = ["Advertiser", "SequenceFile", "fitted"]

log = structlog.get_logger(__name__)

ANNOUNCE_EVERY_MS = 10 * 60 * 1000
ENOUGH_COPIES = 2
AGAIN_S = 5.0
#: Changes that come together, as at a start, make one record.
SETTLE_S = 0.3
WITHDRAW_S = 3.0

_SIGNATURE_BYTES = 65


class SequenceFile:
    """The last sequence a peer used, in a file of its data directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def next(self, now_ms: int) -> int:
        """Return a sequence above every one before, and remember it.

        Raises:
            OSError: it cannot be written.
        """
        try:
            last = int(self._path.read_text())
        except (OSError, ValueError):
            last = 0
        sequence = max(last + 1, now_ms)
        beside = self._path.with_suffix(".new")
        beside.write_text(f"{sequence}\n")
        os.replace(beside, self._path)
        return sequence


def fitted(record: NodeRecord) -> NodeRecord:
    """Return *record* small enough to be signed: the ends of its longest lists dropped, models and workspaces first."""
    while len(record.encode()) + _SIGNATURE_BYTES > MAX_RECORD_BYTES:
        if record.models or record.workspaces:
            name = "models" if len(record.models) >= len(record.workspaces) else "workspaces"
        elif record.gpus:
            name = "gpus"
        else:
            raise ValueError("a record too large without any list")
        entries = getattr(record, name)
        record = record.model_copy(update={name: entries[: len(entries) * 3 // 4]})
    return record


class Advertiser:
    """Advertises one peer; `run` does it until cancelled, `withdraw` ends it."""

    def __init__(
        self,
        account: Account,
        dht: Dht,
        directory: Directory,
        sequences: SequenceFile,
        *,
        describe: Callable[[], NodeRecord],
        changed: Callable[[], Awaitable[object]] = trio.sleep_forever,
        lifetime_ms: int = DEFAULT_LIFETIME_MS,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        """Tie the parts together.

        Args:
            describe: returns what the peer offers now; node, network, sequence and times are filled in here.
            changed: returns when `describe` may have something else to say.
        """
        self._account = account
        self._dht = dht
        self._directory = directory
        self._sequences = sequences
        self._describe = describe
        self._changed = changed
        self._lifetime_ms = lifetime_ms
        self._now_ms = now_ms
        self._announced: frozenset[Capability] = frozenset()
        self._announced_ms = 0
        self.latest: SignedNodeRecord | None = None
        self.copies = 0

    async def run(self) -> NoReturn:
        """Keep the record and the announcements in the DHT."""
        await self._dht.wait_seeded()
        while True:
            capabilities = await self._advertise()
            half_s = self._lifetime_ms / 2000 * random.uniform(0.8, 1.0)
            with trio.move_on_after(half_s if self.copies >= ENOUGH_COPIES else AGAIN_S):
                while capabilities_of(self._describe()) == capabilities:
                    await self._changed()
                    await trio.sleep(SETTLE_S)

    async def _advertise(self) -> frozenset[Capability]:
        now_ms = self._now_ms()
        signed = self._sign(self._describe(), now_ms)
        capabilities = capabilities_of(signed.record)
        self.latest = signed
        try:
            self.copies = await self._dht.put(signed)
        except RecordRefused as error:
            self.copies = 0
            log.warning("record_refused", rule=error.rule, reason=str(error))
        due = now_ms - self._announced_ms >= ANNOUNCE_EVERY_MS - self._lifetime_ms // 4
        fresh = capabilities if due else capabilities - self._announced
        if fresh:
            kept = await self._directory.announce(fresh)
            failed = frozenset(capability for capability, count in kept.items() if not count)
            self._announced = capabilities - failed
            self._announced_ms = now_ms if due else self._announced_ms
        log.debug("advertised", sequence=signed.record.sequence, copies=self.copies, announced=len(fresh))
        return capabilities

    async def withdraw(self) -> None:
        """Tell the DHT that this peer has stopped, for at most 3 s. Nothing if it never advertised."""
        if self.latest is None:
            return
        mine = self.latest.record
        gone = NodeRecord(
            network=mine.network, node=mine.node, peer_id=mine.peer_id, sequence=0, issued_at_ms=0, expires_at_ms=0
        )
        signed = self._sign(gone.model_copy(update={"withdrawn": True}), self._now_ms())
        with trio.move_on_after(WITHDRAW_S, shield=True):
            await self._dht.put(signed, timeout_s=WITHDRAW_S)
        self.latest = None

    def _sign(self, record: NodeRecord, now_ms: int) -> SignedNodeRecord:
        record = record.model_copy(
            update={
                "network": self._dht.network.name,
                "node": self._account.address,
                "peer_id": self._account.peer_id,
                "sequence": self._sequences.next(now_ms),
                "issued_at_ms": now_ms,
                "expires_at_ms": now_ms + self._lifetime_ms,
            }
        )
        return sign_node_record(fitted(record), self._account, self._dht.network)
