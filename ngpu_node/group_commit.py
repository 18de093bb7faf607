"""Commits what many tasks ask of a SQLite connection together: in the loop while the disk is fast, else in a thread.

Which of the two is `ngpu_daemon.turn_commits`'s to say. Only one of them has work at a time.

The thread takes all that wait (at most `BATCH`), commits once, and wakes the waiters: while a commit is on its way to
the disk the next batch gathers, so one `fsync` serves many without a lone one waiting for company. Where batches hold
more than `COMPANY` on average, which means load, each waits `LINGER_S` for more: a commit costs the processor time of
half a request. What is not urgent rides along, or is committed after `LAZY_S` at the latest.

When a batch fails its jobs run again one by one, so that one bad row costs only itself. When the disk itself fails,
`failed` is set.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import structlog
import trio

from ngpu_daemon.turn_commits import Pace, TurnCommits
from ngpu_node.errors import LedgerUnavailable

log = structlog.get_logger(__name__)

BATCH = 256
LAZY_S = 0.05
LINGER_S = 0.002
COMPANY = 1.4

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]


class Transactions(Protocol):
    """Whoever keeps state that must follow the transactions; called in the thread."""

    def before_commit(self, connection: sqlite3.Connection) -> None:
        """Write what the transaction's jobs left to be written once."""

    def after_rollback(self) -> None:
        """Forget everything that was assigned since the last commit."""


class _Waiting(Generic[T]):
    """A job on its way through the thread: *task* is woken, on trio's side, after COMMIT or failure."""

    __slots__ = ("done", "error", "job", "result", "since_s", "task")

    def __init__(self, job: Job[T], task: trio.lowlevel.Task | None = None, since_s: float = 0.0) -> None:
        self.job = job
        self.task = task
        self.since_s = since_s
        self.done = False
        self.result: T | None = None
        self.error: Exception | None = None

    def wake(self) -> None:
        """Let whoever waits go on, if anyone still does."""
        self.done = True
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task)


