"""A node's daemon and a scripted bootstrap over real libp2p: greeting, heartbeats, wishes, tasks, receipts, the end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_node import wishes
from ngpu_node.admin import ask, ask_status
from ngpu_node.errors import NodeConfigurationError
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.control import Bye, Gap, Head, Refused
from ngpu_protocol.http1 import (
    Client,
    Exchange,
    Handler,
    IncompleteError,
    MaybeSentError,
    NotSentError,
    serve_tcp,
    tcp_opener,
)
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.integration.node.rig import echo, eventually
from tests.integration.node.scripted_bootstrap import RunningNode, ScriptedBootstrap, a_bootstrap, a_node, settings
from tests.unit.node.builders import CHAIN_ID, NODE, SIBLING, STRANGER

SPEC = WorkspaceSpec(id="7", name="chat", service="Demo/Small-7B", ports=[8080], concurrency=64)


@asynccontextmanager
async def a_workspace(
    node: RunningNode, handler: Handler, *, base: str = "/v1", paths: Sequence[str] = ("/",)
) -> AsyncIterator[None]:
    """A model server with *handler*, registered with *node* as model servers do it."""

    async def healthy(exchange: Exchange) -> None:
        if exchange.request.target == "/":
            await exchange.respond(200, [])
        elif exchange.request.target == "/v1/models":  # asked for by the node itself, and no task
            await exchange.respond(404, [])
        else:
            await handler(exchange)

    async with trio.open_nursery() as nursery:
        (address, *_) = await nursery.start(partial(serve_tcp, healthy))
        body = {"project": "Demo", "model": "Small-7B", "api": f"http://{address}{base}", "paths": list(paths)}
        runtime = json.loads((node.data_dir / "node.json").read_text())
        host, _, port = runtime["models"].removeprefix("http://").rpartition(":")
        client = Client(tcp_opener(host, int(port)), authority=f"{host}:{port}")
        register = "/api/v0/ai/model/register"
        async with client.request("POST", register, [], json.dumps(body).encode()) as response:
            assert response.status == 200, await response.read(1000)
        await client.aclose()
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def a_network(tmp_path: Path, handler: Handler = echo) -> AsyncIterator[tuple[ScriptedBootstrap, RunningNode]]:
    """A bootstrap and a node that serves workspace 7 with *handler*."""
    async with a_bootstrap() as bootstrap, a_node(settings(tmp_path, bootstrap)) as node, a_workspace(node, handler):
        await bootstrap.wish(SPEC)
        await bootstrap.until_ready()
        with trio.fail_after(60):
            yield bootstrap, node


@trio_test
async def test_a_node_greets_beats_converges_and_serves_a_verified_task(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, node):
        hello = bootstrap.hellos[0]
        assert (hello.network, hello.node, hello.slots) == ("local", NODE.address, 256)
        beat = bootstrap.heartbeats[-1]
        assert (beat.slots_free, beat.draining) == (256, False)
        assert [(s.project, s.model, s.copies) for s in beat.services] == [("Demo", "Small-7B", 1)]
        for size in (0, 10, 100_000, 5_000_000):
            answer = await bootstrap.ask(b"x" * size)
            assert answer.receipt is not None
            assert answer.verdict is not None
            assert (answer.status, answer.body) == (200, b"x" * size)
            assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
            await bootstrap.acknowledge(answer.receipt)
        status = await ask_status(node.data_dir / "admin.sock")
        assert status["node"] == NODE.address
        assert [b["connected"] for b in status["bootstraps"]] == [True]
        assert [d["state"] for d in status["deployments"]] == ["ready"]
        metrics = (await ask(node.data_dir / "admin.sock", "/metrics")).decode()
        assert 'ngpu_node_attempts_total{outcome="complete"} 4.0' in metrics
        assert 'ngpu_node_deployments{state="ready"} 1.0' in metrics
        assert "ngpu_node_peers 1.0" in metrics
        assert bootstrap.offers == []


@trio_test
async def test_strangers_get_the_list_of_mounts_and_nothing_else(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, node), a_bootstrap(STRANGER) as stranger:
        runtime = json.loads((node.data_dir / "node.json").read_text())
        await stranger.host.connect(runtime["multiaddrs"][0], timeout_s=30)
        async with stranger.client().request("GET", "/.well-known/libp2p/protocols") as response:
            assert json.loads(await response.read(1000)) == {"/ngpu/v1": {"path": "/ngpu/v1/"}}
        stranger.hellos = bootstrap.hellos
        forged = await stranger.ask(b"mine")
        stolen = await stranger.send(bootstrap.order(), b"theirs")
        for answer in (forged, stolen):
            assert (answer.status, answer.field("ngpu-refused")) == (403, "unknown_bootstrap")


@trio_test
async def test_a_receipt_nobody_could_take_is_offered_at_once_until_acknowledged(tmp_path: Path) -> None:
    started = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        started.set()
        await trio.sleep_forever()

    async with a_network(tmp_path, workspace) as (bootstrap, node):
        signed = bootstrap.order()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bootstrap.send, signed)
            await started.wait()
            nursery.cancel_scope.cancel()
        await eventually(lambda: len(bootstrap.offers) == 1)
        order, receipt = bootstrap.offers[0]
        assert order.order == signed.order
        assert receipt.receipt.outcome == Outcome.CLIENT_GONE
        await trio.sleep(0.2)
        status = await ask_status(node.data_dir / "admin.sock")
        assert status["running"] == 0


@trio_test
async def test_unacknowledged_receipts_are_offered_after_a_reconnect_and_after_a_restart(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, _):
        bootstrap.acknowledges = False
        first = await bootstrap.ask(b"1")
        second = await bootstrap.ask(b"2")
        assert first.receipt is not None
        assert second.receipt is not None
        await bootstrap.acknowledge(second.receipt)
        await trio.sleep(0.2)
        link = second.receipt.link(CHAIN_ID)
        bootstrap.head = head = Head(link.sequence, link.hash)  # the highest it knows
        await bootstrap.host.disconnect(NODE.peer_id)
        await eventually(lambda: bool(bootstrap.offers))
        assert [receipt for _, receipt in bootstrap.offers] == [first.receipt]
    async with a_bootstrap() as bootstrap:
        bootstrap.head = head
        async with a_node(settings(tmp_path, bootstrap)):
            await eventually(lambda: bool(bootstrap.offers))
            assert [receipt for _, receipt in bootstrap.offers] == [first.receipt]
    # that offer was acknowledged, so the next start has nothing to offer
    async with a_bootstrap() as bootstrap:
        bootstrap.head = head
        async with a_node(settings(tmp_path, bootstrap)):
            await eventually(lambda: bool(bootstrap.heartbeats))
            await trio.sleep(0.3)
            assert bootstrap.offers == []


@trio_test
async def test_acknowledgements_that_are_not_right_settle_nothing(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, _):
        bootstrap.acknowledges = False
        answer = await bootstrap.ask(b"1")
        assert answer.receipt is not None
        await bootstrap.acknowledge(answer.receipt, receipt_hash=b"\x01" * 32)
        await bootstrap.acknowledge(answer.receipt, sequence=9)
        await bootstrap.acknowledge(answer.receipt, node=STRANGER.address)
        bootstrap.account, honest = STRANGER, bootstrap.account
        await bootstrap.acknowledge(answer.receipt)
        bootstrap.account = honest
        await trio.sleep(0.2)
        await bootstrap.host.disconnect(NODE.peer_id)
        await eventually(lambda: len(bootstrap.offers) == 1)


@trio_test
async def test_each_bootstrap_hears_how_much_of_what_runs_is_its_own(tmp_path: Path) -> None:
    released = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        await released.wait()
        await echo(exchange)

    def said(bootstrap: ScriptedBootstrap) -> tuple[int, int | None, list[int | None]]:
        beat = bootstrap.heartbeats[-1]
        return beat.slots_free, beat.yours, [one.yours for one in beat.deployments]

    async with a_bootstrap() as one, a_bootstrap(SIBLING) as other:
        for bootstrap in (one, other):
            bootstrap.welcome = {"heartbeat_s": 0.1}
        async with a_node(settings(tmp_path, one, other, slots=4)) as node, a_workspace(node, workspace):
            await one.wish(SPEC)
            await one.until_ready()
            await other.until_ready()
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(one.ask, b"mine")
                nursery.start_soon(other.ask, b"yours")
                await eventually(lambda: (said(one), said(other)) == ((0, 3, [3]), (0, 1, [1])))
                released.set()
            await eventually(lambda: (said(one), said(other)) == ((4, 0, [0]), (4, 0, [0])))


@trio_test
async def test_a_sibling_may_acknowledge_and_sees_the_same_deployments(tmp_path: Path) -> None:
    async with (
        a_bootstrap() as one,
        a_bootstrap(SIBLING) as other,
        a_node(settings(tmp_path, one, other)) as node,
        a_workspace(node, echo),
    ):
        await one.wish(SPEC)
        await one.until_ready()
        await other.until_ready()
        one.acknowledges = False
        answer = await one.ask(b"1")
        assert answer.receipt is not None
        await other.acknowledge(answer.receipt)
        await trio.sleep(0.3)
        link = answer.receipt.link(CHAIN_ID)
        one.head = Head(link.sequence, link.hash)  # they share a store
        await one.host.disconnect(NODE.peer_id)
        await eventually(lambda: len(one.hellos) == 2)
        await trio.sleep(0.3)
        assert one.offers == []


@trio_test
async def test_a_siblings_older_list_stops_nothing_until_it_says_so_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "POSTPONED_S", 0.5)
    async with (
        a_bootstrap() as one,
        a_bootstrap(SIBLING) as other,
        a_node(settings(tmp_path, one, other)) as node,
        a_workspace(node, echo),
    ):
        await one.wish(SPEC, as_of_ms=2_000)
        await one.until_ready()
        await other.wish(as_of_ms=1_000)  # it has not heard of the workspace yet
        assert (await one.ask(b"1")).status == 200
        await other.wish(SPEC, as_of_ms=3_000)  # now it has
        await trio.sleep(0.7)
        assert (await one.ask(b"2")).status == 200
        # one that nothing newer follows is meant so, whatever its clock says
        await other.wish(as_of_ms=500)
        await eventually(lambda: one.heartbeats[-1].deployments == ())


@trio_test
async def test_a_gap_is_filled_and_the_chain_continues_from_the_higher_head(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, _):
        receipts = []
        for number in range(4):
            answer = await bootstrap.ask(b"%d" % number)
            assert answer.receipt is not None
            await bootstrap.acknowledge(answer.receipt)
            receipts.append(answer.receipt)
        await bootstrap.say_on_receipts(Gap(from_sequence=2, to_sequence=3))
        await eventually(lambda: len(bootstrap.offers) == 2)
        assert [receipt for _, receipt in bootstrap.offers] == receipts[1:3]
        await bootstrap.say_on_receipts(Head(sequence=90, hash=b"\x90" * 32))
        await trio.sleep(0.1)
        answer = await bootstrap.ask(b"next")
        assert answer.receipt is not None
        assert (answer.receipt.receipt.sequence, answer.receipt.receipt.previous) == (91, b"\x90" * 32)


@trio_test
async def test_a_bootstrap_that_was_restored_gets_what_it_lacks_acknowledged_or_not(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, _):
        receipts = []
        for number in range(4):
            answer = await bootstrap.ask(b"%d" % number)
            assert answer.receipt is not None
            await bootstrap.acknowledge(answer.receipt)
            receipts.append(answer.receipt)
        await trio.sleep(0.2)
        link = receipts[1].link(CHAIN_ID)
        bootstrap.head = Head(link.sequence, link.hash)  # its backup is of then
        await bootstrap.host.disconnect(NODE.peer_id)
        await eventually(lambda: len(bootstrap.offers) == 2)
        assert [receipt for _, receipt in bootstrap.offers] == receipts[2:]


@trio_test
async def test_a_bootstrap_that_is_away_is_dialled_for_ever_and_found_again(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap:
        multiaddr = bootstrap.multiaddr
        port = int(multiaddr.split("/")[4])
    async with a_node(settings(tmp_path, multiaddr)) as node:
        await trio.sleep(0.5)
        status = await ask_status(node.data_dir / "admin.sock")
        assert status["bootstraps"][0]["connected"] is False
        assert status["bootstraps"][0]["problem"]
        for _ in range(2):
            async with a_bootstrap(port=port) as bootstrap:
                await eventually(lambda: bool(bootstrap.heartbeats))


@pytest.mark.parametrize("word", ["refused", "other_network", "bad_version", "silly_head", "silent_goodbye"])
def test_a_bootstrap_that_will_not_talk_or_talks_nonsense_costs_nothing_else(tmp_path: Path, word: str) -> None:
    async def main() -> None:
        async with a_bootstrap() as bad, a_bootstrap(SIBLING) as good:
            if word == "refused":
                bad.answer = Refused(reason="not_admitted", message="ask the operator")
            elif word == "other_network":
                bad.welcome = {"network": "main"}
            elif word == "bad_version":
                bad.welcome = {"version": 9}
            elif word == "silly_head":
                bad.welcome = {"head_sequence": 2**62}
            elif word == "silent_goodbye":
                bad.answer = Bye(reason="no")
            async with a_node(settings(tmp_path, bad, good)) as node:
                await eventually(lambda: bool(bad.hellos) and bool(good.heartbeats))
                await trio.sleep(0.3)
                status = await ask_status(node.data_dir / "admin.sock")
                assert [b["connected"] for b in status["bootstraps"]] == [False, True]
                if word == "refused":
                    assert "not_admitted" in status["bootstraps"][0]["problem"]

    trio.run(main)


@trio_test
async def test_draining_says_so_finishes_what_runs_takes_leave_and_ends(tmp_path: Path) -> None:
    release = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        await release.wait()
        await exchange.respond(200, [], b"done")

    async with a_network(tmp_path, workspace) as (bootstrap, node), trio.open_nursery() as nursery:
        outcomes: list[str] = []

        async def ask() -> None:
            answer = await bootstrap.ask(b"x")
            assert answer.receipt is not None
            outcomes.append(answer.receipt.receipt.outcome)

        nursery.start_soon(ask)
        await trio.sleep(0.2)
        node.drain.request("SIGTERM")
        await eventually(lambda: bootstrap.heartbeats[-1].draining)
        refused = await bootstrap.ask(b"y")
        assert refused.field("ngpu-refused") == "draining"
        release.set()
        with trio.fail_after(60):
            await node.ended.wait()
        await eventually(lambda: bool(outcomes) and bool(bootstrap.byes))
        assert outcomes == [Outcome.COMPLETE]


@trio_test
async def test_a_lost_connection_is_never_a_complete_answer_and_the_node_is_back_soon(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        while True:
            await exchange.send(b"tick")
            await trio.sleep(0.01)

    async with a_network(tmp_path, workspace) as (bootstrap, _), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises((IncompleteError, MaybeSentError)):
                await bootstrap.ask(b"x")

        nursery.start_soon(ask)
        await trio.sleep(0.3)
        await bootstrap.host.disconnect(NODE.peer_id)
        # what was on its way when the connection went may be offered again on the next
        await eventually(lambda: len(bootstrap.hellos) == 2 and bool(bootstrap.offers))
        assert {receipt.receipt.sequence for _, receipt in bootstrap.offers} == {1}
        assert {receipt.receipt.outcome for _, receipt in bootstrap.offers} == {Outcome.CLIENT_GONE}


@trio_test
async def test_of_a_model_server_only_what_it_registered_for_is_called_where_it_has_it(tmp_path: Path) -> None:
    async def named(exchange: Exchange) -> None:
        await exchange.respond(200, [], exchange.request.target.encode())

    async with (
        a_bootstrap() as bootstrap,
        a_node(settings(tmp_path, bootstrap)) as node,
        a_workspace(node, named, base="/llm/v1", paths=["/health"]),
    ):
        await bootstrap.wish(SPEC)
        await bootstrap.until_ready()
        with trio.fail_after(20):
            answer = await bootstrap.ask(b"{}", target="/v1/chat/completions?a=b")
            assert answer.body == b"/llm/v1/chat/completions?a=b"
            assert answer.verdict is not None
            assert answer.verdict.kind is VerdictKind.VERIFIED
            assert (await bootstrap.ask(b"", method="GET", target="/health")).body == b"/health"
            for method, target in (("GET", "/slots"), ("DELETE", "/v1/models/a"), ("POST", "/llm/v1/chat/completions")):
                refused = await bootstrap.ask(b"", method=method, target=target)
                assert (refused.status, refused.field("ngpu-refused")) == (405, "path_not_served")
                assert refused.receipt is None


@trio_test
async def test_a_deployment_that_is_not_wanted_any_more_takes_no_orders(tmp_path: Path) -> None:
    async with a_network(tmp_path) as (bootstrap, _):
        await bootstrap.wish()
        await eventually(lambda: bootstrap.heartbeats[-1].deployments == ())
        answer = await bootstrap.ask(b"x")
        assert (answer.status, answer.field("ngpu-refused")) == (404, "workspace_unknown")
        await bootstrap.wish(SPEC.model_copy(update={"revision": 2}))
        await bootstrap.until_ready()
        old = await bootstrap.ask(b"x")
        assert old.field("ngpu-refused") == "order_mismatch"
        assert (await bootstrap.ask(b"x", revision=2)).status == 200


@trio_test
async def test_an_image_on_a_node_without_an_engine_fails_with_the_reason(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap, a_node(settings(tmp_path, bootstrap)):
        await bootstrap.wish(WorkspaceSpec(id="9", name="image", image="busybox", ports=[80]))
        await eventually(lambda: any(d.state == "failed" for b in bootstrap.heartbeats for d in b.deployments))
        detail = bootstrap.heartbeats[-1].deployments[0].detail
        assert 'engine = "none"' in detail


@trio_test
async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap, trio.open_nursery() as nursery:
        (address, *_) = await nursery.start(partial(serve_tcp, echo))
        for key in ("model_listen", "metrics_listen"):
            chosen = settings(tmp_path, bootstrap, **{key: str(address)})
            with pytest.raises(BaseExceptionGroup) as caught:
                async with a_node(chosen):
                    pass
            assert caught.group_contains(NodeConfigurationError, match=key)
        taken = bootstrap.multiaddr.rpartition("/p2p/")[0]
        with pytest.raises(BaseExceptionGroup) as caught:
            async with a_node(settings(tmp_path, bootstrap, listen=[taken])):
                pass
        assert caught.group_contains(NodeConfigurationError, match="listen")
        nursery.cancel_scope.cancel()


def test_a_node_that_nobody_answers_for_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(NodeConfigurationError, match="no daemon answers"):
        trio.run(ask_status, tmp_path / "admin.sock")


def test_nothing_was_sent_when_the_node_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            async with a_node(settings(tmp_path, bootstrap)):
                await eventually(lambda: bool(bootstrap.hellos))
            with pytest.raises(NotSentError):
                await bootstrap.ask(b"x")

    trio.run(main)
