"""The ledger: every receipt this node has written, chained per bootstrap, durable before it leaves.

A receipt is a claim for money, and each names the one before it, so there must never be two with one sequence number.
Therefore sequence and predecessor are assigned, and the receipt signed over them, inside the transaction that stores
it, and only one thread ever writes. The thread takes all that wait (at most `BATCH`), commits once, and wakes the
waiters: while a commit is on its way to the disk the next batch gathers, so one `fsync` serves many receipts without
a lone one waiting for company. What is not urgent (acknowledgements) rides along, or is committed after `LAZY_S` at
the latest.

When a batch fails its jobs run again one by one, so that one bad row costs only itself. When the disk itself fails,
`failed` is
set: the daemon ends, since a node that cannot keep receipts must not work.
"""

from __future__ import annotations

import dataclasses
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog
import trio

from ngpu_node import ledger_schema
from ngpu_node.errors import LedgerUnavailable
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipts import FIRST_PREVIOUS, RECEIPT_TYPE, ReceiptLink, SignedReceipt, TaskReceipt

log = structlog.get_logger(__name__)

BATCH = 256
LAZY_S = 0.05

#: Beyond this a bootstrap's claim about our own chain is nonsense, not a backup we lost.
MAX_SEQUENCE = 2**53

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]


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


class _Waiting(Generic[T]):
    """A job on its way through the writer: *done* is set, on trio's side, after COMMIT or failure."""

    __slots__ = ("done", "error", "job", "result")

    def __init__(self, job: Job[T], done: trio.Event | None) -> None:
        self.job = job
        self.done = done
        self.result: T | None = None
        self.error: Exception | None = None


