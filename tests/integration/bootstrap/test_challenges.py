"""Rounds of challenges at a whole bootstrap: who is told what, who gets no tasks meanwhile, what is refused."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.admin_socket import AdminSocketError
from ngpu_bootstrap.challenges import desk
from ngpu_bootstrap.config import ChallengesSection, GpuSpeed
from ngpu_protocol import control
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, echo, new_account, ready

GPU = control.GpuOffer(bytes(range(32)), "Test Card", 24 << 20)
CHALLENGE = {"name": "challenge", "image": "challenge:1", "ports": [8000], "gpu_count": 1, "concurrency": 4}
WORK = {"name": "work", "image": "work:1", "ports": [8080], "gpu_count": 1}


class Node(ScriptedNode):
    """A node with one GPU and an engine; notes what it was told to run, in order."""

    def __init__(self, **others: Any) -> None:
        host = control.HostOffer(engine=True)
        super().__init__(new_account(), gpus=(GPU,), host=host, services=(), deploy=self._deployed, **others)
        self.ran: list[frozenset[str]] = []

    def _deployed(self, spec: WorkspaceSpec) -> control.DeploymentState:
        names = frozenset(one.name for one in self.told)
        if not self.ran or self.ran[-1] != names:
            self.ran.append(names)
        return ready(spec)


async def fails(asked: Asked) -> None:
    await asked.read()
    await asked.answer(500, b'{"message": "out of memory"}')


async def made(tmp_path: Path) -> tuple[str, str]:
    """Make the workspace of the challenges in a data directory; return its id and token."""
    async with running(settings_for(tmp_path / "data"), workspace=CHALLENGE) as bootstrap:
        return bootstrap.workspace, bootstrap.token


def challenging(tmp_path: Path, workspace: str, **changes: Any) -> Any:
    speeds = (GpuSpeed(model="Test Card", tflops=1.0, gbytes_per_s=100.0),)
    values = {"workspaces": (workspace,), "speeds": speeds, "depth": 64, "idle_wait_s": 5.0, **changes}
    return settings_for(tmp_path / "data", challenges=ChallengesSection(**values))


async def until(bootstrap: Bootstrap, node: ScriptedNode, holds: Any) -> dict[str, Any]:
    with trio.fail_after(60):
        while True:
            view: dict[str, Any] = await bootstrap.admin("GET", f"/api/v1/nodes/{node.account.address}")
            if holds(view):
                return view
            await trio.sleep(0.05)


@trio_test
async def test_a_new_node_is_challenged_before_its_gpu_has_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "LOOK_S", 0.1)
    known = await made(tmp_path)
    async with running(challenging(tmp_path, known[0]), known=known) as bootstrap:
        node = Node(script=fails)
        async with connected(node, bootstrap.multiaddr):
            detail = await until(bootstrap, node, lambda view: view["challenges"])
            assert detail["challenges"][0]["finding"] == "unanswered"
            assert "out of memory" in detail["challenges"][0]["detail"]
            assert detail["challenges"][0]["gpu"] == "0x" + GPU.id.hex()
            assert detail["standing"]["disputed"] == 0, "no answer is forgiven at first"
            await bootstrap.admin("POST", "/api/v1/workspaces", WORK)
            with trio.fail_after(60):
                while not node.ran or node.ran[-1] != {"work"}:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            assert node.ran[0] == {"challenge"}
            assert len(node.orders) >= 1, "the challenge was an order like any other"
            assert all(order.order.workspace == known[0] for order in node.orders)


@trio_test
async def test_a_challenge_takes_its_gpu_from_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "PLACED_S", 0.5)
    known = await made(tmp_path)
    async with running(challenging(tmp_path, known[0], automatic=False), known=known) as bootstrap:
        made_work = await bootstrap.admin("POST", "/api/v1/workspaces", WORK)
        bootstrap.workspace = made_work["workspace"]["spec"]["id"]
        node = Node(script=fails)
        async with connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            begun = await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address]})
            (run,) = begun["runs"]
            with trio.fail_after(60):
                while run["phase"] != "done":
                    await trio.sleep(0.05)
                    run = await bootstrap.admin("GET", f"/api/v1/challenges/{run['id']}")
            assert "GPUs are taken" in run["problem"]
            assert run["challenges"] == []
            assert node.ran == [{"work"}]
            assert node.orders == []


@trio_test
async def test_a_node_gets_no_tasks_while_it_is_challenged_and_its_clients_wait(tmp_path: Path) -> None:
    known = await made(tmp_path)
    asked_for, go_on = trio.Event(), trio.Event()

    async def slow(asked: Asked) -> None:
        if asked.signed.order.workspace == known[0]:
            await asked.read()
            asked_for.set()
            await go_on.wait()
            await asked.answer(500, b"{}")
        else:
            await echo(asked)

    settings = challenging(tmp_path, known[0], automatic=False, tolerance=10.0)
    async with running(settings, known=known) as bootstrap:
        served = {**WORK, "gpu_count": 0}
        view = await bootstrap.admin("POST", "/api/v1/workspaces", served)
        bootstrap.workspace, bootstrap.token = view["workspace"]["spec"]["id"], view["token"]
        node = Node(script=slow)
        async with connected(node, bootstrap.multiaddr), trio.open_nursery() as nursery:
            await wait_ready(bootstrap)
            await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address]})
            with trio.fail_after(60):
                await asked_for.wait()
            await until(bootstrap, node, lambda view: view["state"] == "challenged")
            with pytest.raises(AdminSocketError, match="is being challenged already"):
                await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address]})
            answered: list[int] = []

            async def client() -> None:
                answered.append((await bootstrap.call("POST", "/proxy/8080/x", b"hello")).status)

            nursery.start_soon(client)
            await trio.sleep(0.3)
            assert answered == [], "it waits"
            go_on.set()
            with trio.fail_after(60):
                while not answered:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            assert answered == [200]
            seen = await until(bootstrap, node, lambda view: view["state"] == "serving")
            shown = json.loads((await bootstrap.call("GET", "/user/queryNodes")).body)["nodes"][0]
            assert (shown["lastChallenge"], shown["standing"], shown["trusted"]) == ("unanswered", 1.0, True)
            assert shown["lastChallengedAtMs"] == seen["challenges"][0]["at_ms"]


@trio_test
async def test_what_cannot_be_challenged_is_refused_with_words(tmp_path: Path) -> None:
    async with running(settings_for(tmp_path / "data")) as bootstrap:
        node = ScriptedNode(new_account(), gpus=(GPU,))
        async with connected(node, bootstrap.multiaddr):
            with pytest.raises(AdminSocketError, match="no workspace answers challenges here"):
                await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address]})
        known = (bootstrap.workspace, bootstrap.token)
    async with running(challenging(tmp_path, known[0], automatic=False), known=known) as bootstrap:
        for nodes, gpu, words in (
            ([node.account.address], None, "is not connected"),
            (["0x12"], None, "not a nodeAddr"),
            ([], None, "nodes"),
        ):
            with pytest.raises(AdminSocketError, match=words):
                await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": nodes, "gpu": gpu})
        async with connected(node, bootstrap.multiaddr):
            with pytest.raises(AdminSocketError, match="offers 1 GPUs"):
                await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address], "gpu": 1})
        answer = await bootstrap.call("POST", "/api/v1/challenges", b'{"nodes": []}')
        assert answer.status == 403, "a workspace's token is not an operator's key"
        with pytest.raises(AdminSocketError, match="no such challenge"):
            await bootstrap.admin("GET", "/api/v1/challenges/nothing")


@trio_test
async def test_a_card_that_no_table_knows_says_nothing_about_its_node(tmp_path: Path) -> None:
    known = await made(tmp_path)
    async with running(challenging(tmp_path, known[0], automatic=False, speeds=()), known=known) as bootstrap:
        node = Node(script=fails)
        async with connected(node, bootstrap.multiaddr):
            begun = await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address]})
            (run,) = begun["runs"]
            with trio.fail_after(60):
                while run["phase"] != "done":
                    await trio.sleep(0.05)
                    run = await bootstrap.admin("GET", f"/api/v1/challenges/{run['id']}")
            assert "[[challenges.speeds]]" in run["problem"]
            detail = await bootstrap.admin("GET", f"/api/v1/nodes/{node.account.address}")
            assert (detail["challenges"], detail["standing"]["disputed"]) == ([], 0)


@trio_test
async def test_a_node_that_a_sibling_challenges_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "PLACED_S", 0.5)
    known = await made(tmp_path)

    async def challenged(bootstrap: Bootstrap, node: ScriptedNode) -> dict[str, Any]:
        begun = await bootstrap.admin("POST", "/api/v1/challenges", {"nodes": [node.account.address]})
        (run,) = begun["runs"]
        with trio.fail_after(60):
            while run["phase"] != "done":
                await trio.sleep(0.05)
                run = await bootstrap.admin("GET", f"/api/v1/challenges/{run['id']}")
        return dict(run)

    async with running(challenging(tmp_path, known[0], automatic=False), known=known) as bootstrap:
        node = Node(script=fails)
        async with connected(node, bootstrap.multiaddr):
            await until(bootstrap, node, lambda view: view["state"] in ("serving", "idle"))
            with closing(sqlite3.connect(tmp_path / "data" / "bootstrap.db")) as database:
                claim = (node.account.address, "0x" + "0c" * 20, 2**52)
                database.execute("INSERT INTO challenge_claims VALUES (?, ?, ?)", claim)
                database.commit()
                run = await challenged(bootstrap, node)
                assert run["problem"] == "another bootstrap of this database challenges it"
                assert node.orders == []
                database.execute("DELETE FROM challenge_claims")
                database.commit()
                assert (await challenged(bootstrap, node))["problem"] == ""
                assert node.orders
                assert database.execute("SELECT * FROM challenge_claims").fetchall() == [], "it was given up"


@trio_test
async def test_a_challenge_has_a_gpu_first_that_comes_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that stays is not disturbed; what waits behind it comes after the challenge, and the retry's time plays no
    part."""
    monkeypatch.setattr(desk, "PLACED_S", 0.2)
    monkeypatch.setattr(desk, "LOOK_S", 0.1)
    tried = trio.Event()

    class Log:
        def info(self, event: str, **fields: Any) -> None:
            if event == "challenge_not_held":
                tried.set()

    monkeypatch.setattr(desk, "log", Log())
    known = await made(tmp_path)
    node = Node(script=fails)
    async with running(challenging(tmp_path, known[0], automatic=False), known=known) as bootstrap:
        view = await bootstrap.admin("POST", "/api/v1/workspaces", WORK)
        first = bootstrap.workspace = view["workspace"]["spec"]["id"]
        async with connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
    async with running(challenging(tmp_path, known[0]), known=known) as bootstrap:
        await bootstrap.admin("POST", "/api/v1/workspaces", {**WORK, "name": "next"})
        async with connected(node, bootstrap.multiaddr):
            with trio.fail_after(60):
                await tried.wait()
            assert node.ran == [{"work"}]
            assert node.orders == []
            await bootstrap.admin("DELETE", f"/api/v1/workspaces/{first}")
            detail = await until(bootstrap, node, lambda view: view["challenges"])
            assert detail["challenges"][0]["finding"] == "unanswered"
            with trio.fail_after(60):
                while node.ran[-1] != {"next"}:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            assert [one for one in node.ran if one] == [{"work"}, {"challenge"}, {"next"}]
