"""How much one peer, one address and the whole world may make this host hold. Every number is a cap, not a target."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HostLimits"]


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Caps of a host.

    Memory a hostile peer can pin is bounded by
    ``streams_per_peer * 256 KiB + window_growth_bytes_per_peer`` plus about 1 MiB of buffers a connection. Keys cost
    nothing to make, so a stranger (a peer `open_host` was not told to know) gets ``streams_per_stranger * 256 KiB``.

    Attributes:
        connections: inbound connections in all, upgraded or not.
        connections_per_ip: inbound connections from one IPv4 address or IPv6 /64. Sites behind one NAT share it.
        upgrades: inbound connections that have not finished their handshake, in all.
        upgrades_per_ip: the same from one address.
        upgrade_timeout_s: how long a connection may take from accept to the first stream being possible.
        connections_per_peer: connections kept to one peer; the oldest goes when one more comes.
        streams_per_peer: streams one peer may have open towards us; one more is reset.
        streams_per_stranger: the same for a peer that is not known; its windows do not grow either.
        negotiation_timeout_s: how long an inbound stream may take to say which protocol it wants.
        stream_window_bytes: how far the receive window of one busy stream may grow beyond yamux's 256 KiB.
        window_growth_bytes_per_peer: the sum of such growth over all streams of a peer.
        linger_s: how long a stream closed here waits for the remote's own end before it is reset.
        health_interval_s: silence after which a peer is asked for a sign of life.
        health_timeout_s: how long it has to give one.
        dial_timeout_s: time for one address when the library itself dials (not `Host.connect`, which is told).
    """

    connections: int = 1024
    connections_per_ip: int = 128
    upgrades: int = 128
    upgrades_per_ip: int = 16
    upgrade_timeout_s: float = 5.0
    connections_per_peer: int = 4
    streams_per_peer: int = 512
    streams_per_stranger: int = 16
    negotiation_timeout_s: float = 10.0
    stream_window_bytes: int = 4 << 20
    window_growth_bytes_per_peer: int = 32 << 20
    linger_s: float = 2.0
    health_interval_s: float = 2.0
    health_timeout_s: float = 4.0
    dial_timeout_s: float = 5.0
