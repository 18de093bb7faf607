"""What the jobs of one transaction leave to be written together: new receipts, acknowledgements, heads of chains.

One statement for each kind however many there are. The sqlite3 module lets go of the interpreter at every step of a
statement and waits to get it back, so a statement a row is a wait a row, which under load costs more than the row.

Lives in the writing thread and follows its transactions (`group_commit.Transactions`): what was assigned in one that
failed never was.
"""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from typing import Any

from ngpu_protocol.identity import Address
from ngpu_protocol.receipts import FIRST_PREVIOUS, ReceiptLink

#: Rows of one statement: SQLite takes 32,766 values in one.
ROWS = 512
RECEIPT_COLUMNS = "bootstrap, sequence, hash, task_id, attempt, signed_order, signed_receipt, written_at_ms"


class LedgerBatch:
    """The unwritten part of a transaction, and the last link of every chain with it counted in."""

    def __init__(self) -> None:
        self._heads: dict[Address, ReceiptLink] = {}
        self._moved: set[Address] = set()
        self._receipts: list[tuple[Any, ...]] = []
        self._acknowledgements: list[tuple[Any, ...]] = []

    def head(self, connection: sqlite3.Connection, bootstrap: Address) -> ReceiptLink:
        """Return the last link of the chain for *bootstrap*."""
        head = self._heads.get(bootstrap)
        if head is None:
            row = connection.execute("SELECT sequence, hash FROM chains WHERE bootstrap = ?", (bootstrap,)).fetchone()
            head = self._heads[bootstrap] = ReceiptLink(*row) if row else ReceiptLink(0, FIRST_PREVIOUS)
        return head

    def move_head(self, bootstrap: Address, link: ReceiptLink) -> None:
        """Make *link* the last of its chain."""
        self._heads[bootstrap] = link
        self._moved.add(bootstrap)

    def add_receipt(self, row: tuple[Any, ...]) -> None:
        """Add a receipt: the values of `RECEIPT_COLUMNS`."""
        self._receipts.append(row)

    def add_acknowledgement(
        self, bootstrap: Address, sequence: int, receipt_hash: bytes, wire: bytes, verdict: str, now_ms: int
    ) -> None:
        """Add an acknowledgement of the receipt that has all three: owner, number and hash."""
        self._acknowledgements.append((bootstrap, sequence, receipt_hash, wire, verdict, now_ms))

    # -- the transaction's end -----------------------------------------------------------------------------------------

    def before_commit(self, connection: sqlite3.Connection) -> None:
        """Write everything."""
        for start in range(0, len(self._receipts), ROWS):
            receipts = self._receipts[start : start + ROWS]
            connection.execute(_insert_receipts(len(receipts)), _flat(receipts))
        self._receipts.clear()
        for start in range(0, len(self._acknowledgements), ROWS):
            acknowledgements = self._acknowledgements[start : start + ROWS]
            connection.execute(_store_acknowledgements(len(acknowledgements)), _flat(acknowledgements))
            hashes = [row[2] for row in acknowledgements]
            connection.execute(_mark_answers(len(hashes)), (acknowledgements[-1][5], *hashes))
        self._acknowledgements.clear()
        for bootstrap in self._moved:
            head = self._heads[bootstrap]
            connection.execute(
                "INSERT INTO chains (bootstrap, sequence, hash) VALUES (?, ?, ?)"
                " ON CONFLICT (bootstrap) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash",
                (bootstrap, head.sequence, head.hash),
            )
        self._moved.clear()

    def after_rollback(self) -> None:
        """Forget everything that is not committed."""
        self._heads.clear()
        self._moved.clear()
        self._receipts.clear()
        self._acknowledgements.clear()


@lru_cache(maxsize=512)
def _insert_receipts(rows: int) -> str:
    return f"INSERT INTO receipts ({RECEIPT_COLUMNS}) VALUES {_values(rows, 8)}"


@lru_cache(maxsize=512)
def _store_acknowledgements(rows: int) -> str:
    return (
        f"WITH ack (bootstrap, sequence, hash, wire, verdict, at_ms) AS (VALUES {_values(rows, 6)})"
        " UPDATE receipts SET acknowledgement = ack.wire, verdict = ack.verdict FROM ack"
        " WHERE receipts.bootstrap = ack.bootstrap AND receipts.sequence = ack.sequence"
        " AND receipts.hash = ack.hash AND receipts.acknowledgement IS NULL"
    )


@lru_cache(maxsize=512)
def _mark_answers(rows: int) -> str:
    # The hash names the receipt; whether it was this acknowledgement that settled it is the receipt's business.
    marks = ", ".join("?" * rows)
    return (
        "UPDATE answers SET acknowledged_at_ms = ? WHERE acknowledged_at_ms IS NULL"
        f" AND receipt_hash IN ({marks}) AND receipt_hash IN"
        " (SELECT hash FROM receipts WHERE receipts.task_id = answers.task_id AND acknowledgement IS NOT NULL)"
    )


def _values(rows: int, columns: int) -> str:
    one = "(" + ", ".join("?" * columns) + ")"
    return ", ".join([one] * rows)


def _flat(rows: list[tuple[Any, ...]]) -> list[Any]:
    return [value for row in rows for value in row]
