"""Check one statement file offline and say which rule fails. Started by `scripts/verify-statement`.

The file is what `ngpu-bootstrap statement NODE --file FILE` writes, with all lines or with the proof for one receipt
(`--proof`). The rules are `ngpu_protocol.statements`'s and, of what the receipts cost, `ngpu_protocol.bills`'s: a file
of an earlier version says nothing of that. With a receipt at hand that the bootstrap acknowledged, such as `ngpu-node
receipt` writes, the statement must hold it.

Exit code 0 when every rule holds, 1 when one does not, 2 when the file cannot be read.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from verifying import Judged, Program, read_bounded

from ngpu_protocol.bills import amounts_of
from ngpu_protocol.prices import amount_text
from ngpu_protocol.receipt_file import MAX_FILE_BYTES as RECEIPT_BYTES
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.statements import MAX_FILE_BYTES, StatementFile, StatementLine, check_held, check_statement_file

MEANS = {
    "statement_signer": "the bootstrap signed this statement",
    "line_order": "the lines ascend by number: none is there twice",
    "line_billed": "no line bills more than its GPU time, no disputed one anything",
    "receipts": "the lines are as many",
    "paid_receipts": "of which as many are not disputed",
    "reserved_gpu_ms": "their reserved time adds up to it",
    "busy_gpu_ms": "their busy time adds up to it",
    "billed_gpu_ms": "their billed time adds up to it",
    "root": "the lines are those that were signed",
    "inclusion": "the line is one of those that were signed",
    "receipt_rules": "the receipt's own rules, signatures included",
    "receipt_network": "the receipt is of this network",
    "receipt_node": "and of this node",
    "receipt_bootstrap": "and of this bootstrap's order",
    "receipt_span": "and ended in the span",
    "receipt_line": "the line says what receipt and acknowledgement say",
    "bill_signer": "the bootstrap signed this bill",
    "bill_statement": "which is of this statement",
    "bill_account": "and of this node and bootstrap",
    "price_lists": "the node signed each list, one for a session",
    "bill_lines": "each line has session and GPUs to be priced by",
    "bill_root": "those are what was signed",
    "amounts": "billed time by price adds up to it, in each currency",
    "bill_inclusion": "session and GPUs of the line are what was signed",
    "bill_receipt": "and what its order and receipt say",
    "held_acknowledged": "the receipt has an acknowledgement",
    "held_receipt_rules": "the receipt's own rules, signatures included",
    "held_network": "the receipt is of this network",
    "held_node": "and of this node",
    "held_bootstrap": "and of this bootstrap's order",
    "held_span": "and ended in the span",
    "held_in_time": "and was acknowledged before the statement was made",
    "held": "a line says what receipt and acknowledgement say",
    "held_basis": "and is priced by the session of its order and its GPUs",
}


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--receipt",
        action="append",
        default=[],
        metavar="FILE",
        help="the file of a receipt that was acknowledged: the statement must hold it; repeat",
    )
    parser.add_argument("--lines", action="store_true", help="show each line with what it costs, too")


def judge(arguments: Namespace) -> Judged:
    file = StatementFile.from_json(read_bounded(arguments.file, MAX_FILE_BYTES))
    statement = file.statement
    facts = [
        ("node", statement.node),
        ("bootstrap", statement.bootstrap),
        ("receipts", f"{statement.receipts:,}, of which {statement.paid_receipts:,} paid"),
        ("GPU time", f"{statement.billed_gpu_ms / 1000:,.3f} s billed"),
        ("amounts", _amounts(file)),
        ("root", "0x" + statement.root.hex()),
        ("file holds", _holds(file)),
    ]
    document: dict[str, Any] = {
        "node_addr": statement.node,
        "bootstrap_addr": statement.bootstrap,
        "receipts": statement.receipts,
        "paid_receipts": statement.paid_receipts,
        "billed_gpu_ms": statement.billed_gpu_ms,
        "amounts": None if file.bill is None else _pairs(file.bill.bill.amounts),
        "root": "0x" + statement.root.hex(),
    }
    results = check_statement_file(file, siblings=arguments.sibling)
    for name in arguments.receipt:
        receipt = ReceiptFile.from_json(read_bounded(name, RECEIPT_BYTES))
        results += check_held(file, receipt, siblings=arguments.sibling)
    lines = list(_lines(file)) if arguments.lines else []
    if arguments.lines:
        document["lines"] = [dict(zip(_HEADING, line, strict=True)) for line in lines]
    return Judged(facts, document, results, means=MEANS, lines=[_HEADING, *lines] if lines else [])


def _holds(file: StatementFile) -> str:
    if file.lines is not None:
        return f"all {len(file.lines):,} lines"
    if file.inclusion is not None:
        return f"the proof for receipt {file.inclusion.line.sequence}"
    return "the totals alone"


def _amounts(file: StatementFile) -> str:
    if file.bill is None:
        return "the file says nothing of prices"
    shown = ", ".join(f"{amount} {currency}".rstrip() for currency, amount in _pairs(file.bill.bill.amounts).items())
    return (shown or "nothing") + ("" if file.lines is not None else ", signed; one line alone does not add up to it")


def _pairs(amounts: str) -> dict[str, str]:
    """Return the amounts of a bill by currency."""
    return {line.rpartition("=")[0]: line.rpartition("=")[2] for line in amounts.split("\n") if line}


_HEADING = ("sequence", "verdict", "billed_gpu_ms", "models", "amount", "currency")


def _lines(file: StatementFile) -> Iterator[tuple[str, ...]]:
    """Yield each line of the file with what it costs, as texts in the order of the heading."""
    bill, prices = file.bill, {} if file.bill is None else file.bill.prices()
    lines: tuple[StatementLine, ...] = file.lines or ()
    numbers = () if bill is None or bill.lines is None else bill.lines
    if file.inclusion is not None:
        lines, numbers = (file.inclusion.line,), (0,)
    for place, line in enumerate(lines):
        models = amount = currency = ""
        if bill is not None and place < len(numbers) and numbers[place] < len(bill.bases):
            basis = bill.bases[numbers[place]]
            models = ", ".join(model or "unknown" for _, model in basis.gpus)
            # one currency at most: a session has one list
            costs = amounts_of([(line.billed_gpu_ms, 0)], [basis], prices)
            if costs:
                ((currency, cost),) = costs.items()
                amount = amount_text(cost)
        yield str(line.sequence), line.verdict, str(line.billed_gpu_ms), models, amount, currency


if __name__ == "__main__":
    sys.exit(Program("verify-statement", "statement", judge, options).main())
