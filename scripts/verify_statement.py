"""Check one statement file offline and say which rule fails. Started by `scripts/verify-statement`.

The file is what `ngpu-bootstrap statement NODE --file FILE` writes, with all lines or with the proof for one receipt
(`--proof`). The rules are `ngpu_protocol.statements`'s. With a receipt at hand that the bootstrap acknowledged, such as
`ngpu-node receipt` writes, the statement must hold it.

Exit code 0 when every rule holds, 1 when one does not, 2 when the file cannot be read.
"""

import sys
from argparse import ArgumentParser, Namespace

from verifying import Judged, Program, read_bounded

from ngpu_protocol.receipt_file import MAX_FILE_BYTES as RECEIPT_BYTES
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.statements import MAX_FILE_BYTES, StatementFile, check_held, check_statement_file


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--receipt",
        action="append",
        default=[],
        metavar="FILE",
        help="the file of a receipt that was acknowledged: the statement must hold it; repeat",
    )


def judge(arguments: Namespace) -> Judged:
    file = StatementFile.from_json(read_bounded(arguments.file, MAX_FILE_BYTES))
    statement = file.statement
    facts = [
        ("node", statement.node),
        ("bootstrap", statement.bootstrap),
        ("receipts", f"{statement.receipts:,}, of which {statement.paid_receipts:,} paid"),
        ("GPU time", f"{statement.billed_gpu_ms / 1000:,.3f} s billed"),
        ("root", "0x" + statement.root.hex()),
        ("file holds", _holds(file)),
    ]
    document = {
        "node_addr": statement.node,
        "bootstrap_addr": statement.bootstrap,
        "receipts": statement.receipts,
        "paid_receipts": statement.paid_receipts,
        "billed_gpu_ms": statement.billed_gpu_ms,
        "root": "0x" + statement.root.hex(),
    }
    results = check_statement_file(file, siblings=arguments.sibling)
    for name in arguments.receipt:
        receipt = ReceiptFile.from_json(read_bounded(name, RECEIPT_BYTES))
        results += check_held(file, receipt, siblings=arguments.sibling)
    return Judged(facts, document, results)


def _holds(file: StatementFile) -> str:
    if file.lines is not None:
        return f"all {len(file.lines):,} lines"
    if file.inclusion is not None:
        return f"the proof for receipt {file.inclusion.line.sequence}"
    return "the totals alone"


if __name__ == "__main__":
    sys.exit(Program("verify-statement", "statement", judge, options).main())
