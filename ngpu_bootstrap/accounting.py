"""Statements of what nodes have earned, drawn up from the store by the command itself, beside a daemon that may run.

Owns the reading and the way to a signature; what a statement is, is `ngpu_protocol.statements`. A million receipts
are some seconds of work, which a daemon's loop must not feel: so the command reads the database on its own, and asks
the daemon only for its signature, over the Unix socket that is the operator's. Without a daemon it opens the keystore.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console

from ngpu_bootstrap.admin_socket import ask_daemon, daemon_is_running
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.stand_ins import stored_stand_ins
from ngpu_bootstrap.store import queries, tables
from ngpu_bootstrap.store.database import open_engine, reading
from ngpu_bootstrap.store.errors import StoreMismatch
from ngpu_bootstrap.store.schema import HEAD, current_revision
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
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.init_command import ask_passphrase
from ngpu_daemon.keystore import keystore_address, open_keystore
from ngpu_protocol import identity
from ngpu_protocol.bills import BILL_TYPE, Bill, sign_bill
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.networks import network_named
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.statements import STATEMENT_TYPE, Statement, StatementFile, prove, sign_statement

_FETCH = 2_000
SIGN_TARGET = "/statements/signature"
SIGN_BILL_TARGET = "/bills/signature"


class Books:
    """The receipts in a store, opened to be read.

    Attributes:
        connection: for those who read something else of it.
    """

    def __init__(self, connection: sa.Connection, bootstrap: Address) -> None:
        self.connection = self._connection = connection
        self._bootstrap = bootstrap

    @classmethod
    @contextmanager
    def open(cls, settings: BootstrapSettings, bootstrap: Address) -> Iterator[Books]:
        """Open the store of *settings* for the receipts of *bootstrap*'s orders; what is read is of one moment.

        Raises:
            AccountError: it cannot be read, or another version of this software made it.
        """
        path = DataDirectory(settings.data_dir).path / "bootstrap.db"
        if not settings.store and not path.exists():
            raise AccountError(f"there is no store at {path}: has `ngpu-bootstrap run` ever run with this data_dir?")
        location = settings.store or path
        try:
            engine = open_engine(location)
        except StoreMismatch as error:
            raise AccountError(str(error)) from None
        try:
            with engine.connect() as connection:
                found = current_revision(connection)
                connection.rollback()
                if found != HEAD:
                    raise AccountError(f"the store has schema {found}, this program reads {HEAD}")
                with reading(connection).begin():
                    yield cls(connection, bootstrap)
        except sa.exc.SQLAlchemyError as error:
            raise AccountError(f"the store cannot be read: {getattr(error, 'orig', error)}") from error
        finally:
            engine.dispose()

    def price_lists(self, node: Address) -> PriceLists:
        """Return what *node* asked of this bootstrap, session by session."""
        p = tables.price_lists
        found = sa.select(p.c.signed_list).where(p.c.bootstrap == self._bootstrap, p.c.node == node)
        return PriceLists(bytes(wire) for wire in self._connection.execute(found).scalars())

    def models(self, node: Address) -> GpuModels:
        """Return the model of each of *node*'s GPUs by its name in receipts."""
        g, s = tables.node_gpus, tables.session_gpus
        known = self._connection.execute(sa.select(g.c.gpu, g.c.model).where(g.c.node == node))
        models = {bytes(gpu): model for gpu, model in known}
        earlier = (
            sa.select(s.c.session, s.c.gpu, s.c.model)
            .select_from(s.join(g, (g.c.node == s.c.node) & (g.c.gpu == s.c.gpu)))
            .where(s.c.bootstrap == self._bootstrap, s.c.node == node, s.c.model != g.c.model)
        )
        found = self._connection.execute(earlier)
        return GpuModels(models, ((bytes(session), bytes(gpu), model) for session, gpu, model in found))

    def others(self, node: Address) -> list[Address]:
        """Return the other bootstraps of this database that have a chain of *node*."""
        c = tables.chains
        found = sa.select(c.c.bootstrap).where(c.c.node == node, c.c.bootstrap != self._bootstrap).distinct()
        return sorted(Address(one) for one in self._connection.execute(found).scalars())

    def entries(self, node: Address, span: Span, *, sessions: bool = False) -> Iterator[Entry]:
        """Yield the receipts of *node* in *span*, by sequence number; all that are on file are acknowledged.

        Args:
            sessions: look up the sessions of their orders even where no price list asks for them.
        """
        r, a = tables.receipts, tables.attempts
        lists = self.price_lists(node)
        ordered = sessions or bool(lists)
        columns: list[Any] = [r.c.raw, r.c.hash, r.c.verdict, r.c.task_id, r.c.acknowledgement]
        # the order says which list a receipt falls under: it is with its attempt, or, that gone, with the receipt
        columns += [a.c.session, r.c.signed_order] if ordered else [sa.null()]
        query = sa.select(*columns)
        if ordered:
            attempt = (a.c.task_id == r.c.task_id) & (a.c.attempt == r.c.attempt)
            query = query.select_from(r.outerjoin(a, attempt))
        query = query.where(
            r.c.bootstrap == self._bootstrap,
            r.c.node == node,
            r.c.ended_at_ms >= span.from_ms,
            r.c.ended_at_ms < span.to_ms,
        ).order_by(r.c.sequence)
        rows = self._rows(query)
        if ordered:
            # spelled out: unpacked and packed again with stars, a million rows take half a second more
            yield from entries_of(
                ((row[0], row[1], row[2], row[3], row[4], _session(row[5], row[6])) for row in rows),
                lists,
            )
        else:
            yield from entries_of(rows, lists)

    def _rows(self, query: sa.Select[Any]) -> Iterator[Any]:
        """Yield the rows of *query* as the driver gives them: SQLAlchemy's cost more than what is done with them."""
        compiled = query.compile(dialect=self._connection.dialect)
        names = compiled.positiontup
        values = compiled.params if names is None else tuple(compiled.params[name] for name in names)
        driver = self._connection.connection
        # a named cursor: the server keeps what was not fetched yet
        named = {"name": "books"} if self._connection.dialect.name == "postgresql" else {}
        cursor = driver.cursor(**named)
        cursor.execute(str(compiled), values)
        try:
            while rows := cursor.fetchmany(_FETCH):
                yield from rows
        finally:
            cursor.close()

    def account(self, node: Address, span: Span) -> Account:
        """Return the account of *node*."""
        return draw_account(
            self.entries(node, span),
            node=node,
            bootstrap=self._bootstrap,
            span=span,
            at_ms=time.time_ns() // 1_000_000,
            models=self.models(node),
            lists=self.price_lists(node),
        )

    def receipt_file(self, node: Address, sequence: int, chain_id: int) -> ReceiptFile | None:
        """Return the file of one receipt; None when it, or the order it answers, is not on file any more."""
        r = tables.receipts
        where = (r.c.bootstrap == self._bootstrap, r.c.node == node, r.c.sequence == sequence)
        row = self._connection.execute(sa.select(r.c.task_id, r.c.attempt).where(*where)).one_or_none()
        if row is None:
            return None
        stand_ins = stored_stand_ins(self._connection, chain_id)
        for record in queries.receipts(self._connection, row.task_id, row.attempt):
            filed = record.receipt
            if filed.sequence == sequence and filed.node == node and record.order:
                try:
                    return stand_ins.receipt_file(record.order, filed.raw, filed.acknowledgement)
                except MalformedError:
                    return None
        return None


