"""Batching is invisible: whatever shares a transaction, each operation ends as it would alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import outcome
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.chains import Chain
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.errors import (
    AttemptConflict,
    IdempotencyKeyUsed,
    RecordRefused,
    StoreError,
    StoreUnavailable,
    TaskExists,
    TaskIsFinal,
    UnknownTask,
)
from ngpu_bootstrap.store.group_commit import GroupCommit
from ngpu_bootstrap.store.operations import Operation, Operations
from ngpu_bootstrap.store.records import AttemptEnd, FiledReceipt, Filing
from ngpu_bootstrap.store.schema import prepare_schema
from ngpu_bootstrap.store.statements import Statements
from tests.unit.store.builders import (
    OTHER_NODE,
    a_finish,
    a_receipt,
    a_start,
    a_task,
    task_id,
)

Make = Callable[[Operations], Operation]


class Writer:
    """A database and what writes to it, without the thread."""

    def __init__(self, path: Path) -> None:
        self.engine = open_engine(path)
        # what these tests are about does not outlive the process
        sa.event.listen(self.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = OFF"))
        self.operations = Operations(Statements(self.engine.dialect))
        self.commits = GroupCommit(self.engine, self.operations, cast(Any, None))

    def write(self, *makes: Make) -> list[object]:
        """Write one batch; return the results, errors as values."""
        batch = [make(self.operations) for make in makes]
        self.commits.write(batch)
        return [
            operation.outcome.error if isinstance(operation.outcome, outcome.Error) else operation.outcome.unwrap()
            for operation in batch
        ]

    def rows(self, *names: str) -> dict[str, list[tuple[Any, ...]]]:
        found = {}
        with self.engine.connect() as connection:
            for table in tables.metadata.sorted_tables:
                if not names or table.name in names:
                    columns = [column for column in table.columns if column.name != "number"]
                    found[table.name] = sorted(tuple(row) for row in connection.execute(sa.select(*columns)))
        return found

    def close(self) -> None:
        self.commits._disconnect()
        self.engine.dispose()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "empty.db"
    engine = open_engine(path)
    with engine.connect() as connection:
        prepare_schema(connection, network="local")
    engine.dispose()
    return path


@contextmanager
def opened(template: Path, path: Path) -> Iterator[Writer]:
    for stale in path.parent.glob(path.name + "*"):
        stale.unlink(missing_ok=True)
    shutil.copy(template, path)
    writer = Writer(path)
    try:
        yield writer
    finally:
        writer.close()


@pytest.fixture
def writer(empty_database: Path, tmp_path: Path) -> Iterator[Writer]:
    with opened(empty_database, tmp_path / "store.db") as writer:
        yield writer


def accept(number: int, **changes: Any) -> Make:
    return lambda operations: operations.accept(a_task(number, **changes))


def accept_and_begin(number: int, **changes: Any) -> Make:
    return lambda operations: operations.accept(a_task(number, **changes), a_start(number))


def begin(number: int, attempt: int, previous: int | None = None) -> Make:
    end = AttemptEnd(task_id(number), previous, "refused", 1, "draining") if previous else None
    return lambda operations: operations.begin_attempt(a_start(number, attempt), end)


def end(number: int, attempt: int, requeue: bool) -> Make:
    return lambda operations: operations.end_attempt(
        AttemptEnd(task_id(number), attempt, "lost", 2, "gone"), requeue=requeue
    )


def finish(number: int, attempt: int | None = 1, sequence: int | None = None, fork: str = "") -> Make:
    receipt = a_receipt(sequence, number, fork=fork, attempt=attempt or 1) if sequence else None
    return lambda operations: operations.finish(a_finish(number, receipt, attempt=attempt))


def late(sequence: int, number: int, fork: str = "", **changes: Any) -> Make:
    return lambda operations: operations.late_receipt(a_receipt(sequence, number, fork=fork, **changes))


def test_a_batch_is_one_transaction(writer: Writer) -> None:
    begins: list[int] = []
    sa.event.listen(writer.engine, "begin", lambda connection: begins.append(1))
    assert writer.write(*(accept(number) for number in range(50))) == [None] * 50
    assert len(begins) == 1
    assert len(writer.rows()["tasks"]) == 50


def test_a_task_may_be_accepted_run_and_finished_in_one_batch(writer: Writer) -> None:
    results = writer.write(accept(1), begin(1, 1), end(1, 1, True), begin(1, 2), finish(1, 2, sequence=1))
    assert results[:4] == [None] * 4
    assert cast(FiledReceipt, results[4]).filing is Filing.FILED
    assert writer.commits.counts.singly == 0


@pytest.mark.parametrize(
    "poison",
    [
        accept(1),  # the id is taken
        accept(9, port=2**70),  # no database has such integers
        accept(9, target="half a surrogate \ud800"),
        accept(9, port=None),
        accept(9, method=object()),
        finish(99),
        begin(1, 1),
    ],
)
def test_a_poisoned_operation_fails_alone(writer: Writer, poison: Make) -> None:
    writer.write(accept_and_begin(1))
    results = writer.write(accept(2), poison, accept(3), finish(1, 1, sequence=1))
    assert isinstance(results[1], StoreError)
    assert not isinstance(results[1], StoreUnavailable)
    assert [results[0], results[2]] == [None, None]
    assert isinstance(results[3], FiledReceipt)
    assert [row[0] for row in writer.rows()["tasks"]] == [task_id(1), task_id(2), task_id(3)]


@pytest.mark.parametrize("sequence", [0, -1, 2**63])
def test_a_sequence_that_no_chain_has_is_refused_before_it_is_queued(writer: Writer, sequence: int) -> None:
    with pytest.raises(RecordRefused):
        writer.write(lambda operations: operations.late_receipt(a_receipt(sequence, 1)))
    with pytest.raises(RecordRefused):
        writer.write(lambda operations: operations.finish(a_finish(1, a_receipt(sequence, 1))))


def test_a_mistake_of_ours_concerns_its_operation_alone(writer: Writer) -> None:
    def broken(operations: Operations) -> Operation:
        operation = operations.late_receipt(a_receipt(1))
        # as if a row were missing that must be there: the receipt at the head
        writer.commits._chains[(a_receipt(1).bootstrap, a_receipt(1).node)] = Chain(1, b"x" * 32)
        return operation

    results = writer.write(accept(1), broken, accept(2))
    assert [results[0], results[2]] == [None, None]
    assert not writer.commits.counts.failing


def test_a_refused_value_is_not_repeated_in_the_error(writer: Writer) -> None:
    [error] = writer.write(accept(1, port=None, target="/secret"))
    assert isinstance(error, RecordRefused)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (accept(1), TaskExists),
        (accept(2, idempotency_key="k"), IdempotencyKeyUsed),
        (begin(99, 1), UnknownTask),
        (begin(1, 1), AttemptConflict),
        (begin(1, 2, previous=7), AttemptConflict),
        (end(1, 2, True), AttemptConflict),
        (end(3, 1, True), TaskIsFinal),
        (begin(3, 2), TaskIsFinal),
        (finish(3, 1), TaskIsFinal),
        (finish(99, 1), UnknownTask),
        (finish(1, 2), AttemptConflict),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(writer: Writer, make: Make, error: type[StoreError]) -> None:
    writer.write(accept_and_begin(1, idempotency_key="k"), accept_and_begin(3), finish(3, 1))
    before = writer.rows()
    [result] = writer.write(make)
    assert type(result) is error
    assert writer.rows() == before


def test_a_used_key_names_the_task_it_was_used_for(writer: Writer) -> None:
    writer.write(accept(1, idempotency_key="k"), accept(2, idempotency_key="k", workspace="1"))
    [error] = writer.write(accept(3, idempotency_key="k"))
    assert isinstance(error, IdempotencyKeyUsed)
    assert error.task_id == task_id(1)


def test_a_failing_medium_fails_the_batch_and_nothing_else(writer: Writer) -> None:
    def fail(_connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", None, OSError("disk I/O error"))

    writer.write(accept_and_begin(1))
    sa.event.listen(writer.engine, "commit", fail)
    results = writer.write(accept(2), finish(1, 1, sequence=1))
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert results[0] is not results[1]
    assert writer.commits.counts.failing
    sa.event.remove(writer.engine, "commit", fail)
    results = writer.write(accept(2), finish(1, 1, sequence=1))
    assert results[0] is None
    assert cast(FiledReceipt, results[1]).filing is Filing.FILED
    assert not writer.commits.counts.failing


def test_a_full_disk_is_unavailable_until_there_is_room(writer: Writer) -> None:
    writer.write(accept(1))
    connection = writer.commits._connect()
    with connection.begin():
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    big = [accept(number, request=bytes(60_000)) for number in range(10, 20)]
    assert all(isinstance(result, StoreUnavailable) for result in writer.write(*big))
    # the connection was renewed, and with it the limit
    assert writer.write(*big) == [None] * 10


def test_a_lock_held_by_another_process_is_unavailable(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.commits._connect().exec_driver_sql("PRAGMA busy_timeout = 20")
    writer.commits._connect().commit()
    with writer.engine.connect() as other, other.begin():
        assert isinstance(writer.write(accept(1))[0], StoreUnavailable)
    assert writer.write(accept(1)) == [None]


def test_receipts_that_contradict_each_other_within_a_batch(writer: Writer) -> None:
    writer.write(accept_and_begin(1), accept_and_begin(2), accept_and_begin(3))
    results = writer.write(
        finish(1, 1, sequence=1), finish(2, 1, sequence=1, fork="other"), finish(3, 1, sequence=2), late(1, 1)
    )
    filings = [cast(FiledReceipt, result).filing for result in results]
    assert filings == [Filing.FILED, Filing.EQUIVOCATION, Filing.FILED, Filing.DUPLICATE]
    rows = writer.rows()
    assert [row[2] for row in rows["receipts"]] == [1, 2]
    assert len(rows["chain_faults"]) == 1
    columns = [column.name for column in tables.tasks.columns if column.name != "number"]
    shown = [columns.index("verdict"), columns.index("rule")]
    verdicts = {row[0]: tuple(row[index] for index in shown) for row in rows["tasks"]}
    assert verdicts[task_id(2)] == ("disputed", "equivocation")
    assert verdicts[task_id(1)] == ("verified", "")


def test_heads_are_forgotten_with_a_batch_that_failed(writer: Writer) -> None:
    writer.write(accept_and_begin(1), accept_and_begin(2))
    # the receipt of task 1 is filed in the first try, then undone by the poison
    writer.write(finish(1, 1, sequence=1), finish(99))
    results = writer.write(late(1, 1), late(2, 2))
    assert [cast(FiledReceipt, r).filing for r in results] == [Filing.DUPLICATE, Filing.FILED]
    assert writer.rows()["chains"][0][2] == 2


numbers = st.integers(1, 4)
makes: st.SearchStrategy[Make] = st.one_of(
    st.builds(accept, numbers, idempotency_key=st.sampled_from([None, None, "k"])),
    st.builds(accept_and_begin, numbers, request=st.sampled_from([None, b"body"])),
    st.builds(begin, numbers, st.integers(1, 3), st.sampled_from([None, 1, 2])),
    st.builds(end, numbers, st.integers(1, 3), st.booleans()),
    st.builds(finish, numbers, st.sampled_from([None, 1, 2]), st.sampled_from([None, 1, 2, 3, 5])),
    st.builds(
        late,
        st.integers(1, 6),
        numbers,
        st.sampled_from(["", "x"]),
        node=st.sampled_from([OTHER_NODE, a_receipt(1).node]),
        authentic=st.sampled_from([True, True, True, False]),
    ),
    st.builds(lambda number: lambda operations: operations.run(task_id(number), 1), numbers),
    st.just(accept(7, port=2**70)),
)


def shown(result: object) -> object:
    return (type(result), str(result)) if isinstance(result, Exception) else result


def in_batches(script: Sequence[Make], cuts: set[int]) -> Iterator[Sequence[Make]]:
    for start, stop in pairwise([0, *sorted(cut for cut in cuts if cut < len(script)), len(script)]):
        yield script[start:stop]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(makes, min_size=1, max_size=25), cuts=st.sets(st.integers(1, 24)))
def test_any_batching_gives_what_single_operations_give(
    empty_database: Path, tmp_path: Path, script: list[Make], cuts: set[int]
) -> None:
    with opened(empty_database, tmp_path / "single.db") as single:
        alone = [shown(single.write(make)[0]) for make in script]
        rows = single.rows()
    with opened(empty_database, tmp_path / "batched.db") as batched:
        together = [shown(result) for batch in in_batches(script, cuts) for result in batched.write(*batch)]
        assert together == alone
        assert batched.rows() == rows
    for bootstrap, node, head, hash in rows["chains"]:
        filed = {row[2]: row[5] for row in rows["receipts"] if row[:2] == (bootstrap, node)}
        assert set(range(1, head + 1)) <= filed.keys()
        assert head + 1 not in filed
        assert head == 0 or filed[head] == hash
