"""Where workspaces run, as clients, operators and nodes see it: placement, revisions, pins, secrets, logs."""

from __future__ import annotations

import hashlib
import http.server
import json
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import structlog
import trio

from ngpu_bootstrap.admin_socket import AdminSocketError
from ngpu_bootstrap.config import ImagesSection
from ngpu_node.images.images import ImageWish
from ngpu_protocol import control
from ngpu_protocol.sealing import open_sealed
from ngpu_protocol.workspace_secrets import WorkspaceSecrets
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account, ready

IMAGE: dict[str, Any] = {
    **{key: value for key, value in WORKSPACE.items() if key != "service"},
    "image": "registry.example/echo:1",
}
DIGEST = bytes.fromhex("ab" * 32)
Test = Callable[[Bootstrap, list[ScriptedNode]], Awaitable[None]]


def run(tmp_path: Path, test: Test, *nodes: ScriptedNode, workspace: dict[str, Any] = IMAGE, **settings: Any) -> None:
    """Run *test* on a bootstrap with an image workspace and *nodes* connected, by address."""

    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap", **settings), workspace=workspace) as bootstrap:
            with trio.fail_after(60):
                async with AsyncExitStack() as stack:
                    by_address = sorted(nodes, key=lambda node: node.account.address)
                    for node in by_address:
                        await stack.enter_async_context(connected(node, bootstrap.multiaddr))
                    await test(bootstrap, by_address)

    trio.run(main)


