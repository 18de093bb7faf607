"""The host: the one door to the peer-to-peer network for everything else in the house.

Owns the order in which things start and end: handlers are there before a port is open, and when `open_host` returns,
no port is. What is safe about it is in the modules below: `noise` (who may connect), `listener` (how many),
`swarm` (connections and handlers), `yamux` and `stream` (bytes), `reconnect` (coming back).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from ipaddress import ip_address

import structlog
import trio
from libp2p.abc import IHost, INetStream, IRawConnection
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from ngpu_protocol.identity import Account, Address
from ngpu_protocol.networks import Network
from ngpu_protocol.p2p import negotiation
from ngpu_protocol.p2p.dialling import DialPort
from ngpu_protocol.p2p.errors import (
    BadMultiaddrError,
    DialError,
    ListenError,
    NotConnectedError,
    ProtocolRefusedError,
    StreamOpenError,
)
from ngpu_protocol.p2p.events import EventFan, PeerEvent, PeerInfo
from ngpu_protocol.p2p.limits import HostLimits
from ngpu_protocol.p2p.listener import tcp_endpoint
from ngpu_protocol.p2p.multiaddrs import split_peer
from ngpu_protocol.p2p.stream import P2PStream
from ngpu_protocol.p2p.swarm import Connection, SafeSwarm, StreamHandler, address_or_none, first_text, innermost_reason
from ngpu_protocol.p2p.yamux import Muxer

__all__ = ["Host", "open_host", "parse_multiaddr"]

_log = structlog.get_logger(__name__)

_CLOSE_S = 2.0


class _LibraryHost(BasicHost):
    """What the library's protocols take for the host: identify and ping today, the DHT later."""

    stated: Callable[[], Sequence[str]] | None = None  # the library asks before its own constructor is done

    def __init__(self, swarm: SafeSwarm) -> None:
        super().__init__(swarm, disable_identify_address_discovery=True)
        for protocol in list(self.multiselect.handlers):
            # identify/push is left out: it reads whatever any peer cares to send, for nothing used here.
            if protocol not in (PING, IDENTIFY):
                del self.multiselect.handlers[protocol]

    def get_addrs(self) -> list[Multiaddr]:
        """Return what identify tells others of where we are: a wildcard that is listened on helps nobody."""
        if self.stated is None:
            return super().get_addrs()
        return [Multiaddr(text) for text in self.stated()] or super().get_addrs()

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Nothing. The library asks every peer that connects to identify itself, in a task of the event loop's own,
        where an exception ends the process, reading an answer of any length. Nothing here needs the answer.
        """


class Host:
    """A running host. Made by `open_host`.

    Attributes:
        address: the account's address.
        peer_id: its PeerId, base58 text.
        network: the network it belongs to.
        library_host: the same host as py-libp2p's own protocols want it; for `ngpu_protocol.p2p` only.
    """

    def __init__(self, account: Account, network: Network, swarm: SafeSwarm, events: EventFan) -> None:
        self.address = account.address
        self.peer_id = account.peer_id
        self.network = network
        library_host = _LibraryHost(swarm)
        self.library_host: IHost = library_host
        self._identified = library_host
        self._swarm = swarm
        self._events = events
        swarm.library_handlers = library_host.multiselect.handlers

    @property
    def addresses(self) -> list[str]:
        """The multiaddrs really listened on, ports filled in, each with ``/p2p/<PeerId>``."""
        return [
            f"{address}/p2p/{self.peer_id}"
            for listener in self._swarm.listeners.values()
            for address in listener.get_addrs()
        ]

    def state_addresses(self, addresses: Callable[[], Sequence[str]]) -> None:
        """Have peers told that we are at *addresses*, multiaddrs without ``/p2p``, and not where the host listens."""
        own_end = f"/p2p/{self.peer_id}"
        self._identified.stated = lambda: [text + own_end for text in addresses()]

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of *protocol*, from now on, each in a task of its own.

        When *handler* returns its stream is closed; when it raises, the stream is reset and the error logged; nothing
        else is touched. It is cancelled when the host closes. A lost connection does not cancel it: its reads and
        writes fail. Register before dialling or being dialled: `open_host` takes handlers for that.
        """
        self._swarm.handlers[protocol] = handler
        # Identify tells peers what is in this table; the swarm looks into its own first.
        self.library_host.get_mux().add_handler(TProtocol(protocol), _never)

    def unhandle(self, protocol: str) -> None:
        """Serve *protocol* no more; streams that are open go on. Nothing if it was not served."""
        if self._swarm.handlers.pop(protocol, None) is not None:
            self.library_host.remove_stream_handler(TProtocol(protocol))

    async def connect(self, multiaddr_text: str, *, timeout_s: float) -> str:
        """Return the PeerId the multiaddr names, connected to; at once if it is already.

        Exactly this address is dialled, and whoever answers must prove to be that peer. Failures of the past, here
        or at other addresses, do not count. Cancelled, no connection is left behind.

        Raises:
            BadMultiaddrError: the text is no multiaddr, lacks ``/p2p/<PeerId>``, or names this very host.
            DialError: nobody there, somebody else there, or *timeout_s* ran out.
        """
        multiaddr, peer_id = parse_multiaddr(multiaddr_text)
        peer_text = peer_id.to_base58()
        if peer_text == self.peer_id:
            raise BadMultiaddrError(multiaddr_text, "it names this host itself")
        if self._swarm.usable_connections(peer_id):
            return peer_text
        try:
            with trio.fail_after(timeout_s):
                await self._swarm.dial(multiaddr, peer_id)
        except trio.TooSlowError as error:
            raise DialError(multiaddr_text, f"no answer within {timeout_s:g} s") from error
        except Exception as error:
            raise DialError(multiaddr_text, innermost_reason(error)) from error
        return peer_text

    async def probe(self, multiaddr_text: str, *, timeout_s: float) -> None:
        """Return when the peer the multiaddr names has proven that it answers there; no connection is left.

        Unlike `connect` this dials in any case, also a peer that is connected: to learn whether others could.

        Raises:
            BadMultiaddrError: as `connect`.
            DialError: as `connect`.
        """
        multiaddr, peer_id = parse_multiaddr(multiaddr_text)
        if peer_id.to_base58() == self.peer_id:
            raise BadMultiaddrError(multiaddr_text, "it names this host itself")
        try:
            with trio.fail_after(timeout_s):
                await self._swarm.probe(multiaddr, peer_id)
        except trio.TooSlowError as error:
            raise DialError(multiaddr_text, f"no answer within {timeout_s:g} s") from error
        except Exception as error:
            raise DialError(multiaddr_text, innermost_reason(error)) from error

    async def open_stream(self, peer_id: str, protocol: str, *, timeout_s: float) -> P2PStream:
        """Return a new stream on the newest connection to *peer_id*, negotiated; the caller closes it.

        Raises:
            NotConnectedError: there is no connection, and no known address answers.
            ProtocolRefusedError: the peer does not speak *protocol*.
            StreamOpenError: the connection ended, the peer reset the stream or said nothing for *timeout_s*.
        """
        try:
            with trio.fail_after(timeout_s):
                return await self._open_stream(peer_id, protocol)
        except trio.TooSlowError as error:
            raise StreamOpenError(peer_id, protocol, f"no answer within {timeout_s:g} s") from error
        except (trio.BrokenResourceError, negotiation.NegotiationError, MuxedConnUnavailable) as error:
            raise StreamOpenError(peer_id, protocol, str(error)) from error

    async def _open_stream(self, peer_text: str, protocol: str) -> P2PStream:
        peer_id = _parse_peer_id(peer_text)
        connections = self._swarm.usable_connections(peer_id)
        if not connections:
            try:
                await self._swarm.dial_peer(peer_id)
            except SwarmException as error:
                raise NotConnectedError(peer_text) from error
            connections = self._swarm.usable_connections(peer_id)
            if not connections:
                raise NotConnectedError(peer_text)
        stream = connections[0].muxed_conn.open()
        agreed = False
        try:
            agreed = await negotiation.propose(stream, protocol)
        finally:
            if not agreed:
                stream.reset_nowait()
        if not agreed:
            raise ProtocolRefusedError(peer_text, protocol, "the peer does not speak it")
        return stream

    async def disconnect(self, peer_id: str) -> None:
        """Close every connection to *peer_id*; streams on them break. Nothing if there is none."""
        await self._swarm.close_peer(_parse_peer_id(peer_id))
        await trio.lowlevel.checkpoint()

    def peers(self) -> list[PeerInfo]:
        """Return who is connected now."""
        now = trio.current_time()
        infos = []
        for connections in self._swarm.connections.values():
            ours = [c for c in connections if isinstance(c, Connection)]
            newest = ours[-1].muxed_conn
            infos.append(
                PeerInfo(
                    peer_id=newest.peer_text,
                    address=address_or_none(newest.peer_text),
                    remote=first_text(newest.get_transport_addresses()),
                    inbound=not newest.is_initiator,
                    connections=len(ours),
                    streams=sum(c.muxed_conn.stream_count for c in ours),
                    connected_s=now - ours[0].opened_at,
                    rtt_s=newest.rtt_s,
                )
            )
        return infos

    def is_connected(self, peer_id: str) -> bool:
        """Return whether a stream to *peer_id* could be opened without dialling."""
        return bool(self._swarm.usable_connections(_parse_peer_id(peer_id)))

    def round_trip_s(self, peer_id: str) -> float | None:
        """Return the smoothed round trip to *peer_id* and back; None while it is not connected or not measured."""
        connections = self._swarm.usable_connections(_parse_peer_id(peer_id))
        return connections[0].muxed_conn.rtt_s if connections else None

    def dialled_at(self, peer_id: str) -> str | None:
        """Return the multiaddr, without ``/p2p``, at which this host dialled *peer_id* directly; None if it did not, or
        that connection stands no more.
        """
        for connection in self._swarm.usable_connections(_parse_peer_id(peer_id)):
            if connection.muxed_conn.is_initiator and not connection.is_relayed:
                return first_text(connection.muxed_conn.get_transport_addresses()) or None
        return None

    def is_directly_connected(self, peer_id: str) -> bool:
        """Return whether a connection to *peer_id* stands that goes through no relay."""
        return any(not c.is_relayed for c in self._swarm.usable_connections(_parse_peer_id(peer_id)))

    def dial_relayed_with(self, dialler: Callable[[str, ID], Awaitable[IRawConnection]]) -> None:
        """Have multiaddrs with ``/p2p-circuit`` dialled by *dialler* (`circuits`)."""
        self._swarm.relayed_dialler = dialler

    def dial_from_one_port(self) -> None:
        """Dial from one local port from now on, where that is possible (`hole_punch`)."""
        try:
            self._swarm.dial_port = self._swarm.dial_port or DialPort()
        except OSError as error:
            _log.info("no_dial_port", reason=error.strerror)

    async def punch(self, endpoint: tuple[str, int], peer_id: str, *, is_client: bool) -> None:
        """Return once *peer_id* is connected directly, dialling *endpoint* from the one port while it does the same.

        Raises:
            OSError: the two did not meet.
            Exception: the library's, when the handshake failed.
        """
        await self._swarm.punch(endpoint, _parse_peer_id(peer_id), is_client=is_client)

    async def upgrade_relayed(self, raw: IRawConnection) -> Muxer:
        """Return the connection a peer makes with us over *raw*, once it has proven who it is."""
        muxer = await self._swarm.upgrade_inbound_raw_conn(raw, Multiaddr("/p2p-circuit"))
        assert isinstance(muxer, Muxer)
        return muxer

    def stream_count(self, peer_id: str) -> int:
        """Return how many streams are open with *peer_id*, both directions."""
        return sum(c.muxed_conn.stream_count for c in self._swarm.usable_connections(_parse_peer_id(peer_id)))

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[PeerEvent]]:
        """Yield a channel of `PeerConnected` and `PeerDisconnected`, beginning with the peers connected now.

        It ends when the host closes, or when the subscriber falls 1,024 events behind: subscribe again then.
        """
        present: list[PeerEvent] = []
        for connections in self._swarm.connections.values():
            first = connections[0]
            assert isinstance(first, Connection)
            present.append(self._swarm.connected_event(first))
        return self._events.subscribe(present)


