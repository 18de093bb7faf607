"""What programs on a node's machine get through it: calls that others run, looks at other peers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio.testing import trio_test

from ngpu_node import gateway
from ngpu_node.config import GatewaySettings
from ngpu_node.errors import NodeConfigurationError
from ngpu_node.gateway import AT_ONCE
from ngpu_protocol.http1 import BoundAddress, Exchange, Handler, serve_tcp
from tests.integration.node.scripted_bootstrap import RunningNode, a_bootstrap, a_node, settings
from tests.unit.node.builders import NODE, STRANGER

TOKEN = "100000000000000001-" + "5e" * 24
CHAT = {"project": "Demo", "model": "Small-7B", "messages": [{"role": "user", "content": "hé"}]}


class FrontOfABootstrap:
    """A bootstrap's HTTP interface of which the test decides every answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answer: Callable[[Exchange], Any] | None = None

    async def handle(self, exchange: Exchange) -> None:
        headers = {name.decode(): value.decode("latin-1") for name, value in exchange.request.headers}
        body = await exchange.receive_all(10_000_000)
        self.requests.append((exchange.request.method, exchange.request.target, headers, body))
        if self.answer is not None:
            await self.answer(exchange)
        else:
            await exchange.respond(200, [(b"content-type", b"application/json"), (b"ngpu-task-id", b"t1")], b'{"a": 1}')


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[BoundAddress]:
    async with trio.open_nursery() as nursery:
        (address, *_) = await nursery.start(partial(serve_tcp, handler))
        yield address
        nursery.cancel_scope.cancel()


def gateway_to(folder: Path, url: object) -> dict[str, Any]:
    token_file = folder / "token"
    token_file.write_text(TOKEN + "\n")
    token_file.chmod(0o600)
    return {"gateway": {"bootstrap_url": f"http://{url}", "token_file": token_file}}


def program_at(node: RunningNode) -> httpx.AsyncClient:
    where = json.loads((node.data_dir / "node.json").read_text())
    return httpx.AsyncClient(base_url=where["models"], timeout=20, trust_env=False)


@asynccontextmanager
async def a_way_out(tmp_path: Path) -> AsyncIterator[tuple[FrontOfABootstrap, httpx.AsyncClient]]:
    front = FrontOfABootstrap()
    async with (
        serving(front.handle) as address,
        a_bootstrap() as bootstrap,
        a_node(settings(tmp_path / "node", bootstrap, **gateway_to(tmp_path, address))) as node,
        program_at(node) as program,
    ):
        yield front, program


@trio_test
async def test_a_call_becomes_the_owners_call_to_the_bootstrap(tmp_path: Path) -> None:
    async with a_way_out(tmp_path) as (front, program):
        answer = await program.post("/api/v0/chat/completion/proxy", json=CHAT)
        assert (answer.status_code, answer.json(), answer.headers["ngpu-task-id"]) == (200, {"a": 1}, "t1")
        method, target, headers, body = front.requests[-1]
        assert (method, target, json.loads(body)) == ("POST", "/v1/chat/completions", CHAT)
        assert headers["authorization"] == f"Bearer {TOKEN}"
        assert "ngpu-node" not in headers
        await program.post("/api/v0/chat/completion", json={**CHAT, "node_id": STRANGER.peer_id})
        _, target, headers, body = front.requests[-1]
        assert (target, headers["ngpu-node"], json.loads(body)) == ("/v1/chat/completions", STRANGER.peer_id, CHAT)
        await program.post("/api/v0/image/gen/proxy", json={"model": "SuperImage", "prompt": "otter"})
        assert front.requests[-1][1] == "/v1/images/generations"
        exact = b'{ "model":"m",\r\n "seed": 1e400, "seed": 2.50, "prompt":"\\u00e9" }'
        assert (await program.post("/api/v0/image/gen/proxy", content=exact)).status_code == 200
        assert front.requests[-1][3] == exact
        assert front.requests[-1][2]["accept-encoding"] == "identity"


