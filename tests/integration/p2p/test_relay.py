"""Circuit relay: a peer that only dialled out is reached through a relay it chose, within that relay's limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.p2p import DialError, Host, HostLimits, P2PError, P2PStream
from ngpu_protocol.p2p.circuits import Circuits, attach_circuits
from ngpu_protocol.p2p.host import parse_multiaddr
from ngpu_protocol.p2p.kad_messages import peer_id_bytes
from ngpu_protocol.p2p.relay import Relay
from ngpu_protocol.p2p.relay_messages import HOP_PROTOCOL, STOP_PROTOCOL, HopMessage, RelayLimits
from tests.integration.p2p.peers import ECHO, echo, echoes, eventually, host, receive_exactly


@contextlib.asynccontextmanager
async def relay_host(
    limits: RelayLimits | None = None, admitted: set[str] | None = None
) -> AsyncIterator[tuple[Host, Relay]]:
    async with host({}) as running:
        relay = Relay(running, may_reserve=lambda peer: admitted is None or peer in admitted, limits=limits)
        running.handle(HOP_PROTOCOL, relay.serve)
        yield running, relay


@contextlib.asynccontextmanager
async def hidden_host(relay: Host) -> AsyncIterator[tuple[Host, Circuits, str]]:
    """Yield a peer that does not listen and has a place at *relay*, and the multiaddr it is reached at."""
    async with host({ECHO: echo}, listen=()) as running:
        circuits = attach_circuits(running)
        await running.connect(relay.addresses[0], timeout_s=30)
        place = await circuits.reserve(relay.peer_id)
        yield running, circuits, f"{place.addresses[0]}/p2p/{running.peer_id}"


@contextlib.asynccontextmanager
async def third() -> AsyncIterator[Host]:
    async with host({}, listen=()) as running:
        attach_circuits(running)
        yield running


@trio_test
async def test_a_third_peer_reaches_one_that_only_dialled_out() -> None:
    async with relay_host() as (relay, served), hidden_host(relay) as (hidden, _, where), third() as caller:
        assert await caller.connect(where, timeout_s=30) == hidden.peer_id
        assert await echoes(caller, hidden.peer_id)
        (info,) = [info for info in caller.peers() if info.peer_id == hidden.peer_id]
        assert info.remote.endswith("/p2p-circuit")
        assert not caller.is_directly_connected(hidden.peer_id)
        assert caller.dialled_at(hidden.peer_id) is None, "no address for anybody's routing table"
        assert await echoes(relay, hidden.peer_id), "the relay's own streams go over the connection it has"
        assert (served.circuits, served.opened) == (1, 1)
        await caller.disconnect(hidden.peer_id)
        await eventually(lambda: served.circuits == 0)
        await caller.probe(where, timeout_s=5)
        await eventually(lambda: served.circuits == 0)


@trio_test
async def test_who_is_not_admitted_gets_no_place_and_who_loses_admission_loses_it() -> None:
    admitted: set[str] = set()
    async with (
        relay_host(admitted=admitted) as (relay, served),
        host({ECHO: echo}, listen=()) as hidden,
        third() as caller,
    ):
        circuits = attach_circuits(hidden)
        await hidden.connect(relay.addresses[0], timeout_s=30)
        with pytest.raises(P2PError, match="permission denied"):
            await circuits.reserve(relay.peer_id)
        where = f"{relay.addresses[0]}/p2p-circuit/p2p/{hidden.peer_id}"
        with pytest.raises(DialError, match="no reservation"):
            await caller.connect(where, timeout_s=30)
        admitted.add(hidden.peer_id)
        await circuits.reserve(relay.peer_id)
        await caller.connect(where, timeout_s=30)
        await caller.disconnect(hidden.peer_id)
        admitted.clear()
        with pytest.raises(DialError, match="no reservation"):
            await caller.connect(where, timeout_s=30)
        assert served.reservations == 0


@trio_test
async def test_places_are_counted_renewed_and_given_on_when_their_holder_is_gone() -> None:
    async with relay_host(RelayLimits(reservations=1)) as (relay, served), third() as caller:
        async with hidden_host(relay) as (_, circuits, _), host({}, listen=()) as other:
            others = attach_circuits(other)
            await other.connect(relay.addresses[0], timeout_s=30)
            await circuits.reserve(relay.peer_id)
            with pytest.raises(P2PError, match="reservation refused"):
                await others.reserve(relay.peer_id)
        async with hidden_host(relay) as (hidden, _, where):
            assert served.reservations == 1
            await caller.connect(where, timeout_s=30)
            assert await echoes(caller, hidden.peer_id)


@trio_test
async def test_a_circuit_ends_at_its_bytes_and_its_time() -> None:
    limits = RelayLimits(circuit_bytes=100_000, circuit_s=1)
    async with relay_host(limits) as (relay, served), hidden_host(relay) as (hidden, _, where), third() as caller:
        await caller.connect(where, timeout_s=30)
        stream = await caller.open_stream(hidden.peer_id, ECHO, timeout_s=30)
        await stream.send_all(bytes(50_000))
        await receive_exactly(stream, 50_000)
        with pytest.raises(trio.BrokenResourceError):
            await _echo_much(stream)
        await eventually(lambda: served.circuits == 0)
        await caller.connect(where, timeout_s=30)
        await eventually(lambda: not caller.is_connected(hidden.peer_id))


async def _echo_much(stream: P2PStream) -> None:
    with trio.fail_after(60):
        await stream.send_all(bytes(100_000))
        await receive_exactly(stream, 100_000)


@trio_test
async def test_one_peer_opens_only_so_many_circuits_at_once_and_a_minute() -> None:
    limits = RelayLimits(circuits_per_source=2, opens_per_minute=4)
    async with relay_host(limits) as (relay, served), hidden_host(relay) as (_, _, where), third() as caller:
        for _ in range(2):
            await caller._swarm.dial(*parse_multiaddr(where))
        with pytest.raises(DialError, match="resource limit"):
            await caller.probe(where, timeout_s=5)
        await caller.disconnect(where.rpartition("/")[2])
        await eventually(lambda: served.circuits == 0)
        await caller.probe(where, timeout_s=5)
        await eventually(lambda: served.circuits == 0)
        await caller.probe(where, timeout_s=5)
        await eventually(lambda: served.circuits == 0)
        with pytest.raises(DialError, match="resource limit"):
            await caller.probe(where, timeout_s=5)
        async with third() as another:
            await another.probe(where, timeout_s=5)


@trio_test
async def test_nobody_is_let_in_by_a_relay_that_was_not_asked_or_under_a_false_name() -> None:
    async with relay_host() as (relay, _), hidden_host(relay) as (hidden, circuits, where), third() as caller:
        circuits.forget(relay.peer_id)
        with pytest.raises(DialError, match="connection failed"):
            await caller.connect(where, timeout_s=30)
        assert [info.peer_id for info in hidden.peers()] == [relay.peer_id]


@trio_test
async def test_a_relay_that_brings_somebody_else_is_found_out() -> None:
    async with (
        relay_host() as (relay, served),
        hidden_host(relay) as (hidden, _, _),
        hidden_host(relay) as (other, _, _),
    ):
        honest = served._open_far_end

        async def lie(stream: P2PStream, message: HopMessage) -> tuple[P2PStream, str]:
            message.peer.id = peer_id_bytes(other.peer_id)
            return await honest(stream, message)

        served._open_far_end = lie  # type: ignore[method-assign]
        async with third() as caller:
            with pytest.raises(DialError):
                await caller.connect(f"{relay.addresses[0]}/p2p-circuit/p2p/{hidden.peer_id}", timeout_s=30)
            assert not caller.is_connected(hidden.peer_id)
            assert not caller.is_connected(other.peer_id)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x0f", b"\x80\x80\x04", b"\x05rubbi", b"\x00", b"\x02\x08\x02"])
@trio_test
async def test_rubbish_on_either_protocol_ends_its_stream_and_nothing_else(data: bytes) -> None:
    async with relay_host() as (relay, _), hidden_host(relay) as (hidden, _, where), third() as caller:
        await caller.connect(relay.addresses[0], timeout_s=30)
        for at, protocol, by in ((relay, HOP_PROTOCOL, caller), (hidden, STOP_PROTOCOL, relay)):
            stream = await by.open_stream(at.peer_id, protocol, timeout_s=30)
            await stream.send_all(data)
            await stream.send_eof()
            await _drained(stream)
        await caller.connect(where, timeout_s=30)
        assert await echoes(caller, hidden.peer_id)


async def _drained(stream: P2PStream) -> None:
    with trio.fail_after(60):
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
    stream.reset_nowait()


@trio_test
async def test_a_direct_connection_is_preferred_once_there_is_one() -> None:
    async with relay_host() as (relay, served), host({ECHO: echo}) as both, third() as caller:
        circuits = attach_circuits(both)
        await both.connect(relay.addresses[0], timeout_s=30)
        place = await circuits.reserve(relay.peer_id)
        await caller._swarm.dial(*parse_multiaddr(both.addresses[0]))
        await caller._swarm.dial(*parse_multiaddr(f"{place.addresses[0]}/p2p/{both.peer_id}"))
        before = served.relayed_bytes
        stream = await caller.open_stream(both.peer_id, ECHO, timeout_s=30)
        await stream.send_all(os.urandom(60_000))
        await receive_exactly(stream, 60_000)
        assert served.relayed_bytes - before < 10_000
        stream.reset_nowait()


def test_the_limits_of_a_relay_are_the_design_s() -> None:
    assert RelayLimits().reservations == 1024
    assert HostLimits().connections >= RelayLimits().reservations
