"""The receipt file round-trips and tells which rule fails."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.acknowledgements import Acknowledgement, VerdictKind, sign_acknowledgement
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.orders import TaskOrder, sign_order
from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from ngpu_protocol.receipts import ReceiptLink, TaskReceipt
from ngpu_protocol.stand_ins import SignedStandIn, StandIn, checked_stand_in, sign_stand_in
from tests.unit.protocol.samples import (
    BOOTSTRAP,
    CHAIN_ID,
    NODE,
    SENT_AT_MS,
    STRANGER,
    a_receipt,
    an_acknowledgement,
    an_order,
    everything_seen,
    sha256,
    signed_by,
)


def a_file(
    order: TaskOrder | None = None, receipt: TaskReceipt | None = None, ack: Acknowledgement | None = None
) -> ReceiptFile:
    receipt = receipt or a_receipt(order)
    return ReceiptFile(
        order=sign_order(order or an_order(), BOOTSTRAP, CHAIN_ID),
        receipt=signed_by(NODE, receipt),
        acknowledgement=sign_acknowledgement(ack or an_acknowledgement(receipt), BOOTSTRAP, CHAIN_ID),
        chain_id=CHAIN_ID,
    )


def failing(file: ReceiptFile, **options: Any) -> list[str]:
    return [result.rule for result in check_receipt_file(file, **options) if not result.holds]


def test_file_round_trips_through_its_text() -> None:
    file = a_file()
    assert ReceiptFile.from_json(file.to_json()) == file
    assert ReceiptFile.from_json(file.to_json().encode()) == file
    bare = replace(file, acknowledgement=None)
    assert ReceiptFile.from_json(bare.to_json()) == bare


def test_later_versions_keys_are_ignored() -> None:
    document = a_file().to_document()
    document["note"] = "x"
    document["receipt"]["later"] = 1
    assert ReceiptFile.from_document(document) == a_file()


def test_honest_file_holds_in_every_rule() -> None:
    results = check_receipt_file(a_file())
    assert all(result.holds for result in results)
    assert [result.rule for result in results][:2] == ["order_signer", "signer"]
    assert results[-1].rule == "acknowledgement_verdict"
    assert not failing(replace(a_file(), acknowledgement=None))
    assert not failing(a_file(), seen=everything_seen(), previous=ReceiptLink(6, sha256(b"receipt 6")))


def test_each_forgery_fails_its_own_rules() -> None:
    file = a_file()
    ack = an_acknowledgement()
    other_order = sign_order(an_order(attempt=2), BOOTSTRAP, CHAIN_ID)
    assert failing(replace(file, order=replace(file.order, signature=other_order.signature))) == ["order_signer"]
    assert failing(a_file(order=an_order(), receipt=a_receipt(order_hash=bytes(32)))) == [
        "order_hash",
        "acknowledgement_verdict",
    ]
    stranger = replace(file, receipt=signed_by(STRANGER, a_receipt()))
    assert failing(stranger) == ["signer", "acknowledgement_verdict"]
    unsigned_ack = replace(file, acknowledgement=replace(file.acknowledgement, signature=bytes(65)))  # type: ignore[type-var]
    assert failing(unsigned_ack) == ["acknowledgement_signer"]
    assert failing(a_file(ack=replace(ack, receipt_hash=bytes(32)))) == ["acknowledgement_receipt"]
    assert failing(a_file(ack=replace(ack, node=STRANGER.address))) == ["acknowledgement_node"]
    assert failing(a_file(ack=replace(ack, sequence=8))) == ["acknowledgement_sequence"]
    other = sign_acknowledgement(replace(ack, bootstrap=STRANGER.address), STRANGER, CHAIN_ID)
    assert failing(replace(file, acknowledgement=other)) == ["acknowledgement_bootstrap"]


def test_a_siblings_acknowledgement_counts_by_the_orderers_word_or_the_readers() -> None:
    file = a_file()
    ack = replace(an_acknowledgement(), bootstrap=STRANGER.address)
    by_sibling = replace(file, acknowledgement=sign_acknowledgement(ack, STRANGER, CHAIN_ID))
    assert failing(by_sibling) == ["acknowledgement_bootstrap"]
    assert not failing(by_sibling, siblings={STRANGER.address})
    word = StandIn(BOOTSTRAP.address, STRANGER.address, SENT_AT_MS)
    stood_in = replace(by_sibling, stand_in=sign_stand_in(word, BOOTSTRAP, CHAIN_ID))
    assert not failing(stood_in)
    assert ReceiptFile.from_json(stood_in.to_json()) == stood_in
    assert "standIn" not in file.to_document()

    def with_word(signed: SignedStandIn) -> list[str]:
        return failing(replace(by_sibling, stand_in=signed))

    # for another, by another, of another network, altered afterwards: nobody's word for this one
    other = replace(word, sibling=NODE.address)
    assert with_word(sign_stand_in(other, BOOTSTRAP, CHAIN_ID)) == ["acknowledgement_bootstrap"]
    self_made = replace(word, bootstrap=STRANGER.address, sibling=NODE.address)
    assert with_word(sign_stand_in(self_made, STRANGER, CHAIN_ID)) == ["acknowledgement_bootstrap"]
    assert with_word(sign_stand_in(word, BOOTSTRAP, CHAIN_ID + 1)) == ["acknowledgement_bootstrap"]
    signed = sign_stand_in(word, BOOTSTRAP, CHAIN_ID)
    assert with_word(replace(signed, stand_in=replace(word, at_ms=1))) == ["acknowledgement_bootstrap"]
    assert with_word(replace(signed, signature=bytes(65))) == ["acknowledgement_bootstrap"]
    with pytest.raises(ValueError, match="cannot say who stands in"):
        sign_stand_in(word, STRANGER, CHAIN_ID)
    with pytest.raises(ValueError, match="needs nobody's word"):
        sign_stand_in(replace(word, sibling=BOOTSTRAP.address), BOOTSTRAP, CHAIN_ID)
    with pytest.raises(MalformedError, match="not 0x"):
        checked_stand_in(signed.wire, BOOTSTRAP.address, NODE.address, CHAIN_ID)


def test_dispute_over_traffic_the_file_does_not_show_is_no_breach() -> None:
    ack = an_acknowledgement(verdict=VerdictKind.DISPUTED, reason="response_hash")
    assert not failing(a_file(ack=ack))


def test_times_are_held_against_the_order_and_the_acknowledgement() -> None:
    late = a_receipt(started_at_ms=SENT_AT_MS + 600_000, ended_at_ms=SENT_AT_MS + 600_900)
    ack = an_acknowledgement(late, verdict=VerdictKind.SKEW, reason="times")
    assert failing(a_file(receipt=late, ack=ack)) == ["times"]
    long = a_receipt(duration_ms=5000, started_at_ms=SENT_AT_MS - 3000, ended_at_ms=SENT_AT_MS + 2000)
    assert failing(a_file(receipt=long)) == ["duration", "acknowledgement_verdict"]


def test_bodies_and_predecessor_are_judged_when_given() -> None:
    seen = everything_seen(response_hash=sha256(b"another body"))
    assert failing(a_file(), seen=seen) == ["response_hash", "acknowledgement_verdict"]
    assert failing(a_file(), previous=ReceiptLink(6, bytes(32))) == ["chain", "acknowledgement_verdict"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format": None},
        {"version": 2},
        {"chainId": "1"},
        {"chainId": True},
        {"chainId": -1},
        {"chainId": 2**64},
        {"order": None},
        {"receipt": []},
        {"acknowledgement": {}},
        {"acknowledgement": False},
        {"standIn": {}},
        {"standIn": False},
    ],
)
def test_damaged_file_is_malformed(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        ReceiptFile.from_document({**a_file().to_document(), **change})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, " " * 300_000, b"\xff", '{"format": "\\ud800"}']
)
def test_no_text_raises_anything_but_malformed(text: str | bytes) -> None:
    with pytest.raises(MalformedError):
        ReceiptFile.from_json(text)


PATHS = [
    (part, name) for part, document in a_file().to_document().items() if isinstance(document, dict) for name in document
]


@given(path=st.sampled_from(PATHS), value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_any_value_in_any_place_loads_and_is_checked_or_is_malformed(path: tuple[str, str], value: Any) -> None:
    document = json.loads(a_file().to_json())
    honest = document[path[0]][path[1]]
    document[path[0]][path[1]] = value
    try:
        file = ReceiptFile.from_document(document)
    except MalformedError:
        return
    assert bool(failing(file)) == (value != honest)
