"""The receipt file: everything a third party needs to check one receipt offline, as JSON.

It holds the order, the receipt and, once there is one, the acknowledgement, each with its signature and with the
field names of its EIP-712 type, and the chainId; byte strings are 0x text. Any Ethereum library can check the
signatures from it without this code. An acknowledgement by a sibling of the bootstrap that ordered comes with that
one's word for it (`stand_ins`).

`check_receipt_file` judges it rule by rule: the signatures, the rules of `verification` as far as they can be judged
without having seen the traffic, and the acknowledgement. `check_acknowledgement` is the one law on that, for files of
receipts, disputes and statements alike: it speaks of this receipt, and is signed by the bootstrap that ordered, or by
one that counts in its place. That is one the file has the orderer's signed word for, or one that the reader names
himself, as a node's owner does in his configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from ngpu_protocol.acknowledgements import ACKNOWLEDGEMENT_TYPE, SignedAcknowledgement, VerdictKind
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.identity import Address
from ngpu_protocol.orders import ORDER_TYPE, SignedOrder
from ngpu_protocol.receipts import RECEIPT_TYPE, ReceiptLink, SignedReceipt
from ngpu_protocol.stand_ins import STAND_IN_TYPE, SignedStandIn
from ngpu_protocol.verification import DEFAULT_TOLERANCE_MS, RULES, Observed, broken_rules

FORMAT = "ngpu-receipt"
VERSION = 1
MAX_FILE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ReceiptFile:
    """One receipt with what it answers and what was said about it.

    Attributes:
        order: the signed order.
        receipt: the signed receipt.
        acknowledgement: the signed acknowledgement, None while there is none.
        chain_id: the network's.
        stand_in: the word of the bootstrap that ordered for the sibling that acknowledged; None where it did so itself.
    """

    order: SignedOrder
    receipt: SignedReceipt
    acknowledgement: SignedAcknowledgement | None
    chain_id: int
    stand_in: SignedStandIn | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON object."""
        acknowledgement = self.acknowledgement
        document = {
            "format": FORMAT,
            "version": VERSION,
            "chainId": self.chain_id,
            "order": ORDER_TYPE.to_json(self.order.order, self.order.signature),
            "receipt": RECEIPT_TYPE.to_json(self.receipt.receipt, self.receipt.signature),
            "acknowledgement": acknowledgement
            and ACKNOWLEDGEMENT_TYPE.to_json(acknowledgement.acknowledgement, acknowledgement.signature),
        }
        if self.stand_in is not None:
            document["standIn"] = STAND_IN_TYPE.to_json(self.stand_in.stand_in, self.stand_in.signature)
        return document

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(self.to_document(), indent=2) + "\n"

    @classmethod
    def from_document(cls, document: object) -> ReceiptFile:
        """Return the file in a JSON object; unknown keys are ignored.

        Raises:
            MalformedError: if it is not one.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise MalformedError("receipt file", f'not an object with "format": "{FORMAT}"')
        if document.get("version") != VERSION:
            raise MalformedError("receipt file", f"not version {VERSION}, which is what this program reads")
        chain_id = document.get("chainId")
        if type(chain_id) is not int or not 0 <= chain_id < 2**64:
            raise MalformedError("receipt file", "chainId must be a number")
        order, order_signature = ORDER_TYPE.from_json(document.get("order"))
        receipt, receipt_signature = RECEIPT_TYPE.from_json(document.get("receipt"))
        acknowledgement = None
        if document.get("acknowledgement") is not None:
            record, signature = ACKNOWLEDGEMENT_TYPE.from_json(document["acknowledgement"])
            wire = ACKNOWLEDGEMENT_TYPE.pack(record, signature)
            acknowledgement = SignedAcknowledgement(record, signature, wire)
        return cls(
            order=SignedOrder(order, order_signature, ORDER_TYPE.pack(order, order_signature)),
            receipt=SignedReceipt(receipt, receipt_signature, RECEIPT_TYPE.pack(receipt, receipt_signature)),
            acknowledgement=acknowledgement,
            chain_id=chain_id,
            stand_in=None if document.get("standIn") is None else SignedStandIn.from_json(document["standIn"]),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> ReceiptFile:
        """Return the file in a JSON text of at most `MAX_FILE_BYTES`.

        Raises:
            MalformedError: if it is not one.
        """
        if len(text) > MAX_FILE_BYTES:
            raise MalformedError("receipt file", f"larger than {MAX_FILE_BYTES} bytes")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MalformedError("receipt file", "not JSON") from error
        return cls.from_document(document)


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule and whether it holds; *expected* and *actual* are empty where it does."""

    rule: str
    holds: bool
    expected: str = ""
    actual: str = ""


