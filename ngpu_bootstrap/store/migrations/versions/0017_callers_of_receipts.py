"""Whose a receipt is when its task was removed: the workspace whose token asked, where another ran it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("receipts", sa.Column("caller", sa.Text(), nullable=True))
