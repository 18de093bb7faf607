"""A bootstrap's word that receipts did not come: what it must be, and what a file with it shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ngpu_protocol.dispute_file import Finding, Withheld, check_dispute_file, from_json, to_json
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.gap_claims import ClaimedGap, check_gap_claim, claimed_gap, sign_gap_claim
from ngpu_protocol.observations import Observation, SignedObservation, sign_observation
from tests.unit.protocol.samples import BOOTSTRAP, CHAIN_ID, NODE, SENT_AT_MS, STRANGER, a_receipt, signed_by

GAP = ClaimedGap(3, 8, SENT_AT_MS)
MISSING = b"\x08" * 32


def a_claim(**changes: Any) -> SignedObservation:
    signed = sign_gap_claim(
        GAP, MISSING, node=NODE.address, account=BOOTSTRAP, chain_id=CHAIN_ID, now_ms=SENT_AT_MS + 3_600_001
    )
    return sign_observation(replace(signed.observation, **changes), BOOTSTRAP, CHAIN_ID) if changes else signed


def a_file(**changes: Any) -> Withheld:
    after = signed_by(NODE, a_receipt(sequence=9, previous=MISSING))
    return Withheld(after, a_claim(**changes), CHAIN_ID)


def broken(file: Withheld) -> list[str]:
    results, finding = check_dispute_file(file)
    assert (finding is Finding.UNSOUND) == (not all(one.holds for one in results))
    return [one.rule for one in results if not one.holds]


def test_a_claim_says_which_receipts_and_since_when() -> None:
    claim = a_claim()
    assert claimed_gap(claim.observation) == GAP
    assert (claim.observation.expected, claim.observation.receipt_hash) == ("receipts 3 to 8", MISSING)
    assert ClaimedGap(4, 4, 0).text == "receipt 4"
    checked = check_gap_claim(claim.wire, node=NODE.address, bootstrap=BOOTSTRAP.address, chain_id=CHAIN_ID)
    assert checked == claim


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "chain"},
        {"seen": "{"},
        {"seen": "[]"},
        {"seen": "{}"},
        {"seen": '{"askedAtMs":1,"fromSequence":9,"toSequence":8}'},
        {"seen": '{"askedAtMs":1,"fromSequence":0,"toSequence":8}'},
        {"seen": '{"askedAtMs":true,"fromSequence":1,"toSequence":8}'},
        {"seen": "[" * 5000},
    ],
)
def test_what_is_no_claim_is_malformed(changes: dict[str, Any]) -> None:
    wire = a_claim(**changes).wire
    with pytest.raises(MalformedError):
        check_gap_claim(wire, node=NODE.address, bootstrap=BOOTSTRAP.address, chain_id=CHAIN_ID)
    assert "claim_numbers" in broken(a_file(**changes))


def test_a_claim_of_another_or_against_another_is_refused() -> None:
    for node, bootstrap, chain_id in (
        (STRANGER, BOOTSTRAP, CHAIN_ID),
        (NODE, STRANGER, CHAIN_ID),
        (NODE, BOOTSTRAP, CHAIN_ID + 1),
    ):
        with pytest.raises(MalformedError):
            check_gap_claim(a_claim().wire, node=node.address, bootstrap=bootstrap.address, chain_id=chain_id)


def test_a_sound_file_states_and_round_trips() -> None:
    file = a_file()
    results, finding = check_dispute_file(file)
    assert (finding, [one for one in results if not one.holds]) == (Finding.STATED, [])
    assert from_json(to_json(file)) == file


def test_each_part_must_be_signed_by_its_own_and_fit_the_receipt_after_the_gap() -> None:
    file = a_file()

    def claim(**changes: Any) -> Withheld:
        changed = replace(file.claim.observation, **changes)
        return replace(file, claim=SignedObservation(changed, BOOTSTRAP.sign(changed.digest(CHAIN_ID)), b""))

    def after(**changes: Any) -> Withheld:
        return replace(file, after=signed_by(NODE, a_receipt(**{"sequence": 9, "previous": MISSING, **changes})))

    forged: Observation = file.claim.observation
    by_node = replace(file, claim=SignedObservation(forged, NODE.sign(forged.digest(CHAIN_ID)), b""))
    assert broken(by_node) == ["claim_signer"]
    assert broken(claim(bootstrap=STRANGER.address)) == ["claim_bootstrap"]
    assert broken(claim(node=STRANGER.address)) == ["claim_node"]
    assert broken(claim(receipt_hash=bytes(32))) == ["claim_receipt"]
    assert broken(claim(expected="receipts 1 to 8")) == ["claim_text"]
    assert broken(after(previous=bytes(32))) == ["claim_receipt"]
    assert broken(after(sequence=10)) == ["claim_numbers"]
    assert broken(replace(file, after=signed_by(STRANGER, file.after.receipt))) == ["after_signer"]
