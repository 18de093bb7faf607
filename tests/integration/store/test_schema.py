"""Databases at open: made, migrated with their data, or refused with a reason an operator can act on."""

from __future__ import annotations

import importlib.resources
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from trio.testing import trio_test

from ngpu_bootstrap.store import schema, tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.errors import StoreMismatch, StoreUnavailable
from ngpu_bootstrap.store.records import Filing, NodeRow, TaskFilter
from ngpu_bootstrap.store.store import Store
from ngpu_daemon.errors import OperatorError
from ngpu_protocol.receipts import ReceiptLink
from tests.support.postgres import new_database
from tests.unit.store.builders import (
    BOOTSTRAP,
    DATABASE_FILE,
    NODE,
    WORKSPACE,
    a_finish,
    a_receipt,
    a_start,
    a_store,
    a_task,
    a_workspace,
    receipt_hash,
    task_id,
)

RELEASED = Path(__file__).parent / "released"


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store.db")
    with engine.connect() as connection:
        schema.prepare_schema(connection, network="local")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        for table in tables.metadata.sorted_tables:
            made = connection.exec_driver_sql(
                "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", (table.name,)
            ).scalar_one()
            assert ("WITHOUT ROWID" in made) == (table.dialect_options["sqlite"]["with_rowid"] is False)
    engine.dispose()


def test_head_is_the_newest_migration_and_they_form_one_line() -> None:
    script = ScriptDirectory.from_config(schema.migration_config())
    assert script.get_heads() == [schema.HEAD]
    assert script.get_bases() == ["0001"]


def test_migrations_are_found_in_an_installed_package() -> None:
    files = importlib.resources.files("ngpu_bootstrap.store") / "migrations" / "versions"
    assert sum(file.name.endswith(".py") for file in files.iterdir()) >= 1


@pytest.mark.parametrize("dump", sorted(RELEASED.glob("*.sql")), ids=lambda path: path.stem)
@trio_test
async def test_a_database_of_every_schema_so_far_opens_with_its_data(dump: Path, tmp_path: Path) -> None:
    """Each dump was made by that version, see the last test of this file."""
    load(dump, tmp_path / "bootstrap.db")
    await check_released(tmp_path)


@pytest.mark.needs_postgres
@pytest.mark.parametrize("dump", sorted(RELEASED.glob("*.sql")), ids=lambda path: path.stem)
@trio_test
async def test_a_postgresql_database_of_every_schema_so_far_is_upgraded_with_its_data(
    dump: Path, tmp_path: Path
) -> None:
    """The rows are those of the dump; the schema is made by that version's own migrations."""
    load(dump, tmp_path / "rows.db")
    with new_database() as url:
        (tmp_path / DATABASE_FILE).write_text(url)
        engine = open_engine(url)
        with engine.connect() as connection:
            with connection.begin():
                schema.upgrade(connection, dump.stem)
                copy_rows(tmp_path / "rows.db", connection)
            if dump.stem != schema.HEAD:
                with pytest.raises(StoreMismatch, match="db upgrade"):
                    await opening(tmp_path)
            with connection.begin():
                schema.upgrade(connection, schema.HEAD)
        engine.dispose()
        await check_released(tmp_path)


def copy_rows(source: Path, connection: sa.Connection) -> None:
    """Copy every row of a SQLite database into tables of the same names and columns."""
    target = sa.MetaData()
    target.reflect(connection)
    with closing(sqlite3.connect(source)) as rows:
        for table in target.sorted_tables:
            if table.name == "alembic_version":
                continue
            cursor = rows.execute(f"SELECT * FROM {table.name}")
            names = [column[0] for column in cursor.description]
            values = [dict(zip(names, row, strict=True)) for row in cursor]
            if values:
                connection.execute(sa.insert(table), values)
    connection.exec_driver_sql("SELECT setval('tasks_number_seq', (SELECT max(number) FROM tasks))")


