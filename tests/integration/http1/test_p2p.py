"""The same server and client on libp2p streams between two hosts: what a node and a bootstrap speak."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.http1 import (
    Client,
    Exchange,
    Handler,
    IncompleteError,
    MaybeSentError,
    NotSentError,
    Remote,
    serve_stream,
)
from ngpu_protocol.p2p import Host, P2PStream
from tests.integration.p2p.peers import host

HTTP = "/http/1.1"


class Pair:
    """A host that serves, one that asks, and a client whose connections are streams between them."""

    def __init__(self, server: Host, asker: Host) -> None:
        self.server = server
        self.asker = asker
        self.opened = 0
        self.client = Client(self._open, max_connections=8)

    async def _open(self) -> P2PStream:
        self.opened += 1
        return await self.asker.open_stream(self.server.peer_id, HTTP, timeout_s=30)


@asynccontextmanager
async def pair(handler: Handler) -> AsyncIterator[Pair]:
    async def serve(stream: P2PStream) -> None:
        await serve_stream(stream, handler, remote=Remote(peer=str(stream.remote_address)), half_close=True)

    async with host({HTTP: serve}) as server, host({}, listen=()) as asker:
        await asker.connect(server.addresses[0], timeout_s=30)
        yield Pair(server, asker)


async def mirror(exchange: Exchange) -> None:
    await exchange.send_head(200, [(b"x-peer", exchange.remote.peer.encode())])
    while data := await exchange.receive():
        await exchange.send(data)
    await exchange.end([(b"ngpu-receipt", b"r"), *exchange.trailers])


@trio_test
async def test_one_stream_carries_many_requests() -> None:
    async with pair(mirror) as peers:
        for number in range(20):
            async with peers.client.request("POST", f"/{number}", body=b"%d" % number) as response:
                assert await response.read(100) == b"%d" % number
                assert response.trailers == [(b"ngpu-receipt", b"r")]
                assert response.headers[0] == (b"x-peer", str(peers.asker.address).encode())
        assert peers.opened == 1


@trio_test
async def test_long_bodies_flow_both_ways() -> None:
    size, piece = 20_000_000, bytes(range(256)) * 400

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // len(piece)):
            yield piece

    async with pair(mirror) as peers:
        for _ in range(2):
            count = 0
            async with peers.client.request("POST", "/", body=pieces(), trailers=[(b"t", b"1")]) as response:
                async for data in response.body():
                    count += len(data)
                assert response.trailers[-1] == (b"t", b"1")
            assert count == size // len(piece) * len(piece)
        assert peers.opened == 1


@trio_test
async def test_refused_body_does_not_travel_and_accepted_one_does() -> None:
    async def choosy(exchange: Exchange) -> None:
        if exchange.request.target == "/no":
            await exchange.respond(429, [(b"ngpu-refused", b"no_free_slot")], b"")
        else:
            await exchange.respond(200, [], b"%d" % len(await exchange.receive_all(1_000_000)))

    async with pair(choosy) as peers:
        async with peers.client.request("POST", "/no", body=bytes(500_000), expect_continue=True) as response:
            assert (response.status, response.body_sent) == (429, False)
        async with peers.client.request("POST", "/yes", body=bytes(500_000), expect_continue=True) as response:
            assert await response.read(100) == b"500000"


@pytest.mark.parametrize("how", ["leave", "disconnect"])
def test_handler_is_cancelled_when_the_other_peer_leaves(how: str) -> None:
    @trio_test
    async def check() -> None:
        gone = trio.Event()

        async def wait(exchange: Exchange) -> None:
            await exchange.send_head(200, [])
            try:
                await trio.sleep(20)
            finally:
                assert exchange.client_gone
                gone.set()

        async with pair(wait) as peers:
            if how == "leave":
                async with peers.client.request("GET", "/"):
                    await trio.sleep(0.1)
            else:
                with pytest.raises(IncompleteError):  # noqa: PT012
                    async with peers.client.request("GET", "/") as response:
                        await peers.asker.disconnect(peers.server.peer_id)
                        await response.receive()
            with trio.fail_after(15):
                await gone.wait()

    check()


@trio_test
async def test_answer_cut_by_the_server_is_incomplete() -> None:
    async def cut(exchange: Exchange) -> None:
        if exchange.request.target == "/half":
            await exchange.send_head(200, [])
            await exchange.send(b"half")
        await exchange.abort()

    async with pair(cut) as peers:
        with pytest.raises(IncompleteError):
            async with peers.client.request("GET", "/half") as response:
                await response.read(100)
        with pytest.raises(MaybeSentError):
            async with peers.client.request("GET", "/nothing"):
                pass
        assert peers.client.pool.open == 0


@trio_test
async def test_kept_stream_of_a_lost_connection_is_not_used() -> None:
    async with pair(mirror) as peers:
        async with peers.client.request("GET", "/") as response:
            await response.read(10)
        assert peers.client.pool.idle == 1
        await peers.asker.disconnect(peers.server.peer_id)
        with pytest.raises(NotSentError):  # and not `MaybeSentError`: nothing was tried on the dead stream
            async with peers.client.request("GET", "/"):
                pass
        await peers.asker.connect(peers.server.addresses[0], timeout_s=30)
        async with peers.client.request("GET", "/") as response:
            assert response.status == 200


@trio_test
async def test_client_that_ends_its_half_still_gets_its_answer() -> None:
    async def slow(exchange: Exchange) -> None:
        await trio.sleep(1)
        await exchange.respond(200, [], b"late")

    async with pair(slow) as peers:
        stream = await peers.asker.open_stream(peers.server.peer_id, HTTP, timeout_s=30)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await stream.send_eof()
        answer = b""
        while data := await stream.receive_some():
            answer += data
        assert answer.endswith(b"late")
        await stream.aclose()


@trio_test
async def test_switched_streams_pass_raw_bytes() -> None:
    async def chat(exchange: Exchange) -> None:
        stream = await exchange.upgrade()
        while data := await stream.receive_some():
            await stream.send_all(data.upper())

    fields = [(b"connection", b"upgrade"), (b"upgrade", b"chat")]
    async with pair(chat) as peers, peers.client.request("GET", "/", fields) as response:
        assert response.upgraded is not None
        for word in (b"one", b"two"):
            await response.upgraded.send_all(word)
            assert await response.upgraded.receive_some() == word.upper()
        await response.upgraded.send_eof()
        assert await response.upgraded.receive_some() == b""
