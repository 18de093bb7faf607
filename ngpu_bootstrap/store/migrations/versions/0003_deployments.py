"""Where workspaces are to run, new revisions on their way, and sealed secrets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deployments",
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("assigned_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["workspace"], ["workspaces.id"], name=op.f("fk_deployments_workspace")),
        sa.PrimaryKeyConstraint("workspace", "node", name=op.f("pk_deployments")),
    )
    op.create_table(
        "workspace_rollouts",
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("base", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("began_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("failed_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("node", sa.Text(), server_default="", nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("detail", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["workspace"], ["workspaces.id"], name=op.f("fk_workspace_rollouts_workspace")),
        sa.PrimaryKeyConstraint("workspace", name=op.f("pk_workspace_rollouts")),
    )
    op.create_table(
        "workspace_secrets",
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["workspace"], ["workspaces.id"], name=op.f("fk_workspace_secrets_workspace")),
        sa.PrimaryKeyConstraint("workspace", "revision", name=op.f("pk_workspace_secrets")),
    )


def downgrade() -> None:
    for table in ("workspace_secrets", "workspace_rollouts", "deployments"):
        op.drop_table(table)
