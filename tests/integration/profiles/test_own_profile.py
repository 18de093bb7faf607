"""An operator's own profile on real processes, bound and on a listener of its own, beside akashgen open to the public:
an envelope, calls held together by cookie or header, places in the queue, the end of the bootstrap.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from ngpu_protocol.http1 import Client, Exchange, Headers, HttpError, tcp_opener
from tests.integration.profiles.rig import receipt_of
from tests.integration.whole_path.rig import Answered, Network, SharedNetwork, free_port
from tests.integration.whole_path.workspace import Workspace

JSON = [(b"content-type", b"application/json")]
PICTURE = b"\x89PNG\r\n\x1a\nsmall"
PICTURE_REQUEST = {"prompt": "a lake", "sampler": "lcm", "scheduler": "beta"}
PUBLIC_CALLS = 12

PROFILE = """
name = "mine"
dialect = "code_msg_data"
workspace = "bound"
credentials = [{ in = "header", name = "X-Api-Key", scheme = "none" }, { in = "json", pointer = "/key" }]

[[routes]]
path = "/mine/wrapped"
target = "/document"
mode = "wrapped"
envelope = { member = "data", beside = { code = 0, msg = "ok" } }
schema = { type = "object", properties = { name = { type = "string", maxLength = 20, pattern = "^[a-z]*$" } } }

[[routes]]
path = "/mine/by/{how}"
target = "/echo?how={how}"
affinity = [{ in = "cookie", name = "sid" }, { in = "header", name = "X-Session" }]

[[routes]]
path = "/mine/slow"
target = "/slow"
at_once = 1
queue = 0

[[routes]]
method = "GET"
path = "/mine/files/{rest...}"
target = "/status/{rest...}"
"""


class Served(Workspace):
    """The workspace of both profiles."""

    async def do_document(self, exchange: Exchange) -> None:
        body = await exchange.receive_all(1 << 20)
        self.bodies.append(body)
        status = 418 if b"teapot" in body else 200
        await exchange.respond(status, JSON, b'{"pieces":[1,2]}')

    async def do_api(self, exchange: Exchange) -> None:
        path = exchange.request.path
        await exchange.receive_all(1 << 20)
        if path == "/api/generate":
            await exchange.respond(200, JSON, b'{"job_id":"j"}')
        elif path == "/api/status":
            state = "succeeded" if self.gate.is_set() else "processing"
            self.begun.set()
            await exchange.respond(200, JSON, json.dumps([{"status": state, "result": "/api/1.png"}]).encode())
        else:
            await exchange.respond(200, [(b"content-type", b"image/png")], PICTURE)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.toml").write_text(PROFILE.replace('"/status/{rest...}"', '"/status/{rest}"'))
    spec = {"concurrency": 1, "apis": []}
    with SharedNetwork(folder, workspace=Served(), nodes=2, spec=spec) as shared:

        async def prepare(net: Network, workspace: Workspace) -> None:
            config = net.bootstrap.folder / "config.toml"
            lines = [
                "[profiles]",
                f"files = [{json.dumps(str(folder / 'mine.toml'))}]",
                'enabled = ["openai", "akashgen", "mine"]',
                "[profiles.bind]",
                f'akashgen = "{net.workspace}"',
                f'mine = "{net.workspace}"',
                "[profiles.listen]",
                f'akashgen = "127.0.0.1:{free_port()}"',
                f'mine = "127.0.0.1:{free_port()}"',
                "[profiles.settings.akashgen]",
                "polling_interval_s = 0.05",
                "[profiles.public.akashgen]",
                f'workspace = "{net.workspace}"',
                f"calls_per_minute = {PUBLIC_CALLS}",
                "at_once = 2",
            ]
            config.write_text(config.read_text() + "\n".join(lines) + "\n")
            assert await net.bootstrap.terminate() == 0
            await net.bootstrap.start()
            await net.connect_client()
            await net.ready()

        shared.run(prepare, within_s=120)
        yield shared


@asynccontextmanager
async def listener(net: Network, profile: str) -> AsyncIterator[Client]:
    """Connect to a profile's own listener."""
    url = net.bootstrap.where["profiles"][profile][0]
    host, _, port = url.removeprefix("http://").rpartition(":")
    client = Client(tcp_opener(host, int(port)), authority=f"{host}:{port}", max_connections=64)
    try:
        yield client
    finally:
        await client.aclose()


async def ask(client: Client, method: str, target: str, body: Any = b"", headers: Headers | None = None) -> Answered:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client.request(method, target, [*JSON, *(headers or [])], content) as response:
        return Answered(response.status, response.headers, await response.read(1 << 24), response.trailers)


