"""Which bootstrap of a database challenges a node now: no two do at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "challenge_claims",
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("bootstrap", sa.Text(), nullable=False),
        sa.Column("until_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node", name=op.f("pk_challenge_claims")),
    )