class Ledger:
    """The ledger of one node; made by `open`, used from one trio run, closed by `aclose`.

    Attributes:
        failed: set when the disk could not take a write. Nothing written before is affected.
    """

    def __init__(self, connection: sqlite3.Connection, account: Account, chain_id: int) -> None:
        self._connection = connection
        self._account = account
        self._chain_id = chain_id
        self._heads: dict[Address, ReceiptLink] = {}
        self._moved: set[Address] = set()
        self._urgent: queue.SimpleQueue[_Waiting[Any] | None] = queue.SimpleQueue()
        self._lazy: deque[_Waiting[Any]] = deque()
        self._token = trio.lowlevel.current_trio_token()
        self._closed = False
        self.failed = trio.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, path: Path, account: Account, chain_id: int) -> Ledger:
        """Open or make the ledger of *account* at *path*; the caller closes it.

        Raises:
            NodeConfigurationError: it was written by a later version, or is damaged.
        """
        connection = await trio.to_thread.run_sync(ledger_schema.connect, path)
        return cls(connection, account, chain_id)

    async def aclose(self) -> None:
        """Commit what waits and close. Cancellation does not cut a commit short."""
        if self._closed:
            return
        self._closed = True
        self._urgent.put(None)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
            self._connection.close()

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(self, draft: TaskReceipt, order: SignedOrder, answer: StoredAnswer | None = None) -> Written:
        """Give *draft* its place in its bootstrap's chain, sign it, make it durable, and return it.

        Args:
            draft: the receipt but for `sequence` and `previous`, whose values are ignored.
            answer: a detached attempt's answer, stored in the same transaction; its receipt fields are filled in.

        After cancellation the receipt may or may not have been written; if it was, it is owed like any other.

        Raises:
            LedgerUnavailable: it could not be made durable, and has no place in the chain.
        """

        def job(connection: sqlite3.Connection) -> Written:
            written = self._append(connection, draft, order)
            if answer is not None:
                _insert_answer(connection, answer, written, draft.ended_at_ms)
            return written

        return await self._do(job)

    def _append(self, connection: sqlite3.Connection, draft: TaskReceipt, order: SignedOrder) -> Written:
        head = self._head(connection, draft.bootstrap)
        receipt = dataclasses.replace(draft, sequence=head.sequence + 1, previous=head.hash)
        signed, link = self._sign(receipt)
        connection.execute(
            "INSERT INTO receipts (bootstrap, sequence, hash, task_id, attempt, signed_order, signed_receipt,"
            " written_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                draft.bootstrap,
                link.sequence,
                link.hash,
                order.order.task_id,
                order.order.attempt,
                order.wire,
                signed.wire,
                draft.ended_at_ms,
            ),
        )
        self._set_head(draft.bootstrap, link)
        return Written(signed, link.hash)

    def _sign(self, receipt: TaskReceipt) -> tuple[SignedReceipt, ReceiptLink]:
        # As `sign_receipt`, but the digest is needed for the chain too, and computed once.
        digest = receipt.digest(self._chain_id)
        signature = self._account.sign(digest)
        wire = RECEIPT_TYPE.pack(receipt, signature)
        return SignedReceipt(receipt, signature, wire), ReceiptLink(receipt.sequence, digest)

    def _head(self, connection: sqlite3.Connection, bootstrap: Address) -> ReceiptLink:
        head = self._heads.get(bootstrap)
        if head is None:
            row = connection.execute("SELECT sequence, hash FROM chains WHERE bootstrap = ?", (bootstrap,)).fetchone()
            head = self._heads[bootstrap] = ReceiptLink(*row) if row else ReceiptLink(0, FIRST_PREVIOUS)
        return head

    def _set_head(self, bootstrap: Address, link: ReceiptLink) -> None:
        self._heads[bootstrap] = link
        self._moved.add(bootstrap)

    def _write_heads(self, connection: sqlite3.Connection) -> None:
        """Store the heads that moved in this transaction, once each however many receipts it has."""
        for bootstrap in self._moved:
            head = self._heads[bootstrap]
            connection.execute(
                "INSERT INTO chains (bootstrap, sequence, hash) VALUES (?, ?, ?)"
                " ON CONFLICT (bootstrap) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash",
                (bootstrap, head.sequence, head.hash),
            )
        self._moved.clear()

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
            ours = self._head(connection, bootstrap)
            if theirs.sequence > ours.sequence or (theirs.sequence == ours.sequence > 0 and theirs.hash != ours.hash):
                self._set_head(bootstrap, theirs)
                return theirs
            return ours

        return await self._do(job)

    def acknowledge(self, signed: SignedAcknowledgement, among: Sequence[Address], now_ms: int) -> None:
        """Keep *signed*, whose signature the caller checked, with the receipt it names; returns at once.

        Durable within `LAZY_S`: losing it costs one more offer. One that names no receipt of ours, or one that was
        acknowledged before, changes nothing.

        Args:
            among: the bootstraps whose receipts the signer may acknowledge.
        """
        ack = signed.acknowledgement

        def job(connection: sqlite3.Connection) -> None:
            for bootstrap in among:
                cursor = connection.execute(
                    "UPDATE receipts SET acknowledgement = ?, verdict = ?"
                    " WHERE bootstrap = ? AND sequence = ? AND hash = ? AND acknowledgement IS NULL",
                    (signed.wire, ack.verdict, bootstrap, ack.sequence, ack.receipt_hash),
                )
                if cursor.rowcount:
                    connection.execute(
                        "UPDATE answers SET acknowledged_at_ms = ? WHERE receipt_hash = ?", (now_ms, ack.receipt_hash)
                    )
                    return

        self._put_lazy(job)

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

        return await self._do(job)

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

        return await self._do(job)

    async def totals(self) -> Totals:
        """Return what the ledger holds."""

        def job(connection: sqlite3.Connection) -> Totals:
            (receipts,) = connection.execute("SELECT coalesce(max(rowid), 0) FROM receipts").fetchone()
            (owed,) = connection.execute("SELECT count(*) FROM receipts WHERE acknowledgement IS NULL").fetchone()
            return Totals(receipts, owed)

        return await self._do(job)

    async def answer(self, service: str, task_id: str, attempt: int) -> StoredAnswer | None:
        """Return the stored answer of a detached attempt; None when there is none (any more)."""

        def job(connection: sqlite3.Connection) -> StoredAnswer | None:
            row = connection.execute(
                f"SELECT {_ANSWER_COLUMNS} FROM answers WHERE service = ? AND task_id = ? AND attempt = ?",
                (service, task_id, attempt),
            ).fetchone()
            return StoredAnswer(*row) if row else None

        return await self._do(job)

    async def answers_by_age(self) -> list[StoredAnswer]:
        """Return all stored answers without their bodies, those that were acknowledged first, oldest first."""

        def job(connection: sqlite3.Connection) -> list[StoredAnswer]:
            columns = _ANSWER_COLUMNS.replace("body,", "NULL,", 1).replace("head,", "x'',", 1)
            rows = connection.execute(
                f"SELECT {columns} FROM answers ORDER BY acknowledged_at_ms IS NULL, ended_at_ms"
            ).fetchall()
            return [StoredAnswer(*row) for row in rows]

        return await self._do(job)

    async def forget_answers(self, keys: Sequence[tuple[str, str, int]]) -> None:
        """Drop stored answers by (service, task id, attempt); their receipts stay."""

        def job(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM answers WHERE service = ? AND task_id = ? AND attempt = ?", keys)

        await self._do(job)

    # -- the writer ----------------------------------------------------------------------------------------------------

    async def _do(self, job: Job[T]) -> T:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        waiting = _Waiting(job, trio.Event())
        self._urgent.put(waiting)
        assert waiting.done is not None
        await waiting.done.wait()
        if waiting.error is not None:
            raise LedgerUnavailable(f"the ledger could not be written: {waiting.error}") from waiting.error
        return waiting.result  # type: ignore[return-value]

    def _put_lazy(self, job: Job[None]) -> None:
        if self._closed:
            return
        self._lazy.append(_Waiting(job, None))
        if len(self._lazy) == 1:
            # The writer sleeps without a time limit while nothing waits; this job, which does nothing, makes it look.
            self._urgent.put(_Waiting(_nothing, None))

    def _run(self) -> None:
        """The writer thread: gather, commit, wake; until None comes."""
        closing = False
        lazy_since: float | None = None
        while not closing:
            batch: list[_Waiting[Any]] = []
            try:
                timeout = None if lazy_since is None else max(0.0, lazy_since + LAZY_S - time.monotonic())
                first = self._urgent.get(timeout=timeout)
                while first is not None:
                    if first.job is not _nothing:
                        batch.append(first)
                    if len(batch) >= BATCH or self._urgent.empty():
                        break
                    first = self._urgent.get_nowait()
                closing = first is None
            except queue.Empty:
                pass
            if self._lazy and not batch and not closing:
                now = time.monotonic()
                if lazy_since is None:
                    lazy_since = now
                if now < lazy_since + LAZY_S:
                    continue
            lazy_since = None
            while self._lazy and (len(batch) < BATCH or closing):
                batch.append(self._lazy.popleft())
            if self._lazy:
                lazy_since = time.monotonic()
            if batch:
                self._commit(batch)
                self._settle(batch)

    def _commit(self, batch: list[_Waiting[Any]]) -> None:
        try:
            self._transact(batch)
            return
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
        for waiting in batch:
            try:
                self._transact([waiting])
            except Exception as error:
                self._fail(waiting, error)

    def _transact(self, batch: list[_Waiting[Any]]) -> None:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for waiting in batch:
                waiting.result = waiting.job(connection)
            self._write_heads(connection)
            connection.execute("COMMIT")
        except BaseException:
            # what was assigned in this transaction never was: read the heads again
            self._heads.clear()
            self._moved.clear()
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _fail(self, waiting: _Waiting[Any], error: Exception) -> None:
        waiting.error = error
        log.error("ledger_write_failed", error=str(error), kind=type(error).__name__)
        if isinstance(error, sqlite3.OperationalError):
            self._wake(self.failed.set)

    def _settle(self, batch: list[_Waiting[Any]]) -> None:
        def wake() -> None:
            for waiting in batch:
                if waiting.done is not None:
                    waiting.done.set()

        self._wake(wake)

    def _wake(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return  # the daemon is gone; what was committed is what counts


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


def _nothing(connection: sqlite3.Connection) -> None:
    """The job that only wakes the writer."""
