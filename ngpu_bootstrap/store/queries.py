"""Reading: the selects, and how their rows become records. Blocking; they run in the read threads."""

from __future__ import annotations

import functools
import heapq
import json
from collections.abc import Collection, Iterable
from typing import Any, Final

import sqlalchemy as sa

from ngpu_bootstrap.scheduling.standing import Standing
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import insert_or_ignore
from ngpu_bootstrap.store.errors import RecordRefused, UnknownTask
from ngpu_bootstrap.store.records import (
    AskedGap,
    AttemptRecord,
    ChainFault,
    DeploymentRow,
    Gap,
    HeaderList,
    NewReceipt,
    NodeRow,
    OpenTask,
    Part,
    ReceiptRecord,
    RolloutRow,
    StoredBody,
    TaskDetail,
    TaskFilter,
    TaskIdPage,
    TaskPage,
    TaskRecord,
    WorkspaceRow,
    WorkspaceToken,
)
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.identity import Address

MAX_PAGE: Final = 10_000

_TASK_COLUMNS: Final = tuple(tables.tasks.columns)
_RECEIPT_COLUMNS: Final = tuple(
    column for column in tables.receipts.columns if column.name not in ("signed_order", "caller")
)
_request = tables.bodies.alias("request")
_response = tables.bodies.alias("response")


def _task_with_bodies() -> sa.Select[Any]:
    t = tables.tasks
    joined = t
    columns: list[sa.ColumnElement[Any]] = list(_TASK_COLUMNS)
    for alias, part in ((_request, Part.REQUEST), (_response, Part.RESPONSE)):
        on = sa.and_(alias.c.task_id == t.c.task_id, alias.c.part == sa.literal_column(f"'{part.value}'"))
        joined = joined.outerjoin(alias, on)  # type: ignore[assignment]
        columns += [alias.c.size, alias.c.content, alias.c.path]
    return sa.select(*columns).select_from(joined).where(t.c.task_id == sa.bindparam("key"))


_TASK_WITH_BODIES: Final = _task_with_bodies()


def task(connection: sa.Connection, task_id: str) -> TaskRecord | None:
    """Return a task with its bodies."""
    row = connection.execute(_TASK_WITH_BODIES, {"key": task_id}).one_or_none()
    if row is None:
        return None
    width = len(_TASK_COLUMNS)
    return _task(row[:width], _body(row[width : width + 3]), _body(row[width + 3 :]))


_TASK_STATE: Final = sa.select(*_TASK_COLUMNS).where(tables.tasks.c.task_id == sa.bindparam("key"))


def task_state(connection: sa.Connection, task_id: str) -> TaskRecord | None:
    """Return a task without its bodies."""
    row = connection.execute(_TASK_STATE, {"key": task_id}).one_or_none()
    return _task(row) if row is not None else None


def task_by_key(connection: sa.Connection, workspace: str, key: str) -> str | None:
    """Return the id of the task a workspace asked for under an idempotency key."""
    t = tables.tasks
    found: str | None = connection.execute(
        sa.select(t.c.task_id).where(t.c.workspace == workspace, t.c.idempotency_key == key)
    ).scalar()
    return found


def detail(connection: sa.Connection, task_id: str) -> TaskDetail:
    """Return everything known of a task."""
    record = task(connection, task_id)
    if record is None:
        raise UnknownTask(task_id)
    return TaskDetail(record, tuple(attempts(connection, task_id)), tuple(receipts(connection, task_id)))


def attempts(connection: sa.Connection, task_id: str) -> list[AttemptRecord]:
    """Return a task's attempts, first one first."""
    a = tables.attempts
    rows = connection.execute(sa.select(a).where(a.c.task_id == task_id).order_by(a.c.attempt))
    return [_attempt(row) for row in rows]


def receipts(connection: sa.Connection, task_id: str, attempt: int | None = None) -> list[ReceiptRecord]:
    """Return a task's receipts, by attempt and sequence; *attempt* narrows them to one."""
    r, a = tables.receipts, tables.attempts
    joined = r.outerjoin(a, sa.and_(a.c.task_id == r.c.task_id, a.c.attempt == r.c.attempt))
    query = (
        sa.select(
            *_RECEIPT_COLUMNS, r.c.caller, sa.func.coalesce(a.c.signed_order, r.c.signed_order).label("signed_order")
        )
        .select_from(joined)
        .where(r.c.task_id == task_id)
        .order_by(r.c.attempt, r.c.sequence)
    )
    if attempt is not None:
        query = query.where(r.c.attempt == attempt)
    return [_receipt(row) for row in connection.execute(query)]


