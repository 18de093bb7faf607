"""Dispute files: sound ones show what they show, and any change to one is found out by a rule."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.acknowledgements import VerdictKind, sign_acknowledgement
from ngpu_protocol.dispute_file import (
    Contradiction,
    Dispute,
    DisputeFile,
    Finding,
    Kind,
    check_dispute_file,
    from_document,
    from_json,
    to_document,
    to_json,
)
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account
from ngpu_protocol.observations import Evidence, Observation, SignedObservation, listed_gpus, sign_observation
from ngpu_protocol.orders import sign_order
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import ReceiptLink, TaskReceipt, sign_receipt
from ngpu_protocol.stand_ins import StandIn, sign_stand_in
from ngpu_protocol.verification import Observed, verify_receipt
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
    signed_by,
)

OTHER_HASH = b"\x77" * 32


STOOD_IN = sign_stand_in(StandIn(BOOTSTRAP.address, STRANGER.address, SENT_AT_MS), BOOTSTRAP, CHAIN_ID)


def a_dispute(
    receipt: TaskReceipt, evidence: Evidence, *, by: Account = NODE, judge: Account = BOOTSTRAP, **said: Any
) -> Dispute:
    """What a bootstrap makes of *receipt*; *said* changes its observation."""
    order, signed = an_order(), signed_by(by, receipt)
    verdict = verify_receipt(
        signed,
        order,
        evidence.seen,
        last=evidence.previous,
        chain_id=CHAIN_ID,
        tolerance_ms=evidence.tolerance_ms,
        offered_gpus=evidence.offered_gpus,
        most_gpus=evidence.most_gpus,
    )
    assert verdict.kind is VerdictKind.DISPUTED
    ack = replace(
        an_acknowledgement(receipt, verdict=VerdictKind.DISPUTED, reason=verdict.rule), bootstrap=judge.address
    )
    observation = Observation(
        receipt_hash=receipt.digest(CHAIN_ID),
        node=NODE.address,
        bootstrap=judge.address,
        rule=verdict.rule,
        expected=verdict.expected,
        actual=verdict.actual,
        seen=evidence.to_text(),
        at_ms=SENT_AT_MS,
    )
    return Dispute(
        ReceiptFile(
            order=sign_order(order, BOOTSTRAP, CHAIN_ID),
            receipt=signed,
            acknowledgement=sign_acknowledgement(ack, judge, CHAIN_ID),
            chain_id=CHAIN_ID,
            stand_in=None if judge is BOOTSTRAP else STOOD_IN,
        ),
        sign_observation(replace(observation, **said), judge, CHAIN_ID),
    )


def disputes() -> dict[str, tuple[Dispute, Finding]]:
    seen = everything_seen()
    gpus = a_receipt().gpus
    return {
        "another answer": (
            a_dispute(a_receipt(), Evidence(replace(seen, response_hash=OTHER_HASH))),
            Finding.STATED,
        ),
        "longer than it was": (
            a_dispute(a_receipt(), Evidence(replace(seen, ended_at_ms=SENT_AT_MS + 3))),
            Finding.STATED,
        ),
        "gpus never offered": (a_dispute(a_receipt(), Evidence(seen, offered_gpus=gpus[:1])), Finding.STATED),
        "more gpus than ordered": (a_dispute(a_receipt(), Evidence(seen, most_gpus=1)), Finding.STATED),
        "second for its number": (
            a_dispute(a_receipt(sequence=4), Evidence(seen, ReceiptLink(4, OTHER_HASH))),
            Finding.STATED,
        ),
        "busier than reserved": (a_dispute(a_receipt(busy_gpu_ms=5000), Evidence(seen)), Finding.PROVEN),
        "busy without a meter": (a_dispute(a_receipt(meter="none"), Evidence(seen)), Finding.PROVEN),
        "of another order": (a_dispute(a_receipt(order_hash=OTHER_HASH), Evidence(seen)), Finding.STATED),
        "not signed by the node": (a_dispute(a_receipt(), Evidence(seen), by=STRANGER), Finding.NOT_THE_NODES),
        "judged by a sibling": (
            a_dispute(a_receipt(busy_gpu_ms=5000), Evidence(seen), judge=STRANGER),
            Finding.PROVEN,
        ),
    }


def broken(file: DisputeFile) -> list[str]:
    results, finding = check_dispute_file(file)
    rules = [result.rule for result in results if not result.holds]
    assert (finding is Finding.UNSOUND) == bool(rules)
    return rules


@pytest.mark.parametrize("name", list(disputes()))
def test_a_sound_dispute_shows_what_it_shows_and_round_trips(name: str) -> None:
    file, finding = disputes()[name]
    assert check_dispute_file(file)[1] is finding, check_dispute_file(file)[0]
    assert broken(file) == []
    again = from_json(to_json(file))
    assert again == file
    assert to_document(again) == to_document(file)


def test_a_bootstrap_that_says_what_its_own_sight_does_not_bear_out_is_found_out() -> None:
    honest = Evidence(everything_seen())
    receipt = a_receipt()
    file = a_dispute(receipt, Evidence(replace(everything_seen(), response_hash=OTHER_HASH)))
    assert file.observation is not None
    invented = replace(file.observation.observation, seen=honest.to_text())
    assert broken(replace(file, observation=sign_observation(invented, BOOTSTRAP, CHAIN_ID))) == ["breach"]
    other_values = replace(file.observation.observation, expected="0x00")
    assert broken(replace(file, observation=sign_observation(other_values, BOOTSTRAP, CHAIN_ID))) == ["breach"]


def test_each_part_must_be_signed_by_its_own_and_speak_of_the_same() -> None:
    file, _ = disputes()["another answer"]
    assert file.observation is not None
    assert file.file.acknowledgement is not None
    said, ack = file.observation.observation, file.file.acknowledgement.acknowledgement

    def observed(changed: Observation, by: Account = BOOTSTRAP) -> DisputeFile:
        signature = by.sign(changed.digest(CHAIN_ID))
        return replace(file, observation=SignedObservation(changed, signature, b""))

    assert broken(observed(said, by=NODE)) == ["observation_signer"]
    assert broken(observed(replace(said, receipt_hash=OTHER_HASH))) == ["observation_receipt"]
    assert "observation_rule" in broken(observed(replace(said, rule="busy")))
    assert broken(observed(replace(said, seen="[]"))) == ["breach"]

    def acknowledged(**changes: Any) -> DisputeFile:
        changed = sign_acknowledgement(replace(ack, **changes), BOOTSTRAP, CHAIN_ID)
        return replace(file, file=replace(file.file, acknowledgement=changed))

    assert broken(acknowledged(verdict="verified")) == ["acknowledgement_verdict"]
    assert broken(acknowledged(receipt_hash=OTHER_HASH)) == ["acknowledgement_receipt"]
    assert broken(replace(file, file=replace(file.file, acknowledgement=None)))[0] == "acknowledgement"
    forged_order = replace(file.file.order, signature=NODE.sign(an_order().digest(CHAIN_ID)))
    assert broken(replace(file, file=replace(file.file, order=forged_order))) == ["order_signer"]


def test_a_stranger_disputes_nothing_unless_the_orderer_or_the_reader_says_that_he_counts() -> None:
    """A stranger lays his own acknowledgement and observation beside somebody's receipt."""
    file, finding = disputes()["judged by a sibling"]
    alone = replace(file, file=replace(file.file, stand_in=None))
    assert broken(alone) == ["acknowledgement_bootstrap"]
    assert check_dispute_file(alone, siblings={STRANGER.address})[1] is finding
    forged = replace(STOOD_IN, signature=STRANGER.sign(STOOD_IN.stand_in.digest(CHAIN_ID)))
    assert broken(replace(file, file=replace(file.file, stand_in=forged))) == ["acknowledgement_bootstrap"]


