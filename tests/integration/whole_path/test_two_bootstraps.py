"""Two bootstraps of one service on one PostgreSQL database, as real processes: either serves, and one dies."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from ngpu_protocol.http1 import Exchange, Handler, HttpError, serve_tcp
from ngpu_protocol.identity import address_of_peer_id
from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from tests.integration.whole_path.rig import SPEC, Daemon, Network, add_workspace, free_port, prepare
from tests.integration.whole_path.test_statements import command
from tests.integration.whole_path.workspace import Workspace
from tests.support.postgres import new_database

JSON = [(b"content-type", b"application/json")]
# what the design promises: the tasks of a killed bootstrap run elsewhere within this
TAKEN_OVER_WITHIN_S = 10.0


@pytest.mark.needs_postgres
@pytest.mark.timeout_s(240)
def test_one_of_two_is_killed_and_the_other_carries_its_tasks_on(tmp_path: Path) -> None:
    """Killed while a detached task and an attached call of its run and others wait."""
    with new_database() as url:
        trio.run(main, tmp_path, url)


async def main(tmp_path: Path, url: str) -> None:
    workspace = Serving()
    async with pair(tmp_path, url, workspace) as (one, two):
        with trio.fail_after(60):
            await share_a_model(one, two, one.nodes[0])
        workspace.forget()
        with trio.fail_after(170):
            await die_and_be_replaced(one, two, workspace, tmp_path)


@asynccontextmanager
async def pair(
    tmp_path: Path, url: str, workspace: Handler, further: Sequence[str] = ()
) -> AsyncIterator[tuple[Network, Network]]:
    """Run two bootstraps of one service on the database at *url*, with one node that serves *workspace* for both.

    Args:
        further: lines of both bootstraps' configuration.
    """
    bootstraps, multiaddrs, addresses = [], [], []
    for name in ("one", "two"):
        folder, port = tmp_path / name, free_port()
        peer_id = prepare(
            folder,
            [
                f'listen = ["/ip4/127.0.0.1/tcp/{port}"]',
                f'http_listen = "127.0.0.1:{free_port()}"',
                f"store = {json.dumps(url)}",
                'service = "pair"',
                "drain_s = 3",
                *further,
            ],
        )
        addresses.append(address_of_peer_id(peer_id))
        bootstraps.append(Daemon("ngpu_bootstrap", folder, "bootstrap.json"))
        multiaddrs.append(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}")
    for daemon, other in zip(bootstraps, reversed(addresses), strict=True):
        config = daemon.folder / "config.toml"  # before its tables
        config.write_text(f"siblings = [{json.dumps(other)}]\n" + config.read_text())
    folder = tmp_path / "node"
    lines = ['listen = ["/ip4/127.0.0.1/tcp/0"]', 'model_listen = "127.0.0.1:0"', 'engine = "none"', "slots = 64"]
    for multiaddr in multiaddrs:
        lines += ["[[bootstraps]]", f"multiaddrs = [{json.dumps(multiaddr)}]", 'service = "pair"']
    prepare(folder, lines)
    node = Daemon("ngpu_node.cli", folder, "node.json")
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(partial(serve_tcp, workspace, host="127.0.0.1", port=0))
        one = Network(bootstraps[0], [node], bound[0].port)
        two = Network(bootstraps[1], [node], bound[0].port)
        try:
            await one.bootstrap.start()  # the first one makes the schema
            async with trio.open_nursery() as starting:
                starting.start_soon(two.bootstrap.start)
                starting.start_soon(node.start)
            await one.connect_client()
            await two.connect_client()
            one.workspace, one.token = await add_workspace(one.bootstrap, {**SPEC, "concurrency": 2})
            two.workspace, two.token = one.workspace, one.token
            await one.register(node)
            await one.ready()
            await two.ready()
            yield one, two
        finally:
            with trio.CancelScope(shield=True):
                for daemon in (node, *bootstraps):
                    if daemon.process is not None and daemon.process.poll() is None:
                        await daemon.kill()
        nursery.cancel_scope.cancel()


class Studio:
    """The vendor's calls for paintings, each of which lasts until `done` is set."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.submitted = 0

    async def __call__(self, exchange: Exchange) -> None:
        body = await exchange.receive_all(1 << 20)
        path = exchange.request.path
        if path == "/api/v1b/task_submit":
            self.submitted += 1
            await exchange.respond_json(200, {"task_id": f"p-{self.submitted}"})
        elif path == "/api/v1b/task_result":
            document = json.loads(body)
            state = "done" if self.done.is_set() else "pending"
            await exchange.respond_json(200, {"state": state, "task_id": document["task_id"], "of": document["token"]})
        else:
            await exchange.respond(200, [], b"ready")


@pytest.mark.needs_postgres
@pytest.mark.timeout_s(240)
def test_a_painting_submitted_at_one_is_asked_for_at_the_other_whose_it_is_when_the_first_is_killed(
    tmp_path: Path,
) -> None:
    async def main(url: str) -> None:
        studio = Studio()
        lines = ("[profiles]", 'enabled = ["sensetime"]')
        async with pair(tmp_path, url, studio, lines) as (one, two):

            async def post(net: Network, path: str, document: Any, headers: Any = JSON) -> Any:
                body = json.dumps({**document, "token": one.token}).encode()
                return await net.call("POST", f"/api/v1b/{path}", body, headers, token=None)

            with trio.fail_after(120):
                key = [*JSON, (b"idempotency-key", b"again")]
                submitted = await post(one, "task_submit", {"prompt": "sea"}, key)
                assert submitted.document == {"task_id": "p-1"}
                asked = {"task_id": "p-1"}
                pending = {"state": "pending", "task_id": "p-1", "of": one.workspace}
                assert (await post(two, "task_result", asked)).document == pending
                await one.bootstrap.kill()
                assert (await post(two, "task_result", asked)).document == pending, "while nobody owns the job"
                again = await post(two, "task_submit", {"prompt": "sea"}, key)
                assert (again.document, again.task_id) == (submitted.document, submitted.task_id)
                studio.done.set()
                document = await two.poll(submitted.task_id, within_s=60)
                assert json.loads(document["data"])["state"] == "done"
                assert (await post(two, "task_result", asked)).document["state"] == "done"
                assert studio.submitted == 1

    with new_database() as url:
        trio.run(main, url)


