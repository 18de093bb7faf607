"""Price lists: one form, exact sums, signed for one session by one node."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.prices import (
    PRICE_LIST_TYPE,
    PriceError,
    PriceList,
    Prices,
    SignedPriceList,
    amount_text,
    check_price_list,
    cost,
    parse_amount,
    sign_price_list,
    total,
)
from tests.unit.protocol.samples import CHAIN_ID, NODE, STRANGER

SESSION = b"s" * 32
PRICES = Prices.of_models("USD", {"NVIDIA GeForce RTX 4090": "0.00012", "A100-80G": "0.00050"})

amounts = st.decimals(min_value=0, max_value=10**17, allow_nan=False, allow_infinity=False, places=18)


def test_a_list_has_one_form_in_models_own_names() -> None:
    assert PRICES.text == "A100-80G=0.0005\nRTX4090=0.00012"
    assert Prices.of_text("USD", PRICES.text) == PRICES
    assert Prices.of_text("USD", "") == Prices("USD", {})


@pytest.mark.parametrize(
    "text",
    [
        "RTX4090=0.00012\nA100-80G=0.0005",  # out of order
        "RTX4090=0.000120",  # an idle zero
        "rtx 4090=1",
        "RTX4090=1\n",
        "RTX4090=1\nRTX4090=1",
        "RTX4090",
        "RTX4090=-1",
        "=1",
        "RTX4090=1e2",
    ],
)
def test_another_form_of_a_list_is_none(text: str) -> None:
    with pytest.raises(PriceError):
        Prices.of_text("USD", text)


@pytest.mark.parametrize(
    ("currency", "models", "said"),
    [
        ("", {"T4": "1 USD"}, "T4: '1 USD' is no amount"),
        ("USD", {"T4": "1", "Tesla T4": "2"}, "T4 has two prices"),
        ("USD", {"!": "1"}, "'!' is no GPU model"),
        ("US\nD", {"T4": "1"}, "no currency"),
        ("USD", {f"X{number}": "1" for number in range(65)}, "65 models"),
        ("USD", {"T4": "1" * 19}, "no amount"),
        ("USD", {"T4": "0." + "1" * 19}, "no amount"),
    ],
)
def test_what_is_no_price_list_says_why(currency: str, models: dict[str, str], said: str) -> None:
    with pytest.raises(PriceError, match=said):
        Prices.of_models(currency, models)


@given(amounts, st.integers(0, 2**63 - 1))
def test_no_sum_is_ever_rounded(price: Decimal, billed_ms: int) -> None:
    amount = cost(price, billed_ms)
    assert Fraction(amount) == Fraction(price) * billed_ms / 1000
    assert Fraction(amount_text(amount)) == Fraction(amount)
    sums = total(total({}, "USD", amount), "USD", cost(price, 1))
    assert Fraction(sums["USD"]) == Fraction(price) * (billed_ms + 1) / 1000


@given(amounts)
def test_amounts_are_read_as_they_are_written(amount: Decimal) -> None:
    assert parse_amount(amount_text(amount)) == amount


def test_a_signed_list_is_taken_from_its_node_for_its_session_only() -> None:
    signed = sign_price_list(PRICES, SESSION, NODE, CHAIN_ID)
    assert check_price_list(signed.wire, NODE.address, SESSION, CHAIN_ID).prices() == PRICES
    for node, session, chain_id, wire in (
        (STRANGER.address, SESSION, CHAIN_ID, signed.wire),
        (NODE.address, b"t" * 32, CHAIN_ID, signed.wire),
        (NODE.address, SESSION, CHAIN_ID + 1, signed.wire),
        (NODE.address, SESSION, CHAIN_ID, b"\x80"),
    ):
        with pytest.raises(MalformedError):
            check_price_list(wire, node, session, chain_id)


def test_a_list_whose_text_is_none_is_refused_though_it_is_signed() -> None:
    price_list = PriceList(NODE.address, SESSION, "USD", "RTX4090=cheap")
    wire = PRICE_LIST_TYPE.pack(price_list, NODE.sign(price_list.digest(CHAIN_ID)))
    assert SignedPriceList.from_bytes(wire).signer(CHAIN_ID) == NODE.address
    with pytest.raises(MalformedError, match="no amount"):
        check_price_list(wire, NODE.address, SESSION, CHAIN_ID)


@given(st.binary(max_size=300))
def test_whatever_the_bytes_are_only_malformed_is_raised(data: bytes) -> None:
    with pytest.raises(MalformedError):
        SignedPriceList.from_bytes(data)
