"""Which of this node's receipts were disputed, and why, from its own ledger: the owner's side of the evidence.

Owns the reading and the making of files; what a dispute is and how it is shown is `ngpu_daemon.disputes`. The command
reads the ledger beside a daemon that may be writing it, as `earnings` does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.disputes import DisputeError, DisputeRow
from ngpu_daemon.keystore import keystore_address
from ngpu_node.config import NodeSettings
from ngpu_node.earnings import LEDGER_FILE, Books
from ngpu_node.receipt_files import stored_receipt_file
from ngpu_node.trust import Trust
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.dispute_file import Dispute, Kind, Withheld
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.gap_claims import numbers_text
from ngpu_protocol.identity import Address
from ngpu_protocol.networks import network_named
from ngpu_protocol.observations import SignedObservation
from ngpu_protocol.receipts import SignedReceipt

_DISPUTED = (
    "SELECT r.bootstrap, r.sequence, r.hash, r.task_id, r.attempt, r.written_at_ms, r.acknowledgement,"
    " r.signed_order, r.signed_receipt, o.signed_observation"
    " FROM receipts r LEFT JOIN observations o ON o.receipt_hash = r.hash WHERE r.verdict = 'disputed'"
)
_CLAIMED = (
    "SELECT c.bootstrap, c.from_sequence, c.to_sequence, c.signed_claim, c.claimed_at_ms,"
    " (SELECT count(*) FROM receipts r WHERE r.bootstrap = c.bootstrap"
    "  AND r.sequence BETWEEN c.from_sequence AND c.to_sequence) FROM gap_claims c"
)


class Evidence:
    """The disputes in a ledger, opened to be read."""

    def __init__(self, connection: sqlite3.Connection, node: Address, chain_id: int, trust: Trust) -> None:
        self._connection = connection
        self._node = node
        self._chain_id = chain_id
        self._trust = trust

    def siblings(self, bootstrap: Address) -> Sequence[Address]:
        """Return who stands in for *bootstrap*, by the owner's configuration."""
        service = self._trust.service_of(bootstrap)
        return () if service is None else self._trust.members(service)

    def rows(self, bootstrap: Address | None, limit: int) -> list[DisputeRow]:
        """Return the newest disputes, by *bootstrap* or by all, newest first."""
        found = [*self._receipts(bootstrap, limit), *self._claims(bootstrap, limit)]
        return sorted(found, key=lambda row: -row.at_ms)[:limit]

    def _receipts(self, bootstrap: Address | None, limit: int) -> list[DisputeRow]:
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

    def _claims(self, bootstrap: Address | None, limit: int) -> list[DisputeRow]:
        where, values = ("", ()) if bootstrap is None else (" WHERE c.bootstrap = ?", (bootstrap,))
        query = f"{_CLAIMED}{where} ORDER BY c.claimed_at_ms DESC LIMIT ?"
        return [
            DisputeRow(
                kind=Kind.WITHHELD,
                node=self._node,
                bootstrap=owner,
                sequence=first,
                task_id="",
                attempt=0,
                receipt="0x" + SignedObservation.from_bytes(claim).observation.receipt_hash.hex(),
                rule="chain",
                expected=numbers_text(first, last),
                actual=f"none came, it says; {held} of {last - first + 1} are in this ledger",
                at_ms=at_ms,
            )
            for owner, first, last, claim, at_ms, held in self._connection.execute(query, (*values, limit))
        ]

    def file(self, row: DisputeRow) -> Dispute | Withheld | None:
        """Return the file of a dispute; None where nothing is on file to make it of."""
        try:
            return self._withheld(row) if row.kind == Kind.WITHHELD else self._dispute(row)
        except MalformedError as error:
            raise DisputeError(f"what is on file of receipt {row.sequence} cannot be read: {error}") from None

    def _withheld(self, row: DisputeRow) -> Withheld | None:
        found = self._connection.execute(
            "SELECT c.signed_claim, r.signed_receipt FROM gap_claims c JOIN receipts r ON r.bootstrap = c.bootstrap"
            " AND r.sequence = c.to_sequence + 1 WHERE c.bootstrap = ? AND c.from_sequence = ?",
            (row.bootstrap, row.sequence),
        ).fetchone()
        if found is None:
            return None
        claim, after = found
        return Withheld(SignedReceipt.from_bytes(after), SignedObservation.from_bytes(claim), self._chain_id)

    def _dispute(self, row: DisputeRow) -> Dispute | None:
        found = self._connection.execute(
            f"{_DISPUTED} AND r.bootstrap = ? AND r.sequence = ?", (row.bootstrap, row.sequence)
        ).fetchone()
        if found is None:
            return None
        *_, acknowledgement, order, receipt, observation = found
        return Dispute(
            stored_receipt_file(self._connection, order, receipt, acknowledgement, self._chain_id),
            SignedObservation.from_bytes(observation) if observation else None,
        )


@contextmanager
def open_evidence(settings: NodeSettings) -> Iterator[Evidence]:
    """Open the ledger of *settings* for what it has on disputes.

    Raises:
        OperatorError: one line for the owner.
    """
    directory = DataDirectory(settings.data_dir)
    node = keystore_address(directory.keystore)
    trust = settings.trust()
    with Books.open(directory.path / LEDGER_FILE) as books:
        yield Evidence(books.connection, node, network_named(settings.network).chain_id, trust)
