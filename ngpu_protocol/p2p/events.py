"""Who came and who went: values for the parts that must react to it, and for the screen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
import trio

from ngpu_protocol.identity import Address

__all__ = ["PeerConnected", "PeerDisconnected", "PeerEvent", "PeerInfo"]

_log = structlog.get_logger(__name__)

_EVENTS_BUFFERED = 1024


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The first connection to a peer stands.

    Attributes:
        peer_id: base58 text.
        address: its account, None for a foreign libp2p peer whose key is not secp256k1.
        remote: where it is, as a multiaddr without ``/p2p``; empty if unknown.
        inbound: it dialled us.
    """

    peer_id: str
    address: Address | None
    remote: str
    inbound: bool


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to a peer ended.

    Attributes:
        peer_id: base58 text.
        address: as in `PeerConnected`.
        reason: one line, such as ``closed by the peer`` or ``frozen: silent for 6.0 s``.
    """

    peer_id: str
    address: Address | None
    reason: str


PeerEvent = PeerConnected | PeerDisconnected


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A connected peer at one moment.

    Attributes:
        peer_id: base58 text.
        address: its account, None for a foreign libp2p peer.
        remote: multiaddr of the newest connection, without ``/p2p``.
        inbound: whether the peer made that connection.
        connections: how many there are.
        streams: open streams on all of them, both directions.
        connected_s: age of the oldest connection.
        rtt_s: smoothed round-trip time of the newest, None until measured.
    """

    peer_id: str
    address: Address | None
    remote: str
    inbound: bool
    connections: int
    streams: int
    connected_s: float
    rtt_s: float | None


class EventFan:
    """Hands every event to every subscriber, without waiting for any."""

    def __init__(self) -> None:
        self._sinks: set[trio.MemorySendChannel[PeerEvent]] = set()

    def publish(self, event: PeerEvent) -> None:
        """Give *event* to all subscribers; one that is 1,024 events behind is cut off."""
        for sink in list(self._sinks):
            try:
                sink.send_nowait(event)
            except trio.WouldBlock:
                # A gap nobody sees is worse than an end everybody sees: the subscriber's loop ends, and it starts
                # again from the peers connected now.
                _log.warning("peer_event_subscriber_too_slow", buffered=_EVENTS_BUFFERED)
                self._sinks.discard(sink)
                sink.close()
            except trio.BrokenResourceError:
                self._sinks.discard(sink)

    @asynccontextmanager
    async def subscribe(self, present: list[PeerEvent]) -> AsyncIterator[trio.MemoryReceiveChannel[PeerEvent]]:
        """Yield a channel that begins with *present* and goes on with what is published."""
        sink: trio.MemorySendChannel[PeerEvent]
        sink, channel = trio.open_memory_channel(_EVENTS_BUFFERED + len(present))
        for event in present:
            sink.send_nowait(event)
        self._sinks.add(sink)
        try:
            yield channel
        finally:
            self._sinks.discard(sink)
            sink.close()
            channel.close()

    def close(self) -> None:
        """End every subscriber's loop."""
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()