def test_without_an_observation_only_what_the_papers_contradict_is_shown() -> None:
    alone, _ = disputes()["busier than reserved"]
    assert check_dispute_file(replace(alone, observation=None))[1] is Finding.PROVEN
    seen, _ = disputes()["another answer"]
    assert broken(replace(seen, observation=None)) == ["breach"]


# -- contradictions ----------------------------------------------------------------------------------------------------


def an_equivocation(**changes: Any) -> Contradiction:
    second = a_receipt(**({"sequence": 4, "status": 500} | changes))
    return Contradiction(
        Kind.EQUIVOCATION,
        sign_receipt(a_receipt(sequence=4), NODE, CHAIN_ID),
        signed_by(NODE, second),
        CHAIN_ID,
    )


def test_two_receipts_for_one_number_are_proof_for_anyone() -> None:
    file = an_equivocation()
    assert check_dispute_file(file)[1] is Finding.PROVEN
    assert from_json(to_json(file)) == file


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"sequence": 5}, "same_sequence"),
        ({"status": 200}, "different_receipts"),
        ({"bootstrap": STRANGER.address}, "same_bootstrap"),
    ],
)
def test_two_receipts_that_may_both_be_true_are_no_proof(changes: dict[str, Any], rule: str) -> None:
    assert broken(an_equivocation(**changes)) == [rule]


