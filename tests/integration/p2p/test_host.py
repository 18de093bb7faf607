"""Starting, stopping, dialling, being dialled: ports, limits, duplicate connections, events."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.host.ping import ID as PING
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from multiaddr import Multiaddr
from trio.testing import trio_test

from ngpu_protocol.p2p import (
    BadMultiaddrError,
    DialError,
    HostLimits,
    ListenError,
    NotConnectedError,
    PeerConnected,
    PeerDisconnected,
    ProtocolRefusedError,
    parse_multiaddr,
)
from tests.integration.p2p.peers import (
    ECHO,
    account,
    echoes,
    eventually,
    host,
    library_host,
    muxer_of,
    receive_exactly,
    serve_tcp,
    two_hosts,
)


def port_of(address: str) -> int:
    return int(address.split("/")[4])


async def is_listening(port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True


# -- starting and stopping ---------------------------------------------------------------------------------------------


@trio_test
async def test_a_host_is_its_account() -> None:
    key = account()
    async with host(key=key) as running:
        assert running.address == key.address
        assert running.peer_id == key.peer_id
        assert all(address.endswith(f"/p2p/{key.peer_id}") for address in running.addresses)
        assert running.addresses[0].startswith("/ip4/127.0.0.1/tcp/")


@trio_test
async def test_nothing_listens_after_a_host_has_closed() -> None:
    async with host() as running:
        port = port_of(running.addresses[0])
        assert await is_listening(port)
    assert not await is_listening(port)


@trio_test
async def test_nothing_listens_after_a_host_was_cancelled_with_peers_connected() -> None:
    ports: list[int] = []

    async def run(task_status: trio.TaskStatus[str]) -> None:
        async with host() as running:
            ports.append(port_of(running.addresses[0]))
            task_status.started(running.addresses[0])
            await trio.sleep_forever()

    async with host({}, listen=()) as client, trio.open_nursery() as nursery:
        address = await nursery.start(run)
        await client.connect(address, timeout_s=30)
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 30
    assert not await is_listening(ports[0])


@trio_test
async def test_two_hosts_cannot_have_one_port() -> None:
    # The library sets SO_REUSEPORT: both would listen, and the kernel deal connections to either.
    async with host() as first:
        address = f"/ip4/127.0.0.1/tcp/{port_of(first.addresses[0])}"
        with pytest.raises(ListenError, match="in use"):
            async with host(listen=(address,)):
                pass
        async with host({}, listen=()) as client:
            await client.connect(first.addresses[0], timeout_s=30)


@trio_test
async def test_a_port_can_be_taken_again_at_once() -> None:
    async with host() as first, host({}, listen=()) as client:
        address = f"/ip4/127.0.0.1/tcp/{port_of(first.addresses[0])}"
        await client.connect(first.addresses[0], timeout_s=30)
    async with host(listen=(address,)) as second, host({}, listen=()) as client:
        await client.connect(second.addresses[0], timeout_s=30)


@pytest.mark.parametrize(
    "bad",
    ["nonsense", "/ip4/127.0.0.1/udp/1", "/ip4/127.0.0.1", "/ip4/192.0.2.1/tcp/1", "/dns4/localhost/tcp/0"],
)
@trio_test
async def test_an_address_that_cannot_be_listened_on_is_named(bad: str) -> None:
    with pytest.raises(ListenError) as caught:
        async with host(listen=(bad,)):
            pass
    assert bad in str(caught.value)


@trio_test
async def test_ipv6_is_listened_on_where_ipv4_is() -> None:
    async with host() as server, host({}, listen=()) as client:
        addresses = [a for a in server.addresses if a.startswith("/ip6/")]
        if not addresses:
            pytest.skip("no IPv6 here")
        await client.connect(addresses[0], timeout_s=30)
        assert await echoes(client, server.peer_id)
        assert client.peers()[0].remote.startswith("/ip6/::1/tcp/")


@trio_test
async def test_what_the_caller_raises_comes_out_as_it_is() -> None:
    with pytest.raises(LookupError, match="the caller's own"):
        async with host():
            raise LookupError("the caller's own")


# -- dialling ----------------------------------------------------------------------------------------------------------


@trio_test
async def test_a_failed_dial_does_not_stand_in_the_way_of_a_fresh_address() -> None:
    # The library refuses the peer for 60 s, and dials only the first address it knows.
    async with host() as server, host({}, listen=()) as client:
        async with host({}) as gone:
            dead_port = port_of(gone.addresses[0])
        with pytest.raises(DialError, match="refused"):
            await client.connect(f"/ip4/127.0.0.1/tcp/{dead_port}/p2p/{server.peer_id}", timeout_s=30)
        await client.connect(server.addresses[0], timeout_s=30)
        assert await echoes(client, server.peer_id)


@trio_test
async def test_a_dial_to_one_that_never_answers_ends_at_the_timeout() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with host({}, listen=()) as client, trio.open_nursery() as nursery:
        port = await serve_tcp(nursery, silent)
        with trio.fail_after(60), pytest.raises(DialError, match="no answer"):
            await client.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{account().peer_id}", timeout_s=0.3)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "bad",
    ["", "nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/notapeer", "/ip4/1.2.3.4.5/tcp/1"],
)
@trio_test
async def test_an_unusable_multiaddr_is_said_to_be_one(bad: str) -> None:
    async with host({}, listen=()) as client:
        with pytest.raises(BadMultiaddrError):
            await client.connect(bad, timeout_s=1)


@trio_test
async def test_a_host_does_not_dial_itself() -> None:
    async with host() as running:
        with pytest.raises(BadMultiaddrError, match="itself"):
            await running.connect(running.addresses[0], timeout_s=1)


@trio_test
async def test_streams_go_both_ways_over_a_connection_one_side_made() -> None:
    async with host() as server, host(listen=()) as client:
        await client.connect(server.addresses[0], timeout_s=30)
        await eventually(lambda: server.is_connected(client.peer_id))
        assert await echoes(server, client.peer_id)


@trio_test
async def test_opening_a_stream_without_a_connection_says_so() -> None:
    async with host({}, listen=()) as client:
        with pytest.raises(NotConnectedError):
            await client.open_stream(account().peer_id, ECHO, timeout_s=1)


@trio_test
async def test_a_protocol_the_peer_does_not_speak_is_refused_by_name() -> None:
    async with two_hosts() as (server, client):
        with pytest.raises(ProtocolRefusedError, match="/test/unknown"):
            await client.open_stream(server.peer_id, "/test/unknown", timeout_s=30)
        assert await echoes(client, server.peer_id)
        await eventually(lambda: muxer_of(client, server.peer_id).stream_count == 0)


class _OtherTransport(ReadWriteCloser):
    """Something the library can talk over that is no TCP socket, as a relayed connection is."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


