"""Accounts of receipts as people read them: a span, GPU time by card, what it costs, as table, CSV or JSON.

Both sides use it: `ngpu-node earnings` on the node's ledger, `ngpu-bootstrap statement` on the bootstrap's store. What
a statement is, and that both sides come to the same, is `ngpu_protocol.statements`; this adds what only the reader
wants: sums by GPU and price list. Which list a receipt falls under is `ngpu_protocol.prices`.

Entries are read again for each purpose instead of being kept: a million of them is no reason to hold a gigabyte.
"""

from __future__ import annotations

import csv
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import IO, Any, Final, NamedTuple

import msgpack  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_daemon.errors import OperatorError
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.bills import NO_SESSION, Basis, Bill, BillPart, amounts_of, amounts_text, leaves_of, shared
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Address
from ngpu_protocol.merkle import inclusion_path, tree_root
from ngpu_protocol.prices import PRICE_LIST_TYPE, PriceError, Prices, SignedPriceList, amount_text, cost, total
from ngpu_protocol.receipts import Meter
from ngpu_protocol.statements import PAID, Statement, StatementLine, draw_up, skewed_gpu_ms

#: The end of time of the documents' lists, and of ours.
END_OF_TIME_MS: Final = 4_070_908_800_000  # 2099-01-01
_SKEW: Final = VerdictKind.SKEW.value


class AccountError(OperatorError):
    """What was asked about receipts cannot be answered; the message says why."""


@dataclass(frozen=True, slots=True)
class Span:
    """UTC milliseconds, *from_ms* included, *to_ms* not."""

    from_ms: int
    to_ms: int


