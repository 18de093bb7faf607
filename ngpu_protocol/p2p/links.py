"""The bytes under a secured connection, with a way to write that does not wait.

`TcpLink` drives the socket's descriptor itself: it reads into a standing buffer, writes many pieces in one call, and
passes by three layers of locks (py-libp2p's TrioTCPStream, RawConnection and read_exactly). A `RawLink` does the same
work over any raw connection of the library (a relayed one has no socket of its own).

Invariant: nothing touches the descriptor after `close`, since its number may already be someone else's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import trio
from libp2p.abc import IRawConnection
from multiaddr import Multiaddr

__all__ = ["Link", "LinkClosedError", "RawLink", "TcpLink"]

_MAX_IOVEC = 64  # IOV_MAX is 1024 on Linux; more than this at once gains nothing


class LinkClosedError(Exception):
    """The link is gone, by our doing or the remote's; the text says which."""


class Link(Protocol):
    """What a secured connection needs from below."""

    remote: tuple[str, int] | None
    where: list[Multiaddr]

    def try_write(self, pieces: list[bytes]) -> list[bytes]:
        """Write what can be written without waiting and return the rest, in order."""
        ...

    async def write_some(self, pieces: list[bytes]) -> list[bytes]:
        """Wait until something can be written, write it and return the rest, in order.

        Cancelled, it is unknown what was written, and the link can only be closed.
        """
        ...

    async def read_into(self, buffer: memoryview) -> int:
        """Read at least one byte into *buffer* and return how many; 0 is the remote's clean end."""
        ...

    def shutdown(self) -> None:
        """Tell the remote that no more will be written."""
        ...

    def close(self) -> None:
        """Let go at once, without waiting; waiting reads and writes raise LinkClosedError."""
        ...


class TcpLink:
    """A connected TCP socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket  # kept: it owns the descriptor
        self._fd = self._socket.fileno()
        self._fileno = self._socket.fileno  # -1 once closed, by whoever closed it
        self._drained = False
        self.where: list[Multiaddr] = []
        try:
            self.remote: tuple[str, int] | None = tuple(stream.socket.getpeername()[:2])
        except OSError:
            self.remote = None  # the remote was gone before we looked
        else:
            host, port = self.remote
            self.where.append(Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"))

    def try_write(self, pieces: list[bytes]) -> list[bytes]:
        while pieces:
            if self._fileno() < 0:
                raise LinkClosedError("closed here")
            batch = pieces[:_MAX_IOVEC]
            try:
                written = os.writev(self._fd, batch)
            except BlockingIOError:
                return pieces
            except OSError as error:
                raise LinkClosedError(f"write failed: {error.strerror}") from error
            pieces = _after(pieces, written)
        return pieces

    async def write_some(self, pieces: list[bytes]) -> list[bytes]:
        if self._fileno() < 0:
            raise LinkClosedError("closed here")
        try:
            await trio.lowlevel.wait_writable(self._fd)
        except trio.ClosedResourceError as error:
            raise LinkClosedError("closed here") from error
        return self.try_write(pieces)

    async def read_into(self, buffer: memoryview) -> int:
        # A read that left room emptied the socket: waiting at once saves the system call that would say so. A read
        # that filled the buffer yields first, so that one fast peer cannot keep every other task from running.
        if self._drained:
            await self._wait_readable()
        else:
            await trio.lowlevel.checkpoint()
        while True:
            if self._fileno() < 0:
                raise LinkClosedError("closed here")
            try:
                count = os.readv(self._fd, [buffer])
            except BlockingIOError:
                await self._wait_readable()
            except OSError as error:
                raise LinkClosedError(f"read failed: {error.strerror}") from error
            else:
                self._drained = count < len(buffer)
                return count

    async def _wait_readable(self) -> None:
        if self._fileno() < 0:
            raise LinkClosedError("closed here")
        try:
            await trio.lowlevel.wait_readable(self._fd)
        except trio.ClosedResourceError as error:
            raise LinkClosedError("closed here") from error

    def shutdown(self) -> None:
        if self._fileno() >= 0:
            with suppress(OSError):  # already gone is all the same here
                self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


class RawLink:
    """Any raw connection of the library; nothing can be written without waiting."""

    def __init__(self, raw: IRawConnection, nursery: trio.Nursery) -> None:
        self._raw = raw
        self._nursery = nursery  # the library's close() wants to be awaited; ours must not wait
        self._open = True
        self.remote = raw.get_remote_address()
        self.where = raw.get_transport_addresses()

    def try_write(self, pieces: list[bytes]) -> list[bytes]:
        if not self._open:
            raise LinkClosedError("closed here")
        return pieces

    async def write_some(self, pieces: list[bytes]) -> list[bytes]:
        try:
            await self._raw.write(b"".join(pieces))
        except Exception as error:  # the library's transports raise from many unrelated families
            raise LinkClosedError(f"write failed: {error}") from error
        return []

    async def read_into(self, buffer: memoryview) -> int:
        if not self._open:
            raise LinkClosedError("closed here")
        try:
            data = await self._raw.read(len(buffer))
        except Exception as error:
            raise LinkClosedError(f"read failed: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self) -> None:
        pass  # raw connections of the library have no half-close

    def close(self) -> None:
        if self._open:
            self._open = False
            self._nursery.start_soon(self._close_raw)

    async def _close_raw(self) -> None:
        with trio.move_on_after(1):
            with suppress(Exception):  # a failure to close leaves nothing to do
                await self._raw.close()


def _after(pieces: Sequence[bytes], written: int) -> list[bytes]:
    """Return what is left of *pieces* once their first *written* bytes are gone."""
    for index, piece in enumerate(pieces):
        if written < len(piece):
            return [piece[written:], *pieces[index + 1 :]] if written else list(pieces[index:])
        written -= len(piece)
    return []
