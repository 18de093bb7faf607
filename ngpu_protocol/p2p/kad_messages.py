"""The messages of libp2p's Kademlia (libp2p specification *kad-dht*), as values, and how they travel.

On a stream each message is an unsigned varint length and a protobuf; a peer may send several on one stream, and each
but ADD_PROVIDER is answered by one of the same type. The protobuf is the library's, so the bytes are those of every
other implementation. PeerIds and multiaddrs stay the bytes they are: most are only passed on, and turning one into
text costs more than everything else about it.

Sizes are capped before anything is allocated, and lists as they are decoded. Signed peer records, which the library
adds to each message and each peer in it, are neither sent nor read: an address in an answer is a hint, and the
handshake proves who is there. (With them, an answer of 20 peers costs 20 signature checks.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import trio
from google.protobuf.message import DecodeError
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.delimited import delimited

__all__ = [
    "KadKind",
    "KadMessage",
    "KadPeer",
    "MessageReader",
    "decode_message",
    "encode_message",
    "kad_position",
    "multiaddr_bytes",
    "multiaddr_text",
    "peer_id_bytes",
    "peer_id_text",
]

MAX_KEY_BYTES = 128
MAX_PEER_ID_BYTES = 64
MAX_ADDRESSES = 8
MAX_ADDRESS_BYTES = 128
MAX_CLOSER = 20
"""Peers an answer may name; Kademlia's k."""

_WHAT = "DHT message"
_READ_BYTES = 16 * 1024


class KadKind(IntEnum):
    """What a message asks or answers; the numbers are the protobuf's."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, slots=True)
class KadPeer:
    """A peer and where it may be.

    Attributes:
        id: the PeerId's bytes.
        addresses: multiaddrs' bytes, as somebody stated them; not proven.
    """

    id: bytes
    addresses: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class KadMessage:
    """One message.

    Attributes:
        value: of the record under *key*, None where there is none.
        closer: peers closer to *key* than the one that answers.
    """

    kind: KadKind
    key: bytes = b""
    value: bytes | None = None
    closer: tuple[KadPeer, ...] = ()
    providers: tuple[KadPeer, ...] = ()


def encode_message(message: KadMessage) -> bytes:
    """Return *message* as it travels, its length before it."""
    wire = Message(type=Message.MessageType.Name(message.kind), key=message.key)
    if message.value is not None:
        wire.record.key = message.key
        wire.record.value = message.value
    for field, peers in ((wire.closerPeers, message.closer), (wire.providerPeers, message.providers)):
        for peer in peers:
            field.add(id=peer.id, addrs=peer.addresses, connection=Message.ConnectionType.CAN_CONNECT)
    body = wire.SerializeToString()
    return delimited(body)


def decode_message(body: bytes, *, max_providers: int) -> KadMessage:
    """Return the message in *body*; peers beyond the caps, and entries that cannot be peers, are left out.

    Raises:
        MalformedError: it is no message, or its key is too long or not that of its record.
    """
    try:
        wire = Message.FromString(body)
        kind = KadKind(wire.type)
    except (DecodeError, ValueError) as error:
        raise MalformedError(_WHAT, "not one of Kademlia's") from error
    if len(wire.key) > MAX_KEY_BYTES:
        raise MalformedError(_WHAT, f"a key of {len(wire.key)} bytes, of which {MAX_KEY_BYTES} are allowed")
    value = None
    if wire.HasField("record"):
        if wire.record.key != wire.key:
            raise MalformedError(_WHAT, "its record has another key")
        value = wire.record.value
    return KadMessage(
        kind, wire.key, value, _peers(wire.closerPeers, MAX_CLOSER), _peers(wire.providerPeers, max_providers)
    )


def _peers(entries: Sequence[Message.Peer], count: int) -> tuple[KadPeer, ...]:
    return tuple(
        KadPeer(
            entry.id, tuple(address for address in entry.addrs[:MAX_ADDRESSES] if len(address) <= MAX_ADDRESS_BYTES)
        )
        for entry in entries[:count]
        if 2 <= len(entry.id) <= MAX_PEER_ID_BYTES
    )


class MessageReader:
    """Reads messages off a stream; what came early is kept for the next."""

    def __init__(self, stream: trio.abc.ReceiveStream, *, max_bytes: int, max_providers: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self._max_providers = max_providers
        self._data = bytearray()

    async def next(self) -> KadMessage | None:
        """Return the next message, None when the stream ended between two.

        Raises:
            MalformedError: it is too large, no message, or cut off.
            trio.BrokenResourceError: the stream was reset or the connection lost.
        """
        while (size := self._size()) is None:
            if not await self._more():
                if self._data:
                    raise MalformedError(_WHAT, "cut off")
                return None
        length, start = size
        while len(self._data) < start + length:
            if not await self._more():
                raise MalformedError(_WHAT, "cut off")
        body = bytes(self._data[start : start + length])
        del self._data[: start + length]
        return decode_message(body, max_providers=self._max_providers)

    @property
    def empty(self) -> bool:
        """Whether nothing is left of what was read: the stream stands between two messages."""
        return not self._data

    def _size(self) -> tuple[int, int] | None:
        """Return the next message's length and where it starts, None while that is not known yet."""
        length = 0
        for index, byte in enumerate(self._data[:4]):
            length |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                if length > self._max_bytes:
                    raise MalformedError(_WHAT, f"{length} bytes, of which {self._max_bytes} are allowed")
                return length, index + 1
        if len(self._data) >= 4:
            raise MalformedError(_WHAT, "a length of more than 28 bits")
        return None

    async def _more(self) -> bool:
        data = await self._stream.receive_some(_READ_BYTES)
        self._data += data
        return bool(data)


@lru_cache(maxsize=16384)
def kad_position(key: bytes) -> int:
    """Return where *key*, or a PeerId's bytes, lies in the keyspace: its SHA-256 as a number."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


@lru_cache(maxsize=8192)
def peer_id_text(peer_id: bytes) -> str:
    """Return the base58 text of a PeerId's bytes, whatever they are."""
    return ID(peer_id).to_base58()


@lru_cache(maxsize=8192)
def peer_id_bytes(text: str) -> bytes:
    """Return a PeerId's bytes.

    Raises:
        MalformedError: it is none.
    """
    try:
        return ID.from_string(text).to_bytes()
    except Exception as error:  # the library raises whatever base58 and CID decoders do
        raise MalformedError("PeerId", "not base58 or a CID") from error


@lru_cache(maxsize=8192)
def multiaddr_text(address: bytes) -> str | None:
    """Return the text of a multiaddr without ``/p2p/<PeerId>`` at its end, None if it is none."""
    try:
        text = str(Multiaddr(address))
    except Exception:  # the library raises dozens of kinds
        return None
    head, separator, _ = text.rpartition("/p2p/")
    return head if separator else text


def multiaddr_bytes(text: str) -> bytes:
    """Return the bytes of a multiaddr.

    Raises:
        MalformedError: it is none.
    """
    try:
        return bytes(Multiaddr(text).to_bytes())
    except Exception as error:
        raise MalformedError("multiaddr", text[:200]) from error
