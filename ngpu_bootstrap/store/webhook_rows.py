"""Webhooks as stored: which calls are due, and what became of each. Blocking; runs in the ``chores`` thread.

A row is made with its task, in the same commit; it is due once the task is final. Taking a due row moves its next time
on by ``HOLD_MS``, so that no sibling makes the same call meanwhile, and a bootstrap that dies in the middle leaves it
to be made again: a call is made at least once.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ngpu_bootstrap.store import tables

HOLD_MS = 60_000


@dataclass(frozen=True, slots=True)
class DueWebhook:
    """One call to make. *tries* were made before; *token_label* is of the token the task was asked for with."""

    task_id: str
    url: str
    workspace: str
    token_label: str
    tries: int


@dataclass(frozen=True, slots=True)
class ToldWebhook:
    """What became of a call: made for good at *done_at_ms*, or to be made again at *next_at_ms*."""

    task_id: str
    tries: int
    next_at_ms: int
    done_at_ms: int | None
    status: int
    problem: str


@dataclass(frozen=True, slots=True)
class WebhookRecord:
    """How the calling back of a task goes."""

    url: str
    tries: int
    next_at_ms: int
    done_at_ms: int | None
    status: int
    problem: str


def take_due(connection: sa.Connection, now_ms: int, limit: int) -> list[DueWebhook]:
    """Return at most *limit* calls that are due, and hold them."""
    w, t = tables.webhooks, tables.tasks
    due = (
        sa.select(
            w.c.task_id,
            w.c.url,
            sa.func.coalesce(sa.func.nullif(t.c.caller, ""), t.c.workspace).label("workspace"),
            w.c.token_label,
            w.c.tries,
        )
        .select_from(w.join(t, t.c.task_id == w.c.task_id))
        .where(w.c.done_at_ms.is_(None), w.c.next_at_ms <= now_ms, sa.text("tasks.state >= 3"))
        .order_by(w.c.next_at_ms)
        .limit(limit)
        .with_for_update(skip_locked=True, of=w)
    )
    found = [DueWebhook(*row) for row in connection.execute(due)]
    if found:
        held = sa.update(w).where(w.c.task_id.in_([one.task_id for one in found])).values(next_at_ms=now_ms + HOLD_MS)
        connection.execute(held)
    return found


def note(connection: sa.Connection, told: ToldWebhook) -> None:
    """Write what became of a call."""
    w = tables.webhooks
    connection.execute(
        sa.update(w)
        .where(w.c.task_id == told.task_id)
        .values(
            tries=told.tries,
            next_at_ms=told.next_at_ms,
            done_at_ms=told.done_at_ms,
            status=told.status,
            problem=told.problem,
        )
    )


def of_task(connection: sa.Connection, task_id: str) -> WebhookRecord | None:
    """Return the webhook of a task."""
    w = tables.webhooks
    row = connection.execute(
        sa.select(w.c.url, w.c.tries, w.c.next_at_ms, w.c.done_at_ms, w.c.status, w.c.problem).where(
            w.c.task_id == task_id
        )
    ).one_or_none()
    return WebhookRecord(*row) if row is not None else None
