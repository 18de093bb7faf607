"""Orders, receipts and acknowledgements: digests as other libraries find them, and the msgpack form against rogues."""

from __future__ import annotations

import base64
import re
from dataclasses import asdict, replace
from typing import Any

import msgpack
import pytest
from eth_account import Account as ForeignAccount
from eth_account.messages import encode_typed_data
from eth_utils import keccak as foreign_keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_protocol.acknowledgements import ACKNOWLEDGEMENT_TYPE, SignedAcknowledgement, sign_acknowledgement
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import MAX_ORDER_CHARS, MAX_TARGET_CHARS, ORDER_TYPE, SignedOrder, sign_order
from ngpu_protocol.receipts import MAX_RECEIPT_GPUS, RECEIPT_TYPE, Meter, SignedReceipt, sign_receipt
from ngpu_protocol.typed_data import SignedType
from tests.unit.protocol.samples import (
    BOOTSTRAP,
    CHAIN_ID,
    NODE,
    STRANGER,
    a_receipt,
    an_acknowledgement,
    an_order,
    records_of,
)

TYPES: list[SignedType[Any]] = [ORDER_TYPE, RECEIPT_TYPE, ACKNOWLEDGEMENT_TYPE]
SIGNED: list[Any] = [SignedOrder, SignedReceipt, SignedAcknowledgement]
SAMPLES: list[Any] = [
    sign_order(an_order(), BOOTSTRAP, CHAIN_ID),
    sign_receipt(a_receipt(), NODE, CHAIN_ID),
    sign_acknowledgement(an_acknowledgement(), BOOTSTRAP, CHAIN_ID),
]
IDS = ["order", "receipt", "acknowledgement"]
each_type = pytest.mark.parametrize("signed_type", TYPES, ids=IDS)
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=IDS)


def foreign_message(signed_type: SignedType[Any], record: Any, chain_id: int) -> dict[str, Any]:
    """Return the JSON-like typed data a wallet would be shown, written without our encoder."""
    values = [list(value) if isinstance(value, tuple) else value for value in asdict(record).values()]
    members = [part.split(" ") for part in re.search(r"\((.*)\)", signed_type.text)[1].split(",")]  # type: ignore[index]
    return {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
            ],
            signed_type.primary_type: [{"name": name, "type": kind} for kind, name in members],
        },
        "primaryType": signed_type.primary_type,
        "domain": {"name": "NGPU", "version": "1", "chainId": chain_id},
        "message": dict(zip((name for _, name in members), values, strict=True)),
    }


@each_type
@given(data=st.data(), chain_id=st.integers(0, 2**64))
@settings(max_examples=40, deadline=None)
def test_digest_is_what_eth_account_finds(signed_type: SignedType[Any], data: Any, chain_id: int) -> None:
    record = data.draw(records_of(signed_type))
    foreign = encode_typed_data(full_message=foreign_message(signed_type, record, chain_id))
    assert record.struct_hash() == foreign.body
    assert record.digest(chain_id) == foreign_keccak(b"\x19" + foreign.version + foreign.header + foreign.body)


@pytest.mark.parametrize(("sample", "account"), list(zip(SAMPLES, [BOOTSTRAP, NODE, BOOTSTRAP], strict=True)), ids=IDS)
def test_eth_account_makes_the_same_signature(sample: Any, account: Any) -> None:
    signed_type = TYPES[SAMPLES.index(sample)]
    record = getattr(sample, IDS[SAMPLES.index(sample)])
    foreign = encode_typed_data(full_message=foreign_message(signed_type, record, CHAIN_ID))
    assert ForeignAccount.sign_message(foreign, account.key_bytes).signature == sample.signature
    assert ForeignAccount.recover_message(foreign, signature=sample.signature) == account.address
    assert sample.signer(CHAIN_ID) == account.address


