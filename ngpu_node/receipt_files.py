"""Receipts of the ledger as files that anybody can check offline (`ngpu_protocol.receipt_file`)."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from ngpu_daemon.accounts import AccountError
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.disputes import LEAST_HASH_DIGITS, write_new
from ngpu_node.config import NodeSettings
from ngpu_node.earnings import LEDGER_FILE, Books
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import SignedReceipt
from ngpu_protocol.stand_ins import SignedStandIn


def stored_receipt_file(
    connection: sqlite3.Connection, order: bytes, receipt: bytes, acknowledgement: bytes | None, chain_id: int
) -> ReceiptFile:
    """Return the file of a receipt as the ledger has it, with the word that makes a sibling's acknowledgement good.

    Raises:
        MalformedError: what is stored cannot be read.
    """
    signed_order = SignedOrder.from_bytes(order)
    signed_ack = SignedAcknowledgement.from_bytes(acknowledgement) if acknowledgement else None
    word = None
    if signed_ack is not None and signed_ack.acknowledgement.bootstrap != signed_order.order.bootstrap:
        word = connection.execute(
            "SELECT signed_stand_in FROM stand_ins WHERE bootstrap = ? AND sibling = ?",
            (signed_order.order.bootstrap, signed_ack.acknowledgement.bootstrap),
        ).fetchone()
    return ReceiptFile(
        order=signed_order,
        receipt=SignedReceipt.from_bytes(receipt),
        acknowledgement=signed_ack,
        chain_id=chain_id,
        stand_in=SignedStandIn.from_bytes(word[0]) if word else None,
    )


def write_receipt(settings: NodeSettings, name: str, path: Path | None, *, as_json: bool) -> None:
    """Write the file of one receipt of the ledger.

    Args:
        name: its task's id, with `/attempt` where it had several; its hash, or the beginning of that; or its number.
        path: where to; None: a name made of the receipt's hash, in the working directory.

    Raises:
        OperatorError: one line for the owner.
    """
    directory = DataDirectory(settings.data_dir)
    chain_id = network_named(settings.network).chain_id
    with Books.open(directory.path / LEDGER_FILE) as books:
        order, receipt, acknowledgement, hash = _named(books.connection, name)
        try:
            made = stored_receipt_file(books.connection, order, receipt, acknowledgement, chain_id)
        except MalformedError as error:
            raise AccountError(f"what is on file of this receipt cannot be read: {error}") from None
    target = path or Path(f"receipt-{hash.hex()[:16]}.json")
    write_new(target, made.to_json())
    if as_json:
        print(json.dumps({"file": str(target), "receipt": "0x" + hash.hex(), "acknowledged": bool(acknowledgement)}))
    else:
        print(f"wrote {target}: `scripts/verify-receipt {target}` checks it offline")


def _named(connection: sqlite3.Connection, name: str) -> tuple[bytes, bytes, bytes | None, bytes]:
    """Return order, receipt, acknowledgement and hash of the one receipt that is named so."""
    task_id, _, attempt = name.partition("/")
    digits = name.lower().removeprefix("0x")
    where, values = "task_id = ?", (task_id,)
    if name.isascii() and name.isdigit() and len(name) < LEAST_HASH_DIGITS:
        where, values = "sequence = ?", (name,)
    elif len(digits) >= LEAST_HASH_DIGITS and not set(digits) - set("0123456789abcdef"):
        where, values = "lower(hex(hash)) LIKE ? || '%'", (digits,)
    if attempt.isascii() and attempt.isdigit():
        where, values = f"{where} AND attempt = ?", (*values, attempt[:9])  # type: ignore[assignment]
    query = f"SELECT signed_order, signed_receipt, acknowledgement, hash FROM receipts WHERE {where} LIMIT 2"
    found: list[tuple[bytes, bytes, bytes | None, bytes]] = connection.execute(query, values).fetchall()
    if not found:
        raise AccountError(f"no receipt here is named {name[:80]}: `ngpu-node earnings --csv` lists them")
    if len(found) > 1:
        raise AccountError(f"several receipts are named {name[:80]}: give the hash, or the task's id and /attempt")
    return found[0]
