"""Nodes that break the rules where a bootstrap might not look: what they gain by it is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from ngpu_bootstrap.dispatch import receipts
from ngpu_protocol import control
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account
from tests.integration.bootstrap.test_failures import CUT, run


def test_a_node_that_sends_more_than_it_announced_is_what_failed_and_not_its_client(tmp_path: Path) -> None:
    async def too_much(asked: Asked) -> None:
        await asked.read()
        await asked.answer(200, b"ten bytes!", [(b"ngpu-content-length", b"5")])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = too_much
        with pytest.raises(CUT):
            await bootstrap.call("POST", "/proxy/8080/", b"x")
        view = await task_when(bootstrap, node.orders[0].order.task_id, lambda view: view["state"] > 2)
        assert (view["state"], view["reason"]) == (4, "node_lost")
        assert "more than Content-Length announced" in view["message"]

    run(tmp_path, test)


def test_a_bogus_offer_does_not_wash_out_what_was_seen_of_an_attempt(tmp_path: Path) -> None:
    """The client left, so the receipt is judged by what the bootstrap saw: also after one that was signed by nobody."""
    begun: list[Asked] = []

    async def endless(asked: Asked) -> None:
        begun.append(asked)
        await asked.read()
        await asked.exchange.send_head(200, [])
        await asked.exchange.send(b"first")
        await trio.sleep_forever()

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = endless
        async with bootstrap.stream("POST", "/proxy/8080/", b"body") as response:
            assert await response.receive() == b"first"
        asked = begun[0]
        await task_when(bootstrap, asked.signed.order.task_id, lambda view: view["state"] == 5)
        own, sequence, head = node.account, node.sequence, node.head
        node.account = new_account()
        bogus = asked.receipt(200, b"first", outcome="client_gone")
        node.account, node.sequence, node.head = own, sequence, head
        await node.offer(asked.signed, bogus)
        await node.until(lambda: len(node.acknowledged) == 1)
        assert node.acknowledged[0].acknowledgement.reason == "signer"
        gpus = {"gpus": (bytes([7]) * 32,), "duration_ms": 50, "reserved_gpu_ms": 50}  # a GPU that it never had
        false = asked.receipt(200, b"first", outcome="client_gone", change=gpus)
        await node.offer(asked.signed, false)
        await node.until(lambda: len(node.acknowledged) == 2)
        said = node.acknowledged[1].acknowledgement
        assert (said.verdict, said.reason) == ("disputed", "gpus")

    run(tmp_path, test)


def test_one_order_is_receipted_once(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        await node.until(lambda: len(node.acknowledged) == 1)
        asked = Asked(node, None, node.orders[0], node.orders[0].order.issued_at_ms, b"x")  # type: ignore[arg-type]
        await node.offer(asked.signed, asked.receipt(200, b"x"))
        await node.until(lambda: len(node.acknowledged) == 2)
        said = node.acknowledged[1].acknowledgement
        assert (said.sequence, said.verdict) == (2, "disputed")

    run(tmp_path, test)


def test_one_order_fills_no_disk_with_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "REPEATS_KEPT", 3)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        await node.until(lambda: len(node.acknowledged) == 1)
        asked = Asked(node, None, node.orders[0], node.orders[0].order.issued_at_ms, b"x")  # type: ignore[arg-type]
        second = asked.receipt(200, b"x")
        await node.offer(asked.signed, second)
        await node.until(lambda: len(node.acknowledged) == 2)
        await node.offer(asked.signed, asked.receipt(200, b"x"))
        await node.until(lambda: len(node.acknowledged) == 3)
        for _ in range(3):
            await node.offer(asked.signed, asked.receipt(200, b"x"))
        await node.offer(asked.signed, second)  # what is on file is answered for as before
        await node.until(lambda: len(node.acknowledged) == 4)
        said = [one.acknowledgement for one in node.acknowledged]
        assert [(one.sequence, one.verdict) for one in said] == [
            (1, "verified"),
            (2, "disputed"),
            (3, "disputed"),
            (2, "disputed"),
        ]

    run(tmp_path, test)


GPUS = tuple(bytes([number]) * 32 for number in (1, 2, 3))
OFFERED = tuple(control.GpuOffer(gpu, "NVIDIA GeForce RTX 4090", 24 << 30) for gpu in GPUS[:2])


ONE_GPU = WORKSPACE | {"gpu_count": 1}


def holding(*gpus: bytes, reserved_gpu_ms: int = 0, **more: object) -> dict[str, object]:
    return {"gpus": gpus, "reserved_gpu_ms": reserved_gpu_ms, **more}


def test_a_receipt_names_no_more_gpus_than_the_workspace_holds(tmp_path: Path) -> None:
    """A node with two of them is not paid for both where the workspace has one."""

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        for change, said in (
            (holding(GPUS[1]), ("verified", "")),
            (holding(*GPUS[:2]), ("disputed", "gpus")),
            (holding(GPUS[2]), ("disputed", "gpus")),  # one it never offered
        ):

            async def answer(asked: Asked, change: dict[str, object] = change) -> None:
                await asked.answer(200, await asked.read(), change=change)

            node.script = answer
            before = len(node.acknowledged)
            await bootstrap.call("POST", "/proxy/8080/", b"x")
            await node.until(lambda before=before: len(node.acknowledged) > before)  # type: ignore[misc]
            last = node.acknowledged[-1].acknowledgement
            assert (last.verdict, last.reason) == said

    async def main() -> None:
        node = ScriptedNode(new_account(), gpus=OFFERED)
        async with (
            running(settings_for(tmp_path / "data"), workspace=ONE_GPU) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            await test(bootstrap, node)

    trio.run(main)


def test_a_receipt_that_comes_after_a_restart_is_judged_by_what_was_offered_and_by_the_deadline(tmp_path: Path) -> None:
    """What the bootstrap saw is gone with it: the order, the workspace and the node's session are on file."""
    begun: list[Asked] = []
    all_begun = trio.Event()

    async def endless(asked: Asked) -> None:
        await asked.read()
        begun.append(asked)
        if len(begun) == 5:
            all_begun.set()
        await trio.sleep_forever()

    settings = settings_for(tmp_path / "data")

    async def main() -> None:
        node = ScriptedNode(new_account(), gpus=OFFERED[:1])
        node.script = endless
        async with running(settings, workspace=ONE_GPU) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            known = bootstrap.workspace, bootstrap.token
            node.gpus = OFFERED  # the second one is offered later
            await node.report()
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(bootstrap.call, "POST", "/proxy/8080/", b"x")
                with trio.fail_after(10):
                    await all_begun.wait()
                nursery.cancel_scope.cancel()
        node.gpus = OFFERED[:1]  # it fell off the bus meanwhile
        async with running(settings, known=known) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            issued_ms, deadline_ms = (getattr(begun[0].signed.order, name) for name in ("issued_at_ms", "deadline_ms"))
            for asked, change, said in zip(
                begun,
                (
                    holding(GPUS[0]),
                    holding(GPUS[1]),
                    holding(*GPUS[:2]),
                    holding(GPUS[2]),
                    holding(GPUS[0], duration_ms=deadline_ms - issued_ms + 60_000),
                ),
                ("", "", "gpus", "gpus", "duration"),
                strict=True,
            ):
                before = len(node.acknowledged)
                await node.offer(asked.signed, asked.receipt(200, b"", outcome="client_gone", change=change))
                await node.until(lambda before=before: len(node.acknowledged) > before)  # type: ignore[misc]
                assert node.acknowledged[-1].acknowledgement.reason == said

    trio.run(main)


def test_what_no_database_keeps_is_not_in_a_nodes_words(tmp_path: Path) -> None:
    async def refuse(asked: Asked) -> None:
        body = b'{"reason": "bad_signature", "message": "a\\u0000b\\ud800c"}'
        await asked.exchange.respond(401, [(b"ngpu-refused", b"bad_signature")], body)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = refuse
        await bootstrap.call("POST", "/user/draw", b"{}")
        view = await task_when(bootstrap, node.orders[0].order.task_id, lambda view: view["state"] == 4)
        assert "\0" not in view["message"]
        assert view["message"].isprintable()

    run(tmp_path, test)
