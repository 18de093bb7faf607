"""Judge one dispute file offline and say what it shows. Started by `scripts/verify-dispute`.

The file is what `ngpu-bootstrap dispute export` or `ngpu-node disputes export` writes: a receipt the bootstrap did not
accept, or two receipts of one node that cannot both be true. The rules are `ngpu_protocol.dispute_file`'s.

Exit code 0 when every rule holds, whoever it speaks against; 1 when one does not, and the file shows nothing; 2 when it
cannot be read.
"""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_daemon.disputes import WHAT_IT_SHOWS
from ngpu_protocol.dispute_file import (
    MAX_FILE_BYTES,
    Contradiction,
    DisputeFile,
    Finding,
    check_dispute_file,
    from_json,
)
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.receipt_file import RuleResult


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/verify-dispute", description="Judge a dispute file offline.")
    parser.add_argument("file", help="the dispute file; - reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        file = _read(arguments.file)
    except (OSError, MalformedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results, finding = check_dispute_file(file)
    if arguments.json:
        print(json.dumps(_document(file, results, finding)))
    else:
        _show(file, results, finding)
    return 1 if finding is Finding.UNSOUND else 0


def _read(name: str) -> DisputeFile:
    if name == "-":
        return from_json(sys.stdin.buffer.read(MAX_FILE_BYTES + 1))
    with open(name, "rb") as file:
        return from_json(file.read(MAX_FILE_BYTES + 1))


def _facts(file: DisputeFile) -> dict[str, str]:
    receipt = file.second.receipt if isinstance(file, Contradiction) else file.file.receipt.receipt
    facts = {
        "kind": file.kind.value,
        "node": receipt.node,
        "bootstrap": receipt.bootstrap,
        "sequence": str(receipt.sequence),
        "receipt": "0x" + receipt.digest(file.chain_id).hex(),
    }
    if isinstance(file, Contradiction):
        return facts | {"other": "0x" + file.first.receipt.digest(file.chain_id).hex()}
    order = file.file.order.order
    facts["node"] = order.node  # the one asked; a forged receipt may name any
    facts["task"] = f"{order.task_id}, attempt {order.attempt}"
    if file.observation is not None:
        said = file.observation.observation
        facts |= {"rule": said.rule, "wanted": said.expected, "was": said.actual, "seen": said.seen}
    return facts


def _document(file: DisputeFile, results: list[RuleResult], finding: Finding) -> dict[str, object]:
    return {
        "ok": finding is not Finding.UNSOUND,
        "finding": finding.value,
        **_facts(file),
        "rules": [
            {"rule": result.rule, "holds": result.holds, "expected": result.expected, "actual": result.actual}
            for result in results
        ],
    }


def _show(file: DisputeFile, results: list[RuleResult], finding: Finding) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for label, value in _facts(file).items():
        console.print(Text(f"{label:<11}{value}"))
    table = Table("rule", "", "expected", "actual", box=None, pad_edge=False)
    for result in results:
        mark = Text("holds", "green") if result.holds else Text("BROKEN", "bold red")
        table.add_row(result.rule, mark, Text(result.expected), Text(result.actual))
    console.print(table)
    console.print(Text(f"shows      {WHAT_IT_SHOWS[finding]}", "bold red" if finding is Finding.UNSOUND else "green"))


if __name__ == "__main__":
    sys.exit(main())
