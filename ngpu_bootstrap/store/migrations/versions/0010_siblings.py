"""Bootstraps beside each other: who has which node, secrets each of them can read; and the tasks of one node."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "node_presence",
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("bootstrap", "node", name=op.f("pk_node_presence")),
    )
    op.create_table(
        "workspace_secret_boxes",
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["workspace"], ["workspaces.id"], name=op.f("fk_workspace_secret_boxes_workspace")),
        sa.PrimaryKeyConstraint("workspace", "revision", "bootstrap", name=op.f("pk_workspace_secret_boxes")),
    )
    op.create_index(
        "ix_tasks_of_node",
        "tasks",
        ["workspace", "node", "accepted_at_ms", "number"],
        sqlite_where=sa.text("node <> ''"),
        postgresql_where=sa.text("node <> ''"),
    )
