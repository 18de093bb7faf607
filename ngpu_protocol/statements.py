"""Statements: what the receipts of one node for one bootstrap in a span of time come to, signed by the bootstrap.

A statement covers the receipts whose `ended_at_ms` lies in ``[from_ms, to_ms)`` and that the bootstrap has
acknowledged, in the order of their sequence numbers. Both sides can draw it up from what each of them keeps, and must
come to the same: a receipt holds its end, its GPU time and its place, and the acknowledgement the verdict.

Each receipt is a `StatementLine`, 65 bytes::

    receipt hash 32 | sequence 8 | verdict 1 | reserved ms 8 | busy ms 8 | billed ms 8      numbers big-endian

The lines are the leaves of a Merkle tree (`merkle`), whose root is in the statement. So whoever holds a statement, a
contract or an auditor, can check one line against it, and with it one receipt, without seeing the others.

Billed is what is paid: busy time where it was metered, else reserved, and nothing for a disputed receipt. A receipt
with the verdict `skew` is paid on the bootstrap's own duration: never more than that, which the acknowledgement
states, times the number of GPUs.

Pure. `check_statement_file` judges a file rule by rule, as `receipt_file` does for a receipt.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

from ngpu_protocol import frozen, merkle
from ngpu_protocol.acknowledgements import VerdictKind, own_duration_ms
from ngpu_protocol.bills import BillPart, check_basis, check_bill, check_billed, compare_basis
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.receipt_file import ReceiptFile, RuleResult, check_receipt_file, compare
from ngpu_protocol.receipts import Meter, TaskReceipt
from ngpu_protocol.typed_data import MAX_NUMBER, SignedType, bytes32
from ngpu_protocol.verification import RULES

FORMAT: Final = "ngpu-statement"
VERSION: Final = 1
MAX_FILE_BYTES: Final = 512 * 1024 * 1024
"""A statement of some three million receipts."""

_LINE: Final = struct.Struct(">32sQBQQQ")
LINE_BYTES: Final = _LINE.size

VERDICT_CODES: Final = {VerdictKind.VERIFIED.value: 1, VerdictKind.SKEW.value: 2, VerdictKind.DISPUTED.value: 3}
"""The verdict's byte in a line; 0 is a later version's word, and not paid."""
PAID: Final = frozenset({VerdictKind.VERIFIED.value, VerdictKind.SKEW.value})
"""The verdicts that are paid."""


# What a receipt with this verdict breaks by its nature. Never excused: who signed the order and the acknowledgement.
_RULE_NAMES: Final = frozenset(rule.name for rule in RULES)
_EXCUSED: Final = {
    VerdictKind.VERIFIED.value: frozenset[str](),
    VerdictKind.SKEW.value: frozenset(rule.name for rule in RULES if rule.makes is VerdictKind.SKEW),
    "none": frozenset[str](),
}


class StatementLine(NamedTuple):
    """One receipt in a statement.

    Attributes:
        receipt_hash: the receipt's digest, 32 bytes.
        sequence: its number in the chain.
        verdict: the word of its acknowledgement.
        reserved_gpu_ms: as the receipt says.
        busy_gpu_ms: as the receipt says.
        billed_gpu_ms: what is paid.
    """

    receipt_hash: bytes
    sequence: int
    verdict: str
    reserved_gpu_ms: int
    busy_gpu_ms: int
    billed_gpu_ms: int

    def encode(self) -> bytes:
        """Return the 65 bytes that are a leaf of the tree."""
        return _LINE.pack(
            self.receipt_hash,
            self.sequence,
            VERDICT_CODES.get(self.verdict, 0),
            self.reserved_gpu_ms,
            self.busy_gpu_ms,
            self.billed_gpu_ms,
        )


def billed_gpu_ms(verdict: str, meter: str, reserved_gpu_ms: int, busy_gpu_ms: int) -> int:
    """Return the GPU time of one receipt that is paid, in milliseconds."""
    if verdict not in PAID:
        return 0
    return reserved_gpu_ms if meter == Meter.NONE else busy_gpu_ms


def skewed_gpu_ms(billed_ms: int, gpus: int, reason: str) -> int:
    """Return what is paid of a receipt with the verdict `skew`, whose own times are not believed.

    Args:
        billed_ms: what would be paid, were it verified.
        gpus: how many it held.
        reason: its acknowledgement's.
    """
    own_ms = own_duration_ms(reason)
    return billed_ms if own_ms is None else min(billed_ms, own_ms * gpus)


def line_of(receipt: TaskReceipt, verdict: str, chain_id: int, reason: str = "") -> StatementLine:
    """Return the line of *receipt*, acknowledged with *verdict* and *reason*."""
    billed = billed_gpu_ms(verdict, receipt.meter, receipt.reserved_gpu_ms, receipt.busy_gpu_ms)
    if verdict == VerdictKind.SKEW:
        billed = skewed_gpu_ms(billed, len(receipt.gpus), reason)
    return StatementLine(
        receipt.digest(chain_id), receipt.sequence, verdict, receipt.reserved_gpu_ms, receipt.busy_gpu_ms, billed
    )


@frozen.dataclass(frozen=True, slots=True)
class Statement:
    """What the receipts of one span come to.

    Attributes:
        node: whose receipts.
        bootstrap: whose orders they answer, and who signs.
        from_ms: receipts that ended at this moment or later, UTC milliseconds.
        to_ms: and before this one.
        receipts: how many lines there are.
        paid_receipts: how many of them are paid; the others are disputed.
        reserved_gpu_ms: sum over the paid ones.
        busy_gpu_ms: sum over the paid ones.
        billed_gpu_ms: sum over the paid ones: what is owed.
        root: of the Merkle tree over the lines, 32 bytes.
        at_ms: when it was drawn up, by the bootstrap's clock.
    """

    node: Address
    bootstrap: Address
    from_ms: int
    to_ms: int
    receipts: int
    paid_receipts: int
    reserved_gpu_ms: int
    busy_gpu_ms: int
    billed_gpu_ms: int
    root: bytes
    at_ms: int

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs."""
        return STATEMENT_TYPE.digest(self, chain_id)


