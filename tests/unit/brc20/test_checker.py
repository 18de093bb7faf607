"""The checker asks once, remembers within bounds, and never waits longer than it may."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import base58
import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.brc20.checker import Brc20Checker
from ngpu_bootstrap.brc20.indexers import IndexerFault
from ngpu_bootstrap.brc20.policies import held_of, plain
from ngpu_bootstrap.errors import BadRequest, NotServed
from tests.support.virtual_clock import virtual_clock

ADDRESS = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"


def address(number: int) -> str:
    return base58.b58encode_check(b"\0" + number.to_bytes(20, "big")).decode()


class Scripted:
    name = "scripted"

    def __init__(self, *, takes_s: float = 0.0) -> None:
        self.asked: list[str] = []
        self.running = self.most = 0
        self.takes_s = takes_s
        self.fault = ""

    async def balances(self, address: str) -> Mapping[str, Decimal]:
        self.asked.append(address)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.takes_s)
        finally:
            self.running -= 1
        if self.fault:
            raise IndexerFault(self.fault)
        return {"ainn": Decimal("100.5")}


def checker(indexer: Scripted | None, **changes: Any) -> Brc20Checker:
    values = {
        "network": "mainnet",
        "ticker": "AINN",
        "timeout_s": 5.0,
        "cache_s": 60.0,
        "cache_size": 3,
        "at_once": 2,
    }
    return Brc20Checker(indexer, **(values | changes))


@virtual_clock
async def test_many_who_ask_at_once_are_one_question() -> None:
    indexer = Scripted(takes_s=1)
    asked = checker(indexer)

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(asked.balances, ADDRESS)
    await asked.balances(ADDRESS)
    await trio.sleep(61)
    await asked.balances(ADDRESS)

    assert indexer.asked == [ADDRESS, ADDRESS]


@virtual_clock
async def test_the_cache_and_the_questions_at_once_are_bounded() -> None:
    indexer = Scripted(takes_s=0.1)
    asked = checker(indexer)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(asked.balances, address(number))

    assert indexer.most == 2
    assert len(asked) == 3


@virtual_clock
async def test_an_indexer_that_hangs_is_given_up_and_not_asked_by_everybody() -> None:
    indexer = Scripted(takes_s=1000)
    asked = checker(indexer)

    began = trio.current_time()
    for _ in range(3):
        with pytest.raises(NotServed) as refused:
            await asked.balances(ADDRESS)
        assert (refused.value.status, refused.value.reason) == (503, "indexer_unavailable")
    assert trio.current_time() - began <= 5.1
    await trio.sleep(6)
    indexer.takes_s = 0
    assert held_of(await asked.balances(ADDRESS), "AINN") == Decimal("100.5")

    assert len(indexer.asked) == 2


@virtual_clock
async def test_who_leaves_does_not_take_the_answer_from_those_who_wait() -> None:
    indexer = Scripted(takes_s=1)
    asked = checker(indexer)

    async def waits() -> None:
        await trio.sleep(0.1)
        assert (await asked.balances(ADDRESS))["ainn"] == Decimal("100.5")

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5):
            nursery.start_soon(waits)
            await asked.balances(ADDRESS)


@trio_test
async def test_what_cannot_be_looked_up_says_why_and_asks_nobody() -> None:
    indexer = Scripted()
    with pytest.raises(BadRequest, match="no Bitcoin address"):
        await checker(indexer).balances("bc1qnope")
    with pytest.raises(BadRequest, match="address of testnet"):
        await checker(indexer).balances("mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn")
    with pytest.raises(NotServed, match="no BRC-20 indexer is configured"):
        await checker(None).balances(ADDRESS)
    assert not indexer.asked


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("100", "100"),
        ("100.500", "100.5"),
        ("0", "0"),
        ("1E+3", "1000"),
        ("0.0000000001", "0.0000000001"),
    ],
)
def test_amounts_are_exact_texts(amount: str, text: str) -> None:
    assert plain(Decimal(amount)) == text