@pytest.mark.parametrize(("signed_type", "signed"), list(zip(TYPES, SIGNED, strict=True)), ids=IDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_record_survives_the_wire_and_json(signed_type: SignedType[Any], signed: Any, data: Any) -> None:
    record = data.draw(records_of(signed_type))
    signature = data.draw(st.binary(min_size=65, max_size=65))
    sent = signed(record, signature, signed_type.pack(record, signature))
    received = signed.decode(sent.encode())
    assert received == sent
    assert received.wire == sent.wire
    assert signed.decode(sent.encode().encode()) == sent
    assert signed_type.from_json(signed_type.to_json(record, signature)) == (record, signature)


@each_sample
def test_signature_means_nothing_on_another_network(sample: Any) -> None:
    signer = sample.signer(CHAIN_ID)
    assert sample.signer(network_named("main").chain_id) != signer


def test_nobody_signs_in_anothers_name() -> None:
    with pytest.raises(ValueError, match="cannot sign"):
        sign_order(an_order(), STRANGER, CHAIN_ID)
    with pytest.raises(ValueError, match="cannot sign"):
        sign_receipt(a_receipt(), BOOTSTRAP, CHAIN_ID)
    with pytest.raises(ValueError, match="cannot sign"):
        sign_acknowledgement(an_acknowledgement(), NODE, CHAIN_ID)


@pytest.mark.parametrize(
    "changes",
    [{"port": 65536}, {"attempt": -1}, {"revision": 2**32}, {"deadline_ms": 2**64}, {"session": b"short"}],
)
def test_our_own_value_out_of_range_is_never_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not fit|bytes where 32 belong"):
        sign_order(an_order(**changes), BOOTSTRAP, CHAIN_ID)


def test_target_longer_than_the_limit_is_neither_signed_nor_accepted() -> None:
    longest = an_order(target="/" + "a" * (MAX_TARGET_CHARS - 1))
    signed = sign_order(longest, BOOTSTRAP, CHAIN_ID)
    assert len(signed.encode()) <= MAX_ORDER_CHARS
    assert SignedOrder.decode(signed.encode()) == signed
    longer = an_order(target="/" + "a" * MAX_TARGET_CHARS)
    with pytest.raises(ValueError, match="target"):
        sign_order(longer, BOOTSTRAP, CHAIN_ID)
    with pytest.raises(MalformedError, match="target"):
        SignedOrder.from_bytes(ORDER_TYPE.pack(longer, bytes(65)))


def test_receipt_names_a_bounded_number_of_gpus() -> None:
    gpus = tuple(number.to_bytes(32, "big") for number in range(MAX_RECEIPT_GPUS + 1))
    most = sign_receipt(a_receipt(gpus=gpus[:-1]), NODE, CHAIN_ID)
    assert SignedReceipt.decode(most.encode()) == most
    with pytest.raises(ValueError, match="GPUs"):
        sign_receipt(a_receipt(gpus=gpus), NODE, CHAIN_ID)
    with pytest.raises(MalformedError):
        SignedReceipt.from_bytes(RECEIPT_TYPE.pack(a_receipt(gpus=gpus), bytes(65)))


@each_sample
def test_later_versions_fields_survive_being_passed_on(sample: Any) -> None:
    wire = msgpack.unpackb(sample.wire)
    wire["priority"] = {"class": [1, 2, b"x"]}
    received = type(sample).from_bytes(msgpack.packb(wire))
    assert received == sample
    assert received.signer(CHAIN_ID) == sample.signer(CHAIN_ID)
    assert msgpack.unpackb(type(sample).decode(received.encode()).wire)["priority"] == {"class": [1, 2, b"x"]}


@each_sample
def test_every_field_is_required_and_of_its_own_type(sample: Any) -> None:
    wire = msgpack.unpackb(sample.wire)
    wrong_values = [None, -1, 2**64 - 1, 1.5, "x", b"x", [], [b"x"], {}, True, msgpack.ExtType(5, b"x")]
    for name in wire:
        with pytest.raises(MalformedError, match=name):
            type(sample).from_bytes(msgpack.packb({key: value for key, value in wire.items() if key != name}))
        accepted = 0
        for value in wrong_values:
            try:
                type(sample).from_bytes(msgpack.packb({**wire, name: value}))
                accepted += 1
            except MalformedError:
                pass
        assert accepted <= 1, name  # a text field takes "x", detach takes True, gpus takes []


def test_signature_of_a_wrong_length_does_not_decode() -> None:
    for length in (0, 64, 66):
        with pytest.raises(MalformedError, match="signature"):
            SignedOrder.from_bytes(ORDER_TYPE.pack(an_order(), bytes(length)))


def test_numbers_beyond_sql_integers_do_not_decode() -> None:
    with pytest.raises(MalformedError, match="sequence"):
        SignedReceipt.from_bytes(RECEIPT_TYPE.pack(a_receipt(sequence=2**63), bytes(65)))


def test_unrecoverable_signature_is_a_signature_error() -> None:
    with pytest.raises(SignatureError):
        replace(SAMPLES[0], signature=bytes(65)).signer(CHAIN_ID)


@each_sample
@given(cut=st.integers(0, 400), junk=st.binary(min_size=1, max_size=8))
@settings(max_examples=40)
def test_cut_or_lengthened_bytes_do_not_decode(sample: Any, cut: int, junk: bytes) -> None:
    with pytest.raises(MalformedError):
        type(sample).from_bytes(sample.wire[: min(cut, len(sample.wire) - 1)])
    with pytest.raises(MalformedError):
        type(sample).from_bytes(sample.wire + junk)


@each_sample
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=100)
def test_damaged_bytes_never_raise_anything_else(sample: Any, position: int, value: int) -> None:
    damaged = bytearray(sample.wire)
    damaged[position % len(damaged)] = value
    try:
        received = type(sample).from_bytes(bytes(damaged))
    except MalformedError:
        return
    try:
        signer = received.signer(CHAIN_ID)
    except SignatureError:
        return
    assert (signer == sample.signer(CHAIN_ID)) == (received == sample)


