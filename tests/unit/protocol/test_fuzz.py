"""Bytes as an attacker would bend them, for a few seconds: every parser of what strangers send answers or refuses.

Not random bytes, which end at the first check, but valid messages with bits flipped, pieces cut out, doubled and
spliced together, and lengths made absurd. `NGPU_FUZZ_S` says for how long (2 s each by default), and a failure prints
the input; `NGPU_FUZZ_SEED` plays a run again.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.capabilities import capabilities_of
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.node_records import RecordRefused, SignedNodeRecord, check_record, record_key
from ngpu_protocol.p2p.delimited import delimited, receive_delimited
from ngpu_protocol.p2p.kad_messages import (
    KadKind,
    KadMessage,
    KadPeer,
    decode_message,
    encode_message,
    multiaddr_bytes,
    multiaddr_text,
)
from ngpu_protocol.p2p.kad_store import KadStore
from tests.vectors import generate
from tests.vectors.generate import AT_MS, NETWORK, NODE

SECONDS = float(os.environ.get("NGPU_FUZZ_S", "2"))
SEED = int(os.environ.get("NGPU_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
ABSURD = [b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xff\xff\xff\xff\x0f", b"\xc1"]

RECORDS = [
    generate.sign_node_record(record, NODE, NETWORK).encode() for record in (generate.NODE_RECORD, generate.WITHDRAWN)
]
PEER = KadPeer(bytes(39), (multiaddr_bytes("/ip4/192.0.2.1/tcp/4911"),))
MESSAGES = [
    encode_message(KadMessage(KadKind.PUT_VALUE, record_key(NODE.address), RECORDS[0])),
    encode_message(KadMessage(KadKind.GET_PROVIDERS, b"\x12\x20" + bytes(32), closer=(PEER,) * 3, providers=(PEER,))),
    encode_message(KadMessage(KadKind.ADD_PROVIDER, b"\x12\x20" + bytes(32), providers=(PEER,))),
]


def bent(chance: random.Random, seeds: list[bytes]) -> bytes:
    """Return one of *seeds*, damaged in one to four ways."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at % len(data)] = chance.choice((0, 0x7F, 0x80, 0xC0, 0xDC, 0xFF))
            case 2:
                del data[at : at + chance.randint(1, 40)]
            case 3:
                data[at:at] = data[at : at + chance.randint(1, 40)]
            case 4:
                other = chance.choice(seeds)
                data[at:] = other[chance.randrange(len(other)) :]
            case 5:
                data[at : at + chance.randint(0, 5)] = chance.choice(ABSURD)
            case _:
                data[at:at] = chance.randbytes(chance.randint(1, 16))
    return bytes(data)


def read_record(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        record = SignedNodeRecord.decode(data).record
        capabilities_of(record)
        assert len(record.encode()) < 64 * 1024
    with contextlib.suppress(RecordRefused):
        kept = check_record(record_key(NODE.address), data, network=NETWORK, now_ms=AT_MS)
        assert kept.encode() in RECORDS, "only what the node signed is accepted"


def read_message(data: bytes) -> None:
    try:
        message = decode_message(data, max_providers=16)
    except MalformedError:
        return
    for peer in (*message.closer, *message.providers):
        for address in peer.addresses:
            multiaddr_text(address)
    store = KadStore(bytes(39), NETWORK)
    if message.value is not None:
        with contextlib.suppress(RecordRefused):
            store.put_record(message.key, message.value, AT_MS)


@pytest.mark.parametrize(
    ("read", "seeds"), [(read_record, RECORDS), (read_message, [message[2:] for message in MESSAGES])]
)
def test_bent_messages_are_read_or_refused(read: Callable[[bytes], None], seeds: list[bytes]) -> None:
    chance = random.Random(SEED)
    ends_s = time.monotonic() + SECONDS
    tried = 0
    while time.monotonic() < ends_s:
        data = bent(chance, seeds)
        tried += 1
        try:
            read(data)
        except Exception as error:
            raise AssertionError(f"NGPU_FUZZ_SEED={SEED}, input {tried}: {data.hex()}") from error
    assert tried > 50


class Pieces:
    """A stream that gives bytes in pieces, and takes back what was not used."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        self.data = data
        self._chance = chance

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        size = self._chance.randint(1, 7)
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    def unread(self, data: bytes) -> None:
        self.data = data + self.data


@trio_test
async def test_one_message_is_read_off_a_stream_and_what_follows_is_left() -> None:
    chance = random.Random(SEED)
    for size in (0, 1, 127, 128, 300, 4000):
        body = chance.randbytes(size)
        stream = Pieces(delimited(body) + b"what follows", chance)
        assert await receive_delimited(stream, max_bytes=4096) == body  # type: ignore[arg-type]
        assert stream.data.endswith(b"what follows"[-len(stream.data) :])
        rest = b""
        while piece := await stream.receive_some(99):
            rest += piece
        assert rest == b"what follows"


@pytest.mark.parametrize("data", [b"", b"\x05abc", b"\x80", b"\x80\x80\x80\x80\x01", b"\x81\x20" + bytes(5000)])
@trio_test
async def test_a_message_cut_off_or_too_long_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        await receive_delimited(Pieces(data, random.Random(1)), max_bytes=4096)  # type: ignore[arg-type]
