"""A job keeps the answer to its submission, and what was signed of its loss."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("submission", sa.LargeBinary(), nullable=True))
    op.add_column("jobs", sa.Column("loss", sa.LargeBinary(), nullable=True))
