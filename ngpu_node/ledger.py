"""The ledger: every receipt this node has written, chained per bootstrap, durable before it leaves.

A receipt is a claim for money, and each names the one before it, so there must never be two with one sequence number.
Therefore sequence and predecessor are assigned, and the receipt signed over them, inside the transaction that stores
it, and only one writes at a time (`group_commit`, `ledger_batch`). One that fails leaves no trace in the chain.

When the disk fails, `failed` is set: the daemon ends, since a node that cannot keep receipts must not work.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from ngpu_daemon.turn_commits import Pace
from ngpu_node import ledger_schema
from ngpu_node.group_commit import GroupCommit
from ngpu_node.ledger_batch import LedgerBatch
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.gap_claims import ClaimedGap
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.prices import SignedPriceList
from ngpu_protocol.receipts import RECEIPT_TYPE, ReceiptLink, SignedReceipt, TaskReceipt
from ngpu_protocol.stand_ins import SignedStandIn

#: Beyond this a bootstrap's claim about our own chain is nonsense, not a backup we lost.
MAX_SEQUENCE = 2**53
MAX_GAP_CLAIMS = 1000


@dataclass(frozen=True, slots=True)
class Written:
    """A receipt that is durable: `signed` may leave, `hash` is its place in the chain."""

    signed: SignedReceipt
    hash: bytes


@dataclass(frozen=True, slots=True)
class Owed:
    """A receipt whose acknowledgement has not come, with all a bootstrap needs to judge it."""

    bootstrap: Address
    sequence: int
    signed_order: bytes
    signed_receipt: bytes


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """The answer of a finished detached attempt, as `execution.spool` keeps it.

    Attributes:
        head: msgpack of the header list.
        body: the body where it is small, else None and `body_file` names a file of the spool.
    """

    service: str
    task_id: str
    attempt: int
    status: int
    head: bytes
    body: bytes | None
    body_file: str | None
    body_bytes: int
    signed_receipt: bytes = b""
    receipt_hash: bytes = b""
    ended_at_ms: int = 0
    acknowledged_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """What the ledger holds, for the owner."""

    receipts: int
    owed: int


class Ledger:
    """The ledger of one node; made by `open`, used from one trio run, closed by `aclose`."""

    def __init__(self, connection: sqlite3.Connection, account: Account, chain_id: int, pace: Pace | None) -> None:
        self._account = account
        self._chain_id = chain_id
        self._batch = LedgerBatch()
        self._commits = GroupCommit(connection, self._batch, name="ledger", pace=pace)

    @classmethod
    async def open(cls, path: Path, account: Account, chain_id: int, *, pace: Pace | None = None) -> Ledger:
        """Open or make the ledger of *account* at *path*; the caller closes it.

        Args:
            pace: decides when commits are made by trio's loop itself; None for the usual one.

        Raises:
            NodeConfigurationError: it was written by a later version, or is damaged.
        """
        connection = await trio.to_thread.run_sync(ledger_schema.connect, path)
        return cls(connection, account, chain_id, pace)

    @property
    def failed(self) -> trio.Event:
        """Set when the disk could not take a write. Nothing written before is affected."""
        return self._commits.failed

    async def aclose(self) -> None:
        """Commit what waits and close. Cancellation does not cut a commit short."""
        await self._commits.aclose()

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(self, draft: TaskReceipt, order: SignedOrder, answer: StoredAnswer | None = None) -> Written:
        """Give *draft* its place in its bootstrap's chain, sign it, make it durable, and return it.

        Args:
            draft: the receipt but for `sequence` and `previous`, whose values are ignored.
            answer: a detached attempt's answer, stored in the same transaction; its receipt fields are filled in.

        Waits to the end even when cancelled, for as long as `give_up` lets it.

        Raises:
            LedgerUnavailable: it could not be made durable, and has no place in the chain; or it was given up, and if
                it is written after all it is owed like any other.
        """

        def job(connection: sqlite3.Connection) -> Written:
            written = self._append(connection, draft, order)
            if answer is not None:
                _insert_answer(connection, answer, written, draft.ended_at_ms)
            return written

        return await self._commits.do(job, to_the_end=True)

    def give_up(self, after_s: float) -> None:
        """End the waits of `write` that have lasted longer than *after_s*."""
        self._commits.give_up(after_s)

    def _append(self, connection: sqlite3.Connection, draft: TaskReceipt, order: SignedOrder) -> Written:
        head = self._batch.head(connection, draft.bootstrap)
        receipt = draft.placed(head.sequence + 1, head.hash)
        signed, link = self._sign(receipt)
        self._batch.add_receipt(
            (
                draft.bootstrap,
                link.sequence,
                link.hash,
                order.order.task_id,
                order.order.attempt,
                order.wire,
                signed.wire,
                draft.ended_at_ms,
            )
        )
        self._batch.move_head(draft.bootstrap, link)
        return Written(signed, link.hash)

    def _sign(self, receipt: TaskReceipt) -> tuple[SignedReceipt, ReceiptLink]:
        # As `sign_receipt`, but the digest is needed for the chain too, and computed once.
        digest = receipt.digest(self._chain_id)
        signature = self._account.sign(digest)
        wire = RECEIPT_TYPE.pack(receipt, signature)
        return SignedReceipt(receipt, signature, wire), ReceiptLink(receipt.sequence, digest)

    async def adopt_head(self, bootstrap: Address, theirs: ReceiptLink) -> ReceiptLink:
        """Continue the chain from the higher of our head and the one *bootstrap* knows, and return it.

        A ledger restored from a backup would otherwise issue numbers a second time. At one number with two hashes
        theirs wins: it is what our next receipt will be judged against.

        Raises:
            ValueError: no chain can be that long.
        """
        if not 0 <= theirs.sequence <= MAX_SEQUENCE:
            raise ValueError(f"a chain of {theirs.sequence} receipts is not believable")

        def job(connection: sqlite3.Connection) -> ReceiptLink:
            ours = self._batch.head(connection, bootstrap)
            if theirs.sequence > ours.sequence or (theirs.sequence == ours.sequence > 0 and theirs.hash != ours.hash):
                self._batch.move_head(bootstrap, theirs)
                return theirs
            return ours

        return await self._commits.do(job)

    def acknowledge(
        self, signed: SignedAcknowledgement, among: Sequence[Address], now_ms: int, observation: bytes = b""
    ) -> None:
        """Keep *signed*, whose signature the caller checked, with the receipt it names; returns at once.

        Durable within a moment: losing it costs one more offer. One that names no receipt of ours, or one that was
        acknowledged before, changes nothing.

        Args:
            among: the bootstraps whose receipts the signer may acknowledge.
            observation: what it saw of a receipt it disputes, signed; kept if the receipt is ours.
        """
        ack = signed.acknowledgement

        def job(connection: sqlite3.Connection) -> None:
            for bootstrap in among:
                self._batch.add_acknowledgement(
                    bootstrap, ack.sequence, ack.receipt_hash, signed.wire, ack.verdict, now_ms
                )
                if observation:
                    # nobody's word fills this disk: one row for each receipt of our own
                    connection.execute(
                        "INSERT OR IGNORE INTO observations (receipt_hash, signed_observation) SELECT hash, ?"
                        " FROM receipts WHERE bootstrap = ? AND sequence = ? AND hash = ?",
                        (observation, bootstrap, ack.sequence, ack.receipt_hash),
                    )

        self._commits.later(job)

    def remember_stand_in(self, signed: SignedStandIn) -> None:
        """Keep a bootstrap's word for its sibling; returns at once. Lost in a crash, it comes with the next offer."""
        word = signed.stand_in
        row = (word.bootstrap, word.sibling, signed.wire)

        def job(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO stand_ins (bootstrap, sibling, signed_stand_in) VALUES (?, ?, ?)", row
            )

        self._commits.later(job)

    def remember_gap_claim(self, bootstrap: Address, gap: ClaimedGap, wire: bytes, now_ms: int) -> None:
        """Keep that *bootstrap* says it was not given receipts of ours; returns at once, it is said again.

        Only of numbers that this chain has had, and at most `MAX_GAP_CLAIMS` of each bootstrap.
        """
        row = (bootstrap, gap.from_sequence, gap.to_sequence, wire, now_ms)

        def job(connection: sqlite3.Connection) -> None:
            if gap.to_sequence < self._batch.head(connection, bootstrap).sequence:
                connection.execute(
                    "INSERT OR IGNORE INTO gap_claims SELECT ?, ?, ?, ?, ? WHERE"
                    " (SELECT count(*) FROM gap_claims WHERE bootstrap = ?) < ?",
                    (*row, bootstrap, MAX_GAP_CLAIMS),
                )

        self._commits.later(job)

    def remember_gpus(self, session: bytes, models: Mapping[bytes, str]) -> None:
        """Keep the model of each GPU by its name in receipts; in a session, what it was called first stands.

        Returns at once. It is durable before any receipt written later.
        """
        rows = list(models.items())
        of_session = [(session, *row) for row in rows]

        def job(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO gpus (id, model) VALUES (?, ?)", rows)
            connection.executemany(
                "INSERT OR IGNORE INTO session_gpus (session, id, model) VALUES (?, ?, ?)", of_session
            )

        self._commits.later(job)

    def remember_price_list(self, signed: SignedPriceList) -> None:
        """Keep this session's price list; returns at once. It is durable before any receipt of the session."""
        row = (signed.price_list.session, signed.wire)

        def job(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR IGNORE INTO price_lists (session, signed_list) VALUES (?, ?)", row)

        self._commits.later(job)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def owed(
        self, bootstrap: Address, *, written_before_ms: int, after_sequence: int = 0, limit: int = 64
    ) -> list[Owed]:
        """Return receipts of *bootstrap* that it has not acknowledged, oldest first."""

        def job(connection: sqlite3.Connection) -> list[Owed]:
            return _owed_rows(
                connection.execute(
                    "SELECT bootstrap, sequence, signed_order, signed_receipt FROM receipts WHERE bootstrap = ?"
                    " AND acknowledgement IS NULL AND sequence > ? AND written_at_ms < ? ORDER BY sequence LIMIT ?",
                    (bootstrap, after_sequence, written_before_ms, limit),
                )
            )

        return await self._commits.do(job)

    async def between(self, bootstrap: Address, first: int, last: int, *, limit: int = 64) -> list[Owed]:
        """Return the receipts *first* to *last*, acknowledged or not, oldest first: what fills a gap."""

        def job(connection: sqlite3.Connection) -> list[Owed]:
            return _owed_rows(
                connection.execute(
                    "SELECT bootstrap, sequence, signed_order, signed_receipt FROM receipts"
                    " WHERE bootstrap = ? AND sequence BETWEEN ? AND ? ORDER BY sequence LIMIT ?",
                    (bootstrap, max(0, first), min(last, MAX_SEQUENCE), limit),
                )
            )

        return await self._commits.do(job)

    async def totals(self) -> Totals:
        """Return what the ledger holds."""

        def job(connection: sqlite3.Connection) -> Totals:
            (receipts,) = connection.execute("SELECT coalesce(max(rowid), 0) FROM receipts").fetchone()
            (owed,) = connection.execute("SELECT count(*) FROM receipts WHERE acknowledgement IS NULL").fetchone()
            return Totals(receipts, owed)

        return await self._commits.do(job)

    async def answer(self, service: str, task_id: str, attempt: int) -> StoredAnswer | None:
        """Return the stored answer of a detached attempt; None when there is none (any more)."""

        def job(connection: sqlite3.Connection) -> StoredAnswer | None:
            row = connection.execute(
                f"SELECT {_ANSWER_COLUMNS} FROM answers WHERE service = ? AND task_id = ? AND attempt = ?",
                (service, task_id, attempt),
            ).fetchone()
            return StoredAnswer(*row) if row else None

        return await self._commits.do(job)

    async def answers_by_age(self) -> list[StoredAnswer]:
        """Return all stored answers without their bodies, those that were acknowledged first, oldest first."""

        def job(connection: sqlite3.Connection) -> list[StoredAnswer]:
            columns = _ANSWER_COLUMNS.replace("body,", "NULL,", 1).replace("head,", "x'',", 1)
            rows = connection.execute(
                f"SELECT {columns} FROM answers ORDER BY acknowledged_at_ms IS NULL, ended_at_ms"
            ).fetchall()
            return [StoredAnswer(*row) for row in rows]

        return await self._commits.do(job)

    async def forget_answers(self, keys: Sequence[tuple[str, str, int]]) -> None:
        """Drop stored answers by (service, task id, attempt); their receipts stay."""

        def job(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM answers WHERE service = ? AND task_id = ? AND attempt = ?", keys)

        await self._commits.do(job)


_ANSWER_COLUMNS = (
    "service, task_id, attempt, status, head, body, body_file, body_bytes, signed_receipt, receipt_hash, ended_at_ms,"
    " acknowledged_at_ms"
)


def _insert_answer(connection: sqlite3.Connection, answer: StoredAnswer, written: Written, ended_at_ms: int) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO answers (service, task_id, attempt, status, head, body, body_file, body_bytes,"
        " signed_receipt, receipt_hash, ended_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            answer.service,
            answer.task_id,
            answer.attempt,
            answer.status,
            answer.head,
            answer.body,
            answer.body_file,
            answer.body_bytes,
            written.signed.wire,
            written.hash,
            ended_at_ms,
        ),
    )


def _owed_rows(cursor: sqlite3.Cursor) -> list[Owed]:
    return [Owed(Address(bootstrap), sequence, order, receipt) for bootstrap, sequence, order, receipt in cursor]
