"""Accounts as people read them: spans, prices, shares, and what is printed."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ngpu_daemon.accounts import (
    END_OF_TIME_MS,
    Account,
    AccountError,
    Entry,
    Prices,
    Span,
    account_document,
    draw_account,
    entry_of_wire,
    parse_span,
    show_account,
    write_csv,
)
from ngpu_protocol.receipts import sign_receipt
from ngpu_protocol.statements import line_of
from tests.unit.protocol.samples import BOOTSTRAP, CHAIN_ID, NODE, SENT_AT_MS, a_receipt

GPU_A, GPU_B = a_receipt().gpus
DAY_MS = 86_400_000


def an_entry(sequence: int, verdict: str = "verified", **changes: Any) -> Entry:
    receipt = a_receipt(sequence=sequence, **changes)
    signed = sign_receipt(receipt, NODE, CHAIN_ID)
    return entry_of_wire(signed.wire, receipt.digest(CHAIN_ID), verdict, f"task {sequence}")


def an_account(*entries: Entry, models: dict[bytes, str] | None = None, owed: int | None = 2) -> Account:
    return draw_account(
        entries,
        node=NODE.address,
        bootstrap=BOOTSTRAP.address,
        span=Span(0, END_OF_TIME_MS),
        at_ms=SENT_AT_MS,
        models=models or {},
        owed=owed,
    )


def test_entry_of_our_own_bytes_is_what_decoding_a_strangers_gives() -> None:
    receipt = a_receipt()
    entry = an_entry(receipt.sequence)
    assert entry.line == line_of(receipt, "verified", CHAIN_ID)
    assert (entry.gpus, entry.ended_at_ms) == (receipt.gpus, receipt.ended_at_ms)


@pytest.mark.parametrize(
    ("since", "until", "from_ms", "to_ms"),
    [
        (None, None, 0, END_OF_TIME_MS),
        ("1970-01-02", "1970-01-02", DAY_MS, 2 * DAY_MS),  # the end day is included
        ("1970-01-01T00:00:01", "1970-01-01T00:00:02.5", 1000, 2500),
        ("1970-01-01T02:00:00+02:00", "1970-01-01T00:00:01Z", 0, 1000),
    ],
)
def test_dates_and_date_times_are_utc_unless_they_say_otherwise(
    since: str | None, until: str | None, from_ms: int, to_ms: int
) -> None:
    assert parse_span(since, until) == Span(from_ms, to_ms)


@pytest.mark.parametrize(
    ("since", "until", "said"),
    [
        ("yesterday", None, "--from yesterday: give a date such as"),
        (None, "2026-13-01", "--to 2026-13-01: give a date"),
        (None, "9999-12-31", "--to 9999-12-31: give a date"),
        ("2026-11-02", "2026-11-01", "is not before --to"),
    ],
)
def test_a_span_that_is_none_says_what_to_write(since: str | None, until: str | None, said: str) -> None:
    with pytest.raises(AccountError, match=said):
        parse_span(since, until)


@pytest.mark.parametrize("text", ["RTX 4090", "=1", "A10=", "A10=much", "A10=-1", "A10=NaN", "A10=Infinity"])
def test_a_price_that_is_none_says_what_to_write(text: str) -> None:
    with pytest.raises(AccountError, match="write MODEL=AMOUNT"):
        Prices.parse([text])


def test_a_price_finds_its_model_in_any_spelling() -> None:
    prices = Prices.parse(["NVIDIA GeForce RTX 4090=0.5", "A100-80G=3", "A100=2"])
    assert prices.of("RTX4090") == Decimal("0.5")
    assert prices.of("A100-80G") == 3
    assert prices.of("A100-40G") == 2  # by the family, where its own memory has no price
    assert prices.of("H100-80G") is None


def test_time_is_shared_among_the_gpus_a_task_held_and_priced_by_model() -> None:
    account = an_account(
        an_entry(1, busy_gpu_ms=1001),
        an_entry(2, busy_gpu_ms=500, gpus=(GPU_A,)),
        an_entry(3, "disputed", busy_gpu_ms=999),
        models={GPU_A: "RTX4090"},
    )
    rows, total = account.priced(Prices.parse(["RTX4090=2"]))
    assert [(row["model"], row["billed_gpu_ms"], row["amount"]) for row in rows] == [
        ("RTX4090", 501 + 500, "2.002"),
        (None, 500, None),
    ]
    assert total == Decimal("2.002")


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 5)), max_size=20))
def test_no_millisecond_is_lost_or_made_by_sharing(receipts: list[tuple[int, int]]) -> None:
    gpus = tuple(bytes([number]) * 32 for number in range(5))
    entries = [
        an_entry(number, busy_gpu_ms=busy, gpus=gpus[:held]) for number, (busy, held) in enumerate(receipts, start=1)
    ]
    account = an_account(*entries)
    assert sum(account.shares.billed_ms.values()) == sum(busy for busy, held in receipts if held)
    assert account.statement.billed_gpu_ms == sum(busy for busy, _ in receipts)


def test_what_is_printed_says_the_totals_and_what_waits() -> None:
    account = an_account(an_entry(1), an_entry(2, "disputed"), models={GPU_A: "RTX4090"})
    console = Console(file=io.StringIO(), width=160)
    show_account(account, Prices.parse(["RTX4090=1"]), console, signed=False)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for said in ("2, of which 1 paid and 1 disputed", "2 receipts for their", "1.234 s billed", "RTX4090", "0.617"):
        assert said in printed
    document = json.loads(json.dumps(account_document(account, Prices({}), b"\1" * 65)))
    assert (document["receipts"], document["paid_receipts"], document["disputed_receipts"]) == (2, 1, 1)
    assert (document["billed_gpu_ms"], document["waiting_receipts"], document["amount"]) == (1234, 2, None)
    assert document["signature"] == "0x" + "01" * 65


def test_csv_has_a_line_for_each_receipt() -> None:
    file = io.StringIO()
    write_csv([an_entry(1), an_entry(2, "skew")], file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(row["sequence"], row["verdict"], row["task_id"]) for row in rows] == [
        ("1", "verified", "task 1"),
        ("2", "skew", "task 2"),
    ]
    assert rows[0]["ended_at"] == "2025-06-15T15:06:40.903+00:00"
    assert rows[0]["receipt_hash"] == "0x" + a_receipt(sequence=1).digest(CHAIN_ID).hex()
