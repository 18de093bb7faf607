"""The one writer: a thread that commits what many callers ask for in batches.

A durable commit costs one flush of the disk however many rows it holds. So the thread takes everything that is queued
(at most BATCH_LIMIT operations), writes it in one transaction, and wakes all callers after COMMIT. While a batch is
being flushed the next one collects; a lone caller waits for nobody.

The fast path executes each statement once for all its rows and only compares the number of rows touched. When a batch
fails there, it is rolled back and its operations are repeated one by one under savepoints, so that a bad one fails
alone. When the medium fails, every caller of the batch gets StoreUnavailable, the connection is renewed and the thread
goes on.

Invariant: a caller is told of success only after the COMMIT that holds its rows returned.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import outcome
import sqlalchemy as sa
import structlog

from ngpu_bootstrap.kill_points import reached
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.chains import Chain
from ngpu_bootstrap.store.database import is_medium_fault
from ngpu_bootstrap.store.errors import StoreError, StoreUnavailable
from ngpu_bootstrap.store.handoff import Handoff
from ngpu_bootstrap.store.operations import Operation, Operations, Step
from ngpu_bootstrap.store.records import BrokenLink, FiledReceipt, Filing, Gap, NewReceipt
from ngpu_bootstrap.store.statements import ANY_ROWS, Prepared

BATCH_LIMIT = 256
# Faults of one kind kept as evidence against one node: it makes them, and they cost it nothing.
FAULTS_KEPT = 1000

_log = structlog.get_logger(__name__)

ChainKey = tuple[str, str]


@dataclass(slots=True)
class CommitCounts:
    """What the writer did since it started. *failing*: the last batch could not be written."""

    operations: int = 0
    batches: int = 0
    singly: int = 0
    failed_batches: int = 0
    failing: bool = False


class _RowsMissed(Exception):
    """A statement touched another number of rows than it must."""


class GroupCommit:
    """Owns the writing connection and the thread that uses it.

    Args:
        linger_s: How long a batch waits for more after its first operation, while batches have company. The store by
            itself is fastest with 0 (tests/bench/store_commits.py): callers that queue during a flush make the next
            batch anyway. In a busy bootstrap a commit costs the processor time of half a request, though, and at 16
            clients 2 ms of waiting save 7 % of it all.
    """

    def __init__(
        self,
        engine: sa.Engine,
        operations: Operations,
        handoff: Handoff[Operation],
        *,
        linger_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._operations = operations
        self._handoff = handoff
        self._linger_s = linger_s
        self._connection: sa.Connection | None = None
        self.counts = CommitCounts()
        self._chains: dict[ChainKey, Chain] = {}
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Block until the thread has written everything that was queued before ``Handoff.close``."""
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._handoff.take(BATCH_LIMIT, self._linger_s)) is not None:
            self.serve(batch)
            self._handoff.deliver(batch)
        self._disconnect()

    def serve(self, batch: Sequence[Operation]) -> None:
        """As `write`, whatever happens. The thread calls it, or trio's loop while the thread has nothing to do."""
        try:
            self.write(batch)
        except BaseException as error:
            # a bug of ours must not strand the callers of this batch nor those after it
            _log.exception("store_writer_bug")
            self._fail(batch, error)

    def write(self, batch: Sequence[Operation]) -> None:
        """Commit *batch* and set the outcome of each operation. Blocking: the thread calls it, or a test does."""
        try:
            self._commit_together(batch)
        except Exception as error:
            self._chains.clear()
            if is_medium_fault(error):
                self._give_up(batch, error)
                return
            try:
                self._commit_singly(batch)
            except Exception as error:
                self._give_up(batch, error)
                return
        self.counts.batches += 1
        self.counts.operations += len(batch)
        self.counts.failing = False

    def _commit_together(self, batch: Sequence[Operation]) -> None:
        connection = self._connect()
        filings = _Filings(connection, self._operations, self._chains)
        with connection.begin():
            cursor = connection.connection.cursor()
            for wave in _waves(batch):
                steps = [step for operation in wave for step in operation.steps]
                for operation in wave:
                    if operation.receipt is not None:
                        filed, extra = filings.file(operation.receipt, shown=bool(operation.steps))
                        operation.outcome = outcome.Value(filed)
                        steps.extend(extra)
                    elif operation.given_up is not None:
                        steps.extend(filings.give_up(*operation.given_up))
                _execute_quickly(cursor, steps)
            _execute_quickly(cursor, filings.heads())
            cursor.close()
            reached("commit.inside")
        reached("commit.after")
        own = self._operations.owner
        # a sibling's chain may move on elsewhere: it is read anew each time
        self._chains.update({key: chain for key, chain in filings.chains.items() if own in ("", key[0])})

    def _commit_singly(self, batch: Sequence[Operation]) -> None:
        connection = self._connect()
        self.counts.singly += 1
        # kept apart until COMMIT: an operation that succeeded here still fails with a failing COMMIT
        results: list[outcome.Value[Any] | outcome.Error] = []
        with connection.begin():
            for operation in batch:
                # chains are read anew for each: what the one before added may have been undone
                filings = _Filings(connection, self._operations, {})
                result: Any = None
                try:
                    with connection.begin_nested():
                        steps = list(operation.steps)
                        if operation.receipt is not None:
                            result, extra = filings.file(operation.receipt, shown=bool(operation.steps))
                            steps.extend(extra)
                        elif operation.given_up is not None:
                            steps.extend(filings.give_up(*operation.given_up))
                        execute_steps(connection, steps)
                        execute_steps(connection, filings.heads())
                except _RowsMissed:
                    results.append(outcome.Error(operation.explain(connection, None)))
                except Exception as error:
                    if is_medium_fault(error):
                        raise
                    results.append(outcome.Error(operation.explain(connection, error)))
                else:
                    results.append(outcome.Value(result))
        for operation, single in zip(batch, results, strict=True):
            operation.outcome = single

    def _give_up(self, batch: Sequence[Operation], error: Exception) -> None:
        _log.error("store_unavailable", operations=len(batch), error=str(getattr(error, "orig", error)))
        self.counts.failed_batches += 1
        self.counts.failing = True
        self._disconnect()
        told = StoreUnavailable(f"the store cannot write: {getattr(error, 'orig', error)}")
        told.__cause__ = error
        self._fail(batch, told)

    def _fail(self, batch: Sequence[Operation], error: BaseException) -> None:
        self._chains.clear()
        for operation in batch:
            # each its own: an exception raised in two tasks would share its traceback
            own = StoreUnavailable(str(error)) if isinstance(error, StoreUnavailable) else StoreError(repr(error))
            own.__cause__ = error
            operation.outcome = outcome.Error(own)

    def _connect(self) -> sa.Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except Exception as error:
                _log.info("store_disconnect_failed", error=str(error))


