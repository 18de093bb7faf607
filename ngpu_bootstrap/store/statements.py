"""The writer's statements, compiled once per store: SQL, the order of its parameters, how many rows it must touch.

Compiling through SQLAlchemy Core keeps them right on either database; executing the compiled text skips its
per-execution work, which would cost more than SQLite itself.

Rank orders the statements of one batch: all rows of a lower rank are written before those of a higher one, so that a
row's foreign keys exist. Steps of one operation are executed in the order of rank too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.base import Executable

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import insert_or_ignore, upsert

ANY_ROWS = -1

# what a task is given when it is accepted; the rest of its row starts at the table's defaults
ACCEPT_COLUMNS = (
    "task_id",
    "workspace",
    "revision",
    "api",
    "method",
    "port",
    "target",
    "headers",
    "request_url",
    "token_label",
    "btc_address",
    "user_ip",
    "caller",
    "idempotency_key",
    "detach",
    "wrapped",
    "priority",
    "accepted_at_ms",
    "deadline_at_ms",
    "bootstrap",
    "affinity",
)

_UNFINISHED = sa.text("state < 3")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A compiled statement. *rows* is how many rows each execution must touch (ANY_ROWS: not checked)."""

    name: str
    rank: int
    sql: str
    names: tuple[str, ...]
    rows: int
    _pick: Any = field(repr=False)

    def bind(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the positional parameters out of *values* (extra ones are ignored)."""
        picked: tuple[Any, ...] = self._pick(values)
        return picked


class Statements:
    """Every statement the writer executes, for one dialect."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self._dialect = dialect
        self._rank = 0
        name = dialect.name
        t, a = tables.tasks, tables.attempts

        self.insert_task = self._insert("insert_task", t, [*ACCEPT_COLUMNS, "state", "attempts"])
        # accepted and dispatched in one commit: the same row without a second statement
        self.insert_dispatched_task = self._insert(
            "insert_dispatched_task",
            t,
            [*ACCEPT_COLUMNS, "state", "attempts", "node", "node_ip", "dispatched_at_ms"],
        )
        self.insert_body = self._prepare("insert_body", upsert(name, tables.bodies, _names(tables.bodies)), rows=1)
        self.insert_webhook = self._insert(
            "insert_webhook", tables.webhooks, ["task_id", "url", "token_label", "next_at_ms"]
        )
        self.put_job = self._prepare("put_job", upsert(name, tables.jobs, _names(tables.jobs)))
        self.ask_cancel = self._prepare(
            "ask_cancel",
            sa.update(t)
            .where(t.c.task_id == sa.bindparam("key"), _UNFINISHED)
            .values(cancel_asked_at_ms=sa.func.coalesce(t.c.cancel_asked_at_ms, sa.bindparam("at_ms"))),
            rows=1,
        )
        # a task goes back to the queue when its attempt ended without an answer and may run again
        self.requeue_task = self._prepare(
            "requeue_task",
            sa.update(t).where(t.c.task_id == sa.bindparam("key"), _UNFINISHED).values(state=_sql("0")),
            rows=1,
        )
        self.end_attempt = self._prepare(
            "end_attempt",
            sa.update(a)
            .where(
                a.c.task_id == sa.bindparam("key"),
                a.c.attempt == sa.bindparam("number"),
                a.c.ended_at_ms.is_(None),
            )
            .values(_binds("ended_at_ms", "outcome", "reason", "status")),
            rows=1,
        )
        self.dispatch_task = self._prepare(
            "dispatch_task",
            sa.update(t)
            .where(t.c.task_id == sa.bindparam("key"), t.c.attempts < sa.bindparam("attempt"), _UNFINISHED)
            .values(
                state=_sql("1"),
                attempts=sa.bindparam("attempt"),
                node=sa.bindparam("node"),
                node_ip=sa.bindparam("node_ip"),
                dispatched_at_ms=sa.bindparam("at_ms"),
            ),
            rows=1,
        )
        # a further call of a job that runs: it goes on running
        self.go_on_task = self._prepare(
            "go_on_task",
            sa.update(t)
            .where(t.c.task_id == sa.bindparam("key"), t.c.attempts < sa.bindparam("attempt"), _UNFINISHED)
            .values(
                state=_sql("CASE WHEN state = 2 THEN 2 ELSE 1 END"),
                attempts=sa.bindparam("attempt"),
                node=sa.bindparam("node"),
                node_ip=sa.bindparam("node_ip"),
                dispatched_at_ms=sa.bindparam("at_ms"),
            ),
            rows=1,
        )
        self.insert_attempt = self._insert(
            "insert_attempt", a, ["task_id", "attempt", "node", "node_ip", "session", "signed_order", "began_at_ms"]
        )
        # a hint for people: late or lost, it changes no decision
        self.run_task = self._prepare(
            "run_task",
            sa.update(t)
            .where(t.c.task_id == sa.bindparam("key"), t.c.attempts == sa.bindparam("attempt"), sa.text("state = 1"))
            .values(state=_sql("2")),
        )
        self.finish_task = self._prepare(
            "finish_task",
            sa.update(t)
            .where(t.c.task_id == sa.bindparam("key"), _UNFINISHED)
            .values(
                _binds(
                    "state", "finished_at_ms", "result_code", "message", "reason", "status", "content_type", "encoding"
                )
                # without a receipt, the verdict on one that came earlier stays
                | {name: sa.func.coalesce(sa.bindparam(name, type_=sa.Text), t.c[name]) for name in ("verdict", "rule")}
            ),
            rows=1,
        )
        # the order is with its attempt, and the caller with its task, until retention removes them
        receipt_columns = [name for name in _names(tables.receipts) if name not in ("signed_order", "caller")]
        self.insert_receipt = self._insert("insert_receipt", tables.receipts, receipt_columns)
        # the verdict of the last attempt is the task's; an earlier attempt's late receipt does not replace it
        # a receipt whose task this store does not have (it was restored from a backup) keeps its order itself
        r = tables.receipts
        has_attempt = sa.exists().where(a.c.task_id == sa.bindparam("key"), a.c.attempt == sa.bindparam("number"))
        self.keep_order = self._prepare(
            "keep_order",
            sa.update(r)
            .where(
                r.c.bootstrap == sa.bindparam("of_bootstrap"),
                r.c.node == sa.bindparam("of_node"),
                r.c.sequence == sa.bindparam("at_sequence"),
                r.c.signed_order.is_(None),
                ~has_attempt,
            )
            .values(_binds("signed_order")),
        )
        self.judge_task = self._prepare(
            "judge_task",
            sa.update(t)
            .where(t.c.task_id == sa.bindparam("key"), t.c.attempts == sa.bindparam("attempt"))
            .values(_binds("verdict", "rule")),
        )
        self.insert_fault = self._prepare(
            "insert_fault", insert_or_ignore(name, tables.chain_faults, _names(tables.chain_faults))
        )
        g = tables.chain_gaps
        self.drop_asked_gaps = self._prepare(
            "drop_asked_gaps",
            sa.delete(g).where(
                g.c.bootstrap == sa.bindparam("of_bootstrap"),
                g.c.node == sa.bindparam("of_node"),
                sa.func.length(g.c.claim) == _sql("0"),
            ),
        )
        self.drop_asked_gap = self._prepare(
            "drop_asked_gap",
            sa.delete(g).where(
                g.c.bootstrap == sa.bindparam("of_bootstrap"),
                g.c.node == sa.bindparam("of_node"),
                g.c.from_sequence == sa.bindparam("first"),
            ),
        )
        self.keep_asked_gap = self._prepare("keep_asked_gap", upsert(name, g, _names(g)), rows=1)
        # never backwards: another bootstrap of the service may have moved it
        self.move_head = self._prepare(
            "move_head", upsert(name, tables.chains, _names(tables.chains), only_greater="head_sequence")
        )
        self.see_node = self._prepare(
            "see_node", upsert(name, tables.nodes, _names(tables.nodes), keep=("first_seen_ms",)), rows=1
        )
        self.see_gpu = self._prepare("see_gpu", upsert(name, tables.node_gpus, _names(tables.node_gpus)), rows=1)
        self.see_session_gpu = self._prepare(
            "see_session_gpu", insert_or_ignore(name, tables.session_gpus, _names(tables.session_gpus))
        )
        # a session's list is the first it gave: see Operations.keep_price_list
        self.keep_price_list = self._prepare(
            "keep_price_list", insert_or_ignore(name, tables.price_lists, _names(tables.price_lists))
        )
        self.keep_observation = self._prepare(
            "keep_observation", insert_or_ignore(name, tables.observations, _names(tables.observations))
        )
        s = tables.node_standings
        self.keep_standing = self._prepare("keep_standing", upsert(name, s, _names(s)), rows=1)
        p = tables.placements
        self.keep_placement = self._prepare("keep_placement", upsert(name, p, _names(p)), rows=1)
        self.touch = self._prepare("touch", upsert(name, tables.about, _names(tables.about)), rows=1)
        self.insert_workspace = self._insert("insert_workspace", tables.workspaces, _names(tables.workspaces))
        w = tables.workspaces
        self.revise_workspace = self._prepare(
            "revise_workspace",
            sa.update(w)
            .where(
                w.c.id == sa.bindparam("key"),
                w.c.revision == sa.bindparam("from_revision"),
                w.c.removed_at_ms.is_(None),
            )
            .values(_binds("revision", "name", "updated_at_ms")),
            rows=1,
        )
        self.remove_workspace = self._prepare(
            "remove_workspace",
            sa.update(w)
            .where(w.c.id == sa.bindparam("key"), w.c.removed_at_ms.is_(None))
            .values(removed_at_ms=sa.bindparam("at_ms"), updated_at_ms=sa.bindparam("at_ms")),
            rows=1,
        )
        self.revive_workspace = self._prepare(
            "revive_workspace",
            sa.update(w)
            .where(w.c.id == sa.bindparam("key"), w.c.removed_at_ms <= sa.bindparam("before_ms"))
            .values(removed_at_ms=sa.null(), updated_at_ms=sa.bindparam("at_ms")),
            rows=1,
        )
        self.insert_revision = self._insert(
            "insert_revision", tables.workspace_revisions, _names(tables.workspace_revisions)
        )
        v = tables.workspace_revisions
        self.amend_revision = self._prepare(
            "amend_revision",
            sa.update(v)
            .where(v.c.workspace == sa.bindparam("key"), v.c.revision == sa.bindparam("amended"))
            .values(_binds("spec")),
            rows=1,
        )
        self.amend_workspace = self._prepare(
            "amend_workspace",
            sa.update(w)
            .where(w.c.id == sa.bindparam("key"), w.c.removed_at_ms.is_(None))
            .values(_binds("name", "updated_at_ms")),
            rows=1,
        )
        boxes = tables.workspace_secret_boxes
        self.set_secrets = self._prepare("set_secrets", upsert(name, boxes, _names(boxes)), rows=1)
        self.set_rollout = self._prepare(
            "set_rollout", upsert(name, tables.workspace_rollouts, _names(tables.workspace_rollouts)), rows=1
        )
        r, d = tables.workspace_rollouts, tables.deployments
        self.fail_rollout = self._prepare(
            "fail_rollout",
            sa.update(r)
            .where(r.c.workspace == sa.bindparam("key"), r.c.target == sa.bindparam("failed"))
            .values(_binds("failed_at_ms", "node", "reason", "detail")),
        )
        self.end_rollout = self._prepare(
            "end_rollout",
            sa.delete(r).where(r.c.workspace == sa.bindparam("key"), r.c.target == sa.bindparam("ended")),
        )
        self.set_deployment = self._prepare("set_deployment", upsert(name, d, _names(d)), rows=1)
        self.drop_deployment = self._prepare(
            "drop_deployment",
            sa.delete(d).where(d.c.workspace == sa.bindparam("key"), d.c.node == sa.bindparam("dropped")),
        )
        self.drop_of_workspace = [
            self._prepare(f"drop_{table.name}", sa.delete(table).where(table.c.workspace == sa.bindparam("key")))
            for table in (tables.workspace_secrets, boxes, tables.workspace_rollouts, tables.deployments)
        ]
        k = tables.workspace_tokens
        self.expire_token = self._prepare(
            "expire_token",
            sa.update(k)
            .where(k.c.workspace == sa.bindparam("key"), k.c.label == sa.bindparam("token_label"))
            .values(expires_at_ms=sa.bindparam("at_ms")),
            rows=1,
        )
        self.drop_tokens = self._prepare("drop_tokens", sa.delete(k).where(k.c.workspace == sa.bindparam("key")))
        self.insert_token = self._insert("insert_token", k, _names(k))

    def _insert(self, name: str, table: sa.Table, columns: Sequence[str]) -> Prepared:
        return self._prepare(name, sa.insert(table).values(_binds(*columns)).inline(), rows=1)

    def _prepare(self, name: str, statement: Executable, rows: int = ANY_ROWS) -> Prepared:
        compiled = statement.compile(dialect=self._dialect)  # type: ignore[attr-defined]
        order = tuple(compiled.positiontup or ())
        # itemgetter of one name returns the bare value
        pick = itemgetter(*order) if len(order) > 1 else lambda values: (values[order[0]],)
        self._rank += 1
        return Prepared(name, self._rank, str(compiled), order, rows, pick)


def _names(table: sa.Table) -> list[str]:
    return [column.name for column in table.columns]


def _binds(*names: str) -> dict[str, Any]:
    return {name: sa.bindparam(name) for name in names}


def _sql(text: str) -> Any:
    return sa.literal_column(text)
