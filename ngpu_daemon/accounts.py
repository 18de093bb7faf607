"""Accounts of receipts as people read them: a span, GPU time by card, what it costs, as table, CSV or JSON.

Both sides use it: `ngpu-node earnings` on the node's ledger, `ngpu-bootstrap statement` on the bootstrap's store. What
a statement is, and that both sides come to the same, is `ngpu_protocol.statements`; this adds what only the reader
wants: sums by GPU, and prices, which are used to total and for nothing else.

Entries are read again for each purpose instead of being kept: a million of them is no reason to hold a gigabyte.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import IO, Any, Final, NamedTuple

import msgpack  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_daemon.errors import OperatorError
from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names
from ngpu_protocol.identity import Address
from ngpu_protocol.statements import Statement, StatementLine, billed_gpu_ms, draw_up

#: The end of time of the documents' lists, and of ours.
END_OF_TIME_MS: Final = 4_070_908_800_000  # 2099-01-01


class AccountError(OperatorError):
    """What was asked about receipts cannot be answered; the message says why."""


@dataclass(frozen=True, slots=True)
class Span:
    """UTC milliseconds, *from_ms* included, *to_ms* not."""

    from_ms: int
    to_ms: int


def parse_span(since: str | None, until: str | None) -> Span:
    """Return the span two options name: dates or date-times, UTC unless they say otherwise.

    A day given as the end is included whole. Left out, the span is open on that side.

    Raises:
        AccountError: one of them is neither, or they are the wrong way round.
    """
    span = Span(
        0 if since is None else _moment_ms("--from", since, end=False),
        END_OF_TIME_MS if until is None else _moment_ms("--to", until, end=True),
    )
    if span.from_ms >= span.to_ms:
        raise AccountError(f"--from {since} is not before --to {until}: swap them")
    return span


def _moment_ms(option: str, text: str, *, end: bool) -> int:
    try:
        if len(text) <= 10:
            day = date.fromisoformat(text) + timedelta(days=1 if end else 0)
            moment = datetime(day.year, day.month, day.day, tzinfo=UTC)
        else:
            moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise AccountError(
            f"{option} {text[:64]}: give a date such as 2026-11-01, or a date and time such as 2026-11-01T12:00:00Z"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int(moment.timestamp() * 1000))


class Entry(NamedTuple):
    """One acknowledged receipt of an account.

    Attributes:
        line: as it stands in the statement.
        gpus: names of the GPUs it held; empty where the reader did not ask for them.
        task_id: whose it was.
        ended_at_ms: by the node's clock.
    """

    line: StatementLine
    gpus: tuple[bytes, ...]
    task_id: str
    ended_at_ms: int


def entry_of_wire(raw: bytes, hash: bytes, verdict: str, task_id: str) -> Entry:
    """Return the entry of a receipt as it was stored by this side itself: its fields are not checked again.

    A twentieth of the time of decoding it as a stranger's, which matters for a million.
    """
    wire: dict[str, Any] = msgpack.unpackb(raw, use_list=False)
    reserved, busy = wire["reservedGpuMs"], wire["busyGpuMs"]
    billed = billed_gpu_ms(verdict, wire["meter"], reserved, busy)
    line = StatementLine(hash, wire["sequence"], verdict, reserved, busy, billed)
    return Entry(line, wire["gpus"], task_id, wire["endedAtMs"])


class Prices:
    """What a second of each GPU model costs, in whatever unit the owner thinks in."""

    def __init__(self, by_model: dict[str, Decimal]) -> None:
        self._by_model = {canonical_gpu_model(model): price for model, price in by_model.items()}

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Prices:
        """Return the prices in options ``MODEL=AMOUNT``.

        Raises:
            AccountError: one is not of this form.
        """
        prices = {}
        for text in texts:
            model, separator, amount = text.rpartition("=")
            try:
                price = Decimal(amount)
            except InvalidOperation:
                price = Decimal("NaN")
            if not separator or not model.strip() or not price.is_finite() or price < 0:
                raise AccountError(f"--price {text[:128]}: write MODEL=AMOUNT per second, such as 'RTX 4090=0.00012'")
            prices[model.strip()] = price
        return cls(prices)

    def of(self, model: str) -> Decimal | None:
        """Return the price of one second, None where there is none for this model."""
        return next((self._by_model[name] for name in gpu_model_names(model) if name in self._by_model), None)


@dataclass(slots=True)
class GpuShares:
    """Billed GPU time by card. A receipt's time is shared equally among the GPUs it held."""

    billed_ms: dict[bytes, int] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Count one receipt; what does not divide goes to the first of its GPUs, so that the sum stays exact."""
        billed, count = entry.line.billed_gpu_ms, len(entry.gpus)
        if not billed or not count:
            return
        share, rest = divmod(billed, count)
        for gpu in entry.gpus:
            self.billed_ms[gpu] = self.billed_ms.get(gpu, 0) + share + rest
            rest = 0

    def watch(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield *entries*, counting each."""
        for entry in entries:
            self.add(entry)
            yield entry