def _session(attempt: bytes | None, signed_order: bytes | None) -> bytes:
    """Return the session an order was made for; empty where nothing is known of the order any more."""
    if attempt is not None:
        return bytes(attempt)
    return b"" if signed_order is None else session_of_order(bytes(signed_order))


class Signatures:
    """This bootstrap's signatures: the running daemon's, else by the keystore's own key, opened once."""

    def __init__(self, settings: BootstrapSettings) -> None:
        self._settings = settings
        self._directory = DataDirectory(settings.data_dir)
        self._chain_id = network_named(settings.network).chain_id
        self._key: identity.Account | None = None

    def of_statement(self, statement: Statement) -> bytes:
        """Return the signature of *statement*.

        Raises:
            OperatorError: it cannot be had.
        """
        if daemon_is_running(self._directory):
            return self._asked(SIGN_TARGET, STATEMENT_TYPE.to_json(statement, bytes(65)))
        return sign_statement(statement, self._opened(), self._chain_id)

    def of_bill(self, bill: Bill) -> bytes:
        """Return the signature of *bill*; raises as `of_statement` does."""
        if daemon_is_running(self._directory):
            return self._asked(SIGN_BILL_TARGET, BILL_TYPE.to_json(bill, bytes(65)))
        return sign_bill(bill, self._opened(), self._chain_id)

    def _asked(self, target: str, document: dict[str, Any]) -> bytes:
        answer = ask_daemon(self._directory.admin_socket, "POST", target, document)
        return bytes.fromhex(str(answer["signature"]).removeprefix("0x"))

    def _opened(self) -> identity.Account:
        if self._key is None:
            passphrase = ask_passphrase(self._settings.passphrase_file)
            self._key = open_keystore(self._directory.keystore, passphrase)
        return self._key


