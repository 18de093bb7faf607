"""What a peer keeps for the DHT: bounded, expiring, never older than what it has."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ngpu_protocol.node_records import RecordRefused, RecordRule, record_key, sign_node_record
from ngpu_protocol.p2p import kad_store
from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position
from ngpu_protocol.p2p.kad_store import PROVIDER_LIFETIME_MS, PROVIDERS_PER_KEY, KadStore
from tests.unit.p2p.made_records import MADE_AT_MS, record_of
from tests.vectors.generate import NETWORK, NODE

OWN = os.urandom(39)
KEY = record_key(NODE.address)


def value(**fields: Any) -> bytes:
    return sign_node_record(record_of(NODE, **fields), NODE, NETWORK).encode()


def refusal(store: KadStore, data: bytes, key: bytes = KEY, now_ms: int = MADE_AT_MS) -> RecordRule:
    with pytest.raises(RecordRefused) as refused:
        store.put_record(key, data, now_ms)
    return refused.value.rule


def test_an_older_record_never_replaces_a_newer_one() -> None:
    store = KadStore(OWN, NETWORK)
    store.put_record(KEY, value(sequence=5), MADE_AT_MS)
    assert refusal(store, value(sequence=4)) is RecordRule.STALE
    assert refusal(store, value(sequence=5, region="elsewhere")) is RecordRule.STALE
    store.put_record(KEY, value(sequence=5), MADE_AT_MS)  # the very same again is fine
    store.put_record(KEY, value(sequence=6), MADE_AT_MS)
    held = store.record(KEY, MADE_AT_MS)
    assert held is not None
    assert held.record.sequence == 6


def test_a_record_is_gone_when_it_expires() -> None:
    store = KadStore(OWN, NETWORK)
    signed = store.put_record(KEY, value(), MADE_AT_MS)
    assert store.record(KEY, signed.record.expires_at_ms - 1) is signed
    assert store.record(KEY, signed.record.expires_at_ms) is None
    assert store.record_count == 0
    assert refusal(store, signed.encode(), now_ms=signed.record.expires_at_ms) is RecordRule.EXPIRED


@pytest.mark.parametrize("key", [b"/pk/x", b"bare", b"/ngpu/other/0x00", b"\xff\xfe"])
def test_nothing_but_node_records_is_kept(key: bytes) -> None:
    assert refusal(KadStore(OWN, NETWORK), value(), key) is RecordRule.FOREIGN_KEY


def test_a_flood_drives_out_the_far_and_not_the_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kad_store, "MAX_PROVIDER_KEYS", 100)
    store = KadStore(OWN, NETWORK)
    keys = sorted((os.urandom(34) for _ in range(400)), key=lambda key: kad_position(key) ^ kad_position(OWN))
    near = keys[:20]
    for key in near:
        assert store.add_provider(key, KadPeer(b"honest"), 0)
    for key in keys[20:]:
        store.add_provider(key, KadPeer(b"flood"), 0)
    assert all(store.providers(key, 1) for key in near)
    assert store.provider_count <= 100
    store.expire(PROVIDER_LIFETIME_MS)
    assert store.provider_count == 0


def test_a_flood_of_records_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from ngpu_protocol.identity import Account

    monkeypatch.setattr(kad_store, "MAX_RECORDS", 16)
    store = KadStore(OWN, NETWORK)
    for _ in range(40):
        account = Account.from_key(os.urandom(32))
        signed = sign_node_record(record_of(account), account, NETWORK)
        store.put_record(record_key(account.address), signed.encode(), MADE_AT_MS)
    assert store.record_count <= 16


def test_a_key_holds_512_providers_for_two_hours() -> None:
    store = KadStore(OWN, NETWORK)
    key = os.urandom(34)
    for number in range(PROVIDERS_PER_KEY):
        assert store.add_provider(key, KadPeer(number.to_bytes(39, "big")), number)
    late = KadPeer(b"late")
    assert not store.add_provider(key, late, 1000)
    assert store.add_provider(key, KadPeer((7).to_bytes(39, "big")), 1000), "who is there may renew"
    assert store.add_provider(key, late, PROVIDER_LIFETIME_MS), "the first have expired"
    assert late in store.providers(key, PROVIDER_LIFETIME_MS + 1)
    assert store.providers(key, 10**13) == []
