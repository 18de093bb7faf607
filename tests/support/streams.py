"""A pair of connected byte streams in memory whose cuts are visible, as on TCP and libp2p.

trio's own memory streams end alike whether they were closed or cut; the difference is what many tests are about.
"""

from __future__ import annotations

import trio
from trio.testing import MemoryReceiveStream, MemorySendStream, memory_stream_one_way_pair


class FakeStream(trio.abc.HalfCloseableStream):
    """One end.

    Attributes:
        writes: What each `send_all` was given.
        ended: This end was closed in order.
        was_reset: This end cut the connection.
        stall: While set to an unset event, sending waits for it: a peer that does not read.
    """

    def __init__(self, sender: MemorySendStream, receiver: MemoryReceiveStream) -> None:
        self._sender = sender
        self._receiver = receiver
        self.peer: FakeStream | None = None
        self.writes: list[bytes] = []
        self.ended = False
        self.was_reset = False
        self.broken = False
        self.stall: trio.Event | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.stall is not None:
            await self.stall.wait()
        self._check()
        assert self.peer is not None
        if self.peer.ended:
            raise trio.BrokenResourceError("the peer closed")
        self.writes.append(bytes(data))
        await self._sender.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self._check()
        data = bytes(await self._receiver.receive_some(max_bytes))
        if not data:
            self._check()
        return data

    async def send_eof(self) -> None:
        self._check()
        await self._sender.aclose()

    async def aclose(self) -> None:
        if not self.ended:
            self.ended = True
            self._sender.close()
            self._receiver.close()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.was_reset = True
        assert self.peer is not None
        if not self.ended:
            self.peer.broken = True
        await self.aclose()

    def is_readable(self) -> bool:
        """Whether receiving would not wait, for a pool that asks before it uses a kept connection."""
        assert self.peer is not None
        return self.ended or self.broken or self.peer.ended

    def _check(self) -> None:
        if self.ended:
            raise trio.ClosedResourceError("closed here")
        if self.broken:
            raise trio.BrokenResourceError("the peer reset the connection")


def stream_pair() -> tuple[FakeStream, FakeStream]:
    """Return two connected streams; what one sends, the other receives at once and without bound."""
    to_right, from_left = memory_stream_one_way_pair()
    to_left, from_right = memory_stream_one_way_pair()
    left, right = FakeStream(to_right, from_right), FakeStream(to_left, from_left)
    left.peer, right.peer = right, left
    return left, right


async def receive_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    """Return what comes up to and with *end*; fails the test when the stream ends before."""
    data = b""
    while end not in data:
        more = await stream.receive_some()
        assert more, f"the stream ended after {data!r}"
        data += more
    return data


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Return everything up to the end of the stream."""
    data = b""
    while more := await stream.receive_some():
        data += more
    return data
