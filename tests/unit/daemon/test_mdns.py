"""What is taken from a multicast DNS record, which anybody on the wire may send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_daemon.mdns import dnsaddrs_of, txt_record

PEER = "16Uiu2HAmNRzh7fX7CbK7hxKfCVWarGcYs94uJVbb7iV8hnXw9752"
NEAR = f"/ip4/192.168.1.5/tcp/4911/p2p/{PEER}"


def test_a_record_comes_back_on_its_own_network_alone() -> None:
    txt = txt_record("local", [NEAR, f"/ip6/fd00::5/tcp/4911/p2p/{PEER}"])
    assert dnsaddrs_of(txt, "local") == [NEAR, f"/ip6/fd00::5/tcp/4911/p2p/{PEER}"]
    assert dnsaddrs_of(txt, "main") == []
    assert dnsaddrs_of(b"", "local") == []


@pytest.mark.parametrize(
    "multiaddr",
    [
        f"/ip4/8.8.8.8/tcp/4911/p2p/{PEER}",
        f"/dns4/victim.example/tcp/80/p2p/{PEER}",
        f"/ip4/224.0.0.251/tcp/4911/p2p/{PEER}",
        f"/ip4/0.0.0.0/tcp/4911/p2p/{PEER}",
        f"/ip4/192.168.1.5/udp/4911/p2p/{PEER}",
        f"/ip4/192.168.1.5/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        "/ip4/192.168.1.5/tcp/4911",
        "x" * 200,
    ],
)
def test_only_plain_addresses_of_private_networks_are_taken(multiaddr: str) -> None:
    assert dnsaddrs_of(txt_record("local", [multiaddr]), "local") == []


def test_no_more_than_so_many_are_taken_and_what_is_too_long_is_not_sent() -> None:
    assert len(dnsaddrs_of(txt_record("local", [NEAR] * 50), "local")) == 8
    assert txt_record("local", ["/" + "x" * 300]) == txt_record("local", [])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_of_nothing_or_of_addresses(data: bytes) -> None:
    assert all(text.startswith("/ip") for text in dnsaddrs_of(data, "local"))
