"""Receipts that nodes are asked for, and since when."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "chain_gaps",
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("from_sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("to_sequence", sa.BigInteger(), nullable=False),
        sa.Column("asked_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("claim", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("bootstrap", "node", "from_sequence", name=op.f("pk_chain_gaps")),
    )
