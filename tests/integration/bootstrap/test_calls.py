"""Calls of clients through a real bootstrap to a scripted node, over real libp2p: what passes, what comes back."""

from __future__ import annotations

import json
from pathlib import Path

import trio

from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account


def run(tmp_path: Path, test: object, **changes: object) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        async with (
            running(settings_for(tmp_path / "bootstrap", **changes)) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            await test(bootstrap, node)  # type: ignore[operator]

    trio.run(main)


def test_a_transparent_call_passes_whole_and_is_receipted_verified_and_acknowledged(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        answer = await bootstrap.call(
            "POST",
            "/proxy/8080/v1/a%20b?q=%2F&q=2",
            b"hello",
            [(b"x-own", b"1"), (b"ngpu-order", b"forged"), (b"connection", b"x-hop"), (b"x-hop", b"gone")],
        )
        assert (answer.status, answer.body) == (200, b"hello")
        assert answer.header(b"content-length") == b"5"
        task_id = (answer.header(b"ngpu-task-id") or b"").decode()
        order = node.orders[-1].order
        assert (order.task_id, order.attempt, order.method, order.port) == (task_id, 1, "POST", 8080)
        assert order.target == "/v1/a%20b?q=%2F&q=2"
        assert (order.workspace, order.detach, order.session) == (bootstrap.workspace, False, node.session)
        await node.until(lambda: len(node.acknowledged) == 1)
        assert node.acknowledged[0].acknowledgement.verdict == "verified"
        view = await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        assert (view["verdict"], view["status"], view["result_code"]) == ("verified", 200, 200)
        document = await bootstrap.admin("GET", f"/api/v1/tasks/{task_id}/receipt")
        assert all(result.holds for result in check_receipt_file(ReceiptFile.from_document(document)))

    run(tmp_path, test)


def test_the_node_sees_no_credential_and_no_hop_by_hop_field(tmp_path: Path) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def look(asked: Asked) -> None:
        seen.extend(asked.exchange.request.headers)
        await asked.read()
        await asked.answer(200, b"")

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = look
        fields = [(b"ngpu-token", bootstrap.token.encode()), (b"authorization", b"Bearer sk-own"), (b"te", b"trailers")]
        await bootstrap.call("GET", "/proxy/8080/", b"", fields, token=None)
        names = [name for name, _ in seen]
        assert (b"authorization", b"Bearer sk-own") in seen
        assert b"ngpu-token" not in names
        assert b"te" not in names
        assert names.count(b"ngpu-order") == 1
        assert not any(bootstrap.token.partition("-")[2].encode() in value for _, value in seen)

    run(tmp_path, test)


def test_an_answer_without_a_length_is_chunked_and_ends_with_the_receipt(tmp_path: Path) -> None:
    async def chunked(asked: Asked) -> None:
        await asked.read()
        await asked.answer(203, b"abc", [(b"content-type", b"text/plain"), (b"x-own", b"1")])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = chunked
        answer = await bootstrap.call("GET", "/proxy/8080/")
        assert (answer.status, answer.body, answer.header(b"x-own")) == (203, b"abc", b"1")
        assert [name.lower() for name, _ in answer.trailers] == [b"ngpu-receipt"]

    run(tmp_path, test)


def test_answers_without_a_body_pass(tmp_path: Path) -> None:
    async def bodiless(asked: Asked) -> None:
        await asked.read()
        status = 204 if asked.exchange.request.method == "DELETE" else 200
        await asked.answer(status, b"", [(b"ngpu-content-length", b"17"), (b"etag", b'"x"')])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = bodiless
        head = await bootstrap.call("HEAD", "/proxy/8080/")
        assert (head.status, head.body, head.header(b"content-length")) == (200, b"", b"17")
        deleted = await bootstrap.call("DELETE", "/proxy/8080/x")
        assert (deleted.status, deleted.header(b"etag")) == (204, b'"x"')
        await node.until(lambda: len(node.acknowledged) == 2)
        assert [one.acknowledgement.verdict for one in node.acknowledged] == ["verified", "verified"]

    run(tmp_path, test)


def test_events_arrive_one_by_one(tmp_path: Path) -> None:
    gate = trio.Event()

    async def events(asked: Asked) -> None:
        await asked.read()
        receipt = asked.receipt(200, b"data: 1\n\ndata: 2\n\n")
        await asked.exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        await asked.exchange.send(b"data: 1\n\n")
        await gate.wait()
        await asked.exchange.send(b"data: 2\n\n")
        await asked.exchange.end([(b"ngpu-receipt", receipt.encode().encode())])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = events
        with trio.fail_after(60):
            async with bootstrap.stream("GET", "/proxy/8080/events") as response:
                assert await response.receive() == b"data: 1\n\n"
                gate.set()
                assert await response.receive() == b"data: 2\n\n"
                assert await response.receive() == b""

    run(tmp_path, test)


def test_a_synchronous_wrapped_call(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        body = json.dumps({"btc_address": "bc1p", "data": '{"x": 1}'}).encode()
        kind = [(b"content-type", b"application/json")]
        answer = await bootstrap.call("POST", "/user/draw?seed=7", body, kind)
        document = json.loads(answer.body)
        # the echo answers application/octet-stream, which is no text
        assert (answer.status, document["result_code"], document["encoding"]) == (200, 200, "base64")
        assert document["taskID"] == document["taskId"] == (answer.header(b"ngpu-task-id") or b"").decode()
        order = node.orders[-1].order
        assert (order.method, order.target, order.port, order.detach) == ("POST", "/draw?size=1&seed=7", 8080, False)
        # it was committed and can be asked for before the answer was out
        polled = await bootstrap.call("GET", f"/user/queryTask?taskID={document['taskID']}", token=None)
        again = json.loads(polled.body)
        assert (again["result_code"], again["result_size"], again["data"]) == (200, 1, document["data"])

    run(tmp_path, test)


def test_an_asynchronous_task_is_polled_for(tmp_path: Path) -> None:
    gate = trio.Event()

    async def slow(asked: Asked) -> None:
        body = await asked.read()
        await gate.wait()
        await asked.answer(200, body, [(b"content-type", b"application/json")])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = slow
        body = json.dumps({"data": '{"prompt": "cat"}'}).encode()
        answer = await bootstrap.call("POST", "/user/schedulingTask?paramUrl=sdapi/v1/img2img&paramPort=9000", body)
        document = json.loads(answer.body)
        task_id = document["taskId"]
        assert (answer.status, document["result_code"], document["msg"]) == (200, 200, "success")
        for form in ("?", "&"):
            polled = json.loads(
                (await bootstrap.call("GET", f"/user/queryTask{form}taskID={task_id}", token=None)).body
            )
            assert (polled["result_code"], polled["result_size"]) == (100, 0)
        gate.set()
        await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        polled = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}", token=None)).body)
        assert (polled["result_code"], polled["result_size"], polled["data"]) == (200, 1, '{"prompt": "cat"}')
        order = node.orders[-1].order
        assert (order.target, order.port, order.detach) == ("/sdapi/v1/img2img", 9000, True)

    run(tmp_path, test)


def test_a_workspaces_own_error_becomes_the_result_code(tmp_path: Path) -> None:
    async def failing(asked: Asked) -> None:
        await asked.read()
        await asked.answer(422, b'{"detail": "no"}', [(b"content-type", b"application/json")])

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        node.script = failing
        answer = await bootstrap.call("POST", "/user/draw", b"{}")
        document = json.loads(answer.body)
        assert (answer.status, document["result_code"], document["data"]) == (422, 422, '{"detail": "no"}')
        transparent = await bootstrap.call("POST", "/proxy/8080/x", b"{}")
        assert (transparent.status, transparent.body) == (422, b'{"detail": "no"}')

    run(tmp_path, test)
