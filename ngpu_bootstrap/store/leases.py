"""Several bootstraps on one database: who lives, and whose unfinished tasks are whose.

Theory: each bootstrap renews a lease; a task has an owner. A lease that has ended stands for a dead owner, whose tasks
any living one may make its own. Time is the database's own, so clocks of machines do not matter. Taking over locks the
dead one's lease row first: a bootstrap that comes back renews before it looks for its tasks, so either it renewed in
time and nothing is taken, or it waits and then no longer finds what was taken.

An owner that only slept, and lost its lease without knowing, does no harm: an attempt's number can be begun once, and
a task can end once; whoever comes second is refused. Blocking; runs in the store's ``chores`` thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from ngpu_bootstrap.store import queries, tables
from ngpu_bootstrap.store.records import OpenTask

_UNFINISHED = sa.text("tasks.state < 3")


@dataclass(frozen=True, slots=True)
class Sibling:
    """A bootstrap of this database. *lives* is whether its lease runs."""

    address: str
    lives: bool
    started_at_ms: int
    about: Mapping[str, Any]


class Told(NamedTuple):
    """What a node told the bootstrap it is connected to of one of its deployments.

    Attributes:
        since_ms: when it connected there.
    """

    state: str
    progress: int
    since_ms: int


def database_now_ms(connection: sa.Connection) -> int:
    """Return the time by the clock that all bootstraps of this database share."""
    if connection.dialect.name == "sqlite":
        return time.time_ns() // 1_000_000
    now: int = connection.exec_driver_sql("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").scalar_one()
    return now


def renew(connection: sa.Connection, own: str, lease_ms: int, about: Mapping[str, Any], anew: bool) -> bool:
    """Extend the lease of *own*; return whether it still ran."""
    b = tables.bootstraps
    now_ms = database_now_ms(connection)
    ended = connection.execute(sa.select(b.c.lease_until_ms).where(b.c.address == own).with_for_update()).scalar()
    values: dict[str, Any] = {"lease_until_ms": now_ms + lease_ms, "about": json.dumps(dict(about))}
    if anew:
        keep_presence(connection, own, None, {})
    if ended is None:
        connection.execute(sa.insert(b).values(address=own, started_at_ms=now_ms, **values))
        return True
    if anew:
        values["started_at_ms"] = now_ms
    connection.execute(sa.update(b).where(b.c.address == own).values(**values))
    return int(ended) > now_ms


def end(connection: sa.Connection, own: str) -> None:
    """End the lease of *own* now."""
    b = tables.bootstraps
    connection.execute(sa.update(b).where(b.c.address == own).values(lease_until_ms=0))


def all_bootstraps(connection: sa.Connection) -> list[Sibling]:
    """Return every bootstrap of this database."""
    now_ms = database_now_ms(connection)
    return [
        Sibling(row.address, row.lease_until_ms > now_ms, row.started_at_ms, json.loads(row.about))
        for row in connection.execute(sa.select(tables.bootstraps).order_by(tables.bootstraps.c.address))
    ]


def keep_presence(
    connection: sa.Connection, own: str, gone: Collection[str] | None, came: Mapping[str, Mapping[str, Told]]
) -> None:
    """Write which nodes have left *own* (None: all there were), which have come and what they report, by workspace."""
    p = tables.node_presence
    left = p.c.bootstrap == own
    if gone is None:
        connection.execute(sa.delete(p).where(left))
    elif gone:
        connection.execute(sa.delete(p).where(left, p.c.node.in_(list(gone))))
    if came:
        rows = [{"bootstrap": own, "node": node, "reports": json.dumps(told)} for node, told in came.items()]
        connection.execute(sa.insert(p), rows)


def present_elsewhere(connection: sa.Connection, own: str, nodes: Collection[str]) -> set[str]:
    """Return those of *nodes* that are connected to another bootstrap that lives."""
    p, b = tables.node_presence, tables.bootstraps
    query = (
        sa.select(p.c.node)
        .select_from(p.join(b, b.c.address == p.c.bootstrap))
        .where(p.c.bootstrap != own, b.c.lease_until_ms > database_now_ms(connection), p.c.node.in_(list(nodes)))
    )
    return set(connection.execute(query).scalars())


def told_elsewhere(connection: sa.Connection, own: str, workspace: str) -> dict[str, Told]:
    """Return what nodes that are connected to other bootstraps that live told those of *workspace*."""
    p, b = tables.node_presence, tables.bootstraps
    query = (
        sa.select(p.c.node, p.c.reports)
        .select_from(p.join(b, b.c.address == p.c.bootstrap))
        .where(p.c.bootstrap != own, b.c.lease_until_ms > database_now_ms(connection))
        .where(p.c.reports.contains(json.dumps(workspace), autoescape=True))
    )
    found: dict[str, Told] = {}
    for node, reports in connection.execute(query):
        told = json.loads(reports).get(workspace)
        if told is not None:
            found[node] = Told(*told[:3])
    return found


def claim(connection: sa.Connection, own: str, shared: bool) -> int:
    """Make unfinished tasks that no living bootstrap owns this one's."""
    t = tables.tasks
    foreign = t.c.bootstrap == "" if shared else t.c.bootstrap != own
    return connection.execute(sa.update(t).where(_UNFINISHED, foreign).values(bootstrap=own)).rowcount