@asynccontextmanager
async def open_host(
    account: Account,
    *,
    listen: Sequence[str],
    network: Network,
    limits: HostLimits | None = None,
    handlers: dict[str, StreamHandler] | None = None,
    known: Callable[[Address], bool] | None = None,
) -> AsyncIterator[Host]:
    """Run a host for the duration of the context.

    On leaving, ports are freed first, handlers cancelled, connections closed with a goodbye; at most 2 seconds, even
    when the context is cancelled.

    Args:
        account: the identity; its key becomes the PeerId.
        listen: multiaddrs ``/ip4/…/tcp/…`` or ``/ip6/…/tcp/…``; port 0 takes a free one; none at all for a host that
            only dials. An IPv4 wildcard or loopback address is listened on in IPv6 as well, where there is IPv6.
        network: the network the host belongs to.
        limits: caps; the defaults suit a daemon.
        handlers: protocols served from the first connection on.
        known: asked once for each peer that connects; who is not known is held to a stranger's limits. None: all are.

    Raises:
        ListenError: an address cannot be listened on.
    """
    events = EventFan()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        swarm = SafeSwarm(account, nursery, limits or HostLimits(), events, known)
        host = Host(account, network, swarm, events)
        for protocol, handler in (handlers or {}).items():
            host.handle(protocol, handler)
        try:
            await _listen(swarm, listen)
            yield host
        except Exception as error:
            failure = error  # raised below: the nursery would wrap what is the caller's own in a group
        finally:
            # The library leaves its ports open when its context ends; and `close` waits, so it needs a shield.
            events.close()
            with trio.move_on_after(_CLOSE_S, shield=True):
                await swarm.close()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _listen(swarm: SafeSwarm, listen: Sequence[str]) -> None:
    for text in listen:
        try:
            multiaddr = Multiaddr(text)
        except Exception as error:
            raise ListenError(text, "not a multiaddr such as /ip4/0.0.0.0/tcp/4001") from error
        await swarm.listen(multiaddr)
        twin = _ipv6_twin(swarm, multiaddr)
        if twin is not None and str(twin) not in listen:
            try:
                await swarm.listen(twin)
            except ListenError as error:
                _log.info("ipv6_not_listened", multiaddr=str(twin), reason=error.reason)


