"""Finding nodes by what they offer, and being found: capabilities and records, over the DHT.

`Directory.find` asks the capability's front page; when that is full, the 16 shards. It then reads the record of every
peer it heard of, from the DHT and not from the provider, and returns those whose record holds, is not withdrawn and
says that the peer offers what was asked for. So a peer can announce what it likes: it is found only by what it signed.
A record is at most its lifetime old; who wants to know that a node is there now has it checked (`alive`), by a
connection that stands or comes about.

Everything is bounded in time: what has come by then is the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog
import trio

from ngpu_protocol.capabilities import (
    SHARDS,
    Capability,
    capability_key,
    epoch_at,
    epochs_to_announce,
    shard_of,
)
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import Address, address_of_peer_id
from ngpu_protocol.node_records import SignedNodeRecord, dial_addresses
from ngpu_protocol.p2p.dht import Dht, wall_ms
from ngpu_protocol.p2p.errors import BadMultiaddrError, DialError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.kad_messages import KadPeer, peer_id_text

__all__ = ["Directory", "FoundNode"]

_log = structlog.get_logger(__name__)

FRESH_MS = 30_000
"""How long a record that was read is used again without asking."""

_MAX_CACHED = 16384
_READS_AT_ONCE = 32
_SHARDS_AT_ONCE = 4
_CHECK_S = 2.0
_CONFIRMED_ENOUGH = 2
_TRIES = 3
_TRY_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class FoundNode:
    """A peer that says it offers what was asked for.

    Attributes:
        alive: it was connected, or could be, a moment ago; None when that was not checked.
    """

    signed: SignedNodeRecord
    alive: bool | None = None

    @property
    def node(self) -> Address:
        return self.signed.record.node


class Directory:
    """Who is on the network and what they offer, as one peer sees it."""

    def __init__(self, host: Host, dht: Dht, *, now_ms: Callable[[], int] = wall_ms) -> None:
        self._host = host
        self._dht = dht
        self._now_ms = now_ms
        self._read: dict[Address, tuple[SignedNodeRecord, int]] = {}

    # Finding.

    async def find(
        self,
        capability: Capability,
        *,
        limit: int = 4096,
        check_alive: bool = False,
        timeout_s: float = 5.0,
    ) -> list[FoundNode]:
        """Return up to *limit* nodes that offer *capability*, each once, in random order.

        Args:
            check_alive: connect to each, and leave out those that cannot be; a node behind NAT is reached only while
                it is connected here.
            timeout_s: for everything.
        """
        found: list[FoundNode] = []
        with trio.move_on_after(timeout_s) as scope:
            announced = await self._announced(capability, limit, timeout_s)
            random.shuffle(announced)
            await self._gather(announced, capability, found, limit=limit, check_alive=check_alive)
        if scope.cancelled_caught:
            _log.info("directory_search_cut_short", capability=str(capability), found=len(found), after_s=timeout_s)
        return found

    async def _gather(
        self, nodes: Sequence[Address], capability: Capability, found: list[FoundNode], *, limit: int, check_alive: bool
    ) -> None:
        """Append those of *nodes* that offer *capability* to *found*, as they turn up."""
        remaining = iter(nodes)
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                for node in remaining:
                    signed, is_fresh = await self._recent(node, capability)
                    if signed is not None and check_alive and not await self.is_alive(signed):
                        if is_fresh:
                            continue
                        signed = await self._read_anew(node)  # it may have moved, or come back elsewhere
                        if signed is not None and not await self.is_alive(signed):
                            continue
                    if signed is None or not capability.offered_by(signed.record):
                        continue
                    if len(found) < limit:
                        found.append(FoundNode(signed, True if check_alive else None))
                    if len(found) >= limit:
                        nursery.cancel_scope.cancel()

            for _ in range(min(_READS_AT_ONCE, len(nodes))):
                nursery.start_soon(take)

    async def _recent(self, node: Address, capability: Capability) -> tuple[SignedNodeRecord | None, bool]:
        """Return *node*'s record and whether it was read just now; one read up to `FRESH_MS` ago will do, but not to
        find that a node offers nothing: it may have got ready, or come back, since.
        """
        now_ms = self._now_ms()
        known = self._read.get(node)
        if known is not None and now_ms - known[1] < FRESH_MS and known[0].record.expires_at_ms > now_ms:
            signed = known[0]
            if capability.offered_by(signed.record):
                return signed, False
        return await self._read_anew(node), True

    async def _read_anew(self, node: Address) -> SignedNodeRecord | None:
        # One peer's word will do: it is signed, and no older than its lifetime.
        signed = await self._dht.get(node, quorum=1)
        if signed is not None:
            if len(self._read) >= _MAX_CACHED:
                self._read.clear()
            self._read[node] = (signed, self._now_ms())
        return signed

    async def is_alive(self, signed: SignedNodeRecord) -> bool:
        """Return whether the record's peer is connected, or can be reached at an address it states, within 2 s."""
        peer_id = signed.record.peer_id
        if self._host.is_connected(peer_id):
            return True
        with trio.move_on_after(_CHECK_S):
            for address in dial_addresses(signed.record):
                try:
                    await self._host.probe(address, timeout_s=_CHECK_S)
                except (DialError, BadMultiaddrError):
                    continue
                return True
        return False

    async def record(self, node: Address, *, timeout_s: float = 5.0) -> SignedNodeRecord | None:
        """Return *node*'s newest record from the network; None if there is none, or it is withdrawn."""
        signed = await self._dht.get(node, timeout_s=timeout_s)
        return None if signed is None or signed.record.withdrawn else signed

    async def _announced(self, capability: Capability, limit: int, timeout_s: float) -> list[Address]:
        """Return who announced *capability* this hour, duplicates and foreign keys removed."""
        epoch = epoch_at(self._now_ms())
        network = self._dht.network
        page = await self._dht.providers(capability_key(capability, network, epoch), timeout_s=timeout_s / 2)
        nodes = dict.fromkeys(_nodes_of(page.providers))
        if not page.full or len(nodes) >= limit:
            return list(nodes)
        room = trio.CapacityLimiter(_SHARDS_AT_ONCE)

        async def ask(shard: str) -> None:
            async with room:
                key = capability_key(capability, network, epoch, shard)
                shard_page = await self._dht.providers(key, timeout_s=timeout_s / 2)
                nodes.update(dict.fromkeys(_nodes_of(shard_page.providers)))

        async with trio.open_nursery() as nursery:
            for shard in SHARDS:
                nursery.start_soon(ask, shard)
        return list(nodes)

    # Being found.

    async def announce(self, capabilities: Iterable[Capability]) -> dict[Capability, int]:
        """Announce this peer under *capabilities*, for this hour and the next when it is near.

        Returns how many peers confirmed that they keep it, per capability, at the least of its pages; a front page
        that is full does not count, for then the shards are asked. Each page is tried three times.
        """
        confirmed: dict[Capability, int] = {}
        wanted = [
            (capability, epoch) for capability in sorted(capabilities) for epoch in epochs_to_announce(self._now_ms())
        ]
        own_shard = shard_of(self._host.address)
        for capability, epoch in wanted:
            network = self._dht.network
            await self._announce_at(capability_key(capability, network, epoch), tries=1)
            kept = await self._announce_at(capability_key(capability, network, epoch, own_shard), tries=_TRIES)
            confirmed[capability] = min(kept, confirmed.get(capability, kept))
        return confirmed

    async def _announce_at(self, key: bytes, *, tries: int) -> int:
        kept = 0
        for attempt in range(tries):
            if attempt:
                await trio.sleep(_TRY_AGAIN_S * attempt)
            kept = await self._dht.provide(key)
            if kept >= _CONFIRMED_ENOUGH:
                break
        return kept


def _nodes_of(providers: Iterable[KadPeer]) -> list[Address]:
    """Return the accounts of *providers*; a foreign libp2p peer has none."""
    nodes = []
    for provider in providers:
        try:
            nodes.append(address_of_peer_id(peer_id_text(provider.id)))
        except AddressError:
            continue
    return nodes
