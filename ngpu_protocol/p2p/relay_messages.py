"""The messages of libp2p's circuit relay, version 2 (specification *relay/circuit-v2*), and their bounds.

*Hop* is spoken with a relay (reserve, connect), *stop* by the relay with the peer at the other end. The protobufs are
the library's; its relay itself is not used, for it takes reservations of anybody, hands over its own kind of stream,
and turns what a peer says its addresses are into its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Reservation, Status, StopMessage

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.delimited import delimited, receive_delimited
from ngpu_protocol.p2p.stream import P2PStream

__all__ = [
    "HOP_PROTOCOL",
    "STOP_PROTOCOL",
    "HopMessage",
    "Limit",
    "PeerId",
    "RelayLimits",
    "Reservation",
    "Status",
    "StopMessage",
    "receive_hop",
    "receive_stop",
    "send_message",
    "status_name",
]

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/stop"
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives. A circuit is for asking, and for agreeing on a direct connection; not for bulk.

    Attributes:
        reservations: peers that may have one at once.
        reservation_s: how long one holds; renewed by asking again.
        circuit_bytes: each way of one circuit.
        circuit_s: how long one may stand.
        circuits: at once, in all.
        circuits_per_source: at once, of one peer that connects.
        circuits_per_target: at once, to one peer with a reservation.
        opens_per_minute: circuits one peer may open in the long run; as many at once.
        patience_s: for any one message.
    """

    reservations: int = 1024
    reservation_s: int = 3600
    circuit_bytes: int = 1 << 20
    circuit_s: int = 120
    circuits: int = 512
    circuits_per_source: int = 8
    circuits_per_target: int = 32
    opens_per_minute: int = 60
    patience_s: float = 10.0


async def send_message(stream: P2PStream, message: HopMessage | StopMessage) -> None:
    """Send one message."""
    await stream.send_all(delimited(message.SerializeToString()))


async def receive_hop(stream: P2PStream) -> HopMessage:
    """Return the next message of *hop*.

    Raises:
        MalformedError: it is none.
    """
    try:
        return HopMessage.FromString(await receive_delimited(stream, max_bytes=_MAX_BYTES))
    except DecodeError as error:
        raise MalformedError("relay message", "not one of hop's") from error


async def receive_stop(stream: P2PStream) -> StopMessage:
    """Return the next message of *stop*.

    Raises:
        MalformedError: it is none.
    """
    try:
        return StopMessage.FromString(await receive_delimited(stream, max_bytes=_MAX_BYTES))
    except DecodeError as error:
        raise MalformedError("relay message", "not one of stop's") from error


def status_name(status: int) -> str:
    """Return a status in words."""
    try:
        return str(Status.Name(status)).lower().replace("_", " ")  # type: ignore[arg-type]
    except ValueError:
        return f"status {status}"
