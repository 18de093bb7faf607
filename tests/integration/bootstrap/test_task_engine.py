"""Tasks while they live: cancelled at their nodes, shown as they run, followed, asked for twice, called back."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import trio

from ngpu_bootstrap.dispatch import detached
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.errors import StoreUnavailable
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.http1 import Exchange, header, serve_tcp
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

Test = Callable[[Bootstrap, ScriptedNode], Awaitable[None]]


def run(tmp_path: Path, test: Test, *, concurrency: int = 64, **settings: Any) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        workspace = {**WORKSPACE, "concurrency": concurrency}
        async with (
            running(settings_for(tmp_path / "bootstrap", **settings), workspace=workspace) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            with trio.fail_after(60):
                await test(bootstrap, node)

    trio.run(main)


async def submit(bootstrap: Bootstrap, data: str = "x", headers: Any = None, api: str = "train") -> str:
    answer = await bootstrap.call("POST", f"/user/{api}", json.dumps({"data": data}).encode(), headers)
    assert answer.status == 200, answer.body
    return str(json.loads(answer.body)["taskId"])


class Holding:
    """A workspace that answers when it is told, and whose node ends it when it is cancelled."""

    def __init__(self, node: ScriptedNode) -> None:
        self.node = node
        self.begun = trio.Event()
        self.gate = trio.Event()
        self.deleted: list[str] = []
        self.cancelled = trio.Event()
        node.script = self
        node.kept = self  # type: ignore[assignment]

    def get(self, key: str) -> Callable[[Asked], Awaitable[None]]:
        return partial(self.asked, key)

    async def __call__(self, asked: Asked) -> None:
        await asked.read()
        self.begun.set()
        async with trio.open_nursery() as nursery:

            async def first(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(first, self.gate)
            nursery.start_soon(first, self.cancelled)
        if self.cancelled.is_set():
            await self.instead(asked)
        else:
            await asked.answer(200, b"done")

    async def instead(self, asked: Asked) -> None:
        """Answer as a node does whose attempt was cancelled before the workspace said anything."""
        receipt = asked.receipt(0, b"", outcome="cancelled")
        fields = [(b"content-type", b"application/json"), (b"ngpu-error", b"cancelled")]
        await asked.exchange.send_head(503, fields)
        await asked.exchange.send(b'{"reason": "cancelled", "message": "the bootstrap cancelled it"}')
        await asked.exchange.end([(b"ngpu-receipt", receipt.encode().encode())])

    async def asked(self, key: str, asked: Asked) -> None:
        if asked.exchange.request.method == "DELETE":
            self.deleted.append(key)
            if self.cancelled.is_set():  # it has ended: its answer is kept
                asked.body = b"x"
                await self.instead(asked)
                return
            self.cancelled.set()
        await asked.exchange.respond_json(202, {"state": "running", "session": self.node.session.hex()})


def test_a_task_that_waits_is_cancelled_and_never_reaches_a_node(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        first = await submit(bootstrap)
        await hold.begun.wait()
        waiting = await submit(bootstrap)
        refused = await bootstrap.call("DELETE", f"/api/v1/tasks/{waiting}", token=None)
        assert refused.status == 401
        answer = await bootstrap.call("DELETE", f"/api/v1/tasks/{waiting}")
        view = json.loads(answer.body)
        assert (answer.status, view["state"], view["reason"]) == (200, 5, "cancelled")
        again = await bootstrap.call("DELETE", f"/api/v1/tasks/{waiting}")
        assert (again.status, json.loads(again.body)["state"]) == (200, 5)
        polled = await bootstrap.call("GET", f"/user/queryTask?taskID={waiting}")
        assert json.loads(polled.body)["state"] == 5
        hold.gate.set()
        await task_when(bootstrap, first, lambda view: view["state"] == 3)
        assert [one.order.task_id for one in node.orders] == [first]
        unknown = await bootstrap.call("DELETE", "/api/v1/tasks/20260102_03_04_05_00000000000000000009")
        assert unknown.status == 404

    run(tmp_path, test, concurrency=1)


def test_a_detached_task_is_cancelled_at_its_node_and_its_receipt_says_so(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        task_id = await submit(bootstrap)
        await hold.begun.wait()
        answer = await bootstrap.call("DELETE", f"/api/v1/tasks/{task_id}")
        assert answer.status in (200, 202)
        view = await task_when(bootstrap, task_id, lambda view: view["state"] == 5)
        assert hold.deleted[0] == f"{task_id}/1"
        assert (view["reason"], view["verdict"], len(node.orders)) == ("cancelled", "verified", 1)
        assert view["receipts"][0]["outcome"] == "cancelled"

    run(tmp_path, test)


def test_a_call_that_is_waited_for_is_cancelled_at_its_node(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        answers: list[Any] = []

        async def call() -> None:
            answers.append(await bootstrap.call("POST", "/user/draw", b'{"data": "x"}'))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await hold.begun.wait()
            [order] = node.orders
            await bootstrap.call("DELETE", f"/api/v1/tasks/{order.order.task_id}")
        document = json.loads(answers[0].body)
        assert (answers[0].status, document["reason"]) == (499, "cancelled")
        view = await task_when(bootstrap, order.order.task_id, lambda view: view["state"] == 5)
        assert view["receipts"][0]["outcome"] == "cancelled"
        assert len(node.orders) == 1

    run(tmp_path, test)


def test_a_task_to_be_cancelled_is_cancelled_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        hold = Holding(node)
        settings = settings_for(tmp_path / "bootstrap")
        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            known = (bootstrap.workspace, bootstrap.token)
            task_id = await submit(bootstrap)
            await hold.begun.wait()
        engine = open_engine(tmp_path / "bootstrap" / "bootstrap.db")
        with engine.begin() as connection:
            connection.execute(sa.update(tables.tasks).values(cancel_asked_at_ms=1))
        engine.dispose()
        node.welcome = None
        async with running(settings, known=known) as bootstrap, connected(node, bootstrap.multiaddr):
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 5)
            assert (view["reason"], len(node.orders), hold.deleted[0]) == ("cancelled", 1, f"{task_id}/1")

    trio.run(main)


def test_a_promised_task_outlives_a_fault_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, faults = Store.begin_attempt, iter([StoreUnavailable("the disk is full")])

    async def failing(store: Store, *arguments: Any, **named: Any) -> None:
        for fault in faults:
            raise fault
        await begin(store, *arguments, **named)

    monkeypatch.setattr(Store, "begin_attempt", failing)
    monkeypatch.setattr(detached, "LEFT_S", 0.1)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        task_id = await submit(bootstrap)
        view = await task_when(bootstrap, task_id, lambda view: view["state"] >= 3)
        assert (view["state"], view["attempts"][0]["attempt"], len(node.orders)) == (3, 1, 1)
        assert next(faults, None) is None

    run(tmp_path, test)


def test_what_lasts_is_shown_as_running_and_followed_to_its_end(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        first = await submit(bootstrap)
        await hold.begun.wait()
        second = await submit(bootstrap, "second")
        third = await submit(bootstrap, "third")
        events: list[tuple[str, dict[str, Any]]] = []
        async with bootstrap.stream("GET", f"/api/v1/tasks/{third}/events") as response:
            assert header(response.headers, b"content-type").startswith(b"text/event-stream")
            async for name, data in events_of(response):
                events.append((name, data))
                if name == "position" and data["position"] == 1:
                    await task_when(bootstrap, first, lambda view: view["state"] == 2)
                    hold.gate.set()
                if name == "end":
                    break
        states = [data["state"] for name, data in events if name == "state"]
        assert (states[0], states[-1]) == (0, 3)
        assert states == sorted(states)
        await task_when(bootstrap, second, lambda view: view["state"] == 3)

    run(tmp_path, test, concurrency=1)


async def events_of(response: Any) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    buffer = b""
    while data := await response.receive():
        buffer += data
        while b"\n\n" in buffer:
            event, _, buffer = buffer.partition(b"\n\n")
            fields = dict(line.split(b": ", 1) for line in event.splitlines() if not line.startswith(b":"))
            if fields:
                yield fields[b"event"].decode(), json.loads(fields[b"data"])


def test_a_key_belongs_to_one_call(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        key = [(b"idempotency-key", b"k")]
        answers: list[Any] = []

        async def call() -> None:
            answers.append(await bootstrap.call("POST", "/user/draw", b'{"data": "1"}', key))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await hold.begun.wait()
            nursery.start_soon(call)
            other = await bootstrap.call("POST", "/user/draw", b'{"data": "2"}', key)
            elsewhere = await bootstrap.call("POST", "/user/train", b'{"data": "1"}', key)
            hold.gate.set()
        for refused in (other, elsewhere):
            assert (refused.status, json.loads(refused.body)["reason"]) == (422, "idempotency_key_reused")
        first, second = (json.loads(answer.body) for answer in answers)
        assert first == second
        assert (first["data"], len(node.orders)) == ("done", 1)
        # a form sent again has another boundary, and is the same call
        said = []
        for boundary, content in ((b"A", b"x"), (b"another", b"x"), (b"A", b"y")):
            body = b'--%b\r\ncontent-disposition: form-data; name="n"\r\n\r\n%b\r\n--%b--\r\n'
            fields = [(b"idempotency-key", b"f"), (b"content-type", b"multipart/form-data; boundary=" + boundary)]
            answer = await bootstrap.call("POST", "/user/draw", body % (boundary, content, boundary), fields)
            said.append((answer.status, json.loads(answer.body).get("taskID")))
        assert said[0] == said[1]
        assert [status for status, _ in said] == [200, 200, 422]
        assert len(node.orders) == 2

    run(tmp_path, test)


def test_who_asks_again_gets_the_first_answer_whatever_has_become_of_the_gateway(tmp_path: Path) -> None:
    """The queue is full, then no node serves the workspace, then its policy asks what nobody can say."""
    key = [(b"idempotency-key", b"k")]

    async def main() -> None:
        settings = settings_for(tmp_path / "bootstrap", limits={"async_tasks": 1})
        async with running(settings) as bootstrap:

            async def ask(headers: Any) -> tuple[int, Any]:
                answer = await bootstrap.call("POST", "/user/train", b'{"data": "x"}', headers)
                document = json.loads(answer.body)
                return answer.status, document.get("taskId", document.get("reason"))

            node = ScriptedNode(new_account())
            async with connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                hold = Holding(node)
                # calls that come together wait for one commit, and are counted before it
                met: list[tuple[int, Any]] = []

                async def meet() -> None:
                    met.append(await ask(None))

                async with trio.open_nursery() as nursery:
                    for _ in range(6):
                        nursery.start_soon(meet)
                assert Counter(status for status, _ in met) == {200: 1, 429: 5}
                hold.gate.set()
                (taken,) = (task_id for status, task_id in met if status == 200)
                await task_when(bootstrap, taken, lambda view: view["state"] == 3)
                hold = Holding(node)
                first = await submit(bootstrap, headers=key)
                await hold.begun.wait()
                assert await ask(None) == (429, "queue_full")
                assert await ask(key) == (200, first)
                hold.gate.set()
                await task_when(bootstrap, first, lambda view: view["state"] == 3)
            while True:  # until the node is gone
                if await ask(None) == (503, "no_node"):
                    break
                await trio.sleep(0.02)
            assert await ask(key) == (200, first)
            policy = {"mode": "require", "ticker": "AINN"}
            await bootstrap.admin("PUT", f"/api/v1/workspaces/{bootstrap.workspace}/brc20", policy)
            assert (await ask(None))[0] == 403
            assert await ask(key) == (200, first)
            assert len(node.orders) == 2

    with_limit(main)


def with_limit(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            await main()

    trio.run(limited)


BAD_OPTIONS = [
    (b"ngpu-priority", b"10", "bad_priority"),
    (b"ngpu-priority", "²".encode(), "bad_priority"),
    (b"ngpu-timeout", b"nan", "bad_timeout"),
    (b"ngpu-timeout", b"-1", "bad_timeout"),
    (b"ngpu-webhook", b"ftp://a.example/", "bad_webhook"),
    (b"ngpu-webhook", b"https://user:pw@a.example/", "bad_webhook"),
    (b"ngpu-webhook", b"https://192.168.1.1/", "bad_webhook"),
    (b"ngpu-webhook", b"http://a.example/", "bad_webhook"),
    (b"ngpu-webhook", b"https://[::ffff:10.0.0.1]/", "bad_webhook"),
]


def test_options_that_make_no_sense_are_refused_by_name(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        for field, value, reason in BAD_OPTIONS:
            answer = await bootstrap.call("POST", "/user/train", b"{}", [(field, value)])
            assert (answer.status, json.loads(answer.body)["reason"]) == (400, reason), value
        assert node.orders == []

    run(tmp_path, test)


def test_a_client_sets_a_shorter_time_and_a_priority(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        await submit(bootstrap)
        await hold.begun.wait()
        fields = [(b"ngpu-timeout", b"0.3"), (b"ngpu-priority", b"7")]
        view = await task_when(bootstrap, await submit(bootstrap, headers=fields), lambda view: view["state"] == 6)
        assert view["reason"] == "deadline"
        hold.gate.set()

    run(tmp_path, test, concurrency=1)


def test_a_higher_priority_goes_before_what_waits_for_the_same_workspace(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        hold = Holding(node)
        first = await submit(bootstrap)
        await hold.begun.wait()
        waiting = {
            priority: await submit(bootstrap, headers=[(b"ngpu-priority", b"%d" % priority)])
            for priority in (0, 3, 9, 5)
        }
        last = await submit(bootstrap)
        for task_id in (*waiting.values(), last):
            await task_when(bootstrap, task_id, lambda view: view["queue_position"] is not None)
        view = await task_when(bootstrap, waiting[5], lambda view: view["queue_position"] == 1)
        assert view["state"] == 0
        hold.gate.set()
        await task_when(bootstrap, last, lambda view: view["state"] == 3)
        ran = [signed.order.task_id for signed in node.orders]
        assert ran == [first, waiting[9], waiting[5], waiting[3], waiting[0], last]

    run(tmp_path, test, concurrency=1)


class Calls(list[tuple[dict[bytes, bytes], bytes]]):
    """What was called, fields and body each; *second* is set with the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.second = trio.Event()


