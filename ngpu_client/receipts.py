"""Receipts checked where the client runs: it need not believe the bootstrap that asked for them.

The rules are `ngpu_protocol.receipt_file`'s. A client knows more than a stranger: the body it sent and the one it got,
so their hashes are judged too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ngpu_client.records import Result
from ngpu_protocol.receipt_file import ReceiptFile, RuleResult, check_receipt_file
from ngpu_protocol.verification import Observed


@dataclass(frozen=True, slots=True)
class ReceiptCheck:
    """What came of checking one receipt.

    Attributes:
        file: the receipt with its order and acknowledgement.
        results: one per rule.
    """

    file: ReceiptFile
    results: tuple[RuleResult, ...]

    @property
    def holds(self) -> bool:
        """Whether every rule holds, and the bootstrap has acknowledged it as verified."""
        acknowledged = self.file.acknowledgement
        verdict = acknowledged.acknowledgement.verdict if acknowledged is not None else ""
        return verdict == "verified" and all(result.holds for result in self.results)

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the rules that do not hold."""
        return tuple(result.rule for result in self.results if not result.holds)


def check(file: ReceiptFile, result: Result | None = None) -> ReceiptCheck:
    """Return what the receipt is worth; with *result*, held against the bytes this client saw."""
    seen = None if result is None else _observed(file, result)
    return ReceiptCheck(file, tuple(check_receipt_file(file, seen=seen)))


def _observed(file: ReceiptFile, result: Result) -> Observed:
    sent, acknowledged = result.request, file.acknowledgement
    return Observed(
        request_hash=None if sent is None else hashlib.sha256(sent).digest(),
        request_bytes=None if sent is None else len(sent),
        status=None,
        response_hash=hashlib.sha256(result.content).digest(),
        response_bytes=len(result.content),
        sent_at_ms=file.order.order.issued_at_ms,
        ended_at_ms=None if acknowledged is None else acknowledged.acknowledgement.at_ms,
    )
