"""The chat workspace as a process, spoken to with httpx, wsproto and bare sockets."""

import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Message, Ping, Pong, Request

CHAT = Path(__file__).resolve().parents[3] / "examples" / "chat"


class Workspace:
    """The running process; *port* is where it listens."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ngram_chat", "serve", "--port", "0", *arguments],
            cwd=CHAT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        assert found, "the workspace did not say where it listens"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=10)


@pytest.fixture(scope="module")
def workspace() -> Iterator[Workspace]:
    running = Workspace("--token-delay-ms", "20")
    yield running
    assert running.stop() == 0


def chat(workspace: Workspace, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Say something"}], **fields}
    return httpx.post(workspace.url + "/v1/chat/completions", json=body, timeout=10)


def test_a_seed_gives_the_same_completion_twice(workspace: Workspace) -> None:
    first, second = (chat(workspace, seed=11, max_tokens=8).json() for _ in range(2))
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    assert first["object"] == "chat.completion"
    assert first["usage"]["completion_tokens"] <= 8


def test_a_stream_arrives_piece_by_piece_and_ends_with_done(workspace: Workspace) -> None:
    body = {"messages": [{"role": "user", "content": "Go"}], "seed": 3, "max_tokens": 6, "stream": True}
    times: list[float] = []
    lines: list[str] = []
    with httpx.stream("POST", workspace.url + "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
                lines.append(line)
    assert lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    whole = chat(workspace, seed=3, max_tokens=6, messages=[{"role": "user", "content": "Go"}]).json()
    assert text == whole["choices"][0]["message"]["content"]
    assert times[-1] - times[0] > 0.04


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-9"}, "model"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_wrong_field_is_named(workspace: Workspace, fields: dict[str, Any], param: str) -> None:
    answer = chat(workspace, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_bodies_of_both_framings_are_echoed_and_summed(workspace: Workspace) -> None:
    body = bytes(range(256)) * 5000
    chunks = [body[at : at + 7777] for at in range(0, len(body), 7777)]
    with httpx.Client(base_url=workspace.url) as client:
        assert client.post("/echo", content=body).content == body
        assert client.post("/echo", content=iter(chunks)).content == body
        expected = {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
        assert client.post("/sum", content=body).json() == expected
        assert client.post("/sum", content=iter(chunks)).json() == expected
        assert client.get("/bytes?n=100000").content == (bytes(range(256)) * 400)[:100000]
        chunked = client.get("/bytes?n=100000&chunked=1")
        assert chunked.headers["transfer-encoding"] == "chunked"
        assert len(chunked.content) == 100000
        assert client.head("/bytes?n=5").headers["content-length"] == "5"


def receive_until(connection: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        part = connection.recv(65536)
        assert part, f"closed before {wanted!r}: {data[-200:]!r}"
        data += part
    return data


def test_pipelined_requests_are_answered_in_order(workspace: Workspace) -> None:
    with socket.create_connection(("127.0.0.1", workspace.port), timeout=5) as connection:
        one = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n%03d"
        connection.sendall(b"".join(one % number for number in range(200)))
        data = b""
        while data.count(b"HTTP/1.1 200") < 200 or not data.endswith(b"199"):
            data += connection.recv(65536)
        assert re.findall(rb"\r\n\r\n(\d{3})", data) == [b"%03d" % number for number in range(200)]


def test_100_continue_is_sent_before_the_body(workspace: Workspace) -> None:
    with socket.create_connection(("127.0.0.1", workspace.port), timeout=5) as connection:
        connection.sendall(b"POST /sum HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert receive_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"hi")
        assert b'"bytes":2' in receive_until(connection, b"}")


@pytest.mark.parametrize(
    "wire",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /sum HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /sum HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /sum HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 40000,
    ],
)
def test_broken_http_is_answered_and_closed(workspace: Workspace, wire: bytes) -> None:
    with socket.create_connection(("127.0.0.1", workspace.port), timeout=5) as connection:
        connection.sendall(wire)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        assert re.match(rb"HTTP/1.1 (4|5)\d\d ", answer)
    assert httpx.get(workspace.url + "/health").json() == {"status": "ok"}


def test_a_websocket_chats(workspace: Workspace) -> None:
    socket_ = socket.create_connection(("127.0.0.1", workspace.port), timeout=5)
    ws = WSConnection(ConnectionType.CLIENT)
    deltas: list[str] = []
    with socket_:
        socket_.sendall(ws.send(Request(host="x", target="/ws")))
        done = closed = ponged = False
        while not closed:
            ws.receive_data(socket_.recv(65536))
            for event in ws.events():
                if isinstance(event, AcceptConnection):
                    socket_.sendall(ws.send(Ping(b"p")))
                    socket_.sendall(ws.send(Message('{"prompt": "Hello", "seed": 4, "max_tokens": 5}')))
                elif isinstance(event, Pong):
                    ponged = event.payload == b"p"
                elif isinstance(event, Message):
                    document = json.loads(event.data)
                    if "delta" in document:
                        deltas.append(document["delta"])
                    else:
                        done = document == {"done": True, "tokens": len(deltas)}
                        socket_.sendall(ws.send(CloseConnection(1000)))
                elif isinstance(event, CloseConnection):
                    closed = True
    assert done
    assert ponged
    assert 1 <= len(deltas) <= 5


def test_sigterm_lets_an_answer_under_way_finish() -> None:
    workspace = Workspace("--token-delay-ms", "50")
    with socket.create_connection(("127.0.0.1", workspace.port), timeout=5) as connection:
        connection.sendall(b"GET /events?n=6&every_ms=50 HTTP/1.1\r\nHost: x\r\n\r\n")
        receive_until(connection, b"data: 1\n\n")
        workspace.process.send_signal(signal.SIGTERM)
        receive_until(connection, b"data: 5\n\n\r\n0\r\n\r\n")
    assert workspace.process.wait(timeout=10) == 0


def vendor_chat(workspace: Workspace, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Say this is a test!"}], "max_new_tokens": 6, **fields}
    return httpx.post(workspace.url + "/nlp/v1/chat/completions", json=body, timeout=10)


def test_the_vendors_envelope_is_around_an_answer(workspace: Workspace) -> None:
    answer = vendor_chat(workspace, temperature=0.8, top_p=0.7, repetition_penalty=1, user_id="test").json()
    assert (answer["code"], answer["msg"], answer["data"]["status"]) == (200, "ok", 0)
    assert answer["data"]["choices"][0]["content"]
    usage = answer["data"]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_vendors_stream_ends_with_done(workspace: Workspace) -> None:
    lines = [line for line in vendor_chat(workspace, stream=True, user="u").text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: "))["data"]["choices"][0] for line in lines[:-1]]
    assert all(event["delta"] for event in events[:-1])
    assert events[-1]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"messages": []}, {"stream": "yes"}]
)
def test_the_vendors_envelope_is_around_an_error(workspace: Workspace, fields: dict[str, Any]) -> None:
    answer = vendor_chat(workspace, **fields)
    assert answer.status_code == 400
    assert answer.json()["code"] == 400
    assert next(iter(fields)) in answer.json()["msg"]
