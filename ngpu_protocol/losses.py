"""Losses: a bootstrap's signed word that a job cannot come to an end any more, since the node that took it is gone.

Everything else about a job is proven by receipts, which nodes sign. A node that is gone signs nothing, so the bootstrap
says what it saw: which job, by the order it was submitted with, since when its node did not answer, and when it was
given up. It proves to the client that the job is over and may be submitted again, and to a third party what the
bootstrap claims of the node. It is no receipt: it has no GPU time and nothing is paid for it.

It says nothing of what the node did, so a receipt that the node brings later does not contradict it. Both stand: the
receipt is judged and paid as ever, the task stays failed.

The loss file has the loss, the order of the submission and, where the node receipted that, the receipt, as JSON.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Final

from ngpu_protocol import frozen
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.orders import ORDER_TYPE, SignedOrder
from ngpu_protocol.receipt_file import RuleResult, compare
from ngpu_protocol.receipts import RECEIPT_TYPE, SignedReceipt
from ngpu_protocol.stand_ins import STAND_IN_TYPE, SignedStandIn
from ngpu_protocol.typed_data import SignedType

FORMAT: Final = "ngpu-loss"
VERSION: Final = 1
MAX_LOSS_BYTES: Final = 4 * 1024
MAX_FILE_BYTES: Final = 256 * 1024


@frozen.dataclass(frozen=True, slots=True)
class JobLoss:
    """One job that was given up.

    Attributes:
        task_id: the job's task.
        order_hash: the digest of the order that submitted it, 32 bytes.
        node: that took it, or was taking it when it was lost.
        bootstrap: who gave it up, and signs.
        job_id: the workspace's own id of it; empty where the answer to the submission never came.
        reason: `job_node_gone`, or `node_lost` while it was submitted.
        away_since_ms: when the node first did not answer, UTC milliseconds by the bootstrap's clock.
        at_ms: when it was given up.
    """

    task_id: str
    order_hash: bytes
    node: Address
    bootstrap: Address
    job_id: str
    reason: str
    away_since_ms: int
    at_ms: int

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs."""
        return LOSS_TYPE.digest(self, chain_id)


LOSS_TYPE = SignedType(
    "JobLoss(string taskId,bytes32 orderHash,address node,address bootstrap,string jobId,string reason,"
    "uint64 awaySinceMs,uint64 atMs)",
    JobLoss,
    what="job loss",
    max_bytes=MAX_LOSS_BYTES,
)


@frozen.dataclass(frozen=True, slots=True)
class SignedLoss:
    """A loss, its signature, and the msgpack map of both."""

    loss: JobLoss
    signature: bytes
    wire: bytes

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedLoss:
        """Return the loss in a msgpack map; nothing but its form is judged.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        record, signature = LOSS_TYPE.unpack(wire)
        return cls(record, signature, wire)

    @classmethod
    def from_json(cls, document: object) -> SignedLoss:
        """Return the loss in a JSON object.

        Raises:
            MalformedError: whatever else *document* is.
        """
        record, signature = LOSS_TYPE.from_json(document)
        return cls(record, signature, LOSS_TYPE.pack(record, signature))

    def to_json(self) -> dict[str, Any]:
        """Return the loss as a JSON object with its signature."""
        return LOSS_TYPE.to_json(self.loss, self.signature)

    def signer(self, chain_id: int) -> Address:
        """Return who signed.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.loss.digest(chain_id), self.signature)


def sign_loss(loss: JobLoss, account: Account, chain_id: int) -> SignedLoss:
    """Return *loss* signed by its bootstrap.

    Raises:
        ValueError: *account* is not the loss's bootstrap.
    """
    if account.address != loss.bootstrap:
        raise ValueError(f"{account.address} cannot sign a loss of {loss.bootstrap}")
    signature = account.sign(loss.digest(chain_id))
    return SignedLoss(loss, signature, LOSS_TYPE.pack(loss, signature))


