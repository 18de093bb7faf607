"""Tasks that wait to be run again, as stored: who has each in hand, and what is needed to run it. Blocking; in chores.

A row is its bootstrap's until it is dropped; whoever drops it, and nobody else, records what came of it. What a dead
bootstrap leaves another takes over, as with unfinished tasks (`leases`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.leases import database_now_ms


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """A task to be run again.

    Attributes:
        bootstrap: which has it in hand.
        node, ip, wallet, models: the one that ran it, as it was then; models are names, one a line.
        status, hash: its answer's.
        request: sealed by that bootstrap; empty where the task's own record has it.
    """

    task_id: str
    bootstrap: str
    workspace: str
    revision: int
    at_ms: int
    node: str
    ip: str
    wallet: str
    models: str
    status: int
    hash: bytes
    request: bytes = b""


def put(connection: sa.Connection, rows: Sequence[WaitingRow]) -> None:
    """Keep *rows*."""
    connection.execute(sa.insert(tables.waiting_rechecks), [asdict(row) for row in rows])


def drop(connection: sa.Connection, own: str, task_id: str) -> bool:
    """Forget one of *own*; return whether it was there."""
    w = tables.waiting_rechecks
    return connection.execute(sa.delete(w).where(w.c.task_id == task_id, w.c.bootstrap == own)).rowcount == 1


def holds(connection: sa.Connection, own: str, task_id: str) -> bool:
    """Return whether a task is in the hands of *own*."""
    w = tables.waiting_rechecks
    found = sa.select(w.c.task_id).where(w.c.task_id == task_id, w.c.bootstrap == own)
    return connection.execute(found).scalar() is not None


def of_bootstrap(connection: sa.Connection, own: str, limit: int) -> list[WaitingRow]:
    """Return the oldest in the hands of *own*."""
    w = tables.waiting_rechecks
    query = sa.select(w).where(w.c.bootstrap == own).order_by(w.c.at_ms, w.c.task_id).limit(limit)
    return [WaitingRow(**row._asdict()) for row in connection.execute(query)]


def take_over(connection: sa.Connection, own: str, limit: int) -> list[WaitingRow]:
    """Make what dead bootstraps left this one's; none of one whose lease somebody else looks at now."""
    w, b = tables.waiting_rechecks, tables.bootstraps
    dead = list(
        connection.execute(
            sa.select(b.c.address)
            .where(b.c.lease_until_ms < database_now_ms(connection), b.c.address != own)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if not dead:
        return []
    left = sa.select(w.c.task_id).where(w.c.bootstrap.in_(dead)).order_by(w.c.at_ms, w.c.task_id).limit(limit)
    found = list(connection.execute(left).scalars())
    if not found:
        return []
    connection.execute(sa.update(w).where(w.c.task_id.in_(found)).values(bootstrap=own))
    query = sa.select(w).where(w.c.task_id.in_(found)).order_by(w.c.at_ms, w.c.task_id)
    return [WaitingRow(**row._asdict()) for row in connection.execute(query)]
