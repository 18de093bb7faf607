"""Tasks that were run again on other nodes, and what came of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "rechecks",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), server_default="", nullable=False),
        sa.Column("first_node", sa.Text(), server_default="", nullable=False),
        sa.Column("second_node", sa.Text(), server_default="", nullable=False),
        sa.Column("third_node", sa.Text(), server_default="", nullable=False),
        sa.Column("second_task", sa.Text(), server_default="", nullable=False),
        sa.Column("third_task", sa.Text(), server_default="", nullable=False),
        sa.Column("loser", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_rechecks")),
    )
    op.create_index("ix_rechecks_workspace", "rechecks", ["workspace", "number"])
    op.create_index(
        "ix_rechecks_loser",
        "rechecks",
        ["loser", "number"],
        sqlite_where=sa.text("loser <> ''"),
        postgresql_where=sa.text("loser <> ''"),
    )