async def within(main: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(60):
        await main()


def node(**changes: Any) -> ScriptedNode:
    return ScriptedNode(new_account(), services=(), **changes)


async def deployments_when(bootstrap: Bootstrap, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while True:
        view: dict[str, Any] = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}/deployments")
        if holds(view):
            return view
        await trio.sleep(0.02)


def ready_revisions(view: dict[str, Any]) -> list[int]:
    return sorted(one["revision"] for one in view["deployments"] if one["state"] == "ready")


async def update(bootstrap: Bootstrap, changes: dict[str, Any], **query: Any) -> dict[str, Any]:
    suffix = "?repin=true" if query.get("repin") else ""
    view: dict[str, Any] = await bootstrap.admin("PATCH", f"/api/v1/workspaces/{bootstrap.workspace}{suffix}", changes)
    return view


def test_replicas_go_to_as_many_nodes_and_a_change_of_them_restarts_nothing(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        assert [len(one.told) for one in nodes] == [1, 0, 0]
        await update(bootstrap, {"replicas": 2})
        view = await deployments_when(bootstrap, lambda view: view["ready"] == 2)
        assert view["revision"] == 1
        assert ready_revisions(view) == [1, 1]
        await update(bootstrap, {"replicas": None})
        await deployments_when(bootstrap, lambda view: view["ready"] == 3)

    run(tmp_path, test, node(), node(), node(), workspace={**IMAGE, "replicas": 1})


def test_more_replicas_than_nodes_fit_names_what_is_missing(tmp_path: Path) -> None:
    rtx = (control.GpuOffer(bytes(32), "NVIDIA GeForce RTX 4090", 24 << 30),)
    fits = node(gpus=rtx, host=control.HostOffer(engine=True, memory_bytes=64 << 30))
    small = node(gpus=rtx, host=control.HostOffer(engine=True, memory_bytes=1 << 30))
    bare = node()

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        view = await deployments_when(bootstrap, lambda view: view["ready"] == 1 and bool(view["shortage"]))
        assert view["shortage"]["lacks"] == {"gpu_type": 1, "memory": 1}
        assert (view["shortage"]["wanted"], view["shortage"]["placed"]) == (3, 1)
        assert "1 without a GPU of type RTX4090" in view["shortage"]["detail"]
        assert "1 with too little memory left (4096 MiB wanted)" in view["shortage"]["detail"]

    asked = {**IMAGE, "replicas": 3, "gpu_count": 1, "gpu_types": ["RTX4090"], "memory_bytes": 4 << 30}
    run(tmp_path, test, fits, small, bare, workspace=asked)


def test_an_update_goes_to_one_node_at_a_time_and_no_call_fails_meanwhile(tmp_path: Path) -> None:
    states = {"phase": "starting"}

    def deploy(spec: WorkspaceSpec) -> control.DeploymentState:
        return replace(ready(spec), state=states["phase"] if spec.revision == 2 else "ready")

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 3)
        view = await update(bootstrap, {"env": {"A": "1"}})
        assert (view["spec"]["revision"], view["target"]["revision"]) == (1, 2)
        assert view["rollout"]["state"] == "rolling"
        for turn in range(3):
            await nodes[turn].until(lambda turn=turn: nodes[turn].told[0].revision == 2)  # type: ignore[misc]
            assert [one.told[0].revision for one in nodes] == [2] * (turn + 1) + [1] * (2 - turn)
            answer = await bootstrap.call("POST", "/proxy/8080/x", b"hello")
            assert (answer.status, answer.body) == (200, b"hello")
            states["phase"] = "ready"
            await nodes[turn].redeploy()
            states["phase"] = "starting"
        view = await deployments_when(bootstrap, lambda view: view["rollout"] is None)
        assert (view["revision"], ready_revisions(view)) == (2, [2, 2, 2])
        answered = {order.order.revision for one in nodes for order in one.orders}
        assert answered <= {1, 2}
        await bootstrap.call("POST", "/proxy/8080/x", b"hello")
        assert max(order.order.revision for one in nodes for order in one.orders) == 2

    run(tmp_path, test, node(deploy=deploy), node(deploy=deploy), node(deploy=deploy))


def test_a_revision_that_fails_on_one_node_of_three_leaves_the_old_one_serving_and_says_why(tmp_path: Path) -> None:
    accounts = sorted((new_account() for _ in range(3)), key=lambda account: account.address)
    bad = accounts[1].address

    def deploy_on(address: str) -> Callable[[WorkspaceSpec], control.DeploymentState]:
        def deploy(spec: WorkspaceSpec) -> control.DeploymentState:
            if spec.revision == 2 and address == bad:
                return control.DeploymentState(spec.id, 2, "failed", "exited with 3: no such model", reason="exited")
            return ready(spec)

        return deploy

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 3)
        await update(bootstrap, {"command": ["serve", "--broken"]})
        view = await deployments_when(
            bootstrap, lambda view: bool(view["rollout"]) and ready_revisions(view) == [1] * 3
        )
        assert view["revision"] == 1
        rollout = view["rollout"]
        assert (rollout["state"], rollout["base"], rollout["target"]) == ("failed", 1, 2)
        assert (rollout["node"], rollout["reason"]) == (bad, "exited")
        assert rollout["detail"] == "exited with 3: no such model"
        assert nodes[2].told[0].revision == 1
        assert (await bootstrap.call("POST", "/proxy/8080/x", b"still")).body == b"still"
        # the next one is revision 3, rolled from 1
        await update(bootstrap, {"command": ["serve"]})
        view = await deployments_when(bootstrap, lambda view: view["rollout"] is None)
        assert (view["revision"], ready_revisions(view)) == (3, [3, 3, 3])

    nodes = [ScriptedNode(account, services=(), deploy=deploy_on(account.address)) for account in accounts]
    run(tmp_path, test, *nodes)


