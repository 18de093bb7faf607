"""`scripts/dht` and `scripts/ping` against a small network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.capabilities import capabilities_of
from ngpu_protocol.node_records import RecordGpu
from ngpu_protocol.p2p.directory import Directory
from tests.integration.p2p.dht_peers import dht_network
from tests.integration.p2p.peers import account

SCRIPTS = Path(__file__).parents[3] / "scripts"


async def run(program: str, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(SCRIPTS / program), *arguments]
    process = await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False, cwd=SCRIPTS.parent, env=_environment()
    )
    assert isinstance(process, subprocess.CompletedProcess)
    return process.returncode, process.stdout.decode(), process.stderr.decode()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}


@pytest.mark.timeout_s(180)  # six interpreters start at once
@trio_test
async def test_the_scripts_find_show_check_and_reach_a_node() -> None:
    async with dht_network(4) as peers:
        node = peers[1]
        signed = node.record(1, gpus=(RecordGpu(id=bytes(32), model="RTX4090", memory_bytes=24 << 30),))
        await node.dht.put(signed)
        await Directory(node.host, node.dht).announce(capabilities_of(signed.record))
        at = ("--peer", peers[3].host.addresses[0], "--network", "local", "--json")
        answers: dict[str, Any] = {}

        async def ask(name: str, program: str, *arguments: str) -> None:
            answers[name] = await run(program, *arguments)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "record", "dht.py", "record", node.account.address, *at)
            nursery.start_soon(ask, "find", "dht.py", "find", "gpu:rtx 4090", *at[:-1])
            nursery.start_soon(ask, "check", "dht.py", "check", node.account.address, *at)
            nursery.start_soon(ask, "ping", "ping.py", node.account.address, *at)
            nursery.start_soon(ask, "missing", "ping.py", account().address, *at)
            nursery.start_soon(ask, "wrong", "dht.py", "find", "colour:red", *at)

        assert json.loads(answers["record"][1])["node"] == node.account.address
        code, out, _ = answers["find"]
        assert code == 0
        assert out.startswith(f"{node.account.address}  RTX4090")
        assert json.loads(answers["check"][1]) == {"gpu:RTX4090": True, "role:node": True}
        reached = json.loads(answers["ping"][1])
        assert reached["ping_ms"] > 0
        assert reached["gpus"] == ["RTX4090"]
        assert answers["missing"][0] == 1
        assert "no record" in answers["missing"][1]
        code, _, error = answers["wrong"]
        assert (code, "expected kind:value" in error) == (1, True), error
