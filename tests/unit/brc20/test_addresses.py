"""Bitcoin addresses: the test vectors of BIP 173 and BIP 350, base58, networks, and every kind of wrong text."""

from __future__ import annotations

import contextlib

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.brc20.addresses import AddressProblem, parse_bitcoin_address

# BIP 350, "Test vectors for v0-v16 native segregated witness addresses"
VALID = [
    ("BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KV8F3T4", "mainnet", "p2wpkh"),
    ("tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3q0sl5k7", "testnet", "p2wsh"),
    ("bc1pw508d6qejxtdg4y5r3zarvary0c5xw7kw508d6qejxtdg4y5r3zarvary0c5xw7kt5nd6y", "mainnet", "witness v1"),
    ("BC1SW50QGDZ25J", "mainnet", "witness v16"),
    ("bc1zw508d6qejxtdg4y5r3zarvaryvaxxpcs", "mainnet", "witness v2"),
    ("tb1qqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesrxh6hy", "testnet", "p2wsh"),
    ("tb1pqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesf3hn0c", "testnet", "p2tr"),
    ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0", "mainnet", "p2tr"),
    # the documents' own example, and the first block's
    ("bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus", "mainnet", "p2tr"),
    ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "mainnet", "p2pkh"),
    ("3J98t1WpEZ73CNmQviecrnyiWrnqRhWNLy", "mainnet", "p2sh"),
    ("mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn", "testnet", "p2pkh"),
]
# BIP 350, "The following list gives invalid segwit addresses and the reason for their invalidity"
INVALID = [
    "tc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq5zuyut",
    "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqh2y7hd",
    "tb1z0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqglt7rf",
    "BC1S0XLXVLHEMJA6C4DQV22UAPCTQUPFHLXM9H8Z3K2E72Q4K9HCZ7VQ54WELL",
    "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kemeawh",
    "tb1q0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq24jc47",
    "bc1p38j9r5y49hruaue7wxjce0updqjuyyx0kh56v8s25huc6995vvpql3jow4",
    "BC130XLXVLHEMJA6C4DQV22UAPCTQUPFHLXM9H8Z3K2E72Q4K9HCZ7VQ7ZWS8R",
    "bc1pw5dgrnzv",
    "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7v8n0nx0muaewav253zgeav",
    "BC1QR508D6QEJXTDG4Y5R3ZARVARYV98GJ9P",
    "tb1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vq47Zagq",
    "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7v07qwwzcrf",
    "tb1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vpggkg4j",
    "bc1gmk9yu",
    "",
    "a" * 91,
    "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb",
    "0000000000000000000000000GFg7xJaNVN2",
    "bc1q\x00",
    "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayu\u017f",
    base58.b58encode_check(b"\x30" + bytes(20)).decode(),  # another coin's version byte
    base58.b58encode_check(bytes(22)).decode(),
]


@pytest.mark.parametrize(("text", "network", "kind"), VALID)
def test_a_valid_address_has_a_network_and_a_kind(text: str, network: str, kind: str) -> None:
    found = parse_bitcoin_address(text)
    assert (found.network, found.kind) == (network, kind)
    assert found.text == (text.lower() if text.lower().startswith(("bc1", "tb1")) else text)


@pytest.mark.parametrize("text", INVALID)
def test_what_is_no_address_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(AddressProblem) as problem:
        parse_bitcoin_address(text)
    assert len(str(problem.value)) > 8


@given(st.sampled_from([text for text, _, _ in VALID]), st.data())
def test_a_single_mistyped_character_is_found(text: str, data: st.DataObject) -> None:
    text = text.lower() if text.lower().startswith(("bc1", "tb1")) else text
    at = data.draw(st.integers(3, len(text) - 1))
    other = data.draw(st.sampled_from("qpzry9x8gf2tvdw0s3jn54khce6mua7l"))
    changed = text[:at] + other + text[at + 1 :]
    if changed != text:
        with pytest.raises(AddressProblem):
            parse_bitcoin_address(changed)


@given(st.text(max_size=100))
def test_any_text_is_an_address_or_a_problem(text: str) -> None:
    with contextlib.suppress(AddressProblem):
        parse_bitcoin_address(text)
