"""The whole path with real daemons: a client's call reaches a workspace, and its answer comes back, receipted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

import pytest
import trio

from ngpu_protocol.http1 import IncompleteError, MaybeSentError
from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from tests.integration.whole_path.rig import Answered, Network, SharedNetwork
from tests.integration.whole_path.workspace import PIECE, Workspace

CUT = (IncompleteError, MaybeSentError)
JSON = [(b"content-type", b"application/json")]
WEBSOCKET = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-key", b"k")]
BIG = 100_000_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    lines = ("[limits]", "request_body_bytes = 200000000")
    with SharedNetwork(tmp_path_factory.mktemp("net"), bootstrap_lines=lines) as network:
        yield network


async def verified(net: Network, answer: Answered) -> None:
    view = await net.task(answer.task_id)
    assert (view["state"], view["verdict"], view["rule"]) == (3, "verified", "")


def test_a_call_passes_whole_and_its_receipt_can_be_checked_by_anyone(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call(
            "POST", "/proxy/8080/echo/a%20b?q=%2F&q=2", b"hello", [(b"content-type", b"text/x-own")]
        )
        assert (answer.status, answer.body) == (200, b"hello")
        assert [value for name, value in answer.headers if name == b"x-own"] == [b"1", b"2"]
        assert answer.header(b"content-type") == b"text/x-own"
        assert answer.header(b"content-length") == b"5"
        assert workspace.calls == [("POST", "/echo/a%20b?q=%2F&q=2")]
        await verified(net, answer)
        document = (await net.call("GET", f"/api/v1/tasks/{answer.task_id}/receipt")).document
        assert document["acknowledgement"]["verdict"] == "verified"
        assert all(result.holds for result in check_receipt_file(ReceiptFile.from_document(document)))

    shared.run(part)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"])
def test_any_method_passes(shared: SharedNetwork, method: str) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call(method, "/proxy/8080/echo", b"" if method == "GET" else b"x")
        assert (answer.status, workspace.calls[-1][0]) == (200, method)
        await verified(net, answer)

    shared.run(part)


def test_answers_without_a_body_and_error_statuses_pass(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        head = await net.call("HEAD", "/proxy/8080/big/12345")
        assert (head.status, head.body, head.header(b"content-length")) == (200, b"", b"12345")
        await verified(net, head)
        for status in (204, 304, 404, 418, 500):
            answer = await net.call("GET", f"/proxy/8080/status/{status}")
            assert (answer.status, answer.header(b"etag")) == (status, b'"e"')
            await verified(net, answer)

    shared.run(part)


def test_the_workspace_sees_the_clients_fields_and_none_of_ours(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        fields = (await net.call("GET", "/proxy/8080/fields", b"", [(b"x-own", b"yes"), (b"ngpu-order", b"no")])).body
        assert b"x-own: yes" in fields
        assert b"ngpu-" not in fields
        assert b"authorization" not in fields

    shared.run(part)


def test_a_chunked_body_passes(shared: SharedNetwork) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(5):
            yield b"%d" % number

    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call("POST", "/proxy/8080/echo", pieces())
        assert answer.body == b"01234"
        await verified(net, answer)

    shared.run(part)


def test_a_synchronous_wrapped_call(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        body = json.dumps({"btc_address": "bc1p", "data": '{"prompt": "cat"}'}).encode()
        answer = await net.call("POST", "/user/draw", body, JSON)
        assert (answer.status, answer.document["result_code"]) == (200, 200)
        assert answer.document["data"] == '{"prompt": "cat"}'
        assert workspace.bodies == [b'{"prompt": "cat"}']
        whole = await net.call("POST", "/user/draw", b'{"text": "x"}', JSON)
        assert whole.document["data"] == '{"text": "x"}'
        await verified(net, whole)

    shared.run(part)


def test_an_asynchronous_task_is_polled_for(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        body = json.dumps({"data": '{"prompt": "cat"}'}).encode()
        submitted = await net.call("POST", "/user/schedulingTask?paramUrl=slow&paramPort=8080", body, JSON)
        task_id = submitted.document["taskID"]
        pending = await net.call("GET", f"/user/queryTask&taskID={task_id}", token=None)
        assert (pending.document["result_code"], pending.document["result_size"]) == (100, 0)
        workspace.gate.set()
        assert (await net.poll(task_id))["data"] == '{"prompt": "cat"}'
        assert (await net.task(task_id))["verdict"] == "verified"
        named = await net.call("POST", "/user/train", b'{"epochs": 3}', JSON)
        assert (await net.poll(named.document["taskId"]))["data"] == '{"epochs": 3}'

    shared.run(part)


def test_events_arrive_one_by_one(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async with net.stream("GET", "/proxy/8080/events") as response:
            assert await response.receive() == b"data: 1\n\n"
            workspace.gate.set()
            assert await response.receive() == b"data: 2\n\n"
            assert await response.receive() == b""
            assert [name.lower() for name, _ in response.trailers] == [b"ngpu-receipt"]

    shared.run(part)


class WithTrailers:
    """A body of so many pieces, with trailers behind it."""

    trailers: ClassVar = [(b"x-checksum", b"abc"), (b"ngpu-token", b"1-secret"), (b"authorization", b"Bearer x")]

    def __init__(self, pieces: int) -> None:
        self.left = pieces

    def __aiter__(self) -> WithTrailers:
        return self

    async def __anext__(self) -> bytes:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return b"x" * 1000


@pytest.mark.parametrize("pieces", [1, 300])
def test_a_request_s_trailers_reach_the_workspace_but_for_credentials(shared: SharedNetwork, pieces: int) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async with net.stream("POST", "/proxy/8080/trailers", WithTrailers(pieces)) as response:
            said = await response.read(10_000)
        assert said == b"%d\nx-checksum: abc" % (pieces * 1000)

    shared.run(part)


def test_a_websocket_chats_and_is_receipted(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async with net.stream("GET", "/proxy/8080/chat", b"", WEBSOCKET) as response:
            assert response.status == 101
            task_id = next(value for name, value in response.headers if name == b"ngpu-task-id").decode()
            for word in (b"hello", b"again"):
                await response.upgraded.send_all(word)
                assert await response.upgraded.receive_some(100) == word.upper()
            await response.upgraded.send_eof()
            assert await response.upgraded.receive_some(100) == b"bye"
            assert await response.upgraded.receive_some(100) == b""
        view = await net.task(task_id, lambda view: view["verdict"] != "")
        assert (view["state"], view["status"], view["verdict"]) == (3, 101, "verified")

    shared.run(part)


@pytest.mark.parametrize("target", ["hang", "silent"])
def test_a_client_that_leaves_frees_the_workspace_within_a_second(shared: SharedNetwork, target: str) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        for _ in range(3):  # again, where the machine stood still for a time
            workspace.forget()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(net.call, "GET", f"/proxy/8080/{target}")
                await workspace.begun.wait()
                nursery.cancel_scope.cancel()
            left_s = trio.current_time()
            with trio.fail_after(25):
                await workspace.left.wait()
            took_s = trio.current_time() - left_s
            if took_s < 1:
                break
        assert took_s < 1

    shared.run(part)


def test_a_hundred_megabytes_each_way_in_constant_memory(shared: SharedNetwork) -> None:
    async def body() -> AsyncIterator[bytes]:
        left = BIG
        while left:
            piece = PIECE[:left]
            left -= len(piece)
            yield piece

    async def part(net: Network, workspace: Workspace) -> None:
        await net.call("GET", "/proxy/8080/big/1000000")
        before = [daemon.peak_rss_mb() for daemon in (net.bootstrap, net.nodes[0])]
        expected = hashlib.sha256(b"".join([PIECE] * (BIG // len(PIECE)) + [PIECE[: BIG % len(PIECE)]])).hexdigest()
        digest = hashlib.sha256()
        async with net.stream("GET", f"/proxy/8080/big/{BIG}") as response:
            while data := await response.receive():
                digest.update(data)
            assert response.received_bytes == BIG
        assert digest.hexdigest() == expected
        answer = await net.call("POST", "/proxy/8080/swallow", body(), [(b"content-length", b"%d" % BIG)])
        assert answer.document == {"bytes": BIG, "sha256": expected}
        await verified(net, answer)
        after = [daemon.peak_rss_mb() for daemon in (net.bootstrap, net.nodes[0])]
        for was, now in zip(before, after, strict=True):
            assert now - was < 30

    shared.run(part)


def test_a_workspace_that_breaks_is_told_from_one_that_answers(shared: SharedNetwork) -> None:
    async def until_taken(net: Network, target: str, body: bytes) -> Answered:
        # a node looks again before it trusts a workspace that broke, so calls are refused for a moment
        while True:
            answer = await net.call("POST", target, body)
            if answer.status != 503:
                return answer
            await trio.sleep(0.05)

    async def part(net: Network, workspace: Workspace) -> None:
        for target in ("break", "drop"):
            submitted = await until_taken(net, f"/user/schedulingTask?paramUrl={target}", b"{}")
            polled = await net.poll(submitted.document["taskID"])
            assert (polled["result_code"], polled["reason"]) == (502, "workspace_broke")
        answer = await until_taken(net, "/proxy/8080/drop", b"x")
        assert (answer.status, answer.document["reason"]) == (502, "workspace_broke")
        assert (await net.task(answer.task_id))["verdict"] == "verified"
        with pytest.raises(CUT):
            await until_taken(net, "/proxy/8080/break", b"x")

    shared.run(part)