def state_account(
    settings: BootstrapSettings,
    *,
    node: str,
    since: str | None,
    until: str | None,
    prices: list[str],
    file: Path | None,
    proof: int | None,
    bootstrap: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Do what `ngpu-bootstrap statement` was asked, and print it.

    Raises:
        OperatorError: one line for the operator.
    """
    one_form(csv=as_csv, json=as_json, file=file is not None)
    span, instead = parse_span(since, until), parse_prices(prices)
    address = parse_node(node)
    if proof is not None and file is None:
        raise AccountError("--proof needs --file: the proof is a file")
    own = keystore_address(DataDirectory(settings.data_dir).keystore)
    stated = own if bootstrap is None else parse_node(bootstrap, "bootstrap")
    if stated != own and file is not None:
        raise AccountError(
            f"only {stated} itself can sign what it ordered: run this there, or leave out --file for the totals alone"
        )
    with Books.open(settings, stated) as books:
        if as_csv:
            entries, models = books.entries(address, span), books.models(address)
            write_csv(entries, models, sys.stdout, bootstrap=stated, instead=instead)
            return
        account, others = books.account(address, span), books.others(address)
        signature: bytes | None = None
        signatures = Signatures(settings)
        if file is not None:
            made = _make_file(account, books, span, proof, signatures, network_named(settings.network).chain_id)
            signature = made.signature
            file.write_text(json.dumps(made.to_document()) + "\n")
        elif stated == own:
            try:
                signature = signatures.of_statement(account.statement)
            except OperatorError as error:
                print(f"not signed: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({**account_document(account, instead, signature), "other_bootstraps": others}))
        return
    unsigned = "the account key is not at hand" if stated == own else f"only {stated} itself can"
    show_account(account, Console(), instead=instead, signed=signature is not None, unsigned=unsigned, others=others)
    if file is not None:
        print(f"\nwrote {file}: `scripts/verify-statement {file}` checks it offline")


def parse_node(text: str, what: str = "nodeAddr") -> Address:
    """Return the address in *text*, with or without 0x; *what* is the word for it in an error.

    Raises:
        AccountError: it is none.
    """
    try:
        return parse_address(text if text.startswith("0x") else f"0x{text}")
    except AddressError as error:
        raise AccountError(f"{text[:64]!r} is no {what}: {error}") from None


def _make_file(
    account: Account, books: Books, span: Span, proof: int | None, signatures: Signatures, chain_id: int
) -> StatementFile:
    """Return the signed statement and its bill with all lines, or with the proof for the receipt of number *proof*."""
    statement = account.statement
    node = statement.node
    # the signatures first: without them no second is spent on the lines
    made = StatementFile(statement, signatures.of_statement(statement), chain_id)
    entries = books.entries(node, span, sessions=True)
    draft = draw_bill(entries, statement, chain_id, account.models, account.lists)
    signed = signatures.of_bill(draft.bill)
    if proof is None:
        lines = tuple(entry.line for entry in books.entries(node, span))
        return replace(made, lines=lines, bill=draft.whole(signed))
    for index, entry in enumerate(books.entries(node, span)):
        if entry.line.sequence == proof:
            receipt = books.receipt_file(node, proof, chain_id)
            return prove(made, account.leaves, entry.line, index, receipt, draft.of_line(signed, index))
    raise AccountError(f"receipt {proof} is not in this statement: `--csv` lists what is")
