"""A hostile peer says everything it can to every peer of a DHT; each refuses it, and goes on serving the others."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_records import MAX_RECORD_BYTES, record_digest, record_key, sign_node_record
from ngpu_protocol.p2p import P2PStream
from ngpu_protocol.p2p.dht import DhtSettings
from ngpu_protocol.p2p.kad_messages import KadKind, KadMessage, KadPeer, MessageReader, encode_message, multiaddr_bytes
from ngpu_protocol.p2p.kad_server import KadServerLimits
from tests.integration.p2p.dht_peers import Peer, dht_network, dht_peer, kad_stream, now_ms, say
from tests.integration.p2p.peers import LOCAL, host
from tests.unit.p2p.made_records import record_of

HOSTILE = Account.from_key(os.urandom(32))


def put(key: bytes, value: bytes) -> KadMessage:
    return KadMessage(KadKind.PUT_VALUE, key, value)


def bad_puts(victim: Peer) -> dict[str, KadMessage]:
    """Return what no peer may keep, by the reason it refuses it for."""
    key = record_key(victim.account.address)
    good = victim.record(5)
    mine = record_of(HOSTILE, at_ms=now_ms())
    forged = good.record.model_copy(update={"sequence": 99}).encode()
    forged_value = HOSTILE.sign(record_digest(forged, LOCAL.chain_id)) + forged
    old = victim.record(9, at_ms=now_ms() - 3_600_000)
    test = network_named("test")
    foreign = sign_node_record(mine.model_copy(update={"network": "test"}), HOSTILE, test)
    return {
        "bad_signature": put(key, forged_value),
        "wrong_owner": put(key, sign_node_record(mine, HOSTILE, LOCAL).encode()),
        "expired": put(key, old.encode()),
        "stale": put(key, victim.record(1).encode()),
        "lives_too_long": put(key, victim.record(9, expires_at_ms=now_ms() + 10**9).encode()),
        "from_the_future": put(
            key, victim.record(9, at_ms=now_ms() + 10**7, expires_at_ms=now_ms() + 10**7 + 1).encode()
        ),
        "oversize": put(key, good.encode() + bytes(MAX_RECORD_BYTES)),
        "malformed": put(key, os.urandom(500)),
        "wrong_network": put(record_key(HOSTILE.address), foreign.encode()),
        "foreign_key": put(b"/pk/" + os.urandom(32), os.urandom(100)),
    }


@trio_test
async def test_no_peer_keeps_a_forged_replayed_stale_oversize_or_foreign_record() -> None:
    async with dht_network(5) as peers, host({}, key=HOSTILE) as hostile:
        victim = peers[0]
        assert await victim.dht.put(victim.record(5)) == 5
        for reason, message in bad_puts(victim).items():
            for peer in peers:
                assert await say(hostile, peer, message) is None, reason
                assert peer.dht.server.refused[reason] == 1, reason
        for bare in (b"bare key", b"/unknown/namespace", b"/ngpu/other/thing"):
            assert await say(hostile, peers[1], put(bare, b"x")) is None
        for peer in peers:
            assert peer.dht.store.record_count == 1
            found = await peer.dht.get(victim.account.address)
            assert found is not None
            assert found.record.sequence == 5


@trio_test
async def test_a_record_that_was_withdrawn_cannot_be_played_again() -> None:
    async with dht_network(4) as peers, host({}, key=HOSTILE) as hostile:
        victim = peers[0]
        once = victim.record(5)
        await victim.dht.put(once)
        await victim.dht.put(victim.record(6, withdrawn=True))
        for peer in peers:
            assert await say(hostile, peer, put(record_key(victim.account.address), once.encode())) is None
            assert peer.dht.server.refused["stale"] == 1
            found = await peer.dht.get(victim.account.address)
            assert found is not None
            assert found.record.withdrawn


@trio_test
async def test_nobody_can_announce_another_or_fill_a_node_key() -> None:
    async with dht_network(2) as peers, host({}, key=HOSTILE) as hostile:
        key = b"\x12\x20" + os.urandom(32)
        other = KadPeer(peers[1].dht.own_id, (multiaddr_bytes("/ip4/192.0.2.66/tcp/1"),))
        assert await say(hostile, peers[0], KadMessage(KadKind.ADD_PROVIDER, key, providers=(other,))) is None
        assert await say(hostile, peers[0], KadMessage(KadKind.ADD_PROVIDER, key)) is None
        assert peers[0].dht.server.refused["provider_is_not_sender"] == 2
        node_key = record_key(peers[1].account.address)
        assert await say(hostile, peers[0], KadMessage(KadKind.ADD_PROVIDER, node_key, providers=(other,))) is None
        assert peers[0].dht.store.provider_count == 0


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x0f", b"\x80\x80\x04", b"\x05rubbi", b"\x00"])
@trio_test
async def test_rubbish_resets_its_stream_and_nothing_else(data: bytes) -> None:
    async with (
        dht_peer() as peer,
        host({}, key=HOSTILE) as hostile,
        kad_stream(hostile, peer) as stream,
        kad_stream(hostile, peer) as another,
    ):
        await stream.send_all(data)
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(60):
            await stream.receive_some()
        await another.send_all(encode_message(KadMessage(KadKind.FIND_NODE, b"key")))
        with trio.fail_after(60):
            assert await MessageReader(another, max_bytes=9999, max_providers=9).next() is not None


@trio_test
async def test_one_peer_can_hold_so_many_streams_and_ask_so_often() -> None:
    limits = KadServerLimits(streams_per_peer=3, calls_burst=20, calls_per_s=1)
    settings = DhtSettings(limits=limits)
    async with dht_peer(settings=settings) as peer, host({}, key=HOSTILE) as hostile, host({}) as honest:
        question = encode_message(KadMessage(KadKind.FIND_NODE, b"key"))
        async with kad_stream(hostile, peer), kad_stream(hostile, peer), kad_stream(hostile, peer) as stream:
            assert await say(hostile, peer, KadMessage(KadKind.FIND_NODE, b"key")) is None
            await stream.send_all(question * 200)
            with pytest.raises(trio.BrokenResourceError):
                await count_answers(stream, at_most=20)
            assert peer.dht.server.refused["too_many_calls"] == 1
            assert await say(honest, peer, KadMessage(KadKind.FIND_NODE, b"key")) is not None


async def count_answers(stream: P2PStream, at_most: int) -> None:
    incoming = MessageReader(stream, max_bytes=9999, max_providers=9)
    with trio.fail_after(60):
        for _ in range(at_most + 1):
            await incoming.next()
    raise AssertionError("answered too often")


@trio_test
async def test_a_peer_that_serves_bad_records_and_made_up_peers_misleads_nobody() -> None:
    async with dht_network(5) as peers:
        victim = peers[0]
        await victim.dht.put(victim.record(5))
        liar = peers[4]
        forged = bad_puts(victim)["bad_signature"].value
        made_up = tuple(KadPeer(os.urandom(39), (multiaddr_bytes("/ip4/127.0.0.1/tcp/9"),)) for _ in range(20))
        honest_answer = liar.dht.server.answer

        def lie(peer: str, message: KadMessage) -> KadMessage | None:
            if message.kind is KadKind.GET_VALUE:
                return KadMessage(message.kind, message.key, forged, closer=made_up)
            answer = honest_answer(peer, message)
            return None if answer is None else replace(answer, closer=made_up)

        liar.dht.server.answer = lie  # type: ignore[method-assign]
        for peer in peers[1:4]:
            found = await peer.dht.get(victim.account.address, quorum=5)
            assert found is not None
            assert found.record.sequence == 5
            assert not any(other.id in peer.dht.table for other in made_up)


@trio_test
async def test_an_answer_too_long_or_never_ending_is_given_up() -> None:
    async with dht_peer() as peer, host({}, key=HOSTILE) as hostile:

        async def flood(stream: P2PStream) -> None:
            await stream.send_all(b"\xff\xff\xff\x7f")
            while True:
                await stream.send_all(bytes(65536))

        hostile.handle(LOCAL.kad_protocol, flood)
        await peer.host.connect(hostile.addresses[0], timeout_s=30)
        with trio.fail_after(60):
            assert await peer.dht.get(HOSTILE.address) is None
        assert len(peer.dht.table) == 0
