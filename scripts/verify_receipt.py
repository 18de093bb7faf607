"""Check one receipt file offline and say which rule fails. Started by `scripts/verify-receipt`.

The file is what a bootstrap answers to `GET /api/v1/tasks/{id}/receipt`. The rules are `ngpu_protocol.receipt_file`'s;
with the bodies, or the receipt before, at hand, more of them can be judged.

Exit code 0 when every rule holds, 1 when one does not, 2 when a file cannot be read.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.networks import network_named
from ngpu_protocol.receipt_file import MAX_FILE_BYTES, ReceiptFile, RuleResult, check_receipt_file
from ngpu_protocol.receipts import ReceiptLink
from ngpu_protocol.verification import Observed

KNOWN_NETWORKS = {network_named(name).chain_id: name for name in ("main", "test", "local")}


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/verify-receipt", description="Check a receipt file offline.")
    parser.add_argument("file", help="the receipt file; - reads it from standard input")
    parser.add_argument("--request-body", type=Path, metavar="FILE", help="the request's body: its hash is judged too")
    parser.add_argument("--response-body", type=Path, metavar="FILE", help="the answer's body, likewise")
    parser.add_argument("--previous", metavar="FILE", help="the receipt file before this one: the chain is judged too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        file = _read(arguments.file)
        previous = _link(_read(arguments.previous)) if arguments.previous else None
        seen = _seen(file, arguments.request_body, arguments.response_body)
    except (OSError, MalformedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = check_receipt_file(file, seen=seen, previous=previous)
    good = all(result.holds for result in results)
    if arguments.json:
        print(json.dumps(_document(file, results, good)))
    else:
        _show(file, results, good)
    return 0 if good else 1


def _read(name: str) -> ReceiptFile:
    if name == "-":
        return ReceiptFile.from_json(sys.stdin.buffer.read(MAX_FILE_BYTES + 1))
    with open(name, "rb") as file:
        return ReceiptFile.from_json(file.read(MAX_FILE_BYTES + 1))


def _link(file: ReceiptFile) -> ReceiptLink:
    return file.receipt.link(file.chain_id)


def _seen(file: ReceiptFile, request_body: Path | None, response_body: Path | None) -> Observed | None:
    """Return what the reader knows of the traffic; None when that is nothing."""
    if request_body is None and response_body is None:
        return None
    request_hash, request_bytes = _hash(request_body)
    response_hash, response_bytes = _hash(response_body)
    acknowledgement = file.acknowledgement
    return Observed(
        request_hash=request_hash,
        request_bytes=request_bytes,
        status=None,
        response_hash=response_hash,
        response_bytes=response_bytes,
        sent_at_ms=file.order.order.issued_at_ms,
        ended_at_ms=acknowledgement.acknowledgement.at_ms if acknowledgement else None,
    )


def _hash(path: Path | None) -> tuple[bytes | None, int | None]:
    if path is None:
        return None, None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return digest, file.tell()


def _document(file: ReceiptFile, results: list[RuleResult], good: bool) -> dict[str, object]:
    acknowledgement = file.acknowledgement
    return {
        "ok": good,
        "task_id": file.order.order.task_id,
        "node_addr": file.receipt.receipt.node,
        "bootstrap_addr": file.receipt.receipt.bootstrap,
        "acknowledged": acknowledgement.acknowledgement.verdict if acknowledgement else None,
        "rules": [
            {"rule": result.rule, "holds": result.holds, "expected": result.expected, "actual": result.actual}
            for result in results
        ],
    }


def _show(file: ReceiptFile, results: list[RuleResult], good: bool) -> None:
    order, receipt = file.order.order, file.receipt.receipt
    console = Console(highlight=False, soft_wrap=True)
    network = KNOWN_NETWORKS.get(file.chain_id, "another")
    for label, value in (
        ("task", f"{order.task_id}, attempt {order.attempt}"),
        ("request", f"{order.method} {order.target} on port {order.port} of workspace {order.workspace}"),
        ("answer", f"status {receipt.status}, {receipt.response_bytes} bytes, {receipt.outcome}"),
        ("node", receipt.node),
        ("bootstrap", receipt.bootstrap),
        ("chain", f"number {receipt.sequence}, network {network} (chainId {file.chain_id})"),
        ("acknowledged", _verdict(file)),
    ):
        console.print(Text(f"{label:<13}{value}"))
    table = Table("rule", "", "expected", "actual", box=None, pad_edge=False)
    for result in results:
        mark = Text("holds", "green") if result.holds else Text("BROKEN", "bold red")
        table.add_row(result.rule, mark, Text(result.expected), Text(result.actual))
    console.print(table)
    broken = [result.rule for result in results if not result.holds]
    console.print(Text("every rule holds" if good else f"broken: {', '.join(broken)}", "green" if good else "bold red"))


def _verdict(file: ReceiptFile) -> str:
    if file.acknowledgement is None:
        return "not yet"
    acknowledgement = file.acknowledgement.acknowledgement
    return (
        f"{acknowledgement.verdict} ({acknowledgement.reason})" if acknowledgement.reason else acknowledgement.verdict
    )


if __name__ == "__main__":
    sys.exit(main())