@dataclass(frozen=True, slots=True)
class Account:
    """One node's account with one bootstrap over a span, as one side sees it.

    Attributes:
        leaves: of the statement's tree, for proofs.
        shares: billed time by GPU.
        models: the model of each GPU known to this side.
        owed: receipts of the span that wait for their acknowledgement, and so are not in it; None: this side can't
            know.
    """

    statement: Statement
    leaves: list[bytes]
    shares: GpuShares
    models: dict[bytes, str]
    owed: int | None = None

    def priced(self, prices: Prices) -> tuple[list[dict[str, Any]], Decimal | None]:
        """Return a row for each GPU, the most billed first, and the total of those that have a price."""
        rows, total = [], None
        for gpu, billed_ms in sorted(self.shares.billed_ms.items(), key=lambda item: (-item[1], item[0])):
            model = self.models.get(gpu, "")
            price = prices.of(model) if model else None
            amount = None if price is None else price * billed_ms / 1000
            if amount is not None:
                total = (total or Decimal(0)) + amount
            rows.append(
                {
                    "gpu": "0x" + gpu.hex(),
                    "model": model or None,
                    "billed_gpu_ms": billed_ms,
                    "price_per_s": _plain(price),
                    "amount": _plain(amount),
                }
            )
        return rows, total


def draw_account(
    entries: Iterable[Entry],
    *,
    node: Address,
    bootstrap: Address,
    span: Span,
    at_ms: int,
    models: dict[bytes, str],
    owed: int | None = None,
) -> Account:
    """Return the account over *entries*, which come by ascending sequence number."""
    shares = GpuShares()
    statement, leaves = draw_up(
        (entry.line for entry in shares.watch(entries)),
        node=node,
        bootstrap=bootstrap,
        from_ms=span.from_ms,
        to_ms=span.to_ms,
        at_ms=at_ms,
    )
    return Account(statement, leaves, shares, models, owed)


# -- output ------------------------------------------------------------------------------------------------------------


def account_document(account: Account, prices: Prices, signature: bytes | None = None) -> dict[str, Any]:
    """Return the account as a JSON object."""
    s = account.statement
    rows, total = account.priced(prices)
    document: dict[str, Any] = {
        "node": s.node,
        "bootstrap": s.bootstrap,
        "from_ms": s.from_ms,
        "to_ms": s.to_ms,
        "receipts": s.receipts,
        "paid_receipts": s.paid_receipts,
        "disputed_receipts": s.receipts - s.paid_receipts,
        "reserved_gpu_ms": s.reserved_gpu_ms,
        "busy_gpu_ms": s.busy_gpu_ms,
        "billed_gpu_ms": s.billed_gpu_ms,
        "root": "0x" + s.root.hex(),
        "at_ms": s.at_ms,
        "gpus": rows,
        "amount": _plain(total),
    }
    if account.owed is not None:
        document["waiting_receipts"] = account.owed
    if signature is not None:
        document["signature"] = "0x" + signature.hex()
    return document


def show_account(account: Account, prices: Prices, console: Console, *, signed: bool | None = None) -> None:
    """Print the account for a person.

    Args:
        signed: whether the bootstrap's signature is at hand; None: nothing is said about it.
    """
    s = account.statement
    disputed = s.receipts - s.paid_receipts
    facts = [
        ("node", s.node),
        ("bootstrap", s.bootstrap),
        ("span", f"{_day(s.from_ms)} to {_day(s.to_ms)} (UTC)"),
        ("receipts", f"{s.receipts:,}, of which {s.paid_receipts:,} paid and {disputed:,} disputed"),
    ]
    if account.owed:
        facts.append(("waiting", f"{account.owed:,} receipts for their acknowledgement; not counted here"))
    facts += [
        ("GPU time", f"{_seconds(s.billed_gpu_ms)} billed ({_seconds(s.reserved_gpu_ms)} reserved, "
                     f"{_seconds(s.busy_gpu_ms)} busy)"),
        ("root", "0x" + s.root.hex()),
    ]  # fmt: skip
    if signed is not None:
        facts.append(("signed", "yes" if signed else "no: the account key is not at hand"))
    for label, value in facts:
        console.print(Text(f"{label:<11}{value}"), soft_wrap=True)
    rows, total = account.priced(prices)
    if not rows:
        return
    table = Table("GPU", "model", "billed", "per s", "amount", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["gpu"][:12] + "…",
            row["model"] or "unknown here",
            _seconds(row["billed_gpu_ms"]),
            row["price_per_s"] or "",
            row["amount"] or "",
        )
    if total is not None:
        table.add_row("", "", "", "total", _plain(total))
    console.print()
    console.print(table)


CSV_COLUMNS: Final = (
    "sequence",
    "task_id",
    "ended_at",
    "verdict",
    "reserved_gpu_ms",
    "busy_gpu_ms",
    "billed_gpu_ms",
    "receipt_hash",
)


def write_csv(entries: Iterable[Entry], file: IO[str]) -> None:
    """Write a line for each receipt, with a heading."""
    writer = csv.writer(file)
    writer.writerow(CSV_COLUMNS)
    for line, _, task_id, ended_at_ms in entries:
        writer.writerow(
            (
                line.sequence,
                task_id,
                datetime.fromtimestamp(ended_at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
                line.verdict,
                line.reserved_gpu_ms,
                line.busy_gpu_ms,
                line.billed_gpu_ms,
                "0x" + line.receipt_hash.hex(),
            )
        )


def _plain(value: Decimal | None) -> str | None:
    if value is None:
        return None
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _day(at_ms: int) -> str:
    if at_ms == 0:
        return "the beginning"
    if at_ms == END_OF_TIME_MS:
        return "now"
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _seconds(ms: int) -> str:
    return f"{ms / 1000:,.3f} s"
