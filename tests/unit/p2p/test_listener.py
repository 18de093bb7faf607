from __future__ import annotations

import pytest
from multiaddr import Multiaddr

from ngpu_protocol.p2p import HostLimits
from ngpu_protocol.p2p.listener import Admission, tcp_endpoint


def test_one_address_cannot_take_every_place() -> None:
    admission = Admission(HostLimits(connections=10, connections_per_ip=2, upgrades_per_ip=10))
    assert [admission.admit("192.0.2.1") is not None for _ in range(4)] == [True, True, False, False]
    assert admission.admit("192.0.2.2") is not None


def test_a_site_s_ipv6_addresses_count_as_one() -> None:
    admission = Admission(HostLimits(connections_per_ip=2))
    assert admission.admit("2001:db8:0:1::1")
    assert admission.admit("2001:db8:0:1:ffff::2")
    assert admission.admit("2001:db8:0:1:1234::3") is None
    assert admission.admit("2001:db8:0:2::1")


def test_an_ipv4_address_in_ipv6_clothes_counts_as_itself() -> None:
    admission = Admission(HostLimits(connections_per_ip=1))
    assert admission.admit("::ffff:192.0.2.1")
    assert admission.admit("192.0.2.1") is None
    assert admission.admit("fe80::1%eth0")


def test_handshakes_under_way_are_counted_apart() -> None:
    admission = Admission(HostLimits(upgrades_per_ip=1, connections_per_ip=2))
    first = admission.admit("192.0.2.1")
    assert first is not None
    assert admission.admit("192.0.2.1") is None
    admission.upgraded(first)
    second = admission.admit("192.0.2.1")
    assert second is not None
    admission.upgraded(second)
    assert admission.admit("192.0.2.1") is None
    admission.leave(first)
    assert admission.admit("192.0.2.1") is not None


def test_places_are_counted_over_all_addresses() -> None:
    admission = Admission(HostLimits(connections=3))
    assert [admission.admit(f"192.0.2.{n}") is not None for n in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/192.0.2.1/tcp/4001", ("192.0.2.1", 4001)),
        ("/ip6/2001:db8::1/tcp/1", ("2001:db8::1", 1)),
        ("/dns4/bootstrap.example/tcp/4001", ("bootstrap.example", 4001)),
        ("/ip4/192.0.2.1/udp/4001", None),
        ("/ip4/192.0.2.1/tcp/4001/ws", None),
        ("/ip4/192.0.2.1", None),
    ],
)
def test_only_plain_tcp_is_an_endpoint(text: str, endpoint: tuple[str, int] | None) -> None:
    assert tcp_endpoint(Multiaddr(text)) == endpoint
