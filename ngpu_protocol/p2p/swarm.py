"""The library's swarm with its connection handling replaced: dialling, accepting, and what a connection is.

The library's protocols (identify, ping, the DHT) go on working through the interfaces they know: `Swarm.connections`,
`new_stream`, `dial_peer`. What they do not see any more are these traps, all closed in this module:

- An exception that leaves a stream handler tears down the host: `Connection._serve` contains it.
- An inbound connection keeps its slot of 250 until the host ends, long after it is closed: slots are given back.
- One address per transport is dialled, a failed peer is refused for 60 s (negative cache), and each dial waits 250 ms
  for a second address: `dial_peer` tries every known address in turn and remembers no failures.
- The auto-connector and the pruner dial and close connections by themselves: `run` starts neither.
- Closing sleeps 0.1 s twice per connection and notifies in between: `Connection.close` is immediate.
- Errors of `listen` are swallowed: here they are raised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog
import trio
from libp2p.abc import IMuxedConn, IMuxedStream, INetConn, IRawConnection, ISecureConn
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream, StreamState
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from ngpu_protocol.identity import Account, Address, AddressError, address_of_peer_id
from ngpu_protocol.p2p import negotiation
from ngpu_protocol.p2p.dialling import DialPort, open_tcp
from ngpu_protocol.p2p.errors import P2PError
from ngpu_protocol.p2p.events import EventFan, PeerConnected, PeerDisconnected
from ngpu_protocol.p2p.limits import HostLimits
from ngpu_protocol.p2p.listener import Admission, TcpListener, tcp_endpoint
from ngpu_protocol.p2p.noise import NoiseChannel, security_options
from ngpu_protocol.p2p.stream import P2PStream
from ngpu_protocol.p2p.yamux import PROTOCOL as YAMUX
from ngpu_protocol.p2p.yamux import Muxer, PeerQuota

__all__ = ["Connection", "SafeSwarm", "StreamHandler", "address_or_none", "first_text", "innermost_reason"]

_log = structlog.get_logger(__name__)

StreamHandler = Callable[[P2PStream], Awaitable[None]]

_GOODBYE_S = 1.0


def address_or_none(peer_id: str) -> Address | None:
    """Return the account address of a peer, None for a foreign one whose key is not secp256k1."""
    try:
        return address_of_peer_id(peer_id)
    except AddressError:
        return None


class _LibraryStream(IMuxedStream):
    """A P2PStream in the shape the library's own protocols expect."""

    def __init__(self, stream: P2PStream, muxer: Muxer) -> None:
        self.stream = stream
        self.muxed_conn: IMuxedConn = muxer
        self._muxer = muxer

    async def read(self, n: int | None = None) -> bytes:
        try:
            data = await self.stream.receive_some(None if n is None or n < 1 else n)
        except trio.BrokenResourceError as error:
            raise MuxedStreamReset(str(error)) from error
        except trio.ClosedResourceError as error:
            raise MuxedStreamEOF(str(error)) from error
        if not data:
            raise MuxedStreamEOF("end of stream")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError) as error:
            raise MuxedStreamError(str(error)) from error

    async def close(self) -> None:
        # The library's close is a half-close: identify closes, then reads.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            await self.stream.send_eof()

    async def reset(self) -> None:
        self.stream.reset_nowait()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("bound the call with a cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._muxer.get_remote_address()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Connection(SwarmConn):
    """One connection as the library's protocols see it, and the tasks of the streams that came over it."""

    muxed_conn: Muxer
    swarm: SafeSwarm

    def __init__(self, muxer: Muxer, swarm: SafeSwarm, direction: Direction) -> None:
        super().__init__(muxer, swarm, direction)
        self.event_started.set()
        self.opened_at = trio.current_time()
        self.set_transport_info(muxer.get_transport_addresses(), muxer.get_connection_type())
        self.set_negotiated_protocols("/noise", str(YAMUX))

    @property
    def is_relayed(self) -> bool:
        """Whether it goes through a relay, which bounds it in bytes and time."""
        return self.muxed_conn.get_remote_address() is None

    async def start(self) -> None:
        await self.muxed_conn.event_closed.wait()

    async def close(self) -> None:
        self.muxed_conn.close_nowait("closed here")

    async def new_stream(self) -> NetStream:
        """Return a stream for one of the library's protocols."""
        return await self._library_stream(self.muxed_conn.open(), Direction.OUTBOUND)

    async def _library_stream(self, stream: P2PStream, direction: Direction) -> NetStream:
        net_stream = NetStream(_LibraryStream(stream, self.muxed_conn), self, None)
        net_stream._direction = direction
        await net_stream.set_state(StreamState.OPEN)
        self.streams.add(net_stream)
        return net_stream

    def accept(self, stream: P2PStream) -> None:
        """Serve an inbound stream in a task of the swarm's: a lost connection breaks the stream, not the handler."""
        self.swarm.nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: P2PStream) -> None:
        swarm, complete = self.swarm, False
        try:
            with trio.fail_after(swarm.limits.negotiation_timeout_s):
                protocol = await negotiation.accept(stream, swarm.speaks)
            handler = swarm.handlers.get(protocol)
            if handler is not None:
                await handler(stream)
            else:
                await self._serve_library(stream, protocol)
            complete = True
        except Exception as error:
            # Whatever happens to a handler ends its stream and nothing else. In the library it ends the host.
            if _is_lost_stream(error):
                pass  # the connection's own line tells it, once for all its streams
            elif isinstance(error, negotiation.NegotiationError | trio.TooSlowError | P2PError):
                _log.info("stream_refused", peer=stream.remote_peer, protocol=stream.protocol, reason=str(error))
            else:
                _log.exception("stream_handler_failed", peer=stream.remote_peer, protocol=stream.protocol)
        finally:
            # Neither needs to wait, so cancellation cannot leave the stream open on both ends, as the library does.
            if complete:
                stream.close_nowait()
            else:
                stream.reset_nowait()
            self.muxed_conn.served(stream)

    async def _serve_library(self, stream: P2PStream, protocol: str) -> None:
        handler = self.swarm.library_handlers[TProtocol(protocol)]
        assert handler is not None
        net_stream = await self._library_stream(stream, Direction.INBOUND)
        net_stream.set_protocol(TProtocol(protocol))
        try:
            await handler(net_stream)
        finally:
            self.remove_stream(net_stream)