def test_a_roll_and_its_end_survive_a_restart(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap")
    scripted = node(deploy=lambda spec: replace(ready(spec), state="ready" if spec.revision == 1 else "pulling"))

    async def main() -> None:
        async with running(settings, workspace=IMAGE) as bootstrap:
            known = bootstrap.workspace, bootstrap.token
            async with connected(scripted, bootstrap.multiaddr):
                await deployments_when(bootstrap, lambda view: view["ready"] == 1)
                await update(bootstrap, {"env": {"A": "1"}})
                await scripted.until(lambda: scripted.told[0].revision == 2)
        async with running(settings, known=known) as bootstrap:
            view = await deployments_when(bootstrap, lambda view: True)
            assert (view["revision"], view["rollout"]["target"]) == (1, 2)
            assert view["deployments"][0]["node"] == scripted.account.address
            assert (view["deployments"][0]["state"], view["deployments"][0]["reason"]) == ("gone", "node_away")
            scripted.deploy = ready
            async with connected(scripted, bootstrap.multiaddr):
                view = await deployments_when(bootstrap, lambda view: view["revision"] == 2)
                assert view["rollout"] is None

    trio.run(within, main)


def test_the_image_is_pinned_to_what_the_first_node_found_and_every_node_is_told(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        wanted = f"sha256:{DIGEST.hex()}"
        for one in nodes:
            await one.until(lambda one=one: bool(one.told) and one.told[0].image_digest == wanted)  # type: ignore[misc]
            assert one.told[0].revision == 1
        view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}")
        assert view["spec"]["image_digest"] == wanted
        # the same again makes a new revision, resolved anew
        view = await update(bootstrap, {}, repin=True)
        assert (view["target"]["revision"], view["target"]["image_digest"]) == (2, None)

    first = node(deploy=lambda spec: ready(spec, DIGEST))
    second = node(deploy=lambda spec: replace(ready(spec), state="pulling"))
    run(tmp_path, test, first, second)


def test_a_digest_in_the_reference_is_the_pin_whatever_a_node_says(tmp_path: Path) -> None:
    named = "sha256:" + "cd" * 32

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        assert nodes[0].told[0].image_digest == named
        await update(bootstrap, {"image": "registry.example/echo:2"})
        await nodes[0].until(lambda: nodes[0].told[0].image_digest == f"sha256:{DIGEST.hex()}")

    asked = {**IMAGE, "image": f"registry.example/echo:1@{named}"}
    run(tmp_path, test, node(deploy=lambda spec: ready(spec, DIGEST)), workspace=asked)


def test_a_node_that_is_away_for_long_is_replaced_and_one_that_comes_back_in_time_is_not(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap", replace_node_after_s=0.5)
    first, second = (node(), node())

    async def main() -> None:
        async with running(settings, workspace={**IMAGE, "replicas": 1}) as bootstrap:
            async with connected(first, bootstrap.multiaddr):
                await deployments_when(bootstrap, lambda view: view["ready"] == 1)
                async with connected(second, bootstrap.multiaddr):
                    await second.until(lambda: second.welcome is not None)
                    assert second.told == ()
                view = await deployments_when(bootstrap, lambda view: view["ready"] == 1)
                assert view["deployments"][0]["node"] == first.account.address
            async with connected(second, bootstrap.multiaddr):
                view = await deployments_when(bootstrap, lambda view: view["ready"] == 1)
                assert [one["node"] for one in view["deployments"]] == [second.account.address]

    trio.run(within, main)


def test_secrets_reach_the_node_sealed_and_are_nowhere_in_clear(tmp_path: Path) -> None:
    asked = {
        **IMAGE,
        "env": {"MODE": "fast"},
        "secrets": {"registry": {"username": "u5er", "password": "pa55word"}, "env": {"HF_TOKEN": "hf-s3cret"}},
    }

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        (one,) = nodes
        await one.until(lambda: bool(one.told))

        def read(revision: int) -> WorkspaceSecrets:
            spec = one.told[0]
            assert spec.revision == revision
            box = one.sealed[spec.id]
            return WorkspaceSecrets.decode(open_sealed(box, one.account, workspace=spec.id, revision=revision))

        spec = one.told[0]
        assert (spec.secret_env, spec.has_registry_credentials, spec.env) == (["HF_TOKEN"], True, {"MODE": "fast"})
        confided = read(1)
        assert confided.env == {"HF_TOKEN": "hf-s3cret"}
        assert confided.registry is not None
        assert confided.registry.password == "pa55word"
        # a change that does not give them again keeps them; another value is another revision
        await update(bootstrap, {"env": {"MODE": "slow"}})
        await one.until(lambda: one.told[0].revision == 2)
        assert read(2) == confided
        await deployments_when(bootstrap, lambda view: view["rollout"] is None)
        await update(bootstrap, {"secrets": {"env": {"HF_TOKEN": "0ther"}}})
        await one.until(lambda: one.told[0].revision == 3)
        assert read(3).env == {"HF_TOKEN": "0ther"}
        view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}")
        assert not any(word in json.dumps(view) for word in ("hf-s3cret", "pa55word", "0ther"))

    run(tmp_path, test, node(), workspace=asked)
    for path in (tmp_path / "bootstrap").glob("bootstrap.db*"):
        assert not any(word in path.read_bytes() for word in (b"hf-s3cret", b"pa55word", b"u5er")), path
    with sqlite3.connect(tmp_path / "bootstrap" / "bootstrap.db") as database:
        assert database.execute("SELECT count(*) FROM workspace_secret_boxes").fetchone() == (3,)


def test_a_secret_that_is_named_and_never_given_is_refused(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        with pytest.raises(AdminSocketError, match=r"HF_TOKEN has no value; give it under secrets\.env"):
            await bootstrap.admin("POST", "/api/v1/workspaces", {**IMAGE, "secret_env": ["HF_TOKEN"]})
        with pytest.raises(AdminSocketError, match="image_digest is given by the bootstrap"):
            await update(bootstrap, {"image_digest": "sha256:" + "11" * 32})
        with pytest.raises(AdminSocketError, match="cpus"):
            await update(bootstrap, {"cpus": "many"})
        view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}")
        assert view["spec"]["revision"] == 1

    run(tmp_path, test)


def test_deployments_are_seen_by_their_client_with_progress_and_as_events(tmp_path: Path) -> None:
    pulling = {"progress": 40, "bytes_done": 4, "bytes_total": 10, "seconds_left": 6}
    scripted = node(deploy=lambda spec: control.DeploymentState(spec.id, spec.revision, "pulling", **pulling))  # type: ignore[arg-type]

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: any(one["progress"] for one in view["deployments"]))
        path = f"/api/v1/workspaces/{bootstrap.workspace}/deployments"
        assert (await bootstrap.call("GET", path, token=None)).status == 401
        view = json.loads((await bootstrap.call("GET", path)).body)
        (one,) = view["deployments"]
        assert {key: one[key] for key in pulling} == pulling
        assert (one["state"], view["ready"]) == ("pulling", 0)
        async with bootstrap.stream("GET", path, b"", [(b"accept", b"text/event-stream")]) as response:
            assert response.status == 200
            seen = b""
            while b'"state":"pulling"' not in seen:
                seen += await response.receive()
            scripted.deploy = ready
            await scripted.redeploy()
            while b'"ready":1' not in seen:
                seen += await response.receive()
            assert seen.count(b"event: deployments\n") == 2
            await bootstrap.admin("DELETE", f"/api/v1/workspaces/{bootstrap.workspace}")
            while b"event: removed\n" not in seen:
                seen += await response.receive()

    run(tmp_path, test, scripted)