@pytest.mark.parametrize("signed", SIGNED, ids=IDS)
@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_random_bytes_never_raise_anything_else(signed: Any, data: bytes) -> None:
    with pytest.raises(MalformedError):
        signed.from_bytes(data)
    with pytest.raises(MalformedError):
        signed.decode(data)
    with pytest.raises(MalformedError):
        signed.decode(base64.urlsafe_b64encode(data).rstrip(b"="))


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\x00\x00\x03\xff" * 2000,  # nested arrays, each claiming a thousand items
        b"\x91" * 4000,  # nested deeper than the decoder's stack
        b"\xdf\xff\xff\xff\xff",  # a map of four thousand million
        b"\xdb\xff\xff\xff\xffabc",  # a text of four gigabytes
        b"\x81\xa1\xff\x01",  # a key that is not UTF-8
        b"\x81\x01\x02",  # a key that is not text
        b"\x81\x90\x02",  # a key that cannot be one
        b"\x81\xd6\xff\xff\xff\xff\xff\x02",  # a timestamp as key
        b"\xc7\x0c\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",  # a timestamp out of range
    ],
)
def test_bombs_are_refused(data: bytes) -> None:
    for signed in SIGNED:
        with pytest.raises(MalformedError):
            signed.from_bytes(data)


@each_sample
def test_size_is_capped_before_anything_is_decoded(sample: Any) -> None:
    with pytest.raises(MalformedError, match="allowed"):
        type(sample).decode("A" * 20_000)
    with pytest.raises(MalformedError, match="allowed"):
        type(sample).from_bytes(bytes(20_000))
    with pytest.raises(MalformedError, match="allowed"):
        type(sample).decode(sample.encode(), max_bytes=len(sample.encode()) - 1)
    assert type(sample).decode(sample.encode(), max_bytes=len(sample.encode())) == sample


@pytest.mark.parametrize("spoil", ["={}", "{}=", "{}\n", " {}", "{}*", "{}+", "{}/", "é{}", "{}\x00"])
def test_header_text_has_one_spelling(spoil: str) -> None:
    text = SAMPLES[0].encode()
    with pytest.raises(MalformedError):
        SignedOrder.decode(spoil.format(text))


def test_billed_seconds_round_up_and_fall_back_to_reserved() -> None:
    assert a_receipt(busy_gpu_ms=0).billed_gpu_seconds() == 0
    assert a_receipt(busy_gpu_ms=1).billed_gpu_seconds() == 1
    assert a_receipt(busy_gpu_ms=2000).billed_gpu_seconds() == 2
    assert a_receipt(busy_gpu_ms=0, reserved_gpu_ms=2001, meter=Meter.NONE).billed_gpu_seconds() == 3


@each_type
def test_json_of_a_record_is_checked_like_its_wire_form(signed_type: SignedType[Any]) -> None:
    sample = SAMPLES[TYPES.index(signed_type)]
    document = signed_type.to_json(getattr(sample, signed_type.what), sample.signature)
    for name in document:
        for value in (None, 5.5, "\ud800", "0xzz", "0x", -1, 2**64 - 1, ["0x00"], {}):
            try:
                signed_type.from_json({**document, name: value})
            except MalformedError:
                continue
            assert value == "0xzz" or value == "0x", name  # which any text field may hold
    for other in (None, [], "x", 5):
        with pytest.raises(MalformedError):
            signed_type.from_json(other)