class GroupCommit:
    """The thread and its queue; made inside a trio run, closed by `aclose`.

    Attributes:
        failed: set when the disk could not take a write. Nothing committed before is affected.
    """

    def __init__(
        self, connection: sqlite3.Connection, transactions: Transactions, *, name: str, pace: Pace | None = None
    ) -> None:
        """Start the thread. The connection is ours from here on, and closed by `aclose`.

        Args:
            pace: decides when the loop commits by itself.
        """
        self._connection = connection
        self._transactions = transactions
        self._urgent: queue.SimpleQueue[_Waiting[Any] | None] = queue.SimpleQueue()
        self._lazy: deque[_Waiting[Any]] = deque()
        self._to_the_end: set[_Waiting[Any]] = set()
        self._token = trio.lowlevel.current_trio_token()
        self._company = 1.0  # urgent jobs in a batch, on a moving average
        self._closed = False
        self.failed = trio.Event()
        self._in_thread = 0
        self._turns: TurnCommits[_Waiting[Any]] = TurnCommits(self._commit_here, lazy_s=LAZY_S, pace=pace)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """Commit what waits and close. Cancellation does not cut a commit short."""
        if self._closed:
            return
        self._closed = True
        self._turns.close()
        self._urgent.put(None)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
            self._connection.close()

    async def do(self, job: Job[T], *, to_the_end: bool = False) -> T:
        """Run *job* in a transaction with others and return its result once that is durable.

        After cancellation it may or may not have been committed.

        Args:
            to_the_end: wait for the outcome even when cancelled, as under a shield that costs nothing; bounded by
                `give_up`.

        Raises:
            LedgerUnavailable: it was not committed; or, after `give_up`, nobody knows.
        """
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        waiting = _Waiting(job, None, trio.current_time())
        if not self._in_thread and self._turns.allowed:
            self._turns.add(waiting)
        else:
            self._in_thread += 1
            self._urgent.put(waiting)

        def stop_waiting(_: object) -> trio.lowlevel.Abort:
            if to_the_end:
                return trio.lowlevel.Abort.FAILED
            waiting.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        if to_the_end:
            self._to_the_end.add(waiting)
        if not waiting.done:
            waiting.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(stop_waiting)
        self._to_the_end.discard(waiting)
        if waiting.error is not None:
            raise LedgerUnavailable(f"the ledger could not be written: {waiting.error}") from waiting.error
        return waiting.result  # type: ignore[return-value]

    def give_up(self, after_s: float) -> None:
        """End the waits to the end that have lasted longer than *after_s*: a disk that hangs holds up no shutdown."""
        latest_s = trio.current_time() - after_s
        for waiting in [one for one in self._to_the_end if one.since_s < latest_s and one.task is not None]:
            waiting.error = TimeoutError(f"no commit within {after_s:g} s")
            waiting.wake()

    def later(self, job: Job[None]) -> None:
        """Have *job* committed within `LAZY_S`; returns at once, and nobody hears of a failure."""
        if self._closed:
            return
        if not self._in_thread and self._turns.allowed:
            self._turns.add_lazy(_Waiting(job))
            return
        self._in_thread += 1
        self._lazy.append(_Waiting(job))
        if len(self._lazy) == 1:
            # The thread sleeps without a time limit while nothing waits; this job, which does nothing, makes it look.
            self._urgent.put(_Waiting(_nothing))

    def _commit_here(self, jobs: list[_Waiting[Any]]) -> None:
        """Commit what the loop gathered, unless the thread was given work since: two must not write at once."""
        if self._in_thread:
            self._in_thread += len(jobs)
            for waiting in jobs:
                self._urgent.put(waiting)
            return
        self._commit(jobs)
        for waiting in jobs:
            waiting.wake()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            log.exception("ledger_thread_died")
            self._wake(self.failed.set)
            raise

    def _serve(self) -> None:
        """Gather, commit, wake; until None comes."""
        closing = False
        lazy_since_s: float | None = None
        while not closing:
            batch, closing = self._gather(lazy_since_s)
            if self._lazy and not batch and not closing:
                now_s = time.monotonic()
                lazy_since_s = lazy_since_s or now_s
                if now_s < lazy_since_s + LAZY_S:
                    continue
            while self._lazy and (len(batch) < BATCH or closing):
                batch.append(self._lazy.popleft())
            lazy_since_s = time.monotonic() if self._lazy else None
            if batch:
                self._commit(batch)
                self._settle(batch)

    def _gather(self, lazy_since_s: float | None) -> tuple[list[_Waiting[Any]], bool]:
        """Wait for something urgent, at most until the lazy ones are due; return all there is, and whether to end."""
        batch: list[_Waiting[Any]] = []
        timeout_s = None if lazy_since_s is None else max(0.0, lazy_since_s + LAZY_S - time.monotonic())
        try:
            waiting = self._urgent.get(timeout=timeout_s)
        except queue.Empty:
            return batch, False
        if waiting is not None and waiting.job is not _nothing and self._company >= COMPANY:
            time.sleep(LINGER_S)
        while waiting is not None:
            if waiting.job is not _nothing:
                batch.append(waiting)
            if len(batch) >= BATCH or self._urgent.empty():
                break
            waiting = self._urgent.get_nowait()
        if batch:
            self._company += (len(batch) - self._company) / 8
        return batch, waiting is None

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
            self._transactions.before_commit(connection)
            connection.execute("COMMIT")
        except BaseException:
            self._transactions.after_rollback()
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
            self._in_thread -= len(batch)
            for waiting in batch:
                waiting.wake()

        self._wake(wake)

    def _wake(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return  # the daemon is gone; what was committed is what counts


def _nothing(connection: sqlite3.Connection) -> None:
    """The job that only wakes the thread."""
