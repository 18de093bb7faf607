"""The writer's statements fit both databases: same names, positional parameters, nothing of SQLite's own."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.operations import Operations
from ngpu_bootstrap.store.statements import Prepared, Statements
from tests.unit.store.builders import a_finish, a_receipt, a_start, a_task

SQLITE = Statements(SQLiteDialect_pysqlite())
POSTGRESQL = Statements(PGDialect_psycopg(paramstyle="format"))


def prepared(statements: Statements) -> dict[str, Prepared]:
    return {p.name: p for p in vars(statements).values() if isinstance(p, Prepared)}


@pytest.mark.parametrize("name", sorted(prepared(SQLITE)))
def test_a_statement_is_the_same_for_both_databases(name: str) -> None:
    here, there = prepared(SQLITE)[name], prepared(POSTGRESQL)[name]
    assert here.names == there.names
    assert here.rows == there.rows
    assert here.rank == there.rank
    assert here.sql.count("?") == len(here.names)
    assert there.sql.count("%s") == len(there.names)
    # types of parameters and quotes around names that one of them reserves are all that differs
    assert re.sub(r"%s(::\w+)?", "?", there.sql).replace('"', "") == here.sql.replace('"', "")


def test_values_are_bound_in_the_order_of_the_statement() -> None:
    statement = SQLITE.end_attempt
    values = {name: name.upper() for name in statement.names} | {"unused": 1}
    assert statement.bind(values) == tuple(name.upper() for name in statement.names)
    one = SQLITE.drop_tokens
    assert one.bind({"key": "w"}) == ("w",)


def test_rows_are_written_after_the_rows_they_refer_to() -> None:
    s = SQLITE
    assert s.insert_task.rank < s.insert_attempt.rank
    assert s.insert_dispatched_task.rank < s.insert_attempt.rank < s.insert_receipt.rank
    assert s.insert_task.rank < s.insert_body.rank
    # the verdict of a contradicted receipt replaces the one the finish brought
    assert s.finish_task.rank < s.judge_task.rank


def test_an_operation_holds_every_value_its_steps_need() -> None:
    operations = Operations(SQLITE)
    for operation in (
        operations.accept(a_task(request=b"x")),
        operations.accept(a_task(), a_start()),
        operations.begin_attempt(a_start()),
        operations.finish(a_finish(1, a_receipt(1))),
    ):
        for statement, parameters in operation.steps:
            assert len(parameters) == len(statement.names)


@pytest.mark.parametrize("table", tables.metadata.sorted_tables, ids=str)
def test_the_tables_can_be_made_in_postgresql(table: sa.Table) -> None:
    text = str(CreateTable(table).compile(dialect=PGDialect_psycopg()))
    text += "".join(str(CreateIndex(index).compile(dialect=PGDialect_psycopg())) for index in table.indexes)
    assert "WITHOUT ROWID" not in text
