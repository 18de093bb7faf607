"""Nodes that break the rules where a bootstrap might not look: what they gain by it is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.integration.bootstrap.rig import Bootstrap, task_when
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, new_account
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
