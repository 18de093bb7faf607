"""Gap claims: a bootstrap's signed word that receipts of a chain were asked for and did not come in time.

A node that signs number 20 has issued 19 numbers before it, each named by the hash in the next. When some of them never
reach the bootstrap, there is no receipt to dispute; but there is the first one after the gap, whose `previous` names
what is missing. The claim is an `Observation` about that hash, with the rule `withheld`, the numbers in `expected` and
the span in `seen`::

    {"askedAtMs": 1750000000000, "fromSequence": 11, "toSequence": 19}

It goes to the node with the next question for the gap, so that both sides hold the same evidence (`dispute_file`), and
the node can answer with the receipts, or with the acknowledgements it was given for them.

Pure.
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.observations import Observation, SignedObservation, sign_observation
from ngpu_protocol.typed_data import MAX_NUMBER

RULE: Final = "withheld"
_WHAT: Final = "gap claim"


class ClaimedGap(NamedTuple):
    """Numbers that are missing, both ends included, and since when they were asked for (UTC milliseconds)."""

    from_sequence: int
    to_sequence: int
    asked_at_ms: int

    @property
    def text(self) -> str:
        """As `Observation.expected` says it."""
        return numbers_text(self.from_sequence, self.to_sequence)


def numbers_text(first: int, last: int) -> str:
    """Return which receipts are missing, for people."""
    return f"receipts {first} to {last}" if last > first else f"receipt {first}"


def sign_gap_claim(
    gap: ClaimedGap, missing_hash: bytes, *, node: Address, account: Account, chain_id: int, now_ms: int
) -> SignedObservation:
    """Return the claim of *account* that *node* owes it the receipts of *gap*.

    Args:
        missing_hash: of the last one missing, as the receipt after it names it.
    """
    seen = {"askedAtMs": gap.asked_at_ms, "fromSequence": gap.from_sequence, "toSequence": gap.to_sequence}
    claim = Observation(
        receipt_hash=missing_hash,
        node=node,
        bootstrap=account.address,
        rule=RULE,
        expected=gap.text,
        actual="none came",
        seen=json.dumps(seen, sort_keys=True, separators=(",", ":")),
        at_ms=now_ms,
    )
    return sign_observation(claim, account, chain_id)


def claimed_gap(claim: Observation) -> ClaimedGap:
    """Return what *claim* says is missing; unknown keys of it are ignored.

    Raises:
        MalformedError: it is no gap claim.
    """
    if claim.rule != RULE:
        raise MalformedError(_WHAT, f"its rule is {claim.rule[:32]!r}, not {RULE!r}")
    try:
        seen = json.loads(claim.seen)
    except (ValueError, RecursionError):
        raise MalformedError(_WHAT, "what was seen is not JSON") from None
    values = (
        [seen.get(key) for key in ("fromSequence", "toSequence", "askedAtMs")] if isinstance(seen, dict) else [None]
    )
    if any(type(value) is not int or not 0 <= value <= MAX_NUMBER for value in values):
        raise MalformedError(_WHAT, "what was seen must be the numbers from, to and asked")
    gap = ClaimedGap(*values)
    if not 1 <= gap.from_sequence <= gap.to_sequence:
        raise MalformedError(_WHAT, f"no numbers lie from {gap.from_sequence} to {gap.to_sequence}")
    return gap


def check_gap_claim(wire: bytes, *, node: Address, bootstrap: Address, chain_id: int) -> SignedObservation:
    """Return the claim in *wire*, which should be *bootstrap*'s against *node*.

    Raises:
        MalformedError: it is not.
    """
    signed = SignedObservation.from_bytes(wire)
    claim = signed.observation
    if (claim.node, claim.bootstrap) != (node, bootstrap):
        raise MalformedError(_WHAT, "of another node or bootstrap")
    claimed_gap(claim)
    try:
        signer = signed.signer(chain_id)
    except SignatureError as error:
        raise MalformedError(_WHAT, str(error)) from None
    if signer != bootstrap:
        raise MalformedError(_WHAT, f"{bootstrap} did not sign it")
    return signed
