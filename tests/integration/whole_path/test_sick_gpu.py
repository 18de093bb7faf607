"""A GPU falls off the bus under a deployment: the workspace moves to another node, and back calls come from there.

Bootstrap, two nodes and containers are real; each node's NVML answers from a file of its own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import trio

from ngpu_bootstrap.admin_socket import ask_daemon
from ngpu_protocol.http1 import Exchange
from ngpu_protocol.identity import gpu_id, parse_address
from ngpu_protocol.receipt_file import ReceiptFile
from tests.integration.node import workspace_image
from tests.integration.node.own_engine import own_engine
from tests.integration.node.rig import eventually
from tests.integration.whole_path.rig import network
from tests.integration.whole_path.test_revisions import deployments_when, patch
from tests.support.fake_nvml import FakeNvml

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc, pytest.mark.timeout_s(120)]

#: A round of vitals is due every 3 s; the rest is a container's start.
MOVED_S = 20.0


@pytest.fixture
def image() -> Iterator[str]:
    own_engine()  # with a program of the toolkit's name on its path
    reference = f"ngpu-test-{secrets.token_hex(4)}:1"
    workspace_image.build(reference)
    yield reference
    client = docker.from_env()
    client.images.remove(reference, force=True)
    client.close()


async def nothing(exchange: Exchange) -> None:
    await exchange.respond(404, [])


def ready_on(view: dict[str, Any]) -> list[str]:
    return sorted(one["node"] for one in view["deployments"] if one["state"] == "ready")


def test_a_workspace_moves_off_a_gpu_that_falls_off_the_bus_to_another_node_within_seconds(
    tmp_path: Path, image: str
) -> None:
    machines = [FakeNvml(tmp_path / f"nvml{number}") for number in range(2)]
    for number, machine in enumerate(machines):
        machine.set(0, uuid=f"GPU-0000000{number}-1111-2222-3333-444444444444")

    async def main() -> None:
        spec = {"service": None, "image": image, "env": {"WORD": "here"}, "memory_bytes": 64 << 20, "apis": []}
        environments = [machine.environment() for machine in machines]
        async with (
            network(
                tmp_path,
                nothing,
                nodes=2,
                spec={**spec, "gpu_count": 1},
                engine="docker",
                node_environments=environments,
            ) as net,
            trio.open_nursery() as nursery,
        ):
            await patch(net, {"replicas": 1})
            view = await deployments_when(net, lambda view: len(view["deployments"]) == len(ready_on(view)) == 1, 90)
            (first,) = ready_on(view)
            sick = next(n for n, daemon in enumerate(net.nodes) if daemon.where["node"] == first)
            second = str(net.nodes[1 - sick].where["node"])
            answers: list[int] = []

            async def keep_calling() -> None:
                while True:
                    answer = await net.call("GET", "/proxy/8080/")
                    answers.append(answer.status)
                    await trio.sleep(0.02)

            nursery.start_soon(keep_calling)
            await eventually(lambda: len(answers) >= 5)
            assert set(answers) == {200}
            machines[sick].set(0, error=15)
            began = time.monotonic()
            view = await deployments_when(net, lambda view: ready_on(view) == [second], 60)
            moved_s = time.monotonic() - began
            assert moved_s < MOVED_S, f"{moved_s:.1f} s"
            before = len(answers)
            await eventually(lambda: len(answers) >= before + 10)
            assert set(answers[-5:]) == {200}
            socket = net.bootstrap.folder / "data" / "admin.sock"
            shown = await trio.to_thread.run_sync(ask_daemon, socket, "GET", f"/api/v1/nodes/{first}", None)
            assert shown["node"]["gpus"] == [], "it is advertised no more"
            answer = await net.call("GET", "/proxy/8080/")
            await net.task(answer.task_id)
            document = (await net.call("GET", f"/api/v1/tasks/{answer.task_id}/receipt")).document
            receipt = ReceiptFile.from_document(document).receipt.receipt
            uuid = str(machines[1 - sick].gpus[0]["uuid"])
            assert receipt.gpus == (gpu_id(parse_address(second), uuid),), "what is paid is the GPU that did it"
            nursery.cancel_scope.cancel()
            print(f"moved after {moved_s:.1f} s")

    trio.run(main)