def test_a_second_receipt_somebody_else_signed_is_no_proof() -> None:
    file = an_equivocation()
    forged = replace(file, second=signed_by(STRANGER, file.second.receipt))
    assert broken(forged) == ["second_signer"]
    assert broken(replace(file, first=signed_by(STRANGER, file.first.receipt))) == ["first_signer"]


def test_a_successor_with_another_predecessor_is_proof_for_anyone() -> None:
    first = sign_receipt(a_receipt(sequence=4), NODE, CHAIN_ID)
    second = sign_receipt(a_receipt(sequence=5, previous=OTHER_HASH), NODE, CHAIN_ID)
    file = Contradiction(Kind.BROKEN_LINK, first, second, CHAIN_ID)
    assert check_dispute_file(file)[1] is Finding.PROVEN
    true = sign_receipt(a_receipt(sequence=5, previous=first.receipt.digest(CHAIN_ID)), NODE, CHAIN_ID)
    assert broken(replace(file, second=true)) == ["another_predecessor"]
    later = sign_receipt(a_receipt(sequence=6, previous=OTHER_HASH), NODE, CHAIN_ID)
    assert broken(replace(file, second=later)) == ["next_sequence"]


# -- what is no file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "ngpu-receipt"},
        {"version": 2},
        {"kind": "gossip"},
        {"kind": None},
        {"chainId": -1},
        {"chainId": CHAIN_ID + 1},
        {"receipt": None},
        {"observation": 7},
    ],
)
def test_what_is_no_dispute_file_is_malformed(changes: dict[str, Any]) -> None:
    document = to_document(disputes()["another answer"][0]) | changes
    with pytest.raises(MalformedError):
        from_document(document)


json_values = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
hashes = st.binary(min_size=32, max_size=32)
numbers = st.none() | st.integers(0, 2**60)


@given(json_values)
def test_evidence_of_any_text_is_evidence_or_malformed(value: Any) -> None:
    with contextlib.suppress(MalformedError):
        Evidence.of_text(json.dumps(value))


@given(
    st.builds(
        Observed,
        *(st.none() | hashes, numbers, st.none() | st.integers(0, 999), st.none() | hashes, numbers, numbers, numbers),
    ),
    st.none() | st.builds(ReceiptLink, st.integers(0, 2**60), hashes),
)
def test_evidence_is_read_as_it_was_written(seen: Observed, previous: ReceiptLink | None) -> None:
    evidence = Evidence(seen, previous, (b"\1" * 32,), 5000)
    assert Evidence.of_text(evidence.to_text()) == evidence


def test_gpus_are_listed_where_the_dispute_is_about_them() -> None:
    assert listed_gpus({b"b" * 32, b"a" * 32}, "gpus") == (b"a" * 32, b"b" * 32)
    assert listed_gpus({b"a" * 32}, "busy") is None
    assert listed_gpus(None, "gpus") is None
