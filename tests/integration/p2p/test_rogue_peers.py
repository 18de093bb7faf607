"""Peers that hold a key and break the rules: what they can make us hold is bounded, and others do not notice."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.lowlevel
from trio.testing import trio_test

from ngpu_protocol.p2p import HostLimits, P2PStream, PeerDisconnected, open_host
from ngpu_protocol.p2p.links import LinkClosedError
from ngpu_protocol.p2p.noise import NoiseChannel
from tests.integration.p2p.peers import (
    ECHO,
    LOCAL,
    LOOPBACK,
    account,
    echoes,
    eventually,
    host,
    muxer_of,
    rogue_channel,
    two_hosts,
)

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"", version: int = 0) -> bytes:
    return struct.pack("!BBHII", version, kind, flags, stream_id, length) + body


def data_of(wire: bytes) -> bytes:
    """The bodies of the data frames in *wire*, put together."""
    body = b""
    while len(wire) >= 12:
        _, kind, _, _, length = struct.unpack("!BBHII", wire[:12])
        size = length if kind == DATA else 0
        body += wire[12 : 12 + size]
        wire = wire[12 + size :]
    return body


@trio_test
async def test_a_sender_that_ignores_the_window_is_cut_off_at_it() -> None:
    most = 0

    async def never_read(stream: P2PStream) -> None:
        nonlocal most
        while True:
            most = max(most, stream.buffered_bytes)
            await trio.lowlevel.checkpoint()

    async with two_hosts({ECHO: never_read}) as (server, client), server.events() as events:
        await events.receive()
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        stream._send_credit = 1 << 40  # what the library's own receiver lets pass: it buffered 204 MB
        with trio.fail_after(60):
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(bytes(200 << 20))
            event = await events.receive()
        assert isinstance(event, PeerDisconnected)
        assert "window" in event.reason
        assert 0 < most <= 256 * 1024


@trio_test
async def test_an_endless_answer_list_for_a_peer_that_does_not_read_is_cut_off() -> None:
    async with host() as server, server.events() as events, rogue_channel(server.addresses[0]) as channel:
        assert type(await events.receive()).__name__ == "PeerConnected"
        pings = frame(PING, SYN, 0, 7) * 5000
        with trio.move_on_after(20):
            try:
                while True:
                    await channel.write(pings)
            except Exception as error:
                assert "closed" in str(error) or "failed" in str(error)  # noqa: PT017
        with trio.fail_after(60):
            event = await events.receive()
        assert isinstance(event, PeerDisconnected)
        assert event.reason == "the peer does not read"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(frame(DATA, 0, 1, 0, version=3), id="version"),
        pytest.param(frame(9, 0, 1, 0), id="type"),
        pytest.param(frame(WINDOW_UPDATE, SYN, 2, 0), id="our-own-id"),
        pytest.param(frame(WINDOW_UPDATE, SYN, 0, 0), id="id-zero"),
        pytest.param(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, SYN, 1, 0), id="opened-twice"),
        pytest.param(frame(DATA, 0, 77, 4, b"data"), id="never-opened"),
        pytest.param(frame(DATA, 0, 2, 4, b"data"), id="never-opened-by-us"),
        pytest.param(frame(DATA, SYN, 1, 0xFFFFFFFF), id="four-gigabytes"),
        pytest.param(frame(DATA, SYN | FIN, 1, 0) + frame(DATA, 0, 1, 4, b"more"), id="data-after-the-end"),
    ],
)
@trio_test
async def test_a_broken_rule_costs_the_connection_and_only_that(bad: bytes) -> None:
    async with two_hosts() as (server, client), server.events() as events:
        await events.receive()
        async with rogue_channel(server.addresses[0]) as channel:
            assert type(await events.receive()).__name__ == "PeerConnected"
            await channel.write(bad)
            with trio.fail_after(60):
                event = await events.receive()
            assert isinstance(event, PeerDisconnected)
            assert event.reason.startswith("the peer broke the protocol")
        assert await echoes(client, server.peer_id)


@trio_test
async def test_frames_cut_at_every_byte_are_put_together() -> None:
    greeting = b"\x13/multistream/1.0.0\n"
    proposal = bytes((len(ECHO) + 1,)) + ECHO.encode() + b"\n"
    payload = greeting + proposal + b"hello"
    wire = frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, FIN, 1, len(payload), payload)
    async with host() as server, rogue_channel(server.addresses[0]) as channel:
        for at in range(len(wire)):
            await channel.write(wire[at : at + 1])
        with trio.fail_after(60):
            got = b""
            while not data_of(got).endswith(b"hello"):
                got += await channel.read()
        assert data_of(got) == payload


@trio_test
async def test_a_peer_that_opens_streams_and_says_nothing_holds_no_more_than_its_share() -> None:
    limits = HostLimits(streams_per_peer=10, negotiation_timeout_s=0.5)
    async with host(limits=limits) as server, rogue_channel(server.addresses[0]) as channel:
        await channel.write(b"".join(frame(WINDOW_UPDATE, SYN, 2 * n + 1, 0) for n in range(500)))
        peer_id = channel.get_local_peer().to_base58()
        await eventually(lambda: len(server.peers()) == 1)
        muxer = muxer_of(server, peer_id)
        await eventually(lambda: muxer.stream_count == 10)
        await eventually(lambda: muxer.stream_count == 0)  # none said what it wants in half a second


def opened_and_reset(first: int, count: int) -> bytes:
    ids = range(first, first + 2 * count, 2)
    return b"".join(frame(WINDOW_UPDATE, SYN, n, 0) + frame(WINDOW_UPDATE, RST, n, 0) for n in ids)


@trio_test
async def test_streams_reset_as_soon_as_opened_do_not_pile_up_handlers() -> None:
    limits = HostLimits(streams_per_peer=10)
    async with host(limits=limits) as server, rogue_channel(server.addresses[0]) as channel:
        peer_id = channel.get_local_peer().to_base58()
        await eventually(lambda: len(server.peers()) == 1)
        accepted = 0
        muxer = muxer_of(server, peer_id)
        accept = muxer._accept

        def counted(stream: P2PStream) -> None:
            nonlocal accepted
            accepted += 1
            accept(stream)

        muxer._accept = counted
        await channel.write(opened_and_reset(1, 1000))  # one message: all of it is read before any handler runs
        await eventually(lambda: muxer._quota.streams_left == 10 and accepted)
        assert accepted == 10
        assert await _opens_a_stream(channel, 2001)


@trio_test
async def test_a_stranger_gets_fewer_streams_than_a_known_peer_and_no_larger_windows() -> None:
    limits = HostLimits(streams_per_peer=10, streams_per_stranger=3)
    friend = account()
    async with open_host(
        account(),
        listen=[LOOPBACK],
        network=LOCAL,
        limits=limits,
        known=lambda address: address == friend.address,
    ) as server:
        for who, streams in ((friend, 10), (account(), 3)):
            async with open_host(who, listen=[], network=LOCAL) as client:
                await client.connect(server.addresses[0], timeout_s=30)
                await eventually(lambda peer=client.peer_id: server.is_connected(peer))
                quota = muxer_of(server, client.peer_id)._quota
                assert quota.streams_left == streams
                assert (quota.growth_left > 0) is (who is friend)


async def _opens_a_stream(channel: NoiseChannel, stream_id: int) -> bool:
    await channel.write(frame(WINDOW_UPDATE, SYN, stream_id, 0))
    wanted = frame(WINDOW_UPDATE, ACK, stream_id, 0)
    got = b""
    with trio.fail_after(60):
        while wanted not in got:
            got += await channel.read()
    return True


@trio_test
async def test_a_peer_that_does_not_read_the_answers_to_its_streams_is_cut_off() -> None:
    async with host() as server, server.events() as events, rogue_channel(server.addresses[0]) as channel:
        assert type(await events.receive()).__name__ == "PeerConnected"
        first = 1
        with trio.move_on_after(30):
            try:
                while True:
                    await channel.write(opened_and_reset(first, 2000))
                    first += 4000
            except LinkClosedError:
                pass
        with trio.fail_after(60):
            event = await events.receive()
        assert isinstance(event, PeerDisconnected)
        assert event.reason == "the peer does not read"


@trio_test
async def test_half_a_noise_message_holds_nothing_up() -> None:
    async with two_hosts() as (server, client):
        async with rogue_channel(server.addresses[0]) as channel:
            channel.link.try_write([b"\xff\xff" + bytes(1000)])
            assert await echoes(client, server.peer_id)
        await eventually(lambda: len(server.peers()) == 1)