@trio_test
async def test_a_form_goes_on_byte_for_byte(tmp_path: Path) -> None:
    async with a_way_out(tmp_path) as (front, program):
        fields = {"model": "SuperImage", "prompt": "a beret", "node_id": NODE.peer_id}
        request = program.build_request(
            "POST", "/api/v0/image/edit", data=fields, files={"image": bytes(range(256)) * 500}
        )
        sent = request.read()
        assert (await program.send(request)).status_code == 200
        _, target, headers, body = front.requests[-1]
        assert (target, body, headers["ngpu-node"]) == ("/v1/images/edits", sent, NODE.peer_id)
        assert headers["content-type"] == request.headers["content-type"]


@trio_test
async def test_a_stream_arrives_event_by_event(tmp_path: Path) -> None:
    read_on = trio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await read_on.wait()
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.end()

    async with a_way_out(tmp_path) as (front, program):
        front.answer = stream
        with trio.fail_after(60):
            async with program.stream("POST", "/api/v0/chat/completion/proxy", json={**CHAT, "stream": True}) as answer:
                pieces = answer.aiter_raw()
                assert b"data: 1" in await anext(pieces)
                read_on.set()
                assert b"[DONE]" in b"".join([piece async for piece in pieces])


@trio_test
async def test_an_answer_that_breaks_never_looks_whole(tmp_path: Path) -> None:
    kind = b"text/event-stream"

    async def broken(exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-type", kind)])
        await exchange.send(b"data: 1\n\n")
        await exchange.abort()

    async with a_way_out(tmp_path) as (front, program):
        front.answer = broken
        answer = await program.post("/api/v0/chat/completion/proxy", json={**CHAT, "stream": True})
        events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
        assert json.loads(events[-1])["code"] == 1018
        assert "[DONE]" not in answer.text
        kind = b"application/json"
        with pytest.raises(httpx.TransportError):
            await program.post("/api/v0/chat/completion/proxy", json=CHAT)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, {"error": {"message": "no such field", "type": "x"}}, 1001),
        (401, {"code": 401, "message": "who are you?"}, 1017),
        (404, {"error": {"message": "no model"}}, 1017),
        (503, {"reason": "no_node", "message": "no node"}, 1017),
        (504, {"message": "late"}, 1005),
        (502, {}, 1007),
    ],
)
@trio_test
async def test_the_bootstraps_errors_are_in_the_interfaces_words(
    tmp_path: Path, status: int, body: dict[str, Any], code: int
) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.respond_json(status, body)

    async with a_way_out(tmp_path) as (front, program):
        front.answer = refuse
        answer = await program.post("/api/v0/chat/completion/proxy", json=CHAT)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        words = body.get("message") or body.get("error", {}).get("message") or str(status)
        assert words in answer.json()["message"]
        assert TOKEN not in answer.text


@trio_test
async def test_bad_calls_never_leave_the_machine(tmp_path: Path) -> None:
    async with a_way_out(tmp_path) as (front, program):
        for content, fields, code in (
            (b"{", {}, 1002),
            (b"[]", {}, 1002),
            (json.dumps(CHAT).encode(), {}, 1001),  # without node_id
            (json.dumps({**CHAT, "node_id": "a/../b"}).encode(), {}, 1001),
            (json.dumps({**CHAT, "node_id": "\u0661"}).encode(), {}, 1001),  # a digit, and no ASCII
            (json.dumps({**CHAT, "node_id": 7}).encode(), {}, 1001),
            (json.dumps(CHAT).encode(), {"content-type": "text/\u00e9".encode("latin-1")}, 1001),
            (b"--x", {"content-type": "multipart/form-data; boundary=x"}, 1002),
        ):
            answer = await program.post("/api/v0/chat/completion", content=content, headers=fields)
            assert (answer.status_code, answer.json()["code"]) == (400, code), content
        page = await program.post(
            "/api/v0/chat/completion/proxy", json=CHAT, headers={"origin": "https://evil.example"}
        )
        assert page.status_code == 403
        assert front.requests == []