class _OurMuxer(MuxerMultistream):
    """Negotiates yamux as the library does, and makes our own of it.

    The library's class makes its own Yamux whatever class was given for that protocol id.
    """

    def __init__(self, limits: HostLimits) -> None:
        super().__init__({YAMUX: Muxer}, negotiate_timeout=max(1, int(limits.upgrade_timeout_s)))
        self._limits = limits

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        assert isinstance(conn, NoiseChannel)
        return Muxer(conn, peer_id, self._limits)


class SafeSwarm(Swarm):
    """Connections and listeners of one host.

    Attributes:
        nursery: where connections and stream handlers run; `open_host` owns it.
        handlers: our protocols and who serves them.
        library_handlers: the same for the library's own (set by the host).
        relayed_dialler: dials what is not plain TCP (`circuits`).
        dial_port: where dials go out from; None: any port each.
    """

    def __init__(
        self,
        account: Account,
        nursery: trio.Nursery,
        limits: HostLimits,
        events: EventFan,
        known: Callable[[Address], bool] | None = None,
    ) -> None:
        key_pair = create_new_key_pair(account.key_bytes)
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        upgrader = TransportUpgrader(security_options(key_pair, nursery), {})
        upgrader.muxer_multistream = _OurMuxer(limits)
        super().__init__(
            peer_id,
            peerstore,
            upgrader,
            transports=[TCP()],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=2**31,  # counted by Admission; this one refuses outbound dials too
                high_watermark=2**31,
                min_connections=0,
                low_watermark=0,
                inbound_upgrade_timeout=limits.upgrade_timeout_s,
                outbound_upgrade_timeout=limits.upgrade_timeout_s,
            ),
        )
        self.notifees.clear()  # the tag store's: it keeps an entry for every peer ever seen, for the pruner
        self.nursery = nursery
        self.limits = limits
        self._known = known
        self.handlers: dict[str, StreamHandler] = {}
        self.library_handlers: Mapping[TProtocol | None, StreamHandlerFn | None] = {}
        self.relayed_dialler: Callable[[str, ID], Awaitable[IRawConnection]] | None = None
        self.dial_port: DialPort | None = None
        self._events = events
        self._admission = Admission(limits)
        self._quotas: dict[ID, PeerQuota] = {}
        self.background_nursery = nursery
        self.event_background_nursery_created.set()

    def speaks(self, protocol: str) -> bool:
        """Whether an inbound stream may ask for *protocol*."""
        return protocol in self.handlers or protocol in self.library_handlers

    # Listening.

    async def listen(self, *multiaddrs: Multiaddr) -> bool:
        """Listen on all addresses.

        Raises:
            ListenError: for the first that cannot be.
        """
        for multiaddr in multiaddrs:
            listener = TcpListener(self._serve_inbound, self._admission, self.nursery)
            await listener.listen(multiaddr)
            self.listeners[str(multiaddr)] = listener
        return True

    async def _serve_inbound(self, stream: trio.SocketStream, key: str) -> None:
        """Upgrade an accepted socket and hold its place until the connection ends. Contains the remote's faults."""
        muxer: IMuxedConn | None = None
        try:
            raw = RawConnection(TrioTCPStream(stream), initiator=False)
            muxer = await self.upgrade_inbound_raw_conn(raw, Multiaddr("/ip4/0.0.0.0"))
        except Exception as error:
            _log.info("inbound_connection_refused", remote=key, reason=innermost_reason(error))
        finally:
            self._admission.upgraded(key)
        if isinstance(muxer, Muxer):
            await muxer.event_closed.wait()

    # Dialling.

    async def dial(self, multiaddr: Multiaddr, peer_id: ID) -> Connection:
        """Return a new connection to *peer_id* at exactly *multiaddr*, whatever was tried before.

        Bound it with a cancel scope.

        Raises:
            SwarmException: it did not come about.
            OSError: the same, below the handshake.
        """
        endpoint = tcp_endpoint(multiaddr)
        if endpoint is None:
            raw = await self._relayed(multiaddr, peer_id)
            done = False
            try:
                connection = await self.upgrade_outbound_raw_conn(raw, peer_id)
                done = True
            finally:
                if not done:
                    await _close_shielded(raw)
        else:
            stream = await open_tcp(endpoint, self.dial_port)
            done = False
            try:
                raw = RawConnection(TrioTCPStream(stream), initiator=True)
                connection = await self.upgrade_outbound_raw_conn(raw, peer_id)
                done = True
            finally:
                if not done:
                    stream.socket.close()
        assert isinstance(connection, Connection)
        return connection

    async def punch(self, endpoint: tuple[str, int], peer_id: ID, *, is_client: bool) -> Connection:
        """Return a connection to *peer_id*, which dials us from *endpoint* at the same moment (`hole_punch`).

        Bound it with a cancel scope.

        Raises:
            OSError: the two did not meet.
            SwarmException: they did, and the handshake failed, or it was somebody else.
        """
        if self.dial_port is None:
            raise SwarmException("this host does not dial from one port")
        stream = await self.dial_port.connect(endpoint)
        done = False
        try:
            raw = RawConnection(TrioTCPStream(stream), initiator=is_client)
            if is_client:
                connection = await self.upgrade_outbound_raw_conn(raw, peer_id)
            else:
                muxer = await self.upgrade_inbound_raw_conn(raw, Multiaddr("/ip4/0.0.0.0"))
                connection = self._connection_of(muxer)
                if muxer.peer_id != peer_id:
                    await connection.close()
                    raise SwarmException("somebody else was there")
            done = True
        finally:
            if not done:
                stream.socket.close()
        assert isinstance(connection, Connection)
        return connection

    def _connection_of(self, muxer: IMuxedConn) -> Connection:
        for connection in self.connections.get(muxer.peer_id, []):
            if isinstance(connection, Connection) and connection.muxed_conn is muxer:
                return connection
        raise SwarmException("the connection ended at once")

    async def probe(self, multiaddr: Multiaddr, peer_id: ID) -> None:
        """Dial *multiaddr*, have *peer_id* prove itself there, and hang up.

        Bound it with a cancel scope.

        Raises:
            SwarmException: the address is none that can be dialled alone.
            OSError, SecurityUpgradeFailure: it did not come about.
        """
        endpoint = tcp_endpoint(multiaddr)
        if endpoint is None:
            relayed = await self._relayed(multiaddr, peer_id)
            try:
                await self.upgrader.upgrade_security(relayed, True, peer_id)
            finally:
                await _close_shielded(relayed)
            return
        stream = await trio.open_tcp_stream(*endpoint)
        try:
            raw = RawConnection(TrioTCPStream(stream), initiator=True)
            await self.upgrader.upgrade_security(raw, True, peer_id)
        finally:
            stream.socket.close()

    async def _relayed(self, multiaddr: Multiaddr, peer_id: ID) -> IRawConnection:
        if self.relayed_dialler is None:
            raise SwarmException(f"{multiaddr} is no plain TCP address")
        return await self.relayed_dialler(str(multiaddr), peer_id)

    async def _dial_addr_single_attempt(
        self, addr: Multiaddr, peer_id: ID, source: tuple[str, int] | None = None
    ) -> INetConn:
        try:
            with trio.fail_after(self.limits.dial_timeout_s):
                return await self.dial(addr, peer_id)
        except (OSError, trio.TooSlowError) as error:
            raise SwarmException(f"cannot connect to {addr}") from error

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Connect to *peer_id* at the first known address that works, for the library's protocols."""
        if usable := self.usable_connections(peer_id):
            return list(usable)
        try:
            addresses = self.peerstore.addrs(peer_id)
        except PeerStoreError as error:
            raise SwarmException(f"no known address of {peer_id}") from error
        failure: Exception | None = None
        for address in addresses:
            try:
                return [await self._dial_addr_single_attempt(address, peer_id)]
            except SwarmException as error:
                failure = error
        raise SwarmException(f"no known address of {peer_id} works") from failure

    # Connections.

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> Connection:
        """Start serving a connection whose handshake is done.

        Several connections to one peer may stand: both ends may dial at the same moment, or a peer may come back
        before its old connection is known to be dead. All are served, new streams go over the newest, and beyond
        `HostLimits.connections_per_peer` the oldest is closed.
        """
        assert isinstance(muxed_conn, Muxer)
        peer_id = muxed_conn.peer_id
        if peer_id == self.self_id:
            muxed_conn.close_nowait("a connection to ourselves")
            raise SwarmException("a connection to ourselves")
        connection = Connection(muxed_conn, self, Direction.from_string(direction))
        if (quota := self._quotas.get(peer_id)) is None:
            address = address_or_none(muxed_conn.peer_text)
            known = self._known is None or (address is not None and self._known(address))
            quota = self._quotas[peer_id] = PeerQuota(self.limits, known=known)
        muxed_conn.attach(quota, connection.accept, lambda: self._lost(connection))
        connections = self.connections.setdefault(peer_id, [])
        connections.append(connection)
        self.nursery.start_soon(muxed_conn.run)
        if len(connections) == 1:
            self._events.publish(self.connected_event(connection))
        if len(connections) > self.limits.connections_per_peer:
            # A relayed one goes before a direct one, whoever came first.
            oldest = next((c for c in connections if isinstance(c, Connection) and c.is_relayed), connections[0])
            await oldest.close()
        # In a task: nothing above or here can be cancelled half-way, so a connection is either registered or not there.
        self.nursery.start_soon(self.notify_connected, connection)
        return connection

    def _lost(self, connection: Connection) -> None:
        """Forget a connection, the moment its muxer ends."""
        connection.event_closed.set()
        peer_id = connection.muxed_conn.peer_id
        remaining = self.connections.get(peer_id, [])
        if connection not in remaining:
            return
        remaining.remove(connection)
        if not remaining:
            del self.connections[peer_id]
            self._quotas.pop(peer_id, None)
            peer_text = connection.muxed_conn.peer_text
            self._events.publish(
                PeerDisconnected(peer_text, address_or_none(peer_text), connection.muxed_conn.close_reason)
            )
        self.nursery.start_soon(self.notify_disconnected, connection)

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        assert isinstance(swarm_conn, Connection)
        self._lost(swarm_conn)

    def usable_connections(self, peer_id: ID) -> list[Connection]:
        """Return the peer's connections that take new streams: direct before relayed, then the newest first."""
        usable = [
            c for c in reversed(self.connections.get(peer_id, [])) if isinstance(c, Connection) and c.muxed_conn.usable
        ]
        if len(usable) > 1:
            usable.sort(key=lambda connection: connection.is_relayed)
        return usable

    @staticmethod
    def connected_event(connection: Connection) -> PeerConnected:
        """Return what subscribers are told of a peer whose first connection this is."""
        muxer = connection.muxed_conn
        return PeerConnected(
            muxer.peer_text,
            address_or_none(muxer.peer_text),
            first_text(muxer.get_transport_addresses()),
            connection.direction == Direction.INBOUND,
        )

    async def notify_disconnected(self, conn: INetConn) -> None:
        # The library's own also notes the peer for the auto-connector, for good.
        await self._notify("disconnected", conn)

    def _schedule_auto_connect(self) -> None:
        """Nothing: reconnecting is the daemons' own decision (`reconnect.py`)."""

    def _schedule_prune(self) -> None:
        """Nothing: see `add_conn` and `Admission`."""

    async def close_peer(self, peer_id: ID) -> None:
        for connection in list(self.connections.get(peer_id, [])):
            await connection.close()

    async def close(self) -> None:
        """Free the ports, then say goodbye on every connection, for at most a second."""
        self._closing = True
        for listener in self.listeners.values():
            await listener.close()
        self.listeners.clear()
        if self.dial_port is not None:
            self.dial_port.close()
        async with trio.open_nursery() as nursery:
            for connections in list(self.connections.values()):
                for connection in connections:
                    assert isinstance(connection, Connection)
                    nursery.start_soon(connection.muxed_conn.close_gracefully, "closed here", _GOODBYE_S)


async def _close_shielded(raw: IRawConnection) -> None:
    with trio.move_on_after(_GOODBYE_S, shield=True):
        await raw.close()


def _is_lost_stream(error: Exception) -> bool:
    """Whether *error* only says that the remote reset the stream or the connection is gone."""
    if isinstance(error, ExceptionGroup):
        return error.split(trio.BrokenResourceError)[1] is None
    return isinstance(error, trio.BrokenResourceError)


def first_text(addresses: list[Multiaddr]) -> str:
    return str(addresses[0]) if addresses else ""


def innermost_reason(error: BaseException) -> str:
    """Return what is at the bottom of an error of the library's, on one line."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__
