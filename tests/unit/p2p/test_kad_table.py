"""The routing table: small, hard to fill with one's own, true to those that stay."""

from __future__ import annotations

import os

from libp2p.peer.id import ID

from ngpu_protocol.identity import Account
from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position, multiaddr_bytes
from ngpu_protocol.p2p.kad_table import BUCKET_SIZE, KadTable

OWN = ID.from_string(Account.from_key(bytes(31) + b"\x01").peer_id).to_bytes()
LAN = multiaddr_bytes("/ip4/192.168.1.2/tcp/4911")


def peer(bucket: int | None = None, address: bytes = LAN) -> KadPeer:
    """Return a made-up peer, of the given bucket of OWN's table."""
    while True:
        candidate = KadPeer(os.urandom(39), (address,))
        if bucket is None or 256 - (kad_position(candidate.id) ^ kad_position(OWN)).bit_length() == bucket:
            return candidate


def test_a_bucket_holds_twenty_and_prefers_who_was_there_first() -> None:
    table = KadTable(OWN)
    first = [peer(0) for _ in range(BUCKET_SIZE)]
    assert all(table.heard(one, 1.0) for one in first)
    late = peer(0)
    assert not table.has_room_for(late.id)
    assert not table.heard(late, 2.0)
    assert table.heard(peer(1), 2.0), "another bucket has room"
    assert table.heard(first[3], 3.0), "who is there stays"


def test_a_peer_that_failed_makes_room() -> None:
    table = KadTable(OWN)
    first = [peer(0) for _ in range(BUCKET_SIZE)]
    for one in first:
        table.heard(one, 1.0)
    table.failed(first[7].id)
    assert first[7].id in table, "one failure may be the network's"
    late = peer(0)
    assert table.has_room_for(late.id)
    assert table.heard(late, 2.0)
    assert first[7].id not in table
    assert len(table) == BUCKET_SIZE


def test_two_failures_in_a_row_and_a_peer_is_gone() -> None:
    table = KadTable(OWN)
    one = peer()
    table.heard(one, 1.0)
    table.failed(one.id)
    table.heard(one, 2.0)
    table.failed(one.id)
    assert one.id in table
    table.failed(one.id)
    assert one.id not in table
    assert not table.buckets()
    table.failed(one.id)


def test_one_public_subnet_gets_two_places_a_bucket_and_private_ones_any() -> None:
    table = KadTable(OWN)
    public = [multiaddr_bytes(f"/ip4/8.8.8.{n}/tcp/1") for n in range(4)]
    assert [table.heard(peer(0, address), 1.0) for address in public] == [True, True, False, False]
    assert table.heard(peer(0, multiaddr_bytes("/ip4/8.8.9.1/tcp/1")), 1.0)
    v6 = [multiaddr_bytes(f"/ip6/2606:4700:1:{n}::1/tcp/1") for n in range(3)]
    assert [table.heard(peer(0, address), 1.0) for address in v6] == [True, True, False]
    assert all(table.heard(peer(0), 1.0) for _ in range(5))


def test_ourselves_and_peers_without_an_address_never_enter() -> None:
    table = KadTable(OWN)
    assert not table.heard(KadPeer(OWN, (LAN,)), 1.0)
    assert not table.heard(KadPeer(os.urandom(39)), 1.0)


def test_the_closest_come_first() -> None:
    table = KadTable(OWN)
    peers = [peer() for _ in range(200)]
    kept = [one for one in peers if table.heard(one, 1.0)]
    target = kad_position(b"somewhere")
    expected = sorted(kept, key=lambda one: kad_position(one.id) ^ target)
    assert table.closest(target, 20) == expected[:20]
    assert len(table) < 150
    assert sum(count for _, count in table.buckets()) == len(table) == len(table.contacts())
