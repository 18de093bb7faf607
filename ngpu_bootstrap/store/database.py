"""The seam to the database: opening connections, and everything that differs between SQLite and PostgreSQL.

Other modules write SQLAlchemy Core and leave to this one: connection settings, how a transaction begins, upserts, and
whose fault a driver's error is. SQLite runs in WAL mode with ``synchronous=FULL``: a COMMIT that returned survives
``kill -9`` and power loss, readers never wait for the writer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import QueuePool

from ngpu_bootstrap.store.errors import StoreMismatch

# how long a connection waits for another process's write lock before the store counts as unavailable
BUSY_TIMEOUT_MS = 5_000


def database_url(location: str | Path) -> sa.URL:
    """Return the URL of a database given as a URL or as the path of a SQLite file."""
    if isinstance(location, Path) or "://" not in location:
        return sa.URL.create("sqlite", database=str(location))
    return sa.make_url(location)


def open_engine(location: str | Path) -> sa.Engine:
    """Open the engine for *location*; nothing is connected yet.

    Raises:
        StoreMismatch: the URL names a database we do not know, or one whose driver is not installed.
    """
    url = database_url(location)
    backend = url.get_backend_name()
    if backend == "sqlite":
        engine = sa.create_engine(url, poolclass=QueuePool, pool_size=4, max_overflow=4)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    if backend == "postgresql":
        try:
            # positional parameters, as the prepared statements bind them
            return sa.create_engine(url.set(drivername="postgresql+psycopg"), paramstyle="format", pool_size=4)
        except ModuleNotFoundError as error:
            raise StoreMismatch("a PostgreSQL store needs psycopg: pip install 'psycopg[binary]'") from error
    raise StoreMismatch(f"unknown kind of database {backend!r}: give the path of a SQLite file or a postgresql:// URL")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # the driver's own BEGIN comes too late and never covers DDL: we say BEGIN ourselves (_begin_sqlite)
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "temp_store = MEMORY",
        "cache_size = -16384",
        # a burst may grow the log; it does not keep the disk
        "journal_size_limit = 67108864",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # writers take the write lock at once: a later upgrade from reading could fail with no way to wait
    reading = connection.get_execution_options().get("ngpu_reading", False)
    driver: Any = connection.connection.dbapi_connection
    try:
        driver.execute("BEGIN" if reading else "BEGIN IMMEDIATE").close()
    except sqlite3.Error:
        # once more by the library's way, for its error; it costs as much as the rest of a small commit
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def reading(connection: sa.Connection) -> sa.Connection:
    """Mark *connection* as one that only reads: its transactions never take the write lock."""
    if connection.dialect.name == "sqlite":
        connection.connection.dbapi_connection.execute("PRAGMA query_only = ON").close()  # type: ignore[union-attr]
    return connection.execution_options(ngpu_reading=True)


def upsert(
    dialect: str, table: sa.Table, values: Iterable[str], *, keep: Iterable[str] = (), only_greater: str = ""
) -> sa.Insert:
    """Return an insert of the columns *values* that updates the row when its primary key exists.

    Columns in *keep* stay as they are in an existing row. With *only_greater*, an existing row is updated only by one
    with a greater value in that column.
    """
    make: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert
    names = list(values)
    keys = {column.name for column in table.primary_key}
    statement = make(table).values({name: sa.bindparam(name) for name in names})
    changed = {name: statement.excluded[name] for name in names if name not in keys and name not in set(keep)}
    where = statement.excluded[only_greater] > table.c[only_greater] if only_greater else None
    result: sa.Insert = statement.on_conflict_do_update(
        index_elements=list(table.primary_key), set_=changed, where=where
    )
    return result


def insert_or_ignore(dialect: str, table: sa.Table, values: Iterable[str]) -> sa.Insert:
    """Return an insert of the columns *values* that does nothing when its primary key exists."""
    make: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert
    statement = make(table).values({name: sa.bindparam(name) for name in values})
    result: sa.Insert = statement.on_conflict_do_nothing(index_elements=list(table.primary_key))
    return result


def is_medium_fault(error: BaseException) -> bool:
    """Whether *error* is the fault of the medium rather than of the record being written.

    A full disk, an I/O error, a lock held too long, a lost connection, a damaged file are. Constraint violations and
    values that do not bind are not, nor are mistakes of ours: those concern one record, and its batch mates must not
    suffer from them.
    """
    if isinstance(error, sa.exc.DBAPIError):
        of_record = sa.exc.IntegrityError | sa.exc.DataError | sa.exc.InterfaceError | sa.exc.ProgrammingError
        return not isinstance(error, of_record)
    return isinstance(error, OSError | MemoryError)
