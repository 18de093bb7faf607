"""HTTP/1.1 on TCP: listening (IPv6 wherever IPv4), TLS, bounded connections, and opening connections as a client."""

import contextlib
import errno
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from ngpu_protocol.http1.draining import Draining
from ngpu_protocol.http1.exchange import Handler, Remote
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.server import serve_stream
from ngpu_protocol.http1.streams import abort_stream

_TLS_HANDSHAKE_S = 10.0
_BIND_ATTEMPTS = 8
_OVERLOADED_BODY = b'{"reason":"too_many_connections","message":"too many connections; try again shortly"}'
_OVERLOADED = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"retry-after: 1\r\nconnection: close\r\n\r\n%b"
) % (len(_OVERLOADED_BODY), _OVERLOADED_BODY)

# Names and wildcards that mean the same place in both families.
_BOTH_FAMILIES = {
    "": ("0.0.0.0", "::"),
    "0.0.0.0": ("0.0.0.0", "::"),
    "::": ("0.0.0.0", "::"),
    "localhost": ("127.0.0.1", "::1"),
    "127.0.0.1": ("127.0.0.1", "::1"),
    "::1": ("127.0.0.1", "::1"),
}


@dataclass(frozen=True, slots=True)
class BoundAddress:
    """Where a server listens; `str` gives `127.0.0.1:8080` or `[::1]:8080`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Bind *host* and *port* in both address families where it names a place in both (wildcards, loopback).

    A family the machine does not have is left out. Port 0 takes one free port for both.

    Raises:
        OSError: The address is in use or not ours.
    """
    hosts = _BOTH_FAMILIES.get(host, (host,))
    for attempt in range(_BIND_ATTEMPTS):
        listeners: list[trio.SocketListener] = []
        bound_port = port
        try:
            for one in hosts:
                try:
                    opened = await trio.open_tcp_listeners(bound_port, host=one)
                except OSError as error:
                    # No IPv6 (or no IPv4) here: the other family is enough. In use is another matter.
                    if len(hosts) > 1 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        continue
                    raise
                listeners.extend(opened)
                bound_port = opened[0].socket.getsockname()[1]
        except OSError:
            for listener in listeners:
                listener.socket.close()
            # With port 0 the second family may find the first one's free port taken: try another.
            if port != 0 or attempt == _BIND_ATTEMPTS - 1 or not listeners:
                raise
            continue
        if listeners:
            return listeners
    raise OSError(f"no address of {host or 'this host'} can be listened on")


async def serve_tcp(
    handler: Handler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    tls: ssl.SSLContext | None = None,
    draining: Draining | None = None,
    task_status: trio.TaskStatus[list[BoundAddress]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve HTTP/1.1 on TCP. Reports the bound addresses once it listens.

    Without *draining* it runs until cancelled, and cancelling cuts running requests. With it: when the switch is thrown
    it stops accepting, lets running requests finish and returns; limiting the time of that is the caller's.

    Args:
        handler: See `serve_stream`.
        host: An address or name; loopback and wildcards are taken in both families.
        port: 0 for a free one.
        limits: Of each connection; `max_connections` is this listener's.
        tls: Serve TLS with this context.
        draining: The switch that ends it.
        task_status: Started with the bound addresses.

    Raises:
        OSError: The address cannot be bound.
    """
    limits = limits or Limits()
    listeners = await open_listeners(host, port)
    switch = Draining() if draining is None else draining
    open_connections = 0

    async def connection(stream: trio.SocketStream) -> None:
        nonlocal open_connections
        if open_connections >= limits.max_connections:
            with trio.move_on_after(1.0):
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(_OVERLOADED)
            await trio.aclose_forcefully(stream)
            return
        open_connections += 1
        try:
            address = stream.socket.getpeername()
            remote = Remote(host=address[0], port=address[1])
            served: trio.abc.Stream = stream
            if tls is not None:
                secure: trio.SSLStream[trio.SocketStream] = trio.SSLStream(
                    stream, tls, server_side=True, https_compatible=True
                )
                with trio.fail_after(_TLS_HANDSHAKE_S):
                    await secure.do_handshake()
                served = secure
            await serve_stream(served, handler, limits=limits, remote=remote, date=True, draining=switch)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            await abort_stream(stream)
        finally:
            open_connections -= 1

    async with trio.open_nursery() as nursery:
        addresses = [BoundAddress(*one.socket.getsockname()[:2]) for one in listeners]
        accepting = trio.CancelScope()

        async def accept() -> None:
            with accepting:
                await trio.serve_listeners(connection, listeners, handler_nursery=nursery)

        nursery.start_soon(accept)
        task_status.started(addresses)
        if draining is not None:
            await draining.wait_started()
            accepting.cancel()


def tcp_opener(
    host: str, port: int, *, tls: ssl.SSLContext | None = None, server_hostname: str | None = None
) -> Callable[[], Awaitable[trio.abc.Stream]]:
    """Return a function that opens a TCP (or TLS) connection, for `Client`."""

    async def open_one() -> trio.abc.Stream:
        stream = await trio.open_tcp_stream(host, port)
        if tls is None:
            return stream
        return trio.SSLStream(stream, tls, server_hostname=server_hostname or host, https_compatible=True)

    return open_one


__all__ = ["BoundAddress", "open_listeners", "serve_tcp", "tcp_opener"]
