"""Accounts as people read them: spans, prices, shares, and what is printed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ngpu_daemon.accounts import (
    END_OF_TIME_MS,
    Account,
    AccountError,
    Entry,
    GpuModels,
    PriceLists,
    Span,
    account_document,
    draw_account,
    entries_of,
    parse_prices,
    parse_span,
    session_of_order,
    show_account,
    write_csv,
)
from ngpu_protocol.acknowledgements import sign_acknowledgement
from ngpu_protocol.orders import TaskOrder, sign_order
from ngpu_protocol.prices import Prices, sign_price_list
from ngpu_protocol.receipts import sign_receipt
from ngpu_protocol.statements import StatementLine, line_of
from tests.unit.protocol.samples import BOOTSTRAP, CHAIN_ID, NODE, SENT_AT_MS, a_receipt, an_acknowledgement

GPU_A, GPU_B = a_receipt().gpus
DAY_MS = 86_400_000


def an_entry(
    sequence: int, verdict: str = "verified", *, prices: Prices | None = None, reason: str = "", **changes: Any
) -> Entry:
    receipt = a_receipt(sequence=sequence, **changes)
    signed = sign_receipt(receipt, NODE, CHAIN_ID)
    ack = sign_acknowledgement(an_acknowledgement(receipt, verdict=verdict, reason=reason), BOOTSTRAP, CHAIN_ID)
    session = bytes(32)
    lists = PriceLists([sign_price_list(prices, session, NODE, CHAIN_ID).wire] if prices is not None else [])
    row = (signed.wire, receipt.digest(CHAIN_ID), verdict, f"task {sequence}", ack.wire, session)
    (entry,) = entries_of([row], lists)
    return entry


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
    assert type(entry) is Entry
    assert type(entry.line) is StatementLine
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


@pytest.mark.parametrize("text", ["RTX 4090", "=1", "A10=", "A10=much", "A10=-1", "A10=NaN", "A10=Infinity", "A10=1e3"])
def test_a_price_that_is_none_says_what_to_write(text: str) -> None:
    with pytest.raises(AccountError, match="write MODEL=AMOUNT"):
        parse_prices([text])


def test_a_price_finds_its_model_in_any_spelling() -> None:
    prices = parse_prices(["NVIDIA GeForce RTX 4090=0.5", "A100-80G=3", "A100=2"])
    assert prices is not None
    assert prices.of("RTX4090") == Decimal("0.5")
    assert prices.of("A100-80G") == 3
    assert prices.of("A100-40G") == 2  # by the family, where its own memory has no price
    assert prices.of("H100-80G") is None
    assert parse_prices([]) is None


def test_time_is_shared_among_the_gpus_a_task_held_and_priced_by_model() -> None:
    account = an_account(
        an_entry(1, busy_gpu_ms=1001),
        an_entry(2, busy_gpu_ms=500, gpus=(GPU_A,)),
        an_entry(3, "disputed", busy_gpu_ms=999),
        models={GPU_A: "RTX4090"},
    )
    rows, totals = account.priced(parse_prices(["RTX4090=2"]))
    assert [(row["model"], row["billed_gpu_ms"], row["amount"]) for row in rows] == [
        ("RTX4090", 501 + 500, "2.002"),
        (None, 500, None),
    ]
    assert totals == {"": Decimal("2.002")}


CHEAP = Prices.of_models("USD", {"RTX 4090": "0.001"})
DEAR = Prices.of_models("USD", {"RTX 4090": "0.003", "H100": "1"})
OTHER = Prices.of_models("EUR", {"RTX 4090": "0.000000000000000001"})


def test_each_receipt_is_totalled_by_the_list_of_its_session_and_currencies_stay_apart() -> None:
    entries = [
        an_entry(1, busy_gpu_ms=1000, gpus=(GPU_A,), prices=CHEAP),
        an_entry(2, busy_gpu_ms=1000, gpus=(GPU_A,), prices=DEAR),
        an_entry(3, busy_gpu_ms=999, gpus=(GPU_A,), prices=OTHER),
        an_entry(4, busy_gpu_ms=7000, gpus=(GPU_A,)),  # a session without a list
        an_entry(5, busy_gpu_ms=7, gpus=(GPU_B,), prices=DEAR),  # a card nobody knows the model of
    ]
    models = {GPU_A: "RTX4090"}
    account = an_account(*entries, models=models)
    rows, totals = account.priced()
    assert totals == {"EUR": Decimal("0.000000000000000000999"), "USD": Decimal("0.004")}
    assert [(row["billed_gpu_ms"], row["price_per_s"], row["amount"], row["currency"]) for row in rows] == [
        (7000, None, None, None),
        (1000, "0.003", "0.003", "USD"),
        (1000, "0.001", "0.001", "USD"),
        (999, "0.000000000000000001", "0.000000000000000000999", "EUR"),
        (7, None, None, None),
    ]
    file = io.StringIO()
    write_csv(entries, GpuModels(models), file, bootstrap=BOOTSTRAP.address)
    written = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(row["amount"], row["currency"]) for row in written] == [
        ("0.001", "USD"),
        ("0.003", "USD"),
        ("0.000000000000000000999", "EUR"),
        ("", ""),
        ("", ""),
    ]
    _, instead = account.priced(parse_prices(["RTX4090=1"]))
    assert instead == {"": Decimal("9.999")}, "other prices may be tried on all of it"


@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), st.integers(1, 5), st.sampled_from([None, CHEAP, DEAR, OTHER])), max_size=12
    )
)
def test_the_lines_of_the_csv_come_to_the_accounts_totals_exactly(
    receipts: list[tuple[int, int, Prices | None]],
) -> None:
    gpus = tuple(bytes([number]) * 32 for number in range(5))
    models = dict(zip(gpus, ("RTX4090", "H100-80G", "RTX4090", "L4", "RTX4090"), strict=True))
    entries = [
        an_entry(number, busy_gpu_ms=busy, reserved_gpu_ms=busy, gpus=gpus[:held], prices=prices)
        for number, (busy, held, prices) in enumerate(receipts, start=1)
    ]
    file = io.StringIO()
    write_csv(entries, GpuModels(models), file, bootstrap=BOOTSTRAP.address)
    sums: dict[str, Fraction] = {}
    for row in csv.DictReader(io.StringIO(file.getvalue())):
        if row["amount"]:
            sums[row["currency"]] = sums.get(row["currency"], Fraction(0)) + Fraction(row["amount"])
    _, totals = an_account(*entries, models=models).priced()
    assert {currency: Fraction(amount) for currency, amount in totals.items() if amount} == {
        currency: amount for currency, amount in sums.items() if amount
    }


def test_a_list_of_a_session_is_found_and_what_is_none_is_passed_over() -> None:
    one, again, other = (bytes([number]) * 32 for number in range(3))
    signed = [sign_price_list(prices, session, NODE, CHAIN_ID) for prices, session in ((CHEAP, one), (CHEAP, again))]
    lists = PriceLists([signed[0].wire, b"", b"\x80", signed[1].wire])
    assert lists.of(one) == CHEAP
    assert lists.of(one) is lists.of(again), "two sessions with the same prices are one sum"
    assert lists.of(other) is None
    assert not PriceLists([b""])
    account = an_account(an_entry(1, gpus=(GPU_A,), prices=lists.of(again)), models={GPU_A: "RTX4090"})
    document = account_document(replace(account, lists=lists))
    (shown,) = document["price_lists"]
    assert (shown["currency"], shown["perSecond"], shown["node"]) == ("USD", "RTX4090=0.001", NODE.address)


def test_a_receipt_whose_clock_is_off_is_paid_on_the_bootstraps_own_duration() -> None:
    (two,) = (a_receipt().gpus,)
    line = an_entry(1, "skew", reason="times 600", busy_gpu_ms=1234, gpus=two).line
    assert line.billed_gpu_ms == 1200
    assert an_entry(1, "skew", reason="times 5000", busy_gpu_ms=1234, gpus=two).line.billed_gpu_ms == 1234
    assert an_entry(1, "skew", reason="times", busy_gpu_ms=1234, gpus=two).line.billed_gpu_ms == 1234
    receipt = a_receipt(sequence=1, busy_gpu_ms=1234)
    assert line == line_of(receipt, "skew", CHAIN_ID, "times 600")


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 5)), max_size=20))
def test_no_millisecond_is_lost_or_made_by_sharing(receipts: list[tuple[int, int]]) -> None:
    gpus = tuple(bytes([number]) * 32 for number in range(5))
    entries = [
        an_entry(number, busy_gpu_ms=busy, gpus=gpus[:held]) for number, (busy, held) in enumerate(receipts, start=1)
    ]
    account = an_account(*entries)
    assert sum(account.shares.billed_ms[None, None].values()) == sum(busy for busy, held in receipts if held)
    assert account.statement.billed_gpu_ms == sum(busy for busy, _ in receipts)


def test_what_is_printed_says_the_totals_and_what_waits() -> None:
    account = an_account(an_entry(1), an_entry(2, "disputed"), models={GPU_A: "RTX4090"})
    console = Console(file=io.StringIO(), width=160)
    show_account(account, console, instead=parse_prices(["RTX4090=1"]), signed=False)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for said in ("2, of which 1 paid and 1 disputed", "2 receipts for their", "1.234 s billed", "RTX4090", "0.617"):
        assert said in printed
    document = json.loads(json.dumps(account_document(account, None, b"\1" * 65)))
    assert (document["receipts"], document["paid_receipts"], document["disputed_receipts"]) == (2, 1, 1)
    assert (document["billed_gpu_ms"], document["waiting_receipts"], document["amounts"]) == (1234, 2, [])
    assert document["signature"] == "0x" + "01" * 65


def test_csv_has_a_line_for_each_receipt() -> None:
    file = io.StringIO()
    write_csv([an_entry(1), an_entry(2, "skew", reason="times 900")], {}, file, bootstrap=BOOTSTRAP.address)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(row["sequence"], row["verdict"], row["task_id"]) for row in rows] == [
        ("1", "verified", "task 1"),
        ("2", "skew", "task 2"),
    ]
    assert rows[0]["ended_at"] == "2025-06-15T15:06:40.903+00:00"
    assert rows[0]["receipt_hash"] == "0x" + a_receipt(sequence=1).digest(CHAIN_ID).hex()


@pytest.mark.parametrize("target", ["/", "/?session=1", "/session", "/" + "s" * 4000])
@pytest.mark.parametrize("session", [bytes(32), bytes(range(32)), b"\xa7session\xc4\x20".ljust(32, b"\xff")])
def test_the_session_of_an_order_is_found_whatever_stands_before_it(target: str, session: bytes) -> None:
    order = TaskOrder(
        task_id="20261121_03_41_47_01234567890123456789", attempt=1, bootstrap=BOOTSTRAP.address, node=NODE.address,
        session=session, workspace="100000000000000001", revision=1, port=8000, method="POST", target=target,
        detach=False, issued_at_ms=1, deadline_ms=2,
    )  # fmt: skip
    wire = sign_order(order, BOOTSTRAP, CHAIN_ID).wire
    assert session_of_order(wire) == session == msgpack.unpackb(wire)["session"]


def test_a_card_is_paid_for_what_it_was_called_when_it_worked() -> None:
    """An owner who asks much for a model that he does not have yet calls his card by that name later."""
    before, after = b"before".ljust(32), b"after".ljust(32)
    entries = [
        an_entry(number, busy_gpu_ms=1000, gpus=(GPU_A,), prices=DEAR)._replace(session=session)
        for number, session in enumerate((before, after, before, b""), start=1)
    ]
    models = GpuModels({GPU_A: "H100-80G"}, [(before, GPU_A, "RTX4090")])
    rows, totals = an_account(*entries, models=models).priced()
    assert totals == {"USD": 2 * Decimal("0.003") + 2}
    assert [(row["model"], row["billed_gpu_ms"]) for row in rows] == [("H100-80G", 2000), ("RTX4090", 2000)]
    file = io.StringIO()
    write_csv(entries, models, file, bootstrap=BOOTSTRAP.address)
    assert [row["amount"] for row in csv.DictReader(io.StringIO(file.getvalue()))] == ["0.003", "1", "0.003", "1"]


def test_accounts_with_several_bootstraps_are_one_table_that_says_whose_each_line_is() -> None:
    file, other = io.StringIO(), NODE.address
    for number, bootstrap in enumerate((BOOTSTRAP.address, other)):
        write_csv([an_entry(number + 1)], GpuModels({}), file, bootstrap=bootstrap, heading=not number)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(row["sequence"], row["bootstrap"]) for row in rows] == [("1", BOOTSTRAP.address), ("2", other)]
