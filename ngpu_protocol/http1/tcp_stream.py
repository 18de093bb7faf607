"""A TCP connection as a stream, with as few turns of the event loop as fairness allows.

`trio.SocketStream` gives up the processor after every send, and tries each receive before it waits: for a server that
answers small requests this is a third of all its time (48 against 33 us of CPU a request, measured with
`tests/bench/http1_server.py`). Here a send that the kernel takes at once returns at once, and yields every 64 KiB; a
receive yields always, so a client that never stops talking cannot hold the processor.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Awaitable, Callable

import trio

_READ_BYTES = 65536
_YIELD_BYTES = 65536
_LINGER_NOTHING = struct.pack("ii", 1, 0)


class NothingSentError(trio.BrokenResourceError):
    """The connection was broken before any byte of this `send_all` was taken: what it would have said, nobody heard."""


class TcpStream(trio.abc.HalfCloseableStream):
    """One TCP connection. As on any stream, one task may send and one may receive at a time."""

    __slots__ = ("_sending", "_sent_since_yield", "_socket")

    def __init__(self, connection: socket.socket) -> None:
        """Take over *connection*, a connected socket of the standard library."""
        self._socket = connection
        self._sending = False
        self._sent_since_yield = 0
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # not TCP but a Unix socket
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def taken_from(cls, stream: trio.SocketStream) -> TcpStream:
        """Return a stream that takes over the socket of *stream*, which must not be used any more."""
        return cls(socket.socket(fileno=stream.socket.detach()))

    @property
    def remote_host_and_port(self) -> tuple[str, int]:
        """The other side's address.

        Raises:
            OSError: It is gone already.
        """
        name = self._socket.getpeername()
        return name[0], name[1]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand all of *data* to the kernel, waiting while it takes no more.

        Raises:
            NothingSentError: The connection is broken, and was before this call.
            trio.BrokenResourceError: It broke meanwhile.
            trio.ClosedResourceError: The stream was closed here.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this connection")
        size = len(data)
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise _translated(error, NothingSentError) from error
        if sent < size:
            await self._send_rest(memoryview(data)[sent:])
            return
        self._sent_since_yield += size
        if self._sent_since_yield >= _YIELD_BYTES:
            self._sent_since_yield = 0
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def _send_rest(self, rest: memoryview) -> None:
        self._sending = True
        try:
            while rest:
                await trio.lowlevel.wait_writable(self._socket)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self._socket.send(rest) :]
        except OSError as error:
            raise _translated(error, trio.BrokenResourceError) from error
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel takes bytes again."""
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except OSError as error:
            raise _translated(error, trio.BrokenResourceError) from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has come, waiting if that is nothing yet; b"" at the end.

        Raises:
            trio.BrokenResourceError: The connection was reset or lost.
            trio.ClosedResourceError: The stream was closed here.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            try:
                data = self._socket.recv(max_bytes or _READ_BYTES)
            except BlockingIOError:
                pass
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                with contextlib.suppress(BlockingIOError):
                    return self._socket.recv(max_bytes or _READ_BYTES)
        except OSError as error:
            raise _translated(error, trio.BrokenResourceError) from error

    def is_readable(self) -> bool:
        """Return whether `receive_some` would return, or raise, without waiting."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def send_eof(self) -> None:
        """End our side; the other may go on."""
        await trio.lowlevel.checkpoint()
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise _translated(error, trio.BrokenResourceError) from error

    async def aclose(self) -> None:
        """Close the connection in order."""
        self._close()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Cut the connection: the other side gets an error, never an end."""
        with contextlib.suppress(OSError):  # closed already
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOTHING)
        self._close()
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


def tcp_opener(host: str, port: int) -> Callable[[], Awaitable[TcpStream]]:
    """Return a function that connects to *host*, a name or an address, for `Client`."""
    family = _family(host)

    async def connect() -> TcpStream:
        if family is None:
            return TcpStream.taken_from(await trio.open_tcp_stream(host, port))
        # No name to look up and no second address to race: three times as fast.
        connection = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await connection.connect((host, port))
        except BaseException:
            connection.close()
            raise
        return TcpStream(socket.socket(fileno=connection.detach()))

    return connect


def _family(host: str) -> socket.AddressFamily | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return family
    return None


def _translated(error: OSError, broken: type[trio.BrokenResourceError]) -> Exception:
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("this connection was closed here")
    return broken(f"the connection broke: {error}")
