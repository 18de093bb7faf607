"""Model servers: who may register, what is offered, what a restart remembers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.errors import NodeConfigurationError, StateUnavailable
from ngpu_node.gateway import Gateway
from ngpu_node.model_api import ModelApi
from ngpu_node.model_lists import ListedModel, models_in
from ngpu_node.peer_calls import PeerCalls
from ngpu_node.probes import Silence, probe
from ngpu_node.services import BUSY_S, LIST_EVERY_S, ModelServers, Registration, RegistrationRefused, is_only_busy
from ngpu_protocol.control import DeploymentPhase, ServiceOffer
from ngpu_protocol.http1 import Client, Exchange, Headers, serve_tcp, tcp_opener
from ngpu_protocol.workspaces import WorkspaceSpec


class ModelServer:
    """A model server whose health and list of models the test decides; `kill` ends it."""

    def __init__(self) -> None:
        self.status = 200
        self.lists: bytes | None = None
        self.port = 0
        self._scope = trio.CancelScope()

    async def handle(self, exchange: Exchange) -> None:
        if exchange.request.path == "/v1/models" and self.lists is not None:
            await exchange.respond(200, [], self.lists)
        else:
            await exchange.respond(self.status, [], b"model")

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            (address, *_) = await nursery.start(partial(serve_tcp, self.handle, port=self.port))
            self.port = address.port
            self._scope = nursery.cancel_scope
            task_status.started()

    def kill(self) -> None:
        self._scope.cancel()


@asynccontextmanager
async def servers(
    path: Path, *, interval_s: float = 0.05, **options: Any
) -> AsyncIterator[tuple[ModelServers, Deployments, trio.Nursery]]:
    changes = Changes()
    deployments = Deployments(changes)
    registry = ModelServers(path / "models.json", deployments, changes, **options)
    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(registry.run, interval_s=interval_s))
            await nursery.start(partial(deployments.run, images=registry, models=registry))
            yield registry, deployments, nursery
            nursery.cancel_scope.cancel()


def registration(port: int, **changes: Any) -> Registration:
    values = {"project": "Demo", "model": "Small-7B", "api": f"http://127.0.0.1:{port}/v1/chat/completions"}
    return Registration(**{**values, **changes})


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.01)


def spec(**changes: Any) -> WorkspaceSpec:
    values: dict[str, Any] = {"id": "7", "name": "chat", "service": "Demo/Small-7B", "ports": [8080]}
    return WorkspaceSpec(**{**values, **changes})


@trio_test
async def test_a_registered_server_is_offered_while_it_answers(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, _, nursery):
        server = ModelServer()
        await nursery.start(server.run)
        (copy,) = await registry.register(registration(server.port))
        assert copy.healthy
        assert registry.offers() == (ServiceOffer("Demo", "Small-7B", "text-to-text", 1),)
        server.kill()
        await until(lambda: registry.offers() == ())
        await nursery.start(server.run)
        await until(lambda: registry.offers() != ())
        assert registry.unregister("Demo", "Small-7B") == 1
        assert registry.offers() == ()
        assert registry.unregister("Demo") == 0


@trio_test
async def test_copies_are_told_apart_by_cid_and_the_least_busy_one_is_taken(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, deployments, nursery):
        pair = [ModelServer(), ModelServer()]
        for number, server in enumerate(pair):
            await nursery.start(server.run)
            await registry.register(registration(server.port, cid=str(number)))
        await registry.register(registration(pair[0].port, cid="0"))  # registering again replaces
        assert registry.offers() == (ServiceOffer("Demo", "Small-7B", "text-to-text", 2),)
        deployments.wish("acme", [spec()])
        (deployment,) = deployments.of_service("acme")
        await until(lambda: deployment.is_ready)
        first = deployment.upstream(8080)
        assert first is not None
        first.running += 1
        second = deployment.upstream(8080)
        assert second is not None
        assert {first.port, second.port} == {pair[0].port, pair[1].port}
        assert registry.unregister("Demo", "Small-7B", "1") == 1
        assert len(registry.copies()) == 1


@trio_test
async def test_a_deployment_follows_its_model_server(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, deployments, nursery):
        deployments.wish("acme", [spec()])
        (deployment,) = deployments.of_service("acme")
        await until(lambda: deployment.phase is DeploymentPhase.STARTING)
        assert "no model server registered as Demo/Small-7B" in deployment.detail
        assert deployment.upstream(8080) is None
        server = ModelServer()
        await nursery.start(server.run)
        await registry.register(registration(server.port))
        await until(lambda: deployment.is_ready)
        server.status = 503
        await until(lambda: deployment.phase is DeploymentPhase.UNHEALTHY)
        assert "503" in deployment.detail
        server.status = 404  # an answer, if not to this path
        await until(lambda: deployment.is_ready)
        deployments.wish("acme", [spec().model_copy(update={"replicas": 3, "name": "renamed"})])
        assert deployment.is_ready
        assert deployment.spec.replicas == 3
        deployments.wish("acme", [])
        await until(lambda: deployments.of_service("acme") == [])
        assert deployment.phase is DeploymentPhase.GONE


@trio_test
async def test_calls_go_where_the_copies_registered_them_and_no_further(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, deployments, nursery):
        pair = [ModelServer(), ModelServer()]
        for server in pair:
            await nursery.start(server.run)
        await registry.register(registration(pair[0].port, api=f"http://127.0.0.1:{pair[0].port}/llm/v1"))
        await registry.register(registration(pair[1].port, cid="1", paths=("/own/",)))
        deployments.wish("acme", [spec()])
        (deployment,) = deployments.of_service("acme")
        await until(lambda: deployment.is_ready)
        assert deployment.route is not None
        found = {}
        for _ in pair:
            route = deployment.route("POST", "/v1/chat/completions")
            assert route is not None
            route[0].running += 1
            found[route[0].port] = route[1]
        assert found == {pair[0].port: "/llm/v1/chat/completions", pair[1].port: "/v1/chat/completions"}
        declared = deployment.route("GET", "/own/x")
        assert declared is not None
        assert (declared[0].port, declared[1]) == (pair[1].port, "/own/x")
        assert deployment.route("GET", "/slots") is None
        pair[1].kill()
        await until(lambda: len(registry.healthy("Demo", "Small-7B")) == 1)
        assert deployment.route("GET", "/own/x") == (None, "/own/x"), "later, not never"
        assert deployment.route("GET", "/slots") is None


def test_a_server_that_works_on_a_call_may_be_silent_for_a_while() -> None:
    silent = Silence("no HTTP answer on port 8000 within 3 s")
    assert is_only_busy(silent, 1, BUSY_S - 1)
    assert not is_only_busy(silent, 1, BUSY_S)  # it hangs, with its calls
    assert not is_only_busy(silent, 0, 1)
    assert not is_only_busy("nothing listens on port 8000", 1, 1)


@trio_test
async def test_a_doubted_server_is_looked_at_now_and_withdrawn_only_if_it_is_dead(tmp_path: Path) -> None:
    async with servers(tmp_path, interval_s=3600) as (registry, _, nursery):
        server = ModelServer()
        await nursery.start(server.run)
        await registry.register(registration(server.port))
        registry.doubt()
        await trio.sleep(0.1)
        assert registry.offers() != ()
        server.kill()
        await trio.sleep(0.1)
        assert registry.offers() != ()
        registry.doubt()
        await until(lambda: registry.offers() == ())


@trio_test
async def test_registrations_survive_a_restart(tmp_path: Path) -> None:
    server = ModelServer()
    async with trio.open_nursery() as outer:
        await outer.start(server.run)
        async with servers(tmp_path) as (registry, _, _):
            await registry.register(registration(server.port, type=1, cid="gpu0"))
        async with servers(tmp_path) as (registry, _, _):
            await until(lambda: registry.offers() != ())
            assert registry.copies()[0].registration == registration(server.port, type=1, cid="gpu0")
        assert (tmp_path / "models.json").stat().st_mode & 0o077 == 0
        outer.cancel_scope.cancel()


@pytest.mark.parametrize(
    "changes",
    [
        {"api": "http://192.0.2.1:8000/v1"},
        {"api": "http://example.com/v1"},
        {"api": "https://127.0.0.1/v1"},
        {"api": "ftp://127.0.0.1/"},
        {"api": "http://127.0.0.1:99999/"},
        {"api": "http://user:pass@127.0.0.1/"},
        {"api": "http://127.0.0.1:0/"},
        {"api": "http://[::1"},
        {"api": ""},
        {"project": ""},
        {"api": "http://169.254.169.254/latest/meta-data"},
        {"api": "http://[::ffff:169.254.169.254]/"},
        {"api": "http://[::ffff:10.0.0.1]:80/"},
        {"api": "http://[fe80::1%25eth0]:8000/"},
        {"api": "http://[::]:8000/"},
        {"api": "http://2130706433:8000/"},
        {"api": "http://0x7f.1:8000/"},
        {"api": "http://a-name-of-127.0.0.1.example:8000/"},
        {"api": "http://127.0.0.1:8000@10.0.0.1/"},
        {"api": "http://10.0.0.1#@127.0.0.1/"},
        {"project": "a/b"},
        {"model": "a/"},
        {"model": "/a"},
        {"model": "x" * 300},
        {"model": "bad\nname"},
        {"cid": "x" * 300},
        {"type": -1},
        {"type": 256},
        {"model": "\u00fc" * 129},
        {"model": "half a \ud800"},
        {"cid": "\x1b[2J"},
        {"api": "http://127.0.0.1:8000/\x1b[2J"},
        {"api": "http://127.0.0.1:8000/v1/\nchat"},
        {"api": "http://127.0.0.1:8000/b\u00fccher"},
        {"paths": ("/a/../b",)},
        {"paths": ("own",)},
        {"paths": ("/x",) * 65},
    ],
)
def test_registrations_that_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    async def main() -> None:
        async with servers(tmp_path) as (registry, _, _):
            with pytest.raises(RegistrationRefused):
                await registry.register(registration(8000, **changes))
            assert registry.copies() == []

    trio.run(main)


@trio_test
async def test_the_owners_list_allows_hosts_beyond_loopback_and_dropping_one_drops_its_registrations(
    tmp_path: Path,
) -> None:
    async with servers(tmp_path, allowed_hosts=["192.0.2.1:8000"]) as (registry, _, _):
        with trio.move_on_after(0.01):
            await registry.register(registration(1, api="http://192.0.2.1:8000/v1"))
        with pytest.raises(RegistrationRefused):
            await registry.register(registration(1, api="http://192.0.2.1:8001/v1"))
    (tmp_path / "models.json").write_text(
        json.dumps({"registrations": [{"project": "p", "model": "m", "api": "http://192.0.2.1:8000/v1"}]})
    )
    async with servers(tmp_path) as (registry, _, _):
        assert registry.copies() == []


def test_a_damaged_file_of_registrations_is_named(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text("{")
    with pytest.raises(NodeConfigurationError, match=r"models\.json"):
        ModelServers(tmp_path / "models.json", Deployments(Changes()), Changes())


@trio_test
async def test_probes_want_an_http_answer() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def babbling(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2\r\n")
        await stream.aclose()

    async def rubbish(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nno field\r\n\r\n{}")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        found = []
        for handler in (silent, babbling, rubbish):
            listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            found.append(await probe("127.0.0.1", listeners[0].socket.getsockname()[1], timeout_s=0.1))
        assert found[0] is not None
        assert isinstance(found[0], Silence)
        assert "within 0.1 s" in found[0]
        assert found[1] is not None
        assert "no HTTP answer" in found[1]
        assert found[2] is not None
        assert "that could be passed on" in found[2]
        nowhere = await probe("127.0.0.1", 1)
        assert nowhere is not None
        assert "nothing listens" in nowhere
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("lists", "found", "remark"),
    [
        (b'{"object": "list", "data": [{"id": "Small-7B", "object": "model"}]}', ["Small-7B"], ""),
        (b'{"project": "Demo", "data": [{"model": "Small-7B", "url": "http://x"}]}', ["Small-7B"], ""),
        (b'{"data": [{"id": "meta/small"}]}', ["meta/small"], "the server lists meta/small, not Small-7B"),
        (b'{"data": []}', [], "the server lists no model, not Small-7B"),
        (b"model", None, ""),
        (None, None, ""),
    ],
)
@trio_test
async def test_a_servers_own_list_is_read_where_it_has_one(
    tmp_path: Path, lists: bytes | None, found: list[str] | None, remark: str
) -> None:
    async with servers(tmp_path) as (registry, _, nursery):
        server = ModelServer()
        server.lists = lists
        await nursery.start(server.run)
        await registry.register(registration(server.port, cid="gpu-0"))
        (shown,) = registry.described()
        assert (shown["lists"], shown["detail"], shown["healthy"]) == (found, remark, True)
        assert (shown["cid"], shown["type"]) == ("gpu-0", "text-to-text")


@trio_test
async def test_a_list_of_a_hundred_megabytes_is_not_read_and_names_no_terminal_can_show_are_left_out(
    tmp_path: Path,
) -> None:
    sent = 0

    async def huge(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send_head(200, [(b"content-type", b"application/json")])
        while sent < 100_000_000:
            await exchange.send(bytes(65536))
            sent += 65536
        await exchange.end()

    async with servers(tmp_path) as (registry, _, nursery):
        (address, *_) = await nursery.start(partial(serve_tcp, huge))
        (copy,) = await registry.register(registration(address.port))
        assert (copy.healthy, copy.lists) == (True, None)
        assert sent < 20_000_000  # what fits the sockets' buffers
    listed = models_in(
        b'{"data": [{"id": "\\ud800"}, {"id": "a\\u001b[2J"}, {"id": "b", "project": "\\u202e"}, {"id": "c"}]}'
    )
    assert listed == (ListedModel("", "c"),)


@given(st.binary(max_size=64) | st.from_type(dict).map(lambda value: json.dumps(value, default=str).encode()))
def test_any_bytes_are_a_list_of_models_or_none(body: bytes) -> None:
    listed = models_in(body)
    assert listed is None or all(isinstance(one.project, str) and one.model for one in listed)


def test_a_list_says_whose_a_model_is_for_each_or_for_all_and_is_read_so_far() -> None:
    entries = [{"model": "a"}, {"id": "b", "project": "Q"}, 5, {"model": ""}, {"model": 3}, {"id": "c" * 1000}]
    listed = models_in(json.dumps({"project": "P", "data": entries}).encode())
    assert listed == (ListedModel("P", "a"), ListedModel("Q", "b"), ListedModel("P", "c" * 256))
    assert models_in(b'{"data": [{"id": "a"}, {"id": "b"}]}', 1) == (ListedModel("", "a"),)


@trio_test
async def test_a_server_that_points_elsewhere_is_not_followed(tmp_path: Path) -> None:
    asked: list[str] = []

    async def elsewhere(exchange: Exchange) -> None:
        asked.append(exchange.request.target)
        await exchange.respond(200, [], b'{"data": [{"id": "Small-7B"}]}')

    async with servers(tmp_path) as (registry, _, nursery):
        (there, *_) = await nursery.start(partial(serve_tcp, elsewhere))

        async def redirects(exchange: Exchange) -> None:
            await exchange.respond(302, [(b"location", f"http://{there}/secret".encode())], b"")

        (address, *_) = await nursery.start(partial(serve_tcp, redirects))
        (copy,) = await registry.register(registration(address.port))
        assert copy.healthy
        assert copy.lists is None
        assert asked == []


@trio_test
async def test_a_project_is_registered_whole_or_not_at_all_and_never_with_this_nodes_own_port(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, _, nursery):
        server = ModelServer()
        await nursery.start(server.run)
        good, bad = registration(server.port), registration(server.port, model="other", api="http://10.0.0.1/")
        with pytest.raises(RegistrationRefused, match=r"10\.0\.0\.1"):
            await registry.register(good, bad)
        assert registry.copies() == []
        registry.keep_off([server.port])
        with pytest.raises(RegistrationRefused, match="this node's own"):
            await registry.register(good)
        registry.keep_off([])
        assert len(await registry.register(good, registration(server.port, model="other"))) == 2
        registry.keep_off([server.port])  # as after a restart with another configuration
        assert registry.copies() == []


@trio_test
async def test_a_server_that_says_the_same_again_keeps_its_connections_and_its_count(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, _, nursery):
        server = ModelServer()
        await nursery.start(server.run)
        (first,) = await registry.register(registration(server.port))
        first.upstream.running += 1
        (again,) = await registry.register(registration(server.port))
        assert again is first
        (other,) = await registry.register(registration(server.port, type=1))
        assert other is not first
        assert registry.offers() == (ServiceOffer("Demo", "Small-7B", "text-to-image", 1),)


@trio_test
async def test_a_server_that_registers_otherwise_serves_on_meanwhile(tmp_path: Path) -> None:
    async with servers(tmp_path, interval_s=3600) as (registry, _, nursery):
        server, other = ModelServer(), ModelServer()
        await nursery.start(server.run)
        await nursery.start(other.run)
        (first,) = await registry.register(registration(server.port))
        nursery.start_soon(registry.register, registration(server.port, type=1))
        while registry.copies() == [first]:
            await trio.lowlevel.checkpoint()
        (second,) = registry.copies()
        assert (second.healthy, second.asked_at_s) == (True, -LIST_EVERY_S), "before it is looked at"
        assert second.upstream is first.upstream
        (elsewhere,) = await registry.register(registration(other.port))
        assert elsewhere.upstream is not first.upstream
        assert registry._retired == [first.upstream]


@trio_test
async def test_a_registration_whose_caller_leaves_is_told_of_as_far_as_it_is_known(tmp_path: Path) -> None:
    asked = trio.Event()

    async def hangs(exchange: Exchange) -> None:
        if exchange.request.path == "/v1/models":
            asked.set()
            await trio.sleep_forever()
        await exchange.respond(200, [], b"")

    async with servers(tmp_path, interval_s=3600) as (registry, deployments, nursery):
        (address, *_) = await nursery.start(partial(serve_tcp, hangs))
        deployments.wish("acme", [spec()])
        (deployment,) = deployments.of_service("acme")
        await until(lambda: deployment.phase is DeploymentPhase.STARTING)
        with trio.CancelScope() as caller:
            nursery.start_soon(cancel_after, asked, caller)
            await registry.register(registration(address.port))
        assert caller.cancelled_caught
        await until(lambda: deployment.is_ready)


async def cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


@trio_test
async def test_a_registration_that_cannot_be_written_down_changes_nothing(tmp_path: Path) -> None:
    async with servers(tmp_path) as (registry, _, nursery):
        server = ModelServer()
        await nursery.start(server.run)
        (tmp_path / "models.draft").mkdir()
        with pytest.raises(StateUnavailable, match="cannot be written"):
            await registry.register(registration(server.port))
        assert registry.copies() == []
        (tmp_path / "models.draft").rmdir()
        await registry.register(registration(server.port))
        (tmp_path / "models.draft").mkdir()
        with pytest.raises(StateUnavailable):
            registry.unregister("Demo")
        assert len(registry.copies()) == 1


# -- the loopback calls ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def model_api(path: Path) -> AsyncIterator[tuple[Callable[..., Awaitable[tuple[int, Any]]], ModelServer]]:
    async with servers(path) as (registry, _, nursery):
        server = ModelServer()
        await nursery.start(server.run)
        # other peers are asked in tests/integration/node/test_network_calls.py
        api = ModelApi(registry, lambda: {"peer_id": "16Uiu2HA"}, cast(PeerCalls, None), Gateway(None, ""))
        (address, *_) = await nursery.start(partial(serve_tcp, api.handle))
        client = Client(tcp_opener("127.0.0.1", address.port), authority=str(address))

        async def call(method: str, target: str, body: Any = None, headers: Headers | None = None) -> tuple[int, Any]:
            raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
            async with client.request(method, target, headers, raw) as response:
                return response.status, json.loads(await response.read(100_000))

        yield call, server
        await client.aclose()


OK = (200, {"code": 0, "message": "ok"})


@trio_test
async def test_a_model_server_registers_lists_and_leaves(tmp_path: Path) -> None:
    async with model_api(tmp_path) as (call, server):
        api = f"http://localhost:{server.port}/v1/chat/completions"
        body = {"project": "Demo", "model": "Small-7B", "api": api, "type": 0, "cid": "a", "later_field": 1}
        assert await call("POST", "/api/v0/ai/model/register", body) == OK
        more = {"project": "Art", "models": [{"model": "x", "api": api, "type": 1}, {"model": "y", "api": api}]}
        assert await call("POST", "/api/v0/ai/project/register", more) == OK
        assert await call("GET", "/api/v0/ai/projects/list?number=10") == (200, {"data": ["Art", "Demo"]})
        assert await call("GET", "/api/v0/ai/projects/models?project=Art&number=1") == (200, {"data": ["x"]})
        assert await call("POST", "/api/v0/ai/project/unregister", {"project": "Art"}) == OK
        leave = {"project": "Demo", "model": "Small-7B", "cid": "a"}
        assert await call("POST", "/api/v0/ai/model/unregister", leave) == OK
        assert (await call("POST", "/api/v0/ai/model/unregister", leave))[0] == 404
        assert await call("GET", "/api/v0/id") == (200, {"peer_id": "16Uiu2HA"})


@trio_test
async def test_bad_calls_have_a_status_and_a_code(tmp_path: Path) -> None:
    async with model_api(tmp_path) as (call, _):
        register = "/api/v0/ai/model/register"
        for body, code in (
            (b"{", 1002),
            (b"[]", 1001),
            (b"[" * 100_000, 1002),
            ({}, 1001),
            ({"project": "a", "model": "b"}, 1001),
            ({"project": "a", "model": "b", "api": "http://10.0.0.1/"}, 1001),
        ):
            status, answer = await call("POST", register, body)
            assert (status, answer["code"]) == (400, code), body
            assert answer["message"]
        assert (await call("POST", register, b"x" * 300_000))[0] == 413
        assert (await call("GET", "/api/v0/nothing"))[0] == 404
        assert (await call("GET", "/api/v0/ai/projects/models"))[0] == 400


@trio_test
async def test_web_pages_are_kept_out(tmp_path: Path) -> None:
    async with model_api(tmp_path) as (call, server):
        body = {"project": "a", "model": "b", "api": f"http://127.0.0.1:{server.port}/"}
        for fields in (
            [(b"host", b"evil.example")],
            [(b"host", b"127.0.0.1.evil.example:80")],
            [(b"origin", b"https://evil.example")],
            [(b"origin", b"null")],
            [(b"sec-fetch-site", b"cross-site")],
            [(b"sec-fetch-site", b"same-site")],
        ):
            assert (await call("POST", "/api/v0/ai/model/register", body, fields))[0] == 403, fields
        for fields in (
            [(b"host", b"localhost:8000")],
            [(b"host", b"[::1]:8000")],
            [(b"origin", b"http://127.0.0.1:3")],
            [(b"sec-fetch-site", b"none")],
        ):
            assert await call("POST", "/api/v0/ai/model/register", body, fields) == OK
        # a picture in a page is asked for without an Origin; and no preflight is granted
        assert (await call("GET", "/api/v0/ai/projects/list", None, [(b"sec-fetch-site", b"cross-site")]))[0] == 403
        preflight = [(b"origin", b"https://evil.example"), (b"access-control-request-method", b"POST")]
        assert (await call("OPTIONS", "/api/v0/ai/model/register", None, preflight))[0] == 403


def test_a_deployment_repr_names_it() -> None:
    assert repr(Deployment("acme", spec())) == "Deployment(acme/7@1 queued)"
