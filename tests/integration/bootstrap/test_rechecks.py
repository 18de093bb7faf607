"""Tasks run again at a whole bootstrap: nodes that answer alike, and one that does not."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap import membership
from ngpu_bootstrap.config import BootstrapSettings, RechecksSection
from ngpu_bootstrap.rechecks import desk
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account
from tests.support.postgres import new_database

SPEC = {**WORKSPACE, "deterministic": True, "concurrency": 4}
ALWAYS = {"often": 1.0, "rare": 1.0}


async def right(asked: Asked) -> None:
    body = await asked.read()
    await asked.answer(200, b"right: " + body)


async def wrong(asked: Asked) -> None:
    await asked.read()
    await asked.answer(200, b"made up")


async def different(asked: Asked) -> None:
    await asked.read()
    await asked.answer(200, asked.signed.order.task_id.encode())


@asynccontextmanager
async def served(
    tmp_path: Path, *scripts: Any, spec: dict[str, Any] = SPEC, **changes: Any
) -> AsyncIterator[tuple[Bootstrap, list[ScriptedNode]]]:
    """Run a bootstrap with a node for each script."""
    settings = settings_for(tmp_path / "data", rechecks=RechecksSection(**{**ALWAYS, **changes}))
    nodes = [ScriptedNode(new_account(), script=script) for script in scripts]
    async with running(settings, workspace=spec) as bootstrap, AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(connected(node, bootstrap.multiaddr))
        await wait_ready(bootstrap, len(nodes))
        yield bootstrap, nodes


async def rechecks(bootstrap: Bootstrap, count: int) -> dict[str, Any]:
    """Return the workspace's once there are *count*."""
    with trio.fail_after(60):
        while True:
            view: dict[str, Any] = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}/rechecks")
            if len(view["rechecks"]) >= count:
                return view
            await trio.sleep(0.05)


async def standing(bootstrap: Bootstrap, node: ScriptedNode) -> dict[str, Any]:
    found: dict[str, Any] = await bootstrap.admin("GET", f"/api/v1/nodes/{node.account.address}")
    return found


@trio_test
async def test_nodes_that_agree_are_left_alone_and_no_client_sees_or_pays_for_it(tmp_path: Path) -> None:
    async with served(tmp_path, right, right) as (bootstrap, nodes):
        answer = await bootstrap.call("POST", "/proxy/8080/x", b"hello")
        assert answer.body == b"right: hello"
        sent = await bootstrap.call("POST", "/user/draw", json.dumps({"data": "again"}).encode())
        assert sent.status == 200
        view = await rechecks(bootstrap, 2)
        assert view["counts"] == {"agreed": 2}
        for one in view["rechecks"]:
            assert {one["first_node"], one["second_node"]} == {node.account.address for node in nodes}
            again = await bootstrap.admin("GET", f"/api/v1/tasks/{one['second_task']}")
            assert (again["api"], again["state_name"], again["receipts"][0]["verdict"]) == (
                "recheck",
                "finished",
                "verified",
            )
        listed = json.loads((await bootstrap.call("GET", "/user/queryTaskList")).body)["taskIds"]
        assert set(listed) == {one["task_id"] for one in view["rechecks"]}, "the client's own, and no others"
        refused = await bootstrap.call("GET", f"/api/v1/tasks/{view['rechecks'][0]['second_task']}")
        assert refused.status == 403
        for node in nodes:
            assert (await standing(bootstrap, node))["standing"]["disputed"] == 0


