"""Check one receipt file offline and say which rule fails. Started by `scripts/verify-receipt`.

The file is what a bootstrap answers to `GET /api/v1/tasks/{id}/receipt`, or `ngpu-node receipt` writes; or what it
answers to `GET /api/v1/tasks/{id}/loss` of a job whose node is gone. The rules are those of `receipt_file` and `losses`
in `ngpu_protocol`; with the bodies, or the receipt before, at hand, more of a receipt's can be judged.

Exit code 0 when every rule holds, 1 when one does not, 2 when a file cannot be read.
"""

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path

from verifying import Judged, Program, read_bounded

from ngpu_protocol.losses import FORMAT as LOSS_FORMAT
from ngpu_protocol.losses import LossFile, check_loss_file
from ngpu_protocol.networks import network_named
from ngpu_protocol.receipt_file import MAX_FILE_BYTES, ReceiptFile, check_receipt_file
from ngpu_protocol.verification import Observed

KNOWN_NETWORKS = {network_named(name).chain_id: name for name in ("main", "test", "local")}


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--request-body", type=Path, metavar="FILE", help="the request's body: its hash is judged too")
    parser.add_argument("--response-body", type=Path, metavar="FILE", help="the answer's body, likewise")
    parser.add_argument("--previous", metavar="FILE", help="the receipt file before this one: the chain is judged too")


def judge(arguments: Namespace) -> Judged:
    text = read_bounded(arguments.file, MAX_FILE_BYTES)
    if _is_loss(text):
        return _judge_loss(LossFile.from_json(text), arguments)
    file = ReceiptFile.from_json(text)
    before = _read(arguments.previous) if arguments.previous else None
    results = check_receipt_file(
        file,
        seen=_seen(file, arguments.request_body, arguments.response_body),
        previous=before and before.receipt.link(before.chain_id),
        siblings=arguments.sibling,
    )
    order, receipt, acknowledgement = file.order.order, file.receipt.receipt, file.acknowledgement
    network = KNOWN_NETWORKS.get(file.chain_id, "another")
    facts = [
        ("task", f"{order.task_id}, attempt {order.attempt}"),
        ("request", f"{order.method} {order.target} on port {order.port} of workspace {order.workspace}"),
        ("answer", f"status {receipt.status}, {receipt.response_bytes} bytes, {receipt.outcome}"),
        ("node", receipt.node),
        ("bootstrap", receipt.bootstrap),
        ("chain", f"number {receipt.sequence}, network {network} (chainId {file.chain_id})"),
        ("acknowledged", _verdict(file)),
    ]
    document = {
        "task_id": order.task_id,
        "node_addr": receipt.node,
        "bootstrap_addr": receipt.bootstrap,
        "acknowledged": acknowledgement.acknowledgement.verdict if acknowledgement else None,
    }
    return Judged(facts, document, results)


def _is_loss(text: bytes) -> bool:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("format") == LOSS_FORMAT


def _judge_loss(file: LossFile, arguments: Namespace) -> Judged:
    """Judge what a bootstrap signed in a receipt's place."""
    loss, order = file.loss.loss, file.order.order
    facts = [
        ("task", f"{loss.task_id}, a job that was given up: {loss.reason}"),
        ("request", f"{order.method} {order.target} on port {order.port} of workspace {order.workspace}"),
        ("job", loss.job_id or "without an id: the answer to its submission never came"),
        ("node", f"{loss.node}, away since {_time(loss.away_since_ms)}"),
        ("bootstrap", f"{loss.bootstrap}, gave it up at {_time(loss.at_ms)}"),
        ("receipted", "its submission, in this file" if file.receipt is not None else "nothing in this file"),
    ]
    document = {
        "task_id": loss.task_id,
        "node_addr": loss.node,
        "bootstrap_addr": loss.bootstrap,
        "job_id": loss.job_id,
        "lost": loss.reason,
    }
    return Judged(facts, document, check_loss_file(file, siblings=arguments.sibling))


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")


def _read(name: str) -> ReceiptFile:
    return ReceiptFile.from_json(read_bounded(name, MAX_FILE_BYTES))


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


def _verdict(file: ReceiptFile) -> str:
    if file.acknowledgement is None:
        return "not yet"
    ack = file.acknowledgement.acknowledgement
    by = "" if ack.bootstrap == file.order.order.bootstrap else f", by {ack.bootstrap}"
    return (f"{ack.verdict} ({ack.reason})" if ack.reason else ack.verdict) + by


if __name__ == "__main__":
    sys.exit(Program("verify-receipt", "receipt", judge, options).main())
