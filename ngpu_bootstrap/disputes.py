"""What nodes are accused of, read from the store: receipts that were disputed, and chains that do not add up.

Owns the reading and the making of files; what a dispute is and how it is shown is `ngpu_daemon.disputes`. The command
reads the database itself, beside a daemon that may run, as `accounting` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from ngpu_bootstrap.accounting import Books
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.stand_ins import stored_stand_ins
from ngpu_bootstrap.store import tables
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.disputes import DisputeError, DisputeRow
from ngpu_daemon.keystore import keystore_address
from ngpu_protocol.dispute_file import Contradiction, Dispute, DisputeFile, Kind, Withheld
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.gap_claims import claimed_gap
from ngpu_protocol.identity import Address
from ngpu_protocol.networks import network_named
from ngpu_protocol.observations import SignedObservation
from ngpu_protocol.receipts import SignedReceipt


class Evidence:
    """The disputes in a store, opened to be read."""

    def __init__(self, connection: sa.Connection, chain_id: int, siblings: Iterable[str] = ()) -> None:
        self._connection = connection
        self._chain_id = chain_id
        self._siblings = [Address(one) for one in siblings]

    def siblings(self, bootstrap: Address) -> Sequence[Address]:
        """Return who stands in for *bootstrap*, by the operator's configuration."""
        return self._siblings

    def rows(self, node: Address | None, limit: int) -> list[DisputeRow]:
        """Return the newest disputes, of *node* or of all, newest first."""
        found = [*self._receipts(node, limit), *self._faults(node, limit)]
        return sorted(found, key=lambda row: -row.at_ms)[:limit]

    def _receipts(self, node: Address | None, limit: int) -> list[DisputeRow]:
        r = tables.receipts
        query = sa.select(
            r.c.node, r.c.bootstrap, r.c.sequence, r.c.task_id, r.c.attempt, r.c.hash, r.c.rule, r.c.expected,
            r.c.actual, r.c.received_at_ms,
        ).where(sa.text("verdict = 'disputed'"))  # fmt: skip
        if node is not None:
            query = query.where(r.c.node == node)
        rows = self._connection.execute(query.order_by(r.c.received_at_ms.desc()).limit(limit))
        return [
            DisputeRow(
                kind=Kind.RECEIPT,
                node=row.node,
                bootstrap=row.bootstrap,
                sequence=row.sequence,
                task_id=row.task_id,
                attempt=row.attempt,
                receipt="0x" + bytes(row.hash).hex(),
                rule=row.rule,
                expected=row.expected,
                actual=row.actual,
                at_ms=row.received_at_ms,
            )
            for row in rows
        ]

    def _faults(self, node: Address | None, limit: int) -> list[DisputeRow]:
        f, o = tables.chain_faults, tables.observations
        seen = (o.c.bootstrap == f.c.bootstrap) & (o.c.node == f.c.node) & (o.c.receipt_hash == f.c.hash)
        query = sa.select(f, o.c.task_id, o.c.attempt).select_from(f.outerjoin(o, seen))
        if node is not None:
            query = query.where(f.c.node == node)
        found = self._connection.execute(query.order_by(f.c.found_at_ms.desc()).limit(limit)).all()
        return [self._withheld_row(row) if row.kind == "withheld" else _fault_row(row) for row in found]

    def _withheld_row(self, row: Any) -> DisputeRow:
        expected = bytes(row.expected).decode(errors="replace")
        actual = "none within an hour"
        if row.raw:
            gap = claimed_gap(SignedObservation.from_bytes(bytes(row.raw)).observation)
            r = tables.receipts
            where = (
                r.c.bootstrap == row.bootstrap,
                r.c.node == row.node,
                r.c.sequence.between(gap.from_sequence, gap.to_sequence),
            )
            came = self._connection.execute(sa.select(sa.func.count()).where(*where)).scalar_one()
            if came:
                actual += f", {came} of {gap.to_sequence - gap.from_sequence + 1} later"
        return DisputeRow(
            kind=row.kind,
            node=row.node,
            bootstrap=row.bootstrap,
            sequence=row.sequence,
            task_id="",
            attempt=0,
            receipt=_text(row.hash) if row.raw else "",
            rule="chain",
            expected=expected,
            actual=actual,
            at_ms=row.found_at_ms,
        )

    def file(self, row: DisputeRow) -> DisputeFile | None:
        """Return the file of a dispute; None where nothing is on file to make it of."""
        try:
            match row.kind:
                case "receipt" | "forged":
                    return self._dispute(row)
                case "equivocation":
                    return self._contradiction(row, Kind.EQUIVOCATION, row.sequence)
                case "broken_link":
                    return self._contradiction(row, Kind.BROKEN_LINK, row.sequence - 1)
                case "withheld":
                    return self._withheld(row)
        except MalformedError as error:
            raise DisputeError(f"what is on file of receipt {row.sequence} cannot be read: {error}") from None
        return None

    def _dispute(self, row: DisputeRow) -> Dispute | None:
        hash = bytes.fromhex(row.receipt.removeprefix("0x"))
        o = tables.observations
        where = (o.c.bootstrap == row.bootstrap, o.c.node == row.node, o.c.receipt_hash == hash)
        seen = self._connection.execute(sa.select(o).where(*where)).one_or_none()
        filed = self._filed(row, row.sequence)
        if filed is not None and bytes(filed.hash) == hash:
            raw, acknowledgement, task_id, attempt = filed.raw, filed.acknowledgement, filed.task_id, filed.attempt
            order = filed.signed_order
        elif seen is not None and (fault := self._fault(row, hash)) is not None:
            raw, acknowledgement, task_id, attempt, order = (
                fault,
                seen.acknowledgement,
                seen.task_id,
                seen.attempt,
                None,
            )
        else:
            return None
        order = order or self._order(task_id, attempt)
        if order is None:
            return None
        stand_ins = stored_stand_ins(self._connection, self._chain_id)
        return Dispute(
            stand_ins.receipt_file(bytes(order), bytes(raw), bytes(acknowledgement)),
            SignedObservation.from_bytes(bytes(seen.signed_observation)) if seen is not None else None,
        )

    def _contradiction(self, row: DisputeRow, kind: Kind, before: int) -> Contradiction | None:
        first = self._filed(row, before)
        second = self._fault(row, bytes.fromhex(row.receipt.removeprefix("0x")))
        if first is None or second is None:
            return None
        first_receipt, second_receipt = (SignedReceipt.from_bytes(bytes(raw)) for raw in (first.raw, second))
        return Contradiction(kind, first_receipt, second_receipt, self._chain_id)

    def _withheld(self, row: DisputeRow) -> Withheld | None:
        raw = self._fault(row, bytes.fromhex(row.receipt.removeprefix("0x")))
        if not raw:  # an earlier version kept no claim
            return None
        claim = SignedObservation.from_bytes(bytes(raw))
        after = self._filed(row, claimed_gap(claim.observation).to_sequence + 1)
        if after is None:
            return None
        return Withheld(SignedReceipt.from_bytes(bytes(after.raw)), claim, self._chain_id)

    def _filed(self, row: DisputeRow, sequence: int) -> Any:
        r = tables.receipts
        where = (r.c.bootstrap == row.bootstrap, r.c.node == row.node, r.c.sequence == sequence)
        return self._connection.execute(sa.select(r).where(*where)).one_or_none()

    def _fault(self, row: DisputeRow, hash: bytes) -> bytes | None:
        f = tables.chain_faults
        where = (f.c.bootstrap == row.bootstrap, f.c.node == row.node, f.c.kind == row.kind, f.c.hash == hash)
        return self._connection.execute(sa.select(f.c.raw).where(*where)).scalar()

    def _order(self, task_id: str, attempt: int) -> bytes | None:
        a = tables.attempts
        where = (a.c.task_id == task_id, a.c.attempt == attempt)
        return self._connection.execute(sa.select(a.c.signed_order).where(*where)).scalar()


def _fault_row(row: Any) -> DisputeRow:
    match row.kind:
        case "forged":
            receipt, expected, actual = _text(row.hash), row.node, "signed by another key"
        case _:
            receipt, expected, actual = _text(row.hash), _text(row.expected), _text(row.actual)
    return DisputeRow(
        kind=row.kind,
        node=row.node,
        bootstrap=row.bootstrap,
        sequence=row.sequence,
        task_id=row.task_id or "",
        attempt=row.attempt or 0,
        receipt=receipt,
        rule="signer" if row.kind == "forged" else "chain",
        expected=expected,
        actual=actual,
        at_ms=row.found_at_ms,
    )


def _text(hash: bytes) -> str:
    return "0x" + bytes(hash).hex()


@contextmanager
def open_evidence(settings: BootstrapSettings) -> Iterator[Evidence]:
    """Open the store of *settings* for what it has on disputes.

    Raises:
        OperatorError: one line for the operator.
    """
    own = keystore_address(DataDirectory(settings.data_dir).keystore)
    with Books.open(settings, own) as books:
        yield Evidence(books.connection, network_named(settings.network).chain_id, settings.siblings)