class _Filings:
    """Where the receipts of one transaction go in their chains; nothing of it is kept unless the caller commits."""

    def __init__(self, connection: sa.Connection, operations: Operations, known: dict[ChainKey, Chain]) -> None:
        self._connection = connection
        self._operations = operations
        self._known = known
        self._heads: dict[ChainKey, int] = {}
        # filed by this transaction, perhaps not written yet
        self._fresh: dict[tuple[str, str, int], NewReceipt] = {}
        self.chains: dict[ChainKey, Chain] = {}

    def file(self, receipt: NewReceipt, *, shown: bool) -> tuple[FiledReceipt, list[Step]]:
        """Return what becomes of *receipt* and the steps that make it so.

        *shown*: the operation it came with shows its verdict with the task already.
        """
        if not receipt.authentic:
            evidence: list[Step] = []
            if self._room_for_faults(receipt.bootstrap, receipt.node, "forged"):
                fault = self._operations.fault(receipt, "forged", receipt, expected=b"", actual=b"")
                evidence = [fault, *self._observed(receipt)]
            return FiledReceipt(Filing.FORGED), [*evidence, *self._shown(receipt, shown)]
        chain = self._chain((receipt.bootstrap, receipt.node))
        passed = chain.has(receipt.sequence)
        if passed and (first := self._filed(receipt, receipt.sequence)) is not None:
            return self._file_again(receipt, first, shown=shown)
        # One that came with its answer is the first: no other is taken while its attempt is not known to have ended.
        if not shown and receipt.verdict != "disputed" and (first := self._of_order(receipt)) is not None:
            return FiledReceipt(Filing.REPEATED, first_hash=bytes(first.hash), first_sequence=first.sequence), []
        # passed: it was given up, and comes after all
        broken = self._broken_after(receipt) if passed else chain.add(receipt.sequence, receipt.hash, receipt.previous)
        self._fresh[(receipt.bootstrap, receipt.node, receipt.sequence)] = receipt
        steps = [self._operations.file_receipt(receipt), *self._shown(receipt, shown)]
        if receipt.order:
            steps.append(self._operations.keep_order(receipt))
        if receipt.observation:
            steps.extend(self._observed(receipt))
        if broken:
            room = self._room_for_faults(receipt.bootstrap, receipt.node, "broken_link")
            steps.extend(self._broken_link(receipt, link) for link in broken[:room])
        return FiledReceipt(Filing.FILED, receipt.acknowledgement, tuple(broken)), steps

    def give_up(self, bootstrap: str, node: str, gap: Gap) -> list[Step]:
        """Let the chain of *node* go on beyond *gap*; return the steps that keep what this shows."""
        broken = self._chain((bootstrap, node)).skip(gap)
        room = self._room_for_faults(bootstrap, node, "broken_link") if broken else 0
        return [self._broken_on_file(bootstrap, node, link) for link in broken[:room]]

    def heads(self) -> list[Step]:
        """Return the steps that record the heads that moved."""
        return [
            self._operations.move_head(bootstrap, node, chain.sequence, chain.hash)
            for (bootstrap, node), chain in self.chains.items()
            if chain.sequence != self._heads[(bootstrap, node)]
        ]

    def _file_again(self, receipt: NewReceipt, first: Any, *, shown: bool) -> tuple[FiledReceipt, list[Step]]:
        """Return what becomes of *receipt*, whose sequence *first* has."""
        if first.hash == receipt.hash:
            # the first verdict stands, and its acknowledgement with it
            stands = replace(receipt, verdict=first.verdict, rule=first.rule)
            steps = [self._operations.judge(stands)] if shown else []
            return FiledReceipt(Filing.DUPLICATE, first.acknowledgement), steps
        steps = [self._operations.judge(replace(receipt, verdict="disputed", rule="equivocation"))]
        if self._room_for_faults(receipt.bootstrap, receipt.node, "equivocation"):
            steps.append(
                self._operations.fault(receipt, "equivocation", receipt, expected=first.hash, actual=receipt.hash)
            )
        return FiledReceipt(Filing.EQUIVOCATION, first_hash=bytes(first.hash)), steps

    def _of_order(self, receipt: NewReceipt) -> Any:
        """Return another receipt of the attempt of *receipt* that is filed; None where there is none.

        Two bootstraps of one database may be offered two at the same moment: the attempt's row is locked for it.
        """
        key = (receipt.bootstrap, receipt.node, receipt.task_id, receipt.attempt)
        for fresh in self._fresh.values():
            if (fresh.bootstrap, fresh.node, fresh.task_id, fresh.attempt) == key:
                return fresh
        a, r = tables.attempts, tables.receipts
        lock = sa.select(a.c.attempt).where(a.c.task_id == receipt.task_id, a.c.attempt == receipt.attempt)
        self._connection.execute(lock.with_for_update())
        filed = (
            sa.select(r.c.sequence, r.c.hash)
            .where(r.c.task_id == receipt.task_id, r.c.attempt == receipt.attempt)
            .where(r.c.bootstrap == receipt.bootstrap, r.c.node == receipt.node, r.c.hash != receipt.hash)
        )
        return self._connection.execute(filed.order_by(r.c.sequence).limit(1)).first()

    def _room_for_faults(self, bootstrap: str, node: str, kind: str) -> int:
        """Return how many more faults of this *kind* are kept against *node*: more would only fill the disk.

        Each kind has room of its own: what proves nothing must not crowd out what does.
        """
        f = tables.chain_faults
        kept = sa.select(f.c.sequence).where(f.c.bootstrap == bootstrap, f.c.node == node, f.c.kind == kind)
        return max(0, FAULTS_KEPT - len(self._connection.execute(kept.limit(FAULTS_KEPT)).all()))

    def _broken_after(self, receipt: NewReceipt) -> list[BrokenLink]:
        """Return the break that *receipt* makes visible, beyond whose place the chain has gone on."""
        after = self._filed(receipt, receipt.sequence + 1)
        if after is None or bytes(after.previous) == receipt.hash:
            return []
        return [BrokenLink(receipt.sequence + 1, expected=receipt.hash, actual=bytes(after.previous))]

    def _observed(self, receipt: NewReceipt) -> list[Step]:
        return [self._operations.observe(receipt)] if receipt.observation else []

    def _shown(self, receipt: NewReceipt, shown: bool) -> list[Step]:
        return [] if shown else [self._operations.judge(receipt)]

    def _broken_link(self, receipt: NewReceipt, link: BrokenLink) -> Step:
        if link.sequence == receipt.sequence:
            offender = receipt
        else:
            row = self._filed(receipt, link.sequence)
            offender = replace(receipt, sequence=link.sequence, hash=row.hash, raw=row.raw)
        return self._operations.fault(receipt, "broken_link", offender, expected=link.expected, actual=link.actual)

    def _broken_on_file(self, bootstrap: str, node: str, link: BrokenLink) -> Step:
        r = tables.receipts
        at = (r.c.bootstrap == bootstrap, r.c.node == node, r.c.sequence == link.sequence)
        row = self._connection.execute(sa.select(r.c.hash, r.c.raw, r.c.received_at_ms).where(*at)).one()
        return self._operations.evidence(
            bootstrap=bootstrap,
            node=node,
            sequence=link.sequence,
            kind="broken_link",
            hash=row.hash,
            raw=row.raw,
            expected=link.expected,
            actual=link.actual,
            found_at_ms=row.received_at_ms,
        )

    def _filed(self, receipt: NewReceipt, sequence: int) -> Any:
        """Return the receipt filed at *sequence* of the chain of *receipt*: by this transaction, or a row.

        None where it was given up, or is gone.
        """
        fresh = self._fresh.get((receipt.bootstrap, receipt.node, sequence))
        if fresh is not None:
            return fresh
        r = tables.receipts
        return self._connection.execute(
            sa.select(r.c.hash, r.c.previous, r.c.acknowledgement, r.c.raw, r.c.verdict, r.c.rule).where(
                r.c.bootstrap == receipt.bootstrap, r.c.node == receipt.node, r.c.sequence == sequence
            )
        ).one_or_none()

    def _chain(self, key: ChainKey) -> Chain:
        chain = self.chains.get(key)
        if chain is None:
            known = self._known.get(key)
            chain = known.copy() if known is not None else load_chain(self._connection, *key)
            self.chains[key] = chain
            self._heads[key] = chain.sequence
        return chain


