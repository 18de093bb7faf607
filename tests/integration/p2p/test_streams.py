"""Bytes between two hosts over a real connection: all of them, in order, or an error; never a quiet half."""

from __future__ import annotations

import os
import signal
from hashlib import sha256

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.p2p import HostLimits, P2PStream, PeerDisconnected, StreamOpenError, receive_frame, send_frame
from tests.integration.p2p.peer_process import DRIP
from tests.integration.p2p.peers import (
    ECHO,
    echoes,
    eventually,
    host,
    muxer_of,
    peer_process,
    receive_exactly,
    two_hosts,
)

MIB = 1 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@trio_test
async def test_both_directions_end_separately() -> None:
    heard: list[bytes] = []

    async def answer_after_the_end(stream: P2PStream) -> None:
        while data := await stream.receive_some():
            heard.append(data)
        await stream.send_all(b"all of it")

    async with two_hosts({ECHO: answer_after_the_end}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        await stream.send_all(b"one ")
        await stream.send_all(b"two")
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"three")
        assert await receive_exactly(stream, 9) == b"all of it"
        assert await stream.receive_some() == b""
        assert await stream.receive_some() == b""
        assert b"".join(heard) == b"one two"
        await stream.aclose()


@trio_test
async def test_a_hundred_megabytes_arrive_whole_in_constant_memory() -> None:
    size = 100_000_000
    block = os.urandom(1_000_000)
    result: dict[str, object] = {}

    async def sink(stream: P2PStream) -> None:
        digest, got, peak = sha256(), 0, 0
        while data := await stream.receive_some():
            digest.update(data)
            got += len(data)
            peak = max(peak, stream.buffered_bytes)
        result.update(digest=digest.digest(), got=got, peak=peak, resident=resident_bytes())
        await stream.send_all(b"done")

    async with two_hosts({ECHO: sink}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        before = resident_bytes()
        digest = sha256()
        with trio.fail_after(60):
            for _ in range(size // len(block)):
                digest.update(block)
                await stream.send_all(block)
            await stream.send_eof()
            assert await receive_exactly(stream, 4) == b"done"
        assert result["got"] == size
        assert result["digest"] == digest.digest()
        assert int(str(result["peak"])) <= HostLimits().stream_window_bytes
        assert int(str(result["resident"])) - before < 32 * MIB


@trio_test
async def test_a_reader_that_pauses_half_a_minute_loses_nothing() -> None:
    # The library resets the stream 5 s after the window is full, and does not tell the reader.
    pause_s = 30
    size = 3 * MIB
    payload = os.urandom(size)
    finished_sending = trio.Event()

    async def wait_then_read(stream: P2PStream) -> None:
        await trio.sleep(pause_s)
        assert not finished_sending.is_set()
        got = await receive_exactly(stream, size)
        await stream.send_all(sha256(got).digest())

    async with two_hosts({ECHO: wait_then_read}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        with trio.fail_after(pause_s + 60):
            await stream.send_all(payload)
            finished_sending.set()
            assert await receive_exactly(stream, 32) == sha256(payload).digest()
        assert client.is_connected(server.peer_id)


@trio_test
async def test_a_writer_waits_no_longer_than_its_own_deadline() -> None:
    async def never_read(stream: P2PStream) -> None:
        await trio.sleep_forever()

    async with two_hosts({ECHO: never_read}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        with trio.move_on_after(0.5) as scope:
            await stream.send_all(bytes(4 * MIB))
        assert scope.cancelled_caught
        await stream.reset()
        held = muxer_of(server, client.peer_id).buffered_bytes
        assert held <= 256 * 1024


@trio_test
async def test_one_stream_whose_reader_stopped_does_not_stop_the_others() -> None:
    async def stuck(stream: P2PStream) -> None:
        await trio.sleep_forever()

    async with host() as server, host({}, listen=()) as client:
        server.handle("/test/stuck", stuck)
        await client.connect(server.addresses[0], timeout_s=30)
        blocked = await client.open_stream(server.peer_id, "/test/stuck", timeout_s=30)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocked.send_all, bytes(4 * MIB))
            await trio.sleep(0.1)
            for _ in range(20):
                assert await echoes(client, server.peer_id)
            nursery.cancel_scope.cancel()


@trio_test
async def test_a_reset_is_never_an_end_of_stream() -> None:
    async def half_an_answer(stream: P2PStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"half an ans")
        await stream.reset()

    async with two_hosts({ECHO: half_an_answer}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        await stream.send_all(b"?")
        assert await receive_exactly(stream, 11) == b"half an ans"
        with pytest.raises(trio.BrokenResourceError, match="reset by the peer"):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"more")
        assert client.is_connected(server.peer_id)


@trio_test
async def test_what_ended_cleanly_stays_whole_though_the_connection_is_lost_after_it() -> None:
    async def whole_answer(stream: P2PStream) -> None:
        await stream.send_all(b"a whole answer")

    async with two_hosts({ECHO: whole_answer}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        await eventually(lambda: stream._fin_received)
        await client.disconnect(server.peer_id)
        assert await receive_exactly(stream, 14) == b"a whole answer"
        assert await stream.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"more")


@trio_test
async def test_a_killed_peer_is_noticed_by_its_socket_and_is_no_end_of_stream() -> None:
    """At once, that is: not by the signs of life it misses, as a frozen one."""
    with peer_process() as peer:
        async with host({}, listen=()) as client:
            await client.connect(peer.address, timeout_s=30)
            stream = await client.open_stream(peer.peer_id, DRIP, timeout_s=30)
            assert await receive_exactly(stream, 1) == b"x"
            async with client.events() as events:
                await events.receive()  # that it is connected
                peer.process.kill()
                with trio.fail_after(60):
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()
                    event = await events.receive()
            assert isinstance(event, PeerDisconnected)
            assert event.peer_id == peer.peer_id
            assert not event.reason.startswith("frozen")


@trio_test
async def test_a_frozen_peer_is_noticed_within_ten_seconds() -> None:
    # Its kernel goes on acknowledging, so TCP notices nothing; the library's connect took more than 45 s.
    limits = HostLimits()
    assert limits.health_interval_s + limits.health_timeout_s < 10
    with peer_process() as peer:
        async with host({}, listen=()) as client:
            await client.connect(peer.address, timeout_s=30)
            stream = await client.open_stream(peer.peer_id, DRIP, timeout_s=30)
            assert await receive_exactly(stream, 1) == b"x"
            async with client.events() as events:
                await events.receive()
                peer.process.send_signal(signal.SIGSTOP)
                with trio.fail_after(60):
                    with pytest.raises(trio.BrokenResourceError, match="frozen"):
                        await stream.receive_some()
                    event = await events.receive()
            assert isinstance(event, PeerDisconnected)
            assert event.reason.startswith("frozen")


@trio_test
async def test_an_idle_healthy_peer_is_left_alone() -> None:
    quick = HostLimits(health_interval_s=0.05, health_timeout_s=0.5)
    async with two_hosts(limits=quick) as (server, client):
        await trio.sleep(1)
        assert await echoes(client, server.peer_id)
        assert client.peers()[0].rtt_s is not None


@trio_test
async def test_a_handler_s_exception_ends_its_stream_and_nothing_else() -> None:
    async def broken(stream: P2PStream) -> None:
        await stream.receive_some()
        raise RuntimeError("a bug in a handler")

    async def broken_in_a_group(stream: P2PStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broken, stream)

    async with host() as server, host({}, listen=()) as client:
        server.handle("/test/broken", broken)
        server.handle("/test/group", broken_in_a_group)
        await client.connect(server.addresses[0], timeout_s=30)
        bystander = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        for protocol in ("/test/broken", "/test/group"):
            stream = await client.open_stream(server.peer_id, protocol, timeout_s=30)
            await stream.send_all(b"go")
            with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await bystander.send_all(b"still here")
        assert await receive_exactly(bystander, 10) == b"still here"
        assert await echoes(client, server.peer_id)


@trio_test
async def test_a_bug_in_serving_one_connection_costs_that_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(data: bytes) -> None:
        raise RuntimeError("a bug in the muxer")

    async with two_hosts() as (server, client), host({}, listen=()) as another:
        await another.connect(server.addresses[0], timeout_s=30)
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        monkeypatch.setattr(muxer_of(server, client.peer_id), "_feed", bug)
        await stream.send_all(b"x")
        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert await echoes(another, server.peer_id)


@trio_test
async def test_a_cancelled_handler_resets_its_stream() -> None:
    started = trio.Event()

    async def sleeper(stream: P2PStream) -> None:
        started.set()
        await trio.sleep_forever()

    async with host({}, listen=()) as client:
        async with host({ECHO: sleeper}) as server:
            await client.connect(server.addresses[0], timeout_s=30)
            stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
            await started.wait()
        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


@trio_test
async def test_a_caller_cancelled_while_opening_leaves_no_stream() -> None:
    async with two_hosts() as (server, client):
        muxer = muxer_of(client, server.peer_id)
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        assert muxer.stream_count == 0
        await eventually(lambda: muxer_of(server, client.peer_id).stream_count == 0)


@trio_test
async def test_streams_leave_nothing_behind() -> None:
    async with two_hosts() as (server, client):
        for _ in range(1000):
            stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
            await stream.aclose()
        await eventually(lambda: muxer_of(server, client.peer_id).stream_count == 0)
        await eventually(lambda: muxer_of(client, server.peer_id).stream_count == 0)


@trio_test
async def test_a_stream_closed_early_is_reset_under_a_remote_that_goes_on() -> None:
    outcome = trio.Event()

    async def talk_on(stream: P2PStream) -> None:
        try:
            while True:
                await stream.send_all(bytes(65536))
        except trio.BrokenResourceError:
            outcome.set()
            raise

    async with two_hosts({ECHO: talk_on}, limits=HostLimits(linger_s=0.1, health_interval_s=0.1)) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        await stream.aclose()
        with trio.fail_after(60):
            await outcome.wait()
        assert muxer_of(client, server.peer_id).buffered_bytes == 0


@trio_test
async def test_one_stream_too_many_is_reset_and_others_go_on() -> None:
    async with two_hosts(limits=HostLimits(streams_per_peer=5)) as (server, client):
        streams = [await client.open_stream(server.peer_id, ECHO, timeout_s=30) for _ in range(5)]
        with pytest.raises(StreamOpenError):
            await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        async with host({}, listen=()) as another:
            await another.connect(server.addresses[0], timeout_s=30)
            assert await echoes(another, server.peer_id)
        await streams[0].send_all(b"x")
        assert await receive_exactly(streams[0], 1) == b"x"
        await streams[0].aclose()
        await eventually(lambda: muxer_of(server, client.peer_id).stream_count == 4)
        assert await echoes(client, server.peer_id)


@trio_test
async def test_two_tasks_may_not_send_or_receive_at_once() -> None:
    async def never_read(stream: P2PStream) -> None:
        await trio.sleep_forever()

    async with two_hosts({ECHO: never_read}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            nursery.start_soon(stream.send_all, bytes(MIB))
            await trio.sleep(0.1)
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_some()
            with pytest.raises(trio.BusyResourceError):
                await stream.send_all(b"x")
            nursery.cancel_scope.cancel()


@trio_test
async def test_closing_a_stream_wakes_who_waits_on_it() -> None:
    async with two_hosts() as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.sleep(0.05)
                await stream.aclose()


@trio_test
async def test_two_hundred_streams_at_once_each_get_their_own_bytes() -> None:
    async with two_hosts() as (server, client):

        async def one(number: int) -> None:
            stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
            payload = bytes((number % 256,)) * (number * 997)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, payload)
                assert await receive_exactly(stream, len(payload)) == payload
            await stream.aclose()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(1, 201):
                    nursery.start_soon(one, number)


@trio_test
async def test_frames_cross_a_stream() -> None:
    async def echo_frames(stream: P2PStream) -> None:
        while (frame := await receive_frame(stream, MIB)) is not None:
            await send_frame(stream, frame)

    async with two_hosts({ECHO: echo_frames}) as (server, client):
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        for payload in (b"", b"x", os.urandom(MIB)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_frame, stream, payload)
                assert await receive_frame(stream, MIB) == payload
        await stream.send_eof()
        assert await receive_frame(stream, MIB) is None
