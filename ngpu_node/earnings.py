"""What this node has earned, from its own ledger: the command reads the file beside a daemon that may be writing it.

Owns the reading; what an account is and how it is shown is `ngpu_daemon.accounts`. Only acknowledged receipts count:
the acknowledgement says whether a receipt is paid, and both sides come to the same totals over them.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console

from ngpu_daemon.accounts import (
    Account,
    AccountError,
    Entry,
    GpuModels,
    PriceLists,
    Span,
    account_document,
    draw_account,
    draw_bill,
    entries_of,
    one_form,
    parse_prices,
    parse_span,
    session_of_order,
    show_account,
    write_csv,
)
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.keystore import keystore_address
from ngpu_node.config import NodeSettings
from ngpu_node.ledger_schema import MIGRATIONS
from ngpu_protocol.bills import BillPart
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.networks import network_named
from ngpu_protocol.statements import MAX_FILE_BYTES, StatementFile, check_statement_file, same_account

LEDGER_FILE = "ledger.db"
_IN_SPAN = "bootstrap = ? AND written_at_ms >= ? AND written_at_ms < ?"


class Books:
    """A ledger, opened to be read.

    Attributes:
        connection: for those who read something else of it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = self._connection = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Books]:
        """Open the ledger at *path*; all that is read inside the block is of one moment.

        Raises:
            AccountError: there is none, it cannot be read, or another version of this software wrote it.
        """
        if not path.exists():
            raise AccountError(f"there is no ledger at {path}: has `ngpu-node run` ever run with this data_dir?")
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)) as connection:
                connection.execute("PRAGMA busy_timeout = 5000")
                connection.execute("BEGIN")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version != len(MIGRATIONS):
                    raise AccountError(
                        f"the ledger {path} has schema {version}, this program reads {len(MIGRATIONS)}: "
                        "start the daemon of this version once, or use the program that wrote it"
                    )
                yield cls(connection)
        except sqlite3.Error as error:
            raise AccountError(f"cannot read the ledger {path}: {error}") from error

    def bootstraps(self) -> list[Address]:
        """Return every bootstrap there are receipts for, the one with the newest receipt first."""
        rows = self._connection.execute(
            "SELECT bootstrap FROM receipts GROUP BY bootstrap ORDER BY max(written_at_ms) DESC, bootstrap"
        )
        return [Address(bootstrap) for (bootstrap,) in rows]

    def price_lists(self) -> PriceLists:
        """Return what the owner asked, session by session."""
        return PriceLists(wire for (wire,) in self._connection.execute("SELECT signed_list FROM price_lists"))

    def models(self) -> GpuModels:
        """Return the model of each GPU by its name in receipts."""
        earlier = self._connection.execute(
            "SELECT session, id, was.model FROM session_gpus AS was JOIN gpus USING (id) WHERE was.model <> gpus.model"
        )
        return GpuModels(dict(self._connection.execute("SELECT id, model FROM gpus")), earlier)

    def entries(self, bootstrap: Address, span: Span, *, sessions: bool = False) -> Iterator[Entry]:
        """Yield the acknowledged receipts of *span*, by sequence number.

        Args:
            sessions: look up the sessions of their orders even where no price list asks for them.
        """
        lists = self.price_lists()
        # the order is read only where it says which list the receipt falls under
        ordered = sessions or bool(lists)
        order = "signed_order" if ordered else "NULL"
        rows = self._connection.execute(
            f"SELECT signed_receipt, hash, verdict, task_id, acknowledgement, {order} FROM receipts WHERE {_IN_SPAN}"
            " AND acknowledgement IS NOT NULL ORDER BY sequence",
            (bootstrap, span.from_ms, span.to_ms),
        )
        if ordered:
            yield from entries_of(
                ((row[0], row[1], row[2], row[3], row[4], session_of_order(row[5])) for row in rows), lists
            )
        else:
            yield from entries_of(rows, lists)

    def account(self, node: Address, bootstrap: Address, span: Span, at_ms: int) -> Account:
        """Return this node's account with *bootstrap*."""
        (owed,) = self._connection.execute(
            f"SELECT count(*) FROM receipts WHERE {_IN_SPAN} AND acknowledgement IS NULL",
            (bootstrap, span.from_ms, span.to_ms),
        ).fetchone()
        return draw_account(
            self.entries(bootstrap, span),
            node=node,
            bootstrap=bootstrap,
            span=span,
            at_ms=at_ms,
            models=self.models(),
            lists=self.price_lists(),
            owed=owed,
        )