def load_chain(connection: sa.Connection, bootstrap: str, node: str) -> Chain:
    """Return the chain as the database has it."""
    c, r = tables.chains, tables.receipts
    head = connection.execute(
        sa.select(c.c.head_sequence, c.c.head_hash).where(c.c.bootstrap == bootstrap, c.c.node == node)
    ).one_or_none()
    chain = Chain(head.head_sequence, head.head_hash) if head is not None else Chain()
    beyond = sa.select(r.c.sequence, r.c.hash, r.c.previous).where(
        r.c.bootstrap == bootstrap, r.c.node == node, r.c.sequence > chain.sequence
    )
    chain.ahead = {row.sequence: (row.hash, row.previous) for row in connection.execute(beyond)}
    return chain


def _waves(batch: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Split *batch*, in order, so that no wave has two operations of one key."""
    wave: list[Operation] = []
    keys: set[str] = set()
    for operation in batch:
        if operation.key in keys:
            yield wave
            wave, keys = [], set()
        wave.append(operation)
        keys.add(operation.key)
    yield wave


def execute_steps(connection: sa.Connection, steps: Iterable[Step]) -> None:
    """Execute *steps*, each statement once for all its rows, in the order of rank."""
    for prepared, rows in _by_statement(steps):
        _check(prepared, rows, connection.exec_driver_sql(prepared.sql, rows if len(rows) > 1 else rows[0]).rowcount)


def _execute_quickly(cursor: Any, steps: Iterable[Step]) -> None:
    """As `execute_steps`, on the driver's own cursor: a third of the time, and the driver's own errors.

    Whatever is raised here makes the batch be repeated the other way, whose errors can be told apart.
    """
    for prepared, rows in _by_statement(steps):
        if len(rows) > 1:
            cursor.executemany(prepared.sql, rows)
        else:
            cursor.execute(prepared.sql, rows[0])
        _check(prepared, rows, cursor.rowcount)


def _by_statement(steps: Iterable[Step]) -> list[tuple[Prepared, list[tuple[Any, ...]]]]:
    rows: dict[Prepared, list[tuple[Any, ...]]] = {}
    for prepared, parameters in steps:
        rows.setdefault(prepared, []).append(parameters)
    return sorted(rows.items(), key=_rank)


def _check(prepared: Prepared, rows: Sequence[object], touched: int) -> None:
    if prepared.rows != ANY_ROWS and touched != prepared.rows * len(rows):
        raise _RowsMissed(prepared.name)


def _rank(item: tuple[Prepared, object]) -> int:
    return item[0].rank