@trio_test
async def test_who_is_contradicted_by_two_others_loses_the_workspace_and_gets_a_dispute(tmp_path: Path) -> None:
    async with served(tmp_path, right, right, wrong) as (bootstrap, nodes):
        cheat = nodes[2]
        with trio.fail_after(60):
            while True:
                await bootstrap.call("POST", "/proxy/8080/x", b"hello")
                view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}/rechecks")
                if any(one["loser"] for one in view["rechecks"]):
                    break
        lost = next(one for one in view["rechecks"] if one["loser"])
        assert lost["loser"] == cheat.account.address
        assert lost["outcome"] in ("first_lost", "second_lost")
        assert lost["third_task"]
        detail = await standing(bootstrap, cheat)
        assert detail["standing"]["rules"] == {"recheck": detail["standing"]["disputed"]}
        view = await rechecks(bootstrap, 1)  # with what came since
        assert detail["standing"]["last_task"] in {one["task_id"] for one in view["rechecks"]}
        assert detail["rechecks_lost"][0]["loser"] == cheat.account.address
        assert any("two nodes contradicted its answer" in sentence for sentence in detail["why"])
        assert detail["workspaces"][0]["excluded"] in ("outvoted", "distrusted")
        before = len(cheat.orders)
        for _ in range(10):
            assert (await bootstrap.call("POST", "/proxy/8080/x", b"hello")).body == b"right: hello"
        assert len(cheat.orders) == before, "it gets no more tasks of the workspace"
        for node in nodes[:2]:
            assert (await standing(bootstrap, node))["standing"]["disputed"] == 0


@trio_test
async def test_a_loser_stays_out_over_a_restart(tmp_path: Path) -> None:
    async with served(tmp_path, right, right, wrong) as (bootstrap, nodes):
        while True:
            await bootstrap.call("POST", "/proxy/8080/x", b"hello")
            view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}/rechecks")
            if any(one["loser"] for one in view["rechecks"]):
                break
        known, cheat = (bootstrap.workspace, bootstrap.token), nodes[2]
    settings = settings_for(tmp_path / "data", rechecks=RechecksSection(**ALWAYS))
    async with running(settings, known=known) as bootstrap:
        cheat = ScriptedNode(cheat.account, script=wrong)
        async with connected(cheat, bootstrap.multiaddr):
            with trio.fail_after(60):
                while not (await standing(bootstrap, cheat))["workspaces"]:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            with trio.fail_after(60):
                while True:
                    seen = (await standing(bootstrap, cheat))["workspaces"][0]["excluded"]
                    if seen in ("outvoted", "distrusted"):
                        break
                    await trio.sleep(0.05)
            refused = await bootstrap.call("POST", "/proxy/8080/x", b"hello")
            assert refused.status == 503


@trio_test
async def test_two_that_differ_with_nobody_to_decide_are_looked_at_more(tmp_path: Path) -> None:
    async with served(tmp_path, right, wrong) as (bootstrap, nodes):
        await bootstrap.call("POST", "/proxy/8080/x", b"hello")
        view = await rechecks(bootstrap, 1)
        assert view["counts"] == {"undecided": 1}
        for node in nodes:
            assert (await standing(bootstrap, node))["standing"]["disputed"] == 0


@trio_test
async def test_a_workspace_that_is_not_what_it_says_costs_nobody_anything(tmp_path: Path) -> None:
    async with served(tmp_path, different, different, different) as (bootstrap, nodes):
        for number in range(1, 4):
            await bootstrap.call("POST", "/proxy/8080/x", b"hello")
            await rechecks(bootstrap, number)
        await bootstrap.call("POST", "/proxy/8080/x", b"hello")
        await trio.sleep(0.5)
        view = await rechecks(bootstrap, 3)
        assert view["counts"] == {"not_deterministic": 3}, "after so many it is looked at no more"
        for node in nodes:
            assert (await standing(bootstrap, node))["standing"]["disputed"] == 0


@trio_test
async def test_a_client_has_its_answer_whatever_becomes_of_the_second_run(tmp_path: Path) -> None:
    go_on = trio.Event()
    seen: list[str] = []

    async def slow_again(asked: Asked) -> None:
        body = await asked.read()
        if body.decode() in seen:
            await go_on.wait()
        seen.append(body.decode())
        await asked.answer(200, b"right: " + body)

    async with served(tmp_path, slow_again, slow_again) as (bootstrap, _):
        with trio.fail_after(60):
            for number in range(4):
                answer = await bootstrap.call("POST", "/proxy/8080/x", str(number).encode())
                assert answer.body == f"right: {number}".encode()
        go_on.set()
        assert (await rechecks(bootstrap, 4))["counts"] == {"agreed": 4}


