"""Nodes are found by what their signed records say they offer, however many there are."""

from __future__ import annotations

import os
import time

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.capabilities import EPOCH_MS, Capability, capabilities_of, capability_key, epoch_at, shard_of
from ngpu_protocol.identity import Account, address_bytes
from ngpu_protocol.node_records import RecordGpu, Role, record_key, sign_node_record
from ngpu_protocol.p2p.directory import Directory
from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position, peer_id_bytes
from tests.integration.p2p.dht_peers import Peer, dht_network, dht_peer, now_ms
from tests.integration.p2p.peers import LOCAL
from tests.unit.p2p.made_records import record_of

T4 = Capability.parse("gpu:NVIDIA Tesla T4")
GPU = RecordGpu(id=bytes(32), model="T4", memory_bytes=16 << 30)


def directory(peer: Peer) -> Directory:
    return Directory(peer.host, peer.dht)


async def advertise(peer: Peer, sequence: int = 1, **fields: object) -> None:
    signed = peer.record(sequence, **fields)
    assert await peer.dht.put(signed) >= 3
    confirmed = await directory(peer).announce(capabilities_of(signed.record))
    assert all(count >= 3 for count in confirmed.values())


@trio_test
async def test_a_node_is_found_by_everything_it_offers_and_by_nothing_else() -> None:
    async with dht_network(6) as peers:
        await advertise(peers[1], gpus=(GPU,), workspaces=("1001",), region="EU-central")
        await advertise(peers[2], roles=(Role.BOOTSTRAP,))
        asker = directory(peers[5])
        for text in ("gpu:T4", "workspace:1001", "region:eu-central", "role:node"):
            (found,) = await asker.find(Capability.parse(text))
            assert found.node == peers[1].account.address
            assert found.alive is None
        (bootstrap,) = await asker.find(Capability.parse("role:bootstrap"), check_alive=True)
        assert (bootstrap.node, bootstrap.alive) == (peers[2].account.address, True)
        assert await asker.find(Capability.parse("gpu:RTX4090")) == []


@trio_test
async def test_who_announces_what_its_record_does_not_say_is_not_found() -> None:
    async with dht_network(5) as peers:
        await advertise(peers[1])
        await directory(peers[1]).announce([T4])
        await directory(peers[2]).announce([T4])  # it has no record at all
        assert await directory(peers[4]).find(T4) == []


@trio_test
async def test_a_node_that_withdrew_or_died_is_not_found() -> None:
    async with dht_network(6) as peers:
        await advertise(peers[1], gpus=(GPU,))
        await advertise(peers[2], gpus=(GPU,))
        await advertise(peers[3], gpus=(GPU,))
        assert len(await directory(peers[5]).find(T4, check_alive=True)) == 3
        await peers[1].dht.put(peers[1].record(2, withdrawn=True))
        await peers[2].host._swarm.close()
        (left,) = await directory(peers[5]).find(T4, check_alive=True)
        assert left.node == peers[3].account.address
        assert len(await directory(peers[4]).find(T4)) == 2, "unchecked, the dead one is there until it expires"


@trio_test
async def test_the_next_hours_page_is_there_before_the_hour() -> None:
    async with dht_network(4) as peers:
        near_the_end_ms = (epoch_at(now_ms()) + 1) * EPOCH_MS - 60_000
        await Directory(peers[1].host, peers[1].dht, now_ms=lambda: near_the_end_ms).announce([T4])
        for epoch in (epoch_at(near_the_end_ms), epoch_at(near_the_end_ms) + 1):
            assert len((await peers[3].dht.providers(capability_key(T4, LOCAL, epoch))).providers) == 1


@trio_test
async def test_a_search_ends_in_time_with_what_it_has() -> None:
    async with dht_network(5) as peers:
        await advertise(peers[1], gpus=(GPU,))
        began_s = time.perf_counter()
        asker = directory(peers[3])

        async def never(*_: object, **__: object) -> None:
            await trio.sleep_forever()

        asker._dht.get = never  # type: ignore[method-assign, assignment]
        assert await asker.find(T4, timeout_s=0.3) == []
        assert time.perf_counter() - began_s < 60


@pytest.mark.timeout_s(120)
@trio_test
async def test_two_thousand_nodes_of_one_capability_are_all_found() -> None:
    """The peers keep what 2,000 nodes announced, where those nodes' own announcements would have put it."""
    async with dht_network(12) as peers, dht_peer(peers[0], server=False) as asker:
        await asker.dht.wait_seeded()
        epoch, at_ms = epoch_at(now_ms()), now_ms()
        expected = set()
        for _ in range(2000):
            account = Account.from_key(os.urandom(32))
            expected.add(account.address)
            signed = sign_node_record(record_of(account, at_ms=at_ms, gpus=(GPU,)), account, LOCAL)
            provider = KadPeer(peer_id_bytes(account.peer_id))
            key = record_key(account.address)
            for peer in nearest(peers, key):
                peer.dht.store.put_record(key, signed.encode(), at_ms)
            for shard in ("", shard_of(account.address)):
                page = capability_key(T4, LOCAL, epoch, shard)
                for peer in nearest(peers, page):
                    peer.dht.store.add_provider(page, provider, at_ms)
        await asker.dht.refresh()
        began_s = time.perf_counter()
        found = await directory(asker).find(T4, timeout_s=60)
        took_s = time.perf_counter() - began_s
        assert {node.node for node in found} == expected
        assert len(found) == 2000
        print(f"2,000 records found, read and verified in {took_s:.1f} s")
        few = await directory(asker).find(T4, limit=20)
        assert len(few) == 20


def nearest(peers: list[Peer], key: bytes) -> list[Peer]:
    return sorted(peers, key=lambda peer: kad_position(peer.dht.own_id) ^ kad_position(key))[:8]


def test_an_address_begins_with_its_shard() -> None:
    address = Account.from_key(os.urandom(32)).address
    assert address_bytes(address).hex()[0] == shard_of(address)