def check_receipt_file(
    file: ReceiptFile,
    *,
    seen: Observed | None = None,
    previous: ReceiptLink | None = None,
    tolerance_ms: int = DEFAULT_TOLERANCE_MS,
    siblings: Container[Address] = (),
) -> list[RuleResult]:
    """Return one result per rule, in order.

    Args:
        file: the file.
        seen: what the reader knows of the traffic, such as the hashes of the bodies. None: nothing, and the times are
            held against the order's issue and the acknowledgement.
        previous: the receipt before this one in the chain, if the reader has it.
        tolerance_ms: how far the two clocks may be apart.
        siblings: bootstraps that stand in for the one that ordered, by the reader's own word.
    """
    order, chain_id = file.order.order, file.chain_id
    signed_ack = file.acknowledgement
    if seen is None:
        answered_at_ms = signed_ack.acknowledgement.at_ms if signed_ack else None
        seen = Observed(None, None, None, None, None, order.issued_at_ms, answered_at_ms)
    broken = broken_rules(file.receipt, order, seen, last=previous, chain_id=chain_id, tolerance_ms=tolerance_ms)
    results = [compare("order_signer", order.bootstrap, _signer(file.order.signer, chain_id))]
    for rule in RULES:
        breach = broken.get(rule.name)
        results.append(RuleResult(rule.name, breach is None, *(breach or ())))
    if signed_ack is None:
        return results
    results += check_acknowledgement(file, signed_ack, siblings)
    # The converse is no breach: the bootstrap saw the traffic, and may dispute what looks right in the file.
    ack = signed_ack.acknowledgement
    if broken and ack.verdict == VerdictKind.VERIFIED:
        expected = f"not verified, since {next(iter(broken))} is broken"
        results.append(RuleResult("acknowledgement_verdict", False, expected, ack.verdict))
    else:
        results.append(RuleResult("acknowledgement_verdict", True))
    return results


def check_acknowledgement(
    file: ReceiptFile, signed: SignedAcknowledgement, siblings: Container[Address] = ()
) -> list[RuleResult]:
    """Return one result per rule on whether *signed* is an acknowledgement of the file's receipt that counts.

    Whose receipt it is, and for whom, is the order's to say: a forged receipt may name anybody.

    Args:
        siblings: as of `check_receipt_file`.
    """
    order, receipt, chain_id = file.order.order, file.receipt.receipt, file.chain_id
    ack = signed.acknowledgement
    return [
        compare("acknowledgement_signer", ack.bootstrap, _signer(signed.signer, chain_id)),
        compare("acknowledgement_receipt", "0x" + receipt.digest(chain_id).hex(), "0x" + ack.receipt_hash.hex()),
        compare("acknowledgement_node", order.node, ack.node),
        RuleResult("acknowledgement_bootstrap", True)
        if ack.bootstrap == order.bootstrap or _stands_in(file, ack.bootstrap, siblings)
        else RuleResult(
            "acknowledgement_bootstrap",
            False,
            f"{order.bootstrap}, or one that has its signed word, or yours, to stand in for it",
            ack.bootstrap,
        ),
        compare("acknowledgement_sequence", str(receipt.sequence), str(ack.sequence)),
    ]


def _stands_in(file: ReceiptFile, sibling: Address, siblings: Container[Address]) -> bool:
    said = file.stand_in
    return sibling in siblings or (said is not None and said.says(file.order.order.bootstrap, sibling, file.chain_id))


def compare(rule: str, expected: str, actual: str) -> RuleResult:
    """Return the result of a rule that wants *actual* to be *expected*."""
    return RuleResult(rule, True) if expected == actual else RuleResult(rule, False, expected, actual)


def _signer(recover: Callable[[int], Address], chain_id: int) -> str:
    try:
        return recover(chain_id)
    except SignatureError as error:
        return str(error)
