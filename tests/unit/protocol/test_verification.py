"""Every rule of verification, each with a forged receipt that breaks it alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.receipts import FIRST_PREVIOUS, Meter, Outcome, ReceiptLink, SignedReceipt, TaskReceipt
from ngpu_protocol.verification import RULES, Observed, Verdict, broken_rules, verify_receipt
from tests.unit.protocol.samples import (
    CHAIN_ID,
    NODE,
    REQUEST,
    RESPONSE,
    SENT_AT_MS,
    STRANGER,
    a_receipt,
    an_order,
    everything_seen,
    nothing_seen,
    sha256,
    signed_by,
)

PREDECESSOR = ReceiptLink(6, sha256(b"receipt 6"))
ANOTHER_HASH = sha256(b"something else")
OFFERED = frozenset(a_receipt().gpus)


def judge(
    receipt: TaskReceipt,
    seen: Observed | None = None,
    *,
    signer: Account = NODE,
    last: ReceiptLink | None = PREDECESSOR,
    **options: Any,
) -> tuple[Verdict, set[str]]:
    """Return the verdict and the names of all rules broken."""
    arguments: Any = {"last": last, "chain_id": CHAIN_ID, "offered_gpus": OFFERED, **options}
    seen = seen or everything_seen()
    signed = signed_by(signer, receipt)
    return (
        verify_receipt(signed, an_order(), seen, **arguments),
        set(broken_rules(signed, an_order(), seen, **arguments)),
    )


def assert_verified(receipt: TaskReceipt, seen: Observed | None = None, **options: Any) -> None:
    verdict, broken = judge(receipt, seen, **options)
    assert verdict == Verdict(VerdictKind.VERIFIED)
    assert not broken


def assert_breaks(rule: str, receipt: TaskReceipt, seen: Observed | None = None, **options: Any) -> Verdict:
    verdict, broken = judge(receipt, seen, **options)
    assert broken == {rule}
    assert verdict.rule == rule
    assert verdict.kind == (VerdictKind.SKEW if rule == "times" else VerdictKind.DISPUTED)
    assert verdict.expected != verdict.actual
    return verdict


def test_honest_receipt_is_verified() -> None:
    assert_verified(a_receipt())


# rule, what the forger changes, who signs
FORGERIES: list[tuple[str, dict[str, Any], Account]] = [
    ("signer", {}, STRANGER),
    ("order_hash", {"order_hash": an_order(attempt=2).digest(CHAIN_ID)}, NODE),
    ("order_hash", {"order_hash": an_order().digest(network_named("main").chain_id)}, NODE),
    ("node", {"node": STRANGER.address}, NODE),
    ("bootstrap", {"bootstrap": STRANGER.address}, NODE),
    ("outcome", {"outcome": "Complete"}, NODE),
    ("request_bytes", {"request_bytes": len(REQUEST) + 1}, NODE),
    ("request_bytes", {"request_bytes": len(REQUEST) - 1}, NODE),
    ("request_hash", {"request_hash": ANOTHER_HASH}, NODE),
    ("status", {"status": 500}, NODE),
    ("response_bytes", {"response_bytes": len(RESPONSE) + 1}, NODE),
    ("response_bytes", {"response_bytes": len(RESPONSE) - 1}, NODE),
    ("response_hash", {"response_hash": ANOTHER_HASH}, NODE),
    ("duration", {"duration_ms": 926, "ended_at_ms": SENT_AT_MS + 929}, NODE),
    ("gpus", {"gpus": (a_receipt().gpus[0],) * 2}, NODE),
    ("gpus", {"gpus": (a_receipt().gpus[0], ANOTHER_HASH)}, NODE),
    ("reserved", {"reserved_gpu_ms": 1801}, NODE),
    ("reserved", {"gpus": (), "reserved_gpu_ms": 1234}, NODE),
    ("busy", {"busy_gpu_ms": 1801}, NODE),
    ("meter", {"meter": "guess"}, NODE),
    ("meter", {"meter": Meter.NONE}, NODE),
    ("chain", {"previous": ANOTHER_HASH}, NODE),
    ("chain", {"sequence": 0}, NODE),
    ("chain", {"sequence": 1}, NODE),
    ("times", {"started_at_ms": SENT_AT_MS + 600_000, "ended_at_ms": SENT_AT_MS + 600_900}, NODE),
    ("times", {"started_at_ms": SENT_AT_MS - 600_000, "ended_at_ms": SENT_AT_MS - 599_100}, NODE),
    ("times", {"started_at_ms": SENT_AT_MS + 2000, "ended_at_ms": SENT_AT_MS - 3000}, NODE),
]


@pytest.mark.parametrize(("rule", "changes", "signer"), FORGERIES)
def test_forged_receipt_is_told_by_the_one_rule_it_breaks(rule: str, changes: dict[str, Any], signer: Account) -> None:
    assert_breaks(rule, a_receipt(**changes), signer=signer)


def test_every_rule_has_a_forgery() -> None:
    # `once` is about two receipts, each of which may be right
    assert [rule.name for rule in RULES if rule.name != "once"] == list(dict.fromkeys(rule for rule, _, _ in FORGERIES))


def test_an_order_is_receipted_once() -> None:
    assert_breaks("once", a_receipt(), other=ReceiptLink(41, ANOTHER_HASH))
    assert_verified(a_receipt(), other=ReceiptLink(7, a_receipt().digest(CHAIN_ID)))


def test_first_broken_rule_is_the_one_told_with_both_values() -> None:
    verdict, broken = judge(a_receipt(status=500, response_hash=ANOTHER_HASH, busy_gpu_ms=9999))
    assert verdict == Verdict(VerdictKind.DISPUTED, "status", "200", "500")
    assert broken == {"status", "response_hash", "busy"}


def test_unrecoverable_signature_is_a_verdict_not_an_exception() -> None:
    signed = replace(signed_by(NODE, a_receipt()), signature=bytes(65))
    verdict = verify_receipt(signed, an_order(), everything_seen(), last=None, chain_id=CHAIN_ID)
    assert (verdict.kind, verdict.rule) == (VerdictKind.DISPUTED, "signer")
    assert verdict.expected == NODE.address


def test_receipt_of_another_network_is_not_this_nodes() -> None:
    verdict = verify_receipt(
        signed_by(NODE, a_receipt()), an_order(), everything_seen(), last=None, chain_id=network_named("main").chain_id
    )
    assert verdict.rule == "signer"


def test_wrong_clock_with_all_else_right_is_skew_and_with_anything_wrong_a_dispute() -> None:
    ten_minutes_off = {"started_at_ms": SENT_AT_MS + 600_003, "ended_at_ms": SENT_AT_MS + 600_903}
    assert_breaks("times", a_receipt(**ten_minutes_off))
    verdict, _ = judge(a_receipt(**ten_minutes_off, status=500))
    assert (verdict.kind, verdict.rule) == (VerdictKind.DISPUTED, "status")


def test_times_may_be_off_by_the_tolerance_and_no_more() -> None:
    early = {"started_at_ms": SENT_AT_MS - 5000, "ended_at_ms": SENT_AT_MS - 4100}
    late = {"started_at_ms": SENT_AT_MS + 5005, "ended_at_ms": SENT_AT_MS + 5905}
    for times in (early, late):
        assert_verified(a_receipt(**times))
        assert_breaks("times", a_receipt(**times), tolerance_ms=4999)


def test_clock_that_stepped_during_the_task_is_skew() -> None:
    long = everything_seen(ended_at_ms=SENT_AT_MS + 20_000)
    assert_verified(a_receipt(ended_at_ms=SENT_AT_MS + 5903), long)
    assert_breaks("times", a_receipt(ended_at_ms=SENT_AT_MS + 5904), long)


def test_duration_is_held_against_the_wall_with_room_for_drift() -> None:
    assert_verified(a_receipt(duration_ms=925))
    hour = everything_seen(ended_at_ms=SENT_AT_MS + 3_600_000)
    times = {"ended_at_ms": SENT_AT_MS + 3_600_000}
    assert_verified(a_receipt(duration_ms=3_603_620, **times), hour)
    assert_breaks("duration", a_receipt(duration_ms=3_603_621, **times), hour)


def test_task_without_gpus_bills_nothing() -> None:
    assert_verified(a_receipt(gpus=(), reserved_gpu_ms=0, busy_gpu_ms=0, meter=Meter.NONE))
    assert_breaks("reserved", a_receipt(gpus=(), reserved_gpu_ms=1, busy_gpu_ms=0, meter=Meter.NONE))


def test_no_more_gpus_are_named_than_the_workspace_holds() -> None:
    assert_breaks("gpus", a_receipt(), most_gpus=len(a_receipt().gpus) - 1)
    assert_breaks("gpus", a_receipt(), most_gpus=0)
    assert_verified(a_receipt(), most_gpus=len(a_receipt().gpus))


def test_gpus_are_not_held_against_an_unknown_offer() -> None:
    assert_verified(a_receipt(gpus=(ANOTHER_HASH, sha256(b"2"))), offered_gpus=None)


INCOMPLETE = [outcome for outcome in Outcome if outcome != Outcome.COMPLETE]


@pytest.mark.parametrize("outcome", INCOMPLETE)
def test_counts_are_bounds_and_hashes_unbound_when_the_attempt_was_cut(outcome: Outcome) -> None:
    cut = a_receipt(
        outcome=outcome,
        request_bytes=len(REQUEST) - 5,
        request_hash=sha256(REQUEST[:-5]),
        response_bytes=len(RESPONSE) + 5,
        response_hash=sha256(RESPONSE + b"12345"),
    )
    assert_verified(cut)
    assert_breaks("request_bytes", replace(cut, request_bytes=len(REQUEST) + 1))
    assert_breaks("response_bytes", replace(cut, response_bytes=len(RESPONSE) - 1))


@pytest.mark.parametrize("outcome", INCOMPLETE)
def test_hashes_bind_where_counts_agree_even_when_the_attempt_was_cut(outcome: Outcome) -> None:
    assert_verified(a_receipt(outcome=outcome))
    assert_breaks("request_hash", a_receipt(outcome=outcome, request_hash=ANOTHER_HASH))
    assert_breaks("response_hash", a_receipt(outcome=outcome, response_hash=ANOTHER_HASH))


def test_workspace_that_gave_no_answer_has_status_zero() -> None:
    seen = everything_seen(status=0, response_bytes=0, response_hash=sha256(b""))
    broke = a_receipt(outcome=Outcome.WORKSPACE_BROKE, status=0, response_bytes=0, response_hash=sha256(b""))
    assert_verified(broke, seen)
    assert_breaks("status", replace(broke, status=200), seen)
    assert_breaks("status", replace(broke, outcome=Outcome.COMPLETE), seen)  # no answer, and yet complete


def test_status_is_not_judged_when_no_head_arrived() -> None:
    gone = a_receipt(outcome=Outcome.CLIENT_GONE, response_bytes=999)
    assert_verified(replace(gone, status=200), everything_seen(status=None))
    assert_verified(replace(gone, status=0), everything_seen(status=None))


def test_what_was_not_seen_is_not_judged() -> None:
    changes = {
        "request_bytes": 1,
        "request_hash": ANOTHER_HASH,
        "status": 404,
        "response_bytes": 2,
        "response_hash": ANOTHER_HASH,
        "duration_ms": 10_000_000,
        "started_at_ms": 0,
        "ended_at_ms": 10_000_000,
    }
    assert_verified(a_receipt(**changes), nothing_seen())
    for name in ("request_bytes", "request_hash", "status", "response_bytes", "response_hash"):
        forged = a_receipt(**{name: changes[name]})
        assert_breaks(name, forged)
        assert_verified(forged, everything_seen(**{name: None}))
    # a hash covers as many bytes as the count says; without the count it says nothing
    assert_verified(a_receipt(request_hash=ANOTHER_HASH), everything_seen(request_bytes=None))
    assert_verified(a_receipt(response_hash=ANOTHER_HASH), everything_seen(response_bytes=None))


def test_claims_are_judged_even_when_nothing_was_seen() -> None:
    assert_breaks("busy", a_receipt(busy_gpu_ms=1801), nothing_seen())
    assert_breaks("reserved", a_receipt(reserved_gpu_ms=1801), nothing_seen())
    assert_breaks("status", a_receipt(status=0), nothing_seen())
    assert_breaks("times", a_receipt(ended_at_ms=SENT_AT_MS + 10_000), nothing_seen())


def test_first_receipt_of_a_chain_has_no_predecessor() -> None:
    first = a_receipt(sequence=1, previous=FIRST_PREVIOUS)
    assert_verified(first, last=None)
    assert_verified(first, last=ReceiptLink(0, FIRST_PREVIOUS))
    assert_breaks("chain", replace(first, previous=ANOTHER_HASH), last=None)


def test_link_is_not_judged_across_a_gap() -> None:
    for last in (None, ReceiptLink(5, ANOTHER_HASH), ReceiptLink(9, ANOTHER_HASH)):
        assert_verified(a_receipt(), last=last)


def test_second_receipt_for_one_number_breaks_the_chain_and_a_repeat_does_not() -> None:
    receipt = a_receipt()
    assert_verified(receipt, last=ReceiptLink(7, receipt.digest(CHAIN_ID)))
    assert_breaks("chain", a_receipt(busy_gpu_ms=1), last=ReceiptLink(7, receipt.digest(CHAIN_ID)))


@given(
    sent=st.integers(0, 500),
    received=st.integers(0, 500),
    node_sent=st.integers(0, 500),
    arrived=st.integers(0, 500),
    outcome=st.sampled_from(list(Outcome)),
)
def test_honest_bodies_are_verified_whatever_was_cut_and_impossible_ones_never(
    sent: int, received: int, node_sent: int, arrived: int, outcome: Outcome
) -> None:
    """One body of 500 bytes each way; each side hashes the part it had."""
    body = bytes(range(250)) * 2
    seen = everything_seen(
        request_hash=sha256(body[:sent]),
        request_bytes=sent,
        response_hash=sha256(body[:arrived]),
        response_bytes=arrived,
    )
    receipt = a_receipt(
        outcome=outcome,
        request_hash=sha256(body[:received]),
        request_bytes=received,
        response_hash=sha256(body[:node_sent]),
        response_bytes=node_sent,
    )
    verdict, _ = judge(receipt, seen)
    if outcome == Outcome.COMPLETE:
        possible = received == sent and node_sent == arrived
    else:
        possible = received <= sent and node_sent >= arrived
    assert (verdict.kind == VerdictKind.VERIFIED) == possible


@given(data=st.data())
def test_no_receipt_makes_verification_raise(data: Any) -> None:
    from ngpu_protocol.receipts import RECEIPT_TYPE
    from tests.unit.protocol.samples import records_of

    receipt = data.draw(records_of(RECEIPT_TYPE))
    signature = data.draw(st.binary(min_size=65, max_size=65))
    signed = SignedReceipt(receipt, signature, b"")
    verdict = verify_receipt(signed, an_order(), everything_seen(), last=PREDECESSOR, chain_id=CHAIN_ID)
    assert verdict.kind == VerdictKind.DISPUTED
