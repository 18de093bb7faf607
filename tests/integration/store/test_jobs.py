"""Jobs and sticky keys in both kinds of database."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.profiles.jobs import Job, Phase
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.registry.sticky_keys import StickyKeys
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.job_rows import JobRow, key_hash
from ngpu_protocol.job_terms import JobTerms
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.unit.store.builders import NODE, OTHER_NODE, WORKSPACE, a_finish, a_start, a_store, a_task, task_id

DECLARED = JobTerms.model_validate(
    {
        "id": ["/job_id"],
        "poll": {"method": "POST", "target": "/r", "body": {"task_id": "{id}"}},
        "state": ["/state"],
        "done": ["done", True],
        "interval_s": 0.5,
    }
)


def a_job(
    number: int = 1, *, caller: str = WORKSPACE, key: str = "j1", node: str = NODE, name: str = "p/draw"
) -> JobRow:
    job = Job(since_ms=5, phase=Phase.POLLING, key=key, node=node, state="running")
    return JobRow(task_id(number), WORKSPACE, caller, name, DECLARED, job)


@trio_test
async def test_a_job_is_found_again_by_its_task_and_by_its_clients_key(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept(a_task(1))
        await store.chore(lambda c: job_rows.put(c, a_job()))
    async with a_store(directory) as store:
        assert await store.look_up(lambda c: job_rows.of_task(c, task_id(1))) == a_job()
        assert await store.look_up(lambda c: job_rows.of_key(c, None, WORKSPACE, "p/draw", "j1")) == a_job()
        assert await store.look_up(lambda c: job_rows.unfinished(c, [task_id(1), task_id(2)])) == [a_job()]
        done = a_job().at(replace(a_job().job, phase=Phase.DONE))
        await store.chore(lambda c: job_rows.put(c, done))
        assert await store.look_up(lambda c: job_rows.of_task(c, task_id(1))) == done


@trio_test
async def test_the_key_of_another_client_or_another_kind_of_job_is_unknown(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept(a_task(1))
        await store.chore(lambda c: job_rows.put(c, a_job()))
        assert await store.look_up(lambda c: job_rows.of_key(c, None, "1", "p/draw", "j1")) is None
        assert await store.look_up(lambda c: job_rows.of_key(c, None, WORKSPACE, "p/train", "j1")) is None
        assert await store.look_up(lambda c: job_rows.of_key(c, "2", WORKSPACE, "p/draw", "j1")) is None


@trio_test
async def test_of_two_jobs_under_one_key_the_newer_is_meant(directory: Path) -> None:
    async with a_store(directory) as store:
        for number in (1, 2):
            await store.accept(a_task(number))
            await store.chore(lambda c, number=number: job_rows.put(c, a_job(number)))  # type: ignore[misc]
        found = await store.look_up(lambda c: job_rows.of_key(c, None, WORKSPACE, "p/draw", "j1"))
        assert found is not None
        assert found.task_id == task_id(2)


@trio_test
async def test_a_key_that_lives_on_another_node_is_taken(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept(a_task(1))
        await store.chore(lambda c: job_rows.put(c, a_job(1)))
        elsewhere = a_job(2, node=OTHER_NODE)
        assert await store.look_up(lambda c: job_rows.key_is_taken(c, elsewhere))
        assert not await store.look_up(lambda c: job_rows.key_is_taken(c, a_job(2)))
        assert not await store.look_up(lambda c: job_rows.key_is_taken(c, a_job(2, node=OTHER_NODE, caller="1")))
        await store.finish(a_finish(1, attempt=None))
        assert not await store.look_up(lambda c: job_rows.key_is_taken(c, elsewhere))


@trio_test
async def test_a_job_and_the_calls_for_it_go_with_its_task(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1), a_start(1))
        await store.accept_and_begin(a_task(2), a_start(2))
        await store.chore(lambda c: job_rows.put(c, a_job(1)))
        await store.chore(lambda c: job_rows.note_call(c, task_id(1), task_id(2)))
        await store.chore(lambda c: job_rows.note_call(c, task_id(1), task_id(9)))  # of no task: nothing to link
        assert await store.look_up(lambda c: job_rows.calls_of(c, task_id(1))) == [task_id(2)]
        await store.finish(a_finish(1))
        assert await store.remove_old(before_ms=a_task(2).accepted_at_ms, bodies_bytes=None) == 1
        assert await store.look_up(lambda c: job_rows.of_task(c, task_id(1))) is None
        assert await store.look_up(lambda c: job_rows.calls_of(c, task_id(1))) == []


@trio_test
async def test_keys_stick_while_they_are_used_and_are_bounded(directory: Path) -> None:
    async with a_store(directory) as store:
        keys = [key_hash(WORKSPACE, WORKSPACE, "p cookie s", f"{number}") for number in range(4)]
        for number, key in enumerate(keys):
            await store.chore(lambda c, n=number, k=key: job_rows.stick(c, k, WORKSPACE, NODE, 100 + n))  # type: ignore[misc]
        assert await store.look_up(lambda c: job_rows.node_of_key(c, keys[0], 100)) == NODE
        assert await store.look_up(lambda c: job_rows.node_of_key(c, keys[0], 101)) is None, "unused for too long"
        await store.chore(lambda c: job_rows.stick(c, keys[0], WORKSPACE, OTHER_NODE, 200))
        assert await store.look_up(lambda c: job_rows.node_of_key(c, keys[0], 101)) == OTHER_NODE
        assert await store.chore(lambda c: job_rows.forget_keys(c, 102, 3)) == 1, "one by age"
        assert await store.chore(lambda c: job_rows.forget_keys(c, 0, 2)) == 1, "one by number"
        left = [k for k in keys if await store.look_up(lambda c, k=k: job_rows.node_of_key(c, k, 0))]  # type: ignore[misc]
        assert left == [keys[0], keys[3]]


def test_a_key_is_known_by_a_hash_that_no_other_place_shares() -> None:
    assert key_hash("1", "2", "a", "bc") != key_hash("1", "2", "ab", "c")


@trio_test
async def test_a_declared_key_leads_to_its_node_after_a_restart_and_from_a_sibling(directory: Path) -> None:
    spec = WorkspaceSpec(id="7", name="s", image="x", ports=[80])
    key = StickyKeys.of("7", "7", "p json /dataset", "11")
    assert key != StickyKeys.of("7", "8", "p json /dataset", "11"), "another client's"
    async with a_store(directory) as store:
        keys = StickyKeys(store, Nodes(now_ms=lambda: 1000, queue_limit=1), kept_ms=500, now_ms=lambda: 1000)
        await keys.find(spec, key, refuse_s=math.inf)  # new: it may go anywhere
        await keys.note(spec, key, NODE)
        await keys.note(spec, key, NODE)
    async with a_store(directory) as store:
        nodes = Nodes(now_ms=lambda: 1400, queue_limit=1)
        keys = StickyKeys(store, nodes, kept_ms=500, now_ms=lambda: 1400)
        await keys.find(spec, key)
        assert nodes.stuck(spec, key) == NODE
        with pytest.raises(NotServed, match="is away") as refused:
            await keys.find(spec, key, refuse_s=math.inf)
        assert refused.value.reason == "state_node_away"
        late = Nodes(now_ms=lambda: 1600, queue_limit=1)
        await StickyKeys(store, late, kept_ms=500, now_ms=lambda: 1600).find(spec, key, refuse_s=math.inf)
        assert late.stuck(spec, key) is None
