"""The threads beside the writer: each owns a connection and answers what is queued in one snapshot.

Two lanes: ``lookups`` (one task by its id) never wait behind ``lists`` (a page of ten thousand). A lookup queued after
a commit was acknowledged sees what it wrote, since its snapshot begins later.

A third lane, ``chores``, writes: what is rare, touches many rows or locks some (leases, retention), and must not hold
up the writer's batches. Each of its jobs is a transaction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import sqlalchemy as sa

from ngpu_bootstrap.store.database import reading
from ngpu_bootstrap.store.errors import StoreError, StoreUnavailable
from ngpu_bootstrap.store.handoff import Handoff, Job

T = TypeVar("T")

_BATCH_LIMIT = 64


class Query(Job):
    """Something to read: *work* gets a connection inside a read transaction."""

    __slots__ = ("work",)

    def __init__(self, work: Callable[[sa.Connection], Any]) -> None:
        super().__init__()
        self.work = work


class Reader:
    """One reading thread."""

    def __init__(self, engine: sa.Engine, name: str, *, capacity: int, writes: bool = False) -> None:
        self._engine = engine
        self._writes = writes
        self._handoff: Handoff[Query] = Handoff(capacity)
        self._thread = threading.Thread(target=self._run, name=f"store-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread; the connection is opened with the first query."""
        self._thread.start()

    def close(self) -> None:
        """Refuse further queries; the queued ones are still answered."""
        self._handoff.close()

    def join(self) -> None:
        """Block until the thread has ended."""
        self._thread.join()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Return what *work* reads (or does, where this lane writes). A cancelled caller's query is still run.

        Raises:
            StoreUnavailable: the database cannot be read.
            StoreClosed: the store is closed.
        """
        result: T = await self._handoff.submit(Query(work))
        return result

    def _run(self) -> None:
        connection: sa.Connection | None = None
        limit = 1 if self._writes else _BATCH_LIMIT
        while (batch := self._handoff.take(limit)) is not None:
            try:
                if connection is None:
                    connection = self._engine.connect()
                    if not self._writes:
                        connection = reading(connection)
                with connection.begin():
                    for query in batch:
                        query.outcome = _answer(query, connection)
            except Exception as error:
                told = f"the store cannot be read: {getattr(error, 'orig', error)}"
                for query in batch:
                    query.outcome = outcome.Error(StoreUnavailable(told))
                if connection is not None:
                    connection.invalidate()
                    connection.close()
                    connection = None
            self._handoff.deliver(batch)
        if connection is not None:
            connection.invalidate()
            connection.close()


def _answer(query: Query, connection: sa.Connection) -> outcome.Value[Any] | outcome.Error:
    try:
        return outcome.Value(query.work(connection))
    except StoreError as error:
        return outcome.Error(error)
    except sa.exc.SQLAlchemyError:
        raise
    except Exception as error:
        return outcome.Error(error)
