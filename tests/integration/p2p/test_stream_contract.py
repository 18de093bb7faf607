"""trio's own conformance tests for streams, over a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import check_half_closeable_stream, trio_test

from ngpu_protocol.p2p import Host, HostLimits, P2PStream
from tests.integration.p2p.peers import host

PAIR = "/test/pair/1.0.0"


class Yielding(trio.abc.HalfCloseableStream):
    """A P2PStream that always yields, which the conformance tests insist on and P2PStream leaves out for speed."""

    def __init__(self, stream: P2PStream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return await self.stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


@asynccontextmanager
async def pairs() -> AsyncIterator[tuple[Host, Host, trio.MemoryReceiveChannel[P2PStream]]]:
    """Yield two connected hosts and the channel on which the server's ends of streams come."""
    send, receive = trio.open_memory_channel[P2PStream](10)

    async def hand_over(stream: P2PStream) -> None:
        await send.send(stream)
        await trio.sleep_forever()  # the test has it now

    limits = HostLimits(linger_s=0.1, health_interval_s=0.1, health_timeout_s=5)
    async with host({PAIR: hand_over}, limits=limits) as server, host({}, listen=(), limits=limits) as client:
        await client.connect(server.addresses[0], timeout_s=30)
        yield server, client, receive


@trio_test
async def test_trio_takes_it_for_a_stream() -> None:
    async with pairs() as (server, client, receive):

        async def maker() -> tuple[Yielding, Yielding]:
            ours = await client.open_stream(server.peer_id, PAIR, timeout_s=30)
            return Yielding(ours), Yielding(await receive.receive())

        async def clogged_maker() -> tuple[Yielding, Yielding]:
            left, right = await maker()
            for stream in (left, right):
                with trio.move_on_after(0.2):
                    while True:
                        await stream.send_all(bytes(65536))
            return left, right

        with trio.fail_after(60):
            await check_half_closeable_stream(maker, clogged_maker)
