"""The ledger: one chain per bootstrap, no number twice, nothing acknowledged lost."""

from __future__ import annotations

import itertools
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from ngpu_daemon.turn_commits import Pace
from ngpu_node import ledger_schema
from ngpu_node.errors import LedgerUnavailable, NodeConfigurationError
from ngpu_node.ledger import Ledger, StoredAnswer
from ngpu_protocol.acknowledgements import Acknowledgement, SignedAcknowledgement, sign_acknowledgement
from ngpu_protocol.identity import Account
from ngpu_protocol.receipts import FIRST_PREVIOUS, ReceiptLink, SignedReceipt
from tests.unit.node.builders import (
    BOOTSTRAP,
    CHAIN_ID,
    NODE,
    NOW_MS,
    SIBLING,
    draft_receipt,
    signed_order,
    task_id,
)

#: For the thread's way of committing, which the loop takes over while the disk is fast.
IN_THE_THREAD = Pace(limit_s=0)
IN_THE_LOOP = Pace(limit_s=60)

_pace: list[Pace] = []


@pytest.fixture(params=[IN_THE_LOOP, IN_THE_THREAD], ids=["loop", "thread"], autouse=True)
def pace(request: pytest.FixtureRequest) -> None:
    """Have every test here run with commits in the loop and in the thread."""
    _pace[:] = [request.param]


def with_ledger(path: Path, body: Callable[[Ledger], Awaitable[None]], pace: Pace | None = None) -> None:
    async def main() -> None:
        ledger = await Ledger.open(path, NODE, CHAIN_ID, pace=pace or _pace[0])
        try:
            with trio.fail_after(20):
                await body(ledger)
        finally:
            await ledger.aclose()

    trio.run(main)


async def write(ledger: Ledger, number: int = 0, account: Account = BOOTSTRAP) -> SignedReceipt:
    order = signed_order(account, task_id=task_id(number))
    return (await ledger.write(draft_receipt(order.order), order)).signed


def acknowledged(receipt: SignedReceipt, account: Account = BOOTSTRAP) -> SignedAcknowledgement:
    link = receipt.link(CHAIN_ID)
    return sign_acknowledgement(
        Acknowledgement(link.hash, NODE.address, account.address, link.sequence, "verified", "", NOW_MS),
        account,
        CHAIN_ID,
    )


async def owed(ledger: Ledger, account: Account = BOOTSTRAP) -> list[int]:
    return [one.sequence for one in await ledger.owed(account.address, written_before_ms=NOW_MS + 10**6)]


