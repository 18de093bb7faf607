"""How streams end: cut so that nothing looks complete, or lingering so that a last answer arrives; and switched ones.

Works on any `trio.abc.Stream`. One that has an async method `reset` (libp2p's, our TCP's) is cut with it, also beneath
TLS. All of it is meant to run under cancellation, so each function brings its own shield and
deadline.
"""

import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

_CLOSE_GRACE_S = 2.0
_LINGER_BYTES = 1024 * 1024
_LINGER_NOTHING = struct.pack("ii", 1, 0)


async def abort_stream(stream: trio.abc.Stream) -> None:
    """Cut *stream*: the other side sees a reset, never a proper end."""
    with trio.move_on_after(_CLOSE_GRACE_S, shield=True):
        transport: Any = stream
        while isinstance(transport, trio.SSLStream):
            transport = transport.transport_stream
        reset = getattr(transport, "reset", None)
        if reset is not None:
            await reset()
            return
        if isinstance(transport, trio.SocketStream):
            with contextlib.suppress(OSError):  # already closed
                transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOTHING)
        await trio.aclose_forcefully(transport)


async def close_stream(stream: trio.abc.Stream) -> None:
    """Close *stream* in order, or forcefully when that takes too long."""
    with trio.move_on_after(_CLOSE_GRACE_S, shield=True) as scope:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            await stream.aclose()
    if scope.cancelled_caught:
        await abort_stream(stream)


async def linger_and_close(stream: trio.abc.Stream) -> None:
    """Close *stream* after an answer that went out before all of the request came in.

    Closing a TCP socket with unread input resets it, and the reset may overtake the answer (RFC 9112 section 9.6): so
    end our side, then read on for a moment until the client has closed its own.
    """
    with trio.move_on_after(_CLOSE_GRACE_S, shield=True):
        try:
            send_eof = getattr(stream, "send_eof", None)
            if send_eof is not None:
                await send_eof()
                left = _LINGER_BYTES
                while left > 0:
                    data = await stream.receive_some(65536)
                    if not data:
                        break
                    left -= len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
    await close_stream(stream)


class SwitchedStream(trio.abc.HalfCloseableStream):
    """The raw bytes of a connection after 101 Switching Protocols; the connection belongs to whoever holds this.

    Bytes that came with the head are received first.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        leftover: bytes,
        read: Callable[[], Awaitable[bytes]] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Wrap *stream*.

        Args:
            stream: The connection.
            leftover: Bytes received beyond the head.
            read: Replaces the stream's own `receive_some` where somebody else may hold its reading end.
            on_close: Called once when the stream is closed.
        """
        self._stream = stream
        self._leftover = leftover
        self._read = read
        self._on_close = on_close

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return some bytes, b"" at the end. Raises `trio.BrokenResourceError` when the connection broke."""
        if not self._leftover:
            if self._read is None:
                return bytes(await self._stream.receive_some(max_bytes))
            self._leftover = await self._read()
        if max_bytes is None:
            max_bytes = len(self._leftover)
        data, self._leftover = self._leftover[:max_bytes], self._leftover[max_bytes:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of *data*."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until sending may make progress."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """End our side; the other may go on sending. Does nothing where the stream cannot close by halves (TLS)."""
        send_eof = getattr(self._stream, "send_eof", None)
        if send_eof is not None:
            await send_eof()

    async def aclose(self) -> None:
        """Close the connection."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
        await self._stream.aclose()

    async def reset(self) -> None:
        """Cut the connection."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
        await abort_stream(self._stream)
