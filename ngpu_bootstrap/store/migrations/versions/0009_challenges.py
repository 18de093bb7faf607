"""What became of the GPU challenges that were sent to nodes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "challenges",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("gpu", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.Text(), server_default="", nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("finding", sa.Text(), server_default="", nullable=False),
        sa.Column("detail", sa.Text(), server_default="", nullable=False),
        sa.Column("product_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("product_limit_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("chains_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("chains_limit_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("task_id", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_challenges")),
    )
    op.create_index("ix_challenges_node", "challenges", ["node", "number"])
