"""The DHT over real connections: records and providers are found, the dead and the undialable are no obstacle."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.node_records import RecordRefused, record_key
from ngpu_protocol.p2p import P2PStream
from ngpu_protocol.p2p.dht import DhtSettings, open_dht
from ngpu_protocol.p2p.kad_messages import KadKind, KadMessage, KadPeer, multiaddr_bytes, peer_id_bytes
from tests.integration.p2p.dht_peers import KAD, dht_network, dht_peer, now_ms, say
from tests.integration.p2p.peers import account, eventually, host


@trio_test
async def test_a_record_put_by_one_is_read_by_all_and_renewed() -> None:
    async with dht_network(10) as peers:
        author = peers[3]
        assert await author.dht.put(author.record(1)) >= 8
        for peer in peers:
            found = await peer.dht.get(author.account.address)
            assert found is not None
            assert found.record.sequence == 1
        assert await author.dht.put(author.record(2, withdrawn=True)) >= 8
        found = await peers[7].dht.get(author.account.address)
        assert found is not None
        assert (found.record.sequence, found.record.withdrawn) == (2, True)
        with pytest.raises(RecordRefused, match="stale"):
            await author.dht.put(author.record(1))
        assert await peers[5].dht.get(account().address) is None


@trio_test
async def test_a_stale_copy_of_our_own_does_not_hide_the_newer_record() -> None:
    async with dht_network(6) as peers:
        author, reader = peers[1], peers[4]
        await author.dht.put(author.record(1))
        key = record_key(author.account.address)
        newer = author.record(2)
        for peer in peers:
            if peer is not reader:
                peer.dht.store.put_record(key, newer.encode(), now_ms())
        found = await reader.dht.get(author.account.address)
        assert found is not None
        assert found.record.sequence == 2


@trio_test
async def test_providers_are_confirmed_found_once_and_told_full_or_not() -> None:
    async with dht_network(8) as peers:
        key = b"\x12\x20" + os.urandom(32)
        for peer in peers[:3]:
            assert await peer.dht.provide(key) >= 5
        page = await peers[7].dht.providers(key)
        assert sorted(p.id for p in page.providers) == sorted(peer.dht.own_id for peer in peers[:3])
        assert not page.full
        for peer in peers:
            for number in range(512):
                peer.dht.store.add_provider(key, KadPeer(number.to_bytes(39, "big")), now_ms())
        assert await peers[5].dht.provide(key) == 0, "nobody has room for one more, and nobody says otherwise"
        assert (await peers[6].dht.providers(key)).full


@trio_test
async def test_a_peer_that_cannot_be_dialled_takes_part_as_a_client() -> None:
    async with dht_network(5) as peers, dht_peer(peers[0], server=False) as hidden:
        await hidden.dht.wait_seeded()
        assert await hidden.dht.put(hidden.record(1)) >= 4
        key = b"\x12\x20" + os.urandom(32)
        assert await hidden.dht.provide(key) >= 4
        assert (await peers[4].dht.get(hidden.account.address)) is not None
        (provider,) = (await peers[3].dht.providers(key)).providers
        assert provider.id == hidden.dht.own_id
        await peers[2].host.connect(peers[0].host.addresses[0], timeout_s=30)
        await trio.sleep(0.3)
        assert all(hidden.dht.own_id not in peer.dht.table for peer in peers), "nobody asks it for keys"


@trio_test
async def test_a_peer_whose_addresses_do_not_answer_enters_no_table() -> None:
    async with dht_network(3) as peers, dht_peer(peers[0]) as liar:
        # It offers the protocol and claims an address; it just is not there.
        for listener in liar.host._swarm.listeners.values():
            await listener.close()
        for peer in peers:
            peer.dht.table.remove(liar.dht.own_id)
            peer.dht._admitted_s.clear()
            await say(liar.host, peer, KadMessage(KadKind.FIND_NODE, b"anything"))
        await trio.sleep(0.5)
        assert all(liar.dht.own_id not in peer.dht.table for peer in peers)


@trio_test
async def test_lookups_go_on_when_a_third_is_gone_and_another_hangs() -> None:
    async with dht_network(14) as peers:
        author = peers[2]
        await author.dht.put(author.record(1))
        for peer in peers[8:12]:
            await peer.host._swarm.close()
        hung = peers[12]

        async def hang(stream: P2PStream) -> None:
            await trio.sleep_forever()

        hung.host.handle(KAD, hang)
        for peer in (peers[1], peers[4], peers[7]):
            with trio.fail_after(30):  # and not the whole minute that it may take
                assert await peer.dht.get(author.account.address, timeout_s=60) is not None
            assert await peer.dht.get(account().address) is None


@trio_test
async def test_everybody_finds_everybody_with_the_first_peer_gone_and_after_a_restart_from_seeds() -> None:
    async with dht_network(7) as peers:
        await peers[0].host._swarm.close()
        await peers[0].host.disconnect(peers[1].host.peer_id)
        author = peers[1]
        assert await author.dht.put(author.record(1)) >= 4
        assert await peers[6].dht.get(author.account.address) is not None
        seeds = tuple(peers[6].dht.seeds())
        async with dht_peer(settings=DhtSettings(seeds=seeds)) as back:
            await back.dht.wait_seeded()
            assert await back.dht.get(author.account.address) is not None
            assert await back.dht.find_peer(author.host.peer_id) == [author.host.addresses[0]]


@trio_test
async def test_connections_made_for_a_lookup_are_closed_when_idle_and_others_are_not() -> None:
    async with dht_network(5) as peers:
        asker = peers[1]
        kept = await asker.host.open_stream(peers[0].host.peer_id, "/ipfs/ping/1.0.0", timeout_s=30)
        await asker.dht.get(account().address)
        assert len(asker.host.peers()) > 1
        with trio.fail_after(60):
            while [info.peer_id for info in asker.host.peers()] != [peers[0].host.peer_id]:
                for peer in peers:
                    await peer.dht.calls._reap(trio.current_time() + 1)
                await trio.sleep(0.05)
        kept.reset_nowait()
        assert await asker.dht.put(asker.record(1)) == 5, "and are made again when needed"


@trio_test
async def test_after_the_dht_ends_the_host_serves_it_no_more() -> None:
    async with host({}) as running, dht_peer() as asker:
        async with open_dht(running):
            await asker.host.connect(running.addresses[0], timeout_s=30)
            await eventually(lambda: peer_id_bytes(running.peer_id) in asker.dht.table)
        with pytest.raises(Exception, match="does not speak it"):
            await asker.host.open_stream(running.peer_id, KAD, timeout_s=30)


@trio_test
async def test_a_wildcard_address_is_never_told_to_others() -> None:
    async with host({}, listen=("/ip4/0.0.0.0/tcp/0",)) as running:
        async with open_dht(running) as dht:
            assert dht.own().addresses == ()
        announced = ["/ip4/192.0.2.1/tcp/4911"]
        async with open_dht(running, addresses=lambda: announced) as dht:
            assert dht.own().addresses == (multiaddr_bytes(announced[0]),)