@trio_test
async def test_what_was_not_kept_is_not_run_again(tmp_path: Path) -> None:
    async with served(tmp_path, right, right, body_bytes=64) as (bootstrap, _):
        await bootstrap.call("POST", "/proxy/8080/x", b"x" * 1000)
        await bootstrap.call("POST", "/proxy/8080/x", b"short")
        view = await rechecks(bootstrap, 1)
        await trio.sleep(0.3)
        view = await rechecks(bootstrap, 1)
        assert len(view["rechecks"]) == 1
        metrics = (await bootstrap.call("GET", "/metrics", token=None)).body.decode()
        assert "ngpu_rechecks_passed_over 1.0" in metrics
        assert 'ngpu_rechecks_total{outcome="agreed"} 1.0' in metrics


@trio_test
async def test_asynchronous_tasks_are_looked_at_too_and_others_workspaces_are_not(tmp_path: Path) -> None:
    async with served(tmp_path, right, right) as (bootstrap, nodes):
        sent = await bootstrap.call("POST", "/user/train", json.dumps({"data": "later"}).encode())
        task_id = json.loads(sent.body)["taskId"]
        await task_when(bootstrap, task_id, lambda view: view["state"] >= 3)
        view = await rechecks(bootstrap, 1)
        assert (view["rechecks"][0]["task_id"], view["counts"]) == (task_id, {"agreed": 1})
        await bootstrap.admin("PATCH", f"/api/v1/workspaces/{bootstrap.workspace}", {"deterministic": False})
        orders = sum(len(node.orders) for node in nodes)
        await bootstrap.call("POST", "/proxy/8080/x", b"hello")
        await trio.sleep(0.5)
        assert sum(len(node.orders) for node in nodes) == orders + 1