def show_earnings(
    settings: NodeSettings,
    *,
    bootstrap: str | None,
    since: str | None,
    until: str | None,
    prices: list[str],
    check: Path | None,
    as_csv: bool,
    as_json: bool,
) -> int:
    """Do what `ngpu-node earnings` was asked, print it, and return the exit code.

    Raises:
        OperatorError: one line for the owner.
    """
    one_form(csv=as_csv, json=as_json)
    span, instead = parse_span(since, until), parse_prices(prices)
    directory = DataDirectory(settings.data_dir)
    node = keystore_address(directory.keystore)
    with Books.open(directory.path / LEDGER_FILE) as books:
        if check is not None:
            return _check(books, node, _read_statement(check), network_named(settings.network).chain_id, as_json)
        bootstraps = [_parse_bootstrap(bootstrap)] if bootstrap is not None else books.bootstraps()
        if as_csv:
            models = books.models()
            if not bootstraps:
                write_csv((), models, sys.stdout, bootstrap=node)  # the heading, for a program that reads it
            for number, one in enumerate(bootstraps):
                entries = books.entries(one, span)
                write_csv(entries, models, sys.stdout, bootstrap=one, instead=instead, heading=not number)
            return 0
        at_ms = time.time_ns() // 1_000_000
        accounts = [books.account(node, one, span, at_ms) for one in bootstraps]
    if as_json:
        print(json.dumps({"accounts": [account_document(account, instead) for account in accounts]}))
        return 0
    if not accounts:
        print("no receipts yet: a task that ran here leaves one, `ngpu-node status` counts them")
    console = Console()
    for number, account in enumerate(accounts):
        if number:
            console.print()
        show_account(account, console, instead=instead)
    return 0


def _check(books: Books, node: Address, file: StatementFile, chain_id: int, as_json: bool) -> int:
    """Hold a bootstrap's statement against the ledger; the exit code is 0 when they agree."""
    theirs = file.statement
    problems = [f"{one.rule}: {one.actual}, not {one.expected}" for one in check_statement_file(file) if not one.holds]
    if file.chain_id != chain_id:
        problems.append(f"the statement is of another network (chainId {file.chain_id}, this node's is {chain_id})")
    if theirs.node != node:
        problems.append(f"the statement is of node {theirs.node}, this is {node}")
    else:
        ours = books.account(node, theirs.bootstrap, Span(theirs.from_ms, theirs.to_ms), theirs.at_ms).statement
        problems += [
            f"{name}: they say {getattr(theirs, name)}, this ledger {getattr(ours, name)}"
            for name in same_account(ours, theirs)
            if name != "root"
        ]
        if ours.root != theirs.root:
            problems.append(f"root: they say 0x{theirs.root.hex()}, this ledger 0x{ours.root.hex()}")
        elif file.bill is not None:
            problems += _check_amounts(books, file, file.bill)
    if as_json:
        print(json.dumps({"ok": not problems, "problems": problems}))
    else:
        print("\n".join(problems) if problems else "the statement agrees with this node's ledger, receipt by receipt")
    return 1 if problems else 0


def _check_amounts(books: Books, file: StatementFile, theirs: BillPart) -> list[str]:
    """Return in what a bill differs from the ledger: the owner's own prices, over the same receipts."""
    s = file.statement
    entries = books.entries(s.bootstrap, Span(s.from_ms, s.to_ms), sessions=True)
    ours = draw_bill(entries, s, file.chain_id, books.models(), books.price_lists()).bill
    if ours.amounts == theirs.bill.amounts:
        return []
    said, own = (", ".join(text.split("\n")) or "nothing" for text in (theirs.bill.amounts, ours.amounts))
    return [f"amounts: they say {said}, this ledger {own}"]


def _read_statement(path: Path) -> StatementFile:
    try:
        with path.open("rb") as file:
            return StatementFile.from_json(file.read(MAX_FILE_BYTES + 1))
    except OSError as error:
        raise AccountError(f"cannot read {path}: {error.strerror}") from None
    except MalformedError as error:
        raise AccountError(f"{path}: {error}") from None


def _parse_bootstrap(text: str) -> Address:
    try:
        return parse_address(text)
    except AddressError as error:
        raise AccountError(f"--bootstrap {text[:64]}: {error}") from None