def _ipv6_twin(swarm: SafeSwarm, multiaddr: Multiaddr) -> Multiaddr | None:
    """Return the IPv6 address to listen on besides an IPv4 one that means everywhere or nowhere but here."""
    bound = swarm.listeners[str(multiaddr)].get_addrs()
    endpoint = tcp_endpoint(bound[0]) if bound else None
    if endpoint is None or ":" in endpoint[0]:
        return None
    host = ip_address(endpoint[0])
    if host.is_unspecified:
        return Multiaddr(f"/ip6/::/tcp/{endpoint[1]}")
    if str(host) == "127.0.0.1":
        return Multiaddr(f"/ip6/::1/tcp/{endpoint[1]}")
    return None


def parse_multiaddr(text: str) -> tuple[Multiaddr, ID]:
    """Return a dialable multiaddr and the peer it names.

    Raises:
        BadMultiaddrError: it does not parse, or does not end in ``/p2p/<PeerId>``.
    """
    multiaddr, peer_text = split_peer(text)
    return multiaddr, _parse_peer_id(peer_text)


@lru_cache(maxsize=4096)
def _parse_peer_id(text: str) -> ID:
    try:
        return ID.from_string(text)
    except Exception as error:
        raise BadMultiaddrError(text, "not a PeerId") from error


async def _never(stream: INetStream) -> None:
    raise AssertionError(f"{stream.get_protocol()} is served by the swarm")
