"""Dispute files: evidence about receipts that do not stand, for anyone to judge offline, as JSON.

Three kinds of evidence. A *dispute* is one receipt a bootstrap did not accept: the order, the receipt, the
acknowledgement that disputes it, and the observation the bootstrap judged by. Either side can make the file from its
own store. A *contradiction* is two receipts that one node signed and that cannot both be true: two for one number
(`equivocation`), or a successor that names another predecessor than the one there is (`broken_link`). Nobody needs to
be believed for it. *Withheld* are receipts that never came: the first receipt after the gap, by which the node says
that there are some, and the bootstrap's claim that it was not given them (`gap_claims`).

`check_dispute_file` judges a file rule by rule: whether everything in it is signed by whom it should be and belongs
together, and whether judging again comes to the same. A file whose rules all hold is sound; its `Finding` says what it
shows. `proven` needs no witness; `stated` is the bootstrap's word, signed, against the node's.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.gap_claims import claimed_gap
from ngpu_protocol.identity import Address
from ngpu_protocol.observations import OBSERVATION_TYPE, Evidence, SignedObservation
from ngpu_protocol.receipt_file import ReceiptFile, RuleResult, check_acknowledgement, compare
from ngpu_protocol.receipts import RECEIPT_TYPE, SignedReceipt
from ngpu_protocol.verification import Observed, Verdict, verify_receipt

FORMAT: Final = "ngpu-dispute"
VERSION: Final = 1
MAX_FILE_BYTES: Final = 1024 * 1024

_PAIRING: Final = frozenset({"order_hash", "node", "bootstrap"})
_NOTHING_SEEN: Final = Observed(None, None, None, None, None, None, None)


class Kind(StrEnum):
    """What a file is evidence of."""

    RECEIPT = "receipt"
    """A receipt the bootstrap disputes."""
    EQUIVOCATION = "equivocation"
    """Two receipts for one number of a chain."""
    BROKEN_LINK = "broken_link"
    """A receipt that names another predecessor than the one its node signed."""
    WITHHELD = "withheld"
    """Receipts that were asked for and did not come."""


class Finding(StrEnum):
    """What a sound file shows."""

    PROVEN = "proven"
    """The node signed what cannot be right; nobody needs to be believed."""
    STATED = "stated"
    """The receipt is not what the bootstrap says it saw: its signed word against the node's."""
    NOT_THE_NODES = "not_the_nodes"
    """The node did not sign the receipt: it shows nothing about the node."""
    UNSOUND = "unsound"
    """A rule of the file is broken: it shows nothing."""


@dataclass(frozen=True, slots=True)
class Dispute:
    """A receipt a bootstrap disputes.

    Attributes:
        file: order, receipt and acknowledgement.
        observation: what the bootstrap judged by; None where this side has none, as from an older bootstrap.
    """

    file: ReceiptFile
    observation: SignedObservation | None

    @property
    def kind(self) -> Kind:
        """What it is evidence of."""
        return Kind.RECEIPT

    @property
    def chain_id(self) -> int:
        """The network's."""
        return self.file.chain_id


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two receipts of one node that cannot both be true.

    Attributes:
        kind: `EQUIVOCATION` or `BROKEN_LINK`.
        first: the one that was filed first; for a broken link, the predecessor.
        second: the other one.
        chain_id: the network's.
    """

    kind: Kind
    first: SignedReceipt
    second: SignedReceipt
    chain_id: int


@dataclass(frozen=True, slots=True)
class Withheld:
    """Receipts that a node issued and its bootstrap was not given.

    Attributes:
        after: the first receipt after the gap.
        claim: the bootstrap's.
        chain_id: the network's.
    """

    after: SignedReceipt
    claim: SignedObservation
    chain_id: int

    @property
    def kind(self) -> Kind:
        """What it is evidence of."""
        return Kind.WITHHELD


DisputeFile = Dispute | Contradiction | Withheld


def to_document(file: DisputeFile) -> dict[str, Any]:
    """Return the JSON object."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "kind": file.kind.value, "chainId": file.chain_id}
    if isinstance(file, Contradiction):
        return document | {
            "first": RECEIPT_TYPE.to_json(file.first.receipt, file.first.signature),
            "second": RECEIPT_TYPE.to_json(file.second.receipt, file.second.signature),
        }
    if isinstance(file, Withheld):
        return document | {
            "after": RECEIPT_TYPE.to_json(file.after.receipt, file.after.signature),
            "claim": OBSERVATION_TYPE.to_json(file.claim.observation, file.claim.signature),
        }
    observation = file.observation
    return document | {
        "receipt": file.file.to_document(),
        "observation": observation and OBSERVATION_TYPE.to_json(observation.observation, observation.signature),
    }


