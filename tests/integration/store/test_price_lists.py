"""Both sides' books come to the same amounts over prices that changed, whatever became of the orders."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.accounting import Books as BootstrapBooks
from ngpu_bootstrap.accounting import state_account
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.store.records import AttemptStart, Finish, NewReceipt, NewTask
from ngpu_bootstrap.store.store import Store, open_store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_daemon.accounts import END_OF_TIME_MS, Account, AccountError, Span, account_document, draw_bill, write_csv
from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_node.earnings import Books as NodeBooks
from ngpu_node.ledger import Ledger, Written
from ngpu_protocol.acknowledgements import Acknowledgement, VerdictKind, sign_acknowledgement, skew_reason
from ngpu_protocol.identity import Account as SigningAccount
from ngpu_protocol.identity import Address
from ngpu_protocol.orders import SignedOrder, sign_order
from ngpu_protocol.prices import Prices, sign_price_list
from ngpu_protocol.receipts import Meter, sign_receipt
from ngpu_protocol.statements import same_account
from tests.unit.protocol.samples import BOOTSTRAP, CHAIN_ID, NODE, SENT_AT_MS, a_receipt, an_order
from tests.unit.store import builders
from tests.unit.store.builders import a_store, database_of


def new_account() -> SigningAccount:
    return SigningAccount.from_key(secrets.token_bytes(32))


def raw_of(number: int, bootstrap: Address) -> bytes:
    return sign_receipt(replace(a_receipt(sequence=number), bootstrap=bootstrap), NODE, CHAIN_ID).wire


def a_stored_receipt(number: int) -> NewReceipt:
    return builders.a_receipt(number, node=NODE.address, ended_at_ms=SENT_AT_MS)


SPAN = Span(0, END_OF_TIME_MS)
ONE, TWO = a_receipt().gpus
MODELS = {ONE: "RTX4090", TWO: "H100-80G"}
LISTS = (
    Prices.of_models("USD", {"RTX 4090": "0.00012", "H100": "0.0009", "A100": "0.0005"}),
    None,
    Prices.of_models("USD", {"RTX 4090": "0.00013"}),
    Prices.of_models("CREDITS", {"RTX 4090": "3", "H100": "7.000000000000000001"}),
)
VERDICTS = (VerdictKind.VERIFIED, VerdictKind.VERIFIED, VerdictKind.SKEW, VerdictKind.DISPUTED)


def task_id(number: int) -> str:
    return f"20250615_23_06_40_{number:020d}"


def orders(sessions: list[bytes]) -> list[SignedOrder]:
    """Five orders for each session."""
    made = []
    for session in sessions:
        for _ in range(5):
            order = replace(an_order(), task_id=task_id(len(made)), session=session)
            made.append(sign_order(order, BOOTSTRAP, CHAIN_ID))
    return made


@asynccontextmanager
async def a_ledger(folder: Path) -> AsyncIterator[Ledger]:
    ledger = await Ledger.open(folder / "ledger.db", NODE, CHAIN_ID)
    try:
        yield ledger
    finally:
        await ledger.aclose()


async def file(store: Store, signed: SignedOrder, written: Written, number: int) -> Acknowledgement:
    """File a receipt as a bootstrap does; return what it says to it."""
    order, receipt = signed.order, written.signed.receipt
    verdict = VERDICTS[number % len(VERDICTS)]
    reason = {VerdictKind.SKEW: skew_reason("times", 700), VerdictKind.DISPUTED: "busy"}.get(verdict, "")
    said = Acknowledgement(written.hash, NODE.address, BOOTSTRAP.address, receipt.sequence, verdict, reason, SENT_AT_MS)
    ack = sign_acknowledgement(said, BOOTSTRAP, CHAIN_ID)
    task = NewTask(
        task_id=order.task_id,
        workspace="1",
        revision=1,
        api="draw",
        method="POST",
        port=8080,
        target="/",
        accepted_at_ms=SENT_AT_MS + number,
        deadline_at_ms=SENT_AT_MS + 10_000,
    )
    await store.accept_and_begin(
        task, AttemptStart(order.task_id, 1, NODE.address, order.session, signed.wire, SENT_AT_MS)
    )
    record = NewReceipt(
        task_id=order.task_id,
        attempt=1,
        bootstrap=BOOTSTRAP.address,
        node=NODE.address,
        sequence=receipt.sequence,
        hash=written.hash,
        previous=receipt.previous,
        raw=written.signed.wire,
        verdict=verdict.value,
        received_at_ms=SENT_AT_MS,
        acknowledgement=ack.wire,
        ended_at_ms=receipt.ended_at_ms,
    )
    await store.finish(Finish(order.task_id, TaskState.FINISHED, SENT_AT_MS, 1, receipt=record))
    return said


def shown(account: Account) -> dict[str, Any]:
    document = account_document(account)
    return {key: value for key, value in document.items() if key not in ("at_ms", "waiting_receipts")}


@trio_test
async def test_a_session_that_is_on_file_is_looked_up_and_not_written_again(directory: Path) -> None:
    asks, nothing = secrets.token_bytes(32), secrets.token_bytes(32)
    wire = sign_price_list(Prices.of_models("USD", {"RTX 4090": "1"}), asks, NODE, CHAIN_ID).wire
    dearer = sign_price_list(Prices.of_models("USD", {"RTX 4090": "2"}), asks, NODE, CHAIN_ID).wire
    async with a_store(directory) as store:
        assert await store.keep_price_list(NODE.address, asks, wire, 1) == wire
        assert await store.keep_price_list(NODE.address, nothing, b"", 1) == b""
        written = store.counts.operations
        for _ in range(3):  # as many connections
            assert await store.keep_price_list(NODE.address, asks, wire, 2) == wire
            assert await store.keep_price_list(NODE.address, nothing, b"", 2) == b""
        # what holds is still the first
        assert await store.keep_price_list(NODE.address, asks, dearer, 3) == wire
        assert await store.keep_price_list(NODE.address, nothing, wire, 3) == b""
        assert store.counts.operations == written


@pytest.mark.parametrize("kept", ["orders with their attempts", "orders with their receipts"])
def test_both_sides_come_to_the_same_amounts_over_changed_prices(directory: Path, tmp_path: Path, kept: str) -> None:
    sessions = [secrets.token_bytes(32) for _ in LISTS]
    lists = [
        prices and sign_price_list(prices, session, NODE, CHAIN_ID)
        for prices, session in zip(LISTS, sessions, strict=True)
    ]

    async def main() -> None:
        async with (
            a_ledger(tmp_path) as ledger,
            open_store(
                database_of(directory), network="local", bootstrap=BOOTSTRAP.address, bodies=tmp_path / "bodies"
            ) as store,
        ):
            # the first session's second card was called something else; what it is called today is not what it was
            for session in sessions:
                models = MODELS | {TWO: "A100-80G"} if session == sessions[0] else MODELS
                ledger.remember_gpus(session, models)
                store.note_gpus(NODE.address, session, models, 1)
            ledger.remember_gpus(sessions[0], MODELS)
            store.note_gpus(NODE.address, sessions[0], MODELS, 2)
            for signed, session in zip(lists, sessions, strict=True):
                if signed is not None:
                    ledger.remember_price_list(signed)
                wire = signed.wire if signed is not None else b""
                assert await store.keep_price_list(NODE.address, session, wire, 1) == wire
            # a session's list is what it said first, and asking nothing is something said
            dear = sign_price_list(Prices.of_models("USD", {"RTX4090": "9"}), sessions[1], NODE, CHAIN_ID)
            assert await store.keep_price_list(NODE.address, sessions[1], dear.wire, 2) == b""
            for number, order in enumerate(orders(sessions)):
                held = (ONE, TWO) if number % 2 else (ONE,)
                draft = a_receipt(
                    order.order,
                    gpus=held,
                    meter=Meter.NVML_PROCESS if number % 3 else Meter.NONE,
                    busy_gpu_ms=901 + number if number % 3 else 0,
                    reserved_gpu_ms=1800,
                )
                written = await ledger.write(draft, order)
                said = await file(store, order, written, number)
                ledger.acknowledge(sign_acknowledgement(said, BOOTSTRAP, CHAIN_ID), [BOOTSTRAP.address], SENT_AT_MS)
            if kept == "orders with their receipts":
                assert await store.remove_old(before_ms=SENT_AT_MS + 15, bodies_bytes=None, limit=100) == 15

    trio.run(main)
    database = database_of(directory)
    url = database if isinstance(database, str) else ""
    settings = BootstrapSettings(data_dir=tmp_path, network="local", store=url)
    with BootstrapBooks.open(settings, BOOTSTRAP.address) as books:
        theirs = books.account(NODE.address, SPAN)
        their_csv = io.StringIO()
        write_csv(books.entries(NODE.address, SPAN), books.models(NODE.address), their_csv, bootstrap=BOOTSTRAP.address)
        their_bill = draw_bill(
            books.entries(NODE.address, SPAN, sessions=True), theirs.statement, CHAIN_ID, theirs.models, theirs.lists
        )
    with NodeBooks.open(tmp_path / "ledger.db") as own:
        ours = own.account(NODE.address, BOOTSTRAP.address, SPAN, 0)
        our_csv = io.StringIO()
        write_csv(own.entries(BOOTSTRAP.address, SPAN), own.models(), our_csv, bootstrap=BOOTSTRAP.address)
        our_bill = draw_bill(
            own.entries(BOOTSTRAP.address, SPAN, sessions=True), theirs.statement, CHAIN_ID, ours.models, ours.lists
        )
    assert same_account(ours.statement, theirs.statement) == []
    assert shown(ours) == shown(theirs)
    assert our_csv.getvalue() == their_csv.getvalue()
    assert [one["currency"] for one in shown(ours)["amounts"]] == ["CREDITS", "USD"]
    assert our_bill.bill == their_bill.bill
    assert our_bill.bill.amounts.split("\n") == [f"{one['currency']}={one['amount']}" for one in shown(ours)["amounts"]]
    rows = shown(ours)["gpus"]
    assert {row["price_per_s"] for row in rows} == {None, "0.00012", "0.0005", "0.00013", "3", "7.000000000000000001"}
    skewed = [line.split(",")[6] for line in our_csv.getvalue().splitlines() if ",skew," in line]
    assert skewed == ["700"] * 5, "a skewed receipt is paid on the bootstrap's own duration, on one GPU here"


def test_a_statement_names_the_bootstraps_it_does_not_cover_and_states_them_unsigned(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, here = new_account(), new_account()

    async def main() -> None:
        for bootstrap, count in ((gone, 2), (here, 1)):
            async with a_store(directory, bootstrap=bootstrap.address) as store:
                for number in range(1, count + 1):
                    receipt = replace(
                        a_stored_receipt(number), bootstrap=bootstrap.address, raw=raw_of(number, bootstrap.address)
                    )
                    await store.late_receipt(receipt)

    trio.run(main)
    database = database_of(directory)
    settings = BootstrapSettings(
        data_dir=directory,
        network="local",
        store=database if isinstance(database, str) else "",
        passphrase_file=tmp_path / "pw",
    )
    (tmp_path / "pw").write_text("pw")
    (tmp_path / "pw").chmod(0o600)
    directory.chmod(0o700)
    write_keystore(directory / "keystore.json", here, "pw", Kdf.LIGHT)

    def state(*, file: Path | None = None, bootstrap: str | None = None) -> dict[str, Any]:
        state_account(
            settings,
            node=NODE.address,
            since=None,
            until=None,
            prices=[],
            file=file,
            proof=None,
            bootstrap=bootstrap,
            as_csv=False,
            as_json=True,
        )
        document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return document

    own = state()
    assert (own["bootstrap"], own["receipts"], own["other_bootstraps"]) == (here.address, 1, [gone.address])
    assert "signature" in own
    other = state(bootstrap=gone.address)
    assert (other["bootstrap"], other["receipts"], other["other_bootstraps"]) == (gone.address, 2, [here.address])
    assert "signature" not in other
    with pytest.raises(AccountError, match=f"only {gone.address} itself can sign"):
        state(bootstrap=gone.address, file=tmp_path / "file")
    with pytest.raises(AccountError, match="is no bootstrap"):
        state(bootstrap="nobody")
    assert not (tmp_path / "file").exists()
    assert state(bootstrap=new_account().address)["receipts"] == 0