async def check_released(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.claim_own()
        assert [row.id for row in await store.list_workspaces()] == [WORKSPACE]
        assert len(await store.list_workspaces(removed=True)) == 2
        detail = await store.detail(task_id(1))
        assert detail.task.response is not None
        assert detail.task.response.content == b'{"ok":true}'
        assert detail.task.verdict == "verified"
        assert len(detail.attempts) == 1
        assert [one.task.task_id for one in await store.unfinished()] == [task_id(2), task_id(3)]
        assert await store.chain_head(NODE) == ReceiptLink(1, receipt_hash(1))
        assert [(gap.from_sequence, gap.to_sequence) for gap in (await store.missing(NODE)).gaps] == [(2, 2)]
        assert len(await store.nodes()) == 1
        # and it goes on from there
        await store.finish(a_finish(2))
        assert (await store.late_receipt(a_receipt(2))).filing is Filing.FILED
        assert await store.chain_head(NODE) == ReceiptLink(3, receipt_hash(3))
    async with a_store(directory) as store:
        assert len((await store.tasks(TaskFilter())).tasks) == 3


@trio_test
async def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    async with a_store(tmp_path) as store:
        await store.add_workspace(a_workspace())
    engine = open_engine(tmp_path / "bootstrap.db")
    with engine.connect() as connection:
        before = list(connection.exec_driver_sql("SELECT name, sql FROM sqlite_master"))
    async with a_store(tmp_path) as store:
        assert len(await store.list_workspaces()) == 1
    with engine.connect() as connection:
        assert list(connection.exec_driver_sql("SELECT name, sql FROM sqlite_master")) == before
    engine.dispose()


@trio_test
async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with a_store(tmp_path):
        pass
    engine = open_engine(tmp_path / "bootstrap.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreMismatch, match="newer than this version"):
        await opening(tmp_path)
    with engine.begin() as connection:
        assert schema.current_revision(connection) == "9999"
    engine.dispose()


@trio_test
async def test_an_outdated_schema_is_refused_where_migrating_is_the_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_store(tmp_path):
        pass
    monkeypatch.setattr(schema, "HEAD", "9999")
    with pytest.raises(StoreMismatch, match="db upgrade"):
        await opening(tmp_path, migrate=False)


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    def fail(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "CREATE TABLE tasks" in statement:
            raise OSError("the machine goes down")

    engine = open_engine(tmp_path / "store.db")
    sa.event.listen(engine, "before_cursor_execute", fail)
    with engine.connect() as connection:
        with pytest.raises(OSError, match="goes down"):
            schema.prepare_schema(connection, network="local")
        assert connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar() == 0
        connection.commit()
    sa.event.remove(engine, "before_cursor_execute", fail)
    with engine.connect() as connection:
        schema.prepare_schema(connection, network="local")
    engine.dispose()


@trio_test
async def test_another_networks_database_is_refused(tmp_path: Path) -> None:
    async with a_store(tmp_path):
        pass
    with pytest.raises(StoreMismatch, match="network 'local', not 'main'") as caught:
        await Store.open(tmp_path / "bootstrap.db", network="main", bootstrap=BOOTSTRAP)
    assert isinstance(caught.value, OperatorError)


@trio_test
async def test_what_is_no_database_or_no_place_for_one_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "bootstrap.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        await opening(tmp_path)
    with pytest.raises(StoreUnavailable, match="unable to open"):
        await opening(tmp_path / "missing")


@pytest.mark.parametrize("location", ["mysql://host/x", "nonsense://"])
@trio_test
async def test_an_unknown_kind_of_database_is_refused(location: str, tmp_path: Path) -> None:
    with pytest.raises((StoreMismatch, ValueError)):
        await Store.open(location, network="local", bootstrap=BOOTSTRAP, bodies=tmp_path)


def test_two_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from ngpu_bootstrap.store.database import open_engine; "
        "from ngpu_bootstrap.store.schema import prepare_schema; sys.stdin.readline()\n"
        "with open_engine(sys.argv[1]).connect() as c: prepare_schema(c, network='local')"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "new.db"], stdin=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar() == 1
    engine.dispose()


@trio_test
async def test_a_database_of_this_schema_can_be_dumped(tmp_path: Path) -> None:
    """How ``released/*.sql`` come about: run with NGPU_WRITE_DUMP naming the file, once for every new schema."""
    async with a_store(tmp_path) as store:
        await store.add_workspace(a_workspace())
        await store.add_workspace(a_workspace("2"))
        await store.remove_workspace("2", 99)
        await store.accept_and_begin(a_task(1, request=b"{}"), a_start(1))
        await store.finish(a_finish(1, a_receipt(1)))
        await store.accept_and_begin(a_task(2, detach=True, request=b"{}"), a_start(2))
        await store.accept(a_task(3, detach=True, request=b"{}", idempotency_key="k"))
        await store.late_receipt(a_receipt(3))
        await store.see_node(NodeRow(NODE, 100, 100, name="one"))
    assert "CREATE TABLE tasks" in dumped(tmp_path / "bootstrap.db")


def load(dump: Path, database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(dump.read_text())


def dumped(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        dump = "\n".join(connection.iterdump()) + "\n"
    if path := os.environ.get("NGPU_WRITE_DUMP"):
        Path(path).write_text(dump)
    return dump


async def opening(directory: Path, **options: Any) -> None:
    async with a_store(directory, **options):
        pass
