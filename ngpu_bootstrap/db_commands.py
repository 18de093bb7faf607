"""What `ngpu-bootstrap db` does: bring a database up to date, look whether it is whole, write it out.

Works on the database itself, with or without the daemon beside it: a SQLite file is only upgraded while no daemon has
the data directory, a PostgreSQL database by whoever comes first.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa

from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.errors import StoreMismatch
from ngpu_bootstrap.store.schema import HEAD, current_revision, prepare_schema
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.errors import OperatorError

EXPORT_FORMAT = "ngpu-bootstrap-export/1"
_ROWS_AT_ONCE = 1000


class DatabaseError(OperatorError):
    """The database cannot be used; the message says why."""


class Database:
    """The database of one configuration."""

    def __init__(self, settings: BootstrapSettings) -> None:
        self._settings = settings
        self._directory = DataDirectory(settings.data_dir)
        self._location = settings.store or self._directory.path / "bootstrap.db"
        self._bodies = settings.bodies or self._directory.path / "bodies"

    def upgrade(self) -> tuple[str | None, str]:
        """Migrate to this version's schema; return the revision before (None: there was none) and now.

        Raises:
            OperatorError: it is newer than this version, of another network, or in use.
        """
        if self._settings.store:
            return self._upgrade()
        with self._directory.lock():
            return self._upgrade()

    def _upgrade(self) -> tuple[str | None, str]:
        engine = open_engine(self._location)
        try:
            with engine.connect() as connection:
                before = current_revision(connection)
                connection.rollback()
                prepare_schema(connection, network=self._settings.network, migrate=True)
                return before, HEAD
        except sa.exc.DBAPIError as error:
            raise DatabaseError(f"the database cannot be used: {error.orig}") from error
        finally:
            engine.dispose()

    def check(self) -> dict[str, Any]:
        """Look whether the database is whole; `problems` is empty when it is.

        Raises:
            OperatorError: it cannot be read at all.
        """
        if not self._settings.store and not Path(self._location).exists():
            raise DatabaseError(f"there is no database at {self._location}")
        engine = open_engine(self._location)
        try:
            with engine.connect() as connection:
                return self._look(connection)
        except sa.exc.DBAPIError as error:
            raise DatabaseError(f"the database cannot be read: {error.orig}") from error
        finally:
            engine.dispose()

    def _look(self, connection: sa.Connection) -> dict[str, Any]:
        revision = current_revision(connection)
        problems: list[str] = []
        found: dict[str, Any] = {"kind": connection.dialect.name, "schema": revision, "needed": HEAD}
        if revision != HEAD:
            problems.append(f"the schema is at {revision}, this version needs {HEAD}: `ngpu-bootstrap db upgrade`")
            return {**found, "problems": problems}
        if connection.dialect.name == "sqlite":
            said = connection.exec_driver_sql("PRAGMA integrity_check(10)").scalars().all()
            problems += [f"integrity: {line}" for line in said if line != "ok"]
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            problems += [f"a row of {row[0]} refers to nothing" for row in broken[:10]]
        network = connection.execute(sa.select(tables.about.c.value).where(tables.about.c.key == "network")).scalar()
        if network != self._settings.network:
            problems.append(f"it belongs to network {network!r}, not {self._settings.network!r}")
        t, b, r = tables.tasks, tables.bodies, tables.receipts
        states = connection.execute(sa.select(t.c.state, sa.func.count()).group_by(t.c.state)).all()
        found["tasks"] = {TaskState(state).name.lower(): count for state, count in states}
        found["receipts"] = connection.execute(sa.select(sa.func.count()).select_from(r)).scalar_one()
        found["bodies"] = connection.execute(sa.select(sa.func.count()).select_from(b)).scalar_one()
        missing = 0
        for path, size in connection.execute(sa.select(b.c.path, b.c.size).where(b.c.path != "")):
            file = self._bodies / path
            if not file.is_file() or file.stat().st_size != size:
                missing += 1
        if missing:
            problems.append(f"{missing} bodies are missing from {self._bodies}, or have another size")
        siblings = connection.execute(sa.select(sa.func.count()).select_from(tables.bootstraps)).scalar_one()
        found["bootstraps"] = siblings
        return {**found, "problems": problems}

    def export(self, out: TextIO) -> int:
        """Write every row as one JSON object a line, in one consistent snapshot; return how many those were.

        Bytes are base64 under `{"base64": ...}`. Bodies that are files are read in. Tokens are there as their hashes.

        Raises:
            OperatorError: it cannot be read, or its schema is another.
        """
        engine = open_engine(self._location)
        rows = 0
        try:
            with engine.connect() as connection:
                if connection.dialect.name == "postgresql":
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                with connection.begin():
                    if current_revision(connection) != HEAD:
                        raise StoreMismatch(f"the schema is not {HEAD}: run `ngpu-bootstrap db upgrade` first")
                    head = {"format": EXPORT_FORMAT, "schema": HEAD, "network": self._settings.network}
                    out.write(json.dumps(head) + "\n")
                    for table in tables.metadata.sorted_tables:
                        for row in _rows(connection, table):
                            if table.name == "bodies" and row["path"]:
                                file = self._bodies / row["path"]
                                row["content"] = file.read_bytes() if file.is_file() else None
                                row["path"] = ""
                            document = {"table": table.name, "row": {name: _plain(row[name]) for name in row}}
                            out.write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")
                            rows += 1
        except sa.exc.DBAPIError as error:
            raise DatabaseError(f"the database cannot be read: {error.orig}") from error
        finally:
            engine.dispose()
        return rows


def _rows(connection: sa.Connection, table: sa.Table) -> Iterator[dict[str, Any]]:
    query = sa.select(table).order_by(*table.primary_key)
    for row in connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(query):
        yield dict(row._mapping)


def _plain(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes | memoryview) else value
