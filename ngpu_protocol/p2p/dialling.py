"""Opening a TCP connection, where wanted always from one local port, so that NATs show it to everybody as one port."""

from __future__ import annotations

import errno
import ipaddress
import socket

import trio

__all__ = ["DialPort", "open_tcp"]


class DialPort:
    """A local IPv4 port that dials go out from. Held until `close`."""

    def __init__(self) -> None:
        """Take a free port.

        Raises:
            OSError: there is none.
        """
        self._holder = _bound(0)
        self.port: int = self._holder.getsockname()[1]

    async def connect(self, endpoint: tuple[str, int]) -> trio.SocketStream:
        """Return a connection from this port.

        Raises:
            OSError: it did not come about; EADDRNOTAVAIL where one between the same two ports is not over yet.
        """
        sock = trio.socket.from_stdlib_socket(_bound(self.port))
        done = False
        try:
            await sock.connect(endpoint)
            done = True
        finally:
            if not done:
                sock.close()
        return trio.SocketStream(sock)

    def close(self) -> None:
        """Let go of the port."""
        self._holder.close()


def _bound(port: int) -> socket.socket:
    # SO_REUSEPORT among sockets that all say so, none of which listens: nobody's connections are taken.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("0.0.0.0", port))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


async def open_tcp(endpoint: tuple[str, int], port: DialPort | None) -> trio.SocketStream:
    """Return a connection to *endpoint*, from *port* where that works.

    Raises:
        OSError: it did not come about.
    """
    if port is not None and _is_plain_ipv4(endpoint[0]):
        try:
            return await port.connect(endpoint)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
    return await trio.open_tcp_stream(*endpoint)


_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)  # a connection between the same ports stands, or lingers


def _is_plain_ipv4(host: str) -> bool:
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return not address.is_loopback
