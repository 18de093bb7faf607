"""Disputes with their evidence, from the bootstrap's store: listed, shown, and written as files anyone can judge."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap.accounting import Books
from ngpu_bootstrap.config import BootstrapSettings, RetentionSection
from ngpu_bootstrap.disputes import Evidence, open_evidence
from ngpu_bootstrap.retention import sweep
from ngpu_bootstrap.store.store import open_store
from ngpu_daemon.disputes import DisputeError, DisputeRow, export, list_disputes, show_dispute
from ngpu_daemon.keystore import keystore_address
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.control import MAX_MESSAGE_BYTES, Ack, Gap, decode_receipts
from ngpu_protocol.dispute_file import Contradiction, Dispute, Finding, Kind, Withheld, check_dispute_file, from_json
from ngpu_protocol.gap_claims import check_gap_claim
from ngpu_protocol.observations import SignedObservation
from ngpu_protocol.p2p import P2PStream, receive_frame
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import NETWORK, Asked, ScriptedNode, connected, new_account

ROOT = Path(__file__).parents[3]


class Watcher(ScriptedNode):
    """A node that keeps acknowledgements whole."""

    acks: list[Ack]

    async def receipts_stream(self, stream: P2PStream) -> None:
        self.acks = []
        self._receipts = stream
        while (frame := await receive_frame(stream, MAX_MESSAGE_BYTES)) is not None:
            message = decode_receipts(frame)
            if isinstance(message, Ack):
                self.acks.append(message)
            elif isinstance(message, Gap):
                self.gaps.append(message)
            self.heard.set()
            self.heard = trio.Event()


def run(tmp_path: Path, test: Callable[[Bootstrap, Watcher, BootstrapSettings], Awaitable[None]]) -> None:
    settings = settings_for(tmp_path / "data")

    async def main() -> None:
        node = Watcher(new_account())
        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            await test(bootstrap, node, settings)

    trio.run(main)


def export_dispute(settings: BootstrapSettings, name: str, path: Path | None, *, as_json: bool) -> None:
    with open_evidence(settings) as evidence:
        export(evidence, name, path, as_json=as_json)


def rows(settings: BootstrapSettings) -> list[DisputeRow]:
    with Books.open(settings, keystore_address(settings.data_dir / "keystore.json")) as books:
        return Evidence(books.connection, NETWORK.chain_id).rows(None, 100)


async def verified(file: Path) -> dict[str, Any]:
    done = await trio.run_process(
        [str(ROOT / "scripts" / "verify-dispute"), str(file), "--json"], capture_stdout=True, check=False
    )
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    return document


async def says_otherwise(asked: Asked) -> None:
    body = await asked.read()
    await asked.answer(200, body, change={"response_hash": b"\3" * 32})


async def busier_than_reserved(asked: Asked) -> None:
    body = await asked.read()
    await asked.answer(200, body, change={"busy_gpu_ms": 7, "meter": "nvml-process"})


async def signed_by_another(asked: Asked) -> None:
    body = await asked.read()
    own, asked.node.account = asked.node.account, new_account()
    head, sequence = asked.node.head, asked.node.sequence
    receipt = asked.receipt(200, body)
    asked.node.account, asked.node.head, asked.node.sequence = own, head, sequence
    await asked.exchange.send_head(200, [], more=True)
    await asked.exchange.send(body, more=True)
    await asked.exchange.end([(b"ngpu-receipt", receipt.encode().encode())])


@pytest.mark.parametrize(
    ("script", "kind", "rule", "finding"),
    [
        (says_otherwise, "receipt", "response_hash", Finding.STATED),
        (busier_than_reserved, "receipt", "busy", Finding.PROVEN),
        (signed_by_another, "forged", "signer", Finding.NOT_THE_NODES),
    ],
)
def test_a_disputed_receipt_is_a_file_anyone_can_judge(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[Asked], Awaitable[None]],
    kind: str,
    rule: str,
    finding: Finding,
) -> None:
    async def test(bootstrap: Bootstrap, node: Watcher, settings: BootstrapSettings) -> None:
        await bootstrap.call("POST", "/user/draw", b"fine")
        node.script = script
        await bootstrap.call("POST", "/user/draw", b"crooked")
        await node.until(lambda: len(node.acks) == 2)
        # the node is told what was seen, and of a good receipt nothing
        assert node.acks[0].observation == b""
        said = SignedObservation.from_bytes(node.acks[1].observation).observation
        (row,) = await trio.to_thread.run_sync(rows, settings)
        assert (row.kind, row.rule, row.node, row.task_id) == (
            kind,
            rule,
            node.account.address,
            node.orders[1].order.task_id,
        )
        assert (said.rule, "0x" + said.receipt_hash.hex()) == (rule, row.receipt)
        file = tmp_path / "dispute.json"
        await trio.to_thread.run_sync(lambda: export_dispute(settings, row.task_id, file, as_json=False))
        made = from_json(file.read_text())
        assert isinstance(made, Dispute)
        assert made.observation is not None
        assert made.observation.wire == node.acks[1].observation
        judged = await verified(file)
        assert (judged["finding"], judged["rule"], judged["node"]) == (finding.value, rule, node.account.address)
        document = json.loads(file.read_text())
        document["receipt"]["receipt"]["status"] = 404  # who alters a file shows nothing
        file.write_text(json.dumps(document))
        assert (await verified(file))["finding"] == "unsound"
        with pytest.raises(DisputeError, match="File exists"):
            await trio.to_thread.run_sync(lambda: export_dispute(settings, row.task_id, file, as_json=False))

    run(tmp_path, test)
    settings = settings_for(tmp_path / "data")
    monkeypatch.setenv("COLUMNS", "200")
    with open_evidence(settings) as evidence:
        list_disputes(evidence, None, 10, option="--node", as_json=False)
        assert rule in capsys.readouterr().out
        show_dispute(evidence, rows(settings)[0].receipt[:12], as_json=True)
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["finding"], shown["dispute"]["rule"]) == (finding.value, rule)
    with open_evidence(settings) as evidence:
        list_disputes(evidence, new_account().address, 10, option="--node", as_json=False)
        assert "no disputes" in capsys.readouterr().out
        with pytest.raises(DisputeError, match="--node nobody"):
            list_disputes(evidence, "nobody", 10, option="--node", as_json=False)


def test_two_receipts_for_one_number_are_a_proof_whichever_way_the_second_came(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: Watcher, settings: BootstrapSettings) -> None:
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        await node.until(lambda: len(node.acks) == 1)
        signed = node.orders[0]
        asked = Asked(node, None, signed, signed.order.issued_at_ms)  # type: ignore[arg-type]
        await node.offer(signed, asked.receipt(200, b"x", change={"sequence": 1, "previous": bytes(32)}))
        await node.until(lambda: len(node.acks) == 2)
        node.sequence, node.head = 0, bytes(32)  # a node that forgot: its next answer's receipt is number 1 again
        assert (await bootstrap.call("POST", "/proxy/8080/", b"y")).status == 200
        await node.until(lambda: len(node.acks) == 3)
        for ack in node.acks[1:]:
            said = SignedObservation.from_bytes(ack.observation).observation
            assert (said.rule, json.loads(said.seen)["previous"]["sequence"]) == ("chain", 1)
        found = await trio.to_thread.run_sync(rows, settings)
        assert [(row.kind, row.sequence) for row in found] == [("equivocation", 1)] * 2
        for number, row in enumerate(found):
            file = tmp_path / f"{number}.json"
            name = row.receipt
            await trio.to_thread.run_sync(
                lambda name=name, file=file: export_dispute(settings, name, file, as_json=True)
            )
            judged = await verified(file)
            assert (judged["finding"], judged["kind"], judged["sequence"]) == ("proven", "equivocation", "1")
        with pytest.raises(DisputeError, match="2 disputes are named 1; give the receipt's hash"):
            await trio.to_thread.run_sync(lambda: export_dispute(settings, "1", None, as_json=True))
        [shown] = (await bootstrap.admin("GET", "/api/v1/nodes"))["nodes"]
        assert shown["standing"]["disputed"] == 2

    run(tmp_path, test)


def test_a_successor_that_names_another_predecessor_is_a_proof(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: Watcher, settings: BootstrapSettings) -> None:
        for body in (b"1", b"2"):
            await bootstrap.call("POST", "/proxy/8080/", body)
        await node.until(lambda: len(node.acks) == 2)
        node.sequence = 3  # number 4 arrives first, and names a third that never was
        node.head = b"\7" * 32
        await bootstrap.call("POST", "/proxy/8080/", b"4")
        signed = node.orders[2]
        asked = Asked(node, None, node.orders[1], signed.order.issued_at_ms)  # type: ignore[arg-type]
        await node.until(lambda: len(node.acks) == 3)
        await node.offer(
            node.orders[1], asked.receipt(200, b"2", change={"sequence": 3, "previous": node_head(node, 2)})
        )
        await node.until(lambda: len(node.acks) == 4)
        found = [row for row in await trio.to_thread.run_sync(rows, settings) if row.kind == "broken_link"]
        assert [row.sequence for row in found] == [4]
        # a break is held against the node also where its receipts were judged before it was seen
        view = await bootstrap.admin("GET", f"/api/v1/nodes/{node.account.address}")
        assert view["standing"]["rules"] == {"once": 1, "chain": 1}

        def made() -> Contradiction:
            with Books.open(settings, keystore_address(settings.data_dir / "keystore.json")) as books:
                file = Evidence(books.connection, NETWORK.chain_id).file(found[0])
            assert isinstance(file, Contradiction)
            return file

        file = await trio.to_thread.run_sync(made)
        assert (file.kind, check_dispute_file(file)[1]) == (Kind.BROKEN_LINK, Finding.PROVEN)

    run(tmp_path, test)


def node_head(node: Watcher, sequence: int) -> bytes:
    """Return the hash of the receipt the bootstrap acknowledged as number *sequence*."""
    acks = [SignedAcknowledgement.from_bytes(ack.acknowledgement).acknowledgement for ack in node.acks]
    return next(ack.receipt_hash for ack in acks if ack.sequence == sequence)


def test_evidence_outlives_the_task_it_is_about(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: Watcher, settings: BootstrapSettings) -> None:
        node.script = says_otherwise
        await bootstrap.call("POST", "/user/draw", b"crooked")
        await node.until(lambda: len(node.acks) == 1)

    run(tmp_path, test)
    settings = settings_for(tmp_path / "data")

    async def forget() -> None:
        data = settings.data_dir
        address = keystore_address(data / "keystore.json")
        async with open_store(
            data / "bootstrap.db", network="local", bootstrap=address, bodies=data / "bodies"
        ) as store:
            assert await sweep(store, RetentionSection(days=0.000001), 2**50) == 1

    trio.run(forget)
    (row,) = rows(settings)
    export_dispute(settings, row.task_id, tmp_path / "d.json", as_json=True)
    assert check_dispute_file(from_json((tmp_path / "d.json").read_text()))[1] is Finding.STATED


def test_receipts_that_never_came_are_disputed_with_what_the_node_signed_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("GAP_CHECK_S", 0.05), ("GAP_DISPUTED_S", 0.1), ("ANSWER_S", 0.0)):
        monkeypatch.setattr(f"ngpu_bootstrap.dispatch.gaps.{name}", value)

    async def test(bootstrap: Bootstrap, node: Watcher, settings: BootstrapSettings) -> None:
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        node.sequence += 2
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        with trio.fail_after(60):
            while not (found := await trio.to_thread.run_sync(rows, settings)):  # noqa: ASYNC110 (a database)
                await trio.sleep(0.05)
        assert [(row.kind, row.sequence, row.expected) for row in found] == [("withheld", 2, "receipts 2 to 3")]
        await node.until(lambda: bool(node.gaps) and node.gaps[-1].claim != b"")
        gap = node.gaps[-1]
        assert (gap.from_sequence, gap.to_sequence) == (2, 3)
        claim = check_gap_claim(
            gap.claim,
            node=node.account.address,
            bootstrap=keystore_address(settings.data_dir / "keystore.json"),
            chain_id=NETWORK.chain_id,
        )
        [shown] = (await bootstrap.admin("GET", "/api/v1/nodes"))["nodes"]
        assert (shown["standing"]["disputed"], shown["standing"]["rules"]) == (1, {"chain": 1})
        file = tmp_path / "withheld.json"
        await trio.to_thread.run_sync(lambda: export_dispute(settings, "2", file, as_json=True))
        made = from_json(file.read_text())
        assert isinstance(made, Withheld)
        assert (made.claim.wire, made.after.receipt.sequence) == (claim.wire, 4)
        assert (await verified(file))["finding"] == "stated"
        # it is over: nothing more is asked on this connection, and the chain goes on
        asked = len(node.gaps)
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        await trio.sleep(0.3)
        assert len(node.gaps) == asked

    run(tmp_path, test)
    settings = settings_for(tmp_path / "data")
    with open_evidence(settings) as evidence:
        show_dispute(evidence, "2", as_json=False)
        assert "signed word against the node's" in capsys.readouterr().out
        with pytest.raises(DisputeError, match="no dispute is named 9"):
            export(evidence, "9", tmp_path / "x.json", as_json=False)
