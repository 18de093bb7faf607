"""Check one statement file offline and say which rule fails. Started by `scripts/verify-statement`.

The file is what `ngpu-bootstrap statement NODE --file FILE` writes, with all lines or with the proof for one receipt
(`--proof`). The rules are `ngpu_protocol.statements`'s.

Exit code 0 when every rule holds, 1 when one does not, 2 when the file cannot be read.
"""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.receipt_file import RuleResult
from ngpu_protocol.statements import MAX_FILE_BYTES, StatementFile, check_statement_file


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/verify-statement", description="Check a statement file offline.")
    parser.add_argument("file", help="the statement file; - reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        file = _read(arguments.file)
    except (OSError, MalformedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = check_statement_file(file)
    good = all(result.holds for result in results)
    if arguments.json:
        print(json.dumps(_document(file, results, good)))
    else:
        _show(file, results, good)
    return 0 if good else 1


def _read(name: str) -> StatementFile:
    if name == "-":
        return StatementFile.from_json(sys.stdin.buffer.read(MAX_FILE_BYTES + 1))
    with open(name, "rb") as file:
        return StatementFile.from_json(file.read(MAX_FILE_BYTES + 1))


def _holds(file: StatementFile) -> str:
    if file.lines is not None:
        return f"all {len(file.lines):,} lines"
    if file.inclusion is not None:
        return f"the proof for receipt {file.inclusion.line.sequence}"
    return "the totals alone"


def _document(file: StatementFile, results: list[RuleResult], good: bool) -> dict[str, object]:
    statement = file.statement
    return {
        "ok": good,
        "node_addr": statement.node,
        "bootstrap_addr": statement.bootstrap,
        "receipts": statement.receipts,
        "paid_receipts": statement.paid_receipts,
        "billed_gpu_ms": statement.billed_gpu_ms,
        "root": "0x" + statement.root.hex(),
        "rules": [
            {"rule": result.rule, "holds": result.holds, "expected": result.expected, "actual": result.actual}
            for result in results
        ],
    }


def _show(file: StatementFile, results: list[RuleResult], good: bool) -> None:
    statement = file.statement
    console = Console(highlight=False, soft_wrap=True)
    for label, value in (
        ("node", statement.node),
        ("bootstrap", statement.bootstrap),
        ("receipts", f"{statement.receipts:,}, of which {statement.paid_receipts:,} paid"),
        ("GPU time", f"{statement.billed_gpu_ms / 1000:,.3f} s billed"),
        ("root", "0x" + statement.root.hex()),
        ("file holds", _holds(file)),
    ):
        console.print(Text(f"{label:<12}{value}"))
    table = Table("rule", "", "expected", "actual", box=None, pad_edge=False)
    for result in results:
        mark = Text("holds", "green") if result.holds else Text("BROKEN", "bold red")
        table.add_row(result.rule, mark, Text(result.expected), Text(result.actual))
    console.print(table)
    broken = [result.rule for result in results if not result.holds]
    console.print(Text("every rule holds" if good else f"broken: {', '.join(broken)}", "green" if good else "bold red"))


if __name__ == "__main__":
    sys.exit(main())
