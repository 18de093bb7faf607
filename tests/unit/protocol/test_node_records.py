"""Node records: what is signed, what is refused and why, and that no bytes hurt."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.capabilities import Capability, CapabilityKind, capabilities_of
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_records import (
    MAX_RECORD_BYTES,
    NodeRecord,
    RecordGpu,
    RecordRefused,
    RecordRule,
    SignedNodeRecord,
    better,
    check_record,
    node_of_key,
    record_digest,
    record_key,
    sign_node_record,
)
from tests.vectors import generate
from tests.vectors.generate import AT_MS, BOOTSTRAP, NETWORK, NODE, NODE_RECORD, NODE_RECORDS

KEY = record_key(NODE.address)


def changed(**fields: Any) -> NodeRecord:
    return NODE_RECORD.model_copy(update=fields)


def value_of(record: NodeRecord, account: Account = NODE) -> bytes:
    payload = record.encode()
    return account.sign(record_digest(payload, NETWORK.chain_id)) + payload


def rule_broken(value: bytes, *, key: bytes = KEY, now_ms: int = AT_MS) -> RecordRule | None:
    try:
        check_record(key, value, network=NETWORK, now_ms=now_ms)
    except RecordRefused as refused:
        return refused.rule
    return None


@pytest.mark.parametrize("name", list(NODE_RECORDS))
def test_a_record_comes_back_as_it_was_signed(name: str) -> None:
    signed = sign_node_record(NODE_RECORDS[name], NODE, NETWORK)
    back = check_record(KEY, signed.encode(), network=NETWORK, now_ms=AT_MS)
    assert back == signed
    assert back.record == NODE_RECORDS[name]


def test_stored_values_are_accepted() -> None:
    document = json.loads((generate.FOLDER / "node-records.json").read_text())
    for vector in document["vectors"]:
        value = bytes.fromhex(vector["value"][2:])
        signed = check_record(document["key"].encode(), value, network=NETWORK, now_ms=AT_MS)
        assert signed.record.sequence == vector["sequence"]
        assert signed.payload.hex() == vector["payload"][2:]


def test_fields_of_a_later_version_are_kept_and_signed() -> None:
    wire = msgpack.unpackb(NODE_RECORD.encode())
    wire |= {"version": 7, "power": {"source": "wind"}}
    wire["gpus"][0]["colour"] = "green"
    payload = msgpack.packb(wire)
    value = NODE.sign(record_digest(payload, NETWORK.chain_id)) + payload
    signed = check_record(KEY, value, network=NETWORK, now_ms=AT_MS)
    assert signed.encode() == value
    again = msgpack.unpackb(signed.record.encode())
    assert again["power"] == {"source": "wind"}
    assert again["gpus"][0]["colour"] == "green"


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (RecordRule.OVERSIZE, bytes(MAX_RECORD_BYTES + 1)),
        (RecordRule.MALFORMED, b""),
        (RecordRule.MALFORMED, bytes(65)),
        (RecordRule.MALFORMED, value_of(changed(peer_id=BOOTSTRAP.peer_id))),
        (RecordRule.MALFORMED, value_of(NODE_RECORD) + b"\0"),
        (RecordRule.WRONG_NETWORK, value_of(changed(network="test"))),
        (RecordRule.WRONG_OWNER, value_of(changed(node=BOOTSTRAP.address, peer_id=BOOTSTRAP.peer_id), BOOTSTRAP)),
        (RecordRule.EXPIRED, value_of(changed(issued_at_ms=AT_MS - 9, expires_at_ms=AT_MS))),
        (RecordRule.LIVES_TOO_LONG, value_of(changed(expires_at_ms=AT_MS + 3_600_001))),
        (RecordRule.FROM_THE_FUTURE, value_of(changed(issued_at_ms=AT_MS + 120_001))),
        (RecordRule.BAD_SIGNATURE, value_of(NODE_RECORD, BOOTSTRAP)),
        (RecordRule.BAD_SIGNATURE, bytes(65) + NODE_RECORD.encode()),
    ],
)
def test_a_bad_record_is_refused_by_its_rule(rule: RecordRule, value: bytes) -> None:
    assert rule_broken(value) == rule


def test_any_flipped_byte_is_refused() -> None:
    value = bytearray(value_of(NODE_RECORD))
    for at in range(0, len(value), 7):
        value[at] ^= 0x01
        assert rule_broken(bytes(value)) is not None, at
        value[at] ^= 0x01
    assert rule_broken(bytes(value)) is None


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"/ngpu/node/",
        b"/pk/whatever",
        KEY.lower(),
        KEY.replace(b"0x", b""),
        KEY + b"/",
        b"\xff" + KEY,
        NODE.address.encode(),
    ],
)
def test_only_the_one_spelling_of_a_key_is_a_key(key: bytes) -> None:
    assert node_of_key(key) is None
    assert rule_broken(value_of(NODE_RECORD), key=key) == RecordRule.FOREIGN_KEY


def test_a_signature_of_another_network_is_none_here() -> None:
    test = network_named("test")
    payload = changed(network="test").encode()
    elsewhere = NODE.sign(record_digest(payload, NETWORK.chain_id)) + payload
    with pytest.raises(RecordRefused) as refused:
        check_record(KEY, elsewhere, network=test, now_ms=AT_MS)
    assert refused.value.rule == RecordRule.BAD_SIGNATURE


def test_the_higher_sequence_wins_and_the_same_never_does() -> None:
    first, second = (sign_node_record(changed(sequence=n), NODE, NETWORK) for n in (7, 8))
    assert better(second, first)
    assert not better(first, second)
    assert not better(first, first)


def test_a_record_too_large_is_not_signed() -> None:
    gpus = tuple(RecordGpu(id=os.urandom(32), model="T4", name="x" * 200, memory_bytes=1) for _ in range(40))
    with pytest.raises(ValueError, match="8192 fit"):
        sign_node_record(changed(gpus=gpus), NODE, NETWORK)
    with pytest.raises(ValueError, match="own node"):
        sign_node_record(NODE_RECORD, BOOTSTRAP, NETWORK)


def test_a_record_is_found_by_what_it_offers_and_a_withdrawn_one_by_nothing() -> None:
    assert {str(capability) for capability in capabilities_of(NODE_RECORD)} == {
        "gpu:RTX4090",
        "gpu:A100-80G-MIG",
        "workspace:1001",
        "model:acme/llama",
        "region:eu-central",
        "role:node",
    }
    assert capabilities_of(generate.WITHDRAWN) == frozenset()
    assert Capability(CapabilityKind.GPU, "RTX4090").offered_by(NODE_RECORD)


@given(st.binary(max_size=400))
def test_any_bytes_decode_or_are_malformed(data: bytes) -> None:
    for value in (data, bytes(65) + data):
        with contextlib.suppress(MalformedError):
            SignedNodeRecord.decode(value)
        assert rule_broken(value) is not None


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40)
)
_ANYTHING = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(st.dictionaries(st.sampled_from([*NodeRecord.model_fields, "later"]), _ANYTHING, max_size=4))
def test_any_field_of_any_kind_decodes_or_is_malformed(fields: dict[str, Any]) -> None:
    wire = msgpack.unpackb(NODE_RECORD.encode()) | fields
    payload = msgpack.packb(wire)
    try:
        record = NodeRecord.decode(payload)
    except MalformedError:
        return
    capabilities_of(record)
    assert NodeRecord.decode(record.encode()).encode() == record.encode()