def to_json(file: DisputeFile) -> str:
    """Return the file's text."""
    return json.dumps(to_document(file), indent=2) + "\n"


def from_document(document: object) -> DisputeFile:
    """Return the file in a JSON object; unknown keys are ignored.

    Raises:
        MalformedError: if it is not one.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise MalformedError("dispute file", f'not an object with "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise MalformedError("dispute file", f"not version {VERSION}, which is what this program reads")
    chain_id = document.get("chainId")
    if type(chain_id) is not int or not 0 <= chain_id < 2**64:
        raise MalformedError("dispute file", "chainId must be a number")
    match document.get("kind"):
        case Kind.RECEIPT.value:
            file = ReceiptFile.from_document(document.get("receipt"))
            if file.chain_id != chain_id:
                raise MalformedError("dispute file", "its receipt is of another network")
            observation = document.get("observation")
            return Dispute(file, None if observation is None else SignedObservation.from_json(observation))
        case Kind.EQUIVOCATION.value | Kind.BROKEN_LINK.value as kind:
            first, second = _receipt(document.get("first")), _receipt(document.get("second"))
            return Contradiction(Kind(kind), first, second, chain_id)
        case Kind.WITHHELD.value:
            return Withheld(
                _receipt(document.get("after")), SignedObservation.from_json(document.get("claim")), chain_id
            )
    raise MalformedError("dispute file", f"kind must be one of {', '.join(Kind)}")


def from_json(text: str | bytes) -> DisputeFile:
    """Return the file in a JSON text of at most `MAX_FILE_BYTES`.

    Raises:
        MalformedError: if it is not one.
    """
    if len(text) > MAX_FILE_BYTES:
        raise MalformedError("dispute file", f"larger than {MAX_FILE_BYTES} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError("dispute file", "not JSON") from error
    return from_document(document)


def _receipt(document: object) -> SignedReceipt:
    receipt, signature = RECEIPT_TYPE.from_json(document)
    return SignedReceipt(receipt, signature, RECEIPT_TYPE.pack(receipt, signature))


# -- judged ------------------------------------------------------------------------------------------------------------


def check_dispute_file(file: DisputeFile, *, siblings: Container[Address] = ()) -> tuple[list[RuleResult], Finding]:
    """Return one result per rule, in order, and what the file shows.

    Args:
        siblings: bootstraps that stand in for the one that ordered, by the reader's own word.
    """
    if isinstance(file, Contradiction):
        results = _check_contradiction(file)
        return results, Finding.PROVEN if all(one.holds for one in results) else Finding.UNSOUND
    if isinstance(file, Withheld):
        results = _check_withheld(file)
        return results, Finding.STATED if all(one.holds for one in results) else Finding.UNSOUND
    return _check_dispute(file, siblings)


def _check_contradiction(file: Contradiction) -> list[RuleResult]:
    first, second, chain_id = file.first.receipt, file.second.receipt, file.chain_id
    results = [
        compare("first_signer", first.node, _signer(file.first.signer, chain_id)),
        compare("second_signer", first.node, _signer(file.second.signer, chain_id)),
        compare("same_node", first.node, second.node),
        compare("same_bootstrap", first.bootstrap, second.bootstrap),
    ]
    before, after = first.digest(chain_id), second.digest(chain_id)
    if file.kind is Kind.EQUIVOCATION:
        return [
            *results,
            compare("same_sequence", str(first.sequence), str(second.sequence)),
            _differ("different_receipts", before, after),
        ]
    return [
        *results,
        compare("next_sequence", str(first.sequence + 1), str(second.sequence)),
        _differ("another_predecessor", before, second.previous),
    ]


def _check_withheld(file: Withheld) -> list[RuleResult]:
    after, claim, chain_id = file.after.receipt, file.claim.observation, file.chain_id
    results = [
        compare("after_signer", after.node, _signer(file.after.signer, chain_id)),
        compare("claim_signer", after.bootstrap, _signer(file.claim.signer, chain_id)),
        compare("claim_bootstrap", after.bootstrap, claim.bootstrap),
        compare("claim_node", after.node, claim.node),
        compare("claim_receipt", "0x" + after.previous.hex(), "0x" + claim.receipt_hash.hex()),
    ]
    try:
        gap = claimed_gap(claim)
    except MalformedError as error:
        return [*results, RuleResult("claim_numbers", False, "the numbers that are missing", str(error))]
    return [
        *results,
        compare("claim_numbers", str(after.sequence - 1), str(gap.to_sequence)),
        compare("claim_text", gap.text, claim.expected),
    ]


def _check_dispute(file: Dispute, siblings: Container[Address]) -> tuple[list[RuleResult], Finding]:
    order, receipt, chain_id = file.file.order.order, file.file.receipt.receipt, file.chain_id
    digest = "0x" + receipt.digest(chain_id).hex()
    results = [compare("order_signer", order.bootstrap, _signer(file.file.order.signer, chain_id))]
    rule = ""
    if file.file.acknowledgement is None:
        results.append(RuleResult("acknowledgement", False, "one that disputes the receipt", "none"))
    else:
        ack = file.file.acknowledgement.acknowledgement
        rule = ack.reason
        results += [
            *check_acknowledgement(file.file, file.file.acknowledgement, siblings),
            compare("acknowledgement_verdict", VerdictKind.DISPUTED.value, ack.verdict),
        ]
    alone = _judged(file, Evidence(_NOTHING_SEEN))
    if file.observation is None:
        # without it, only what the papers themselves contradict can be shown
        results.append(
            RuleResult("breach", True)
            if alone.rule == rule
            else RuleResult("breach", False, f"{rule}, without an observation", alone.rule or "every rule holds")
        )
    else:
        results += _check_observation(file, file.observation, digest, rule)
    if not all(one.holds for one in results):
        return results, Finding.UNSOUND
    if rule == "signer":
        return results, Finding.NOT_THE_NODES
    # which order a receipt was an answer to, only the bootstrap says: it could lay any other beside it
    proven = alone.rule == rule and rule not in _PAIRING
    return results, Finding.PROVEN if proven else Finding.STATED


def _check_observation(file: Dispute, signed: SignedObservation, digest: str, rule: str) -> list[RuleResult]:
    said, chain_id = signed.observation, file.chain_id
    acknowledgement = file.file.acknowledgement
    judge = acknowledgement.acknowledgement.bootstrap if acknowledgement is not None else said.bootstrap
    results = [
        compare("observation_signer", judge, _signer(signed.signer, chain_id)),
        compare("observation_receipt", digest, "0x" + said.receipt_hash.hex()),
        compare("observation_rule", rule, said.rule),
    ]
    try:
        again = _judged(file, Evidence.of_text(said.seen))
    except MalformedError as error:
        return [*results, RuleResult("breach", False, "what was seen", str(error))]
    # stored values are cut at 200 characters, which only a forged signer's error text can reach
    return [
        *results,
        compare("breach", f"{said.rule}: {said.expected}, not {said.actual}", _breach(again)),
    ]


def _breach(verdict: Verdict) -> str:
    if not verdict.rule:
        return "every rule holds"
    return f"{verdict.rule}: {verdict.expected[:200]}, not {verdict.actual[:200]}"


def _judged(file: Dispute, evidence: Evidence) -> Verdict:
    return verify_receipt(
        file.file.receipt,
        file.file.order.order,
        evidence.seen,
        last=evidence.previous,
        chain_id=file.chain_id,
        tolerance_ms=evidence.tolerance_ms,
        offered_gpus=evidence.offered_gpus,
        most_gpus=evidence.most_gpus,
        other=evidence.other,
    )


def _differ(rule: str, one: bytes, other: bytes) -> RuleResult:
    return RuleResult(rule, True) if one != other else RuleResult(rule, False, "two hashes", "0x" + one.hex())


def _signer(recover: Callable[[int], Address], chain_id: int) -> str:
    try:
        return recover(chain_id)
    except SignatureError as error:
        return str(error)
