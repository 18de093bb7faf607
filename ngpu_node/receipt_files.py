"""Receipts of the ledger as files that anybody can check offline (`ngpu_protocol.receipt_file`)."""

from __future__ import annotations

import sqlite3

from ngpu_protocol.acknowledgements import SignedAcknowledgement
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
