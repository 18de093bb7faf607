"""Which of this node's receipts were disputed, and why, from its own ledger: the owner's side of the evidence.

Owns the reading and the making of files; what a dispute is and how it is shown is `ngpu_daemon.disputes`. The command
reads the ledger beside a daemon that may be writing it, as `earnings` does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from ngpu_daemon.accounts import AccountError
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.disputes import DisputeError, DisputeRow, export, one_named, show_list, show_one
from ngpu_daemon.keystore import keystore_address
from ngpu_node.config import NodeSettings
from ngpu_node.earnings import LEDGER_FILE, Books
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.dispute_file import Dispute, Kind
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.networks import network_named
from ngpu_protocol.observations import SignedObservation
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import SignedReceipt

SEARCHED = 1_000_000
_DISPUTED = (
    "SELECT r.bootstrap, r.sequence, r.hash, r.task_id, r.attempt, r.written_at_ms, r.acknowledgement,"
    " r.signed_order, r.signed_receipt, o.signed_observation"
    " FROM receipts r LEFT JOIN observations o ON o.receipt_hash = r.hash WHERE r.verdict = 'disputed'"
)


class Evidence:
    """The disputes in a ledger, opened to be read."""

    def __init__(self, connection: sqlite3.Connection, node: Address, chain_id: int) -> None:
        self._connection = connection
        self._node = node
        self._chain_id = chain_id

    def rows(self, bootstrap: Address | None, limit: int) -> list[DisputeRow]:
        """Return the newest disputes, by *bootstrap* or by all, newest first."""
        where, values = ("", ()) if bootstrap is None else (" AND r.bootstrap = ?", (bootstrap,))
        query = f"{_DISPUTED}{where} ORDER BY r.written_at_ms DESC LIMIT ?"
        rows = []
        for found in self._connection.execute(query, (*values, limit)):
            owner, sequence, hash, task_id, attempt, at_ms, acknowledgement, _, _, observation = found
            said = SignedObservation.from_bytes(observation).observation if observation else None
            rows.append(
                DisputeRow(
                    kind=Kind.RECEIPT,
                    node=self._node,
                    bootstrap=owner,
                    sequence=sequence,
                    task_id=task_id,
                    attempt=attempt,
                    receipt="0x" + hash.hex(),
                    rule=SignedAcknowledgement.from_bytes(acknowledgement).acknowledgement.reason,
                    expected=said.expected if said else "the bootstrap did not say",
                    actual=said.actual if said else "",
                    at_ms=at_ms,
                )
            )
        return rows

    def file(self, row: DisputeRow) -> Dispute | None:
        """Return the file of a dispute."""
        found = self._connection.execute(
            f"{_DISPUTED} AND r.bootstrap = ? AND r.sequence = ?", (row.bootstrap, row.sequence)
        ).fetchone()
        if found is None:
            return None
        *_, acknowledgement, order, receipt, observation = found
        try:
            return Dispute(
                ReceiptFile(
                    order=SignedOrder.from_bytes(order),
                    receipt=SignedReceipt.from_bytes(receipt),
                    acknowledgement=SignedAcknowledgement.from_bytes(acknowledgement),
                    chain_id=self._chain_id,
                ),
                SignedObservation.from_bytes(observation) if observation else None,
            )
        except MalformedError as error:
            raise DisputeError(f"what is on file of receipt {row.sequence} cannot be read: {error}") from None


def _opened(settings: NodeSettings, ask: Callable[[Evidence], None]) -> None:
    directory = DataDirectory(settings.data_dir)
    node = keystore_address(directory.keystore)
    with Books.open(directory.path / LEDGER_FILE) as books:
        ask(Evidence(books.connection, node, network_named(settings.network).chain_id))


def list_disputes(settings: NodeSettings, bootstrap: str | None, limit: int, *, as_json: bool) -> None:
    """Print the newest disputes.

    Raises:
        OperatorError: one line for the owner.
    """
    try:
        address = parse_address(bootstrap) if bootstrap is not None else None
    except AddressError as error:
        raise AccountError(f"--bootstrap {(bootstrap or '')[:64]}: {error}") from None
    _opened(settings, lambda evidence: show_list(evidence.rows(address, limit), as_json=as_json))


def show_dispute(settings: NodeSettings, name: str, *, as_json: bool) -> None:
    """Print one dispute in full.

    Raises:
        OperatorError: one line for the owner.
    """

    def ask(evidence: Evidence) -> None:
        row = one_named(evidence.rows(None, SEARCHED), name)
        show_one(row, evidence.file(row), as_json=as_json)

    _opened(settings, ask)


def export_dispute(settings: NodeSettings, name: str, path: Path | None, *, as_json: bool) -> None:
    """Write the file of one dispute.

    Raises:
        OperatorError: one line for the owner.
    """
    _opened(
        settings,
        lambda evidence: export(one_named(evidence.rows(None, SEARCHED), name), evidence.file, path, as_json=as_json),
    )
