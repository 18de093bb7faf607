"""What goes wrong on the way: broken answers, forged receipts, refusing and dying nodes, leaving clients."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_protocol.http1 import IncompleteError, MaybeSentError
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, echo, new_account

Test = Callable[..., Awaitable[None]]

# A cut answer: its connection is reset, in the middle of it or, where it is small, before any of it.
CUT = (IncompleteError, MaybeSentError)


def run(tmp_path: Path, test: Test, *, nodes: int = 1, workspace: dict[str, Any] | None = None, **changes: Any) -> None:
    """Run *test* with a bootstrap and one or two nodes."""

    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap", **changes), workspace=workspace) as bootstrap:
            first = ScriptedNode(new_account())
            async with connected(first, bootstrap.multiaddr):
                if nodes == 1:
                    await wait_ready(bootstrap)
                    await test(bootstrap, first)
                    return
                second = ScriptedNode(new_account())
                async with connected(second, bootstrap.multiaddr):
                    await wait_ready(bootstrap, 2)
                    await test(bootstrap, first, second)

    trio.run(main)


FORGERIES = {
    "order_hash": b"\1" * 32,
    "request_bytes": 999,
    "request_hash": b"\2" * 32,
    "status": 201,
    "response_bytes": 3,
    "response_hash": b"\3" * 32,
}


@pytest.mark.parametrize("rule", FORGERIES)
def test_an_answer_whose_receipt_does_not_fit_is_not_released(tmp_path: Path, rule: str) -> None:
    async def forge(asked: Asked) -> None:
        body = await asked.read()
        await asked.answer(200, body, change={rule: FORGERIES[rule]})

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = forge
        answer = await bootstrap.call("POST", "/user/draw", b'{"x": 1}')
        document = json.loads(answer.body)
        assert (answer.status, document["result_code"], document["reason"]) == (502, 502, "receipt_disputed")
        assert rule in document["msg"]
        await node.until(lambda: bool(node.acknowledged))
        said = node.acknowledged[0].acknowledgement
        assert (said.verdict, said.reason) == ("disputed", rule)
        view = await task_when(bootstrap, document["taskID"], lambda view: view["state"] == 4)
        assert (view["verdict"], view["rule"], view["reason"]) == ("disputed", rule, "receipt_disputed")
        # streamed it has gone out already, but never looks complete
        with pytest.raises(CUT):
            await bootstrap.call("POST", "/proxy/8080/", b"x")

    run(tmp_path, test)


def test_a_receipt_signed_by_another_key_is_evidence_and_takes_no_place_in_the_chain(tmp_path: Path) -> None:
    async def forge(asked: Asked) -> None:
        body = await asked.read()
        own, asked.node.account = asked.node.account, new_account()
        head, sequence = asked.node.head, asked.node.sequence
        receipt = asked.receipt(200, body)
        asked.node.account, asked.node.head, asked.node.sequence = own, head, sequence
        await asked.exchange.send_head(200, [], more=True)
        await asked.exchange.send(body, more=True)
        await asked.exchange.end([(b"ngpu-receipt", receipt.encode().encode())])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = forge
        answer = await bootstrap.call("POST", "/user/draw", b"{}")
        assert json.loads(answer.body)["reason"] == "receipt_disputed"
        node.script = echo
        assert (await bootstrap.call("POST", "/user/draw", b"{}")).status == 200
        await node.until(lambda: len(node.acknowledged) == 2)
        assert [(one.acknowledgement.sequence, one.acknowledgement.verdict) for one in node.acknowledged] == [
            (1, "disputed"),
            (1, "verified"),
        ]

    run(tmp_path, test)


def test_clock_skew_alone_does_not_withhold_the_answer(tmp_path: Path) -> None:
    async def skewed(asked: Asked) -> None:
        body = await asked.read()
        asked.started_ms += 60_000
        await asked.answer(200, body, change={"ended_at_ms": asked.started_ms, "duration_ms": 0})

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = skewed
        assert (await bootstrap.call("POST", "/proxy/8080/", b"x")).body == b"x"
        await node.until(lambda: bool(node.acknowledged))
        assert node.acknowledged[0].acknowledgement.verdict == "skew"

    run(tmp_path, test)


def test_an_answer_without_a_receipt_is_no_answer(tmp_path: Path) -> None:
    async def unproven(asked: Asked) -> None:
        await asked.exchange.send_head(200, [])
        await asked.exchange.send(b"free lunch")
        await asked.exchange.end()

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = unproven
        with pytest.raises(CUT):
            await bootstrap.call("GET", "/proxy/8080/")
        wrapped = await bootstrap.call("POST", "/user/draw", b"{}")
        assert (wrapped.status, json.loads(wrapped.body)["reason"]) == (502, "receipt_missing")

    run(tmp_path, test)


def test_an_answer_the_workspace_broke_off_is_cut_for_the_client_too(tmp_path: Path) -> None:
    async def breaking(asked: Asked) -> None:
        await asked.read()
        await asked.answer(200, b"half", outcome="workspace_broke")

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = breaking
        with pytest.raises(CUT):
            await bootstrap.call("GET", "/proxy/8080/")
        await node.until(lambda: bool(node.acknowledged))
        assert node.acknowledged[0].acknowledgement.verdict == "verified"
        wrapped = json.loads((await bootstrap.call("POST", "/user/draw", b"{}")).body)
        assert (wrapped["result_code"], wrapped["reason"]) == (502, "workspace_broke")

    run(tmp_path, test)


@pytest.mark.parametrize(("error", "status"), [("workspace_broke", 502), ("deadline", 504)])
def test_a_node_that_answers_in_the_workspaces_place(tmp_path: Path, error: str, status: int) -> None:
    async def instead(asked: Asked) -> None:
        await asked.read()
        receipt = asked.receipt(0, b"", outcome=error)
        fields = [(b"ngpu-error", error.encode()), (b"content-type", b"application/json")]
        await asked.exchange.send_head(status, fields)
        await asked.exchange.send(b'{"reason": "%b", "message": "scripted"}' % error.encode())
        await asked.exchange.end([(b"ngpu-receipt", receipt.encode().encode())])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = instead
        answer = await bootstrap.call("POST", "/proxy/8080/", b"x")
        document = json.loads(answer.body)
        assert (answer.status, document["reason"]) == (status, error)
        assert answer.header(b"ngpu-task-id") == document["taskId"].encode()
        await node.until(lambda: bool(node.acknowledged))
        assert node.acknowledged[0].acknowledgement.verdict == "verified"
        assert len(node.orders) == 1  # a POST does not run again

    run(tmp_path, test)


def test_a_refused_call_goes_to_the_other_node_even_with_a_large_body(tmp_path: Path) -> None:
    body = b"x" * 300_000

    async def refuse(asked: Asked) -> None:
        await asked.refuse(503, "draining")

    async def test(bootstrap: Bootstrap, first: ScriptedNode, second: ScriptedNode) -> None:
        first.script = refuse
        for _ in range(6):
            answer = await bootstrap.call("POST", "/proxy/8080/", body)
            assert (answer.status, answer.body) == (200, body)
        assert len(second.orders) == 6
        assert first.orders  # chance found it at least once in six
        refused = first.orders[0].order
        ran = next(one.order for one in second.orders if one.order.task_id == refused.task_id)
        assert (refused.attempt, ran.attempt) == (1, 2)
        view = await task_when(bootstrap, ran.task_id, lambda view: view["state"] == 3)
        assert [attempt["outcome"] for attempt in view["attempts"]] == ["refused", "complete"]

    run(tmp_path, test, nodes=2)


@pytest.mark.parametrize(
    ("reason", "status"),
    [("workspace_not_ready", 503), ("body_too_large", 413), ("unknown_bootstrap", 502), ("deadline_passed", 504)],
)
def test_a_refusal_nobody_takes_over_is_told_to_the_client(tmp_path: Path, reason: str, status: int) -> None:
    async def refuse(asked: Asked) -> None:
        await asked.refuse(400, reason)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = refuse
        answer = await bootstrap.call("GET", "/proxy/8080/")
        assert answer.status == status
        assert reason in json.loads(answer.body)["message"]

    run(tmp_path, test)


@pytest.mark.parametrize(("method", "runs_again"), [("GET", True), ("PUT", True), ("POST", False)])
def test_after_a_lost_connection_only_a_repeatable_call_runs_again(
    tmp_path: Path, method: str, runs_again: bool
) -> None:
    async def test(bootstrap: Bootstrap, first: ScriptedNode, second: ScriptedNode) -> None:
        first.script = second.script = one_vanishes()
        answer = await bootstrap.call(method, "/proxy/8080/", b"x")
        if runs_again:
            assert (answer.status, answer.body) == (200, b"x")
            assert len(first.orders) == len(second.orders) == 1
        else:
            assert (answer.status, json.loads(answer.body)["reason"]) == (502, "node_lost")
            assert len(first.orders) + len(second.orders) == 1

    run(tmp_path, test, nodes=2)


def one_vanishes() -> Callable[[Asked], Awaitable[None]]:
    """Return a script for several nodes: whichever is asked first loses its connection, the others echo."""
    vanished: list[Asked] = []

    async def script(asked: Asked) -> None:
        if vanished:
            await echo(asked)
            return
        vanished.append(asked)
        await asked.read()
        await asked.exchange.abort()

    return script


def test_an_idempotency_key_lets_a_post_run_again(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, first: ScriptedNode, second: ScriptedNode) -> None:
        first.script = second.script = one_vanishes()
        answer = await bootstrap.call("POST", "/proxy/8080/", b"x", [(b"idempotency-key", b"k1")])
        assert (answer.status, answer.body) == (200, b"x")
        assert len(first.orders) == len(second.orders) == 1

    run(tmp_path, test, nodes=2)


def test_a_used_idempotency_key_names_the_task_of_before(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        key = [(b"idempotency-key", b"once")]
        first = json.loads((await bootstrap.call("POST", "/user/draw", b'{"data": "1"}', key)).body)
        again = json.loads((await bootstrap.call("POST", "/user/draw", b'{"data": "1"}', key)).body)
        assert again == first
        assert len(node.orders) == 1

    run(tmp_path, test)


def test_nothing_of_an_answer_is_repeated_once_a_byte_reached_the_client(tmp_path: Path) -> None:
    async def cut(asked: Asked) -> None:
        await asked.exchange.send_head(200, [])
        await asked.exchange.send(b"part")
        await asked.exchange.abort()

    async def test(bootstrap: Bootstrap, first: ScriptedNode, second: ScriptedNode) -> None:
        first.script = second.script = cut
        with pytest.raises(CUT):
            await bootstrap.call("GET", "/proxy/8080/")
        assert len(first.orders) + len(second.orders) == 1

    run(tmp_path, test, nodes=2)


def test_a_client_that_leaves_stops_the_attempt_and_the_late_receipt_is_judged(tmp_path: Path) -> None:
    stopped = trio.Event()
    asked_before: list[Asked] = []

    async def endless(asked: Asked) -> None:
        asked_before.append(asked)
        await asked.read()
        await asked.exchange.send_head(200, [])
        await asked.exchange.send(b"first")
        try:
            await trio.sleep_forever()
        finally:
            stopped.set()

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = endless
        async with bootstrap.stream("POST", "/proxy/8080/", b"body") as response:
            assert await response.receive() == b"first"
        with trio.fail_after(15):
            await stopped.wait()
        asked = asked_before[0]
        task_id = asked.signed.order.task_id
        view = await task_when(bootstrap, task_id, lambda view: view["state"] == 5)
        assert (view["reason"], view["verdict"]) == ("client_gone", "")
        receipt = asked.receipt(200, b"first", outcome="client_gone")
        for repetition in (1, 2):
            await node.offer(asked.signed, receipt)
            await node.until(lambda wanted=repetition: len(node.acknowledged) == wanted)  # type: ignore[misc]
        assert node.acknowledged[0] == node.acknowledged[1]
        assert node.acknowledged[0].acknowledgement.verdict == "verified"
        view = await task_when(bootstrap, task_id, lambda view: view["verdict"] == "verified")
        assert view["state"] == 5

    run(tmp_path, test)


def test_a_client_that_leaves_before_the_answer_stops_the_attempt(tmp_path: Path) -> None:
    begun, stopped = trio.Event(), trio.Event()

    async def silent(asked: Asked) -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            stopped.set()

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = silent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bootstrap.call, "POST", "/user/draw", b"{}")
            await begun.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(15):
            await stopped.wait()
        await task_when(bootstrap, node.orders[0].order.task_id, lambda view: view["state"] == 5)

    run(tmp_path, test)


def test_a_forged_offer_gets_no_acknowledgement_and_a_false_late_receipt_a_dispute(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        await node.until(lambda: len(node.acknowledged) == 1)
        signed = node.orders[0]
        asked = Asked(node, None, signed, signed.order.issued_at_ms)  # type: ignore[arg-type]
        forged = asked.receipt(200, b"x", change={"sequence": 1, "previous": bytes(32)})
        await node.offer(signed, forged)  # a second receipt for sequence 1
        await node.until(lambda: len(node.acknowledged) == 2)
        said = node.acknowledged[1].acknowledgement
        assert (said.verdict, said.reason) == ("disputed", "chain")

    run(tmp_path, test)


def test_websockets_pass_raw_bytes_both_ways_and_are_receipted_later(tmp_path: Path) -> None:
    done: list[tuple[Asked, bytes, bytes]] = []

    async def chat(asked: Asked) -> None:
        stream = await asked.exchange.upgrade([(b"sec-websocket-accept", b"abc")])
        said = b""
        while data := await stream.receive_some(1000):
            said += data
            await stream.send_all(data.upper())
        await stream.send_all(b"bye")
        asked.body = said
        done.append((asked, said, said.upper() + b"bye"))
        await stream.aclose()

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = chat
        fields = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-key", b"k")]
        async with bootstrap.stream("GET", "/proxy/8080/chat", b"", fields) as response:
            assert response.status == 101
            assert (b"sec-websocket-accept", b"abc") in response.headers
            await response.upgraded.send_all(b"hello")
            assert await response.upgraded.receive_some(100) == b"HELLO"
            await response.upgraded.send_eof()
            assert await response.upgraded.receive_some(100) == b"bye"
            assert await response.upgraded.receive_some(100) == b""
        task_id = node.orders[0].order.task_id
        view = await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        assert view["status"] == 101
        asked, _, answered = done[0]
        await node.offer(asked.signed, asked.receipt(101, answered))
        await node.until(lambda: bool(node.acknowledged))
        assert node.acknowledged[0].acknowledgement.verdict == "verified"

    run(tmp_path, test)


def test_calls_wait_for_a_slot_in_order_and_the_queue_is_bounded(tmp_path: Path) -> None:
    arrived, arrivals = trio.open_memory_channel[trio.Event](10)

    async def gated(asked: Asked) -> None:
        body = await asked.read()
        gate = trio.Event()
        arrived.send_nowait(gate)
        await gate.wait()
        await asked.answer(200, body, [(b"ngpu-content-length", b"%d" % len(body))])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = gated
        finished: list[bytes] = []
        refused: list[int] = []

        async def one(name: bytes) -> None:
            answer = await bootstrap.call("POST", "/proxy/8080/", name)
            if answer.status == 200:
                finished.append(answer.body)
            else:
                assert answer.header(b"retry-after") is not None
                refused.append(answer.status)

        async with trio.open_nursery() as nursery:
            for name in (b"a", b"b", b"c"):
                nursery.start_soon(one, name)
                await trio.sleep(0.1)
            assert arrivals.statistics().current_buffer_used == 1
            nursery.start_soon(one, b"too many")
            await trio.sleep(0.1)
            assert refused == [429]
            with trio.fail_after(60):
                for _ in range(3):
                    (await arrivals.receive()).set()
        assert finished == [b"a", b"b", b"c"]
        assert len(node.orders) == 3

    run(tmp_path, test, workspace={**WORKSPACE, "concurrency": 1}, limits={"queued_calls": 2})


def test_without_a_node_calls_are_refused_and_say_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap")) as bootstrap:
            for target in ("/proxy/8080/", "/user/draw", "/user/train"):
                answer = await bootstrap.call("POST", target, b"{}")
                assert (answer.status, json.loads(answer.body)["reason"]) == (503, "no_node")
            ready = await bootstrap.call("GET", "/ready", token=None)
            assert (ready.status, json.loads(ready.body)["ready"]) == (503, False)

    trio.run(main)


def test_a_node_that_dies_mid_answer_cuts_the_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap")) as bootstrap:
            node = ScriptedNode(new_account())
            dying = trio.Event()

            async def endless(asked: Asked) -> None:
                await asked.exchange.send_head(200, [])
                await asked.exchange.send(b"first")
                await trio.sleep_forever()

            node.script = endless

            async def live() -> None:
                async with connected(node, bootstrap.multiaddr):
                    await dying.wait()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(live)
                await wait_ready(bootstrap)
                async with bootstrap.stream("GET", "/proxy/8080/") as response:
                    assert await response.receive() == b"first"
                    dying.set()
                    with trio.fail_after(60), pytest.raises(CUT):
                        await response.receive()
            view = await task_when(bootstrap, node.orders[0].order.task_id, lambda view: view["state"] == 4)
            assert view["reason"] == "node_lost"

    trio.run(main)


def test_a_client_that_leaves_while_its_call_waits_for_another_node_leaves_no_open_task(tmp_path: Path) -> None:
    async def refuse(asked: Asked) -> None:
        await asked.refuse(429, "no_free_slot")

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = refuse
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bootstrap.call, "GET", "/proxy/8080/")
            with trio.fail_after(60):
                while not node.orders:  # noqa: ASYNC110  a scripted node has no event
                    await trio.sleep(0.02)
            await trio.sleep(0.1)  # refused, and waiting for another node
            nursery.cancel_scope.cancel()
        view = await task_when(bootstrap, node.orders[0].order.task_id, lambda view: view["state"] >= 3)
        assert (view["state"], view["reason"]) == (5, "client_gone")

    run(tmp_path, test, limits={"attempts": 32})


def test_a_promised_task_comes_back_to_the_only_node_that_refused_it(tmp_path: Path) -> None:
    refusals = iter(["workspace_not_ready", "no_free_slot", "workspace_not_ready"])

    async def reluctant(asked: Asked) -> None:
        reason = next(refusals, None)
        if reason is None:
            await echo(asked)
        else:
            await asked.refuse(425, reason)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = reluctant
        task_id = json.loads((await bootstrap.call("POST", "/user/train", b"{}")).body)["taskId"]
        view = await task_when(bootstrap, task_id, lambda view: view["state"] >= 3)
        assert (view["state"], [one["outcome"] for one in view["attempts"]]) == (3, ["refused"] * 3 + ["complete"])

    run(tmp_path, test)


def test_a_promised_task_nobody_takes_fails_with_the_last_reason(tmp_path: Path) -> None:
    async def refuse(asked: Asked) -> None:
        await asked.refuse(403, "unknown_bootstrap")

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = refuse
        task_id = json.loads((await bootstrap.call("POST", "/user/train", b"{}")).body)["taskId"]
        view = await task_when(bootstrap, task_id, lambda view: view["state"] >= 3)
        assert (view["state"], view["reason"], len(view["attempts"])) == (4, "node_refused", 2)

    run(tmp_path, test, limits={"attempts": 2})


def test_a_promised_task_expires(tmp_path: Path) -> None:
    async def silent(asked: Asked) -> None:
        await trio.sleep_forever()

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = silent
        running_one = json.loads((await bootstrap.call("POST", "/user/train", b"{}")).body)["taskId"]
        waiting_one = json.loads((await bootstrap.call("POST", "/user/train", b"{}")).body)["taskId"]
        view = await task_when(bootstrap, waiting_one, lambda view: view["state"] >= 3)
        assert (view["state"], view["reason"], view["result_code"]) == (6, "deadline", 504)
        assert (await task_when(bootstrap, running_one, lambda view: True))["state"] == 1  # its node may still answer

    run(tmp_path, test, workspace={**WORKSPACE, "concurrency": 1}, async_deadline_s=1.0)
