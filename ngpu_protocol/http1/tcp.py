"""HTTP/1.1 on TCP: listening (IPv6 wherever IPv4), TLS, bounded connections; and TLS for clients."""

import errno
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
import trio

from ngpu_protocol.http1.draining import Draining
from ngpu_protocol.http1.exchange import Handler, Remote
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.server import Describe, ServerConnection, describe
from ngpu_protocol.http1.streams import abort_stream, linger_and_close
from ngpu_protocol.http1.tcp_stream import TcpStream, tcp_opener

_log = structlog.get_logger("ngpu.http1")

_TLS_HANDSHAKE_S = 10.0
_REFUSAL_S = 1.0
_MAX_REFUSING = 64
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
    describe: Describe = describe,
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
        describe: What is said of a request that breaks the rules, so that the handler never sees it.
        task_status: Started with the bound addresses.

    Raises:
        OSError: The address cannot be bound.
    """
    limits = limits or Limits()
    listeners = await open_listeners(host, port)
    served = _Served(handler, limits, tls, Draining() if draining is None else draining, describe)
    async with trio.open_nursery() as nursery:
        accepting = trio.CancelScope()

        async def accept() -> None:
            with accepting:
                await trio.serve_listeners(served.connection, listeners, handler_nursery=nursery)

        nursery.start_soon(accept)
        task_status.started([BoundAddress(*one.socket.getsockname()[:2]) for one in listeners])
        if draining is not None:
            await draining.wait_started()
            accepting.cancel()
            # The nursery waits for the connections.


class _Served:
    """The connections of one listener."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        tls: ssl.SSLContext | None,
        draining: Draining,
        describe: Describe,
    ) -> None:
        self._describe = describe
        self._handler = handler
        self._limits = limits
        self._tls = tls
        self._draining = draining
        self._connections: set[ServerConnection] = set()
        self._shaking_hands = 0
        self._refusing = 0

    async def connection(self, accepted: trio.SocketStream) -> None:
        """Serve one accepted connection; never raises for what happens on it."""
        stream = TcpStream.taken_from(accepted)
        try:
            if not self._make_room():
                await self._refuse(stream)
                return
            host, port = stream.remote_host_and_port
            connection = ServerConnection(
                stream if self._tls is None else await self._secure(stream, self._tls),
                self._handler,
                limits=self._limits,
                remote=Remote(host=host, port=port),
                date=True,
                closing=self._draining.active,
                describe=self._describe,
            )
            self._connections.add(connection)
            try:
                with self._draining.connection(connection.drain):
                    await connection.run()
            finally:
                self._connections.remove(connection)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            await abort_stream(stream)  # gone before it was served, or no TLS
        except Exception:
            _log.exception("connection_failed")  # a fault of ours, which must not end the listener
            await abort_stream(stream)

    async def _secure(self, stream: TcpStream, tls: ssl.SSLContext) -> trio.abc.Stream:
        secure = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        self._shaking_hands += 1
        try:
            with trio.fail_after(_TLS_HANDSHAKE_S):
                await secure.do_handshake()
        finally:
            self._shaking_hands -= 1
        return secure

    def _make_room(self) -> bool:
        """Return whether another connection may be served, after closing the longest idle one if that is needed."""
        if len(self._connections) + self._shaking_hands < self._limits.max_connections:
            return True
        idle = [one for one in self._connections if not one.closing]
        resting = [(one.idle_since_s, one) for one in idle if one.idle_since_s is not None]
        if not resting:
            return False
        min(resting, key=lambda pair: pair[0])[1].drain()
        return True

    async def _refuse(self, stream: TcpStream) -> None:
        """Say that there are too many connections; to a TLS client it is noise, and closed all the same."""
        if self._refusing >= _MAX_REFUSING:
            await trio.aclose_forcefully(stream)
            return
        self._refusing += 1
        try:
            with trio.move_on_after(_REFUSAL_S):
                await stream.send_all(_OVERLOADED)
                await linger_and_close(stream)
        finally:
            self._refusing -= 1
            await abort_stream(stream)


def tls_opener(
    host: str, port: int, tls: ssl.SSLContext, *, server_hostname: str | None = None
) -> Callable[[], Awaitable[trio.abc.Stream]]:
    """Return a function that connects to *host* with TLS, for `Client`; the handshake is part of it."""
    connect = tcp_opener(host, port)

    async def connect_securely() -> trio.abc.Stream:
        stream = await connect()
        try:
            secure = trio.SSLStream(stream, tls, server_hostname=server_hostname or host, https_compatible=True)
            await secure.do_handshake()
        except BaseException:
            await abort_stream(stream)
            raise
        return secure

    return connect_securely
