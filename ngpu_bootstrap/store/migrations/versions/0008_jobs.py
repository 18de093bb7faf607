"""Jobs that workspaces run by themselves, who asked for them, and keys that stick to a node."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("caller", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("declared", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), server_default="", nullable=False),
        sa.Column("node", sa.Text(), server_default="", nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("since_ms", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default="", nullable=False),
        sa.Column("result", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_jobs_task_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_key", "jobs", ["caller", "name", "key"], unique=False)
    op.create_table(
        "job_calls",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("job", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job"], ["tasks.task_id"], name=op.f("fk_job_calls_job"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_job_calls_task_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_job_calls")),
    )
    op.create_index(op.f("ix_job_calls_job"), "job_calls", ["job"], unique=False)
    op.create_table(
        "sticky_keys",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("used_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_sticky_keys")),
    )
    op.create_index("ix_sticky_keys_workspace", "sticky_keys", ["workspace", "used_at_ms"], unique=False)
