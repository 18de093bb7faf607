"""Where a request comes from, and which of its fields go on."""

from __future__ import annotations

import pytest

from ngpu_bootstrap.front.callers import client_address, parse_networks, passed_on, passed_on_wrapped

PROXIES = parse_networks(("10.0.0.0/8", "::1"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("192.0.2.9", ["198.51.100.1"], "192.0.2.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
        ("::1", ["2001:db8::1"], "2001:db8::1"),
        ("fe80::1%eth0", [], "fe80::1"),
    ],
)
def test_a_clients_address_is_what_trusted_proxies_say(peer: str, forwarded: list[str], address: str) -> None:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    assert client_address(peer, headers, PROXIES) == address


def test_without_trusted_proxies_nobody_is_believed() -> None:
    assert client_address("10.0.0.1", [(b"x-forwarded-for", b"1.2.3.4")], ()) == "10.0.0.1"


def test_a_transparent_request_keeps_its_fields_but_those_of_this_hop_and_ours() -> None:
    headers = [
        (b"host", b"h"),
        (b"connection", b"keep-alive, x-hop"),
        (b"x-hop", b"1"),
        (b"te", b"trailers"),
        (b"expect", b"100-continue"),
        (b"content-length", b"3"),
        (b"cookie", b"a"),
        (b"cookie", b"b"),
        (b"ngpu-order", b"forged"),
    ]
    assert passed_on(headers, upgrade=False) == [
        (b"host", b"h"),
        (b"content-length", b"3"),
        (b"cookie", b"a"),
        (b"cookie", b"b"),
    ]


def test_a_switch_of_protocols_goes_on() -> None:
    headers = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-key", b"k")]
    assert passed_on(headers, upgrade=True) == [
        (b"sec-websocket-key", b"k"),
        (b"connection", b"upgrade"),
        (b"upgrade", b"websocket"),
    ]


def test_a_wrapped_request_is_framed_and_typed_anew_and_not_compressed() -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"99"), (b"accept-encoding", b"gzip")]
    assert passed_on_wrapped(headers, b"text/plain") == [(b"content-type", b"text/plain")]
    assert passed_on_wrapped(headers, None) == [(b"content-type", b"application/json")]
