"""The muxer and the channel without a network: any cutting, any bytes, bounded memory."""

from __future__ import annotations

import struct
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.peer.id import ID
from trio.testing import MockClock, trio_test, wait_all_tasks_blocked

from ngpu_protocol.p2p import HostLimits, P2PStream
from ngpu_protocol.p2p.links import LinkClosedError
from ngpu_protocol.p2p.noise import MAX_PLAINTEXT_BYTES, NoiseChannel
from ngpu_protocol.p2p.yamux import Muxer, PeerQuota, ProtocolViolationError

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
PEER = ID(b"\x00\x25\x08\x02\x12\x21" + bytes(33))
KEYS = bytes(32), bytes(range(32))


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length) + body


class FakeLink:
    """Gives what is put into `incoming`, in pieces of `step`; keeps what is written."""

    def __init__(self, step: int = 1 << 20) -> None:
        self.incoming = b""
        self.step = step
        self.written = b""
        self.closed = False
        self.remote = ("192.0.2.1", 1)

    def try_write(self, pieces: list[bytes]) -> list[bytes]:
        self.written += b"".join(pieces)
        return []

    async def write_some(self, pieces: list[bytes]) -> list[bytes]:
        return self.try_write(pieces)

    async def read_into(self, buffer: memoryview) -> int:
        data = self.incoming[: min(self.step, len(buffer))]
        self.incoming = self.incoming[len(data) :]
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def channel_over(link: FakeLink, keys: tuple[bytes, bytes] = KEYS) -> NoiseChannel:
    session: Any = SimpleNamespace(is_initiator=False)
    return NoiseChannel(session, link, *keys)


class FakeChannel:
    """No encryption: frames go to `frames` as they are."""

    is_initiator = False

    def __init__(self) -> None:
        self.link = FakeLink()

    def seal(self, pieces: list[bytes]) -> list[bytes]:
        return pieces


def muxer(accepted: list[P2PStream] | None = None, limits: HostLimits | None = None) -> Muxer:
    channel: Any = FakeChannel()
    limits = limits or HostLimits()
    made = Muxer(channel, PEER, limits)

    def serve(stream: P2PStream) -> None:
        if accepted is not None:
            accepted.append(stream)
        made.served(stream)

    made.attach(PeerQuota(limits), serve, lambda: None)
    return made


# -- the channel -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=60), st.integers(1, 70000))
def test_sealed_pieces_open_again_however_the_network_cuts_them(pieces: list[bytes], step: int) -> None:
    async def run() -> None:
        sender, receiver = FakeLink(), FakeLink(step)
        receiver.incoming = b"".join(channel_over(sender).seal(pieces))
        receiving = channel_over(receiver, (KEYS[1], KEYS[0]))
        got = b""
        while messages := await receiving.receive():
            got += b"".join(messages)
        assert got == b"".join(pieces)

    trio.run(run)


def test_small_pieces_share_a_message_and_none_is_above_the_noise_limit() -> None:
    channel = channel_over(FakeLink())
    assert len(channel.seal([b"x" * 100] * 10)) == 2  # a length and a message
    for piece in channel.seal([bytes(MAX_PLAINTEXT_BYTES), b"x", bytes(MAX_PLAINTEXT_BYTES)]):
        assert len(piece) <= 65535


@pytest.mark.parametrize("change", ["flip", "replay", "swap", "truncate"])
@trio_test
async def test_a_changed_message_ends_the_channel(change: str) -> None:
    first, second = (b"".join(p) for p in _two_messages())
    wire = {
        "flip": first[:-1] + bytes((first[-1] ^ 1,)),
        "replay": first + first,
        "swap": second + first,
        "truncate": first + second[:-1],
    }[change]
    link = FakeLink()
    link.incoming = wire
    receiving = channel_over(link, (KEYS[1], KEYS[0]))
    with pytest.raises(LinkClosedError):
        await read_to_the_end(receiving)


async def read_to_the_end(channel: NoiseChannel) -> None:
    while await channel.receive():
        pass


def _two_messages() -> tuple[list[bytes], list[bytes]]:
    channel = channel_over(FakeLink())
    return channel.seal([b"first"]), channel.seal([b"second"])


# -- the muxer ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=40)))
def test_any_bytes_are_frames_or_a_broken_rule(pieces: list[bytes]) -> None:
    async def run() -> None:
        made = muxer()
        try:
            for piece in pieces:
                made._feed(piece)
        except ProtocolViolationError:
            pass

    trio.run(run)


header = st.builds(
    frame,
    st.sampled_from([DATA, WINDOW_UPDATE, PING, GO_AWAY]),
    st.integers(0, 15),
    st.integers(0, 9),
    st.integers(0, 40),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(header, st.binary(max_size=40))), st.integers(1, 64))
