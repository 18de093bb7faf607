"""Peers: a safe py-libp2p host, streams that mean what they say, and nothing else of the library.

This package is the only one that imports py-libp2p. What the library gets wrong is closed here, each trap in one
place with the reason beside it, so that the rest of the house can use streams as it uses sockets.

Import from this module; its parts are `host`, `multiaddrs`, `swarm`, `dialling`, `listener`, `noise`, `links`,
`yamux`, `stream`, `negotiation`, `events`, `reconnect`, `frames`, `limits` and `errors`. The DHT is `dht`, over
`kad_messages`, `kad_table`, `kad_walk`, `kad_calls`, `kad_store` and `kad_server`; `directory` finds nodes in it. Being
reached: `autonat` finds out whether others can dial this host, `relay` and `circuits` are the two sides of reaching
those that cannot be dialled, `hole_punch` goes on from there directly. `identify` asks a peer what it is.

A part is loaded when a name of it is first asked for: the library takes most of a second to load, and a command that
only reads a configuration needs none of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from ngpu_protocol.p2p.events import PeerConnected, PeerDisconnected, PeerEvent, PeerInfo
    from ngpu_protocol.p2p.frames import receive_frame, send_frame
    from ngpu_protocol.p2p.host import Host, open_host, parse_multiaddr
    from ngpu_protocol.p2p.limits import HostLimits
    from ngpu_protocol.p2p.reconnect import BackOff
    from ngpu_protocol.p2p.stream import P2PStream
    from ngpu_protocol.p2p.swarm import StreamHandler

_PART_OF = {
    "PeerConnected": "events",
    "PeerDisconnected": "events",
    "PeerEvent": "events",
    "PeerInfo": "events",
    "receive_frame": "frames",
    "send_frame": "frames",
    "Host": "host",
    "open_host": "host",
    "parse_multiaddr": "host",
    "HostLimits": "limits",
    "BackOff": "reconnect",
    "P2PStream": "stream",
    "StreamHandler": "swarm",
}


def __getattr__(name: str) -> Any:
    part = _PART_OF.get(name)
    if part is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{part}"), name)


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