class Serving(Workspace):
    """A workspace that is a model too."""

    do_v1 = Workspace.do_echo


async def share_a_model(one: Network, two: Network, node: Daemon) -> None:
    """Both hear of a model at the same moment, and make one workspace for it; both hear that it is gone."""

    async def names(net: Network) -> set[str]:
        return {entry["id"] for entry in (await net.call("GET", "/v1/models")).document["data"]}

    await one.register(node, "both")
    ran_on = set()
    for net, other in ((one, two), (two, one)):
        while "both" not in await names(net):  # noqa: ASYNC110
            await trio.sleep(0.02)
        # in the second after it was made, a sibling that has not read of it yet may take it from the node once
        while (answer := await net.call("POST", "/v1/chat/completions", b'{"model":"both"}', JSON)).status == 503:
            assert answer.header(b"retry-after")
            await trio.sleep(0.1)
        assert (answer.status, answer.body) == (200, b'{"model":"both"}')
        await net.task(answer.task_id, lambda view: view["verdict"] == "verified")
        # its caller reads the receipt at either
        files = [(await at.call("GET", f"/api/v1/tasks/{answer.task_id}/receipt")).document for at in (net, other)]
        assert files[0]["receipt"] == files[1]["receipt"]
        ran_on.add(files[0]["order"]["workspace"])
    assert len(ran_on) == 1
    async with httpx.AsyncClient(base_url=node.where["models"], trust_env=False) as program:
        gone = {"project": "demo", "model": "both"}
        assert (await program.post("/api/v0/ai/model/unregister", json=gone)).status_code == 200
    for net in (one, two):
        while "both" in await names(net):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def die_and_be_replaced(one: Network, two: Network, workspace: Workspace, tmp: Path) -> None:
    attached: list[str] = []

    async def attached_call() -> None:
        async with one.stream("POST", "/proxy/8080/hang", b"x") as response:
            attached.append(next(v for n, v in response.headers if n == b"ngpu-task-id").decode())
            with pytest.raises(HttpError):
                await response.read(1000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attached_call)
        await workspace.begun.wait()
        workspace.begun = trio.Event()
        tasks = []
        for number in range(5):
            answer = await one.call("POST", "/user/train", b'{"data": "t%d"}' % number, JSON)
            tasks.append(str(answer.document["taskId"]))
        await workspace.begun.wait()
        # asked of the other, while the first one has them
        assert (await two.task(tasks[0], lambda view: view["state"] == 2))["attempts"]
        assert (await two.task(tasks[4], lambda view: True))["state"] == 0
        # and cancelled there
        cancelled = await two.call("DELETE", f"/api/v1/tasks/{tasks[4]}")
        assert cancelled.document["state"] == 5, cancelled.document
        # how fast this machine is just now
        began_s = time.monotonic()
        for _ in range(5):
            assert (await two.call("GET", "/user/queryTaskList")).status == 200
        pace_s = time.monotonic() - began_s
        await one.bootstrap.kill()
    killed_s = time.monotonic()
    workspace.gate.set()
    for number, task_id in enumerate(tasks[:4]):
        document = await two.poll(task_id, within_s=60)
        assert (document["result_code"], document["data"]) == (200, f"t{number}")
    took_s = time.monotonic() - killed_s
    assert took_s < TAKEN_OVER_WITHIN_S + 20 * pace_s, two.bootstrap.log[-3000:]
    assert sorted(workspace.bodies) == [b"t%d" % number for number in range(4)]
    for task_id in tasks[:4]:
        view = await two.task(task_id, lambda view: view["verdict"] != "")
        assert (view["verdict"], len(view["attempts"])) == ("verified", 1)
    view = await two.task(attached[0])
    assert (view["state"], view["reason"]) == (4, "bootstrap_lost")

    # who holds such a receipt can show it: the one that ordered said beforehand that the other's word counts
    shown = (await two.call("GET", f"/api/v1/tasks/{tasks[0]}/receipt", token=None)).document
    node_side = tmp / "by-sibling.json"
    await command(two.nodes[0], "receipt", tasks[0], "--file", str(node_side))
    for file in (ReceiptFile.from_document(shown), ReceiptFile.from_json(node_side.read_text())):
        assert file.acknowledgement is not None
        said_by = file.acknowledgement.acknowledgement.bootstrap
        assert (file.order.order.bootstrap, said_by) == (one.bootstrap.where["address"], two.bootstrap.where["address"])
        assert [result.rule for result in check_receipt_file(file) if not result.holds] == []
        alone = [result.rule for result in check_receipt_file(replace(file, stand_in=None)) if not result.holds]
        assert alone == ["acknowledgement_bootstrap"]

    # it comes back, and each answers for both
    await one.bootstrap.start()
    await one.connect_client()
    assert (await one.poll(tasks[0]))["data"] == "t0"
    await one.ready()
    await two.ready()
    for net, other in ((one, two), (two, one)):
        answer = await net.call("POST", "/user/train", b'{"data": "again"}', JSON)
        assert answer.status == 200, answer.body
        assert (await other.poll(str(answer.document["taskId"])))["data"] == "again"
