"""What the GPUs named in receipts are, so that statements can be told by model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "node_gpus",
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("gpu", sa.LargeBinary(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("seen_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node", "gpu", name=op.f("pk_node_gpus")),
    )