def test_query_nodes_is_as_documented(tmp_path: Path) -> None:
    fates = iter(["ready", "failed", "pulling"])

    def scripted() -> ScriptedNode:
        fate = next(fates)
        return node(
            deploy=lambda spec: control.DeploymentState(spec.id, spec.revision, fate, progress=30, slots_free=1)
        )

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: len({one["state"] for one in view["deployments"]}) == 3)
        answer = json.loads((await bootstrap.call("GET", "/user/queryNodes")).body)
        assert (answer["result_code"], answer["msg"], answer["result_size"]) == (200, "success", 3)
        shown = {one["state"]: (one["progress"], one["status"]) for one in answer["nodes"]}
        assert shown == {"ready": (100, 1), "failed": (30, -1), "pulling": (30, 0)}
        assert [one["nodeAddr"] for one in answer["nodes"]] == [one.account.address for one in nodes]
        later = json.loads((await bootstrap.call("GET", "/user/queryNodes?startTime=2098-01-01")).body)
        assert (later["result_size"], later["nodes"]) == (0, [])
        assert (await bootstrap.call("GET", "/user/queryNodes", token=None)).status == 401

    run(tmp_path, test, scripted(), scripted(), scripted())


def test_a_task_that_waits_for_a_pull_says_so_and_is_done_after_it(tmp_path: Path) -> None:
    scripted = node(
        deploy=lambda spec: control.DeploymentState(spec.id, spec.revision, "pulling", progress=42, seconds_left=7)
    )

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: any(one["progress"] for one in view["deployments"]))
        submitted = json.loads((await bootstrap.call("POST", "/user/train", b'{"data": "{}"}')).body)
        polled = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={submitted['taskID']}")).body)
        assert polled["result_code"] == 100
        assert "the workspace's image is being pulled: 42 %, about 7 s left" in polled["msg"]
        view = await task_when(bootstrap, submitted["taskID"], lambda view: True)
        assert "42 %" in view["waits_for"]
        # a call that is waited for cannot wait so long; it is told what for
        refused = await bootstrap.call("POST", "/proxy/8080/train", b"{}")
        assert refused.status == 503
        document = json.loads(refused.body)
        assert document["reason"] == "no_node"
        assert "yet: the workspace's image is being pulled: 42 %, about 7 s left; call again" in document["message"]
        scripted.deploy = ready
        await scripted.redeploy()
        view = await task_when(bootstrap, submitted["taskID"], lambda view: view["state_name"] == "finished")
        assert view["waits_for"] == ""

    run(tmp_path, test, scripted)


