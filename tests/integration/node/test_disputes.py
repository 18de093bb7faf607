"""The owner's side: what was disputed stays in the ledger with the bootstrap's own words, and is a file for anyone."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trio.testing import trio_test

from ngpu_daemon.accounts import AccountError
from ngpu_daemon.disputes import DisputeError, export, list_disputes, show_dispute
from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_node.config import NodeSettings
from ngpu_node.disputes import open_evidence
from ngpu_node.receipt_files import write_receipt
from ngpu_protocol.acknowledgements import Acknowledgement, VerdictKind, sign_acknowledgement
from ngpu_protocol.control import Ack, Gap
from ngpu_protocol.dispute_file import Finding, check_dispute_file, from_json
from ngpu_protocol.gap_claims import ClaimedGap, sign_gap_claim
from ngpu_protocol.identity import Account
from ngpu_protocol.observations import Evidence, Observation, sign_observation
from ngpu_protocol.prices import check_price_list
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import SignedReceipt
from ngpu_protocol.verification import Observed
from tests.integration.node.rig import echo, eventually
from tests.integration.node.scripted_bootstrap import ScriptedBootstrap, a_bootstrap, a_node, settings, wall_ms
from tests.integration.node.test_daemon import SPEC, a_workspace
from tests.unit.node.builders import CHAIN_ID, NODE, STRANGER

OTHER = b"\x44" * 32


async def dispute(
    bootstrap: ScriptedBootstrap,
    receipt: SignedReceipt,
    *,
    seen: Observed | None = None,
    observation: bytes | None = None,
    **said: Any,
) -> None:
    """Have *bootstrap* say that another answer arrived than *receipt* speaks of."""
    seen = seen or Observed(None, None, 200, OTHER, receipt.receipt.response_bytes, None, None)
    digest = receipt.receipt.digest(CHAIN_ID)
    values: dict[str, Any] = {
        "receipt_hash": digest,
        "node": receipt.receipt.node,
        "bootstrap": bootstrap.account.address,
        "rule": "response_hash",
        "expected": "0x" + OTHER.hex(),
        "actual": "0x" + receipt.receipt.response_hash.hex(),
        "seen": Evidence(seen).to_text(),
        "at_ms": wall_ms(),
    }
    if observation is None:
        observation = sign_observation(Observation(**(values | said)), bootstrap.account, CHAIN_ID).wire
    ack = Acknowledgement(
        receipt_hash=digest,
        node=receipt.receipt.node,
        bootstrap=bootstrap.account.address,
        sequence=receipt.receipt.sequence,
        verdict=VerdictKind.DISPUTED,
        reason="response_hash",
        at_ms=wall_ms(),
    )
    await bootstrap.say_on_receipts(Ack(sign_acknowledgement(ack, bootstrap.account, CHAIN_ID).wire, observation))


def disputed(chosen: NodeSettings) -> int:
    with closing(sqlite3.connect(f"file:{chosen.data_dir / 'ledger.db'}?mode=ro", uri=True)) as ledger:
        (count,) = ledger.execute("SELECT count(*) FROM receipts WHERE verdict = 'disputed'").fetchone()
    return int(count)


@trio_test
async def test_an_owner_has_the_bootstraps_words_and_can_show_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    write_keystore(data / "keystore.json", NODE, "pw", Kdf.LIGHT)
    async with a_bootstrap() as bootstrap:
        chosen = settings(data, bootstrap)
        async with a_node(chosen) as node, a_workspace(node, echo):
            await bootstrap.wish(SPEC)
            await bootstrap.until_ready()
            answers = [await bootstrap.ask(body) for body in (b"one", b"two", b"three", b"four")]
            receipts = [answer.receipt for answer in answers if answer.receipt is not None]
            assert len(receipts) == 4
            await dispute(bootstrap, receipts[0])
            # it says what its own sight does not bear out
            honest = Observed(None, None, 200, receipts[1].receipt.response_hash, 3, None, None)
            await dispute(bootstrap, receipts[1], seen=honest)
            await dispute(bootstrap, receipts[2], observation=b"\x80")  # no observation at all
            await bootstrap.acknowledge(receipts[3])
            await eventually(lambda: disputed(chosen) == 3)

    with open_evidence(chosen) as evidence:
        list_disputes(evidence, None, 10, option="--bootstrap", as_json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["disputes"]
    assert sorted(row["sequence"] for row in found) == [1, 2, 3]
    first = next(row for row in found if row["sequence"] == 1)
    assert (first["rule"], first["expected"]) == ("response_hash", "0x" + OTHER.hex())
    shows = {}
    for number in (1, 2, 3):
        file = tmp_path / f"{number}.json"
        with open_evidence(chosen) as evidence:
            export(evidence, str(number), file, as_json=False)
        shows[number] = check_dispute_file(from_json(file.read_text()))[1]
    assert shows == {1: Finding.STATED, 2: Finding.UNSOUND, 3: Finding.UNSOUND}
    capsys.readouterr()
    with open_evidence(chosen) as evidence:
        show_dispute(evidence, "2", as_json=False)
        assert "broken: breach" in capsys.readouterr().out
        show_dispute(evidence, first["task_id"], as_json=False)
        assert "signed word against the node's" in capsys.readouterr().out
        with pytest.raises(DisputeError, match="no dispute is named 4"):
            show_dispute(evidence, "4", as_json=False)


@trio_test
async def test_a_price_list_is_signed_for_each_session_and_kept(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap:
        wires = []
        for price in ("0.001", "0.002"):
            chosen = settings(
                tmp_path, bootstrap, prices={"currency": "USD", "per_second": {"NVIDIA GeForce RTX 4090": price}}
            )
            async with a_node(chosen):
                await eventually(lambda: len(bootstrap.hellos) == len(wires) + 1)
                hello = bootstrap.hellos[-1]
                signed = check_price_list(hello.prices, NODE.address, hello.session, CHAIN_ID)
                assert signed.price_list.per_second == f"RTX4090={price}"
                wires.append(hello.prices)
        with closing(sqlite3.connect(f"file:{tmp_path / 'ledger.db'}?mode=ro", uri=True)) as ledger:
            assert {wire for (wire,) in ledger.execute("SELECT signed_list FROM price_lists")} == set(wires)
        async with a_node(settings(tmp_path, bootstrap)):
            await eventually(lambda: len(bootstrap.hellos) == 3)
            assert bootstrap.hellos[-1].prices == b"", "an owner who asks nothing says nothing"


@trio_test
async def test_what_a_bootstrap_claims_to_lack_is_kept_if_it_is_signed_and_of_this_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    write_keystore(data / "keystore.json", NODE, "pw", Kdf.LIGHT)

    def claims() -> list[tuple[int, int]]:
        with closing(sqlite3.connect(f"file:{data / 'ledger.db'}?mode=ro", uri=True)) as ledger:
            return ledger.execute("SELECT from_sequence, to_sequence FROM gap_claims").fetchall()

    async with a_bootstrap() as bootstrap:
        chosen = settings(data, bootstrap)
        async with a_node(chosen) as node, a_workspace(node, echo):
            await bootstrap.wish(SPEC)
            await bootstrap.until_ready()
            receipts = []
            for number in range(4):
                receipt = (await bootstrap.ask(b"%d" % number)).receipt
                assert receipt is not None
                receipts.append(receipt)

            async def claim(first: int, last: int, by: Account) -> None:
                after = receipts[min(last, 3)]
                signed = sign_gap_claim(
                    ClaimedGap(first, last, wall_ms()),
                    after.receipt.previous,
                    node=NODE.address,
                    account=by,
                    chain_id=CHAIN_ID,
                    now_ms=wall_ms(),
                )
                await bootstrap.say_on_receipts(Gap(first, last, signed.wire))

            await claim(2, 3, STRANGER)  # another's word
            await bootstrap.say_on_receipts(Gap(2, 3, b"\x80"))
            await claim(2, 400, bootstrap.account)  # of receipts that there never were
            await claim(2, 3, bootstrap.account)
            await claim(2, 3, bootstrap.account)  # said again
            await eventually(lambda: claims() == [(2, 3)])
            # and what it asks for is given all the same
            await eventually(lambda: {receipt.receipt.sequence for _, receipt in bootstrap.offers} >= {2, 3})

    with open_evidence(chosen) as evidence:
        (row,) = evidence.rows(None, 10)
        assert (row.kind, row.sequence, row.expected) == ("withheld", 2, "receipts 2 to 3")
        assert "2 of 2 are in this ledger" in row.actual
        export(evidence, "2", tmp_path / "w.json", as_json=False)
    assert check_dispute_file(from_json((tmp_path / "w.json").read_text()))[1] is Finding.STATED
    capsys.readouterr()
    write_receipt(chosen, "2", tmp_path / "r.json", as_json=True)
    assert set(json.loads(capsys.readouterr().out)) == {"file", "receipt", "acknowledged"}
    shown = ReceiptFile.from_json((tmp_path / "r.json").read_text())
    assert shown.receipt.wire == receipts[1].wire
    hash = receipts[1].receipt.digest(CHAIN_ID).hex()
    task = shown.order.order.task_id
    for number, name in enumerate((hash[:10], "0x" + hash, task, f"{task}/1")):
        write_receipt(chosen, name, tmp_path / f"r{number}.json", as_json=False)
        assert (tmp_path / f"r{number}.json").read_text() == (tmp_path / "r.json").read_text()
    for name, problem in (("9", "no receipt here"), (f"{task}/2", "no receipt here"), ("%", "no receipt here")):
        with pytest.raises(AccountError, match=problem):
            write_receipt(chosen, name, tmp_path / "x.json", as_json=False)
    with pytest.raises(DisputeError, match="File exists"):
        write_receipt(chosen, "2", tmp_path / "r.json", as_json=False)
