"""After outages and lost disks: what a bootstrap misses is found, asked for and filled, or disputed after an hour.

Real daemons; what a disaster takes away is taken out of their databases while they are down.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_protocol.dispute_file import Finding, Withheld, check_dispute_file, from_json
from ngpu_protocol.gap_claims import claimed_gap
from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from tests.integration.whole_path.rig import ROOT, Daemon, Network, network
from tests.integration.whole_path.test_statements import agreed, asked, command
from tests.integration.whole_path.workspace import Workspace

MODULE = "tests.integration.whole_path.at_another_time"
JSON = [(b"content-type", b"application/json")]
HOUR_S = 3700


def database(daemon: Daemon) -> Path:
    return daemon.folder / "data" / ("bootstrap.db" if daemon.folder.name == "bootstrap" else "ledger.db")


def change(daemon: Daemon, *statements: str) -> None:
    """Do to a stopped daemon's database what a bad disk does."""
    with closing(sqlite3.connect(database(daemon))) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def asks(daemon: Daemon, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{database(daemon)}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


async def until(daemon: Daemon, query: str, answer: list[tuple[Any, ...]], within_s: float = 80) -> None:
    found: list[tuple[Any, ...]] = []
    with trio.move_on_after(within_s):
        while (found := asks(daemon, query)) != answer:  # noqa: ASYNC110 (a database of another process)
            await trio.sleep(0.1)
        return
    raise AssertionError(f"{query}: {found}\n{daemon.log[-3000:]}")


async def again(net: Network, *daemons: Daemon) -> None:
    for daemon in daemons:
        await daemon.start()
    await net.connect_client()
    await net.ready()


async def same_money(net: Network, receipts: int) -> None:
    """Both sides come to the same, over so many receipts."""
    ours, theirs = await agreed(net, net.nodes[0])
    assert (ours["receipts"], theirs["receipts"]) == (receipts, receipts)
    names = ("root", "paid_receipts", "reserved_gpu_ms", "busy_gpu_ms", "billed_gpu_ms", "amounts", "price_lists")
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert ours["paid_receipts"] == receipts


async def judged(file: Path) -> dict[str, Any]:
    words = [str(ROOT / "scripts" / "verify-dispute"), str(file), "--json"]
    done = await trio.run_process(words, capture_stdout=True, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.timeout_s(240)
def test_gaps_after_an_outage_are_filled_and_what_cannot_be_is_disputed_after_an_hour(tmp_path: Path) -> None:
    workspace = Workspace()

    async def main() -> None:
        lines = ("[prices]", 'currency = "USD"', "[prices.per_second]", '"RTX 4090" = "0.00012"')
        with trio.fail_after(220):
            async with network(
                tmp_path, workspace, bootstrap_module=MODULE, node_module=MODULE, node_lines=lines
            ) as net:
                await backup_restored(net, workspace, tmp_path)
                await rows_lost(net)
                await lost_on_both_sides(net, tmp_path)

    trio.run(main)


async def backup_restored(net: Network, workspace: Workspace, tmp_path: Path) -> None:
    """The bootstrap dies while tasks run, and comes back as it was some receipts ago."""
    node, bootstrap = net.nodes[0], net.bootstrap
    for _ in range(3):
        assert (await net.call("POST", "/proxy/8080/echo", b"x")).status == 200
    await until(node, "SELECT count(*) FROM receipts WHERE acknowledgement IS NOT NULL", [(3,)])
    backup = tmp_path / "backup.db"
    with closing(sqlite3.connect(database(bootstrap))) as live, closing(sqlite3.connect(backup)) as kept:
        live.backup(kept)
    lost = [await net.call("POST", "/proxy/8080/echo", b"y") for _ in range(2)]
    await until(node, "SELECT count(*) FROM receipts WHERE acknowledgement IS NOT NULL", [(5,)])
    tasks = [(await net.call("POST", "/user/train", b'{"data": "t%d"}' % n, JSON)).document["taskId"] for n in range(3)]
    with trio.fail_after(60):
        for task in tasks:  # all of them run
            await net.task(task, lambda view: view["state"] == 2)
    await bootstrap.kill()
    workspace.gate.set()  # they end, and nobody is there to hear it
    await until(node, "SELECT count(*) FROM receipts", [(8,)])
    for suffix in ("", "-wal", "-shm"):
        (bootstrap.folder / "data" / f"bootstrap.db{suffix}").unlink(missing_ok=True)
    backup.rename(database(bootstrap))
    await again(net, bootstrap)
    # five it once knew and three it never heard of, some acknowledged and none of a task that is on file
    await until(bootstrap, "SELECT head_sequence FROM chains", [(8,)])
    await same_money(net, 8)
    # and with their orders, so that each can be shown to anybody
    answer = await net.call("GET", f"/api/v1/tasks/{lost[0].task_id}/receipt", token=None)
    file = ReceiptFile.from_document(answer.document)
    assert [one.rule for one in check_receipt_file(file) if not one.holds] == []
    assert asks(bootstrap, "SELECT count(*) FROM chain_faults") == [(0,)]


async def rows_lost(net: Network) -> None:
    """A hole in the middle: asked for and filled, while new receipts go on coming."""
    bootstrap = net.bootstrap
    await bootstrap.kill()
    change(
        bootstrap,
        "UPDATE chains SET head_hash = (SELECT hash FROM receipts WHERE sequence = 3), head_sequence = 3",
        "DELETE FROM receipts WHERE sequence IN (4, 5)",
    )
    await again(net, bootstrap)
    assert (await net.call("POST", "/proxy/8080/echo", b"z")).status == 200
    await until(bootstrap, "SELECT head_sequence FROM chains", [(9,)])
    assert '"first": 4' in bootstrap.log or "first=4" in bootstrap.log, "it was asked for"
    await same_money(net, 9)
    await until(bootstrap, "SELECT count(*) FROM chain_gaps", [(0,)])


async def lost_on_both_sides(net: Network, tmp_path: Path) -> None:
    """The node cannot give what its own disk lost too: a dispute, after an hour, with evidence on both sides."""
    node, bootstrap = net.nodes[0], net.bootstrap
    await node.kill()
    await bootstrap.kill()
    change(node, "DELETE FROM receipts WHERE sequence IN (6, 7)")
    change(
        bootstrap,
        "UPDATE chains SET head_hash = (SELECT hash FROM receipts WHERE sequence = 5), head_sequence = 5",
        "DELETE FROM receipts WHERE sequence IN (6, 7)",
    )
    await again(net, bootstrap, node)
    await until(bootstrap, "SELECT from_sequence, to_sequence, length(claim) FROM chain_gaps", [(6, 7, 0)])
    assert (await asked(bootstrap, "dispute", "list"))["disputes"] == []
    assert (await asked(node, "disputes", "list"))["disputes"] == []
    await node.kill()
    await bootstrap.kill()
    for daemon in (bootstrap, node):
        daemon.environment["NGPU_TEST_OFF_S"] = str(HOUR_S)
    await again(net, bootstrap, node)
    await until(bootstrap, "SELECT kind, sequence FROM chain_faults", [("withheld", 6)])
    await until(node, "SELECT from_sequence, to_sequence FROM gap_claims", [(6, 7)])
    # the chain goes on, and is paid
    assert (await net.call("POST", "/proxy/8080/echo", b"on")).status == 200
    await until(bootstrap, "SELECT head_sequence FROM chains", [(10,)])
    files = []
    for daemon, words in ((bootstrap, "dispute"), (node, "disputes")):
        (row,) = (await asked(daemon, words, "list"))["disputes"]
        assert (row["kind"], row["sequence"], row["expected"]) == ("withheld", 6, "receipts 6 to 7")
        files.append(tmp_path / f"{words}.json")
        await command(daemon, words, "export", "6", "--file", str(files[-1]))
        assert (await judged(files[-1]))["finding"] == "stated"
    assert files[0].read_bytes() == files[1].read_bytes(), "both hold the same evidence"
    assert "0 of 2 are in this ledger" in row["actual"]
    file = from_json(files[0].read_text())
    assert isinstance(file, Withheld)
    assert check_dispute_file(file)[1] is Finding.STATED
    claim = file.claim.observation
    assert claim.at_ms - claimed_gap(claim).asked_at_ms > 3600_000
    nodes = (await net.call("GET", "/api/v1/nodes", token=None)).document["nodes"]
    assert [one["standing"]["disputed"] for one in nodes] == [1]
    await same_money(net, 8)