def test_logs_come_from_the_node_to_the_workspaces_own_client(tmp_path: Path) -> None:
    scripted = node(logs=b"one\ntwo\n")

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        path = f"/api/v1/workspaces/{bootstrap.workspace}/deployments/{scripted.account.address}/logs"
        answer = await bootstrap.call("GET", f"{path}?tail=2")
        assert (answer.status, answer.body) == (200, b"one\ntwo\n")
        assert scripted.log_queries == [f"/ngpu/v1/workspaces/{bootstrap.workspace}/logs?tail=2&follow=0"]
        async with bootstrap.stream("GET", f"{path}?follow=true") as response:
            assert await response.receive() == b"one\ntwo\n"
        assert (await bootstrap.call("GET", path, token=None)).status == 401
        assert (await bootstrap.call("GET", f"{path}?tail=0")).status == 422
        assert (await bootstrap.call("GET", f"{path}?tail=10001")).status == 422
        other = path.replace(scripted.account.address, new_account().address)
        assert (await bootstrap.call("GET", other)).status == 404
        assert (await bootstrap.call("GET", path.replace(scripted.account.address, "nobody"))).status == 400
        foreign = await bootstrap.admin("POST", "/api/v1/workspaces", WORKSPACE)
        assert (await bootstrap.call("GET", path, token=foreign["token"])).status == 403
        scripted.logs = None
        answer = await bootstrap.call("GET", path)
        assert (answer.status, json.loads(answer.body)["reason"]) == (404, "no_container")

    run(tmp_path, test, scripted)


