"""What is wrong with a request, or breaks behind it, said to each kind of caller in its own words."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap.profiles.declaration import Dialect
from ngpu_protocol.http1 import Headers, HttpError
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, echo, new_account

JSON: Headers = [(b"content-type", b"application/json")]
FORM: Headers = [(b"content-type", b"multipart/form-data; boundary=B")]
GZIP: Headers = [*JSON, (b"content-encoding", b"gzip")]
NO_BOUNDARY: Headers = [(b"content-type", b"multipart/form-data")]
LIMIT = 16 * 1024 * 1024
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
ERROR_EVENT = b'data: {"error":{"message":"out of memory"}}\n\n'

# Paths are told apart by the dialect, so that one bootstrap serves them all; `model` is what the body names.
PROFILE = """
name = "{name}"
dialect = "{dialect}"
workspace = "model"
credentials = [{{ in = "header", name = "authorization" }}]
[[routes]]
path = "/{name}/chat"
max_body_bytes = 16_777_216
[[routes]]
path = "/{name}/form"
max_body_bytes = 2000
form = {{ parts = 3, required = ["image", "model"], allowed = ["image", "model", "note"], once = ["note"] }}
[[routes]]
path = "/{name}/checked"
schema = {{ type = "object", required = ["prompt"], properties = {{ n = {{ maximum = 4 }} }} }}
"""


def part(name: str, content: bytes = b"x") -> bytes:
    return b'--B\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), content)


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--B--\r\n"


MODEL, IMAGE = part("model", b"echo"), part("image")
LATE = b'{"image":"%b","model":"%b"}' % (base64.b64encode(bytes(10_000_000)), b"gpt-9")

MANY = b'{"model":"echo","x":[%b0]}' % (b"0," * 60_000)


@dataclass
class Bad:
    """One request that cannot be served, and what is said of it."""

    path: str
    body: bytes
    status: int
    reason: str
    headers: Headers


BAD = {
    "no model": Bad("chat", b'{"messages":[]}', 400, "model_missing", JSON),
    "an empty body": Bad("chat", b"", 400, "model_missing", JSON),
    "two models": Bad("chat", b'{"model":"echo","mod\\u0065l":"other"}', 400, "model_twice", JSON),
    "two projects": Bad("chat", b'{"model":"echo","project":"a","project":"demo"}', 400, "project_twice", JSON),
    "a model that is no text": Bad("chat", b'{"model":["echo"]}', 400, "model_not_text", JSON),
    "a name longer than any": Bad("chat", b'{"model":"%b"}' % (b"a" * 5000), 400, "model_not_text", JSON),
    "an unknown model": Bad("chat", b'{"model":"gpt-9"}', 404, "model_unknown", JSON),
    "an unknown model after ten megabytes": Bad("chat", LATE, 404, "model_unknown", JSON),
    "half an object": Bad("chat", b'{"model":"echo","messages":[', 400, "malformed_json", JSON),
    "two objects": Bad("chat", b'{"model":"echo"}{"model":"other"}', 400, "malformed_json", JSON),
    "what is no JSON": Bad("chat", b"model=echo", 400, "malformed_json", JSON),
    "over the limit": Bad("chat", b'{"model":"echo","x":"%b"}' % (b"a" * LIMIT), 413, "body_too_large", JSON),
    "no such field of a form": Bad("form", form(MODEL, IMAGE, part("other")), 400, "field_unknown", FORM),
    "a form without a file": Bad("form", form(MODEL), 400, "field_missing", FORM),
    "a form without a model": Bad("form", form(IMAGE), 400, "field_missing", FORM),
    "a form with two models": Bad("form", form(MODEL, IMAGE, MODEL), 400, "model_twice", FORM),
    "a field twice": Bad("form", form(MODEL, part("note"), part("note")), 400, "field_twice", FORM),
    "too many fields": Bad("form", form(MODEL, IMAGE, IMAGE, IMAGE), 400, "too_many_fields", FORM),
    "a form that ends early": Bad("form", MODEL + IMAGE, 400, "malformed_form", FORM),
    "a form without a boundary": Bad("form", form(MODEL, IMAGE), 400, "malformed_form", NO_BOUNDARY),
    "an upload over the limit": Bad("form", form(MODEL, part("image", b"a" * 3000)), 413, "body_too_large", FORM),
    "what a schema requires": Bad("checked", b'{"model":"echo"}', 400, "invalid", JSON),
    "more than a schema allows": Bad("checked", b'{"model":"echo","prompt":1,"n":5}', 400, "invalid", JSON),
    "a member twice, where all are looked at": Bad(
        "checked", b'{"model":"echo","prompt":1,"prompt":2}', 400, "member_twice", JSON
    ),
    "a compressed body": Bad("chat", gzip.compress(b'{"model":"echo"}'), 415, "body_encoded", GZIP),
    "a path of the profile's that nothing answers": Bad("chats", b'{"model":"echo"}', 404, "not_found", JSON),
    "more values than are counted": Bad("checked", MANY, 413, "too_many_values", JSON),
}


def words(dialect: Dialect, status: int, document: dict[str, Any]) -> str:
    """Return what is said, from where callers of *dialect* look for it; nothing else may stand there."""
    own: set[str]
    match dialect:
        case Dialect.NGPU:
            own, said = {"message"}, document["message"]
        case Dialect.OPENAI | Dialect.MODEL_SERVER:
            error = document["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] in ("invalid_request_error", "server_error")
            assert isinstance(error["code"], str)
            own, said = {"error"}, error["message"]
            if dialect is Dialect.MODEL_SERVER:
                own |= {"code", "message"}
                assert (document["code"], document["message"]) == (status, said)
        case Dialect.CODE_MESSAGE:
            own, said = {"code", "message"}, document["message"]
            assert document["code"] == status
        case Dialect.ERROR_DETAILS:
            own, said = {"error", "details"}, document["details"]
            assert isinstance(document["error"], str)
        case Dialect.CODE_MSG_DATA | Dialect.CODE_INFO_MSG:
            empty = "data" if dialect is Dialect.CODE_MSG_DATA else "info"
            own, said = {"code", "msg", empty}, document["msg"]
            assert (document["code"], document[empty]) == (status, None)
    assert set(document) - {"reason", "task_id"} == own
    assert isinstance(said, str)
    return said


async def script(asked: Asked) -> None:
    """A model server that does what the body asks for."""
    body = await asked.read()
    if b'"break"' in body:
        await asked.exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        await asked.exchange.send(EVENT)
        await trio.sleep(0.05)  # a reset overtakes what was sent before it
        await asked.exchange.abort()
    elif b'"error event"' in body:
        await asked.answer(200, ERROR_EVENT, [(b"content-type", b"text/event-stream")])
    elif b'"drop"' in body:
        await asked.exchange.abort()
    else:
        await echo(asked)


def run(tmp_path: Path, test: Callable[[Bootstrap, ScriptedNode], Awaitable[None]]) -> None:
    files = []
    for dialect in Dialect:
        name = str(dialect).replace("_", "-")
        file = tmp_path / f"{name}.toml"
        file.write_text(PROFILE.format(name=name, dialect=dialect))
        files.append(file)
    profiles = {"enabled": [file.stem for file in files], "files": files}

    async def main() -> None:
        node = ScriptedNode(new_account(), script=script)
        settings = settings_for(tmp_path / "bootstrap", profiles=profiles)
        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            with trio.fail_after(60):
                await test(bootstrap, node)

    trio.run(main)


def test_a_request_that_cannot_be_served_is_refused_in_the_words_of_its_caller(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        for dialect in Dialect:
            for name, bad in BAD.items():
                target = f"/{str(dialect).replace('_', '-')}/{bad.path}"
                answer = await bootstrap.call("POST", target, bad.body, bad.headers)
                document = json.loads(answer.body)
                assert (answer.status, document["reason"]) == (bad.status, bad.reason), (name, document)
                assert len(words(dialect, bad.status, document)) > 10, (name, document)
                assert answer.header(b"content-type") == b"application/json"
        assert node.orders == [], "nothing of it reached a node"

    run(tmp_path, test)


def test_a_body_over_the_limit_is_cut_off_where_its_length_is_not_said(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model":"echo","x":"'
        for _ in range(300):
            yield b"a" * 65_536

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        for dialect in Dialect:
            target = f"/{str(dialect).replace('_', '-')}/chat"
            try:
                async with bootstrap.stream("POST", target, pieces(), JSON) as response:
                    document = json.loads(await response.read(10_000))
                    assert response.status == 413
                    assert words(dialect, 413, document)
            except HttpError:
                continue  # the connection is cut while the client still sends: it may not get to read the answer
        assert node.orders == []

    run(tmp_path, test)


@pytest.mark.parametrize("dialect", list(Dialect))
def test_what_breaks_behind_a_call_is_said_in_the_words_of_its_caller(tmp_path: Path, dialect: Dialect) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        target = f"/{str(dialect).replace('_', '-')}/chat"
        # a stream that breaks after a whole event: one more says so, and it never looks whole
        heard, is_whole = b"", True
        try:
            async with bootstrap.stream("POST", target, b'{"model":"echo","do":"break"}', JSON) as response:
                assert response.status == 200
                while data := await response.receive():
                    heard += data
        except HttpError:
            is_whole = False
        first, last, end = heard.split(b"\n\n")
        assert (first + b"\n\n", end, is_whole) == (EVENT, b"", False)
        document = json.loads(last.removeprefix(b"data: "))
        status = 500 if dialect is Dialect.ERROR_DETAILS else 502
        assert words(dialect, 502, document)
        assert document["task_id"]
        # an error event after 200 is the server's own, and goes as it is
        answer = await bootstrap.call("POST", target, b'{"model":"echo","do":"error event"}', JSON)
        assert (answer.status, answer.body) == (200, ERROR_EVENT)
        # a server that answers nothing
        answer = await bootstrap.call("POST", target, b'{"model":"echo","do":"drop"}', JSON)
        document = json.loads(answer.body)
        assert answer.status == status, document
        assert words(dialect, 502, document)
        assert document["task_id"] == (answer.header(b"ngpu-task-id") or b"").decode()

    run(tmp_path, test)
