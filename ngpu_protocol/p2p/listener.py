"""Accepting TCP connections, with a limit on what one address of the world may hold.

Traps closed here:

- The library's listener sets SO_REUSEPORT: two hosts bind one port without an error and the kernel deals connections
  to either. This one does not, so the second is told.
- Its limit on inbound connections counts all alike, so 300 idle TCP connections from one place fill it. Here the
  connections from one IPv4 address or IPv6 /64 are counted, apart from those still in their handshake.
- An exception while accepting ends its accept loop, silently. Here it is retried (running out of descriptors passes).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog
import trio
from libp2p.abc import IListener
from multiaddr import Multiaddr

from ngpu_protocol.p2p.errors import ListenError
from ngpu_protocol.p2p.limits import HostLimits

__all__ = ["Admission", "TcpListener", "tcp_endpoint"]

_log = structlog.get_logger(__name__)

_BACKLOG = 512
_ACCEPT_RETRY_S = 0.1


class Admission:
    """Counts inbound connections and says whether one more may come. Pure.

    A connection is *upgrading* from `admit` to `upgraded`, and counted until `leave`.
    """

    def __init__(self, limits: HostLimits) -> None:
        self._limits = limits
        self._connections: Counter[str] = Counter()
        self._upgrades: Counter[str] = Counter()

    def admit(self, host: str) -> str | None:
        """Count a connection from *host* and return its key, or None if it must be closed."""
        key, limits = _origin(host), self._limits
        if (
            self._connections.total() >= limits.connections
            or self._upgrades.total() >= limits.upgrades
            or self._connections[key] >= limits.connections_per_ip
            or self._upgrades[key] >= limits.upgrades_per_ip
        ):
            return None
        self._connections[key] += 1
        self._upgrades[key] += 1
        return key

    def upgraded(self, key: str) -> None:
        """The handshake is over, for good or ill; call once."""
        _decrement(self._upgrades, key)

    def leave(self, key: str) -> None:
        """The connection is gone; call once."""
        _decrement(self._connections, key)


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]


def _origin(host: str) -> str:
    """Return what is counted as one place: an IPv4 address, or the /64 that is given to one site in IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


def tcp_endpoint(multiaddr: Multiaddr) -> tuple[str, int] | None:
    """Return host (an IP address or a DNS name) and port of a plain TCP multiaddr, or None if it is something else."""
    parts = list(multiaddr.items())
    names = [protocol.name for protocol, _ in parts]
    if names[:2] not in ([kind, "tcp"] for kind in ("ip4", "ip6", "dns", "dns4", "dns6")):
        return None
    if names[2:] not in ([], ["p2p"]):
        return None
    return str(parts[0][1]), int(str(parts[1][1]))


class TcpListener(IListener):
    """One listening socket. Connections are handled in the nursery given, which outlives it."""

    def __init__(
        self,
        handler: Callable[[trio.SocketStream, str], Awaitable[None]],
        admission: Admission,
        nursery: trio.Nursery,
    ) -> None:
        self._handler = handler
        self._admission = admission
        self._nursery = nursery
        self._listener: trio.SocketListener | None = None
        self._scope = trio.CancelScope()

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and begin to accept.

        Raises:
            ListenError: the address is not plain TCP on an IP address, or the system refuses it.
        """
        endpoint = tcp_endpoint(maddr)
        if endpoint is None:
            raise ListenError(str(maddr), "only /ip4 or /ip6 with /tcp can be listened on")
        host, port = endpoint
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            ipaddress.ip_address(host)
        except ValueError as error:
            raise ListenError(str(maddr), "give the IP address of an interface, not a name") from error
        try:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise ListenError(str(maddr), error.strerror or str(error)) from error
        try:
            # Ports in TIME_WAIT may be reused, ports in use may not: that is SO_REUSEADDR on Linux.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await sock.bind((host, port))
            sock.listen(_BACKLOG)
        except (OSError, ValueError) as error:
            sock.close()
            raise ListenError(str(maddr), getattr(error, "strerror", None) or str(error)) from error
        self._listener = trio.SocketListener(sock)
        self._nursery.start_soon(self._accept_loop, self._listener)

    async def _accept_loop(self, listener: trio.SocketListener) -> None:
        with self._scope:
            while True:
                try:
                    stream = await listener.accept()
                except trio.ClosedResourceError:
                    return
                except OSError as error:
                    if error.errno not in (errno.ECONNABORTED, errno.EPERM):
                        _log.warning("accept_failed", reason=error.strerror)
                        await trio.sleep(_ACCEPT_RETRY_S)
                    continue
                self._nursery.start_soon(self._handle, stream)

    async def _handle(self, stream: trio.SocketStream) -> None:
        key: str | None = None
        try:
            key = self._admission.admit(stream.socket.getpeername()[0])
            if key is not None:
                await self._handler(stream, key)
        except OSError:
            pass  # gone before we looked
        finally:
            stream.socket.close()
            if key is not None:
                self._admission.leave(key)

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        if self._listener is None:
            return ()
        host, port = self._listener.socket.getsockname()[:2]
        return (Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"),)

    def close_nowait(self) -> None:
        """Stop accepting and free the port."""
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None
        self._scope.cancel()

    async def close(self) -> None:
        self.close_nowait()