def tasks(connection: sa.Connection, wanted: TaskFilter) -> TaskPage:
    """Return one page of tasks, newest first, without bodies."""
    limit = max(1, min(wanted.limit, MAX_PAGE))
    rows = _page(connection, wanted, limit)
    records = tuple(_task(row) for row in rows[:limit])
    last = records[-1] if len(rows) > limit else None
    return TaskPage(records, f"{last.accepted_at_ms}-{last.number}" if last else "")


def task_ids(connection: sa.Connection, wanted: TaskFilter) -> TaskIdPage:
    """Return one page of task ids, newest first: what a long list needs of each task, and no more."""
    limit = max(1, min(wanted.limit, MAX_PAGE))
    t = tables.tasks
    rows = _page(connection, wanted, limit, (t.c.task_id, t.c.accepted_at_ms, t.c.number))
    last = rows[limit - 1] if len(rows) > limit else None
    return TaskIdPage(tuple(row[0] for row in rows[:limit]), f"{last[1]}-{last[2]}" if last else "")


def page_query(
    wanted: TaskFilter,
    limit: int,
    columns: tuple[sa.Column[Any], ...] = _TASK_COLUMNS,
    *,
    on_others: bool = False,
) -> sa.Select[Any]:
    """Return the select of one page and one row more, which tells whether another page follows.

    Args:
        on_others: of the calls that a workspace made on others, rather than of those that ran on it for itself.
    """
    t = tables.tasks
    query = sa.select(*columns).order_by(t.c.accepted_at_ms.desc(), t.c.number.desc()).limit(limit + 1)
    if wanted.workspace is not None and on_others:
        query = query.where(t.c.caller == wanted.workspace, sa.text("tasks.caller <> ''"))
    elif wanted.workspace is not None:
        query = query.where(t.c.workspace == wanted.workspace, t.c.caller == "")
    for column, value in ((t.c.node, wanted.node), (t.c.btc_address, wanted.btc_address)):
        if value is not None:
            query = query.where(column == value)
    if wanted.node is not None:
        query = query.where(sa.text("tasks.node <> ''"))  # in these words, so that its index is found
    if wanted.since_ms is not None:
        query = query.where(t.c.accepted_at_ms >= wanted.since_ms)
    if wanted.before_ms is not None:
        query = query.where(t.c.accepted_at_ms < wanted.before_ms)
    if wanted.states:
        query = query.where(t.c.state.in_([int(state) for state in wanted.states]))
    if wanted.after:
        query = query.where(sa.tuple_(t.c.accepted_at_ms, t.c.number) < sa.tuple_(*_parse_cursor(wanted.after)))
    return query


def _page(
    connection: sa.Connection, wanted: TaskFilter, limit: int, columns: tuple[sa.Column[Any], ...] = _TASK_COLUMNS
) -> list[Any]:
    """Return one page and one row more, newest first.

    Each of a workspace's two kinds of calls has an index that gives them in order; asked for together, a database
    would sort all of them.
    """
    rows = list(connection.execute(page_query(wanted, limit, columns)))
    if wanted.workspace is not None:
        others = list(connection.execute(page_query(wanted, limit, columns, on_others=True)))
        if others:
            rows = list(heapq.merge(rows, others, key=lambda row: (-row.accepted_at_ms, -row.number)))[: limit + 1]
    return rows


def unfinished(
    connection: sa.Connection, owner: str | None = None, among: Collection[str] | None = None
) -> list[OpenTask]:
    """Return every task that is not final, oldest first, without bodies; of one bootstrap, of the ids *among*."""
    t, a, b = tables.tasks, tables.attempts, tables.bodies
    joined = t.outerjoin(a, sa.and_(a.c.task_id == t.c.task_id, a.c.attempt == t.c.attempts)).outerjoin(
        b, sa.and_(b.c.task_id == t.c.task_id, b.c.part == Part.REQUEST.value)
    )
    query = (
        sa.select(*_TASK_COLUMNS, *a.columns, b.c.size)
        .select_from(joined)
        .where(sa.text("tasks.state < 3"))
        .order_by(t.c.number)
    )
    if owner is not None:
        query = query.where(t.c.bootstrap == owner)
    if among is not None:
        query = query.where(t.c.task_id.in_(list(among)))
    width = len(_TASK_COLUMNS)
    return [
        OpenTask(_task(row[:width]), _attempt(row[width:-1]) if row[width] is not None else None, row[-1] is not None)
        for row in connection.execute(query)
    ]