def test_receipts_form_a_signed_chain_per_bootstrap(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        receipts = [await write(ledger, number) for number in range(3)]
        other = await write(ledger, 9, SIBLING)
        assert [r.receipt.sequence for r in receipts] == [1, 2, 3]
        assert (other.receipt.sequence, other.receipt.previous) == (1, FIRST_PREVIOUS)
        previous = FIRST_PREVIOUS
        for receipt in receipts:
            assert receipt.receipt.previous == previous
            assert receipt.signer(CHAIN_ID) == NODE.address
            previous = receipt.link(CHAIN_ID).hash

    with_ledger(tmp_path / "ledger.db", body)


def test_many_receipts_at_once_share_commits_and_keep_one_chain(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        receipts: list[SignedReceipt] = []

        async def one(number: int) -> None:
            receipts.append(await write(ledger, number))

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(one, number)
        receipts.sort(key=lambda r: r.receipt.sequence)
        assert [r.receipt.sequence for r in receipts] == list(range(1, 301))
        for before, after in itertools.pairwise(receipts):
            assert after.receipt.previous == before.link(CHAIN_ID).hash

    with_ledger(tmp_path / "ledger.db", body)


def test_the_chain_continues_after_a_restart(tmp_path: Path) -> None:
    heads: list[SignedReceipt] = []

    async def body(ledger: Ledger) -> None:
        heads.append(await write(ledger))

    with_ledger(tmp_path / "ledger.db", body)
    with_ledger(tmp_path / "ledger.db", body)
    assert heads[1].receipt.sequence == 2
    assert heads[1].receipt.previous == heads[0].link(CHAIN_ID).hash


def test_a_ledger_behind_its_bootstrap_continues_from_the_bootstraps_head(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        await write(ledger)
        theirs = ReceiptLink(41, b"\x41" * 32)
        assert await ledger.adopt_head(BOOTSTRAP.address, theirs) == theirs
        receipt = await write(ledger, 1)
        assert (receipt.receipt.sequence, receipt.receipt.previous) == (42, theirs.hash)
        # a head that is behind ours, as after every reconnect with receipts under way, changes nothing
        await ledger.adopt_head(BOOTSTRAP.address, ReceiptLink(3, b"\x03" * 32))
        assert (await write(ledger, 2)).receipt.sequence == 43
        with pytest.raises(ValueError, match="believable"):
            await ledger.adopt_head(BOOTSTRAP.address, ReceiptLink(2**60, b"\x03" * 32))

    with_ledger(tmp_path / "ledger.db", body)


def test_a_failed_write_takes_no_number_and_spares_the_others_of_its_batch(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        numbers: list[int] = []

        async def good(number: int) -> None:
            numbers.append((await write(ledger, number)).receipt.sequence)

        async def bad() -> None:
            order = signed_order(task_id=task_id(99))
            with pytest.raises(LedgerUnavailable):
                await ledger.write(draft_receipt(order.order, response_bytes=-1), order)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(good, number)
                if number == 5:
                    nursery.start_soon(bad)
        assert sorted(numbers) == list(range(1, 11))
        assert not ledger.failed.is_set()
        receipts = await ledger.between(BOOTSTRAP.address, 1, 100)
        previous = FIRST_PREVIOUS
        for one in receipts:
            receipt = SignedReceipt.from_bytes(one.signed_receipt)
            assert receipt.receipt.previous == previous
            previous = receipt.link(CHAIN_ID).hash

    with_ledger(tmp_path / "ledger.db", body)


def test_a_disk_that_cannot_be_written_is_announced(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        await write(ledger)
        ledger._commits._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerUnavailable):
            await write(ledger, 1)
        await ledger.failed.wait()

    with_ledger(tmp_path / "ledger.db", body)


def test_receipts_are_owed_until_their_acknowledgement_is_kept_across_restarts(tmp_path: Path) -> None:
    async def first(ledger: Ledger) -> None:
        receipts = [await write(ledger, number) for number in range(3)]
        ledger.acknowledge(acknowledged(receipts[1]), [BOOTSTRAP.address], NOW_MS)
        while await owed(ledger) != [1, 3]:  # noqa: ASYNC110
            await trio.sleep(0.01)

    async def second(ledger: Ledger) -> None:
        assert await owed(ledger) == [1, 3]
        assert (await ledger.totals()).owed == 2

    with_ledger(tmp_path / "ledger.db", first)
    with_ledger(tmp_path / "ledger.db", second)


def test_an_acknowledgement_just_before_closing_is_kept(tmp_path: Path) -> None:
    async def first(ledger: Ledger) -> None:
        ledger.acknowledge(acknowledged(await write(ledger)), [BOOTSTRAP.address], NOW_MS)

    async def second(ledger: Ledger) -> None:
        assert await owed(ledger) == []

    with_ledger(tmp_path / "ledger.db", first)
    with_ledger(tmp_path / "ledger.db", second)


def test_a_flood_of_acknowledgements_is_kept_whole(tmp_path: Path) -> None:
    async def first(ledger: Ledger) -> None:
        receipts: list[SignedReceipt] = []

        async def one(number: int) -> None:
            receipts.append(await write(ledger, number))

        async with trio.open_nursery() as nursery:
            for number in range(1300):
                nursery.start_soon(one, number)
        for receipt in receipts:
            ledger.acknowledge(acknowledged(receipt), [SIBLING.address, BOOTSTRAP.address], NOW_MS)

    async def second(ledger: Ledger) -> None:
        assert (await ledger.totals()).owed == 0

    with_ledger(tmp_path / "ledger.db", first)
    with_ledger(tmp_path / "ledger.db", second)


def test_an_acknowledgement_settles_its_own_services_receipt_only(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        receipt = await write(ledger)
        ledger.acknowledge(acknowledged(receipt, SIBLING), [SIBLING.address], NOW_MS)
        wrong = Acknowledgement(b"\x09" * 32, NODE.address, BOOTSTRAP.address, 1, "verified", "", NOW_MS)
        ledger.acknowledge(sign_acknowledgement(wrong, BOOTSTRAP, CHAIN_ID), [BOOTSTRAP.address], NOW_MS)
        await trio.sleep(0.1)
        assert await owed(ledger) == [1]
        ledger.acknowledge(acknowledged(receipt, SIBLING), [SIBLING.address, BOOTSTRAP.address], NOW_MS)
        await trio.sleep(0.1)
        assert await owed(ledger) == []

    with_ledger(tmp_path / "ledger.db", body)


def test_a_gap_is_filled_with_acknowledged_receipts_too(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        receipts = [await write(ledger, number) for number in range(5)]
        ledger.acknowledge(acknowledged(receipts[2]), [BOOTSTRAP.address], NOW_MS)
        found = await ledger.between(BOOTSTRAP.address, 2, 4)
        assert [SignedReceipt.from_bytes(one.signed_receipt) for one in found] == receipts[1:4]
        assert await ledger.between(BOOTSTRAP.address, 6, 2**70) == []

    with_ledger(tmp_path / "ledger.db", body)


def test_a_detached_answer_is_stored_with_its_receipt_and_remembers_the_acknowledgement(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        order = signed_order(detach=True)
        answer = StoredAnswer("acme", order.order.task_id, 1, 200, b"\x90", b"body", None, 4)
        written = await ledger.write(draft_receipt(order.order), order, answer)
        stored = await ledger.answer("acme", order.order.task_id, 1)
        assert stored is not None
        assert (stored.body, stored.signed_receipt) == (b"body", written.signed.wire)
        assert await ledger.answer("other", order.order.task_id, 1) is None
        ledger.acknowledge(acknowledged(written.signed), [BOOTSTRAP.address], NOW_MS)
        await trio.sleep(0.1)
        (by_age,) = await ledger.answers_by_age()
        assert (by_age.acknowledged_at_ms, by_age.body, by_age.body_bytes) == (NOW_MS, None, 4)
        await ledger.forget_answers([("acme", order.order.task_id, 1)])
        assert await ledger.answers_by_age() == []
        assert len(await ledger.between(BOOTSTRAP.address, 1, 1)) == 1

    with_ledger(tmp_path / "ledger.db", body)


_WRITER = """
import sys, trio
from pathlib import Path
from ngpu_node.ledger import Ledger
from tests.unit.node.builders import CHAIN_ID, NODE, draft_receipt, signed_order, task_id

async def main():
    ledger = await Ledger.open(Path(sys.argv[1]), NODE, CHAIN_ID)
    async def worker(start):
        number = start
        while True:
            order = signed_order(task_id=task_id(number))
            written = await ledger.write(draft_receipt(order.order), order)
            sys.stdout.write(f"{written.signed.receipt.sequence} {written.hash.hex()}\\n")
            sys.stdout.flush()
            number += 16
    async with trio.open_nursery() as nursery:
        for start in range(16):
            nursery.start_soon(worker, start)

trio.run(main)
"""


def test_kill_9_loses_no_receipt_that_left_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None
    left = [process.stdout.readline() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    left += process.stdout.readlines()
    process.wait()
    # On a slow disk the writer logs a line of its own in between.
    whole = [line.split() for line in left if line.endswith(b"\n")]
    promised = dict(words for words in whole if len(words) == 2)

    async def body(ledger: Ledger) -> None:
        found: dict[bytes, bytes] = {}
        previous = FIRST_PREVIOUS
        while batch := await ledger.between(BOOTSTRAP.address, len(found) + 1, 10**6):
            for one in batch:
                receipt = SignedReceipt.from_bytes(one.signed_receipt)
                assert receipt.receipt.sequence == len(found) + 1
                assert receipt.receipt.previous == previous
                previous = receipt.link(CHAIN_ID).hash
                found[str(one.sequence).encode()] = previous.hex().encode()
        assert len(promised) >= 190
        assert promised.items() <= found.items()
        assert (await write(ledger, 10**6)).receipt.previous == previous

    with_ledger(path, body)


def test_a_ledger_of_a_later_version_is_refused_with_a_line_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger_schema.connect(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(NodeConfigurationError, match="later version"):
        ledger_schema.connect(path)


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database, but somebody's file" * 100)
    with pytest.raises(NodeConfigurationError, match="cannot be used"):
        ledger_schema.connect(path)
    assert path.read_bytes().startswith(b"not a database")


def test_an_opened_ledger_is_private_migrated_and_durable(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger_schema.connect(path).close()
    connection = ledger_schema.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(ledger_schema.MIGRATIONS),)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_cancelled_writer_still_gets_its_receipt(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            written = await write(ledger)
        assert written.receipt.sequence == 1
        assert await owed(ledger) == [1]

    with_ledger(tmp_path / "ledger.db", body)


def test_a_disk_that_hangs_is_given_up(tmp_path: Path) -> None:
    async def body(ledger: Ledger) -> None:
        free = threading.Event()
        stuck = threading.Event()

        def hang(connection: sqlite3.Connection) -> None:
            stuck.set()
            free.wait(30)

        ledger._commits.later(hang)
        await trio.to_thread.run_sync(stuck.wait)
        try:
            async with trio.open_nursery() as nursery:

                async def expect_nothing() -> None:
                    with pytest.raises(LedgerUnavailable, match="no commit within"):
                        await write(ledger)

                nursery.start_soon(expect_nothing)
                await trio.sleep(0.05)
                ledger.give_up(60)
                ledger.give_up(0.01)
        finally:
            free.set()

    with_ledger(tmp_path / "ledger.db", body, IN_THE_THREAD)
