"""Asking a connected peer what it is (libp2p identify): which protocols it speaks, and where it says it listens.

Asked when the answer is needed, and bounded; the library asks everybody that connects, reading an answer of any
length. What a peer says here is a claim.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
from google.protobuf.message import DecodeError
from libp2p.host.ping import ID as PING
from libp2p.host.ping import PING_LENGTH
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.pb.identify_pb2 import Identify

from ngpu_protocol.p2p.errors import StreamOpenError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.kad_messages import MAX_ADDRESS_BYTES, multiaddr_text

__all__ = ["Identity", "identify", "ping"]

_MAX_BYTES = 32 * 1024
_MAX_PROTOCOLS = 256
_MAX_ADDRESSES = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """What a peer says about itself.

    Attributes:
        agent: its software.
        addresses: multiaddrs it says it listens on, without ``/p2p``.
        observed: where it sees us, empty if it does not say.
    """

    agent: str
    protocols: frozenset[str]
    addresses: tuple[str, ...]
    observed: str


async def identify(host: Host, peer_id: str, *, timeout_s: float) -> Identity:
    """Return what *peer_id* says about itself.

    Raises:
        NotConnectedError: there is no connection to it.
        StreamOpenError: it does not say, or not within *timeout_s*, or too much.
    """
    stream = await host.open_stream(peer_id, IDENTIFY, timeout_s=timeout_s)
    data = bytearray()
    try:
        with trio.fail_after(timeout_s):
            while chunk := await stream.receive_some(_MAX_BYTES):
                data += chunk
                if len(data) > _MAX_BYTES:
                    raise StreamOpenError(peer_id, IDENTIFY, f"more than {_MAX_BYTES} bytes")
        said = Identify.FromString(_without_length(bytes(data)))
    except (trio.TooSlowError, trio.BrokenResourceError, DecodeError) as error:
        raise StreamOpenError(peer_id, IDENTIFY, "no sensible answer") from error
    finally:
        stream.reset_nowait()
    addresses = (multiaddr_text(raw) for raw in said.listen_addrs[:_MAX_ADDRESSES] if len(raw) <= MAX_ADDRESS_BYTES)
    return Identity(
        agent=said.agent_version[:256],
        protocols=frozenset(said.protocols[:_MAX_PROTOCOLS]),
        addresses=tuple(address for address in addresses if address),
        observed=multiaddr_text(said.observed_addr[:MAX_ADDRESS_BYTES]) or "",
    )


async def ping(host: Host, peer_id: str, *, timeout_s: float) -> float:
    """Return the seconds *peer_id* takes to echo 32 bytes on a new stream that is already open.

    Raises:
        NotConnectedError: there is no connection to it.
        StreamOpenError: it did not answer within *timeout_s*, or something else.
    """
    stream = await host.open_stream(peer_id, PING, timeout_s=timeout_s)
    payload, echoed = bytes(range(PING_LENGTH)), b""
    try:
        with trio.fail_after(timeout_s):
            began_s = trio.current_time()
            await stream.send_all(payload)
            while len(echoed) < PING_LENGTH:
                data = await stream.receive_some(PING_LENGTH - len(echoed))
                if not data:
                    break
                echoed += data
            took_s = trio.current_time() - began_s
    except (trio.TooSlowError, trio.BrokenResourceError) as error:
        raise StreamOpenError(peer_id, PING, "no echo") from error
    finally:
        stream.reset_nowait()
    if echoed != payload:
        raise StreamOpenError(peer_id, PING, "not the echo")
    return took_s


def _without_length(data: bytes) -> bytes:
    """Return *data* without the varint length that newer peers put before it."""
    length = 0
    for index, byte in enumerate(data[:4]):
        length |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return data[index + 1 :] if len(data) == index + 1 + length else data
    return data