def one_form(*, csv: bool, json: bool, file: bool = False) -> None:
    """Refuse an account in two forms at once.

    Raises:
        AccountError: more than one was asked for where only one is made.
    """
    if csv and (json or file):
        raise AccountError(f"give --csv or {'--json' if json else '--file'}, not both: run it twice")


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
        gpus: names of the GPUs it held.
        task_id: whose it was.
        ended_at_ms: by the node's clock.
        prices: of the session its order was made for; None where the node gave none.
        session: that one; None where it was not looked up, empty where nothing is known of the order any more.
    """

    line: StatementLine
    gpus: tuple[bytes, ...]
    task_id: str
    ended_at_ms: int
    prices: Prices | None = None
    session: bytes | None = None


#: A receipt as this side stored it: its msgpack map, hash, verdict, task, acknowledgement, and the order's session.
StoredReceipt = tuple[bytes, bytes, str, str, bytes, bytes | None]


def entries_of(rows: Iterable[StoredReceipt], lists: PriceLists) -> Iterator[Entry]:
    """Yield the entries of receipts as they were stored by this side itself: their fields are not checked again.

    A twentieth of the time of decoding them as a stranger's. A million of them are a usual month, so what costs here
    is spelled out: names are local, and tuples are made without their constructors. Of the acknowledgement only that
    of a receipt with the verdict `skew` is looked into.
    """
    unpack, new, paid, none, of = msgpack.unpackb, tuple.__new__, PAID, Meter.NONE.value, lists.of
    for raw, hash, verdict, task_id, acknowledgement, session in rows:
        wire: dict[str, Any] = unpack(raw, use_list=False)
        reserved, busy, gpus = wire["reservedGpuMs"], wire["busyGpuMs"], wire["gpus"]
        billed = 0
        if verdict in paid:
            billed = reserved if wire["meter"] == none else busy
            if verdict == _SKEW:
                billed = skewed_gpu_ms(billed, len(gpus), unpack(acknowledgement)["reason"])
        line = new(StatementLine, (hash, wire["sequence"], verdict, reserved, busy, billed))
        prices = None if session is None else of(session)
        yield new(Entry, (line, gpus, task_id, wire["endedAtMs"], prices, session))


def parse_prices(texts: Iterable[str]) -> Prices | None:
    """Return the prices in options ``MODEL=AMOUNT``, None where there are no options.

    Raises:
        AccountError: one is not of this form.
    """
    given: dict[str, str] = {}
    for text in texts:
        model, separator, amount = text.rpartition("=")
        if not separator:
            raise AccountError(f"--price {text[:128]}: write MODEL=AMOUNT per second, such as 'RTX 4090=0.00012'")
        given[model.strip()] = amount.strip()
    try:
        return Prices.of_models("", given) if given else None
    except PriceError as error:
        raise AccountError(f"--price: {error}; write MODEL=AMOUNT per second, such as 'RTX 4090=0.00012'") from None


class PriceLists:
    """The price lists of one node, by session, as a side has them on file.

    Sessions with the same prices share one `Prices`, so that sums over them are one sum.
    """

    def __init__(self, wires: Iterable[bytes]) -> None:
        self._by_session: dict[bytes, Prices] = {}
        self._of_session: dict[bytes, SignedPriceList] = {}
        self._signed: dict[tuple[str, str], SignedPriceList] = {}
        shared: dict[tuple[str, str], Prices] = {}
        for wire in wires:
            try:
                signed = SignedPriceList.from_bytes(wire)
                prices = signed.prices()
            except MalformedError:
                continue  # it asked nothing, or in a later version's words: nothing is totalled by that
            form = (prices.currency, prices.text)
            self._by_session[signed.price_list.session] = shared.setdefault(form, prices)
            self._of_session[signed.price_list.session] = signed
            self._signed.setdefault(form, signed)

    def __bool__(self) -> bool:
        return bool(self._by_session)

    def of(self, session: bytes) -> Prices | None:
        """Return the prices of *session*."""
        return self._by_session.get(session)

    def signed_of(self, session: bytes) -> SignedPriceList | None:
        """Return the list of *session* as its node signed it."""
        return self._of_session.get(session)

    def signed(self, prices: Prices) -> SignedPriceList | None:
        """Return a signed list that says these prices."""
        return self._signed.get((prices.currency, prices.text))


def session_of_order(signed_order: bytes) -> bytes:
    """Return the session that an order, as this side stored it, was made for.

    Found by its key: to decode the order takes six times as long, an eighth of a statement's time. Nothing before it in
    an order can hold these ten bytes: they are no UTF-8.
    """
    found = signed_order.find(_SESSION_KEY)
    if found < 0:
        session: bytes = msgpack.unpackb(signed_order)["session"]
        return session
    start = found + len(_SESSION_KEY)
    return signed_order[start : start + 32]


_SESSION_KEY = msgpack.packb("session") + b"\xc4\x20"  # then 32 bytes follow


class GpuModels(dict[bytes, str]):
    """The model of each GPU by its name in receipts, as this side knows it last.

    A card that is called something else in a later run of its node was paid for what it was called when it worked: a
    dearer name changes nothing that is done.

    Attributes:
        earlier: by session, the GPUs that had another model then.
    """

    def __init__(self, known: Mapping[bytes, str], earlier: Iterable[tuple[bytes, bytes, str]] = ()) -> None:
        super().__init__(known)
        self.earlier: dict[bytes, dict[bytes, str]] = {}
        for session, gpu, model in earlier:
            self.earlier.setdefault(session, {})[gpu] = model

    def of(self, session: bytes | None, gpu: bytes) -> str:
        """Return the model of *gpu* in *session*, empty where it is not known."""
        then = self.earlier.get(session) if session else None
        return then[gpu] if then is not None and gpu in then else self.get(gpu, "")


@dataclass(slots=True)
class GpuShares:
    """Billed GPU time by price list and card. A receipt's time is shared equally among the GPUs it held.

    Attributes:
        apart: sessions in which a card had another model: their time is counted by itself.
        billed_ms: by list and, for one of *apart*, session; then by GPU.
    """

    apart: Container[bytes] = ()
    billed_ms: dict[tuple[Prices | None, bytes | None], dict[bytes, int]] = field(default_factory=dict)

    def watch(self, entries: Iterable[Entry]) -> Iterator[StatementLine]:
        """Yield the lines of *entries*, counting each; what does not divide goes to the first of a receipt's GPUs, so
        that sums stay exact."""
        # a run of receipts under one list is the rule, and hashing it for each receipt would be half of the time
        under: Prices | None = None
        of_session: bytes | None = None
        shares = self.billed_ms.setdefault((None, None), {})
        apart = self.apart
        for line, gpus, _, _, prices, session in entries:
            billed = line.billed_gpu_ms
            if billed and gpus:
                by_itself = session if apart and session in apart else None
                if prices is not under or by_itself != of_session:
                    under, of_session = prices, by_itself
                    shares = self.billed_ms.setdefault((prices, by_itself), {})
                if len(gpus) == 1:
                    gpu = gpus[0]
                    shares[gpu] = shares.get(gpu, 0) + billed
                else:
                    for gpu, share in shared(billed, gpus):
                        shares[gpu] = shares.get(gpu, 0) + share
            yield line


@dataclass(frozen=True, slots=True)
class Account:
    """One node's account with one bootstrap over a span, as one side sees it.

    Attributes:
        leaves: of the statement's tree, for proofs.
        shares: billed time by price list and GPU.
        models: the model of each GPU known to this side.
        lists: the node's own prices.
        owed: receipts of the span that wait for their acknowledgement, and so are not in it; None: this side can't
            know.
    """

    statement: Statement
    leaves: list[bytes]
    shares: GpuShares
    models: GpuModels
    lists: PriceLists
    owed: int | None = None

    def priced(self, instead: Prices | None = None) -> tuple[list[dict[str, Any]], dict[str, Decimal]]:
        """Return a row for each GPU and price list, the most billed first, and the totals by currency.

        Args:
            instead: prices to total by in place of the node's own.
        """
        billed: dict[tuple[Prices | None, bytes, str], int] = {}
        for (prices, session), shares in self.shares.billed_ms.items():
            for gpu, billed_ms in shares.items():
                key = (prices if instead is None else instead, gpu, self.models.of(session, gpu))
                billed[key] = billed.get(key, 0) + billed_ms
        rows, totals = [], dict[str, Decimal]()
        in_order = sorted(billed.items(), key=lambda item: (-item[1], *item[0][1:], _form(item[0][0])))
        for (prices, gpu, model), billed_ms in in_order:
            price = prices.of(model) if prices is not None and model else None
            amount = None if price is None else cost(price, billed_ms)
            currency = None
            if prices is not None and amount is not None:
                currency = prices.currency
                totals = total(totals, currency, amount)
            rows.append(
                {
                    "gpu": "0x" + gpu.hex(),
                    "model": model or None,
                    "billed_gpu_ms": billed_ms,
                    "price_per_s": None if price is None else amount_text(price),
                    "amount": None if amount is None else amount_text(amount),
                    "currency": currency,
                }
            )
        return rows, dict(sorted(totals.items()))


def _form(prices: Prices | None) -> tuple[str, str]:
    return ("", "") if prices is None else (prices.currency, prices.text)


def draw_account(
    entries: Iterable[Entry],
    *,
    node: Address,
    bootstrap: Address,
    span: Span,
    at_ms: int,
    models: Mapping[bytes, str],
    lists: PriceLists | None = None,
    owed: int | None = None,
) -> Account:
    """Return the account over *entries*, which come by ascending sequence number."""
    known = models if isinstance(models, GpuModels) else GpuModels(models)
    shares = GpuShares(known.earlier)
    statement, leaves = draw_up(
        shares.watch(entries),
        node=node,
        bootstrap=bootstrap,
        from_ms=span.from_ms,
        to_ms=span.to_ms,
        at_ms=at_ms,
    )
    return Account(statement, leaves, shares, known, lists or PriceLists(()), owed)


# -- bills -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DraftBill:
    """A bill that nobody has signed yet, with what it was worked out from.

    Attributes:
        bases, numbers: as `BillPart` has them.
        leaves: of the bill's tree.
        lists: of the sessions in *bases*.
    """

    bill: Bill
    bases: tuple[Basis, ...]
    numbers: tuple[int, ...]
    leaves: list[bytes]
    lists: tuple[SignedPriceList, ...]

    def whole(self, signature: bytes) -> BillPart:
        """Return the part of a file with all lines."""
        return BillPart(self.bill, signature, self.lists, self.bases, self.numbers)

    def of_line(self, signature: bytes, index: int) -> BillPart:
        """Return the part of a file that proves the line at *index*."""
        basis = self.bases[self.numbers[index]]
        lists = tuple(one for one in self.lists if one.price_list.session == basis.session)
        return BillPart(self.bill, signature, lists, (basis,), path=inclusion_path(self.leaves, index))


def draw_bill(
    entries: Iterable[Entry], statement: Statement, chain_id: int, models: GpuModels, lists: PriceLists
) -> DraftBill:
    """Return the bill of *statement* over its *entries*, whose sessions were looked up."""
    numbers: dict[tuple[bytes, tuple[bytes, ...]], int] = {}
    hashes: list[tuple[bytes, int]] = []
    billed: list[tuple[int, int]] = []
    for line, gpus, _, _, _, session in entries:
        number = numbers.setdefault((session or NO_SESSION, gpus), len(numbers))
        hashes.append((line.receipt_hash, number))
        billed.append((line.billed_gpu_ms, number))
    bases = tuple(Basis(session, tuple((gpu, models.of(session, gpu)) for gpu in gpus)) for session, gpus in numbers)
    signed = {basis.session: lists.signed_of(basis.session) for basis in bases}
    prices = {session: one.prices() for session, one in signed.items() if one is not None}
    leaves = leaves_of(hashes, bases)
    bill = Bill(
        statement_hash=statement.digest(chain_id),
        node=statement.node,
        bootstrap=statement.bootstrap,
        amounts=amounts_text(amounts_of(billed, bases, prices)),
        root=tree_root(leaves),
    )
    return DraftBill(
        bill, bases, tuple(number for _, number in hashes), leaves, tuple(one for one in signed.values() if one)
    )


# -- output ------------------------------------------------------------------------------------------------------------


def account_document(account: Account, instead: Prices | None = None, signature: bytes | None = None) -> dict[str, Any]:
    """Return the account as a JSON object; *instead* are prices to total by in place of the node's own."""
    s = account.statement
    rows, totals = account.priced(instead)
    asked = dict.fromkeys(prices for prices, _ in account.shares.billed_ms if prices is not None)
    lists = [account.lists.signed(prices) for prices in asked]
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
        "amounts": [{"currency": currency, "amount": amount_text(amount)} for currency, amount in totals.items()],
        "price_lists": [PRICE_LIST_TYPE.to_json(one.price_list, one.signature) for one in lists if one is not None],
    }
    if account.owed is not None:
        document["waiting_receipts"] = account.owed
    if signature is not None:
        document["signature"] = "0x" + signature.hex()
    return document


