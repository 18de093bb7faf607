"""Several bootstraps on one database: who owns what, and what becomes of the tasks of one that died."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from trio.testing import trio_test

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.errors import AttemptConflict, PlacementOutdated, TaskIsFinal
from ngpu_bootstrap.store.leases import Told
from ngpu_bootstrap.store.records import DeploymentRow
from tests.support.postgres import new_database
from tests.unit.store.builders import (
    BOOTSTRAP,
    DATABASE_FILE,
    NODE,
    OTHER_NODE,
    a_finish,
    a_start,
    a_store,
    a_task,
    a_workspace,
    database_of,
    task_id,
)

SIBLING = OTHER_NODE
LONG_MS = 60_000


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder whose stores are all on one PostgreSQL database."""
    with new_database() as url:
        (tmp_path / DATABASE_FILE).write_text(url)
        yield tmp_path


def lapse(directory: Path, address: str) -> None:
    """End a lease as time would."""
    b = tables.bootstraps
    written(directory, sa.update(b).where(b.c.address == address).values(lease_until_ms=1))


def written(directory: Path, change: sa.Update) -> None:
    """Change the database beside its stores."""
    engine = open_engine(database_of(directory))
    with engine.begin() as connection:
        connection.execute(change)
    engine.dispose()


@pytest.mark.needs_postgres
@trio_test
async def test_the_tasks_of_one_that_died_are_taken_over_once_its_lease_has_ended(shared: Path) -> None:
    async with a_store(shared) as ours, a_store(shared, bootstrap=SIBLING) as theirs:
        assert await ours.renew_lease(LONG_MS, {}, anew=True)
        assert await theirs.renew_lease(LONG_MS, {"http": ["x"]}, anew=True)
        await ours.accept(a_task(1, detach=True, request=b"x"))
        await ours.accept_and_begin(a_task(2, detach=True, request=b"x"), a_start(2))
        await ours.accept_and_begin(a_task(3), a_start(3))
        await ours.finish(a_finish(3))
        assert await theirs.take_over() == []
        lapse(shared, BOOTSTRAP)
        taken = await theirs.take_over()
        assert [one.task.task_id for one in taken] == [task_id(1), task_id(2)]
        assert [one.task.bootstrap for one in taken] == [SIBLING, SIBLING]
        assert await ours.owned() == set()
        assert await theirs.owned() == {task_id(1), task_id(2)}
        # it only slept: it hears of it, and can begin nothing that the other began
        assert not await ours.renew_lease(LONG_MS, {})
        await theirs.begin_attempt(a_start(1))
        with pytest.raises(AttemptConflict):
            await ours.begin_attempt(a_start(1))
        await theirs.finish(a_finish(1))
        with pytest.raises(TaskIsFinal):
            await ours.finish(a_finish(1))
        assert [(one.address, one.lives) for one in await ours.siblings()] == sorted(
            [(BOOTSTRAP, True), (SIBLING, True)]
        )


@pytest.mark.needs_postgres
@trio_test
async def test_one_that_stops_in_order_leaves_at_once_and_comes_back_to_what_is_left(shared: Path) -> None:
    async with a_store(shared) as ours, a_store(shared, bootstrap=SIBLING) as theirs:
        await ours.renew_lease(LONG_MS, {}, anew=True)
        for number in range(1, 4):
            await ours.accept(a_task(number, detach=True, request=b"x"))
        await ours.end_lease()
        assert len(await theirs.take_over(limit=2)) == 2
        await ours.renew_lease(LONG_MS, {}, anew=True)
        assert await theirs.take_over() == []
        assert [one.task.task_id for one in await ours.unfinished()] == [task_id(3)]


@pytest.mark.needs_postgres
@trio_test
async def test_tasks_of_before_there_were_several_go_to_the_first_that_comes(shared: Path) -> None:
    async with a_store(shared) as ours, a_store(shared, bootstrap=SIBLING) as theirs:
        await ours.accept(a_task(1))
        engine = open_engine(database_of(shared))
        with engine.begin() as connection:
            connection.execute(sa.update(tables.tasks).values(bootstrap=""))
        engine.dispose()
        assert await theirs.claim_own() == 1
        assert await ours.claim_own() == 0
        assert ours.is_shared