def take_over(connection: sa.Connection, own: str, limit: int) -> list[OpenTask]:
    """Make unfinished tasks of the dead this one's; none of a bootstrap whose lease somebody else looks at now."""
    b, t = tables.bootstraps, tables.tasks
    dead = list(
        connection.execute(
            sa.select(b.c.address)
            .where(b.c.lease_until_ms < database_now_ms(connection), b.c.address != own)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if not dead:
        return []
    found = list(
        connection.execute(
            sa.select(t.c.task_id).where(_UNFINISHED, t.c.bootstrap.in_(dead)).order_by(t.c.number).limit(limit)
        ).scalars()
    )
    if not found:
        return []
    connection.execute(sa.update(t).where(_UNFINISHED, t.c.task_id.in_(found)).values(bootstrap=own))
    return queries.unfinished(connection, own, found)


def owned(connection: sa.Connection, own: str) -> set[str]:
    """Return the ids of the unfinished tasks of *own*."""
    t = tables.tasks
    return set(connection.execute(sa.select(t.c.task_id).where(_UNFINISHED, t.c.bootstrap == own)).scalars())


def cancels_asked(connection: sa.Connection, own: str) -> list[str]:
    """Return the unfinished tasks of *own* that were asked to end."""
    t = tables.tasks
    asked = sa.select(t.c.task_id).where(_UNFINISHED, t.c.bootstrap == own, t.c.cancel_asked_at_ms.is_not(None))
    return list(connection.execute(asked).scalars())


def workspaces_mark(connection: sa.Connection) -> tuple[Any, ...]:
    """Return what changes with any workspace or token, with where they run and what is on its way.

    Times are added up, since the latest of them need not be the last change: clocks of machines differ.
    """
    w, k = tables.workspaces, tables.workspace_tokens
    d, r = tables.deployments, tables.workspace_rollouts
    of_deployments = sa.select(sa.func.count(), sa.func.sum(d.c.assigned_at_ms), sa.func.sum(d.c.revision))
    of_rollouts = sa.select(sa.func.count(), sa.func.sum(r.c.target), sa.func.sum(r.c.failed_at_ms))
    of_workspaces = sa.select(sa.func.count(), sa.func.sum(w.c.updated_at_ms), sa.func.sum(w.c.revision))
    of_tokens = sa.select(sa.func.count(), sa.func.sum(k.c.created_at_ms), sa.func.sum(k.c.expires_at_ms))
    return (
        *connection.execute(of_workspaces.select_from(w)).one(),
        *connection.execute(of_tokens.select_from(k)).one(),
        *connection.execute(of_deployments.select_from(d)).one(),
        *connection.execute(of_rollouts.select_from(r)).one(),
    )


def lock_placement(connection: sa.Connection) -> None:
    """Let nobody else write where workspaces run until this transaction ends."""
    if connection.dialect.name != "sqlite":
        connection.execute(sa.select(tables.about.c.value).where(tables.about.c.key == "network").with_for_update())
