"""What a node said of its deployments to the bootstrap it is connected to, for siblings that do not hear it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("node_presence", sa.Column("reports", sa.Text(), nullable=True))
