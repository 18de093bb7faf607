"""Tasks run again at a whole bootstrap: nodes that answer alike, and one that does not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from trio.testing import trio_test

from ngpu_bootstrap.config import RechecksSection
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

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
    with trio.fail_after(15):
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
        with trio.fail_after(20):
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
            with trio.fail_after(10):
                while not (await standing(bootstrap, cheat))["workspaces"]:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            with trio.fail_after(10):
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
        with trio.fail_after(5):
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