@asynccontextmanager
async def listener(statuses: list[int]) -> AsyncIterator[tuple[str, Calls]]:
    """Run a client's web server; it answers with *statuses* in turn, then 200."""
    calls = Calls()

    async def handle(exchange: Exchange) -> None:
        body = await exchange.receive_all(10_000)
        calls.append((dict(exchange.request.headers), body))
        if len(calls) == 2:
            calls.second.set()
        await exchange.respond(statuses.pop(0) if statuses else 200, [], b"")

    async with trio.open_nursery() as nursery:
        [*_, bound] = await nursery.start(partial(serve_tcp, handler=handle, host="127.0.0.1", port=0))
        yield f"http://127.0.0.1:{bound.port}/hook?x=1", calls
        nursery.cancel_scope.cancel()


def test_the_end_of_a_task_is_told_signed_and_told_again_until_it_is_heard(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        async with listener([503]) as (url, calls):
            task_id = await submit(bootstrap, headers=[(b"ngpu-webhook", url.encode())])
            await calls.second.wait()
            token_hash = hashlib.sha256(b"ngpu credential\0" + bootstrap.token.encode()).digest()
            key = hmac.digest(token_hash, b"ngpu-webhook-v1", "sha256")
            for fields, body in calls:
                document = json.loads(body)
                assert (document["taskID"], document["state"], document["result_code"]) == (task_id, 3, 200)
                timestamp = fields[b"ngpu-webhook-timestamp"]
                assert abs(int(timestamp) - time.time()) < 60
                expected = hmac.new(key, timestamp + b"." + body, "sha256").hexdigest()
                assert fields[b"ngpu-webhook-signature"] == b"v1=" + expected.encode()
                assert fields[b"ngpu-webhook-id"] == task_id.encode()
            assert bootstrap.token.encode() not in b"".join(body for _, body in calls)

    run(tmp_path, test)


def test_a_clients_loopback_is_not_called_from_a_listener_others_reach(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        for url in (b"http://127.0.0.1:1/", b"http://localhost:1/", b"https://[::1]/"):
            answer = await bootstrap.call("POST", "/user/train", b"{}", [(b"ngpu-webhook", url)])
            assert json.loads(answer.body)["reason"] == "bad_webhook"

    run(tmp_path, test, behind_proxy=True)


def test_a_receipt_is_shown_after_its_task_was_removed(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        task_id = await submit(bootstrap)
        await task_when(bootstrap, task_id, lambda view: view["verdict"] == "verified")
        before = json.loads((await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/receipt")).body)
        engine = open_engine(bootstrap.data_dir / "bootstrap.db")
        with engine.begin() as connection:
            order = connection.execute(sa.select(tables.attempts.c.signed_order)).scalar_one()
            connection.execute(sa.update(tables.receipts).values(signed_order=order))
            connection.execute(sa.delete(tables.tasks))
        engine.dispose()
        after = await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/receipt", token=None)
        assert json.loads(after.body) == before
        assert (await bootstrap.call("GET", f"/api/v1/tasks/{task_id}")).status == 404

    run(tmp_path, test)