# -- as a file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LossFile:
    """A loss with what it is about.

    Attributes:
        order: that submitted the job.
        receipt: of that order; None where the node gave none (yet).
        chain_id: the network's.
        stand_in: the word of the bootstrap that ordered for the sibling that took the job over and signed its loss.
    """

    loss: SignedLoss
    order: SignedOrder
    receipt: SignedReceipt | None
    chain_id: int
    stand_in: SignedStandIn | None = None

    @property
    def is_of_its_order(self) -> bool:
        """Whether the loss names this order."""
        return self.loss.loss.order_hash == self.order.order.digest(self.chain_id)

    def to_document(self) -> dict[str, Any]:
        """Return the JSON object."""
        receipt = self.receipt
        document = {
            "format": FORMAT,
            "version": VERSION,
            "chainId": self.chain_id,
            "loss": self.loss.to_json(),
            "order": ORDER_TYPE.to_json(self.order.order, self.order.signature),
            "receipt": receipt and RECEIPT_TYPE.to_json(receipt.receipt, receipt.signature),
        }
        if self.stand_in is not None:
            document["standIn"] = STAND_IN_TYPE.to_json(self.stand_in.stand_in, self.stand_in.signature)
        return document

    @classmethod
    def from_document(cls, document: object) -> LossFile:
        """Return the file in a JSON object; unknown keys are ignored.

        Raises:
            MalformedError: if it is not one.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise MalformedError("loss file", f'not an object with "format": "{FORMAT}"')
        if document.get("version") != VERSION:
            raise MalformedError("loss file", f"not version {VERSION}, which is what this program reads")
        chain_id = document.get("chainId")
        if type(chain_id) is not int or not 0 <= chain_id < 2**64:
            raise MalformedError("loss file", "chainId must be a number")
        order, order_signature = ORDER_TYPE.from_json(document.get("order"))
        receipt = None
        if document.get("receipt") is not None:
            record, signature = RECEIPT_TYPE.from_json(document["receipt"])
            receipt = SignedReceipt(record, signature, RECEIPT_TYPE.pack(record, signature))
        return cls(
            loss=SignedLoss.from_json(document.get("loss")),
            order=SignedOrder(order, order_signature, ORDER_TYPE.pack(order, order_signature)),
            receipt=receipt,
            chain_id=chain_id,
            stand_in=None if document.get("standIn") is None else SignedStandIn.from_json(document["standIn"]),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> LossFile:
        """Return the file in a JSON text of at most `MAX_FILE_BYTES`.

        Raises:
            MalformedError: if it is not one.
        """
        if len(text) > MAX_FILE_BYTES:
            raise MalformedError("loss file", f"larger than {MAX_FILE_BYTES} bytes")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MalformedError("loss file", "not JSON") from error
        return cls.from_document(document)


def check_loss_file(file: LossFile, *, siblings: Container[Address] = ()) -> list[RuleResult]:
    """Return one result per rule, in order.

    Args:
        siblings: bootstraps that stand in for the one that ordered, by the reader's own word: one that took the job
            over signs its loss.
    """
    order, loss, chain_id = file.order.order, file.loss.loss, file.chain_id
    order_hash = order.digest(chain_id)
    results = [
        compare("order_signer", order.bootstrap, _signer(file.order, chain_id)),
        compare("loss_signer", loss.bootstrap, _signer(file.loss, chain_id)),
    ]
    said = file.stand_in
    stands_in = loss.bootstrap in siblings or (
        said is not None and said.says(order.bootstrap, loss.bootstrap, chain_id)
    )
    if stands_in or loss.bootstrap == order.bootstrap:
        results.append(RuleResult("loss_bootstrap", True))
    else:
        wanted = f"{order.bootstrap}, or one that has its signed word, or yours, to stand in for it"
        results.append(RuleResult("loss_bootstrap", False, wanted, loss.bootstrap))
    results += [
        compare("loss_order", "0x" + order_hash.hex(), "0x" + loss.order_hash.hex()),
        compare("loss_task", order.task_id, loss.task_id),
        compare("loss_node", order.node, loss.node),
    ]
    in_order = order.issued_at_ms <= loss.away_since_ms <= loss.at_ms
    times = f"{order.issued_at_ms} <= {loss.away_since_ms} <= {loss.at_ms}"
    results.append(RuleResult("loss_times", in_order, *(() if in_order else ("ordered, away, given up", times))))
    if file.receipt is not None:
        receipt = file.receipt.receipt
        results.append(compare("receipt_signer", order.node, _signer(file.receipt, chain_id)))
        results.append(compare("receipt_order", "0x" + order_hash.hex(), "0x" + receipt.order_hash.hex()))
    return results


def _signer(signed: SignedLoss | SignedOrder | SignedReceipt, chain_id: int) -> str:
    try:
        return signed.signer(chain_id)
    except SignatureError as error:
        return f"nobody ({error})"
