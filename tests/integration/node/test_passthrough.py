"""Orders through the executor to a workspace and back: what passes, what is receipted, how each attempt can end."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.http1 import Exchange, Headers, IncompleteError, MaybeSentError
from ngpu_protocol.receipts import Outcome
from tests.integration.node.rig import GPU, Answer, a_rig, echo, eventually
from tests.unit.node.builders import NODE, SIBLING, STRANGER


def assert_complete(answer: Answer, status: int = 200) -> None:
    assert answer.receipt is not None, answer
    assert answer.verdict is not None
    assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
    receipt = answer.receipt.receipt
    assert (receipt.outcome, receipt.status, answer.status) == (Outcome.COMPLETE, status, status)


@trio_test
async def test_a_small_request_passes_and_is_receipted(tmp_path: Path) -> None:
    seen: list[tuple[str, str, Headers]] = []

    async def workspace(exchange: Exchange) -> None:
        seen.append((exchange.request.method, exchange.request.target, exchange.request.headers))
        body = await exchange.receive_all(1000)
        await exchange.respond(
            201, [(b"content-type", b"text/plain"), (b"x-a", b"1"), (b"x-a", b"2")], body[::-1], reason=b"Made"
        )

    async with a_rig(tmp_path, workspace) as rig:
        fields = [
            (b"host", b"models.example"),
            (b"x-b", b"3"),
            (b"connection", b"x-hop"),
            (b"x-hop", b"secret"),
            (b"ngpu-anything", b"ours"),
            (b"content-type", b"text/plain"),
        ]
        answer = await rig.ask("POST", "/a%20b?c=%2F&d", b"hello", fields)
        assert_complete(answer, 201)
        assert answer.body == b"olleh"
        assert [v for n, v in answer.headers if n == b"x-a"] == [b"1", b"2"]
        assert answer.field("ngpu-content-length") == "5"
        assert answer.field("transfer-encoding") == "chunked"
        ((method, target, headers),) = seen
        assert (method, target) == ("POST", "/a%20b?c=%2F&d")
        names = {name for name, _ in headers}
        assert (b"host", b"models.example") in headers
        assert (b"x-b", b"3") in headers
        assert not names & {b"ngpu-order", b"ngpu-anything", b"x-hop", b"expect", b"transfer-encoding"}
        assert answer.receipt is not None
        receipt = answer.receipt.receipt
        assert (receipt.sequence, receipt.node, receipt.gpus) == (1, NODE.address, (GPU,))
        assert receipt.reserved_gpu_ms <= receipt.duration_ms
        assert rig.attempts.state.running == 0
        assert rig.deployment.running == 0


@trio_test
async def test_a_workspace_cannot_forge_what_only_the_node_says(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        forged = [(b"ngpu-receipt", b"x"), (b"ngpu-refused", b"draining"), (b"ngpu-error", b"deadline")]
        await exchange.send_head(200, forged)
        await exchange.send(b"body")
        await exchange.end([(b"ngpu-receipt", b"y"), (b"x-checksum", b"1")])

    async with a_rig(tmp_path, workspace) as rig:
        answer = await rig.ask()
        assert_complete(answer)
        assert answer.field("ngpu-refused") is None
        assert answer.field("ngpu-error") is None
        assert answer.field("x-checksum") == "1"
        assert len([1 for name, _ in answer.headers if name == b"ngpu-receipt"]) == 1


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_an_answer_without_a_body_carries_the_receipt_in_its_head(tmp_path: Path, method: str, status: int) -> None:
    async def workspace(exchange: Exchange) -> None:
        length = [(b"content-length", b"12")] if status != 204 else []
        await exchange.send_head(status, [(b"etag", b'"a"'), *length])
        await exchange.end()

    async def main() -> None:
        async with a_rig(tmp_path, workspace) as rig:
            answer = await rig.ask(method, "/")
            assert_complete(answer, status)
            assert answer.body == b""
            assert answer.field("etag") == '"a"'
            if status != 204:
                assert answer.field("ngpu-content-length") == "12"
            # the connection is still good for the next
            assert_complete(await rig.ask(method, "/"), status)

    trio.run(main)


@trio_test
async def test_events_arrive_one_by_one(tmp_path: Path) -> None:
    go_on = [trio.Event() for _ in range(3)]

    async def workspace(exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        for number, event in enumerate(go_on):
            await exchange.send(b"data: %d\n\n" % number)
            await event.wait()
        await exchange.end()

    async with a_rig(tmp_path, workspace) as rig, rig.request(rig.order()) as response:
        for number, event in enumerate(go_on):
            assert await response.receive() == b"data: %d\n\n" % number
            event.set()
        assert await response.receive() == b""
        assert any(name == b"ngpu-receipt" for name, _ in response.trailers)


@trio_test
async def test_a_hundred_megabytes_pass_each_way_with_the_right_hash(tmp_path: Path) -> None:
    total = 100 * 1024 * 1024
    piece = bytes(range(256)) * 256

    async def workspace(exchange: Exchange) -> None:
        received = 0
        while data := await exchange.receive():
            received += len(data)
        await exchange.send_head(200, [(b"content-length", b"%d" % received)])
        for _ in range(received // len(piece)):
            await exchange.send(piece)
        await exchange.end()

    async def upload() -> object:
        for _ in range(total // len(piece)):
            yield piece

    async with a_rig(tmp_path, workspace) as rig:
        signed = rig.order()
        digest = hashlib.sha256()
        async with rig.request(signed, [(b"content-length", b"%d" % total)], upload()) as response:
            count = 0
            while data := await response.receive():
                digest.update(data)
                count += len(data)
        (receipt,) = await rig.receipts()
        assert (count, receipt.receipt.request_bytes, receipt.receipt.response_bytes) == (total, total, total)
        assert receipt.receipt.request_hash == receipt.receipt.response_hash == digest.digest()


@trio_test
async def test_an_early_answer_is_complete_only_once_the_request_is(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        await exchange.respond(413, [], b"too much for me")

    async with a_rig(tmp_path, workspace) as rig:
        answer = await rig.ask("POST", "/", b"x" * 3_000_000)
        assert_complete(answer, 413)
        assert answer.body == b"too much for me"


@trio_test
async def test_an_unreachable_workspace_is_answered_for_with_a_receipt(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo) as rig:
        nobody = rig.deployment.upstream(8080)
        assert nobody is not None
        nobody.port = 1
        await nobody.client.aclose()
        rig.deployment.upstream = lambda port: type(nobody)("127.0.0.1", 1, max_connections=2)
        answer = await rig.ask("POST", "/", b"abc")
        assert (answer.status, answer.field("ngpu-error")) == (502, "workspace_broke")
        assert answer.receipt is not None
        assert answer.verdict is not None
        assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
        receipt = answer.receipt.receipt
        assert (receipt.outcome, receipt.status, receipt.response_bytes) == (Outcome.WORKSPACE_BROKE, 0, 0)
        assert b"workspace_broke" in answer.body


@trio_test
async def test_a_workspace_that_breaks_off_ends_in_a_receipt_that_says_so(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        await exchange.send(b"half of it")
        await trio.sleep(0.05)
        await exchange.abort()

    async with a_rig(tmp_path, workspace) as rig:
        answer = await rig.ask()
        assert answer.receipt is not None
        assert answer.verdict is not None
        assert (answer.status, answer.body) == (200, b"half of it")
        assert answer.receipt.receipt.outcome == Outcome.WORKSPACE_BROKE
        assert answer.receipt.receipt.response_bytes == 10
        assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict


@trio_test
async def test_the_deadline_before_the_head_is_a_504_and_after_it_ends_the_body(tmp_path: Path) -> None:
    begun = False

    async def workspace(exchange: Exchange) -> None:
        nonlocal begun
        if exchange.request.target == "/cut":
            await exchange.send_head(200, [])
            await exchange.send(b"begun")
            await trio.sleep(0.05)  # so that it arrived
        begun = True
        await trio.sleep_forever()

    async with a_rig(tmp_path, workspace) as rig:
        for target, status in (("/late", 504), ("/cut", 200)):
            for given_ms in (300, 3_000, 20_000):  # more, where the machine had not begun by then
                begun = False
                answer = await rig.send(rig.order(target=target, deadline_ms=rig.order().order.issued_at_ms + given_ms))
                if begun:
                    break
            assert answer.receipt is not None
            assert answer.verdict is not None
            assert (answer.status, answer.receipt.receipt.outcome) == (status, Outcome.DEADLINE)
            assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
            assert answer.receipt.receipt.duration_ms < given_ms + 10_000
        assert rig.attempts.state.running == 0


@trio_test
async def test_a_client_that_leaves_ends_the_work_at_once_and_is_receipted(tmp_path: Path) -> None:
    gone = trio.Event()
    started = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        started.set()
        try:
            await exchange.send_head(200, [])
            while True:
                await exchange.send(b"tick")
                await trio.sleep(0.02)
        finally:
            gone.set()

    async with a_rig(tmp_path, workspace) as rig:
        async with rig.request(rig.order()) as response:
            await started.wait()
            await response.receive()
        with trio.fail_after(60):
            await gone.wait()
        await rig.settled()
        (receipt,) = await rig.receipts()
        assert (receipt.receipt.outcome, receipt.receipt.status) == (Outcome.CLIENT_GONE, 200)
        assert [written.signed for written in rig.undelivered] == [receipt]
        assert rig.attempts.state.running == 0


@trio_test
async def test_a_client_that_leaves_while_the_workspace_is_silent_is_noticed_too(tmp_path: Path) -> None:
    gone = trio.Event()
    started = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            gone.set()

    async with a_rig(tmp_path, workspace) as rig, trio.open_nursery() as nursery:

        async def ask() -> None:
            async with rig.request(rig.order()):
                raise AssertionError("there is no answer")

        nursery.start_soon(ask)
        await started.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(60):
            await gone.wait()
            await rig.settled()
            (receipt,) = await rig.receipts()
            assert (receipt.receipt.outcome, receipt.receipt.status) == (Outcome.CLIENT_GONE, 0)


@trio_test
async def test_a_body_over_the_limit_is_refused_when_announced_and_cut_when_not(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo, max_body_bytes=100_000) as rig:
        refused = await rig.ask("POST", "/", b"x" * 100_001)
        assert (refused.status, refused.field("ngpu-refused"), refused.receipt) == (413, "body_too_large", None)

        async def unannounced() -> object:
            for _ in range(20):
                yield b"x" * 10_000

        async with rig.request(rig.order(), None, unannounced()) as response:
            await response.read(10_000)
            assert response.status == 413
            assert (b"ngpu-error", b"limit") in response.headers
        (receipt,) = await rig.receipts()
        assert (receipt.receipt.outcome, receipt.receipt.status) == (Outcome.LIMIT, 0)
        assert receipt.receipt.request_bytes <= 100_000


@trio_test
async def test_refusals_reach_the_bootstrap_with_status_and_reason_and_nothing_reaches_the_workspace(
    tmp_path: Path,
) -> None:
    async def workspace(exchange: Exchange) -> None:
        raise AssertionError("nothing may come here")

    async with a_rig(tmp_path, workspace) as rig:
        for signed, status, reason in (
            (rig.order(STRANGER), 403, "unknown_bootstrap"),
            (rig.order(session=bytes(32)), 412, "wrong_session"),
            (rig.order(node=STRANGER.address), 421, "wrong_node"),
            (rig.order(deadline_ms=1), 410, "deadline_passed"),
            (rig.order(revision=9), 422, "order_mismatch"),
            (rig.order(workspace="8"), 404, "workspace_unknown"),
        ):
            answer = await rig.send(signed)
            assert (answer.status, answer.field("ngpu-refused"), answer.receipt) == (status, reason, None)
        async with rig.client.request("POST", "/ngpu/v1/workspaces/7/ports/8080/echo") as response:
            assert response.status == 400
            assert (b"ngpu-refused", b"malformed_order") in response.headers
        one = rig.order().encode().encode()
        twice = [(b"ngpu-order", one), (b"ngpu-order", one)]
        async with rig.client.request("POST", "/ngpu/v1/workspaces/7/ports/8080/echo", twice) as response:
            assert response.status == 400
        async with rig.client.request("GET", "/etc/passwd") as response:
            assert response.status == 404
        assert await rig.receipts() == []


@trio_test
async def test_an_order_is_run_once_and_its_slot_is_free_when_the_receipt_is_there(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo, concurrency=1) as rig:
        signed = rig.order()
        assert_complete(await rig.send(signed, body=b"once"))
        again = await rig.send(signed, body=b"once")
        assert (again.status, again.field("ngpu-refused")) == (409, "order_replayed")
        for _ in range(20):
            assert_complete(await rig.ask(body=b"next"))


@trio_test
async def test_a_full_deployment_refuses_and_serves_again(tmp_path: Path) -> None:
    release = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        if exchange.request.target == "/wait":
            await release.wait()
        await exchange.respond(200, [], b"ok")

    async with a_rig(tmp_path, workspace, concurrency=2) as rig, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(rig.ask, "GET", "/wait")
        await eventually(lambda: rig.deployment.running == 2)
        full = await rig.ask("GET", "/")
        assert (full.status, full.field("ngpu-refused")) == (429, "no_free_slot")
        release.set()
        await rig.settled()
        assert_complete(await rig.ask("GET", "/"))


@trio_test
async def test_draining_lets_running_attempts_finish_refuses_new_ones_and_cuts_after_the_grace(tmp_path: Path) -> None:
    release = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        if exchange.request.target == "/short":
            await release.wait()
            await exchange.respond(200, [], b"done")
        await trio.sleep_forever()

    async with a_rig(tmp_path, workspace) as rig, trio.open_nursery() as nursery:
        answers: dict[str, Answer] = {}

        async def ask(target: str) -> None:
            answers[target] = await rig.ask("GET", target)

        nursery.start_soon(ask, "/short")
        nursery.start_soon(ask, "/long")
        await eventually(lambda: rig.deployment.running == 2)
        nursery.start_soon(rig.attempts.drain, 2)
        await trio.sleep(0.05)
        refused = await rig.ask("GET", "/short")
        assert (refused.status, refused.field("ngpu-refused")) == (503, "draining")
        release.set()
        await eventually(lambda: len(answers) == 2)
        assert_complete(answers["/short"])
        long = answers["/long"]
        assert long.receipt is not None
        assert (long.status, long.receipt.receipt.outcome) == (503, Outcome.NODE_STOPPING)


@trio_test
async def test_a_kept_connection_the_workspace_closed_is_not_a_failure(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        await exchange.respond(200, [(b"connection", b"close")] if exchange.request.target == "/close" else [], b"ok")

    async with a_rig(tmp_path, workspace) as rig:
        for _ in range(5):
            assert_complete(await rig.ask("POST", "/close", b"x"))
            assert_complete(await rig.ask("POST", "/keep", b"x"))


@trio_test
async def test_an_upgraded_connection_passes_both_ways_and_is_receipted_without_a_trailer(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        stream = await exchange.upgrade([(b"upgrade", b"chat"), (b"sec-websocket-accept", b"k")])
        while data := await stream.receive_some(1000):
            await stream.send_all(data.upper())
            if data == b"bye":
                break
        await stream.aclose()

    async with a_rig(tmp_path, workspace) as rig:
        signed = rig.order(method="GET", target="/chat")
        fields = [(b"connection", b"Upgrade"), (b"upgrade", b"chat"), (b"sec-websocket-key", b"k")]
        async with rig.request(signed, fields) as response:
            assert response.status == 101
            assert (b"sec-websocket-accept", b"k") in response.headers
            stream = response.upgraded
            for word in (b"hello", b"again", b"bye"):
                await stream.send_all(word)
                assert await stream.receive_some(100) == word.upper()
            assert await stream.receive_some(100) == b""
        await rig.settled()
        (receipt,) = await rig.receipts()
        found = receipt.receipt
        assert (found.outcome, found.status) == (Outcome.COMPLETE, 101)
        assert (found.request_hash, found.request_bytes) == (hashlib.sha256(b"helloagainbye").digest(), 13)
        assert (found.response_hash, found.response_bytes) == (hashlib.sha256(b"HELLOAGAINBYE").digest(), 13)
        assert [written.signed for written in rig.undelivered] == [receipt]


@trio_test
async def test_a_refused_upgrade_is_an_answer_like_any_other(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        await exchange.respond(426, [], b"no websockets here")

    async with a_rig(tmp_path, workspace) as rig:
        answer = await rig.ask("GET", "/chat", b"", [(b"connection", b"upgrade"), (b"upgrade", b"websocket")])
        assert_complete(answer, 426)


@trio_test
async def test_a_sibling_bootstrap_may_bring_the_order_and_a_stranger_learns_nothing(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo) as rig:
        rig.peer = SIBLING.address
        assert_complete(await rig.ask(body=b"x"))
        await rig.client.aclose()
    async with a_rig(tmp_path / "other", echo) as rig:
        rig.peer = STRANGER.address
        answer = await rig.ask(body=b"x")
        assert (answer.status, answer.field("ngpu-refused")) == (403, "unknown_bootstrap")
        async with rig.client.request("GET", "/ngpu/v1/attempts/x/1") as response:
            assert response.status == 403
        async with rig.client.request("GET", "/.well-known/libp2p/protocols") as response:
            assert response.status == 200
            assert b"/ngpu/v1" in await response.read(1000)


@trio_test
async def test_without_a_receipt_no_answer_looks_complete(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo) as rig:
        assert_complete(await rig.ask(body=b"x"))
        rig.ledger._commits._connection.execute("PRAGMA query_only = ON")
        with pytest.raises((MaybeSentError, IncompleteError)):
            await rig.ask(body=b"y")
        assert rig.ledger.failed.is_set()
        assert rig.attempts.state.running == 0


@trio_test
async def test_a_client_that_leaves_while_the_node_drains_is_not_the_nodes_doing(tmp_path: Path) -> None:
    started = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        started.set()
        await trio.sleep_forever()

    async with a_rig(tmp_path, workspace) as rig, trio.open_nursery() as nursery:
        leaving = trio.CancelScope()

        async def leave() -> None:
            with leaving:
                await rig.ask("GET", "/")

        async def leaves_while_it_drains() -> None:
            await trio.sleep(0.1)
            leaving.cancel()

        nursery.start_soon(leave)
        await started.wait()
        nursery.start_soon(leaves_while_it_drains)
        with trio.fail_after(60):
            await rig.attempts.drain(100)
        (receipt,) = await rig.receipts()
        assert receipt.receipt.outcome == Outcome.CLIENT_GONE