@trio_test
async def test_a_sqlite_file_has_one_owner_whatever_its_key_was(tmp_path: Path) -> None:
    async with a_store(tmp_path, bootstrap=SIBLING) as store:
        await store.accept(a_task(1))
        assert not store.is_shared
    async with a_store(tmp_path) as store:
        assert await store.unfinished() == []
        assert await store.claim_own() == 1
        assert len(await store.unfinished()) == 1


@trio_test
async def test_a_wish_to_end_is_kept_until_the_task_has_ended(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept(a_task(1))
        await store.accept(a_task(2))
        await store.ask_cancel(task_id(1), 50)
        await store.ask_cancel(task_id(1), 60)
        assert await store.cancels_asked() == [task_id(1)]
        found = await store.task(task_id(1))
        assert found is not None
        assert found.cancel_asked_at_ms == 50
        await store.finish(a_finish(1, attempt=None))
        assert await store.cancels_asked() == []
        with pytest.raises(TaskIsFinal):
            await store.ask_cancel(task_id(1), 70)


@trio_test
async def test_the_mark_changes_with_every_change_of_workspaces(directory: Path) -> None:
    async with a_store(directory) as store:
        marks = [await store.workspaces_mark()]
        await store.add_workspace(a_workspace())
        marks.append(await store.workspaces_mark())
        await store.revise_workspace(a_workspace().id, 2, name="x", spec={}, at_ms=2)
        marks.append(await store.workspaces_mark())
        await store.remove_workspace(a_workspace().id, 3)
        marks.append(await store.workspaces_mark())
        assert len(set(marks)) == 4


@pytest.mark.needs_postgres
@trio_test
async def test_where_workspaces_run_is_not_stored_on_what_another_has_changed_since(shared: Path) -> None:
    row = DeploymentRow(a_workspace().id, NODE, 1, 5)
    async with a_store(shared) as ours, a_store(shared, bootstrap=SIBLING) as theirs:
        await ours.add_workspace(a_workspace())
        seen = await theirs.workspaces_mark()
        mark, _ = await ours.place_after(await ours.workspaces_mark(), [row], [])
        assert mark == await ours.workspaces_mark()
        with pytest.raises(PlacementOutdated):
            await theirs.place_after(seen, [DeploymentRow(a_workspace().id, OTHER_NODE, 1, 6)], [])
        assert await theirs.deployments() == [row]
        # a clock that is behind changes no less
        await theirs.place_after(mark, [DeploymentRow(a_workspace().id, OTHER_NODE, 1, 3)], [])
        with pytest.raises(PlacementOutdated):
            await ours.place_after(mark, [], [(a_workspace().id, NODE)])
        assert len(await ours.deployments()) == 2


@pytest.mark.needs_postgres
@trio_test
async def test_a_node_is_present_where_a_bootstrap_that_lives_has_it(shared: Path) -> None:
    async with a_store(shared) as ours, a_store(shared, bootstrap=SIBLING) as theirs:
        for store in (ours, theirs):
            await store.renew_lease(LONG_MS, {}, anew=True)
        await theirs.keep_presence((), {NODE: {"7": Told("pulling", 5, 1)}, OTHER_NODE: {"70": Told("ready", 100, 2)}})
        assert await ours.present_elsewhere({NODE, BOOTSTRAP}) == {NODE}
        assert await theirs.present_elsewhere({NODE}) == set()
        assert await ours.told_elsewhere("7") == {NODE: Told("pulling", 5, 1)}
        assert await theirs.told_elsewhere("7") == await ours.told_elsewhere("_") == {}
        await theirs.keep_presence({NODE}, {NODE: {"7": Told("ready", 100, 1)}})
        assert await ours.told_elsewhere("7") == {NODE: Told("ready", 100, 1)}
        await theirs.keep_presence({NODE}, {})
        assert await ours.present_elsewhere({NODE, OTHER_NODE}) == {OTHER_NODE}
        # one of a version before says no more than who is there
        written(shared, sa.update(tables.node_presence).values(reports=None))
        assert await ours.told_elsewhere("70") == {}
        await theirs.keep_presence(None, {OTHER_NODE: {"70": Told("ready", 100, 2)}})
        assert await ours.told_elsewhere("70") == {OTHER_NODE: Told("ready", 100, 2)}
        lapse(shared, SIBLING)
        assert await ours.present_elsewhere({OTHER_NODE}) == set()
        assert await ours.told_elsewhere("70") == {}
        # its next run has none of the nodes of the run before
        await theirs.renew_lease(LONG_MS, {}, anew=True)
        assert await ours.present_elsewhere({OTHER_NODE}) == set()