class Held:
    """A script of two nodes: the first run of a request is answered, the second waits until the bootstrap is gone."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def __call__(self, asked: Asked) -> None:
        body = await asked.read()
        self.seen.append(body)
        if self.seen.count(body) > 1:
            await trio.sleep_forever()
        await asked.answer(200, b"right: " + body)

    async def until_runs(self, count: int) -> None:
        with trio.fail_after(60):
            while len(self.seen) < count:  # noqa: ASYNC110
                await trio.sleep(0.02)


async def stay(node: ScriptedNode, multiaddr: str) -> None:
    """Be connected until the bootstrap is gone."""
    with contextlib.suppress(Exception):
        async with connected(node, multiaddr):
            await trio.sleep_forever()


async def ask_thrice(bootstrap: Bootstrap) -> set[str]:
    """Make a call of each kind; return their tasks."""
    through = await bootstrap.call("POST", "/proxy/8080/x", b"passed through")
    wrapped = await bootstrap.call("POST", "/user/draw", json.dumps({"data": "wrapped"}).encode())
    later = await bootstrap.call("POST", "/user/train", json.dumps({"data": "later"}).encode())
    await task_when(bootstrap, json.loads(later.body)["taskId"], lambda view: view["state"] >= 3)
    found = {json.loads(one.body)["taskId"] for one in (wrapped, later)}
    return found | {(through.header(b"ngpu-task-id") or b"").decode()}


@trio_test
async def test_what_waits_outlives_a_restart_and_is_run_once(tmp_path: Path) -> None:
    held = Held()
    settings = settings_for(tmp_path / "data", rechecks=RechecksSection(**ALWAYS))
    accounts = [new_account() for _ in range(2)]
    async with trio.open_nursery() as outliving:
        async with running(settings, workspace=SPEC) as bootstrap:
            for account in accounts:
                outliving.start_soon(stay, ScriptedNode(account, script=held), bootstrap.multiaddr)
            await wait_ready(bootstrap, 2)
            tasks = await ask_thrice(bootstrap)
            await held.until_runs(5)  # two run again, the third waits
            known = (bootstrap.workspace, bootstrap.token)
        outliving.cancel_scope.cancel()
    with sqlite3.connect(tmp_path / "data" / "bootstrap.db") as database:
        rows = dict(database.execute("SELECT task_id, request FROM waiting_rechecks").fetchall())
    assert set(rows) == tasks
    (sealed,) = [request for request in rows.values() if request]
    assert b"passed through" not in sealed, "what went through is not kept in the clear"
    async with running(settings, known=known) as bootstrap, AsyncExitStack() as stack:
        await trio.sleep(1)  # nodes come back after it: that none is there yet decides nothing
        for account in accounts:
            await stack.enter_async_context(connected(ScriptedNode(account, script=right), bootstrap.multiaddr))
        view = await rechecks(bootstrap, 3)
        assert view["counts"] == {"agreed": 3}
        assert {one["task_id"] for one in view["rechecks"]} == tasks
    with sqlite3.connect(tmp_path / "data" / "bootstrap.db") as database:
        assert database.execute("SELECT count(*) FROM waiting_rechecks").fetchone() == (0,)


@pytest.mark.needs_postgres
def test_what_a_dead_bootstrap_left_is_run_by_one_sibling_and_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "TAKE_OVER_S", 0.1)
    monkeypatch.setattr(membership, "BEAT_S", 0.1)
    held = Held()

    async def main(database: str) -> None:
        def settings(name: str) -> BootstrapSettings:
            return settings_for(tmp_path / name, store=database, rechecks=RechecksSection(**ALWAYS))

        nodes = [ScriptedNode(new_account(), script=held) for _ in range(2)]
        async with trio.open_nursery() as outliving:
            async with running(settings("one"), workspace=SPEC) as one:
                known = (one.workspace, one.token)
                for node in nodes:
                    outliving.start_soon(stay, node, one.multiaddr)
                await wait_ready(one, 2)
                await one.call("POST", "/user/draw", json.dumps({"data": "wrapped"}).encode())
                await held.until_runs(2)
            outliving.cancel_scope.cancel()
        async with (
            running(settings("two"), known=known) as two,
            running(settings("three"), known=known) as three,
            AsyncExitStack() as stack,
        ):
            again = [ScriptedNode(node.account, script=right) for node in nodes]
            others = [ScriptedNode(new_account(), script=right) for _ in range(2)]
            for bootstrap, theirs in ((two, again), (three, others)):
                for node in theirs:
                    await stack.enter_async_context(connected(node, bootstrap.multiaddr))
            view = await rechecks(two, 1)
            assert view["counts"] == {"agreed": 1}
            await trio.sleep(1)
            assert (await rechecks(three, 1))["counts"] == {"agreed": 1}
            assert sum(len(node.orders) for node in (*again, *others)) == 1

    with new_database() as database:
        trio.run(main, database)


@trio_test
async def test_a_node_that_leaves_after_its_answer_is_looked_at_all_the_same(tmp_path: Path) -> None:
    gone = trio.Event()

    async def answers_and_leaves(asked: Asked) -> None:
        await wrong(asked)
        gone.set()

    settings = settings_for(tmp_path / "data", rechecks=RechecksSection(**ALWAYS))
    async with running(settings, workspace=SPEC) as bootstrap:
        cheat = ScriptedNode(new_account(), script=answers_and_leaves)
        async with trio.open_nursery() as nursery, connected(cheat, bootstrap.multiaddr):
            await wait_ready(bootstrap)

            async def call() -> None:
                await bootstrap.call("POST", "/user/draw", json.dumps({"data": "x"}).encode())

            nursery.start_soon(call)
            await gone.wait()
        view = await rechecks(bootstrap, 1)
        assert [one["first_node"] for one in view["rechecks"]] == [cheat.account.address]


@trio_test
async def test_an_order_that_looks_again_is_like_the_one_before(tmp_path: Path) -> None:
    async with served(tmp_path, right, right) as (bootstrap, nodes):
        await ask_thrice(bootstrap)
        await rechecks(bootstrap, 3)
        orders = [signed.order for node in nodes for signed in node.orders]
        assert len(orders) == 6
        alike = Counter(
            (one.target, one.port, one.method, one.detach, one.attempt, one.deadline_ms - one.issued_at_ms)
            for one in orders
        )
        assert set(alike.values()) == {2}, "nothing in an order says that it is a second look"
