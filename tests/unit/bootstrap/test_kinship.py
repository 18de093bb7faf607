"""Which nodes may be one owner's: by wallet, by address, by network of IPv6."""

from __future__ import annotations

import pytest

from ngpu_bootstrap.kinship import same_place, same_wallet


@pytest.mark.parametrize(
    ("one", "other", "anywhere", "public"),
    [
        ("8.8.8.8", "8.8.8.8", True, True),
        ("8.8.8.8", "8.8.4.4", False, False),
        ("8.8.8.8", "::ffff:8.8.8.8", True, True),
        ("192.168.1.2", "192.168.1.2", True, False),
        ("127.0.0.1", "127.0.0.1", True, False),
        ("2606:4700::1", "2606:4700::2", True, True),
        ("2606:4700:0:1::1", "2606:4700:0:2::1", False, False),
        ("", "", False, False),
        ("8.8.8.8", "", False, False),
        ("relay", "relay", True, False),
    ],
)
def test_what_is_one_place(one: str, other: str, anywhere: bool, public: bool) -> None:
    assert same_place(one, other) is same_place(other, one) is anywhere
    assert same_place(one, other, only_public=True) is public


def test_that_neither_has_a_wallet_makes_them_no_kin() -> None:
    assert same_wallet("0x1", "0x1")
    assert not same_wallet("0x1", "0x2")
    assert not same_wallet("", "")
