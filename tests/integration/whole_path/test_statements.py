"""Both sides' books agree receipt by receipt, after crashes of both, and what says otherwise is found out."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import trio
from typer.testing import CliRunner

from ngpu_protocol.http1 import HttpError
from ngpu_protocol.statements import StatementFile
from tests.integration.whole_path.rig import ROOT, Daemon, Network, SharedNetwork
from tests.integration.whole_path.workspace import Workspace

SEED = 20261127
OWN = {"ngpu_bootstrap": "ngpu_bootstrap.cli", "ngpu_node.cli": "ngpu_node.cli"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    with SharedNetwork(tmp_path_factory.mktemp("books"), nodes=2) as network:
        yield network


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def command(daemon: Daemon, *arguments: str, check: bool = True) -> Done:
    """Run a command of *daemon*'s owner: in this process, where a new one would take a second to import the same."""
    words = [*arguments, "--config", str(daemon.folder / "config.toml")]
    if daemon.module in OWN:
        result = await trio.to_thread.run_sync(CliRunner().invoke, import_module(OWN[daemon.module]).app, words)
        done = Done(result.exit_code, result.stdout_bytes, result.stderr_bytes)
    else:
        words = [sys.executable, "-m", daemon.module, *words]
        ran = await trio.run_process(words, cwd=ROOT, capture_stdout=True, capture_stderr=True, check=False)
        done = Done(ran.returncode, ran.stdout, ran.stderr)
    if check and done.returncode:
        raise AssertionError(done.stderr.decode())
    return done


async def asked(daemon: Daemon, *arguments: str) -> Any:
    return json.loads((await command(daemon, *arguments, "--json")).stdout)


async def traffic(net: Network, until: trio.Event, done: list[int]) -> None:
    """Call as a client does that comes again when it is cut off."""
    while not until.is_set():
        try:
            answer = await net.call("POST", "/proxy/8080/echo", b"x" * 100)
            done.append(answer.status)
        except (HttpError, OSError):
            await trio.sleep(0.05)


async def agreed(net: Network, node: Daemon) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both sides' accounts once the node has every acknowledgement."""
    ours: dict[str, Any] = {}
    with trio.move_on_after(60):
        while True:
            (ours,) = (await asked(node, "earnings"))["accounts"]
            if ours["waiting_receipts"] == 0:
                break
            await trio.sleep(0.3)
    theirs = await asked(net.bootstrap, "statement", node.where["node"])
    return ours, theirs


@pytest.mark.timeout_s(240)
def test_both_sides_come_to_the_same_after_crashes_of_both(shared: SharedNetwork, tmp_path: Path) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        chance = random.Random(SEED)
        done: list[int] = []
        enough = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(traffic, net, enough, done)
            for victim in (net.bootstrap, net.nodes[0], net.nodes[1]):
                await trio.sleep(0.2 + chance.random() / 2)
                await victim.kill()
                await victim.start()
                if victim is net.bootstrap:
                    await net.connect_client()
                await net.ready()
            await trio.sleep(0.3)
            enough.set()
        answered = done.count(200)
        assert answered > 20, done

        counted = 0
        for node in net.nodes:
            ours, theirs = await agreed(net, node)
            assert ours["receipts"] > 0
            apart = ("at_ms", "waiting_receipts", "signature", "other_bootstraps")
            assert {k: v for k, v in ours.items() if k not in apart} == {
                k: v for k, v in theirs.items() if k not in apart
            }
            counted += theirs["paid_receipts"]
        assert counted >= answered, "an answered call's receipt is paid"

    shared.run(part, within_s=200)


def test_a_statement_is_checked_offline_and_against_the_owners_ledger(shared: SharedNetwork, tmp_path: Path) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        for _ in range(5):
            assert (await net.call("POST", "/proxy/8080/echo", b"y")).status == 200
        node = max(net.nodes, key=lambda daemon: str(daemon.where["node"]))
        await agreed(net, node)
        whole, proof, forged = tmp_path / "whole.json", tmp_path / "proof.json", tmp_path / "forged.json"
        make = partial(command, net.bootstrap, "statement", node.where["node"])
        assert b"signed     yes" in (await make("--file", str(whole))).stdout
        lines = json.loads(whole.read_text())["lines"]
        await make("--file", str(proof), "--proof", str(lines[-1][0]))
        assert json.loads(proof.read_text())["inclusion"]["receipt"]["receipt"]["sequence"] == lines[-1][0]

        document = json.loads(whole.read_text())
        document["lines"][0][5] = 10**9  # a line that bills more than its receipt says
        forged.write_text(json.dumps(document))
        verify = [str(ROOT / "scripts" / "verify-statement")]
        codes = {}
        for file in (whole, proof, forged):
            more = ["--lines", "--json"] if file is whole else []
            done = await trio.run_process([*verify, str(file), *more], capture_stdout=True, check=False)
            codes[file.stem] = done.returncode
            if file is whole:
                judged = json.loads(done.stdout)
            if file is forged:
                assert b"BROKEN" in done.stdout
        assert codes == {"whole": 0, "proof": 0, "forged": 1}
        assert [one["rule"] for one in judged["rules"]][-1] == "amounts"
        assert all(one["checked"] for one in judged["rules"])
        assert [line["sequence"] for line in judged["lines"]] == [str(line[0]) for line in lines]

        agrees = await command(node, "earnings", "--check", str(whole))
        assert b"agrees with this node's ledger" in agrees.stdout
        other = next(daemon for daemon in net.nodes if daemon is not node)
        differs = await command(other, "earnings", "--check", str(whole), check=False)
        assert differs.returncode == 1
        assert b"the statement is of node" in differs.stdout
        differs = await command(node, "earnings", "--check", str(forged), check=False)
        assert differs.returncode == 1
        csv = (await make("--csv")).stdout.decode().splitlines()
        assert len(csv) == 1 + len(lines)
        assert StatementFile.from_json(whole.read_text()).statement.receipts == len(lines)

    shared.run(part, within_s=120)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], b"error: 'nobody' is no nodeAddr"),
        (["0x" + "11" * 20, "--from", "soon"], b"error: --from soon: give a date"),
        (["0x" + "11" * 20, "--price", "A10"], b"error: --price A10: write MODEL=AMOUNT"),
        (["0x" + "11" * 20, "--proof", "1"], b"error: --proof needs --file"),
        (["0x" + "11" * 20, "--csv", "--file", "{tmp}/f"], b"error: give --csv or --file, not both"),
        (["0x" + "11" * 20, "--csv", "--json"], b"error: give --csv or --json, not both"),
        (["0x" + "11" * 20, "--bootstrap", "0x12"], b"error: '0x12' is no bootstrap"),
        (["0x" + "11" * 20, "--file", "{tmp}/f", "--proof", "1"], b"error: receipt 1 is not in this statement"),
    ],
)
def test_what_cannot_be_stated_is_one_line(
    shared: SharedNetwork, tmp_path: Path, arguments: list[str], said: bytes
) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        words = [word.format(tmp=tmp_path) for word in arguments]
        done = await command(net.bootstrap, "statement", *words, check=False)
        assert (done.returncode, done.stderr.splitlines()[0][: len(said)]) == (1, said)

    shared.run(part)
