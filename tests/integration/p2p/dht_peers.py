"""Peers of a DHT for the tests: on loopback, each knowing the first, with records to put."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import trio

from ngpu_protocol.identity import Account
from ngpu_protocol.node_records import SignedNodeRecord, sign_node_record
from ngpu_protocol.p2p import Host, P2PStream
from ngpu_protocol.p2p.dht import Dht, DhtSettings, open_dht
from ngpu_protocol.p2p.kad_messages import KadMessage, MessageReader, encode_message
from tests.integration.p2p.peers import LOCAL, LOOPBACK, account, eventually, host
from tests.unit.p2p.made_records import record_of

KAD = LOCAL.kad_protocol


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Peer:
    account: Account
    host: Host
    dht: Dht

    def record(self, sequence: int = 1, **fields: Any) -> SignedNodeRecord:
        at_ms = fields.pop("at_ms", now_ms())
        addresses = tuple(self.host.addresses)
        record = record_of(self.account, at_ms=at_ms, sequence=sequence, **({"addresses": addresses} | fields))
        return sign_node_record(record, self.account, LOCAL)


@contextlib.asynccontextmanager
async def dht_peer(*known: Peer, server: bool = True, settings: DhtSettings | None = None) -> AsyncIterator[Peer]:
    """Yield a peer that has dialled *known*; a client does not listen."""
    key = account()
    async with host({}, key=key, listen=(LOOPBACK,) if server else ()) as running:
        for other in known:
            await running.connect(other.host.addresses[0], timeout_s=30)
        async with open_dht(running, settings or DhtSettings(server=server)) as dht:
            yield Peer(key, running, dht)


@contextlib.asynccontextmanager
async def dht_network(count: int) -> AsyncIterator[list[Peer]]:
    """Yield *count* servers that found each other through the first."""
    async with contextlib.AsyncExitStack() as stack:
        peers: list[Peer] = []
        for _ in range(count):
            peers.append(await stack.enter_async_context(dht_peer(*peers[:1])))
        await eventually(lambda: all(len(peer.dht.table) >= min(count - 1, 6) for peer in peers))
        yield peers


@contextlib.asynccontextmanager
async def kad_stream(from_: Host, to: Peer) -> AsyncIterator[P2PStream]:
    """Yield a raw stream of the DHT's protocol, on which anything can be said."""
    await from_.connect(to.host.addresses[0], timeout_s=30)
    stream = await from_.open_stream(to.host.peer_id, KAD, timeout_s=30)
    try:
        yield stream
    finally:
        stream.reset_nowait()


async def say(from_: Host, to: Peer, message: KadMessage) -> KadMessage | None:
    """Return the answer to *message*; None when the stream was reset, or ended without one."""
    async with kad_stream(from_, to) as stream:
        try:
            with trio.fail_after(60):
                await stream.send_all(encode_message(message))
                return await MessageReader(stream, max_bytes=1 << 20, max_providers=1000).next()
        except trio.BrokenResourceError:
            return None
