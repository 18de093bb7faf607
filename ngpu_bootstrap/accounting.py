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
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.init_command import ask_passphrase
from ngpu_daemon.keystore import keystore_address, open_keystore
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.networks import network_named
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.statements import STATEMENT_TYPE, Statement, StatementFile, prove, sign_statement

_FETCH = 2_000
SIGN_TARGET = "/statements/signature"


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

    def models(self, node: Address) -> dict[bytes, str]:
        """Return the model of each of *node*'s GPUs by its name in receipts."""
        g = tables.node_gpus
        models = self._connection.execute(sa.select(g.c.gpu, g.c.model).where(g.c.node == node))
        return {bytes(gpu): model for gpu, model in models}

    def entries(self, node: Address, span: Span) -> Iterator[Entry]:
        """Yield the receipts of *node* in *span*, by sequence number; all that are on file are acknowledged."""
        r, a = tables.receipts, tables.attempts
        lists = self.price_lists(node)
        columns: list[Any] = [r.c.raw, r.c.hash, r.c.verdict, r.c.task_id, r.c.acknowledgement]
        # the order says which list a receipt falls under: it is with its attempt, or, that gone, with the receipt
        columns += [a.c.session, r.c.signed_order] if lists else [sa.null()]
        query = sa.select(*columns)
        if lists:
            attempt = (a.c.task_id == r.c.task_id) & (a.c.attempt == r.c.attempt)
            query = query.select_from(r.outerjoin(a, attempt))
        query = query.where(
            r.c.bootstrap == self._bootstrap,
            r.c.node == node,
            r.c.ended_at_ms >= span.from_ms,
            r.c.ended_at_ms < span.to_ms,
        ).order_by(r.c.sequence)
        rows = self._rows(query)
        if lists:
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


def signature_of(statement: Statement, settings: BootstrapSettings) -> bytes:
    """Return the bootstrap's signature of *statement*: the running daemon's, else by the keystore's own key.

    Raises:
        OperatorError: neither can be had.
    """
    directory = DataDirectory(settings.data_dir)
    if daemon_is_running(directory):
        document = STATEMENT_TYPE.to_json(statement, bytes(65))
        answer = ask_daemon(directory.admin_socket, "POST", SIGN_TARGET, document)
        return bytes.fromhex(str(answer["signature"]).removeprefix("0x"))
    account = open_keystore(directory.keystore, ask_passphrase(settings.passphrase_file))
    return sign_statement(statement, account, network_named(settings.network).chain_id)


def state_account(
    settings: BootstrapSettings,
    *,
    node: str,
    since: str | None,
    until: str | None,
    prices: list[str],
    file: Path | None,
    proof: int | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Do what `ngpu-bootstrap statement` was asked, and print it.

    Raises:
        OperatorError: one line for the operator.
    """
    span, instead = parse_span(since, until), parse_prices(prices)
    address = parse_node(node)
    if proof is not None and file is None:
        raise AccountError("--proof needs --file: the proof is a file")
    directory = DataDirectory(settings.data_dir)
    with Books.open(settings, keystore_address(directory.keystore)) as books:
        if as_csv:
            write_csv(books.entries(address, span), books.models(address), sys.stdout, instead=instead)
            return
        account = books.account(address, span)
        signature: bytes | None
        try:
            signature = signature_of(account.statement, settings)
        except OperatorError as error:
            if file is not None:
                raise
            print(f"not signed: {error}", file=sys.stderr)
            signature = None
        if file is not None and signature is not None:
            chain_id = network_named(settings.network).chain_id
            made = StatementFile(account.statement, signature, chain_id)
            made = _with_lines(made, books, span) if proof is None else _with_proof(made, account, books, span, proof)
            file.write_text(json.dumps(made.to_document()) + "\n")
    if as_json:
        print(json.dumps(account_document(account, instead, signature)))
        return
    show_account(account, Console(), instead=instead, signed=signature is not None)
    if file is not None:
        print(f"\nwrote {file}: `scripts/verify-statement {file}` checks it offline")


def parse_node(text: str) -> Address:
    """Return the address in *text*, with or without 0x.

    Raises:
        AccountError: it is none.
    """
    try:
        return parse_address(text if text.startswith("0x") else f"0x{text}")
    except AddressError as error:
        raise AccountError(f"{text[:64]!r} is no nodeAddr: {error}") from None


def _with_lines(made: StatementFile, books: Books, span: Span) -> StatementFile:
    lines = tuple(entry.line for entry in books.entries(made.statement.node, span))
    return StatementFile(made.statement, made.signature, made.chain_id, lines=lines)


def _with_proof(made: StatementFile, account: Account, books: Books, span: Span, sequence: int) -> StatementFile:
    for index, entry in enumerate(books.entries(made.statement.node, span)):
        if entry.line.sequence == sequence:
            receipt = books.receipt_file(made.statement.node, sequence, made.chain_id)
            return prove(made, account.leaves, entry.line, index, receipt)
    raise AccountError(f"receipt {sequence} is not in this statement: `--csv` lists what is")
