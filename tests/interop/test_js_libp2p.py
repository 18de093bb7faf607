"""js-libp2p dials our host, pings, identifies it and fetches from it with its own HTTP over libp2p; and we dial it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.http1 import Exchange, Limits, Remote, serve_stream
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.p2p import Host, P2PStream, open_host
from tests.integration.whole_path.rig import Daemon, free_port, prepare
from tests.interop import npm

FOLDER = Path(__file__).parent / "js_libp2p"
ECHO = "/test/echo/1.0.0"
WELL_KNOWN = "/.well-known/libp2p/protocols"
DRIPS = 5

pytestmark = pytest.mark.needs_node


async def echo(stream: P2PStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def answer(stream_number: int, exchange: Exchange) -> None:
    path, _, query = exchange.request.target.partition("?")
    text = [(b"content-type", b"text/plain")]
    match path:
        case "/.well-known/libp2p/protocols":
            await exchange.respond_json(200, {"/test/mounted": {"path": "/mounted/here"}})
        case "/mounted/here":
            await exchange.respond(200, text, b"found it")
        case "/digest":
            digest = hashlib.sha256()
            while data := await exchange.receive():
                digest.update(data)
            await exchange.respond_json(200, {"sha256": digest.hexdigest()})
        case "/drip":
            await exchange.send_head(200, text)
            for number in range(DRIPS):
                await exchange.send(f"drip {number}\n".encode())
                await trio.sleep(0.01)
            await exchange.end()
        case "/stream-number":
            await exchange.respond(200, text, f"{query} on stream {stream_number}".encode())
        case _ if path.startswith("/hello/"):
            await exchange.respond(200, text, b"hello " + unquote(path.removeprefix("/hello/")).encode())
        case _:
            await exchange.respond(404, text, b"nothing here")


@asynccontextmanager
async def serving_host() -> AsyncIterator[Host]:
    streams = 0

    async def serve_http(stream: P2PStream) -> None:
        nonlocal streams
        streams += 1
        remote = Remote(peer=stream.remote_peer)
        await serve_stream(stream, partial(answer, streams), limits=Limits(), remote=remote, half_close=True)

    async with open_host(
        Account.from_key(os.urandom(32)),
        listen=["/ip4/127.0.0.1/tcp/0"],
        network=network_named("local"),
        handlers={ECHO: echo, "/http/1.1": serve_http},
    ) as host:
        yield host


class JsPeer:
    """`peer.mjs`, and what it says line by line."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""

    async def tell(self, **job: object) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps(job).encode() + b"\n")

    async def says(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._said:
            data = await self._process.stdout.receive_some()
            assert data, "the js peer ended"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        assert "error" not in said, said["error"]
        return said


@asynccontextmanager
async def js_peer() -> AsyncIterator[JsPeer]:
    await trio.to_thread.run_sync(npm.install, FOLDER)
    process = await trio.lowlevel.open_process(
        [npm.node_binary(), "peer.mjs"], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield JsPeer(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.mark.timeout_s(300)  # the packages may have to be installed first
@pytest.mark.parametrize("key", ["Ed25519", "secp256k1"])
@trio_test
async def test_js_libp2p_talks_to_us_and_we_to_it(key: str) -> None:
    async with serving_host() as host, js_peer() as peer:
        with trio.fail_after(60):
            await peer.tell(address=host.addresses[0], key=key, echo=ECHO)
            address = (await peer.says())["address"]
            result = await peer.says()

            assert result["peer"] == host.peer_id
            assert result["ping_ms"] >= 0
            assert {ECHO, "/http/1.1", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(result["identify"]["protocols"])
            assert result["identify"]["addresses"]
            assert result["echo_is_whole"]

            assert result["protocols"] == {"/test/mounted": {"path": "/mounted/here"}}
            assert result["hello"] == {"status": 200, "type": "text/plain", "body": "hello a b"}
            assert result["mounted"] == {"status": 200, "body": "found it"}
            assert result["missing"] == 404
            assert result["posted"] == {"status": 200, "matches": True}
            assert result["dripped"] == [f"drip {number}" for number in range(DRIPS)]
            assert result["many"] == 50
            queries, streams = zip(*(kept.split(" on ") for kept in result["kept"]), strict=True)
            assert queries == ("0", "1", "2", "3", "4")
            assert len(set(streams)) == 1, "its pool keeps a stream, and so do we"

            # Over the connection it made, and over one of our own.
            js_id = address.rpartition("/")[2]
            await our_echo(host, js_id)
            async with open_host(
                Account.from_key(os.urandom(32)), listen=[], network=network_named("local")
            ) as another:
                assert await another.connect(address, timeout_s=30) == js_id
                await our_echo(another, js_id)


async def our_echo(host: Host, peer_id: str) -> None:
    payload = os.urandom(1_000_000)
    got = bytearray()
    stream = await host.open_stream(peer_id, ECHO, timeout_s=30)
    await stream.send_all(payload)
    await stream.send_eof()
    while data := await stream.receive_some():
        got += data
    await stream.aclose()
    assert got == payload


@pytest.mark.timeout_s(300)
@trio_test
async def test_js_libp2p_dials_pings_identifies_and_fetches_from_a_running_node(tmp_path: Path) -> None:
    nobody = prepare(tmp_path / "nobody", [])
    prepare(
        tmp_path / "node",
        [
            'listen = ["/ip4/127.0.0.1/tcp/0"]',
            'model_listen = "127.0.0.1:0"',
            'engine = "none"',
            "[[bootstraps]]",
            f'multiaddrs = ["/ip4/127.0.0.1/tcp/{free_port()}/p2p/{nobody}"]',
        ],
    )
    daemon = Daemon("ngpu_node", tmp_path / "node", "node.json")
    await daemon.start()
    try:
        async with js_peer() as peer:
            with trio.fail_after(60):
                await peer.tell(address=daemon.where["multiaddrs"][0], key="secp256k1", echo=ECHO, daemon=True)
                await peer.says()
                result = await peer.says()
        assert result["peer"] == daemon.where["peer_id"]
        assert result["ping_ms"] >= 0
        assert {"/http/1.1", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(result["identify"]["protocols"])
        assert result["protocols"] == {"/ngpu/v1": {"path": "/ngpu/v1/"}}
        assert result["lost"]["status"] == 404
        assert result["ordered"] == {"status": 400, "refused": "malformed_order", "body": result["ordered"]["body"]}
        assert result["ordered"]["body"]["reason"] == "malformed_order"
    finally:
        with trio.CancelScope(shield=True):
            assert await daemon.terminate() == 0