@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "amid the stream"])
@trio_test
async def test_a_program_that_leaves_ends_its_call_at_the_bootstrap(tmp_path: Path, begun: bool) -> None:
    asked, left = trio.Event(), trio.Event()

    async def wait(exchange: Exchange) -> None:
        try:
            if begun:
                await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
                await exchange.send(b"data: 1\n\n")
            asked.set()
            await trio.sleep_forever()
        finally:
            left.set()

    async def call(program: httpx.AsyncClient) -> None:
        async with program.stream("POST", "/api/v0/chat/completion/proxy", json={**CHAT, "stream": True}) as answer:
            async for _ in answer.aiter_raw():
                pass

    async with a_way_out(tmp_path) as (front, program):
        front.answer = wait
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, program)
                await asked.wait()
                assert not left.is_set()
                nursery.cancel_scope.cancel()
            await left.wait()


@trio_test
async def test_the_bootstraps_word_on_when_to_come_again_is_passed_on(tmp_path: Path) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.respond_json(429, {"error": {"message": "later"}}, [(b"retry-after", b"7")])

    async with a_way_out(tmp_path) as (front, program):
        front.answer = refuse
        answer = await program.post("/api/v0/chat/completion/proxy", json=CHAT)
        assert (answer.status_code, answer.json()) == (429, {"code": 1017, "message": "later"})
        assert answer.headers["retry-after"] == "7"


@trio_test
async def test_bodies_held_at_once_are_bounded_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_HELD_BYTES", 100_000)
    async with a_way_out(tmp_path) as (front, program):
        for _ in range(3):
            assert (await program.post("/api/v0/image/gen/proxy", json={"model": "m" * 60_000})).status_code == 200
        answer = await program.post("/api/v0/image/gen/proxy", json={"model": "m" * 110_000})
        assert (answer.status_code, answer.json()["code"]) == (429, 1017)
        assert answer.headers["retry-after"]
        assert len(front.requests) == 3
        assert (await program.post("/api/v0/image/gen/proxy", json=CHAT)).status_code == 200


@trio_test
async def test_calls_at_once_are_bounded(tmp_path: Path) -> None:
    go_on, waiting = trio.Event(), 0

    async def wait(exchange: Exchange) -> None:
        nonlocal waiting
        waiting += 1
        await go_on.wait()
        await exchange.respond_json(200, {})

    async with a_way_out(tmp_path) as (front, program):
        front.answer = wait
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await program.post("/api/v0/chat/completion/proxy", json=CHAT)).status_code)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(ask)
                while waiting < AT_ONCE:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                late = await program.post("/api/v0/chat/completion/proxy", json=CHAT)
                assert (late.status_code, late.json()["code"]) == (429, 1017)
                go_on.set()
        assert statuses == [200] * AT_ONCE


@trio_test
async def test_projects_and_models_are_those_here_and_those_of_the_bootstrap(tmp_path: Path) -> None:
    async def listed(exchange: Exchange) -> None:
        data = [{"id": "Far-70B", "model": "Far-70B", "project": "Far"}, {"id": "Big", "project": "Demo"}, 5, {}]
        await exchange.respond_json(200, {"object": "list", "data": data})

    async def healthy(exchange: Exchange) -> None:
        await exchange.respond(200, [])

    async with a_way_out(tmp_path) as (front, program), serving(healthy) as server:
        front.answer = listed
        one = {"project": "Demo", "model": "Small-7B", "api": f"http://{server}/v1"}
        assert (await program.post("/api/v0/ai/model/register", json=one)).status_code == 200
        assert (await program.get("/api/v0/ai/projects/list")).json() == {"data": ["Demo", "Far"]}
        listed_models = await program.get("/api/v0/ai/projects/models?project=Demo")
        assert listed_models.json() == {"data": ["Big", "Small-7B"]}
        assert len(front.requests) == 1, "a list is good for some seconds"


