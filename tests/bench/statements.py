"""How long a statement over many receipts takes, on both sides' stores: `scripts/bench statements`.

Fills a fresh ledger and a fresh SQLite store with the same COUNT receipts (a million by default) straight into their
tables, then draws up the account from each, as the two commands do, and checks that they agree; then the file with all
lines is judged as an auditor would. The receipts are well-formed but for their signatures, which no statement reads.

With `--prices N` they are of N sessions, each with a price list of its own, so that the order of each receipt is read
too: with its attempt on the bootstrap's side, with the receipt on the node's.
"""

from __future__ import annotations

import argparse
import hashlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sa
import trio

from ngpu_bootstrap.accounting import Books as BootstrapBooks
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_bootstrap.store.store import open_store
from ngpu_daemon.accounts import END_OF_TIME_MS, Account, Span, session_of_order
from ngpu_node.earnings import Books as NodeBooks
from ngpu_node.ledger_schema import connect
from ngpu_protocol.identity import gpu_id
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import ORDER_TYPE
from ngpu_protocol.prices import Prices, sign_price_list
from ngpu_protocol.receipts import RECEIPT_TYPE
from ngpu_protocol.statements import StatementFile, check_statement_file, same_account, sign_statement
from tests.vectors.generate import BOOTSTRAP, FIRST, NODE, ORDER

BATCH = 20_000
CHAIN_ID = network_named("local").chain_id
SPAN = Span(0, END_OF_TIME_MS)
GPU = gpu_id(NODE.address, "GPU-bench")
MODEL = "RTX4090"


def sessions(count: int) -> list[bytes]:
    """Return the sessions of a node that was started *count* times."""
    return [hashlib.sha256(b"session %d" % number).digest() for number in range(count)]