def workspaces(connection: sa.Connection, *, removed: bool = False) -> list[WorkspaceRow]:
    """Return the workspaces, oldest first; with *removed*, those removed too."""
    w, v, k = tables.workspaces, tables.workspace_revisions, tables.workspace_tokens
    tokens: dict[str, list[WorkspaceToken]] = {}
    for row in connection.execute(sa.select(k).order_by(k.c.created_at_ms, k.c.label)):
        token = WorkspaceToken(row.label, bytes(row.hash), row.created_at_ms, row.expires_at_ms)
        tokens.setdefault(row.workspace, []).append(token)
    newest = w.join(v, sa.and_(v.c.workspace == w.c.id, v.c.revision == w.c.revision))
    query = sa.select(w, v.c.spec).select_from(newest).order_by(w.c.created_at_ms, w.c.id)
    if not removed:
        query = query.where(w.c.removed_at_ms.is_(None))
    return [
        WorkspaceRow(
            id=row.id,
            owner=row.owner,
            name=row.name,
            revision=row.revision,
            spec=json.loads(row.spec),
            tokens=tuple(tokens.get(row.id, ())),
            created_at_ms=row.created_at_ms,
            updated_at_ms=row.updated_at_ms,
            removed_at_ms=row.removed_at_ms,
        )
        for row in connection.execute(query)
    ]


def workspace_spec(connection: sa.Connection, id: str, revision: int) -> dict[str, Any] | None:
    """Return the specification of one revision, of removed workspaces too."""
    v = tables.workspace_revisions
    text = connection.execute(sa.select(v.c.spec).where(v.c.workspace == id, v.c.revision == revision)).scalar()
    spec: dict[str, Any] | None = None if text is None else json.loads(text)
    return spec


def sealed_secrets(connection: sa.Connection, id: str, revision: int, reader: str) -> tuple[bytes | None, bool]:
    """Return what was confided for one revision as *reader* can read it, None when there is no box for it, and whether
    anything was confided."""
    b, k = tables.workspace_secret_boxes, tables.workspace_secrets
    of_revision = sa.select(b.c.bootstrap, b.c.sealed).where(b.c.workspace == id, b.c.revision == revision)
    boxes = {row.bootstrap: bytes(row.sealed) for row in connection.execute(of_revision)}
    if reader in boxes:
        return boxes[reader], True
    # whose it is, it does not say: only its key does
    query = sa.select(k.c.sealed).where(k.c.workspace == id, k.c.revision == revision)
    unnamed = connection.execute(query).scalar()
    return (None if unnamed is None else bytes(unnamed)), bool(boxes) or unnamed is not None


def secrets_to_share(
    connection: sa.Connection, own: str, readers: Collection[str]
) -> list[tuple[str, int, bytes, list[str]]]:
    """Return workspaces' secrets that *own* may be able to read and that lack a box for one of *readers* (*own* may be
    one): id, revision, box, and who lacks one."""
    b, k = tables.workspace_secret_boxes, tables.workspace_secrets
    has: dict[tuple[str, int], set[str]] = {}
    boxes: dict[tuple[str, int], bytes] = {}
    for row in connection.execute(sa.select(k)):
        has.setdefault((row.workspace, row.revision), set())
        boxes[row.workspace, row.revision] = bytes(row.sealed)
    for row in connection.execute(sa.select(b.c.workspace, b.c.revision, b.c.bootstrap)):
        has.setdefault((row.workspace, row.revision), set()).add(row.bootstrap)
    for row in connection.execute(sa.select(b).where(b.c.bootstrap == own)):
        boxes[row.workspace, row.revision] = bytes(row.sealed)
    return [
        (workspace, revision, boxes[workspace, revision], lacking)
        for (workspace, revision), there in sorted(has.items())
        if (workspace, revision) in boxes and (lacking := [one for one in readers if one not in there])
    ]


