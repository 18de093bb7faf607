"""The model interface over real peers: a bootstrap, two nodes, and a model server with a behaviour for each name."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from ngpu_bootstrap.profiles.links import Link, link_url
from ngpu_daemon.keystore import open_keystore
from ngpu_protocol.http1 import HttpError
from ngpu_protocol.identity import Account, Address
from tests.integration.profiles.model_server import MODELS, PICTURE, ModelServer
from tests.integration.profiles.rig import PROJECT, listed, receipt_of, register
from tests.integration.whole_path.rig import Answered, Network, SharedNetwork, add_workspace
from tests.integration.whole_path.workspace import Workspace

JSON = [(b"content-type", b"application/json")]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    folder = tmp_path_factory.mktemp("models")
    photos = folder / "photos"
    photos.mkdir()
    (folder / "secret.txt").write_text("secret")
    lines = ("[models]", f"output_folders = [{json.dumps(str(photos))}]")
    server = ModelServer(photos=photos)
    with SharedNetwork(folder, workspace=server, nodes=2, node_lines=lines) as shared:

        async def prepare(net: Network, workspace: Workspace) -> None:
            for node in net.nodes:
                await register(node, net.workspace_port, [(PROJECT, model, kind) for model, kind in MODELS.items()])
            await listed(net, *MODELS)

        shared.run(prepare)
        yield shared


def seen_of(workspace: Workspace) -> ModelServer:
    assert isinstance(workspace, ModelServer)
    return workspace


async def post(net: Network, path: str, document: object, **more: object) -> Answered:
    return await net.call("POST", path, json.dumps(document).encode(), JSON, **more)  # type: ignore[arg-type]


async def cut_off(net: Network, body: bytes) -> tuple[str, bytes]:
    """Return the task id and what came of an answer whose connection was cut before its end."""
    pieces = bytearray()
    task_id = ""
    try:
        async with net.stream("POST", CHAT, body, JSON) as response:
            task_id = next(value for name, value in response.headers if name == b"ngpu-task-id").decode()
            while data := await response.receive():
                pieces += data
    except HttpError:
        return task_id, bytes(pieces)
    raise AssertionError(f"it ended properly: {bytes(pieces)!r}")


def test_a_body_passes_unchanged_to_the_model_it_names_and_its_receipt_is_the_callers(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        body = b'{ "messages":[{"role":"user","content":"Hi \\u00e9"}],\r\n "model" : "Llama3-8B", "x":1e5 }'
        answer = await net.call("POST", CHAT, body, JSON)
        assert answer.status == 200
        assert answer.document["choices"][0]["message"]["content"].endswith("today?")
        seen = seen_of(workspace).seen[-1]
        assert seen.body == body
        assert seen.target == CHAT
        assert not any(name in (b"authorization", b"ngpu-token") for name, _ in seen.headers)
        document = await receipt_of(net, answer.task_id)
        assert document["receipt"]["outcome"] == "complete"
        # it is in the caller's list, and the workspace that ran it is another
        ids = (await net.call("GET", "/user/queryTaskList")).document
        assert answer.task_id in json.dumps(ids)
        assert document["order"]["workspace"] != net.workspace

    shared.run(part)


def test_a_models_name_may_hold_slashes_as_those_of_hubs_do(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        name = "meta-org/Llama-9B"
        for model in (name, f"{PROJECT}/{name}"):
            assert (await post(net, CHAT, {"model": model, "messages": []})).status == 200
            assert json.loads(seen_of(workspace).seen[-1].body)["model"] == model
            assert (await net.call("GET", f"/v1/models/{model}")).document["id"] == name
        assert (await net.call("GET", "/v1/models/meta-org%2FLlama-9B")).document["id"] == name
        assert (await post(net, CHAT, {"model": "meta-org", "messages": []})).status == 404
        assert (await post(net, CHAT, {"model": "Llama-9B", "messages": []})).status == 404

    shared.run(part)


def test_a_task_of_a_shared_model_is_not_another_callers(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        _, other = await add_workspace(net.bootstrap, {"name": "other"})
        answer = await post(net, CHAT, {"model": "Llama3-8B"})
        for path in ("/api/v1/tasks/{}", "/api/v1/tasks/{}/receipt"):
            found = await net.call("GET", path.format(answer.task_id), token=other)
            assert (found.status, found.document["reason"]) == (403, "token_foreign")
        assert answer.task_id not in json.dumps((await net.call("GET", "/user/queryTaskList", token=other)).document)
        found = await net.call("DELETE", f"/api/v1/tasks/{answer.task_id}", token=other)
        assert found.status == 403
        assert (await post(net, CHAT, {"model": "Llama3-8B"}, token=other)).status == 200

    shared.run(part)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_is_routed_whatever_its_type_says(shared: SharedNetwork, kind: str) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        fields = [(b"content-type", kind.encode())] if kind else []
        assert (await net.call("POST", CHAT, b'{"model":"Llama3-8B","messages":[]}', fields)).status == 200

    shared.run(part)


def test_a_model_after_ten_megabytes_is_found_and_the_body_arrives_whole(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        image = base64.b64encode(bytes(range(256)) * 30_000)
        body = b'{"image":"data:image/png;base64,%b","n":1,"model":"SuperEdit","project":"%b"}' % (
            image,
            PROJECT.encode(),
        )
        answer = await net.call("POST", "/v1/images/edits", body, JSON)
        assert answer.status == 200, answer.body
        assert seen_of(workspace).seen[-1].body == body
        await receipt_of(net, answer.task_id)

    shared.run(part)


@pytest.mark.parametrize(
    ("body", "status", "reason", "code"),
    [
        (b'{"messages":[]}', 400, "model_missing", "missing_required_parameter"),
        (b'{"model":"Llama3-8B","model":"SuperImage"}', 400, "model_twice", "model_twice"),
        (b'{"model":7}', 400, "model_not_text", "model_not_text"),
        (b'{"model":"gpt-9"}', 404, "model_unknown", "model_not_found"),
        (b'{"model":"Llama3-8B","project":"Other"}', 404, "model_unknown", "model_not_found"),
        (b"not json", 400, "malformed_json", "malformed_json"),
        (b"", 400, "model_missing", "missing_required_parameter"),
    ],
)
def test_a_body_that_names_no_model_served_here_is_refused_in_both_dialects(
    shared: SharedNetwork, body: bytes, status: int, reason: str, code: str
) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call("POST", CHAT, body, JSON)
        document = answer.document
        assert (answer.status, document["reason"], document["error"]["code"]) == (status, reason, code)
        assert document["code"] == status
        assert document["message"] == document["error"]["message"]
        assert seen_of(workspace).seen == []

    shared.run(part)


def test_without_a_token_nothing_is_served_and_the_answer_is_openais(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            answer = await net.call(method, path, b'{"model":"Llama3-8B"}' if method == "POST" else b"", token=None)
            assert answer.status == 401
            assert answer.document["error"]["code"] == "invalid_api_key"
        answer = await net.call("GET", CHAT)
        assert (answer.status, answer.header(b"allow")) == (405, b"POST")
        assert answer.document["error"]["type"] == "invalid_request_error"

    shared.run(part)


def test_the_list_has_what_both_kinds_of_clients_look_for(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call("GET", f"/v1/models?project={PROJECT}")
        document = answer.document
        assert (document["object"], document["project"]) == ("list", PROJECT)
        assert {one["id"] for one in document["data"]} == set(MODELS)
        origin = net.bootstrap.where["http"][0]
        by_id = {one["id"]: one for one in document["data"]}
        llama = by_id["Llama3-8B"]
        assert (llama["object"], llama["owned_by"], llama["model"]) == ("model", PROJECT, "Llama3-8B")
        assert llama["url"] == f"{origin}/v1/chat/completions"
        assert by_id["SuperImage"]["url"] == f"{origin}/v1/images/generations"
        assert by_id["SuperEdit"]["url"] == f"{origin}/v1/images/edits"
        assert isinstance(llama["created"], int)
        assert (await net.call("GET", "/v1/models?project=nobody")).document["data"] == []
        assert (await net.call("GET", "/v1/models/Llama3-8B")).document == llama
        missing = await net.call("GET", "/v1/models/gpt-9")
        assert (missing.status, missing.document["error"]["code"]) == (404, "model_not_found")

    shared.run(part)


def test_a_file_in_an_answer_becomes_a_link_that_expires_and_fetches_that_file_alone(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        server = seen_of(workspace)
        answer = await post(net, "/v1/images/generations", {"model": "SuperImage", "prompt": "an otter", "n": 2})
        assert answer.status == 200
        urls = [one["url"] for one in answer.document["data"]]
        origin = net.bootstrap.where["http"][0]
        assert len(urls) == 2
        assert all(url.startswith(f"{origin}/v1/files/0x") for url in urls)
        target = urls[1].removeprefix(origin)
        picture = await net.call("GET", target, token=None)
        assert (picture.status, picture.body) == (200, PICTURE)
        assert picture.header(b"content-type") == b"image/png"
        assert picture.header(b"x-content-type-options") == b"nosniff"
        assert b"sandbox" in (picture.header(b"content-security-policy") or b"")
        assert (await net.call("HEAD", target, token=None)).header(b"content-length") == b"%d" % len(PICTURE)
        # the receipt is about the server's own bytes, not the rewritten ones
        document = await receipt_of(net, answer.task_id)
        assert document["receipt"]["responseBytes"] != len(answer.body)
        # nothing about it may be changed
        for changed in (
            target.replace("v1xxidnrc9ol7m80", "v0xxidnrc9ol7m80"),
            target.replace("photos/v1xxidnrc9ol7m80.png", "secret.txt"),
            target.replace("Expires=", "Expires=9"),
            target.partition("?")[0],
            target.replace("Signature=", "Signature=A"),
        ):
            refused = await net.call("GET", changed, token=None)
            assert (refused.status, refused.document["reason"]) == (403, "link_bad"), changed
        (server.photos / "v1xxidnrc9ol7m80.png").unlink()
        gone = await net.call("GET", target, token=None)
        assert (gone.status, gone.document["reason"]) == (404, "file_unknown")
        (server.photos / "v1xxidnrc9ol7m80.png").symlink_to(server.photos.parent / "secret.txt")
        escaped = await net.call("GET", target, token=None)
        assert (escaped.status, escaped.document["reason"]) == (404, "file_unknown")
        (server.photos / "v1xxidnrc9ol7m80.png").unlink()

    shared.run(part)


def test_a_link_opens_one_file_of_one_node_until_it_expires_whatever_is_tried(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        server = seen_of(workspace)
        account = open_keystore(net.bootstrap.folder / "data" / "keystore.json", "pw")
        first, second = (Address(node.where["node"]) for node in net.nodes)
        now_s = int(time.time())

        def target(path: str, node: Address = first, expires_s: int = now_s + 60, signer: Account = account) -> str:
            link = Link("", node, path, expires_s)
            return link_url("", link, signer.sign(link.digest("local")))

        async def reason(url: str, method: str = "GET") -> tuple[int, str]:
            answer = await net.call(method, url, token=None)
            return answer.status, "" if answer.status == 200 else answer.document["reason"]

        picture = server.photos / "one.png"
        picture.write_bytes(PICTURE)
        good = target(str(picture))
        assert await reason(good) == (200, "")
        # not theirs to make, no more, or for another node
        assert await reason(target(str(picture), expires_s=now_s - 1)) == (410, "link_expired")
        assert await reason(target(str(picture), signer=Account.from_key(bytes(range(1, 33))))) == (403, "link_bad")
        assert await reason(good.replace(first, second)) == (403, "link_bad")
        assert await reason(good, "POST") == (405, "method_not_allowed")
        for end in ("0", "00000000000000", "-1", "1e9", "", "9999999999999999999999"):
            assert await reason(re.sub("Expires=[0-9]+", f"Expires={end}", good)) == (403, "link_bad"), end
        for signature in ("", "A" * 86, "%00", "*", "A" * 5000):
            assert await reason(re.sub("Signature=.*", f"Signature={signature}", good)) == (403, "link_bad"), signature
        assert (await reason(f"{good}&{good.partition('?')[2]}"))[0] == 400
        # a model that names what it likes is signed for, and the node has nothing of it to give
        folder = server.photos
        os.mkfifo(folder / "pipe.png")
        (folder / "folder.png").mkdir()
        (folder / "up").symlink_to(folder.parent)
        (folder / "passwd.png").symlink_to("/etc/passwd")
        for path in (
            "/etc/passwd",
            "/proc/self/environ",
            str(folder.parent / "secret.txt"),
            f"{folder}/../secret.txt",
            f"{folder}/up/secret.txt",
            f"{folder}/passwd.png",
            f"{folder}/pipe.png",
            f"{folder}/folder.png",
            f"{folder}/",
            str(folder),
            f"{folder}x/one.png",
            f"{folder}/one.png\0.txt",
            f"{folder}/" + "a" * 3000,
        ):
            assert (await reason(target(path)))[0] in (400, 404), path
        assert await reason(good) == (200, "")
        for name in ("pipe.png", "up", "passwd.png"):
            (folder / name).unlink()
        (folder / "folder.png").rmdir()

    shared.run(part)


def test_a_multipart_form_passes_byte_for_byte_by_its_model_field(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        request = httpx.Request(
            "POST",
            "http://x",
            data={"prompt": "a beret", "model": "SuperEdit", "n": "1"},
            files={"image": ("otter.png", PICTURE * 300, "image/png")},
        )
        body, kind = request.read(), request.headers["content-type"].encode()
        answer = await net.call("POST", "/v1/images/edits", body, [(b"content-type", kind)])
        assert answer.status == 200, answer.body
        assert seen_of(workspace).seen[-1].body == body
        await receipt_of(net, answer.task_id)
        twice = httpx.Request(
            "POST", "http://x", files=[("model", (None, "SuperEdit")), ("model", (None, "Llama3-8B"))]
        )
        kind = twice.headers["content-type"].encode()
        refused = await net.call("POST", "/v1/images/edits", twice.read(), [(b"content-type", kind)])
        assert (refused.status, refused.document["reason"]) == (400, "model_twice")

    shared.run(part)


def test_a_stream_the_server_breaks_ends_with_an_error_event_and_is_cut(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        task_id, pieces = await cut_off(net, b'{"model":"broken-stream","stream":true}')
        events = pieces.split(b"\n\n")
        assert events[0].startswith(b'data: {"id"')
        last = json.loads(events[-2].removeprefix(b"data: "))
        assert last["error"]["type"] == "server_error"
        assert last["task_id"] == task_id
        document = await receipt_of(net, task_id)
        assert document["receipt"]["outcome"] == "workspace_broke"
        # broken inside an event, nothing is added to it
        _, pieces = await cut_off(net, b'{"model":"broken-event","stream":true}')
        assert b"task_id" not in pieces

    shared.run(part)


def test_an_answer_of_200_with_an_error_event_passes_as_it_is_and_is_receipted(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call("POST", CHAT, b'{"model":"error-event","stream":true}', JSON)
        assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert b"out of memory" in answer.body
        assert (await receipt_of(net, answer.task_id))["receipt"]["outcome"] == "complete"

    shared.run(part)


def test_a_client_that_leaves_a_stream_ends_it_at_the_server(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async with net.stream("POST", CHAT, b'{"model":"slow-stream","stream":true}', JSON) as response:
            task_id = next(value for name, value in response.headers if name == b"ngpu-task-id").decode()
            assert b"word0" in await response.receive()
        with trio.fail_after(60):
            await workspace.left.wait()
        assert (await receipt_of(net, task_id))["receipt"]["outcome"] == "client_gone"

    shared.run(part)


def test_a_named_node_gets_the_call_or_the_caller_is_told(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        for node in net.nodes:
            for name in (node.where["node"], node.where["peer_id"]):
                answer = await net.call("POST", CHAT, b'{"model":"Llama3-8B"}', [*JSON, (b"ngpu-node", name.encode())])
                assert answer.status == 200
                view = await net.task(answer.task_id)
                assert view["node_addr"] == node.where["node"]
        for name, status, reason in (
            ("0x" + "11" * 20, 404, "node_lacks_model"),
            ("nonsense", 400, "bad_node"),
        ):
            answer = await net.call("POST", CHAT, b'{"model":"Llama3-8B"}', [*JSON, (b"ngpu-node", name.encode())])
            assert (answer.status, answer.document["reason"]) == (status, reason)

    shared.run(part)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"model":"Llama3-8B","prompt":"Hello"}'),
        ("/v1/embeddings", b'{"model":"embedder","input":["a"]}'),
        ("/v1/audio/speech", b'{"model":"speaker","input":"a","voice":"b"}'),
    ],
)
def test_the_other_calls_pass_alike(shared: SharedNetwork, path: str, body: bytes) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        answer = await net.call("POST", path, body, JSON)
        assert answer.status == 200
        seen = seen_of(workspace).seen[-1]
        assert (seen.target, seen.body) == (path, body)
        await receipt_of(net, answer.task_id)

    shared.run(part)


def test_a_file_beyond_the_owners_folders_is_named_but_never_leaves(shared: SharedNetwork, tmp_path: Path) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        server = seen_of(workspace)
        before, server.photos = server.photos, tmp_path
        try:
            answer = await post(net, "/v1/images/generations", {"model": "SuperImage", "prompt": "x"})
            url = answer.document["data"][0]["url"].removeprefix(net.bootstrap.where["http"][0])
            refused = await net.call("GET", url, token=None)
            assert (refused.status, refused.document["reason"]) == (404, "file_unknown")
        finally:
            server.photos = before

    shared.run(part)
