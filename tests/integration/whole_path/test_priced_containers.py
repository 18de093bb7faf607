"""What containers use of GPUs is money, and both sides come to the same: a real engine, an NVML that a file describes.

The file says of the container's own process, by the number the kernel gave it, that it keeps the device busy; which
container that is, the node finds by its control group.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import docker
import pytest
import trio

from ngpu_protocol.http1 import HttpError
from ngpu_protocol.receipt_file import ReceiptFile
from tests.integration.images.test_whole_way import the_workspace_as_blobs
from tests.integration.node.own_engine import own_engine
from tests.integration.whole_path.rig import ROOT, Network, network
from tests.integration.whole_path.test_statements import agreed, command
from tests.integration.whole_path.workspace import Workspace
from tests.support.fake_nvml import FakeNvml
from tests.support.fake_registry import a_registry

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]

PRICE = "0.00012"
BUSY = 60
PERIOD_S = 1 / 6
SEED = 20261127


@contextmanager
def containers_removed() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    before = {one.id for one in client.containers.list(all=True)}
    try:
        yield client
    finally:
        for one in client.containers.list(all=True):
            if one.id not in before:
                one.remove(force=True)
        client.close()


async def keep_busy(machine: FakeNvml, pid: int) -> None:
    """Have the driver note, six times a second, that the container's process used the device."""
    machine.add(f"gpu0.process {pid} 1073741824")
    while True:
        machine.lines = [*machine.lines[-100:], f"gpu0.sample {time.time_ns() // 1000} {pid} {BUSY}"]
        if not any(line.startswith("gpu0.process") for line in machine.lines):
            machine.lines.insert(0, f"gpu0.process {pid} 1073741824")
        machine.write()
        await trio.sleep(PERIOD_S)


async def verify(*arguments: str) -> dict[str, Any]:
    words = [str(ROOT / "scripts" / "verify-statement"), *arguments, "--json"]
    done = await trio.run_process(words, capture_stdout=True, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    return document


async def same_money(net: Network) -> dict[str, Any]:
    """Both sides' accounts are one, to the last digit; return it."""
    ours, theirs = await agreed(net, net.nodes[0])
    apart = ("at_ms", "waiting_receipts", "signature", "other_bootstraps")
    assert {k: v for k, v in ours.items() if k not in apart} == {k: v for k, v in theirs.items() if k not in apart}
    (row,) = ours["gpus"]
    assert (row["model"], row["price_per_s"], row["currency"]) == ("RTX4090", PRICE, "USD")
    owed = Decimal(PRICE) * ours["billed_gpu_ms"] / 1000
    assert [(one["currency"], Decimal(one["amount"])) for one in ours["amounts"]] == [("USD", owed)]
    return ours


@pytest.mark.timeout_s(200)
def test_a_containers_gpu_time_is_metered_priced_and_stated_alike_after_crashes_of_both(tmp_path: Path) -> None:
    own_engine()  # one that takes requests for GPUs
    machine = FakeNvml(tmp_path / "nvml")
    machine.set(0, name="NVIDIA GeForce RTX 4090", memory_total=24 << 30)

    async def main(host: str, reference: str, client: docker.DockerClient) -> None:
        lines = (
            "[images]",
            f"registries = [{json.dumps(host)}]",
            "disk_reserve_bytes = 0",
            "[prices]",
            'currency = "USD"',
            "[prices.per_second]",
            f'"NVIDIA GeForce RTX 4090" = "{PRICE}"',
        )
        spec = {"service": None, "image": reference, "gpu_count": 1, "gpu_types": ["RTX4090"], "apis": []}
        with trio.fail_after(180):
            async with network(
                tmp_path,
                Workspace(),
                spec=spec,
                engine="docker",
                node_lines=lines,
                node_environments=[machine.environment()],
            ) as net:
                (container,) = client.containers.list(filters={"label": "ngpu.workspace"}) or client.containers.list()
                pid = container.attrs["State"]["Pid"]
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keep_busy, machine, pid)
                    await metered_and_stated(net, tmp_path)
                    await crashed(net)
                    nursery.cancel_scope.cancel()

    with a_registry() as registry, containers_removed() as client:
        made = the_workspace_as_blobs()
        reference = registry.push(made, f"priced-{secrets.token_hex(4)}", "1")
        trio.run(main, registry.host, reference, client)


async def metered_and_stated(net: Network, tmp_path: Path) -> None:
    await trio.sleep(1)  # what the driver notes before a task is nobody's
    answers = [await net.call("GET", "/proxy/8080/slow") for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
    errors_ms = []  # beyond what is allowed
    for answer in answers:
        await net.task(answer.task_id, lambda view: view["verdict"] == "verified")
        shown = (await net.call("GET", f"/api/v1/tasks/{answer.task_id}/receipt", token=None)).document
        receipt = ReceiptFile.from_document(shown).receipt.receipt
        assert (receipt.meter, len(receipt.gpus)) == ("nvml-process", 1)
        assert receipt.reserved_gpu_ms >= 500
        # within 5 % or one sample period
        true_ms = receipt.reserved_gpu_ms * BUSY / 100
        errors_ms.append(abs(receipt.busy_gpu_ms - true_ms) - max(true_ms * 0.05, PERIOD_S * 1000) - 5)
    # one of them may have run while the driver's own clockwork, which is this process, stood still
    assert sorted(errors_ms)[2] <= 0, errors_ms
    account = await same_money(net)
    assert account["billed_gpu_ms"] == account["busy_gpu_ms"] > 0

    # what an auditor needs: the statement, and a receipt that must be in it
    node = net.nodes[0]
    whole, proof, held = (tmp_path / name for name in ("statement.json", "proof.json", "receipt.json"))
    make = ("statement", str(node.where["node"]), "--file")
    await command(net.bootstrap, *make, str(whole))
    await command(net.bootstrap, *make, str(proof), "--proof", "2")
    await command(node, "receipt", answers[1].task_id, "--file", str(held))
    judged = await verify(str(whole), "--receipt", str(held))
    assert (judged["ok"], judged["billed_gpu_ms"]) == (True, account["billed_gpu_ms"])
    assert (await verify(str(proof)))["ok"]
    table = (await command(node, "earnings")).stdout.decode()
    assert "RTX4090" in table
    assert PRICE in table


async def crashed(net: Network) -> None:
    """Kills of both at random moments, with clients that come again: the sums stay one."""
    chance = random.Random(SEED)
    until, done = trio.Event(), []

    async def client() -> None:
        while not until.is_set():
            try:
                done.append((await net.call("GET", "/proxy/8080/slow")).status)
            except (HttpError, OSError):
                await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(client)
        for victim in (net.bootstrap, net.nodes[0]):
            await trio.sleep(0.5 + chance.random())
            await victim.kill()
            await victim.start()
            if victim is net.bootstrap:
                await net.connect_client()
            await net.ready()
        await trio.sleep(1)
        until.set()
    account = await same_money(net)
    assert account["paid_receipts"] >= 4 + done.count(200)
    assert len(account["price_lists"]) == 1, "two sessions that ask the same"