def add_boxes(connection: sa.Connection, rows: Iterable[tuple[str, int, str, bytes]]) -> None:
    """Keep further boxes (workspace, revision, bootstrap, sealed) of what was confided, unless it is gone."""
    b, w = tables.workspace_secret_boxes, tables.workspaces
    for workspace, revision, bootstrap, sealed in rows:
        there = sa.select(w.c.id).where(w.c.id == workspace, w.c.removed_at_ms.is_(None)).with_for_update()
        if connection.execute(there).scalar() is None:
            continue
        values = {"workspace": workspace, "revision": revision, "bootstrap": bootstrap, "sealed": sealed}
        connection.execute(insert_or_ignore(connection.dialect.name, b, values), values)


def rollouts(connection: sa.Connection) -> list[RolloutRow]:
    """Return every new revision that is on its way, or failed."""
    return [RolloutRow(**row._mapping) for row in connection.execute(sa.select(tables.workspace_rollouts))]


def deployments(connection: sa.Connection) -> list[DeploymentRow]:
    """Return which nodes are to run what."""
    d = tables.deployments
    return [
        DeploymentRow(row.workspace, Address(row.node), row.revision, row.assigned_at_ms)
        for row in connection.execute(sa.select(d).order_by(d.c.workspace, d.c.node))
    ]


def placements(connection: sa.Connection, task_id: str) -> list[tuple[int, str]]:
    """Return what is kept of why a task's attempts went where they did: attempt, packed placement."""
    p = tables.placements
    rows = connection.execute(sa.select(p.c.attempt, p.c.document).where(p.c.task_id == task_id).order_by(p.c.attempt))
    return [(attempt, document) for attempt, document in rows]


def standings(connection: sa.Connection) -> list[tuple[Address, Address, Standing]]:
    """Return what each bootstrap makes of each node: bootstrap, node, standing."""
    found = []
    for row in connection.execute(sa.select(tables.node_standings)):
        values = row._asdict()
        bootstrap, node = Address(values.pop("bootstrap")), Address(values.pop("node"))
        found.append((bootstrap, node, Standing(**values | {"rules": json.loads(values["rules"])})))
    return found


def nodes(connection: sa.Connection) -> list[NodeRow]:
    """Return every node ever seen, first seen first."""
    n = tables.nodes
    return [
        NodeRow(
            address=Address(row.address),
            first_seen_ms=row.first_seen_ms,
            last_seen_ms=row.last_seen_ms,
            name=row.name,
            peer_id=row.peer_id,
            software=row.software,
            session=bytes(row.session),
        )
        for row in connection.execute(sa.select(n).order_by(n.c.first_seen_ms, n.c.address))
    ]


def faults(connection: sa.Connection, node: str) -> list[ChainFault]:
    """Return the evidence against a node, oldest first."""
    f = tables.chain_faults
    rows = connection.execute(sa.select(f).where(f.c.node == node).order_by(f.c.found_at_ms, f.c.sequence))
    return [
        ChainFault(
            bootstrap=Address(row.bootstrap),
            node=Address(row.node),
            sequence=row.sequence,
            kind=row.kind,
            hash=bytes(row.hash),
            raw=bytes(row.raw),
            found_at_ms=row.found_at_ms,
            expected=bytes(row.expected),
            actual=bytes(row.actual),
        )
        for row in rows
    ]


def asked_gaps(connection: sa.Connection, bootstrap: str, node: str) -> list[tuple[AskedGap, bool]]:
    """Return what a node is asked for, lowest first, and whether all of it is there by now."""
    g, r = tables.chain_gaps, tables.receipts
    there = (r.c.bootstrap == bootstrap, r.c.node == node, r.c.sequence.between(g.c.from_sequence, g.c.to_sequence))
    came = sa.select(sa.func.count()).where(*there).scalar_subquery()
    mine = (g.c.bootstrap == bootstrap, g.c.node == node)
    rows = connection.execute(sa.select(g, came.label("came")).where(*mine).order_by(g.c.from_sequence))
    return [
        (
            AskedGap(Gap(row.from_sequence, row.to_sequence), row.asked_at_ms, bytes(row.claim)),
            row.came > row.to_sequence - row.from_sequence,
        )
        for row in rows
    ]


