"""What a workspace asks of BTC addresses, whom a node's work pays, and the accounts of existing NGPU clients."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("tasks", sa.Column("brc20", sa.Text(), server_default="", nullable=False))
    op.create_table(
        "brc20_policies",
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("workspace", name=op.f("pk_brc20_policies")),
    )
    op.create_table(
        "node_bindings",
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("wallet", sa.Text(), nullable=False),
        sa.Column("org_name", sa.Text(), server_default="", nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("bound_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node", name=op.f("pk_node_bindings")),
    )
    op.create_table(
        "cloud_users",
        sa.Column("id", _COUNT, autoincrement=True, nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("password", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cloud_users")),
        sa.UniqueConstraint("email", name=op.f("uq_cloud_users_email")),
    )
    op.create_table(
        "cloud_sessions",
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("user", _COUNT, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["user"], ["cloud_users.id"], name=op.f("fk_cloud_sessions_user"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_cloud_sessions")),
    )
    op.create_index(op.f("ix_cloud_sessions_user"), "cloud_sessions", ["user"], unique=False)
    op.create_table(
        "cloud_products",
        sa.Column("id", _COUNT, autoincrement=True, nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cloud_products")),
    )
    for table, extra in (
        ("cloud_images", sa.Column("document", sa.Text(), nullable=False)),
        ("cloud_groups", sa.Column("name", sa.Text(), nullable=False)),
    ):
        op.create_table(
            table,
            sa.Column("id", _COUNT, autoincrement=True, nullable=False),
            sa.Column("user", _COUNT, nullable=False),
            extra,
            sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
            sa.ForeignKeyConstraint(["user"], ["cloud_users.id"], name=op.f(f"fk_{table}_user"), ondelete="CASCADE"),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
        )
        op.create_index(op.f(f"ix_{table}_user"), table, ["user"], unique=False)
    op.create_table(
        "cloud_workspaces",
        sa.Column("workspace", sa.Text(), nullable=False),
        sa.Column("user", _COUNT, nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["user"], ["cloud_users.id"], name=op.f("fk_cloud_workspaces_user"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("workspace", name=op.f("pk_cloud_workspaces")),
    )
    op.create_index(op.f("ix_cloud_workspaces_user"), "cloud_workspaces", ["user"], unique=False)