@trio_test
async def test_without_a_bootstrap_to_call_it_says_what_to_do(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap:
        async with a_node(settings(tmp_path / "a", bootstrap)) as node, program_at(node) as program:
            answer = await program.post("/api/v0/chat/completion/proxy", json=CHAT)
            assert (answer.status_code, answer.json()["code"]) == (503, 1017)
            assert "[gateway]" in answer.json()["message"]
            assert (await program.get("/api/v0/ai/projects/list")).json() == {"data": []}
        out_of_reach = gateway_to(tmp_path, "127.0.0.1:1")
        async with a_node(settings(tmp_path / "b", bootstrap, **out_of_reach)) as node, program_at(node) as program:
            answer = await program.post("/api/v0/chat/completion/proxy", json=CHAT)
            assert (answer.status_code, answer.json()["code"]) == (503, 1017)


def test_the_token_is_sent_in_clear_to_this_machine_alone(tmp_path: Path) -> None:
    for url in ("http://bootstrap.example.org", "http://10.0.0.1:8080", "http://user@127.0.0.1"):
        with pytest.raises(ValueError, match=r"in clear|not the address"):
            GatewaySettings(bootstrap_url=url, token_file=tmp_path / "token")
    for url in ("https://bootstrap.example.org", "http://localhost:8080", "http://[::1]:8080"):
        GatewaySettings(bootstrap_url=url, token_file=tmp_path / "token")


def test_a_token_others_may_read_is_refused(tmp_path: Path) -> None:
    chosen = settings(tmp_path, **gateway_to(tmp_path, "127.0.0.1:1")).gateway
    assert chosen.token() == TOKEN
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(NodeConfigurationError, match="chmod 600"):
        chosen.token()
    (tmp_path / "token").unlink()
    with pytest.raises(NodeConfigurationError, match="cannot read"):
        chosen.token()


@trio_test
async def test_peers_are_looked_at_without_a_bootstraps_help(tmp_path: Path) -> None:
    async def healthy(exchange: Exchange) -> None:
        await exchange.respond(200, [])

    async with (
        a_bootstrap() as bootstrap,
        serving(healthy) as server,
        a_node(settings(tmp_path / "a", bootstrap, discovery={"serve": "always"})) as near,
        program_at(near) as program,
    ):
        where = json.loads((near.data_dir / "node.json").read_text())
        far_settings = settings(tmp_path / "b", discovery={"peers": where["multiaddrs"][:1], "serve": "always"})
        async with a_node(far_settings, STRANGER) as far, program_at(far) as other:
            one = {"project": "Demo", "model": "Small-7B", "api": f"http://{server}/v1", "cid": "gpu-0"}
            assert (await other.post("/api/v0/ai/model/register", json=one)).status_code == 200

            async def found() -> list[dict[str, Any]]:
                path = "/api/v0/ai/projects/peers?project=Demo&model=Small-7B"
                data: list[dict[str, Any]] = (await program.get(path)).json()["data"]
                return data

            with trio.fail_after(60):
                while not await found():  # noqa: ASYNC110
                    await trio.sleep(0.2)
                while True:
                    offered = await program.post("/api/v0/ai/project/peer", json={"node_id": STRANGER.peer_id})
                    if offered.status_code == 200 and offered.json()["data"]:
                        break
                    await trio.sleep(0.2)
            assert [peer["node_id"] for peer in await found()] == [STRANGER.peer_id]
            expected = {"model": "Small-7B", "api": "", "type": 0, "cid": "", "idle": 1}
            assert offered.json()["data"] == {"Demo": [expected]}
            own = await other.post("/api/v0/ai/project/peer", json={"node_id": STRANGER.address})
            assert own.json()["data"]["Demo"][0] == {**expected, "api": one["api"], "cid": "gpu-0"}
            about = (await program.post("/api/v0/peer", json={"node_id": STRANGER.peer_id})).json()["data"]
            assert (about["node"], about["agent_version"].partition("/")[0]) == (STRANGER.address, "ngpu-node")
            machine = (await program.post("/api/v0/host/info", json={"node_id": NODE.peer_id})).json()["data"]
            assert machine["cpu"]["cores"] > 0
            assert machine["memory_bytes"] > 0
            assert machine["os"]
            connected = (await program.get("/api/v0/swarm/peers")).json()["data"]
            assert {peer["node_id"] for peer in connected} >= {STRANGER.peer_id}
            assert {peer["direction"] for peer in connected} <= {"inbound", "outbound"}
            assert STRANGER.peer_id in (await program.get("/api/v0/peers")).json()["data"]
        for node_id, status, code in (("nobody", 400, 1001), ("0x" + "12" * 20, 404, 1017)):
            answer = await program.post("/api/v0/host/info", json={"node_id": node_id})
            assert (answer.status_code, answer.json()["code"]) == (status, code)
