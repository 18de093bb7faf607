"""Receipts judged: the verdict, the acknowledgement that says it to the node, and the record that keeps both.

Owns the step from a receipt as it arrived to what is stored and sent back. The rules are
`ngpu_protocol.verification`; where the acknowledgement goes is `receipts`. Signing and recovery cost about 0.2 ms of
processor time here, and happen once for each receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from ngpu_bootstrap.store.records import NewReceipt
from ngpu_protocol.acknowledgements import (
    Acknowledgement,
    SignedAcknowledgement,
    VerdictKind,
    sign_acknowledgement,
    skew_reason,
)
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.networks import Network
from ngpu_protocol.observations import Evidence, Observation, listed_gpus, sign_observation
from ngpu_protocol.orders import TaskOrder
from ngpu_protocol.receipts import ReceiptLink, SignedReceipt
from ngpu_protocol.verification import Observed, Verdict, verify_receipt

# A receipt that breaks one of these does not speak of the answer that came: the answer is not released as its result.
# The others are about time, GPUs and the chain, which the answer itself does not suffer from.
ANSWER_RULES = frozenset(
    {
        "signer",
        "order_hash",
        "node",
        "bootstrap",
        "outcome",
        "request_bytes",
        "request_hash",
        "status",
        "response_bytes",
        "response_hash",
    }
)

LinkBefore = Callable[[Address, int, Address], ReceiptLink | None]


@dataclass(frozen=True, slots=True)
class GpuTerms:
    """Which GPUs a receipt may name; None: not known, and not judged.

    Attributes:
        offered: those of the node, by their names in receipts.
        most: how many, since the workspace holds no more.
    """

    offered: Container[bytes] | None
    most: int | None


UNKNOWN_GPUS = GpuTerms(None, None)


@dataclass(frozen=True, slots=True)
class Judged:
    """A receipt with what this bootstrap says to it."""

    receipt: SignedReceipt
    order: TaskOrder
    verdict: Verdict
    acknowledgement: SignedAcknowledgement
    record: NewReceipt

    @property
    def answer_stands(self) -> bool:
        """Whether the answer that came with the receipt may be released as the task's result."""
        return self.verdict.kind is not VerdictKind.DISPUTED or self.verdict.rule not in ANSWER_RULES


class Judge:
    """Judges receipts in the name of one bootstrap, those of its siblings' orders included.

    Args:
        link_before: the receipt before a sequence of a node in the chain of a bootstrap, where it is at hand.
    """

    def __init__(
        self,
        account: Account,
        network: Network,
        *,
        tolerance_ms: int,
        now_ms: Callable[[], int],
        link_before: LinkBefore,
    ) -> None:
        self._account = account
        self._chain_id = network.chain_id
        self._tolerance_ms = tolerance_ms
        self._now_ms = now_ms
        self._link_before = link_before

    def judge(
        self,
        signed: SignedReceipt,
        order: TaskOrder,
        seen: Observed,
        *,
        gpus: GpuTerms = UNKNOWN_GPUS,
    ) -> Judged:
        """Return the verdict on *signed*, signed by us, and its record."""
        receipt = signed.receipt
        last = self._link_before(order.node, receipt.sequence, order.bootstrap)
        verdict = verify_receipt(
            signed,
            order,
            seen,
            last=last,
            chain_id=self._chain_id,
            tolerance_ms=self._tolerance_ms,
            offered_gpus=gpus.offered,
            most_gpus=gpus.most,
        )
        evidence = None
        if verdict.kind is VerdictKind.DISPUTED:
            evidence = Evidence(
                seen,
                last,
                listed_gpus(gpus.offered, verdict.rule),
                self._tolerance_ms,
                most_gpus=gpus.most if verdict.rule == "gpus" else None,
            )
        reason = verdict.rule
        if verdict.kind is VerdictKind.SKEW:
            whole = seen.sent_at_ms is not None and seen.ended_at_ms is not None
            reason = skew_reason(reason, max(0, seen.ended_at_ms - seen.sent_at_ms) if whole else None)  # type: ignore[operator]
        return self._judged(signed, order, verdict, reason, evidence)

    def repeated(self, judged: Judged, first: ReceiptLink) -> Judged:
        """Return the same receipt disputed: its order has one already, *first*. A dispute stays what it is."""
        if judged.verdict.kind is VerdictKind.DISPUTED:
            return judged
        seen = Observed(None, None, None, None, None, None, None)
        verdict = verify_receipt(judged.receipt, judged.order, seen, last=None, chain_id=self._chain_id, other=first)
        return self._judged(judged.receipt, judged.order, verdict, verdict.rule, Evidence(seen, other=first))

    def contradicted(self, judged: Judged, first_hash: bytes) -> Judged:
        """Return the same receipt disputed: another one of its node, *first_hash*, holds its place in the chain."""
        first = ReceiptLink(judged.record.sequence, first_hash)
        expected, actual = "0x" + first_hash.hex(), "0x" + judged.record.hash.hex()
        verdict = Verdict(VerdictKind.DISPUTED, "chain", expected, actual)
        seen = Observed(None, None, None, None, None, None, None)
        return self._judged(judged.receipt, judged.order, verdict, verdict.rule, Evidence(seen, first))

    def _judged(
        self, signed: SignedReceipt, order: TaskOrder, verdict: Verdict, reason: str, evidence: Evidence | None
    ) -> Judged:
        receipt = signed.receipt
        now_ms = self._now_ms()
        receipt_hash = receipt.digest(self._chain_id)
        observation = b""
        if evidence is not None:
            observation = sign_observation(
                Observation(
                    receipt_hash=receipt_hash,
                    node=order.node,
                    bootstrap=self._account.address,
                    rule=verdict.rule,
                    expected=verdict.expected[:200],
                    actual=verdict.actual[:200],
                    seen=evidence.to_text(),
                    at_ms=now_ms,
                ),
                self._account,
                self._chain_id,
            ).wire
        acknowledgement = sign_acknowledgement(
            Acknowledgement(
                receipt_hash=receipt_hash,
                node=order.node,
                bootstrap=self._account.address,
                sequence=receipt.sequence,
                verdict=verdict.kind.value,
                reason=reason,
                at_ms=now_ms,
            ),
            self._account,
            self._chain_id,
        )
        record = NewReceipt(
            task_id=order.task_id,
            attempt=order.attempt,
            bootstrap=order.bootstrap,
            node=order.node,
            sequence=receipt.sequence,
            hash=receipt_hash,
            previous=receipt.previous,
            raw=signed.wire,
            acknowledgement=acknowledgement.wire,
            verdict=verdict.kind.value,
            rule=verdict.rule,
            expected=_kept(verdict.expected, 200),
            actual=_kept(verdict.actual, 200),
            outcome=_kept(receipt.outcome, 64),
            meter=_kept(receipt.meter, 64),
            started_at_ms=receipt.started_at_ms,
            ended_at_ms=receipt.ended_at_ms,
            duration_ms=receipt.duration_ms,
            reserved_gpu_ms=receipt.reserved_gpu_ms,
            busy_gpu_ms=receipt.busy_gpu_ms,
            received_at_ms=now_ms,
            observation=observation,
            authentic=verdict.rule != "signer",
        )
        return Judged(signed, order, verdict, acknowledgement, record)


def _kept(text: str, most: int) -> str:
    """Return a node's words as any database keeps them: PostgreSQL takes no NUL."""
    return text[:most].replace("\0", "\N{REPLACEMENT CHARACTER}")
