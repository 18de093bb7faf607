"""What nodes ask, session by session, and what a bootstrap says it saw of the receipts it disputes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "price_lists",
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("session", sa.LargeBinary(), nullable=False),
        sa.Column("signed_list", sa.LargeBinary(), nullable=False),
        sa.Column("given_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("bootstrap", "node", "session", name=op.f("pk_price_lists")),
    )
    op.create_table(
        "observations",
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("receipt_hash", sa.LargeBinary(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("acknowledgement", sa.LargeBinary(), nullable=False),
        sa.Column("signed_observation", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("bootstrap", "node", "receipt_hash", name=op.f("pk_observations")),
    )
    disputed = sa.text("verdict = 'disputed'")
    op.create_index(
        "ix_receipts_disputed",
        "receipts",
        ["node", "sequence"],
        sqlite_where=disputed,
        postgresql_where=disputed,
    )