async def is_open(net: Network, profile: str) -> bool:
    """Whether a profile's own listener takes calls."""
    try:
        async with listener(net, profile) as client:
            await ask(client, "POST", "/mine/wrapped", b"{}", key(net))
    except (OSError, HttpError):
        return False
    return True


def key(net: Network) -> Headers:
    return [(b"x-api-key", net.token.encode())]


def test_a_wrapped_answer_comes_in_the_profiles_envelope_and_errors_in_its_dialect(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async with listener(net, "mine") as client:
            answer = await ask(client, "POST", "/mine/wrapped", {"name": "a", "key": net.token})
            assert answer.document == {"code": 0, "msg": "ok", "data": {"pieces": [1, 2]}}
            # the workspace saw the public id where the token stood
            assert json.loads(workspace.bodies[-1]) == {"name": "a", "key": net.workspace}
            receipt = await receipt_of(net, answer.task_id)
            assert receipt["receipt"]["responseBytes"] == len(b'{"pieces":[1,2]}')
            # the workspace's own errors are not dressed up
            own = await ask(client, "POST", "/mine/wrapped", {"name": "teapot"}, key(net))
            assert (own.status, own.document) == (418, {"pieces": [1, 2]})
            for body, headers, status, reason in (
                ({"name": "A"}, key(net), 400, "invalid"),
                (b"{", key(net), 400, "malformed_json"),
                ({"name": "a"}, [], 401, "token_missing"),
                ({"name": "a"}, [(b"x-api-key", b"Bearer " + net.token.encode())], 401, "token_unknown"),
            ):
                refused = await ask(client, "POST", "/mine/wrapped", body, headers)
                document = refused.document
                assert (refused.status, document["code"], document["reason"]) == (status, status, reason)
                assert document["data"] is None
                assert document["msg"]
            elsewhere = await ask(client, "GET", "/v1/models")
            assert (elsewhere.status, elsewhere.document["code"]) == (404, 404)

    shared.run(part)


@pytest.mark.parametrize(
    ("name", "value"), [(b"cookie", b"theme=dark; sid=%d; x=1"), (b"x-session", b"s%d")], ids=["cookie", "header"]
)
def test_calls_of_one_session_go_to_one_node(shared: SharedNetwork, name: bytes, value: bytes) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async def node_of(session: int) -> str:
            headers = [*key(net), (name, value % session)]
            answer = await net.call("POST", "/mine/by/x%26admin=1", b"{}", [*JSON, *headers], token=None)
            assert answer.status == 200
            view = await net.task(answer.task_id)
            return str(view["node_addr"])

        homes = {session: await node_of(session) for session in range(8)}
        assert {await node_of(session) == home for session, home in homes.items() for _ in range(2)} == {True}
        # what stands in the path is one value of the query, whatever it holds
        assert {target for _, target in workspace.calls} == {"/echo?how=x%26admin%3D1"}

    shared.run(part)


def test_a_path_cannot_leave_its_place_in_the_workspace(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        for path, reason in (("../../secret", "path_climbs"), ("%2e%2e/x", "path_climbs"), ("a%00b", "bad_path")):
            answer = await net.call("GET", f"/mine/files/{path}", headers=key(net), token=None)
            assert (answer.status, answer.document["reason"], answer.document["code"]) == (400, reason, 400)
        answer = await net.call("GET", "/mine/files/200", headers=key(net), token=None)
        assert (answer.status, answer.body) == (200, b"said")
        assert workspace.calls == [("GET", "/status/200")]

    shared.run(part)


def test_the_public_has_its_quota_and_a_token_none_of_it(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        workspace.gate.set()
        async with listener(net, "akashgen") as client:
            began, served = time.monotonic(), 0
            while (answer := await ask(client, "POST", "/api/generate", PICTURE_REQUEST)).status == 200:
                assert answer.body == PICTURE
                served += 1
            assert PUBLIC_CALLS <= served <= PUBLIC_CALLS * (1 + (time.monotonic() - began) / 60) + 1
            refused = answer
            assert (refused.status, refused.document["reason"]) == (429, "too_many_calls")
            assert set(refused.document) >= {"error", "details"}
            assert 1 <= int(refused.header(b"retry-after") or b"0") <= 60 / PUBLIC_CALLS
            with_token = [(b"authorization", net.token.encode())]
            answer = await ask(client, "POST", "/api/generate", PICTURE_REQUEST, with_token)
            assert answer.status == 200
            wrong = await ask(client, "POST", "/api/generate", PICTURE_REQUEST, [(b"authorization", b"1-wrong")])
            assert wrong.status == 401, "a wrong token is not the public"
            # the other profile is not open, though it is bound to the same workspace
            closed = await net.call("POST", "/mine/wrapped", b"{}", JSON, token=None)
            assert (closed.status, closed.document["reason"]) == (401, "token_missing")

    shared.run(part)


def test_a_client_that_waits_hears_its_place_and_one_that_leaves_gives_its_own_up(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        head = [b"POST /mine/by/x HTTP/1.1", b"Host: x", b"X-Api-Key: " + net.token.encode()]
        head += [b"Ngpu-Queue-Updates: yes", b"Content-Length: 2", b"Connection: close", b"", b"{}"]
        async with trio.open_nursery() as nursery, listener(net, "mine") as client:
            for _ in net.nodes:  # one slot on each
                workspace.begun = trio.Event()
                nursery.start_soon(net.call, "POST", "/proxy/8080/slow", b"{}")
                await workspace.begun.wait()
            stream = await trio.open_tcp_stream("127.0.0.1", client_port(net))
            await stream.send_all(b"\r\n".join(head))
            heard = b""
            while b"\r\n\r\n" not in heard:
                heard += await stream.receive_some()
            assert heard.startswith(b"HTTP/1.1 102 Processing\r\n"), heard
            assert b"ngpu-queue-position: 0\r\n" in heard.lower()
            workspace.gate.set()
            while b"HTTP/1.1 200" not in heard:
                more = await stream.receive_some()
                assert more, heard
                heard += more
            await stream.aclose()
            # one place, no queue: taken while the call runs, free as soon as its client is gone
            workspace.gate, workspace.begun = trio.Event(), trio.Event()
            async with trio.open_nursery() as leaving:
                leaving.start_soon(ask, client, "POST", "/mine/slow", b"{}", key(net))
                await workspace.begun.wait()
                refused = await ask(client, "POST", "/mine/slow", b"{}", key(net))
                assert (refused.status, refused.document["reason"]) == (429, "queue_full")
                leaving.cancel_scope.cancel()
            workspace.gate.set()
            while (await ask(client, "POST", "/mine/slow", b"{}", key(net))).status != 200:  # noqa: ASYNC110
                await trio.sleep(0.02)

    shared.run(part)


def client_port(net: Network) -> int:
    return int(net.bootstrap.where["http"][0].rpartition(":")[2])


def test_a_client_that_leaves_its_picture_frees_its_place_and_the_job_goes_on(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        token = [(b"authorization", net.token.encode())]
        before = set((await net.call("GET", "/user/queryTaskList")).document["taskIds"])
        async with listener(net, "akashgen") as client:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def leave() -> None:
                        await workspace.begun.wait()
                        scope.cancel()

                    nursery.start_soon(leave)
                    await ask(client, "POST", "/api/generate", PICTURE_REQUEST, token)
        (task_id,) = set((await net.call("GET", "/user/queryTaskList")).document["taskIds"]) - before
        with trio.fail_after(60):
            while '"status": 499' not in net.bootstrap.log:  # noqa: ASYNC110
                await trio.sleep(0.05)
        workspace.gate.set()
        polled = await net.poll(task_id)
        assert polled["result_code"] == 200
        info = (await net.call("GET", f"/user/getDetailed?taskID={task_id}")).document["taskInfo"]
        assert {one["receipt"]["verdict"] for one in info["attempts"]} == {"verified"}

    shared.run(part)


def test_the_document_and_the_page_have_an_operators_own_calls(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        document = (await net.call("GET", "/openapi.json", token=None)).document
        wrapped = document["paths"]["/mine/wrapped"]["post"]
        schema = wrapped["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"]["name"]["maxLength"] == 20
        assert "workspace token" in schema["properties"]["key"]["description"]
        assert {"header-x-api-key": []} in wrapped["security"]
        scheme = document["components"]["securitySchemes"]["header-x-api-key"]
        assert (scheme["type"], scheme["in"], scheme["name"]) == ("apiKey", "header", "X-Api-Key")
        assert {} in document["paths"]["/api/generate"]["post"]["security"], "open to the public"
        page = (await net.call("GET", "/docs", token=None)).body.decode()
        assert "/mine/files/{rest}" in page

    shared.run(part)


def test_what_runs_when_the_bootstrap_is_told_to_end_is_answered_first(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answers: list[Answered] = []
        async with listener(net, "mine") as client, trio.open_nursery() as nursery:

            async def call() -> None:
                answers.append(await ask(client, "POST", "/mine/slow", b'{"a":1}', key(net)))

            nursery.start_soon(call)
            await workspace.begun.wait()
            assert net.bootstrap.process is not None
            net.bootstrap.process.terminate()
            with trio.fail_after(60):
                while await is_open(net, "mine"):  # noqa: ASYNC110  nobody new comes in
                    await trio.sleep(0.02)
            workspace.gate.set()
        assert [(one.status, one.body) for one in answers] == [(200, b'{"a":1}')]
        assert await net.bootstrap.process.wait() == 0
        await net.bootstrap.start()
        await net.connect_client()
        await net.ready()

    shared.run(part, within_s=90)