@trio_test
async def test_a_connection_over_something_else_than_tcp_works_alike() -> None:
    async with host() as server, host(listen=()) as client:
        stream = await trio.open_tcp_stream("127.0.0.1", port_of(server.addresses[0]))
        _, server_id = parse_multiaddr(server.addresses[0])
        with trio.fail_after(60):
            await client._swarm.upgrade_outbound_raw_conn(RawConnection(_OtherTransport(stream), True), server_id)
            assert await echoes(client, server.peer_id)
            assert await echoes(server, client.peer_id)
            bulk = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
            payload = bytes(range(256)) * 8192
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bulk.send_all, payload)
                assert await receive_exactly(bulk, len(payload)) == payload
            await server.disconnect(client.peer_id)
            with pytest.raises(trio.BrokenResourceError):
                await bulk.receive_some()
        assert client.peers() == []


# -- limits on who connects --------------------------------------------------------------------------------------------


@trio_test
async def test_idle_connections_of_one_place_do_not_keep_peers_out_for_long() -> None:
    limits = HostLimits(upgrades_per_ip=20, upgrade_timeout_s=0.5)
    async with host(limits=limits) as server, host({}, listen=()) as client:
        idle = [await trio.open_tcp_stream("127.0.0.1", port_of(server.addresses[0])) for _ in range(50)]
        with trio.fail_after(60):
            for stream in idle[20:]:
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""  # above the limit: closed at once
            while not client.is_connected(server.peer_id):
                with suppress(DialError):  # until the idle ones' time is over, of which our own handshake has no more
                    await client.connect(server.addresses[0], timeout_s=30)
        assert await echoes(client, server.peer_id)
        for stream in idle:
            await stream.aclose()


