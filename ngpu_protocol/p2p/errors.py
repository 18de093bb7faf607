"""What the peer-to-peer layer raises, branched by who must act.

Streams themselves raise trio's own vocabulary (`trio.BrokenResourceError`, `trio.ClosedResourceError`,
`trio.BusyResourceError`), because that is what everything written against `trio.abc.Stream` expects.
"""

from __future__ import annotations

__all__ = [
    "BadMultiaddrError",
    "DialError",
    "FrameError",
    "ListenError",
    "NoAccountError",
    "NotConnectedError",
    "P2PError",
    "ProtocolRefusedError",
    "StreamOpenError",
]


class P2PError(Exception):
    """Root of this package's errors."""


class ListenError(P2PError):
    """An address cannot be listened on; the operator must change it or free the port.

    Attributes:
        multiaddr: the address as configured.
        reason: what the operating system said.
    """

    def __init__(self, multiaddr: str, reason: str) -> None:
        super().__init__(f"cannot listen on {multiaddr}: {reason}")
        self.multiaddr = multiaddr
        self.reason = reason


class BadMultiaddrError(P2PError):
    """Text that is no usable multiaddr; whoever wrote it must change it.

    Attributes:
        text: what was given.
        reason: what is wrong with it.
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"unusable multiaddr {text!r}: {reason}")
        self.text = text
        self.reason = reason


class DialError(P2PError):
    """No connection came about; trying again later may help.

    Attributes:
        multiaddr: the address that was dialled.
        reason: what went wrong, in one line.
    """

    def __init__(self, multiaddr: str, reason: str) -> None:
        super().__init__(f"cannot connect to {multiaddr}: {reason}")
        self.multiaddr = multiaddr
        self.reason = reason


class NotConnectedError(P2PError):
    """There is no connection to the peer and no address to dial."""

    def __init__(self, peer_id: str) -> None:
        super().__init__(f"not connected to {peer_id}")
        self.peer_id = peer_id


class StreamOpenError(P2PError):
    """A stream could not be opened on an existing connection: it timed out, was reset, or the connection ended.

    Nothing of the caller's has left this host: negotiation sends no payload.
    """

    def __init__(self, peer_id: str, protocol: str, reason: str) -> None:
        super().__init__(f"cannot open {protocol} to {peer_id}: {reason}")
        self.peer_id = peer_id
        self.protocol = protocol
        self.reason = reason


class ProtocolRefusedError(StreamOpenError):
    """The peer does not speak the protocol."""


class NoAccountError(P2PError):
    """The peer's key is not secp256k1, so it has no address of ours (a foreign libp2p peer)."""


class FrameError(P2PError):
    """The remote sent a frame above the limit, or ended the stream in the middle of one."""
