"""Tasks that one workspace's token asked for and another ran: a model that a node serves is called with any token."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("caller", sa.Text(), server_default="", nullable=False))
    op.create_index(
        "ix_tasks_calls",
        "tasks",
        ["caller", "accepted_at_ms", "number"],
        sqlite_where=sa.text("caller <> ''"),
        postgresql_where=sa.text("caller <> ''"),
    )
