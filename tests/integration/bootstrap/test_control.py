"""The control and receipts protocols as a node meets them: greeting, admission, desired state, gaps, rude peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap.registry import control as bootstrap_control
from ngpu_protocol import control
from ngpu_protocol.p2p import P2PStream, open_host, receive_frame, send_frame
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import NETWORK, ScriptedNode, connected, new_account, now_ms

IMAGE: dict[str, Any] = {
    **{key: value for key, value in WORKSPACE.items() if key != "service"},
    "image": "registry.example/echo:1",
}


def run(tmp_path: Path, test: Any, **changes: Any) -> None:
    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap", **changes)) as bootstrap:
            with trio.fail_after(60):
                await test(bootstrap)

    trio.run(main)


async def to_its_end(stream: P2PStream) -> None:
    while await stream.receive_some(100):
        pass


def test_a_node_of_another_network_is_refused(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        async with connected(ScriptedNode(new_account(), network="test"), bootstrap.multiaddr) as (node, _):
            assert isinstance(node.welcome, control.Refused)
            assert node.welcome.reason == "wrong_network"
        assert (await bootstrap.admin("GET", "/api/v1/nodes"))["nodes"] == []

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"node": "other"}, "wrong_node"), ({"version_low": 7, "version_high": 9}, "wrong_version")],
)
def test_a_hello_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        account = new_account()
        if "node" in change:
            change["node"] = new_account().address
        fields: dict[str, Any] = {
            "network": "local",
            "version_low": 1,
            "version_high": 1,
            "session": bytes(32),
            "node": account.address,
            "software": "x",
            "now_ms": now_ms(),
        }
        async with open_host(account, listen=[], network=NETWORK) as host:
            peer_id = await host.connect(bootstrap.multiaddr, timeout_s=30)
            stream = await host.open_stream(peer_id, control.CONTROL_PROTOCOL, timeout_s=30)
            await send_frame(stream, control.encode_message(control.Hello(**(fields | change))))
            said = control.decode_control(await receive_frame(stream, 10_000) or b"")
            assert isinstance(said, control.Refused)
            assert said.reason == reason

    run(tmp_path, test)


@pytest.mark.parametrize("garbage", [b"\xff" * 40, b"\x00\x00\x00\x02\x80", b"\x7f\xff\xff\xff"])
@pytest.mark.parametrize("protocol", [control.CONTROL_PROTOCOL, control.RECEIPTS_PROTOCOL])
def test_a_rude_peer_loses_its_stream_and_nothing_else_happens(tmp_path: Path, protocol: str, garbage: bytes) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        async with connected(ScriptedNode(new_account()), bootstrap.multiaddr):
            await wait_ready(bootstrap)
            async with open_host(new_account(), listen=[], network=NETWORK) as host:
                peer_id = await host.connect(bootstrap.multiaddr, timeout_s=30)
                stream = await host.open_stream(peer_id, protocol, timeout_s=30)
                if protocol == control.RECEIPTS_PROTOCOL:
                    assert await receive_frame(stream, 10_000)
                await stream.send_all(garbage)
                await stream.send_eof()
                with pytest.raises(trio.BrokenResourceError):
                    await to_its_end(stream)
            assert (await bootstrap.call("POST", "/proxy/8080/", b"fine")).body == b"fine"

    run(tmp_path, test)


def test_only_approved_nodes_get_work(tmp_path: Path) -> None:
    approved, other = new_account(), new_account()

    async def test(bootstrap: Bootstrap) -> None:
        async with (
            connected(ScriptedNode(other), bootstrap.multiaddr) as (waiting, _),
            connected(ScriptedNode(approved), bootstrap.multiaddr) as (working, _),
        ):
            assert isinstance(waiting.welcome, control.Welcome)
            assert not waiting.welcome.admitted
            await wait_ready(bootstrap)
            assert (await bootstrap.call("POST", "/proxy/8080/", b"x")).body == b"x"
            assert len(working.orders) == 1
            assert waiting.desired == ()
            shown = (await bootstrap.admin("GET", "/api/v1/nodes"))["nodes"]
            assert {one["node_addr"]: one["admitted"] for one in shown} == {
                approved.address: True,
                other.address: False,
            }

    run(tmp_path, test, admission={"mode": "approved", "approved": [approved.address]})


def test_nodes_hear_of_workspaces_that_come_and_go(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        async with connected(ScriptedNode(new_account()), bootstrap.multiaddr) as (node, _):
            await node.until(lambda: len(node.desired) == 1)
            made = await bootstrap.admin(
                "POST", "/api/v1/workspaces", {"name": "image", "image": "ngpu/x:1", "ports": [1]}
            )
            await node.until(lambda: len(node.desired) == 2)
            elsewhere = {"name": "other", "service": "demo/other", "ports": [1]}
            await bootstrap.admin("POST", "/api/v1/workspaces", elsewhere)
            await bootstrap.admin("DELETE", f"/api/v1/workspaces/{made['workspace']['spec']['id']}")
            await node.until(lambda: [one.workspace for one in node.desired] == [bootstrap.workspace])

    run(tmp_path, test)


def test_a_node_that_greets_again_replaces_its_former_self(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        account = new_account()
        async with connected(ScriptedNode(account), bootstrap.multiaddr) as (before, _):
            await wait_ready(bootstrap)
            async with connected(ScriptedNode(account), bootstrap.multiaddr) as (after, _):
                await after.until(lambda: len(after.desired) == 1)
                shown = (await bootstrap.admin("GET", "/api/v1/nodes"))["nodes"]
                assert len(shown) == 1
                await bootstrap.call("POST", "/proxy/8080/", b"x")
                assert [one.order.session for one in after.orders + before.orders] == [after.session]

    run(tmp_path, test)


def test_a_draining_node_gets_nothing_new(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        async with connected(ScriptedNode(new_account()), bootstrap.multiaddr) as (node, _):
            await wait_ready(bootstrap)
            node.draining = True
            await node.report()
            with trio.fail_after(60):
                while True:
                    answer = await bootstrap.call("GET", "/proxy/8080/")
                    if answer.status == 503:
                        break
            assert "1 draining" in json.loads(answer.body)["message"]

    run(tmp_path, test)


def test_missing_receipts_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ngpu_bootstrap.dispatch.gaps.GAP_CHECK_S", 0.1)

    async def test(bootstrap: Bootstrap) -> None:
        async with connected(ScriptedNode(new_account()), bootstrap.multiaddr) as (node, _):
            await wait_ready(bootstrap)
            await bootstrap.call("POST", "/proxy/8080/", b"x")
            node.sequence += 2  # two receipts that never arrive
            await bootstrap.call("POST", "/proxy/8080/", b"x")
            await node.until(lambda: bool(node.gaps))
            assert (node.gaps[0].from_sequence, node.gaps[0].to_sequence) == (2, 3)

    run(tmp_path, test)


@pytest.mark.parametrize("workspace", [WORKSPACE, IMAGE], ids=["service", "image"])
def test_a_node_that_comes_back_serves_from_its_first_word_on(
    tmp_path: Path, workspace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sees it ready may call it: what it should run is worked out later, and changes nothing."""

    async def main() -> None:
        node = ScriptedNode(new_account())
        async with running(settings_for(tmp_path / "bootstrap"), workspace=workspace) as bootstrap:
            with trio.fail_after(60):
                async with connected(node, bootstrap.multiaddr):
                    await wait_ready(bootstrap)
                while True:  # until it is gone
                    if not (await bootstrap.admin("GET", "/api/v1/nodes"))["nodes"]:
                        break
                    await trio.sleep(0.01)
                monkeypatch.setattr(bootstrap_control, "SETTLE_S", 10.0)
                node.welcome = None
                async with connected(node, bootstrap.multiaddr):
                    await wait_ready(bootstrap)
                    assert (await bootstrap.call("POST", "/proxy/8080/", b"x")).body == b"x"

    trio.run(main)


def test_what_a_node_has_ready_and_may_not_serve_is_not_shown_as_ready(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap) -> None:
        stranger = ScriptedNode(new_account())
        stranger.desired = (control.DeploymentState(bootstrap.workspace, 1, "ready", slots_free=4),)
        stranger.redeploy = stranger.report  # type: ignore[method-assign]  # it stops nothing, whatever it is told
        async with connected(stranger, bootstrap.multiaddr):
            while True:
                view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}/deployments")
                if view["deployments"]:
                    break
                await trio.sleep(0.01)
            assert view["ready"] == 0
            (shown,) = view["deployments"]
            assert (shown["state"], shown["reason"], shown["slots_free"]) == ("stopping", "not_assigned", 0)
            assert (await bootstrap.call("POST", "/proxy/8080/", b"x")).status == 503

    run(tmp_path, test, admission={"mode": "approved", "approved": []})
