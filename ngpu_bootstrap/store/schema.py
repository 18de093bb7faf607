"""The schema at open: new databases are made, older ones migrated, newer or foreign ones refused.

SQLite is migrated in place without asking: the file has one owner, the daemon that opens it. A PostgreSQL database may
serve several bootstraps of two versions at once, so there the operator migrates (expand first, contract later) and an
outdated schema is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.errors import StoreMismatch

HEAD: Final = "0020"

_MIGRATIONS = Path(__file__).parent / "migrations"


def prepare_schema(connection: sa.Connection, *, network: str, migrate: bool | None = None) -> None:
    """Bring the database behind *connection* to HEAD inside one transaction and bind it to *network*.

    A no-op costs one query. *migrate* None means: yes on SQLite, and elsewhere only when the database is empty.

    Raises:
        StoreMismatch: the schema is newer than this version knows, is outdated and may not be migrated here, or the
            database belongs to another network.
    """
    with connection.begin():
        found = current_revision(connection)
        if found != HEAD:
            _refuse_unknown(found)
            allowed = migrate if migrate is not None else connection.dialect.name == "sqlite" or found is None
            if not allowed:
                raise StoreMismatch(
                    f"the database schema is at {found}, this version needs {HEAD}: run `ngpu-bootstrap db upgrade`"
                )
            upgrade(connection, HEAD)
        _bind_network(connection, network)


def current_revision(connection: sa.Connection) -> str | None:
    """Return the database's schema revision, None when it has no schema of ours."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return revision


def upgrade(connection: sa.Connection, revision: str) -> None:
    """Migrate to *revision* inside the caller's transaction; all of it happens or nothing."""
    command.upgrade(migration_config(connection), revision)


def migration_config(connection: sa.Connection | None = None) -> Config:
    """Return Alembic's configuration for the migrations shipped in this package."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _refuse_unknown(found: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(migration_config()).walk_revisions()}
    if found is not None and found not in known:
        raise StoreMismatch(
            f"the database schema {found} is newer than this version knows ({HEAD}): use a newer version"
        )


def _bind_network(connection: sa.Connection, network: str) -> None:
    about = tables.about
    bound = connection.execute(sa.select(about.c.value).where(about.c.key == "network")).scalar()
    if bound is None:
        connection.execute(sa.insert(about).values(key="network", value=network))
    elif bound != network:
        raise StoreMismatch(f"the database belongs to network {bound!r}, not {network!r}: use another data directory")
