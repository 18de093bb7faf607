"""BRC-20 policies of workspaces, and balances noted with tasks. Blocking; runs in the store's threads."""

from __future__ import annotations

import sqlalchemy as sa

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import upsert


def policies(connection: sa.Connection) -> list[tuple[str, str]]:
    """Return the policies that were set: workspace, and the policy as JSON."""
    p = tables.brc20_policies
    return [(row.workspace, row.policy) for row in connection.execute(sa.select(p))]


def set_policy(connection: sa.Connection, workspace: str, policy: str) -> None:
    """Write the policy of a workspace."""
    statement = upsert(connection.dialect.name, tables.brc20_policies, ["workspace", "policy"])
    connection.execute(statement, {"workspace": workspace, "policy": policy})


def note(connection: sa.Connection, task_id: str, noted: str) -> None:
    """Write what was found out about the address of a task."""
    t = tables.tasks
    connection.execute(sa.update(t).where(t.c.task_id == task_id).values(brc20=noted))
