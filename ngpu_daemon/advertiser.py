"""Keeps a peer's record in the DHT true while it runs, and takes it back when it stops.

The record is put again at half its lifetime, and at once when what matters about the peer changes (a workspace gets
ready, a GPU falls ill, it is reached elsewhere); numbers that only drift, such as free slots, wait for the next.
Every record has a higher sequence than all before it, also of earlier runs: the last is kept in a file, and the clock
is its lower bound, so that a lost file does no harm. Capabilities are announced with the record when they are new, and
all of them every ten minutes, which also covers the next epoch before it begins.

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
from ngpu_protocol.p2p.dht import REPLICAS, Dht, wall_ms
from ngpu_protocol.p2p.directory import Directory

__all__ = ["Advertiser", "SequenceFile", "fitted", "gist"]

log = structlog.get_logger(__name__)

ANNOUNCE_EVERY_MS = 10 * 60 * 1000
ENOUGH_COPIES = 2
#: After a record that too few peers took; doubled each time.
AGAIN_S = 5.0
#: Changes that come together, as at a start, make one record.
SETTLE_S = 0.3
#: Peers that join together are told together.
JOINING_S = 4.0
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


def gist(record: NodeRecord) -> tuple[object, ...]:
    """Return what others must hear of at once when it changes; the rest waits for the next record."""
    return (
        capabilities_of(record),
        record.addresses,
        tuple((gpu.id, gpu.health) for gpu in record.gpus),
        record.slots,
        record.region,
    )


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
        self._withdrawn = False
        self._told_peers = 0
        self.latest: SignedNodeRecord | None = None
        self.copies = 0

    async def run(self) -> NoReturn:
        """Keep the record and the announcements in the DHT."""
        await self._dht.wait_seeded()
        again_s = AGAIN_S / 2
        while not self._withdrawn:
            told = gist(self._describe())
            try:
                await self._advertise()
            except OSError as error:
                # Without its sequence on the disk a record might be older than one of the run before.
                self.copies = 0
                log.error("sequence_not_kept", reason=error.strerror, hint="is the disk full?")
            half_s = self._lifetime_ms / 2000 * random.uniform(0.8, 1.0)
            # On a network of one bootstrap and its nodes there is but one peer that can keep it.
            short = self.copies < min(ENOUGH_COPIES, max(1, len(self._dht.table)))
            again_s = min(again_s * 2, half_s) if short else AGAIN_S
            with trio.move_on_after(again_s if short else half_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._wait_for_change, told, nursery.cancel_scope)
                    nursery.start_soon(self._wait_for_peers, nursery.cancel_scope)
        await trio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    async def _wait_for_change(self, told: tuple[object, ...], waiting: trio.CancelScope) -> None:
        while gist(self._describe()) == told:
            await self._changed()
            await trio.sleep(SETTLE_S)
        waiting.cancel()

    async def _wait_for_peers(self, waiting: trio.CancelScope) -> None:
        """End the wait when there are more peers to tell, as long as fewer keep the record than should: who starts
        before the others would else be known to one peer until the next round, and forgotten with it.
        """
        if self.copies < REPLICAS:
            await self._dht.wait_beyond(self._told_peers)
            await trio.sleep(JOINING_S * random.uniform(0.5, 1.0))
            self._announced_ms = 0
            waiting.cancel()

    async def _advertise(self) -> None:
        now_ms = self._now_ms()
        signed = self._sign(self._describe(), now_ms)
        capabilities = capabilities_of(signed.record)
        self.latest = signed
        self._told_peers = len(self._dht.table)
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

    async def withdraw(self) -> None:
        """Tell the DHT that this peer has stopped, for at most 3 s. Nothing if it never advertised."""
        self._withdrawn = True
        if self.latest is None:
            return
        mine = self.latest.record
        gone = NodeRecord(
            network=mine.network, node=mine.node, peer_id=mine.peer_id, sequence=0, issued_at_ms=0, expires_at_ms=0
        )
        try:
            signed = self._sign(gone.model_copy(update={"withdrawn": True}), self._now_ms())
        except OSError as error:
            log.warning("record_not_withdrawn", reason=error.strerror)  # it lapses by itself
            return
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