@trio_test
async def test_connections_from_one_address_are_capped_and_their_places_given_back() -> None:
    async with (
        host(limits=HostLimits(connections_per_ip=2)) as server,
        host({}, listen=()) as first,
        host({}, listen=()) as second,
        host({}, listen=()) as third,
    ):
        await first.connect(server.addresses[0], timeout_s=30)
        await second.connect(server.addresses[0], timeout_s=30)
        with pytest.raises(DialError):
            await third.connect(server.addresses[0], timeout_s=1)
        # In the library a place stays taken after its connection is gone, until the host ends.
        for _ in range(5):
            await second.disconnect(server.peer_id)
            await eventually(lambda: len(server.peers()) == 1)
            await trio.sleep(0.05)
            await third.connect(server.addresses[0], timeout_s=30)
            await third.disconnect(server.peer_id)
            await eventually(lambda: len(server.peers()) == 1)
            await trio.sleep(0.05)
            await second.connect(server.addresses[0], timeout_s=30)
        assert await echoes(first, server.peer_id)


# -- several connections to one peer -----------------------------------------------------------------------------------


@trio_test
async def test_two_hosts_that_dial_each_other_at_once_end_up_connected_once() -> None:
    async with host() as a, host() as b, a.events() as seen_by_a:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: a.connect(b.addresses[0], timeout_s=30))
            nursery.start_soon(lambda: b.connect(a.addresses[0], timeout_s=30))
        await trio.sleep(0.1)
        assert await echoes(a, b.peer_id)
        assert await echoes(b, a.peer_id)
        assert [p.peer_id for p in a.peers()] == [b.peer_id]
        assert isinstance(await seen_by_a.receive(), PeerConnected)
        # However many connections there were, one disconnect ends them all and is told once.
        await b.disconnect(a.peer_id)
        with trio.fail_after(60):
            assert isinstance(await seen_by_a.receive(), PeerDisconnected)
        assert a.peers() == []
        with pytest.raises(trio.WouldBlock):
            seen_by_a.receive_nowait()


@trio_test
async def test_a_peer_that_comes_back_before_its_old_connection_is_dead_is_served_on_the_new_one() -> None:
    key = account()
    async with host() as server, server.events() as events:
        async with host(key=key, listen=()) as old:
            await old.connect(server.addresses[0], timeout_s=30)
            old_stream = await old.open_stream(server.peer_id, ECHO, timeout_s=30)
            async with host(key=key, listen=()) as new:
                await new.connect(server.addresses[0], timeout_s=30)
                await eventually(lambda: server.peers()[0].connections == 2)
                assert await echoes(server, key.peer_id)  # served by the new one: the newest connection is used
                assert muxer_of(new, server.peer_id).stream_count <= 1
                await old_stream.send_all(b"x")
                assert await receive_exactly(old_stream, 1) == b"x"  # and the old one goes on while it lives
            await eventually(lambda: server.peers()[0].connections == 1)
        await eventually(lambda: server.peers() == [])
        with trio.fail_after(60):
            kinds = [type(await events.receive()), type(await events.receive())]
        assert kinds == [PeerConnected, PeerDisconnected]
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