STATEMENT_TYPE = SignedType(
    "Statement(address node,address bootstrap,uint64 fromMs,uint64 toMs,uint64 receipts,uint64 paidReceipts,"
    "uint64 reservedGpuMs,uint64 busyGpuMs,uint64 billedGpuMs,bytes32 root,uint64 atMs)",
    Statement,
    what="statement",
    max_bytes=4096,
)


def draw_up(
    lines: Iterable[StatementLine], *, node: Address, bootstrap: Address, from_ms: int, to_ms: int, at_ms: int
) -> tuple[Statement, list[bytes]]:
    """Return the statement over *lines*, which come by ascending sequence, and the hashes of its leaves."""
    leaves: list[bytes] = []
    paid = reserved = busy = billed = 0
    # a million lines are a usual month: each step here is a second of it
    pack, codes, sha256, add = _LINE.pack, VERDICT_CODES, hashlib.sha256, leaves.append
    for hash, sequence, verdict, line_reserved, line_busy, line_billed in lines:
        packed = pack(hash, sequence, codes.get(verdict, 0), line_reserved, line_busy, line_billed)
        add(sha256(merkle.LEAF + packed).digest())
        if verdict in PAID:
            paid += 1
            reserved += line_reserved
            busy += line_busy
            billed += line_billed
    statement = Statement(
        node=node,
        bootstrap=bootstrap,
        from_ms=from_ms,
        to_ms=to_ms,
        receipts=len(leaves),
        paid_receipts=paid,
        reserved_gpu_ms=reserved,
        busy_gpu_ms=busy,
        billed_gpu_ms=billed,
        root=merkle.tree_root(leaves),
        at_ms=at_ms,
    )
    return statement, leaves


def sign_statement(statement: Statement, account: Account, chain_id: int) -> bytes:
    """Return the bootstrap's 65-byte signature.

    Raises:
        ValueError: *account* is not the statement's bootstrap.
    """
    if account.address != statement.bootstrap:
        raise ValueError(f"{account.address} cannot sign a statement of {statement.bootstrap}")
    return account.sign(statement.digest(chain_id))


def same_account(ours: Statement, theirs: Statement) -> list[str]:
    """Return the names of the fields in which two sides' statements of one span differ, but for when they were made."""
    return [
        name for name in STATEMENT_TYPE.attributes if name != "at_ms" and getattr(ours, name) != getattr(theirs, name)
    ]


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inclusion:
    """The proof that one receipt is in a statement.

    Attributes:
        index: the line's place, from 0.
        line: the line.
        path: sibling hashes from leaf to root.
        receipt: the receipt's own file, where it is at hand.
    """

    index: int
    line: StatementLine
    path: tuple[bytes, ...]
    receipt: ReceiptFile | None = None


