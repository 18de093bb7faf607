"""The configuration's own rules; where values come from is tested with `ngpu_daemon.settings`."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from pydantic import ValidationError

from ngpu_bootstrap.config import BootstrapSettings, is_loopback, parse_host_port
from ngpu_daemon.settings import sample_toml


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("localhost:65535", ("localhost", 65535))],
)
def test_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert parse_host_port(text) == expected


@pytest.mark.parametrize("text", ["", ":80", "127.0.0.1", "::1:80", "127.0.0.1:65536", "http://x:80", "[::1]"])
def test_what_is_no_host_and_port(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_host_port(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("listen", ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "example.org:80"])
def test_a_listener_others_reach_needs_tls_or_a_proxy(listen: str) -> None:
    with pytest.raises(ValidationError, match="tokens in the clear"):
        BootstrapSettings(http_listen=listen)
    BootstrapSettings(http_listen=listen, behind_proxy=True)
    tls: Any = {"certificate": "c.pem", "key": "k.pem"}
    assert not BootstrapSettings(http_listen=listen, tls=tls).has_private_listener


def test_whoever_reaches_a_loopback_listener_is_on_this_machine_unless_a_proxy_is() -> None:
    assert BootstrapSettings().has_private_listener
    assert not BootstrapSettings(behind_proxy=True).has_private_listener


@pytest.mark.parametrize(
    "wrong",
    [
        {"network": "Main"},
        {"tls": {"certificate": "c.pem"}},
        {"admission": {"mode": "approved", "approved": ["0x12"]}},
        {"trusted_proxies": ["10.0.0.0/99"]},
        {"limits": {"attempts": 0}},
        {"heartbeat_s": 10},
        {"unknown": 1},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BootstrapSettings(**wrong)


def test_the_sample_documents_every_key_and_loads() -> None:
    sample = sample_toml(BootstrapSettings)
    BootstrapSettings(**tomllib.loads(sample))
    for name in BootstrapSettings.model_fields:
        assert name in sample
