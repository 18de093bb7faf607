"""Tasks have an owner among several bootstraps, may be asked to end, and call back; receipts outlive them whole."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("bootstrap", sa.Text(), server_default="", nullable=False))
    op.add_column("tasks", sa.Column("cancel_asked_at_ms", sa.BigInteger(), nullable=True))
    op.add_column("receipts", sa.Column("signed_order", sa.LargeBinary(), nullable=True))
    op.create_table(
        "bootstraps",
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("lease_until_ms", sa.BigInteger(), nullable=False),
        sa.Column("started_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("about", sa.Text(), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_bootstraps")),
    )
    op.create_table(
        "webhooks",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("token_label", sa.Text(), server_default="", nullable=False),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("done_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Integer(), server_default="0", nullable=False),
        sa.Column("problem", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_webhooks_task_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_webhooks")),
    )
    op.create_index(
        "ix_webhooks_due",
        "webhooks",
        ["next_at_ms"],
        unique=False,
        sqlite_where=sa.text("done_at_ms IS NULL"),
        postgresql_where=sa.text("done_at_ms IS NULL"),
    )
