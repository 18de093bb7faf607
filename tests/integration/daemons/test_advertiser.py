"""A peer's advertisement: there soon, renewed, taken back, never older than before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_daemon.advertiser import Advertiser, SequenceFile, fitted
from ngpu_protocol.capabilities import Capability
from ngpu_protocol.identity import Account
from ngpu_protocol.node_records import MAX_RECORD_BYTES, RecordGpu, RecordModel, sign_node_record
from ngpu_protocol.p2p.directory import Directory
from tests.integration.p2p.dht_peers import Peer, dht_network, dht_peer, now_ms
from tests.integration.p2p.peers import LOCAL, eventually
from tests.unit.p2p.made_records import record_of

T4 = Capability.parse("gpu:T4")


class Offer:
    """What a daemon offers, and its way to say that it changed."""

    def __init__(self, account: Account) -> None:
        self.record = record_of(account, gpus=(RecordGpu(id=bytes(32), model="T4", memory_bytes=1),))
        self.news = trio.Event()

    def change(self, **fields: object) -> None:
        self.record = self.record.model_copy(update=fields)
        self.news.set()
        self.news = trio.Event()

    async def changed(self) -> None:
        await self.news.wait()


@contextlib.asynccontextmanager
async def advertised(peer: Peer, path: Path, **settings: int) -> AsyncIterator[tuple[Advertiser, Offer]]:
    offer = Offer(peer.account)
    advertiser = Advertiser(
        peer.account,
        peer.dht,
        Directory(peer.host, peer.dht),
        SequenceFile(path / "sequence"),
        describe=lambda: offer.record,
        changed=offer.changed,
        **settings,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(advertiser.run)
        yield advertiser, offer
        nursery.cancel_scope.cancel()


async def finds(peer: Peer, capability: Capability, count: int) -> float:
    """Wait until *peer* finds so many nodes; return how long that took, in seconds."""
    began_s = trio.current_time()
    with trio.fail_after(60):
        while len(await Directory(peer.host, peer.dht).find(capability)) != count:  # noqa: ASYNC110  another peer's news
            await trio.sleep(0.05)
    return trio.current_time() - began_s


@trio_test
async def test_a_peer_is_found_within_two_seconds_and_by_what_gets_ready_later(tmp_path: Path) -> None:
    async with dht_network(6) as peers:
        for number, peer in enumerate(peers[1:4]):  # another one, where the machine stood still for a time
            async with advertised(peer, tmp_path) as (advertiser, offer):
                took_s = [await finds(peers[5], T4, 1)]
                offer.change(workspaces=(f"100{number}",))
                took_s.append(await finds(peers[4], Capability.parse(f"workspace:100{number}"), 1))
                offer.change(gpus=())
                await finds(peers[3], T4, 0)
            await advertiser.withdraw()
            if max(took_s) < 2:
                return
    raise AssertionError(took_s)


@trio_test
async def test_the_record_is_put_again_before_it_lapses(tmp_path: Path) -> None:
    async def lapses(lifetime_ms: int) -> bool:
        async with dht_network(5) as peers, advertised(peers[1], tmp_path, lifetime_ms=lifetime_ms):
            await finds(peers[4], T4, 1)
            first = found = await peers[4].dht.get(peers[1].account.address)
            while found is not None and first is not None and found.record.sequence <= first.record.sequence:
                await trio.sleep(0.05)
                found = await peers[4].dht.get(peers[1].account.address)
            return found is None

    for lifetime_ms in (1500, 6000, 24_000):  # longer, where the machine stood still for that time
        if not await lapses(lifetime_ms):
            return
    raise AssertionError("it was gone before there was a newer one")


@trio_test
async def test_a_peer_that_dies_is_gone_from_answers_within_its_lifetime(tmp_path: Path) -> None:
    async with dht_network(5) as peers:
        async with advertised(peers[1], tmp_path, lifetime_ms=1500):
            await finds(peers[4], T4, 1)
        with trio.fail_after(60):  # it neither withdraws nor puts again
            while True:
                asked_ms = now_ms()
                found = await peers[3].dht.get(peers[1].account.address, quorum=5)
                if found is None:
                    break
                assert asked_ms <= found.record.expires_at_ms, "asked for after its time"
                await trio.sleep(0.05)
        for peer in peers:
            peer.dht.store.expire(now_ms())
            assert peer.dht.store.record_count == 0


@trio_test
async def test_who_starts_before_the_others_is_known_to_them_too_when_the_first_is_gone(tmp_path: Path) -> None:
    async with dht_peer() as first, dht_peer(first) as early, advertised(early, tmp_path) as (advertiser, _):
        await eventually(lambda: advertiser.copies >= 2)
        async with dht_peer(first) as third, dht_peer(first) as fourth:
            await eventually(lambda: advertiser.copies >= 4)
            await first.host._swarm.close()
            await finds(third, T4, 1)
            await finds(fourth, T4, 1)


@trio_test
async def test_a_gpu_that_falls_ill_is_told_at_once_and_found_by_nobody(tmp_path: Path) -> None:
    async with dht_network(5) as peers, advertised(peers[1], tmp_path) as (_, offer):
        await finds(peers[4], T4, 1)
        offer.change(gpus=(RecordGpu(id=bytes(32), model="T4", memory_bytes=1, health="xid"),))
        await finds(peers[3], T4, 0)
        record = await peers[2].dht.get(peers[1].account.address)
        assert record is not None
        assert record.record.gpus[0].health == "xid"


@trio_test
async def test_a_full_disk_keeps_the_record_back_and_the_daemon_up(tmp_path: Path) -> None:
    async with dht_network(3) as peers, advertised(peers[1], tmp_path / "gone") as (advertiser, _):
        await trio.sleep(0.5)
        assert advertiser.latest is None
        await advertiser.withdraw()


@trio_test
async def test_a_peer_that_stops_is_found_no_more_at_once(tmp_path: Path) -> None:
    async with dht_network(5) as peers:
        async with advertised(peers[1], tmp_path) as (advertiser, _):
            await finds(peers[4], T4, 1)
        await advertiser.withdraw()
        assert await Directory(peers[3].host, peers[3].dht).find(T4) == []
        assert await Directory(peers[3].host, peers[3].dht).record(peers[1].account.address) is None
        async with advertised(peers[1], tmp_path):
            await finds(peers[4], T4, 1)


def test_sequences_grow_over_restarts_lost_files_and_clocks_set_back(tmp_path: Path) -> None:
    path = tmp_path / "sequence"
    first = SequenceFile(path).next(1000)
    second = SequenceFile(path).next(10)
    assert (first, second) == (1000, 1001)
    path.write_text("rubbish")
    assert SequenceFile(path).next(5000) == 5000


def test_a_record_too_large_loses_the_ends_of_its_lists_and_is_signed() -> None:
    account = Account.from_key(os.urandom(32))
    record = record_of(
        account,
        gpus=tuple(RecordGpu(id=os.urandom(32), model="T4", memory_bytes=1) for _ in range(64)),
        models=tuple(RecordModel(project="p" * 60, model=f"m{n}" * 10) for n in range(256)),
        workspaces=tuple(f"{n:060}" for n in range(256)),
    )
    small = fitted(record)
    assert len(sign_node_record(small, account, LOCAL).encode()) <= MAX_RECORD_BYTES
    assert small.gpus[0] == record.gpus[0]
    assert fitted(small) is small
    with pytest.raises(ValueError, match="without any list"):
        fitted(record_of(account).model_copy(update={"terms": "x" * 9000}))
