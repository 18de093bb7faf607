"""Nodes whose clocks are ten minutes off work, are paid, and are not taken for frauds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio

from ngpu_bootstrap.admin_socket import ask_daemon
from ngpu_protocol.acknowledgements import own_duration_ms
from ngpu_protocol.receipt_file import ReceiptFile, check_receipt_file
from tests.integration.whole_path.rig import Network, network
from tests.integration.whole_path.test_statements import agreed
from tests.integration.whole_path.workspace import Workspace

OFF_MS = 600_000


async def receipt_of(net: Network, task_id: str) -> ReceiptFile:
    return ReceiptFile.from_document((await net.call("GET", f"/api/v1/tasks/{task_id}/receipt", token=None)).document)


@pytest.mark.timeout_s(240)
def test_receipts_of_nodes_ten_minutes_off_are_skew_and_paid(tmp_path: Path) -> None:
    workspace = Workspace()
    workspace.gate.set()

    async def judged(net: Network, task_id: str) -> str:
        """Check what became of one task; return which node ran it."""
        await net.task(task_id, lambda view: view["verdict"] != "")
        file = await receipt_of(net, task_id)
        assert file.acknowledgement is not None
        ack, receipt = file.acknowledgement.acknowledgement, file.receipt.receipt
        off_ms = receipt.started_at_ms - file.order.order.issued_at_ms
        assert abs(off_ms - (OFF_MS if receipt.node == net.nodes[0].where["node"] else -OFF_MS)) < 60_000
        assert (ack.verdict, ack.reason.split()[0]) == ("skew", "times")
        own_ms = own_duration_ms(ack.reason)
        assert own_ms is not None
        assert receipt.duration_ms <= own_ms + 20 + own_ms // 1000, "held to the bootstrap's own duration"
        assert [one.rule for one in check_receipt_file(file) if not one.holds] == ["times"]
        return str(receipt.node)

    async def part(net: Network) -> None:
        socket = net.bootstrap.folder / "data" / "admin.sock"
        left = {node.where["node"]: node for node in net.nodes}
        ran: Counter[str] = Counter()
        while left:
            answer = await net.call("POST", "/proxy/8080/echo", b"x" * 1000)
            assert (answer.status, answer.body) == (200, b"x" * 1000)
            submitted = await net.call("POST", "/user/train", b"{}")
            assert (await net.poll(submitted.document["taskID"]))["result_code"] == 200
            ran.update([await judged(net, task_id) for task_id in (answer.task_id, submitted.document["taskID"])])
            address, tasks = ran.most_common(1)[0]
            if tasks < 2:
                continue  # one by each
            node = left.pop(address)
            del ran[address]
            ours, theirs = await agreed(net, node)
            assert theirs["receipts"] == theirs["paid_receipts"] >= 2
            assert ours["root"] == theirs["root"]
            nodes = (await trio.to_thread.run_sync(ask_daemon, socket, "GET", "/api/v1/nodes", None))["nodes"]
            standing = next(shown["standing"] for shown in nodes if shown["node_addr"] == address)
            assert (standing["disputed"], standing["skewed"]) == (0, theirs["receipts"])
            await node.terminate()  # now the other one has to

    async def main() -> None:
        module = "tests.integration.whole_path.skewed_node"
        with trio.fail_after(220):
            async with network(tmp_path, workspace, nodes=2, node_module=module) as net:
                await part(net)

    trio.run(main)
