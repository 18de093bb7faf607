"""What is kept for how long: final tasks go by age and by the room their bodies take, receipts stay.

A task goes with its bodies, attempts, placements and webhook; its receipts take over the order they answer and whose
task it was, so that each can still be checked offline, by its client and by no other. Oldest first, a bounded number in
each transaction, since others write meanwhile.
Blocking; runs in the store's ``chores`` thread.
"""

from __future__ import annotations

import sqlalchemy as sa

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.records import StoredBody

_FINAL = sa.text("tasks.state >= 3")


def remove(
    connection: sa.Connection, before_ms: int | None, bodies_bytes: int | None, limit: int
) -> tuple[int, list[StoredBody]]:
    """Remove at most *limit* tasks; return how many, and the bodies whose files are no longer named."""
    doomed = _too_old(connection, before_ms, limit)
    if len(doomed) < limit and bodies_bytes is not None:
        doomed += _too_large(connection, bodies_bytes, limit - len(doomed), set(doomed))
    if not doomed:
        return 0, []
    t, a, b, r = tables.tasks, tables.attempts, tables.bodies, tables.receipts
    on_disk = connection.execute(sa.select(b.c.size, b.c.path).where(b.c.task_id.in_(doomed), b.c.path != ""))
    bodies = [StoredBody(row.size, path=row.path) for row in on_disk]
    order = sa.select(a.c.signed_order).where(a.c.task_id == r.c.task_id, a.c.attempt == r.c.attempt).scalar_subquery()
    # a sibling that sweeps at this moment may have removed the attempts since: what it kept of them stays
    kept = sa.func.coalesce(order, r.c.signed_order)
    caller = sa.select(t.c.caller).where(t.c.task_id == r.c.task_id).scalar_subquery()
    connection.execute(
        sa.update(r)
        .where(r.c.task_id.in_(doomed))
        .values(signed_order=kept, caller=sa.func.coalesce(caller, r.c.caller))
    )
    connection.execute(sa.delete(tables.placements).where(tables.placements.c.task_id.in_(doomed)))
    connection.execute(sa.delete(t).where(t.c.task_id.in_(doomed), _FINAL))
    return len(doomed), bodies


def trim_placements(connection: sa.Connection, limit: int) -> None:
    """Remove all but the newest *limit* placements; those of one millisecond go or stay together."""
    p = tables.placements
    oldest_kept = sa.select(p.c.at_ms).order_by(p.c.at_ms.desc()).offset(limit).limit(1)
    last_gone = connection.execute(oldest_kept).scalar()
    if last_gone is not None:
        connection.execute(sa.delete(p).where(p.c.at_ms <= last_gone))


def forget_gpus(connection: sa.Connection, before_ms: int) -> None:
    """Remove what GPUs were offered before by nodes that no receipt is on file of: anybody may offer some.

    Those of each node's last session stay: it may be connected since, and work yet.
    """
    c, n, s, g = tables.chains, tables.nodes, tables.session_gpus, tables.node_gpus
    is_last = sa.exists().where(n.c.address == s.c.node, n.c.session == s.c.session)
    worked = sa.exists().where(c.c.node == s.c.node)
    connection.execute(sa.delete(s).where(s.c.seen_at_ms < before_ms, ~worked, ~is_last))
    shown = sa.exists().where(s.c.node == g.c.node, s.c.gpu == g.c.gpu)
    worked = sa.exists().where(c.c.node == g.c.node)
    connection.execute(sa.delete(g).where(g.c.seen_at_ms < before_ms, ~worked, ~shown))


def bodies_size(connection: sa.Connection) -> int:
    """Return how many bytes all bodies take, in rows and in files."""
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.sum(tables.bodies.c.size), 0))).scalar_one())


def _too_old(connection: sa.Connection, before_ms: int | None, limit: int) -> list[str]:
    if before_ms is None:
        return []
    t = tables.tasks
    # by number, which is about the order of acceptance: the primary key is walked from its old end
    oldest = sa.select(t.c.task_id).where(_FINAL, t.c.accepted_at_ms < before_ms).order_by(t.c.number).limit(limit)
    return list(connection.execute(oldest).scalars())


def _too_large(connection: sa.Connection, bodies_bytes: int, limit: int, going: set[str]) -> list[str]:
    excess = bodies_size(connection) - bodies_bytes
    if excess <= 0:
        return []
    t, b = tables.tasks, tables.bodies
    sizes = (
        sa.select(t.c.task_id, sa.func.sum(b.c.size))
        .select_from(t.join(b, b.c.task_id == t.c.task_id))
        .where(_FINAL)
        .group_by(t.c.number, t.c.task_id)
        .order_by(t.c.number)
        .limit(limit + len(going))
    )
    doomed: list[str] = []
    for task_id, size in connection.execute(sizes):
        if excess <= 0:
            break
        excess -= int(size)
        if task_id not in going:
            doomed.append(task_id)
    return doomed
