"""Statements: both sides draw up the same, and a file that says anything else is told apart rule by rule."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.acknowledgements import VerdictKind, sign_acknowledgement
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.orders import sign_order
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import Meter, TaskReceipt, sign_receipt
from ngpu_protocol.statements import (
    LINE_BYTES,
    StatementFile,
    StatementLine,
    check_held,
    check_statement_file,
    draw_up,
    line_of,
    prove,
    same_account,
    sign_statement,
)
from tests.unit.protocol.samples import (
    BOOTSTRAP,
    CHAIN_ID,
    NODE,
    SENT_AT_MS,
    STRANGER,
    a_receipt,
    an_acknowledgement,
    an_order,
)

VERDICTS = [VerdictKind.VERIFIED, VerdictKind.SKEW, VerdictKind.DISPUTED]


def receipts(count: int) -> list[TaskReceipt]:
    return [
        a_receipt(
            sequence=number,
            previous=bytes(32) if number == 1 else a_receipt().previous,
            reserved_gpu_ms=1800 - number,
            busy_gpu_ms=number,
            meter=Meter.NVML_PROCESS,
        )
        for number in range(1, count + 1)
    ]


def lines(count: int) -> list[StatementLine]:
    return [line_of(receipt, VERDICTS[receipt.sequence % 3], CHAIN_ID) for receipt in receipts(count)]


def a_file(count: int = 5, **changes: Any) -> tuple[StatementFile, list[bytes]]:
    statement, leaves = draw_up(
        lines(count),
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        from_ms=SENT_AT_MS,
        to_ms=SENT_AT_MS + 1000,
        at_ms=SENT_AT_MS + 2000,
    )
    statement = replace(statement, **changes)
    signature = sign_statement(statement, BOOTSTRAP, CHAIN_ID)
    return StatementFile(statement, signature, CHAIN_ID, lines=tuple(lines(count))), leaves


def a_proof(index: int = 3) -> StatementFile:
    file, leaves = a_file()
    receipt = receipts(5)[index]
    order = an_order()
    verdict = VERDICTS[receipt.sequence % 3]
    reason = "" if verdict is VerdictKind.VERIFIED else "busy"
    ack = an_acknowledgement(receipt, verdict=verdict, reason=reason)
    receipt_file = ReceiptFile(
        order=sign_order(order, BOOTSTRAP, CHAIN_ID),
        receipt=sign_receipt(receipt, NODE, CHAIN_ID),
        acknowledgement=sign_acknowledgement(ack, BOOTSTRAP, CHAIN_ID),
        chain_id=CHAIN_ID,
    )
    return prove(file, leaves, lines(5)[index], index, receipt_file)


def broken(file: StatementFile) -> list[str]:
    return [result.rule for result in check_statement_file(file) if not result.holds]


def test_only_verified_and_skewed_receipts_are_paid_by_what_was_metered() -> None:
    metered = a_receipt(reserved_gpu_ms=900, busy_gpu_ms=300, meter=Meter.NVML_DEVICE)
    unmetered = replace(metered, busy_gpu_ms=0, meter=Meter.NONE)
    assert [line_of(metered, verdict, CHAIN_ID).billed_gpu_ms for verdict in VERDICTS] == [300, 300, 0]
    assert [line_of(unmetered, verdict, CHAIN_ID).billed_gpu_ms for verdict in VERDICTS] == [900, 900, 0]
    assert line_of(metered, "a later version's word", CHAIN_ID).billed_gpu_ms == 0


def test_totals_are_over_what_is_paid() -> None:
    statement = a_file(6)[0].statement
    paid = [number for number in range(1, 7) if number % 3 != 2]
    assert (statement.receipts, statement.paid_receipts) == (6, 4)
    assert statement.reserved_gpu_ms == sum(1800 - number for number in paid)
    assert statement.busy_gpu_ms == statement.billed_gpu_ms == sum(paid)


def test_a_line_has_the_length_on_the_wire() -> None:
    assert {len(line.encode()) for line in lines(6)} == {LINE_BYTES} == {65}


def test_both_sides_come_to_the_same() -> None:
    ours = a_file()[0].statement
    assert same_account(ours, replace(ours, at_ms=1)) == []
    assert same_account(ours, replace(ours, billed_gpu_ms=0, root=bytes(32))) == ["billed_gpu_ms", "root"]


def test_file_survives_json_and_every_rule_holds() -> None:
    for file in (a_file()[0], a_file(0)[0], *(a_proof(index) for index in range(5))):
        again = StatementFile.from_json(json.dumps(file.to_document()))
        assert again.to_document() == file.to_document()
        assert check_statement_file(again)
        assert broken(again) == []


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"receipts": 6}, ["receipts"]),
        ({"paid_receipts": 5}, ["paid_receipts"]),
        ({"reserved_gpu_ms": 1}, ["reserved_gpu_ms"]),
        ({"busy_gpu_ms": 1}, ["busy_gpu_ms"]),
        ({"billed_gpu_ms": 10**9}, ["billed_gpu_ms"]),
        ({"root": bytes(32)}, ["root"]),
    ],
)
def test_a_statement_that_does_not_follow_from_its_lines_breaks_that_rule(
    changes: dict[str, Any], rules: list[str]
) -> None:
    assert broken(a_file(**changes)[0]) == rules


def test_a_statement_signed_by_another_is_told_apart() -> None:
    file = a_file()[0]
    signature = STRANGER.sign(file.statement.digest(CHAIN_ID))
    assert broken(replace(file, signature=signature)) == ["statement_signer"]
    assert "statement_signer" in broken(replace(file, chain_id=CHAIN_ID + 1))
    with pytest.raises(ValueError, match="cannot sign"):
        sign_statement(file.statement, STRANGER, CHAIN_ID)


def test_lines_out_of_order_or_overpaid_are_told_apart_even_where_the_totals_agree() -> None:
    def redrawn(changed: list[StatementLine]) -> StatementFile:
        file = a_file()[0]
        s = file.statement
        statement, _ = draw_up(
            changed, node=s.node, bootstrap=s.bootstrap, from_ms=s.from_ms, to_ms=s.to_ms, at_ms=s.at_ms
        )
        return StatementFile(statement, sign_statement(statement, BOOTSTRAP, CHAIN_ID), CHAIN_ID, tuple(changed))

    known = lines(5)
    assert broken(redrawn([*known, known[-1]])) == ["line_order"]  # one receipt counted twice
    disputed = next(index for index, line in enumerate(known) if line.verdict == VerdictKind.DISPUTED)
    assert broken(redrawn([line._replace(billed_gpu_ms=1) if i == disputed else line for i, line in enumerate(known)]))
    assert broken(redrawn([known[0]._replace(billed_gpu_ms=10**6), *known[1:]])) == ["line_billed"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda p: replace(p, line=p.line._replace(billed_gpu_ms=p.line.billed_gpu_ms + 1)), "inclusion"),
        (lambda p: replace(p, index=p.index - 1), "inclusion"),
        (lambda p: replace(p, path=p.path[1:]), "inclusion"),
        (lambda p: replace(p, receipt=replace(p.receipt, chain_id=CHAIN_ID + 1)), "receipt_network"),
        (lambda p: replace(p, receipt=a_proof(0).inclusion.receipt), "receipt_line"),  # type: ignore[union-attr]
    ],
)
def test_a_proof_for_anything_else_breaks(change: Any, rule: str) -> None:
    proof = a_proof()
    assert rule in broken(replace(proof, inclusion=change(proof.inclusion)))


def test_a_receipt_outside_the_span_is_told_apart() -> None:
    proof = a_proof()
    statement = replace(proof.statement, to_ms=SENT_AT_MS)
    signed = replace(proof, statement=statement, signature=sign_statement(statement, BOOTSTRAP, CHAIN_ID))
    assert broken(signed) == ["receipt_span"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"chainId": -1},
        {"statement": None},
        {"lines": {}},
        {"lines": [[1, "0x", "verified", 0, 0, 0]]},
        {"lines": [[-1, "0x" + "00" * 32, "verified", 0, 0, 0]]},
        {"lines": [[1, "0x" + "00" * 32, 1, 0, 0, 0]]},
        {"lines": [[1, "0x" + "00" * 32, "verified", 0, 2**64, 0]]},
        {"inclusion": []},
        {"inclusion": {"index": 0, "line": [1], "path": []}},
        {"inclusion": {"index": 0, "line": [1, "0x" + "00" * 32, "verified", 0, 0, 0], "path": ["0x00"]}},
        {"inclusion": {"index": 0, "line": [1, "0x" + "00" * 32, "verified", 0, 0, 0], "path": [[]] * 65}},
    ],
)
def test_a_malformed_file_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        StatementFile.from_document(a_file()[0].to_document() | change)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from(["statement", "lines", "inclusion", "chainId"]), JSON)
def test_any_json_is_a_file_or_malformed(key: str, value: object) -> None:
    try:
        file = StatementFile.from_document(a_file()[0].to_document() | {key: value})
    except MalformedError:
        return
    assert check_statement_file(file)


# -- what an auditor finds who believes neither side -------------------------------------------------------------------


def held(file: StatementFile, receipt: ReceiptFile) -> list[str]:
    return [result.rule for result in check_held(file, receipt) if not result.holds]


def acknowledged(index: int, **changes: Any) -> ReceiptFile:
    proof = a_proof(index).inclusion
    assert proof is not None
    assert proof.receipt is not None
    if not changes:
        return proof.receipt
    assert proof.receipt.acknowledgement is not None
    ack = replace(proof.receipt.acknowledgement.acknowledgement, **changes)
    return replace(proof.receipt, acknowledgement=sign_acknowledgement(ack, BOOTSTRAP, CHAIN_ID))


def test_a_statement_that_leaves_out_an_acknowledged_receipt_is_shown_to_by_that_receipt() -> None:
    whole, _ = a_file()
    assert whole.lines is not None
    assert [held(whole, acknowledged(index)) for index in range(5)] == [[]] * 5
    left = [line for line in whole.lines if line.sequence != 3]
    statement, _ = draw_up(
        left,
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        from_ms=SENT_AT_MS,
        to_ms=SENT_AT_MS + 1000,
        at_ms=SENT_AT_MS + 2000,
    )
    signature = sign_statement(statement, BOOTSTRAP, CHAIN_ID)
    fraud = StatementFile(statement, signature, CHAIN_ID, lines=tuple(left))
    assert broken(fraud) == [], "by itself it is sound"
    assert held(fraud, acknowledged(2)) == ["held"]
    assert held(fraud, acknowledged(3)) == []
    # and one that states less for it than the receipt says
    cheap = [line._replace(billed_gpu_ms=0) if line.sequence == 3 else line for line in whole.lines]
    assert held(replace(whole, lines=tuple(cheap)), acknowledged(2)) == ["held"]


def test_only_a_receipt_that_had_to_be_in_a_statement_speaks_against_it() -> None:
    whole, _ = a_file()
    late = acknowledged(2, at_ms=whole.statement.at_ms + 1)
    assert held(whole, late) == ["held_in_time"]
    assert held(replace(whole, lines=None), acknowledged(2)) == ["held"]
    assert held(whole, replace(acknowledged(2), acknowledgement=None)) == ["held_acknowledged"]
    other = replace(whole, statement=replace(whole.statement, from_ms=SENT_AT_MS + 999))
    assert held(other, acknowledged(2)) == ["held_span"]


def test_a_skew_or_dispute_excuses_no_false_signature_in_a_proof() -> None:
    for index in range(5):
        proof = a_proof(index)
        assert proof.inclusion is not None
        receipt = proof.inclusion.receipt
        assert receipt is not None
        assert receipt.acknowledgement is not None
        forged = replace(receipt, acknowledgement=replace(receipt.acknowledgement, signature=bytes(65)))
        assert "receipt_rules" in broken(replace(proof, inclusion=replace(proof.inclusion, receipt=forged)))