def show_account(
    account: Account,
    console: Console,
    *,
    instead: Prices | None = None,
    signed: bool | None = None,
    unsigned: str = "the account key is not at hand",
    others: Sequence[Address] = (),
) -> None:
    """Print the account for a person.

    Args:
        instead: prices to total by in place of the node's own.
        signed: whether the bootstrap's signature is at hand; None: nothing is said about it.
        unsigned: why it is not.
        others: bootstraps whose orders are on file too, and not in this account.
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
        facts.append(("signed", "yes" if signed else f"no: {unsigned}"))
    if others:
        facts.append(("not in it", "what these ordered, which --bootstrap shows: " + ", ".join(others)))
    for label, value in facts:
        console.print(Text(f"{label:<11}{value}"), soft_wrap=True)
    rows, totals = account.priced(instead)
    if not rows:
        return
    table = Table("GPU", "model", "billed", "per s", "amount", "", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["gpu"][:12] + "…",
            row["model"] or "unknown here",
            _seconds(row["billed_gpu_ms"]),
            row["price_per_s"] or "",
            row["amount"] or "",
            row["currency"] or "",
        )
    for currency, amount in totals.items():
        table.add_row("", "", "", "total", amount_text(amount), currency)
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
    "amount",
    "currency",
    "bootstrap",
)


def write_csv(
    entries: Iterable[Entry],
    models: GpuModels,
    file: IO[str],
    *,
    bootstrap: Address,
    instead: Prices | None = None,
    heading: bool = True,
) -> None:
    """Write a line for each receipt, with a heading; the amounts are those whose sum the account is.

    Args:
        bootstrap: whose orders they answer.
        heading: off for the second of several accounts in one file.
    """
    writer = csv.writer(file)
    if heading:
        writer.writerow(CSV_COLUMNS)
    for line, gpus, task_id, ended_at_ms, own, session in entries:
        prices = own if instead is None else instead
        amount = None if prices is None else _amount(prices, line.billed_gpu_ms, gpus, models, session)
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
                "" if amount is None else amount_text(amount),
                "" if amount is None or prices is None else prices.currency,
                bootstrap,
            )
        )


def _amount(
    prices: Prices, billed_ms: int, gpus: Sequence[bytes], models: GpuModels, session: bytes | None
) -> Decimal | None:
    """Return what one receipt comes to; None where none of its GPUs has a price."""
    amounts: dict[str, Decimal] = {}
    for gpu, share in shared(billed_ms, gpus) if gpus else ():
        price = prices.of(models.of(session, gpu))
        if price is not None:
            amounts = total(amounts, prices.currency, cost(price, share))
    return amounts.get(prices.currency)


def _day(at_ms: int) -> str:
    if at_ms == 0:
        return "the beginning"
    if at_ms == END_OF_TIME_MS:
        return "now"
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _seconds(ms: int) -> str:
    return f"{ms / 1000:,.3f} s"