@trio_test
async def test_a_peer_keeps_no_more_connections_than_allowed() -> None:
    key = account()
    async with (
        host(limits=HostLimits(connections_per_peer=2)) as server,
        host(key=key, listen=()) as one,
        host(key=key, listen=()) as two,
        host(key=key, listen=()) as three,
    ):
        for twin in (one, two, three):
            await twin.connect(server.addresses[0], timeout_s=30)
        await eventually(lambda: not one.peers())  # the oldest goes
        assert server.peers()[0].connections == 2
        assert await echoes(two, server.peer_id)
        assert await echoes(three, server.peer_id)


@trio_test
async def test_a_connection_closed_the_moment_it_stands_leaves_no_tasks_behind() -> None:
    async with host() as server, host({}, listen=()) as client:
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(20):
            await client.connect(server.addresses[0], timeout_s=30)
            await client.disconnect(server.peer_id)  # before the connection's own tasks had a turn
        await eventually(lambda: trio.lowlevel.current_statistics().tasks_living <= before)


# -- events ------------------------------------------------------------------------------------------------------------


@trio_test
async def test_events_begin_with_who_is_there_and_name_the_reason_somebody_went() -> None:
    async with two_hosts() as (server, client), client.events() as events:
        came = await events.receive()
        assert came == PeerConnected(server.peer_id, server.address, client.peers()[0].remote, inbound=False)
        await server.disconnect(client.peer_id)
        with trio.fail_after(60):
            went = await events.receive()
        assert isinstance(went, PeerDisconnected)
        assert (went.peer_id, went.address) == (server.peer_id, server.address)
        # The goodbye may be read first, or a sign of life of ours meet the closed socket.
        assert went.reason in (
            "closed by the peer",
            "write failed: Broken pipe",
            "read failed: Connection reset by peer",
        )


@trio_test
async def test_events_end_when_the_host_closes() -> None:
    ended = trio.Event()

    async def listen_on(running: Any, task_status: trio.TaskStatus[None]) -> None:
        async with running.events() as events:
            task_status.started()
            async for _ in events:
                pass
        ended.set()

    async with trio.open_nursery() as nursery:
        async with host() as running:
            await nursery.start(listen_on, running)
        with trio.fail_after(60):
            await ended.wait()


# -- the library on the other side -------------------------------------------------------------------------------------


def noise(key_pair: Any) -> dict[Any, Any]:
    return {NOISE: Noise(key_pair, noise_privkey=create_new_key_pair().private_key)}


@trio_test
async def test_py_libp2p_as_it_comes_can_dial_ping_identify_and_talk() -> None:
    async with host() as ours, library_host(noise) as theirs:
        info = info_from_p2p_addr(Multiaddr(ours.addresses[0]))
        with trio.fail_after(60):
            await theirs.connect(info)
            stream = await theirs.new_stream(info.peer_id, [ECHO])
            await stream.write(b"from the library")
            assert await stream.read(100) == b"from the library"
            await stream.close()
            rtts = await PingService(theirs).ping(info.peer_id, ping_amt=3)
            assert len(rtts) == 3
            stream = await theirs.new_stream(info.peer_id, [IDENTIFY])
            answer = b""
            while True:
                try:
                    answer += await stream.read(4096)
                except Exception:
                    break
            identified = parse_identify_response(answer)
        assert ECHO in identified.protocols
        assert str(PING) in identified.protocols
        assert len(identified.listen_addrs) == len(ours.addresses)


@trio_test
async def test_py_libp2p_as_it_comes_can_be_dialled() -> None:
    async with host({}, listen=()) as ours, library_host(noise) as theirs:

        async def serve(stream: Any) -> None:
            with suppress(Exception):  # its end of stream; in the library a handler that raises ends the host
                while data := await stream.read(65536):
                    await stream.write(data)
            await stream.close()

        theirs.set_stream_handler(ECHO, serve)
        await ours.connect(str(theirs.get_addrs()[0]), timeout_s=30)
        assert await echoes(ours, theirs.get_id().to_base58())
        stream = await ours.open_stream(theirs.get_id().to_base58(), ECHO, timeout_s=30)
        payload = bytes(range(256)) * 4096
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, payload)
                assert await receive_exactly(stream, len(payload)) == payload
        await stream.reset()
