"""The DHT of a network: records of nodes, and who provides what, kept by the peers themselves.

libp2p's Kademlia under ``/ngpu/<network>/kad/1.0.0``, with the library's messages, so its peers and js-libp2p's take
part. The library's `KadDHT` itself is not used, because what is wrong with it is in its substance, not its settings.
Measured on 60 peers with full tables, all in one process on one core, and read in 0.8.1:

- A `get_value` asks 20 peers for the closest, in rounds, then those again for the value: 0.7 to 1.3 s, 0.2 to 0.3 s
  of CPU. (Here: 5 to 30 ms, 5 to 38 ms of CPU.) A peer that hangs costs 10 s each round.
- Any peer that opens a stream enters the routing table, clients and undialable ones included; but the first message
  of a peer does not, for want of addresses, so after 24 joined by one peer that one knew none of them.
- `find_providers` answers from the local store when it holds a single one; `get_value` from a copy up to 24 h old.
- Each message carries a signed peer record and each peer named in an answer another: 21 signature checks an answer,
  and every one adds to a peerstore without bound. Values and providers have no bound in bytes, and live 24 and 48 h.

What is kept are the rules of Kademlia; each module names what it closes: `kad_messages` (wire), `kad_table` (who is
known), `kad_walk` (lookup), `kad_calls` (asking), `kad_store` (keeping), `kad_server` (answering).

A peer that others can dial is a *server*; one that cannot is a *client*: it asks, puts and announces, and does not
offer the protocol, so nobody asks it. A peer enters the table of another only after that one dialled it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import structlog
import trio

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Address
from ngpu_protocol.networks import Network
from ngpu_protocol.node_records import RecordRefused, SignedNodeRecord, better, check_record, record_key
from ngpu_protocol.p2p.errors import P2PError
from ngpu_protocol.p2p.events import PeerConnected
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.identify import identify
from ngpu_protocol.p2p.kad_calls import KadCalls
from ngpu_protocol.p2p.kad_messages import (
    KadKind,
    KadMessage,
    KadPeer,
    kad_position,
    multiaddr_bytes,
    multiaddr_text,
    peer_id_bytes,
    peer_id_text,
)
from ngpu_protocol.p2p.kad_server import KadServer, KadServerLimits
from ngpu_protocol.p2p.kad_store import PROVIDERS_PER_KEY, KadStore
from ngpu_protocol.p2p.kad_table import BUCKET_SIZE, Contact, KadTable
from ngpu_protocol.p2p.kad_walk import CallFailed, walk

__all__ = ["REPLICAS", "Dht", "DhtSettings", "Page", "open_dht", "wall_ms"]

_log = structlog.get_logger(__name__)

REPLICAS = 8
"""Peers that keep each value. All are gone at once with 0.3^8 = 0.007 % when 30 % of all peers die together."""

_PARALLEL = 6
_PATIENCE_S = 0.4
_LOOKUP_S = 5.0
_ADMIT_TIMEOUT_S = 2.0
_ADMIT_AGAIN_S = 60.0
_ADMIT_QUEUE = 256
_FEW_CONTACTS = 4
_LONELY_REFRESH_S = 5.0
_MAX_MORE_SEEDS = 64


@dataclass(frozen=True, slots=True)
class DhtSettings:
    """How one peer takes part.

    Attributes:
        server: others can dial this host, so it keeps and answers; `Dht.become` changes that later.
        seeds: multiaddrs with ``/p2p/<PeerId>`` known from before, dialled only when no connected peer helps.
        refresh_s: how often the table is walked anew.
        limits: what others may ask.
    """

    server: bool = True
    seeds: tuple[str, ...] = ()
    refresh_s: float = 600.0
    limits: KadServerLimits = field(default_factory=KadServerLimits)


@dataclass(frozen=True, slots=True)
class Page:
    """Who provides a key.

    Attributes:
        providers: each once, with the addresses somebody stated.
        full: a peer that was asked keeps as many as it can, so there may be more.
    """

    providers: tuple[KadPeer, ...]
    full: bool


def wall_ms() -> int:
    """Return UTC milliseconds."""
    return time.time_ns() // 1_000_000


class Dht:
    """One host's part in the DHT. Made by `open_dht`.

    Attributes:
        table: whom it knows.
        store: what it keeps for others.
        server: how it answers.
        settings: how it was told to take part.
    """

    def __init__(
        self,
        host: Host,
        settings: DhtSettings,
        *,
        addresses: Callable[[], Sequence[str]] | None,
        now_ms: Callable[[], int],
    ) -> None:
        self._host = host
        self.settings = settings
        self._addresses = addresses or (lambda: host.addresses)
        self._now_ms = now_ms
        self.network: Network = host.network
        self.own_id = peer_id_bytes(host.peer_id)
        self.table = KadTable(self.own_id)
        self.store = KadStore(self.own_id, host.network)
        self.server = KadServer(
            self.own_id, self.own, self.table, self.store, now_ms=now_ms, met=self._met, limits=settings.limits
        )
        self.calls = KadCalls(host, host.network.kad_protocol)
        self._to_admit: trio.MemoryReceiveChannel[str]
        self._admissions, self._to_admit = trio.open_memory_channel[str](_ADMIT_QUEUE)
        self._admitted_s: dict[str, float] = {}
        self._seeded = trio.Event()
        self._grown = trio.Event()
        self._more_seeds: tuple[str, ...] = ()
        self._lonely = trio.Event()
        self._is_server = False

    @property
    def is_server(self) -> bool:
        """Whether this peer keeps and answers."""
        return self._is_server

    def become(self, *, server: bool) -> None:
        """Begin to keep and answer, or cease to: it turned out that others can dial this host, or cannot."""
        if server == self._is_server:
            return
        self._is_server = server
        if server:
            self._host.handle(self.network.kad_protocol, self.server.serve)
        else:
            self._host.unhandle(self.network.kad_protocol)
        _log.info("dht_role", server=server)

    def own(self) -> KadPeer:
        """Return this peer as it names itself to others."""
        addresses = (text.rpartition("/p2p/")[0] or text for text in self._addresses())
        return KadPeer(self.own_id, tuple(multiaddr_bytes(text) for text in addresses if not _is_wildcard(text)))

    # Records.

    async def put(self, signed: SignedNodeRecord, *, timeout_s: float = _LOOKUP_S) -> int:
        """Have the peers nearest to its key keep *signed*; returns how many said they do.

        Raises:
            RecordRefused: nobody would: it breaks a rule, or this peer holds a better one.
        """
        key, value = record_key(signed.record.node), signed.encode()
        kept = 0
        if self.is_server:
            self.store.put_record(key, value, self._now_ms())
            kept = 1
        else:
            check_record(key, value, network=self.network, now_ms=self._now_ms())
        message = KadMessage(KadKind.PUT_VALUE, key, value)

        async def put_at(peer: KadPeer) -> None:
            nonlocal kept
            try:
                await self.calls.call(peer, message)
                kept += 1
            except CallFailed as error:  # it may hold a newer one: no reason to think the peer gone
                _log.debug("dht_put_refused", reason=str(error))

        with trio.move_on_after(timeout_s):
            nearest = await self.closest(key)
            async with trio.open_nursery() as nursery:
                for peer in nearest:
                    nursery.start_soon(put_at, peer)
        return kept

    async def get(self, node: Address, *, quorum: int = 3, timeout_s: float = _LOOKUP_S) -> SignedNodeRecord | None:
        """Return *node*'s newest record as the network has it, verified; None if nobody answers with one in time.

        A withdrawn record is returned like any other.

        Args:
            quorum: how many peers must have shown a record before the newest of theirs is taken. Our own copy, which
                may be old, counts as one of them and never more.
        """
        key = record_key(node)
        best: SignedNodeRecord | None = None
        shown = 0
        if self.is_server and (own := self.store.record(key, self._now_ms())) is not None:
            best, shown = own, 1
        message = KadMessage(KadKind.GET_VALUE, key)

        async def ask(peer: KadPeer) -> Sequence[KadPeer]:
            nonlocal best, shown
            answer = await self._call(peer, message)
            if answer.value is not None:
                try:
                    signed = check_record(key, answer.value, network=self.network, now_ms=self._now_ms())
                except RecordRefused as error:
                    _log.info("dht_bad_record_served", peer=peer_id_text(peer.id), node=node, reason=error.rule)
                else:
                    shown += 1
                    if best is None or better(signed, best):
                        best = signed
            return answer.closer

        with trio.move_on_after(timeout_s):
            # Not many more questions at once than answers are wanted.
            parallel = min(_PARALLEL, quorum + 1)
            await self._walk(kad_position(key), ask, parallel=parallel, enough=lambda: shown >= quorum)
        return best

    # Providers.

    async def provide(self, key: bytes, *, timeout_s: float = _LOOKUP_S) -> int:
        """Announce this peer as a provider of *key*; returns how many peers confirmed that they keep it.

        Fewer than `REPLICAS` is normal where a key is full or a network small; 0 is worth trying again.
        """
        own = self.own()
        if not own.addresses:
            # The specification drops a provider without addresses, and a peer that only dials has none. Its PeerId is
            # all that anybody needs: its record tells the rest.
            own = KadPeer(own.id, (multiaddr_bytes(f"/p2p/{self._host.peer_id}"),))
        confirmed = 0
        if self.is_server and self.store.add_provider(key, own, self._now_ms()):
            confirmed = 1
        message = KadMessage(KadKind.ADD_PROVIDER, key, providers=(own,))

        async def announce_at(peer: KadPeer) -> None:
            nonlocal confirmed
            try:
                await self.calls.call(peer, message)
                confirmed += 1
            except CallFailed as error:
                # A full page ends the stream; js-libp2p and go-libp2p keep the provider and never answer.
                _log.debug("dht_provider_not_confirmed", reason=str(error))

        with trio.move_on_after(timeout_s):
            nearest = await self.closest(key)
            async with trio.open_nursery() as nursery:
                for peer in nearest:
                    nursery.start_soon(announce_at, peer)
        return confirmed

    async def providers(self, key: bytes, *, timeout_s: float = _LOOKUP_S) -> Page:
        """Return who provides *key*, gathered from the peers nearest to it; what came until *timeout_s* counts."""
        found: dict[bytes, KadPeer] = {}
        full = False

        def gather(peers: Sequence[KadPeer]) -> None:
            nonlocal full
            full = full or len(peers) >= PROVIDERS_PER_KEY
            for peer in peers:
                found.setdefault(peer.id, peer)

        if self.is_server:
            gather(self.store.providers(key, self._now_ms()))
        message = KadMessage(KadKind.GET_PROVIDERS, key)

        async def ask(peer: KadPeer) -> Sequence[KadPeer]:
            answer = await self._call(peer, message)
            gather(answer.providers)
            return answer.closer

        with trio.move_on_after(timeout_s):
            await self._walk(kad_position(key), ask)
        return Page(tuple(found.values()), full)

    # Peers.

    async def closest(self, key: bytes, *, width: int = REPLICAS) -> list[KadPeer]:
        """Return the peers nearest to *key* that answer, ourselves left out. Bound it with a cancel scope."""
        message = KadMessage(KadKind.FIND_NODE, key)

        async def ask(peer: KadPeer) -> Sequence[KadPeer]:
            return (await self._call(peer, message)).closer

        return await self._walk(kad_position(key), ask, width=width)

    async def find_peer(self, peer_id: str, *, timeout_s: float = _LOOKUP_S) -> list[str]:
        """Return multiaddrs at which the network knows a DHT server, with ``/p2p`` at their ends; empty if none."""
        wanted = peer_id_bytes(peer_id)
        found = self.table.get(wanted)

        async def ask(peer: KadPeer) -> Sequence[KadPeer]:
            nonlocal found
            closer = (await self._call(peer, KadMessage(KadKind.FIND_NODE, wanted))).closer
            found = found or next((other for other in closer if other.id == wanted and other.addresses), None)
            return closer

        with trio.move_on_after(timeout_s):
            await self._walk(kad_position(wanted), ask, enough=lambda: found is not None)
        addresses = found.addresses if found else ()
        return [f"{text}/p2p/{peer_id}" for text in map(multiaddr_text, addresses) if text]

    def greet(self, multiaddrs: Sequence[str]) -> None:
        """Take *multiaddrs* (with ``/p2p/<PeerId>``) as places to begin from, besides the settings' seeds."""
        self._more_seeds = tuple(dict.fromkeys((*multiaddrs, *self._more_seeds)))[:_MAX_MORE_SEEDS]
        if not len(self.table):
            self._lonely.set()

    def seeds(self, count: int = 64) -> list[str]:
        """Return where known peers are, those heard of last first: to be given to the next run as its seeds."""
        newest = sorted(self.table.contacts(), key=_heard_s, reverse=True)[:count]
        return [
            f"{text}/p2p/{peer_id_text(contact.peer.id)}"
            for contact in newest
            if (text := multiaddr_text(contact.peer.addresses[0]))
        ]

    async def wait_seeded(self) -> None:
        """Return once the table has an entry."""
        await self._seeded.wait()

    async def _walk(
        self,
        target: int,
        ask: Callable[[KadPeer], object],
        *,
        width: int = REPLICAS,
        parallel: int = _PARALLEL,
        enough: Callable[[], bool] = lambda: False,
    ) -> list[KadPeer]:
        start = self.table.closest(target, BUCKET_SIZE)
        return await walk(
            target,
            start,
            ask,  # type: ignore[arg-type]
            own_id=self.own_id,
            width=width,
            parallel=parallel,
            patience_s=_PATIENCE_S,
            enough=enough,
        )

    async def _call(self, peer: KadPeer, message: KadMessage) -> KadMessage:
        """Call *peer*, and let the table know how that went."""
        try:
            answer = await self.calls.call(peer, message)
        except CallFailed:
            self.table.failed(peer.id)
            raise
        if self.table.answered(peer.id, trio.current_time()):
            return answer
        where = self._host.dialled_at(peer_id_text(peer.id))
        if where is not None:
            self._heard(KadPeer(peer.id, (multiaddr_bytes(where),)))
        return answer

    async def wait_beyond(self, peers: int) -> None:
        """Return once the table has more than so many entries."""
        while len(self.table) <= peers:
            await self._grown.wait()

    def _heard(self, peer: KadPeer) -> None:
        before = len(self.table)
        if self.table.heard(peer, trio.current_time()):
            self._seeded.set()
            if len(self.table) > before:
                self._grown.set()
                self._grown = trio.Event()

    # Who is there.

    def meet(self, peer_id: str) -> None:
        """Consider a connected peer for the table now, though that was done a moment ago."""
        self._admitted_s.pop(peer_id, None)
        self._met(peer_id)

    def _met(self, peer_id: str) -> None:
        """Consider a peer for the table: it asked us something, or is connected now."""
        now_s = trio.current_time()
        if now_s - self._admitted_s.get(peer_id, -math.inf) < _ADMIT_AGAIN_S:
            return
        if len(self._admitted_s) >= 4096:
            self._admitted_s = {p: s for p, s in self._admitted_s.items() if s > now_s - _ADMIT_AGAIN_S}
        try:
            self._admissions.send_nowait(peer_id)
            self._admitted_s[peer_id] = now_s
        except trio.WouldBlock:
            pass  # it is considered when it is met again

    async def _admit(self, peer_text: str) -> None:
        try:
            peer_id = peer_id_bytes(peer_text)
        except MalformedError:
            return
        if not self.table.has_room_for(peer_id) or not self._host.is_connected(peer_text):
            return
        if self._host.dialled_at(peer_text) is not None:
            await self._greet(KadPeer(peer_id))
            return
        # It dialled us. What it says about itself is tried out: dialled anew, for others will have to.
        said = await identify(self._host, peer_text, timeout_s=_ADMIT_TIMEOUT_S)
        if self.network.kad_protocol not in said.protocols:
            return
        for address in said.addresses[:4]:
            if _is_wildcard(address):
                continue
            try:
                await self._host.probe(f"{address}/p2p/{peer_text}", timeout_s=_ADMIT_TIMEOUT_S)
            except P2PError:
                continue
            self._heard(KadPeer(peer_id, (multiaddr_bytes(address),)))
            return

    async def _greet(self, peer: KadPeer) -> None:
        """Ask *peer* for our own neighbourhood, which puts it into the table if it is a server."""
        try:
            await self._call(peer, KadMessage(KadKind.FIND_NODE, self.own_id))
        except CallFailed as error:
            _log.debug("dht_peer_no_server", peer=peer_id_text(peer.id), reason=str(error))

    # Tasks.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Take part, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.calls.run)
            for _ in range(4):
                nursery.start_soon(self._admit_all)
            nursery.start_soon(self._watch_connections)
            nursery.start_soon(self._keep_up)
            task_status.started()
        raise AssertionError("its tasks run for ever")

    async def _admit_all(self) -> None:
        async for peer_text in self._to_admit:
            with trio.move_on_after(4 * _ADMIT_TIMEOUT_S):
                try:
                    await self._admit(peer_text)
                except (P2PError, MalformedError) as error:
                    _log.debug("dht_peer_not_admitted", peer=peer_text, reason=str(error))

    async def _watch_connections(self) -> None:
        while True:
            async with self._host.events() as events:
                async for event in events:
                    # Those that dialled us are met when they ask something; one that never does is no server.
                    if isinstance(event, PeerConnected) and not event.inbound:
                        self._met(event.peer_id)
            await trio.sleep(1)  # this task fell behind: from the start, in a moment

    async def _keep_up(self) -> None:
        """Fill the table at the start, and walk it anew from time to time."""
        await self._sow()
        while True:
            if len(self.table):
                await self.refresh()
            lonely = len(self.table) < _FEW_CONTACTS
            # Never all peers of a network at the same moment.
            spread = random.uniform(0.8, 1.2)
            with trio.move_on_after((_LONELY_REFRESH_S if lonely else self.settings.refresh_s) * spread):
                await self._lonely.wait()
            self._lonely = trio.Event()
            self.store.expire(self._now_ms())
            if not len(self.table):
                await self._sow()

    async def _sow(self) -> None:
        """Find a first contact among the connected, then among the seeds."""
        for info in self._host.peers():
            self._admitted_s.pop(info.peer_id, None)
            self._met(info.peer_id)
        if self._host.peers():
            with trio.move_on_after(1.0):
                await self._seeded.wait()
        if len(self.table):
            return
        seeds = list(dict.fromkeys((*self._more_seeds, *self.settings.seeds)))
        for seed in random.sample(seeds, len(seeds)):
            head, _, peer_text = seed.rpartition("/p2p/")
            try:
                await self._greet(KadPeer(peer_id_bytes(peer_text), (multiaddr_bytes(head),)))
            except MalformedError:
                continue
            if len(self.table) >= _FEW_CONTACTS:
                return

    async def refresh(self, *, timeout_s: float = 10.0) -> None:
        """Walk to ourselves, which tells the neighbours of us, and into two random parts of the keyspace."""
        with trio.move_on_after(timeout_s):
            await self.closest(self.own_id, width=BUCKET_SIZE)
            for _ in range(2):
                await self.closest(random.randbytes(32))
        # The walk asks but a part of the table; entries not heard of for long are asked whether they are still there.
        silent_s = trio.current_time() - 2 * self.settings.refresh_s
        for contact in [c for c in self.table.contacts() if c.heard_s < silent_s][:BUCKET_SIZE]:
            await self._greet(contact.peer)


def _heard_s(contact: Contact) -> float:
    return contact.heard_s


def _is_wildcard(address: str) -> bool:
    return address.startswith(("/ip4/0.0.0.0/", "/ip6/::/"))


@asynccontextmanager
async def open_dht(
    host: Host,
    settings: DhtSettings | None = None,
    *,
    addresses: Callable[[], Sequence[str]] | None = None,
    now_ms: Callable[[], int] = wall_ms,
) -> AsyncIterator[Dht]:
    """Take part in the DHT of *host*'s network for the duration of the context.

    Args:
        addresses: multiaddrs at which others reach this host; left out: those it listens on.
        now_ms: UTC milliseconds.
    """
    dht = Dht(host, settings or DhtSettings(), addresses=addresses, now_ms=now_ms)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        dht.become(server=dht.settings.server)
        await nursery.start(dht.run)
        try:
            yield dht
        except Exception as error:
            failure = error  # raised below: the nursery would wrap what is the caller's own in a group
        finally:
            dht.become(server=False)
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