@dataclass(frozen=True, slots=True)
class StatementFile:
    """A signed statement with all its lines, or with the proof for one, or alone.

    Attributes:
        lines: every line in order; None where the file does not hold them.
        inclusion: the proof for one receipt.
        bill: what the receipts cost; None where the file does not say, as one of an earlier version.
    """

    statement: Statement
    signature: bytes
    chain_id: int
    lines: tuple[StatementLine, ...] | None = None
    inclusion: Inclusion | None = None
    bill: BillPart | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON object."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "chainId": self.chain_id,
            "statement": STATEMENT_TYPE.to_json(self.statement, self.signature),
        }
        if self.lines is not None:
            document["lines"] = [line_document(line) for line in self.lines]
        if self.inclusion is not None:
            receipt = self.inclusion.receipt
            document["inclusion"] = {
                "index": self.inclusion.index,
                "line": line_document(self.inclusion.line),
                "path": ["0x" + hash.hex() for hash in self.inclusion.path],
                "receipt": receipt.to_document() if receipt is not None else None,
            }
        if self.bill is not None:
            document["bill"] = self.bill.to_document()
        return document

    @classmethod
    def from_document(cls, document: object) -> StatementFile:
        """Return the file in a JSON object; unknown keys are ignored.

        Raises:
            MalformedError: if it is not one.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise MalformedError("statement file", f'not an object with "format": "{FORMAT}"')
        if document.get("version") != VERSION:
            raise MalformedError("statement file", f"not version {VERSION}, which is what this program reads")
        chain_id = document.get("chainId")
        if type(chain_id) is not int or not 0 <= chain_id < 2**64:
            raise MalformedError("statement file", "chainId must be a number")
        statement, signature = STATEMENT_TYPE.from_json(document.get("statement"))
        lines, inclusion, bill = (document.get(key) for key in ("lines", "inclusion", "bill"))
        if lines is not None and not isinstance(lines, list):
            raise MalformedError("statement file", "lines must be a list")
        return cls(
            statement=statement,
            signature=signature,
            chain_id=chain_id,
            lines=None if lines is None else tuple(map(line_from_document, lines)),
            inclusion=None if inclusion is None else _inclusion(inclusion),
            bill=None if bill is None else BillPart.from_document(bill),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> StatementFile:
        """Return the file in a JSON text of at most `MAX_FILE_BYTES`.

        Raises:
            MalformedError: if it is not one.
        """
        if len(text) > MAX_FILE_BYTES:
            raise MalformedError("statement file", f"larger than {MAX_FILE_BYTES} bytes")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MalformedError("statement file", "not JSON") from error
        return cls.from_document(document)


def line_document(line: StatementLine) -> list[Any]:
    """Return the JSON array of a line: sequence, receipt hash, verdict, reserved, busy and billed milliseconds."""
    return [
        line.sequence,
        "0x" + line.receipt_hash.hex(),
        line.verdict,
        line.reserved_gpu_ms,
        line.busy_gpu_ms,
        line.billed_gpu_ms,
    ]


def line_from_document(document: object) -> StatementLine:
    """Return the line in a JSON array.

    Raises:
        MalformedError: if it is not one.
    """
    if not isinstance(document, list) or len(document) != 6:
        raise MalformedError("statement line", "must be a list of six")
    sequence, hash, verdict, *times = document
    if any(type(value) is not int or not 0 <= value <= MAX_NUMBER for value in (sequence, *times)):
        raise MalformedError("statement line", "sequence and times must be numbers")
    if not isinstance(verdict, str):
        raise MalformedError("statement line", "the verdict must be text")
    return StatementLine(_bytes32(hash), sequence, verdict, *times)


def _inclusion(document: object) -> Inclusion:
    if not isinstance(document, dict):
        raise MalformedError("inclusion", "must be an object")
    index, path, receipt = document.get("index"), document.get("path"), document.get("receipt")
    if type(index) is not int or not 0 <= index <= MAX_NUMBER:
        raise MalformedError("inclusion", "index must be a number")
    if not isinstance(path, list) or len(path) > merkle.MAX_PATH:
        raise MalformedError("inclusion", f"path must be a list of at most {merkle.MAX_PATH} hashes")
    return Inclusion(
        index=index,
        line=line_from_document(document.get("line")),
        path=tuple(map(_bytes32, path)),
        receipt=None if receipt is None else ReceiptFile.from_document(receipt),
    )


def _bytes32(value: object) -> bytes:
    return bytes32(value, "statement file")


def prove(
    file: StatementFile,
    leaves: Sequence[bytes],
    line: StatementLine,
    index: int,
    receipt: ReceiptFile | None,
    bill: BillPart | None = None,
) -> StatementFile:
    """Return *file* with the proof for the line at *index*, and of its basis in *bill*, in place of all lines."""
    inclusion = Inclusion(index, line, merkle.inclusion_path(leaves, index), receipt)
    return StatementFile(file.statement, file.signature, file.chain_id, inclusion=inclusion, bill=bill)


def check_statement_file(file: StatementFile, *, siblings: Container[Address] = ()) -> list[RuleResult]:
    """Return one result per rule, in order; only the rules that the file's content allows are judged.

    Args:
        siblings: bootstraps that stand in for the statement's, by the reader's own word.
    """
    statement = file.statement
    results = [compare("statement_signer", statement.bootstrap, _signer(file))]
    if file.lines is not None:
        results += _check_lines(statement, file.lines)
    if file.inclusion is not None:
        results += _check_inclusion(file, file.inclusion, siblings)
    if file.bill is not None:
        results += _check_bill(file, file.bill)
    return results


def _check_bill(file: StatementFile, bill: BillPart) -> list[RuleResult]:
    statement, inclusion = file.statement, file.inclusion
    results = check_bill(bill, statement.digest(file.chain_id), statement.node, statement.bootstrap, file.chain_id)
    if file.lines is not None:
        results += check_billed(bill, [(line.receipt_hash, line.billed_gpu_ms) for line in file.lines])
    if inclusion is not None:
        receipt = inclusion.receipt
        results += check_basis(
            bill,
            inclusion.line.receipt_hash,
            inclusion.index,
            statement.receipts,
            None if receipt is None else receipt.order.order.session,
            None if receipt is None else receipt.receipt.receipt.gpus,
        )
    return results


def check_held(file: StatementFile, receipt: ReceiptFile, *, siblings: Container[Address] = ()) -> list[RuleResult]:
    """Return one result per rule on whether a statement holds *receipt*, as it must: what a bootstrap acknowledged it
    cannot leave out, nor state otherwise.

    Args:
        file: a statement with all its lines.
        siblings: as of `check_statement_file`.
    """
    statement, signed_ack = file.statement, receipt.acknowledgement
    if signed_ack is None:
        return [RuleResult("held_acknowledged", False, "an acknowledgement of the receipt", "none")]
    if file.lines is None:
        return [RuleResult("held", False, "a statement with all its lines", "one without")]
    ack = signed_ack.acknowledgement
    excused = _EXCUSED.get(ack.verdict, _RULE_NAMES)
    broken = [
        one.rule for one in check_receipt_file(receipt, siblings=siblings) if not one.holds and one.rule not in excused
    ]
    record = receipt.receipt.receipt
    results = [
        RuleResult("held_receipt_rules", not broken, *(("every rule holds", ", ".join(broken)) if broken else ())),
        compare("held_network", str(file.chain_id), str(receipt.chain_id)),
        compare("held_node", statement.node, record.node),
        compare("held_bootstrap", statement.bootstrap, record.bootstrap),
    ]
    if not statement.from_ms <= record.ended_at_ms < statement.to_ms:
        span = f"{statement.from_ms} to {statement.to_ms}"
        return [*results, RuleResult("held_span", False, f"a receipt that ended in {span}", str(record.ended_at_ms))]
    if ack.at_ms > statement.at_ms:
        said = f"one acknowledged until {statement.at_ms}"
        return [*results, RuleResult("held_in_time", False, said, str(ack.at_ms))]
    expected = line_of(record, ack.verdict, file.chain_id, ack.reason)
    wanted = str(line_document(expected))
    found = next((number for number, line in enumerate(file.lines) if line.sequence == record.sequence), None)
    if found is None:
        return [*results, RuleResult("held", False, wanted, "left out")]
    results.append(compare("held", wanted, str(line_document(file.lines[found]))))
    bill = file.bill
    if bill is not None:
        if bill.lines is None or found >= len(bill.lines):
            return [*results, RuleResult("held_basis", False, "a basis for the receipt's line", "none")]
        basis = bill.bases[bill.lines[found]]
        results.append(compare_basis("held_basis", basis, receipt.order.order.session, record.gpus))
    return results


def _check_lines(statement: Statement, lines: Sequence[StatementLine]) -> list[RuleResult]:
    drawn, _ = draw_up(
        lines,
        node=statement.node,
        bootstrap=statement.bootstrap,
        from_ms=statement.from_ms,
        to_ms=statement.to_ms,
        at_ms=statement.at_ms,
    )
    unordered = next((b for a, b in pairwise(lines) if b.sequence <= a.sequence), None)
    overpaid = next((line for line in lines if line.billed_gpu_ms > _most(line)), None)
    return [
        RuleResult("line_order", True)
        if unordered is None
        else RuleResult("line_order", False, "ascending sequence numbers", str(unordered.sequence)),
        RuleResult("line_billed", True)
        if overpaid is None
        else RuleResult(
            "line_billed", False, f"at most {_most(overpaid)} in line {overpaid.sequence}", str(overpaid.billed_gpu_ms)
        ),
        compare("receipts", str(drawn.receipts), str(statement.receipts)),
        compare("paid_receipts", str(drawn.paid_receipts), str(statement.paid_receipts)),
        compare("reserved_gpu_ms", str(drawn.reserved_gpu_ms), str(statement.reserved_gpu_ms)),
        compare("busy_gpu_ms", str(drawn.busy_gpu_ms), str(statement.busy_gpu_ms)),
        compare("billed_gpu_ms", str(drawn.billed_gpu_ms), str(statement.billed_gpu_ms)),
        compare("root", "0x" + drawn.root.hex(), "0x" + statement.root.hex()),
    ]


def _most(line: StatementLine) -> int:
    return max(line.reserved_gpu_ms, line.busy_gpu_ms) if line.verdict in PAID else 0


def _check_inclusion(file: StatementFile, inclusion: Inclusion, siblings: Container[Address]) -> list[RuleResult]:
    statement, line = file.statement, inclusion.line
    try:
        leaf = merkle.leaf_hash(line.encode())
    except struct.error as error:
        return [RuleResult("inclusion", False, "a line", str(error))]
    root = merkle.root_by_path(leaf, inclusion.index, statement.receipts, inclusion.path)
    results = [
        compare("inclusion", "0x" + statement.root.hex(), "0x" + root.hex() if root is not None else "no path"),
    ]
    if inclusion.receipt is None:
        return results
    receipt, signed_ack = inclusion.receipt.receipt.receipt, inclusion.receipt.acknowledgement
    verdict = signed_ack.acknowledgement.verdict if signed_ack is not None else "none"
    excused = _EXCUSED.get(verdict, _RULE_NAMES)
    broken = [
        result.rule
        for result in check_receipt_file(inclusion.receipt, siblings=siblings)
        if not result.holds and result.rule not in excused
    ]
    results.append(
        RuleResult("receipt_rules", True)
        if not broken
        else RuleResult("receipt_rules", False, "every rule holds", ", ".join(broken))
    )
    reason = signed_ack.acknowledgement.reason if signed_ack is not None else ""
    expected = line_of(receipt, verdict, file.chain_id, reason)
    results += [
        compare("receipt_network", str(file.chain_id), str(inclusion.receipt.chain_id)),
        compare("receipt_node", statement.node, receipt.node),
        compare("receipt_bootstrap", statement.bootstrap, receipt.bootstrap),
        compare(
            "receipt_span",
            "inside the statement's",
            "inside the statement's"
            if statement.from_ms <= receipt.ended_at_ms < statement.to_ms
            else str(receipt.ended_at_ms),
        ),
        compare("receipt_line", str(line_document(expected)), str(line_document(line))),
    ]
    return results


def _signer(file: StatementFile) -> str:
    try:
        return recover(file.statement.digest(file.chain_id), file.signature)
    except SignatureError as error:
        return str(error)