def price_list(connection: sa.Connection, bootstrap: str, node: str, session: bytes) -> bytes | None:
    """Return what a node asks of a bootstrap in one session, signed, empty for nothing; None for a new session."""
    p = tables.price_lists
    found = sa.select(p.c.signed_list).where(p.c.bootstrap == bootstrap, p.c.node == node, p.c.session == session)
    wire = connection.execute(found).scalar()
    return None if wire is None else bytes(wire)


def session_gpus(
    connection: sa.Connection, bootstrap: str, node: str, session: bytes, since_ms: int | None = None
) -> dict[bytes, str]:
    """Return the model of each GPU that a node offered to a bootstrap in one session, by its name in receipts.

    Args:
        since_ms: nothing is returned unless the session's GPUs were being kept by then.
    """
    g = tables.session_gpus
    where = (g.c.bootstrap == bootstrap, g.c.node == node, g.c.session == session)
    rows = connection.execute(sa.select(g.c.gpu, g.c.model, g.c.seen_at_ms).where(*where)).all()
    if since_ms is not None and all(row.seen_at_ms > since_ms for row in rows):
        return {}
    return {bytes(row.gpu): row.model for row in rows}


def observation(connection: sa.Connection, bootstrap: str, node: str, receipt_hash: bytes) -> bytes:
    """Return what a bootstrap saw of a receipt it disputes, signed; empty for none."""
    o = tables.observations
    where = (o.c.bootstrap == bootstrap, o.c.node == node, o.c.receipt_hash == receipt_hash)
    wire = connection.execute(sa.select(o.c.signed_observation).where(*where)).scalar()
    return b"" if wire is None else bytes(wire)


def named_paths(connection: sa.Connection, paths: Iterable[str]) -> set[str]:
    """Return those of *paths* that a body row names."""
    b = tables.bodies
    wanted = list(paths)
    found: set[str] = set()
    for start in range(0, len(wanted), 500):
        ids = {path.rpartition("/")[2].partition(".")[0] for path in wanted[start : start + 500]}
        found.update(connection.execute(sa.select(b.c.path).where(b.c.task_id.in_(ids))).scalars())
    return found.intersection(wanted)


@functools.lru_cache(1024)
def _headers(text: str) -> HeaderList:
    """Return stored headers: those of a client's tasks are mostly alike."""
    return tuple((name, value) for name, value in json.loads(text))


def _task(row: Any, request: StoredBody | None = None, response: StoredBody | None = None) -> TaskRecord:
    values = dict(zip(_TASK_NAMES, row, strict=True))
    values["headers"] = _headers(values["headers"])
    values["state"] = TaskState(values["state"])
    values["detach"] = bool(values["detach"])
    values["wrapped"] = bool(values["wrapped"])
    values["node"] = Address(values["node"]) if values["node"] else None
    return TaskRecord(**values, request=request, response=response)


_TASK_NAMES: Final = tuple(column.name for column in _TASK_COLUMNS)


def _attempt(row: Any) -> AttemptRecord:
    task_id, attempt, node, node_ip, session, order, began_at_ms, ended_at_ms, outcome, reason, status = row
    return AttemptRecord(
        task_id=task_id,
        attempt=attempt,
        node=Address(node),
        node_ip=node_ip,
        session=bytes(session),
        order=bytes(order),
        began_at_ms=began_at_ms,
        ended_at_ms=ended_at_ms,
        outcome=outcome,
        reason=reason,
        status=status,
    )


def _body(row: Any) -> StoredBody | None:
    size, content, path = row
    if size is None:
        return None
    return StoredBody(size, None if content is None else bytes(content), path)


def _receipt(row: Any) -> ReceiptRecord:
    values = row._asdict()
    order, caller = values.pop("signed_order"), values.pop("caller", None)
    for name in ("hash", "previous", "raw", "acknowledgement"):
        values[name] = bytes(values[name])
    return ReceiptRecord(NewReceipt(**values), bytes(order) if order is not None else b"", caller or "")


def _parse_cursor(text: str) -> tuple[int, int]:
    at_ms, _, number = text.partition("-")
    if not (at_ms.isascii() and at_ms.isdigit() and number.isascii() and number.isdigit() and len(text) < 40):
        raise RecordRefused("not a cursor of this list")
    if max(int(at_ms), int(number)) >= 2**63:
        raise RecordRefused("not a cursor of this list")
    return int(at_ms), int(number)