def test_likely_frames_keep_the_books_straight(parts: list[tuple[bytes, bytes]], step: int) -> None:
    async def run() -> None:
        limits = HostLimits(streams_per_peer=3)
        accepted: list[P2PStream] = []
        made = muxer(accepted, limits)
        wire = b"".join(head + body for head, body in parts)
        try:
            for at in range(0, len(wire), step):
                made._feed(wire[at : at + step])
        except ProtocolViolationError:
            pass
        assert made.stream_count <= 3
        assert made._quota.streams_left == 3 - made.stream_count
        assert made.buffered_bytes <= 3 * 256 * 1024
        made.close_nowait("the test is over")
        assert made._quota.streams_left == 3
        assert made._quota.growth_left == limits.window_growth_bytes_per_peer

    trio.run(run)


@trio_test
async def test_a_window_of_one_byte_frames_takes_little_more_than_the_window() -> None:
    accepted: list[P2PStream] = []
    made = muxer(accepted)
    made._feed(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, 0, 1, 1, b"x") * (256 * 1024))
    (stream,) = accepted
    assert stream.buffered_bytes == 256 * 1024
    assert sum(sys.getsizeof(chunk) for chunk in stream._chunks) < 300 * 1024
    with pytest.raises(ProtocolViolationError, match="window"):
        made._feed(frame(DATA, 0, 1, 1, b"x"))


@trio_test
async def test_a_fast_reader_s_window_grows_to_its_limit_and_the_growth_is_given_back() -> None:
    limits = HostLimits(stream_window_bytes=1 << 20, window_growth_bytes_per_peer=1 << 20)
    accepted: list[P2PStream] = []
    made = muxer(accepted, limits)
    made._feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    (stream,) = accepted
    for _ in range(40):
        size = min(stream._receive_credit, 60000)
        made._feed(frame(DATA, 0, 1, size, bytes(size)))
        await stream.receive_some(1 << 20)
    assert stream._window == 1 << 20
    assert made._quota.growth_left == (1 << 20) - (768 << 10)
    made._feed(frame(WINDOW_UPDATE, RST, 1, 0))
    assert made._quota.growth_left == 1 << 20


@trio_test
async def test_credit_goes_back_in_halves_of_a_window_not_with_every_read() -> None:
    accepted: list[P2PStream] = []
    made = muxer(accepted)
    made._feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    (stream,) = accepted
    for _ in range(100):
        made._feed(frame(DATA, 0, 1, 1000, bytes(1000)))
        await stream.receive_some()
    assert [f for f in made._outbox if f[1] == WINDOW_UPDATE and not f[2:4].strip(b"\0")] == []


@trio_test
async def test_what_comes_for_many_readers_wakes_a_few_in_each_turn_and_loses_nothing() -> None:
    accepted: list[P2PStream] = []
    made = muxer(accepted)
    ids = range(1, 21, 2)
    made._feed(b"".join(frame(WINDOW_UPDATE, SYN, number, 0) for number in ids))
    got: dict[int, bytes] = {}

    async def read(stream: P2PStream) -> None:
        got[stream.stream_id] = await stream.receive_some()
        assert await stream.receive_some() == b""

    async with trio.open_nursery() as readers:
        for stream in accepted:
            readers.start_soon(read, stream)
        await wait_all_tasks_blocked()
        burst = b"".join(frame(DATA, FIN, number, 3, b"%03d" % number) for number in ids)
        in_each_turn = []
        for arrived in (burst[:-5], burst[-5:]):  # cut in the middle of a frame
            made._feed(arrived)
            while made._held_back:
                before = len(got)
                await wait_all_tasks_blocked()
                in_each_turn.append(len(got) - before)
                made._feed(b"")
    assert max(in_each_turn) == 2
    assert got == {number: b"%03d" % number for number in ids}


def test_silence_is_asked_about_and_then_taken_for_death() -> None:
    async def run() -> None:
        made = muxer(limits=HostLimits(health_interval_s=2, health_timeout_s=4))

        async def never() -> list[bytes]:
            await trio.sleep_forever()
            raise AssertionError

        channel: Any = made.secured_conn
        channel.receive, channel.take_unread = never, lambda: b""
        with trio.fail_after(10):
            await made.run()
        assert made.close_reason == "frozen: silent for 6.0 s"
        assert channel.link.written.count(struct.pack("!BBH", 0, PING, SYN)) == 2
        assert channel.link.closed

    trio.run(run, clock=MockClock(autojump_threshold=0))


def test_a_peer_that_answers_is_kept_for_ever() -> None:
    async def run() -> None:
        made = muxer(limits=HostLimits(health_interval_s=2, health_timeout_s=4))

        async def answer() -> list[bytes]:
            await trio.sleep(5.5)
            return [frame(PING, ACK, 0, made._ping_id)]

        channel: Any = made.secured_conn
        channel.receive, channel.take_unread = answer, lambda: b""
        with trio.move_on_after(3600):
            await made.run()
        assert made.close_reason == "closed here"

    trio.run(run, clock=MockClock(autojump_threshold=0))
