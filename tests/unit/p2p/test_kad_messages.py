"""The DHT's messages: the library's bytes, and no bytes that hurt."""

from __future__ import annotations

import contextlib
import os

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from trio.testing import memory_stream_pair, trio_test

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.kad_messages import (
    KadKind,
    KadMessage,
    KadPeer,
    MessageReader,
    decode_message,
    encode_message,
    multiaddr_bytes,
    multiaddr_text,
)

ADDRESS = multiaddr_bytes("/ip4/192.0.2.1/tcp/4911")
FULL = KadMessage(
    KadKind.GET_VALUE,
    b"key",
    b"value",
    tuple(KadPeer(os.urandom(39), (ADDRESS,)) for _ in range(20)),
    tuple(KadPeer(os.urandom(39)) for _ in range(30)),
)


def reader(stream: trio.abc.ReceiveStream, max_bytes: int = 10_000) -> MessageReader:
    return MessageReader(stream, max_bytes=max_bytes, max_providers=100)


@trio_test
async def test_messages_come_back_however_they_are_cut() -> None:
    messages = [KadMessage(KadKind(kind), bytes([kind + 1])) for kind in range(6)] + [FULL]
    data = b"".join(map(encode_message, messages))
    for step in (1, 7, len(data)):
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def send(step: int = step, theirs: trio.abc.HalfCloseableStream = theirs) -> None:
                for at in range(0, len(data), step):
                    await theirs.send_all(data[at : at + step])
                await theirs.send_eof()

            nursery.start_soon(send)
            incoming = reader(ours)
            assert [await incoming.next() for _ in messages] == messages
            assert await incoming.next() is None


def test_the_bytes_are_the_librarys() -> None:
    wire = Message.FromString(encode_message(FULL)[2:])
    assert wire.type == Message.MessageType.GET_VALUE
    assert (wire.key, wire.record.key, wire.record.value) == (b"key", b"key", b"value")
    assert [entry.id for entry in wire.closerPeers] == [peer.id for peer in FULL.closer]


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x7f", b"\xff\x7f", encode_message(FULL)[:-1], b"\x02\xff\xff"])
@trio_test
async def test_too_large_cut_off_and_rubbish_are_malformed(data: bytes) -> None:
    ours, theirs = memory_stream_pair()
    await theirs.send_all(data)
    await theirs.send_eof()
    with pytest.raises(MalformedError):
        await reader(ours).next()


def test_lists_keys_and_names_are_capped() -> None:
    wire = Message(type=Message.MessageType.FIND_NODE, key=b"k")
    for _ in range(50):
        wire.closerPeers.add(id=os.urandom(39), addrs=[ADDRESS] * 50)
    wire.closerPeers.insert(0, Message.Peer(id=b""))
    wire.closerPeers.insert(0, Message.Peer(id=bytes(1000)))
    message = decode_message(wire.SerializeToString(), max_providers=5)
    assert len(message.closer) == 18, "the first 20, without the two that name nobody"
    assert all(len(peer.addresses) == 8 for peer in message.closer)
    with pytest.raises(MalformedError, match="key"):
        decode_message(Message(key=bytes(129)).SerializeToString(), max_providers=5)
    other = Message(key=b"k")
    other.record.key = b"another"
    with pytest.raises(MalformedError, match="another key"):
        decode_message(other.SerializeToString(), max_providers=5)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        encode_message(decode_message(data, max_providers=5))
    multiaddr_text(data)
