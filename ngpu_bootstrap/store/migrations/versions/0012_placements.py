"""Why attempts went where they did is kept; a task keeps its affinity key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("affinity", sa.Text(), server_default="", nullable=False))
    op.create_table(
        "placements",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "attempt", name=op.f("pk_placements")),
    )
    op.create_index(op.f("ix_placements_at_ms"), "placements", ["at_ms"], unique=False)
