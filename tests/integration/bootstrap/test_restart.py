"""A bootstrap that ends and starts again on its data: what was promised is kept, what may not run again does not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, echo, new_account


@asynccontextmanager
async def started(
    tmp_path: Path,
    node: ScriptedNode | None,
    known: tuple[str, str] | None = None,
    *,
    workspace: dict[str, Any] | None = None,
) -> AsyncIterator[Bootstrap]:
    """Run a bootstrap on the same data directory each time, with *node* connected. Leaving cuts it off at once."""
    async with running(settings_for(tmp_path / "bootstrap"), workspace=workspace, known=known) as bootstrap:
        if node is None:
            yield bootstrap
            return
        node.welcome = None
        async with connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            yield bootstrap


async def submit(bootstrap: Bootstrap) -> str:
    answer = await bootstrap.call("POST", "/user/train", b'{"data": "x"}')
    assert answer.status == 200
    return str(json.loads(answer.body)["taskId"])


def test_a_task_that_waited_runs_after_the_restart_and_one_that_ran_is_collected(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())

        async def stuck(asked: Asked) -> None:
            await asked.read()
            await trio.sleep_forever()

        node.script = stuck
        async with started(tmp_path, node, workspace={**WORKSPACE, "concurrency": 1}) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            running_one = await submit(bootstrap)
            await task_when(bootstrap, running_one, lambda view: view["state"] == 1)
            waiting_one = await submit(bootstrap)
            assert (await task_when(bootstrap, waiting_one, lambda view: True))["state"] == 0
        node.script = echo
        node.kept[f"{running_one}/1"] = _kept(b"kept")
        async with started(tmp_path, node, known) as bootstrap:
            view = await task_when(bootstrap, running_one, lambda view: view["state"] == 3)
            assert (view["verdict"], len(view["attempts"])) == ("verified", 1)
            polled = await bootstrap.call("GET", f"/user/queryTask?taskID={running_one}", token=None)
            assert json.loads(polled.body)["data"] == "kept"
            await task_when(bootstrap, waiting_one, lambda view: view["state"] == 3)
        assert [one.order.task_id for one in node.orders] == [running_one, waiting_one]

    trio.run(main)


def _kept(body: bytes) -> Any:
    async def replay(asked: Asked) -> None:
        asked.body = b"x"  # what the request was
        await asked.answer(200, body)

    return replay


def test_a_running_detached_task_is_asked_for_until_its_node_has_the_answer(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        polls = 0

        async def silent(asked: Asked) -> None:
            await asked.read()
            await trio.sleep_forever()

        async def later(asked: Asked) -> None:
            nonlocal polls
            polls += 1
            if polls < 3:
                await asked.exchange.respond_json(202, {"state": "running", "session": node.session.hex()})
            else:
                await _kept(b"late")(asked)

        node.script = silent
        async with started(tmp_path, node) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            task_id = await submit(bootstrap)
            await task_when(bootstrap, task_id, lambda view: view["state"] == 1)
        node.kept[f"{task_id}/1"] = later
        async with started(tmp_path, node, known) as bootstrap:
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
            assert (view["verdict"], polls) == ("verified", 3)
            assert len(node.orders) == 1

    trio.run(main)


def test_an_order_its_node_never_saw_runs_again(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())

        async def silent(asked: Asked) -> None:
            await trio.sleep_forever()

        node.script = silent
        async with started(tmp_path, node) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            task_id = await submit(bootstrap)
            await task_when(bootstrap, task_id, lambda view: view["state"] == 1)
        node.script = echo  # nothing is kept: it answers 404 in the order's own session
        async with started(tmp_path, node, known) as bootstrap:
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
            assert [attempt["outcome"] for attempt in view["attempts"]] == ["lost", "complete"]
            assert node.orders[-1].order.attempt == 2

    trio.run(main)


def test_an_order_a_restarted_node_may_have_run_does_not_run_again(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())

        async def silent(asked: Asked) -> None:
            await trio.sleep_forever()

        node.script = silent
        async with started(tmp_path, node) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            task_id = await submit(bootstrap)
            await task_when(bootstrap, task_id, lambda view: view["state"] == 1)
        node.session = bytes(32)
        async with started(tmp_path, node, known) as bootstrap:
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
            assert view["reason"] == "node_lost"
            polled = await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}", token=None)
            document = json.loads(polled.body)
            assert (document["result_code"], document["reason"], document["result_size"]) == (502, "node_lost", 1)

    trio.run(main)


def test_a_task_of_a_removed_workspace_fails_with_that_reason(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())

        async def silent(asked: Asked) -> None:
            await trio.sleep_forever()

        node.script = silent
        async with started(tmp_path, node) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            task_id = await submit(bootstrap)
            await task_when(bootstrap, task_id, lambda view: view["state"] == 1)
            await bootstrap.admin("DELETE", f"/api/v1/workspaces/{bootstrap.workspace}")
        async with started(tmp_path, None, known) as bootstrap:
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
            assert view["reason"] == "workspace_removed"

    trio.run(main)


def test_a_detached_task_whose_stream_broke_is_collected_without_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())

        async def vanish(asked: Asked) -> None:
            await asked.read()
            node.kept[f"{asked.signed.order.task_id}/1"] = _kept(b"kept")
            await asked.exchange.abort()

        node.script = vanish
        async with started(tmp_path, node) as bootstrap:
            task_id = await submit(bootstrap)
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
            assert view["verdict"] == "verified"
            assert [attempt["outcome"] for attempt in view["attempts"]] == ["complete"]

    trio.run(main)


def test_the_chain_goes_on_where_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        async with started(tmp_path, node) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            for _ in range(3):
                await bootstrap.call("GET", "/proxy/8080/")
            await node.until(lambda: len(node.acknowledged) == 3)
            assert node.heads[-1].sequence == 0
        async with started(tmp_path, node, known) as bootstrap:
            assert (node.heads[-1].sequence, node.heads[-1].hash) == (3, node.head)
            await bootstrap.call("GET", "/proxy/8080/")
            await node.until(lambda: len(node.acknowledged) == 4)
            assert [one.acknowledgement.verdict for one in node.acknowledged] == ["verified"] * 4

    trio.run(main)


def test_a_bootstrap_that_has_just_started_takes_tasks_for_nodes_that_are_coming_back(tmp_path: Path) -> None:
    async def main() -> None:
        image = {
            **{key: value for key, value in WORKSPACE.items() if key != "service"},
            "image": "registry.example/e:1",
        }
        node = ScriptedNode(new_account(), services=())
        async with started(tmp_path, node, workspace=image) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
        async with started(tmp_path, None, known) as bootstrap:
            task_id = await submit(bootstrap)
            polled = await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}", token=None)
            assert "coming back" in json.loads(polled.body)["msg"]
            node.welcome = None
            async with connected(node, bootstrap.multiaddr):
                await task_when(bootstrap, task_id, lambda view: view["state"] == 3)

    trio.run(main)