def order_of(sequence: int, count: int, ran: list[bytes]) -> bytes:
    """Return the order of receipt *sequence* of *count*, under sessions that follow each other."""
    if not ran:
        return b""
    session = ran[(sequence - 1) * len(ran) // count]
    return ORDER_TYPE.pack(replace(ORDER, task_id=f"task {sequence}", session=session), bytes(65))


def receipts(count: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (sequence, hash, msgpack) of *count* receipts; hashes are stand-ins of the right size."""
    for sequence in range(1, count + 1):
        receipt = replace(FIRST, sequence=sequence, gpus=(GPU,), busy_gpu_ms=sequence % 997, reserved_gpu_ms=997)
        yield sequence, hashlib.sha256(b"%d" % sequence).digest(), RECEIPT_TYPE.pack(receipt, bytes(65))


def fill(folder: Path, count: int, prices: int) -> None:
    """Write both sides' tables."""
    ledger = connect(folder / "ledger.db")
    ran = sessions(prices)

    async def make() -> None:
        async with open_store(
            folder / "bootstrap.db", network="local", bootstrap=BOOTSTRAP.address, bodies=folder / "bodies"
        ):
            pass

    trio.run(make)
    engine = open_engine(folder / "bootstrap.db")
    made = receipts(count)
    with engine.begin() as connection:
        while batch := [row for _, row in zip(range(BATCH), made, strict=False)]:
            orders = [order_of(sequence, count, ran) for sequence, _, _ in batch]
            fill_ledger(ledger, batch, orders)
            connection.execute(sa.insert(tables.receipts), [_stored(*row) for row in batch])
            if ran:
                connection.execute(sa.insert(tables.tasks), [_task(sequence) for sequence, _, _ in batch])
                connection.execute(
                    sa.insert(tables.attempts),
                    [_attempt(row[0], order) for row, order in zip(batch, orders, strict=True)],
                )
        if ran:
            lists = [_list(number, session) for number, session in enumerate(ran)]
            connection.execute(sa.insert(tables.price_lists), lists)
            seen = {"node": NODE.address, "gpu": GPU, "model": MODEL, "seen_at_ms": FIRST.ended_at_ms}
            connection.execute(sa.insert(tables.node_gpus), [seen])
            ledger.execute("BEGIN")
            ledger.executemany(
                "INSERT INTO price_lists (session, signed_list) VALUES (?, ?)",
                [(one["session"], one["signed_list"]) for one in lists],
            )
            ledger.execute("INSERT INTO gpus (id, model) VALUES (?, ?)", (GPU, MODEL))
            ledger.execute("COMMIT")
    engine.dispose()
    ledger.close()


def fill_ledger(ledger: sqlite3.Connection, batch: list[tuple[int, bytes, bytes]], orders: list[bytes]) -> None:
    """Write one batch to the node's side, acknowledged."""
    ledger.execute("BEGIN")
    ledger.executemany(
        "INSERT INTO receipts (bootstrap, sequence, hash, task_id, attempt, signed_order, signed_receipt,"
        " written_at_ms, acknowledgement, verdict) VALUES (?, ?, ?, ?, 1, ?, ?, ?, x'00', 'verified')",
        [
            (BOOTSTRAP.address, s, hash, f"task {s}", order, raw, FIRST.ended_at_ms)
            for (s, hash, raw), order in zip(batch, orders, strict=True)
        ],
    )
    ledger.execute("COMMIT")


def _task(sequence: int) -> dict[str, object]:
    return {
        "task_id": f"task {sequence}",
        "workspace": "1001",
        "revision": 1,
        "api": "draw",
        "method": "POST",
        "port": 8080,
        "target": "/",
        "headers": "[]",
        "detach": 0,
        "wrapped": 0,
        "priority": 0,
        "state": 3,
        "attempts": 1,
        "accepted_at_ms": FIRST.started_at_ms,
        "deadline_at_ms": FIRST.ended_at_ms,
        "bootstrap": BOOTSTRAP.address,
    }


def _attempt(sequence: int, order: bytes) -> dict[str, object]:
    return {
        "task_id": f"task {sequence}",
        "attempt": 1,
        "node": NODE.address,
        "session": session_of_order(order),
        "signed_order": order,
        "began_at_ms": FIRST.started_at_ms,
    }


def _list(number: int, session: bytes) -> dict[str, object]:
    prices = Prices.of_models("USD", {MODEL: f"0.{number + 1:05}".rstrip("0")})
    return {
        "bootstrap": BOOTSTRAP.address,
        "node": NODE.address,
        "session": session,
        "signed_list": sign_price_list(prices, session, NODE, CHAIN_ID).wire,
        "given_at_ms": FIRST.started_at_ms,
    }


def _stored(sequence: int, hash: bytes, raw: bytes) -> dict[str, object]:
    return {
        "bootstrap": BOOTSTRAP.address,
        "node": NODE.address,
        "sequence": sequence,
        "task_id": f"task {sequence}",
        "attempt": 1,
        "hash": hash,
        "previous": bytes(32),
        "raw": raw,
        "acknowledgement": b"",
        "verdict": "verified",
        "started_at_ms": FIRST.started_at_ms,
        "ended_at_ms": FIRST.ended_at_ms,
        "received_at_ms": FIRST.ended_at_ms,
    }


class Watch:
    """Tells elapsed and processor time since the last lap: on a busy machine only the second compares."""

    def __init__(self) -> None:
        self._last = (time.perf_counter(), time.process_time())

    def lap(self) -> str:
        """Return both since the last lap, as text."""
        now = (time.perf_counter(), time.process_time())
        wall, cpu = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return f"{wall:.2f} s, processor {cpu:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.statements")
    parser.add_argument("count", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--prices", type=int, default=0, metavar="N", help="so many sessions, each with a price list")
    arguments = parser.parse_args()
    count = arguments.count
    with tempfile.TemporaryDirectory(prefix="ngpu-bench-") as name:
        folder = Path(name)
        fill(folder, count, arguments.prices)
        settings = BootstrapSettings(data_dir=folder, network="local")
        watch = Watch()
        with BootstrapBooks.open(settings, BOOTSTRAP.address) as books:
            theirs: Account = books.account(NODE.address, SPAN)
        print(f"bootstrap: statement over {theirs.statement.receipts:,} receipts {watch.lap()}")
        with NodeBooks.open(folder / "ledger.db") as ledger:
            ours = ledger.account(NODE.address, BOOTSTRAP.address, SPAN, 0)
        print(f"node: earnings over the same {watch.lap()}")
        assert same_account(ours.statement, theirs.statement) == []
        assert ours.priced() == theirs.priced()
        if arguments.prices:
            rows, totals = ours.priced()
            print(f"amounts: {len(rows)} rows, {', '.join(f'{amount} {unit}' for unit, amount in totals.items())}")
        with BootstrapBooks.open(settings, BOOTSTRAP.address) as books:
            lines = tuple(entry.line for entry in books.entries(NODE.address, SPAN))
        signature = sign_statement(theirs.statement, BOOTSTRAP, CHAIN_ID)
        watch.lap()
        results = check_statement_file(StatementFile(theirs.statement, signature, CHAIN_ID, lines=lines))
        assert all(result.holds for result in results)
        print(f"auditor: all lines judged {watch.lap()}")


if __name__ == "__main__":
    main()
