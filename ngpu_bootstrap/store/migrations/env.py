"""Alembic's entry: runs the migrations on the connection and in the transaction its caller holds."""

from __future__ import annotations

from alembic import context

from ngpu_bootstrap.store.tables import metadata

# SQLite cannot alter most things in place: later migrations use batch operations
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