def test_a_workspace_stops_at_its_end(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        await update(bootstrap, {"end_at": "2001-01-01T00:00:00Z"})
        await nodes[0].until(lambda: nodes[0].told == ())
        answer = await bootstrap.call("POST", "/proxy/8080/x", b"hello")
        assert (answer.status, json.loads(answer.body)["reason"]) == (410, "workspace_ended")
        await update(bootstrap, {"end_at": None})
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        assert (await bootstrap.call("POST", "/proxy/8080/x", b"hello")).status == 200

    run(tmp_path, test, node())


def test_a_workspace_that_failed_for_the_nodes_fault_goes_to_another(tmp_path: Path) -> None:
    accounts = sorted((new_account() for _ in range(2)), key=lambda account: account.address)
    full = ScriptedNode(
        accounts[0],
        services=(),
        deploy=lambda spec: control.DeploymentState(spec.id, spec.revision, "failed", "no room", reason="disk_full"),
    )
    other = ScriptedNode(accounts[1], services=())

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        view = await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        assert [one["node"] for one in view["deployments"]] == [other.account.address]
        assert full.told == ()

    run(tmp_path, test, full, other, workspace={**IMAGE, "replicas": 1})


TAR = {**{key: value for key, value in IMAGE.items() if key != "image"}, "replicas": 1}


class Files(http.server.BaseHTTPRequestHandler):
    """Serves what a test gives, counts how often, and never twice at once."""

    given: ClassVar[dict[str, tuple[int, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, content = self.given.get(self.path, (404, b""))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", content.decode())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def files() -> Iterator[str]:
    Files.given, Files.asked = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_file_without_a_checksum_is_read_once_and_pinned_for_every_node(tmp_path: Path, files: str) -> None:
    Files.given = {"/i.tar": (302, b"/moved.tar"), "/moved.tar": (200, b"layers" * 100_000)}
    expected = hashlib.sha256(b"layers" * 100_000).hexdigest()

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        for one in nodes:
            await one.until(lambda one=one: bool(one.told))  # type: ignore[misc]
            assert one.told[0].image_sha256 == expected
        assert Files.asked == ["/i.tar", "/moved.tar"]

    asked = {**TAR, "image_url": f"{files}/i.tar", "replicas": 2}
    run(tmp_path, test, node(), node(), workspace=asked, images=ImagesSection(private_addresses=True))


def test_a_file_with_a_checksum_is_not_read_here(tmp_path: Path, files: str) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        assert Files.asked == []

    run(tmp_path, test, node(), workspace={**TAR, "image_url": f"{files}/i.tar", "image_sha256": "ab" * 32})


@pytest.mark.parametrize(
    ("path", "settings", "reason", "says"),
    [
        ("/i.tar", {}, "address_not_allowed", "address of this machine or its network"),
        ("/none.tar", {"private_addresses": True}, "image_missing", "answered 404"),
        ("/denied.tar", {"private_addresses": True}, "image_denied", "answered 403"),
        ("/round.tar", {"private_addresses": True}, "image_unreachable", "redirects more than"),
        ("/i.tar", {"private_addresses": True, "archive_bytes": 3}, "image_too_large", "has more than"),
        ("/down.tar", {"private_addresses": True}, "image_unreachable", "answered 503; trying again in 5 s"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_no_node_is_told(
    tmp_path: Path, files: str, path: str, settings: dict[str, Any], reason: str, says: str
) -> None:
    Files.given = {
        "/i.tar": (200, b"layers"),
        "/denied.tar": (403, b""),
        "/round.tar": (302, b"/round.tar"),
        "/down.tar": (503, b""),
    }

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        view = await deployments_when(
            bootstrap, lambda view: bool(view["shortage"]) and view["shortage"]["reason"] == reason
        )
        assert says in view["shortage"]["detail"]
        assert nodes[0].told == ()

    asked = {**TAR, "image_url": files + path}
    run(tmp_path, test, node(), workspace=asked, images=ImagesSection(**settings))


def test_an_update_to_a_file_that_is_missing_leaves_the_old_revision_serving(tmp_path: Path, files: str) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        await deployments_when(bootstrap, lambda view: view["ready"] == 1)
        await update(bootstrap, {"image_url": f"{files}/none.tar"})
        view = await deployments_when(bootstrap, lambda view: view["rollout"]["state"] == "failed")
        assert (view["rollout"]["reason"], view["rollout"]["node"], view["ready"]) == ("image_missing", "", 1)
        assert nodes[0].told[0].revision == 1

    run(tmp_path, test, node(), workspace=IMAGE, images=ImagesSection(private_addresses=True))


def test_the_query_of_an_images_url_is_a_secret_that_the_file_is_asked_for_with(tmp_path: Path, files: str) -> None:
    Files.given = {"/i.tar?signature=s3cret": (200, b"layers"), "/j.tar?signature=0ther": (200, b"others")}

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        (one,) = nodes
        await one.until(lambda: bool(one.told))
        spec = one.told[0]
        assert (spec.image_url, spec.has_image_query) == (f"{files}/i.tar", True)
        assert spec.image_sha256 == hashlib.sha256(b"layers").hexdigest()

        def told() -> ImageWish:
            spec = one.told[0]
            box = one.sealed[spec.id]
            clear = open_sealed(box, one.account, workspace=spec.id, revision=spec.revision)
            return ImageWish.of("acme", spec, WorkspaceSecrets.decode(clear))

        assert told().url == f"{files}/i.tar?signature=s3cret"
        assert "s3cret" not in f"{told()} {told()!r}"
        view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}")
        assert "s3cret" not in json.dumps(view)
        # another file is another query, or none
        await update(bootstrap, {"image_url": f"{files}/j.tar?signature=0ther"})
        await one.until(lambda: one.told[0].revision == 2)
        assert told().url == f"{files}/j.tar?signature=0ther"
        assert one.told[0].image_sha256 == hashlib.sha256(b"others").hexdigest()
        await deployments_when(bootstrap, lambda view: view["rollout"] is None)
        await update(bootstrap, {"image_url": f"{files}/none.tar", "image_sha256": "ab" * 32})
        await one.until(lambda: one.told[0].revision == 3)
        assert (one.told[0].has_image_query, one.told[0].has_secrets) == (False, False)

    asked = {**TAR, "image_url": f"{files}/i.tar?signature=s3cret"}
    with structlog.testing.capture_logs() as said:
        run(tmp_path, test, node(), workspace=asked, images=ImagesSection(private_addresses=True))
    assert "s3cret" not in str(said)
    for path in (tmp_path / "bootstrap").glob("bootstrap.db*"):
        assert b"s3cret" not in path.read_bytes(), path
        assert b"0ther" not in path.read_bytes(), path


def test_a_query_that_was_never_given_is_refused(tmp_path: Path, files: str) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        asked = {**TAR, "image_url": f"{files}/i.tar", "has_image_query": True}
        with pytest.raises(AdminSocketError, match="give image_url with its query"):
            await bootstrap.admin("POST", "/api/v1/workspaces", asked)

    run(tmp_path, test)


def test_a_pin_that_is_not_what_the_registry_says_is_seen_and_can_be_made_anew(tmp_path: Path) -> None:
    bogus, true = b"\xbb" * 32, b"\x7e" * 32

    def liar(spec: WorkspaceSpec) -> control.DeploymentState:
        return control.DeploymentState(spec.id, spec.revision, "ready", slots_free=1, image_digest=bogus)

    def honest(spec: WorkspaceSpec) -> control.DeploymentState:
        if spec.image_digest == f"sha256:{bogus.hex()}":
            return control.DeploymentState(
                spec.id, spec.revision, "failed", detail="pinned to what is not there", reason="image_pin_conflict"
            )
        if spec.image_digest is None:
            return control.DeploymentState(spec.id, spec.revision, "pulling")
        return control.DeploymentState(spec.id, spec.revision, "ready", slots_free=1, image_digest=true)

    first, second = node(deploy=liar), node(deploy=honest)

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        def disputes(view: dict[str, Any]) -> bool:
            return any(one["reason"] == "image_pin_conflict" for one in view["deployments"])

        view = await deployments_when(bootstrap, disputes)
        assert {one["state"] for one in view["deployments"]} == {"ready", "failed"}
        assert second.told[0].image_digest == f"sha256:{bogus.hex()}"
        first.deploy = second.deploy = lambda spec: control.DeploymentState(
            spec.id, spec.revision, "ready", slots_free=1, image_digest=true
        )
        await update(bootstrap, {}, repin=True)
        await second.until(lambda: second.told[0].image_digest == f"sha256:{true.hex()}")
        view = await deployments_when(bootstrap, lambda view: view["ready"] == 2)
        assert not disputes(view)

    run(tmp_path, test, first, second, workspace={**IMAGE, "replicas": 2})
