"""What may be called back: public addresses by https, whatever a name leads to, unless the operator says otherwise."""

from __future__ import annotations

import ipaddress

import pytest

from ngpu_bootstrap.webhooks.rules import WebhookRules

PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "::1",
    "fd00::1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "::10.0.0.1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_a_private_address_is_not_called_even_beside_a_public_one(address: str) -> None:
    rules = WebhookRules()
    assert rules.choose([address], secure=True)[0] == ""
    assert rules.choose(["1.1.1.1", address], secure=True)[0] == ""
    assert "public" in rules.choose(["1.1.1.1", address], secure=True)[1]


def test_a_name_with_public_addresses_is_called_at_the_first_that_was_judged() -> None:
    assert WebhookRules().choose(["1.1.1.1", "2606:4700::1111"], secure=True) == ("1.1.1.1", "")
    assert WebhookRules().choose(["1.1.1.1"], secure=False)[0] == ""
    assert WebhookRules().choose([], secure=True) == ("", "its name has no address")


def test_an_operators_networks_and_loopback_are_called_where_they_are_allowed() -> None:
    rules = WebhookRules(allowed=(ipaddress.ip_network("10.1.0.0/16"),), loopback=True)
    assert rules.choose(["10.1.2.3"], secure=True) == ("10.1.2.3", "")
    assert rules.choose(["::ffff:10.1.2.3"], secure=True)[0] != ""
    assert rules.choose(["10.2.0.1"], secure=True)[0] == ""
    assert rules.choose(["127.0.0.1"], secure=False) == ("127.0.0.1", "")
