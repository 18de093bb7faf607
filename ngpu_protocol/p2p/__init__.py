"""Peers: a safe py-libp2p host, streams that mean what they say, and nothing else of the library.

This package is the only one that imports py-libp2p. What the library gets wrong is closed here, each trap in one
place with the reason beside it, so that the rest of the house can use streams as it uses sockets.

Import from this module; its parts are `host`, `swarm`, `dialling`, `listener`, `noise`, `links`, `yamux`, `stream`,
`negotiation`, `events`, `reconnect`, `frames`, `limits` and `errors`. The DHT is `dht`, over `kad_messages`,
`kad_table`, `kad_walk`, `kad_calls`, `kad_store` and `kad_server`; `directory` finds nodes in it. Being reached:
`autonat` finds out whether others can dial this host, `relay` and `circuits` are the two sides of reaching those that
cannot be dialled, `hole_punch` goes on from there directly. `identify` asks a peer what it is.
"""

from ngpu_protocol.p2p.errors import (
    BadMultiaddrError,
    DialError,
    FrameError,
    ListenError,
    NoAccountError,
    NotConnectedError,
    P2PError,
    ProtocolRefusedError,
    StreamOpenError,
)
from ngpu_protocol.p2p.events import PeerConnected, PeerDisconnected, PeerEvent, PeerInfo
from ngpu_protocol.p2p.frames import receive_frame, send_frame
from ngpu_protocol.p2p.host import Host, open_host, parse_multiaddr
from ngpu_protocol.p2p.limits import HostLimits
from ngpu_protocol.p2p.reconnect import BackOff
from ngpu_protocol.p2p.stream import P2PStream
from ngpu_protocol.p2p.swarm import StreamHandler

__all__ = [
    "BackOff",
    "BadMultiaddrError",
    "DialError",
    "FrameError",
    "Host",
    "HostLimits",
    "ListenError",
    "NoAccountError",
    "NotConnectedError",
    "P2PError",
    "P2PStream",
    "PeerConnected",
    "PeerDisconnected",
    "PeerEvent",
    "PeerInfo",
    "ProtocolRefusedError",
    "StreamHandler",
    "StreamOpenError",
    "open_host",
    "parse_multiaddr",
    "receive_frame",
    "send_frame",
]
