"""What a peer that wants a hole punched can have this host dial, and how often. (That it works: `netns`.)"""

from __future__ import annotations

import pytest
import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from trio.testing import trio_test

from ngpu_protocol.p2p import Host
from ngpu_protocol.p2p.circuits import attach_circuits
from ngpu_protocol.p2p.delimited import delimited
from ngpu_protocol.p2p.hole_punch import DCUTR_PROTOCOL, _endpoints, attach_hole_punching
from ngpu_protocol.p2p.kad_messages import multiaddr_bytes
from tests.integration.p2p.peers import host
from tests.integration.p2p.test_relay import hidden_host, relay_host


def asking(*addresses: str) -> HolePunch:
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=[multiaddr_bytes(text) for text in addresses])


def test_nothing_of_this_machine_or_its_networks_is_dialled() -> None:
    inside = (
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.20.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
    )
    for address in inside:
        assert _endpoints(asking(f"/ip4/{address}/tcp/80")) == []
    odd = (
        "/ip6/2001:db8::1/tcp/80",
        "/dns4/victim.example/tcp/80",
        "/ip4/203.0.113.1/udp/80",
        "/ip4/203.0.113.1/tcp/0",
    )
    for address in odd:
        assert _endpoints(asking(address)) == []
    assert _endpoints(HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"rubbish", b""])) == []
    many = [f"/ip4/203.0.113.{n}/tcp/80" for n in range(50)]
    assert len(_endpoints(asking(*many))) == 2


async def is_turned_away(from_: Host, peer: str) -> bool:
    stream = await from_.open_stream(peer, DCUTR_PROTOCOL, timeout_s=30)
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(60):
        await stream.receive_some()
    return True


@trio_test
async def test_who_is_connected_directly_or_asks_too_often_is_turned_away() -> None:
    async with relay_host() as (relay, _), hidden_host(relay) as (hidden, _, where), host({}, listen=()) as caller:
        attach_circuits(caller)
        puncher = attach_hole_punching(hidden)
        assert await is_turned_away(relay, hidden.peer_id), "it is connected directly"
        await caller.connect(where, timeout_s=30)
        stream = await caller.open_stream(hidden.peer_id, DCUTR_PROTOCOL, timeout_s=30)
        await stream.send_all(delimited(asking().SerializeToString()))
        with trio.fail_after(60):
            assert await stream.receive_some()
        assert await is_turned_away(caller, hidden.peer_id), "it asked a moment ago"
        stream.reset_nowait()
        assert puncher.opened == 0
