"""How fast workspaces come up and come back, and what keeping many costs: `python -m tests.bench.workspaces`.

Needs a Docker engine. The daemons are processes, as an operator runs them; the client speaks HTTP to the bootstrap.

    cold start       from the moment the bootstrap is told of a workspace whose image is on the engine, to the first
                     answer of the workspace through the whole path; for a static program of 1 MB, and for the chat
                     example, a Python program that loads its model
    adoption         from the start of a daemon after `kill -9`, to the first answer through the whole path from the
                     container that ran all the time
    many             the node's share of one core while 50 deployments are ready and nobody calls
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import docker
import httpx
from rich.console import Console
from rich.table import Table

from examples.demo.image import build_chat_image
from examples.demo.network import LocalNetwork, NodePeer, Process, installed_command, run_command
from tests.bench.processes import tree_cpu_seconds
from tests.integration.node import workspace_image

COLD_START_S = 1.5
ADOPTION_S = 5.0
MANY_SHARE = 0.03
ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.005
SETTLE_S = 10.0


class Bench:
    """A bootstrap and a node, and a client of them."""

    def __init__(self, folder: Path) -> None:
        self.network = LocalNetwork(folder, nodes=1, docker=True, say=lambda text: None, slots=64)
        self.client = httpx.Client(timeout=10)
        self.key = ""

    def start(self) -> None:
        """Start the network and make an operator key."""
        self.network.start()
        assert self.network.bootstrap is not None
        config = str(self.network.bootstrap.folder / "config.toml")
        said = run_command("ngpu-bootstrap", ["key", "add", "bench", "--config", config, "--json"])
        self.key = json.loads(said)["key"]

    @property
    def node(self) -> NodePeer:
        return self.network.nodes[0]

    def add(self, image: str, port: int, readiness_path: str = "/", share: float = 1.0) -> dict[str, Any]:
        """Tell the bootstrap of a workspace that wants *share* of a CPU; return its id and token."""
        document = {
            "name": "bench", "image": image, "ports": [port], "readiness_path": readiness_path,
            "memory_bytes": int(share * 512) << 20, "cpus": share,
        }  # fmt: skip
        answer = self.client.post(
            f"{self.network.url}/api/v1/workspaces", json=document, headers={"Authorization": f"Bearer {self.key}"}
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        token = str(found["token"])
        return {"id": token.partition("-")[0], "token": token}

    def remove(self, workspace: dict[str, Any]) -> None:
        """Take a workspace away."""
        headers = {"Authorization": f"Bearer {self.key}"}
        self.client.delete(
            f"{self.network.url}/api/v1/workspaces/{workspace['id']}", headers=headers
        ).raise_for_status()

    def first_answer(self, workspace: dict[str, Any], port: int, path: str, began_s: float) -> float:
        """Return the seconds from *began_s* to the first answer of the workspace."""
        url = f"{self.network.url}/proxy/{port}{path}"
        headers = {"Authorization": f"Bearer {workspace['token']}"}
        last = ""
        while time.monotonic() - began_s < ANSWER_TIMEOUT_S:
            try:
                answer = self.client.get(url, headers=headers)
                if answer.status_code == 200:
                    return time.monotonic() - began_s
                last = answer.text
            except httpx.HTTPError as error:
                last = str(error)
            time.sleep(POLL_S)
        raise SystemExit(f"no answer within {ANSWER_TIMEOUT_S:g} s: {last[:500]}")

    def cold_starts(self, image: str, port: int, path: str, rounds: int) -> list[float]:
        """Return how long each of *rounds* new workspaces took."""
        times = []
        for _ in range(rounds):
            began_s = time.monotonic()
            workspace = self.add(image, port, path)
            times.append(self.first_answer(workspace, port, path, began_s))
            self.remove(workspace)
        return times

    def adoptions(self, image: str, port: int, rounds: int) -> list[float]:
        """Return how long the node took to serve again after each of *rounds* kills."""
        workspace = self.add(image, port)
        self.first_answer(workspace, port, "/", time.monotonic())
        before = containers_of(self.node)
        times = []
        for _ in range(rounds):
            assert self.node.process is not None
            os.kill(self.node.process.pid, signal.SIGKILL)
            self.node.process.wait_stopped()
            arguments = ["run", "--config", str(self.node.folder / "config.toml")]
            began_s = time.monotonic()
            self.node.process = Process(
                self.node.name, [*installed_command("ngpu-node"), *arguments], self.node.folder / "log-again"
            )
            times.append(self.first_answer(workspace, port, "/", began_s))
            if containers_of(self.node) != before:
                raise SystemExit("the container was not adopted: another one answers")
        self.remove(workspace)
        return times

    def share_of_many(self, image: str, port: int, count: int, seconds: float) -> float:
        """Return the node's share of one core with *count* ready deployments and no calls."""
        workspaces = [self.add(image, port, share=1 / count) for _ in range(count)]
        for workspace in workspaces:
            self.first_answer(workspace, port, "/", time.monotonic())
        time.sleep(SETTLE_S)
        assert self.node.process is not None
        before, began_s = tree_cpu_seconds(self.node.process.pid), time.monotonic()
        time.sleep(seconds)
        used_s = tree_cpu_seconds(self.node.process.pid) - before
        share = used_s / (time.monotonic() - began_s)
        if len(containers_of(self.node)) != count:
            raise SystemExit(f"{len(containers_of(self.node))} containers run, not {count}")
        return share


def containers_of(node: NodePeer) -> set[str]:
    """Return the ids of the node's running containers."""
    client = docker.from_env()
    try:
        found = client.api.containers(filters={"label": f"org.ngpu.node={node.address}"})
        return {one["Id"] for one in found}
    finally:
        client.close()


def main() -> int:
    """Return the exit code: 1 where a figure asked for was not reached and --strict was given."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.workspaces", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of cold starts and adoptions (default 5)")
    parser.add_argument("--many", type=int, default=50, help="deployments on one node (default 50)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long they are watched (default 30)")
    parser.add_argument("--only", nargs="+", choices=("small", "chat", "adoption", "many"))
    parser.add_argument("--strict", action="store_true", help="exit 1 when a figure asked for is not reached")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    arguments = parser.parse_args()
    wanted = set(arguments.only or ("small", "chat", "adoption", "many"))
    run_id = secrets.token_hex(4)
    small = f"ngpu-bench:{run_id}"
    workspace_image.build(small)
    chat = build_chat_image(run_id, None, lambda text: None) if "chat" in wanted else None
    rows: list[tuple[str, str, list[float], bool]] = []
    with tempfile.TemporaryDirectory(prefix="ngpu-bench-") as folder:
        bench = Bench(Path(folder) / "n")
        try:
            bench.start()
            if "small" in wanted:
                times = bench.cold_starts(small, 8080, "/", arguments.rounds)
                rows.append(("cold start, static program", f"under {COLD_START_S} s", times, max(times) < COLD_START_S))
            if chat is not None:
                times = bench.cold_starts(chat.reference, 8000, "/health", arguments.rounds)
                rows.append(("cold start, chat example", f"under {COLD_START_S} s", times, max(times) < COLD_START_S))
            if "adoption" in wanted:
                times = bench.adoptions(small, 8080, arguments.rounds)
                rows.append(("adoption after kill -9", f"under {ADOPTION_S:g} s", times, max(times) < ADOPTION_S))
            if "many" in wanted:
                share = bench.share_of_many(small, 8080, arguments.many, arguments.seconds)
                what = f"{arguments.many} deployments, share of a core"
                rows.append((what, f"under {MANY_SHARE:.0%}", [share], share < MANY_SHARE))
        finally:
            bench.network.stop()
            if chat is not None:
                chat.remove()
            client = docker.from_env()
            client.images.remove(small, force=True)
            client.close()
    show(rows)
    if arguments.json:
        document = [{"what": what, "wanted": goal, "values": values, "met": met} for what, goal, values, met in rows]
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if arguments.strict and not all(met for *_, met in rows) else 0


def show(rows: list[tuple[str, str, list[float], bool]]) -> None:
    """Print what was measured."""
    table = Table("figure", "wanted", "median", "worst", "rounds", "met")
    for what, goal, values, met in rows:
        form = (lambda value: f"{value:.1%}") if "share" in what else (lambda value: f"{value:.2f} s")
        table.add_row(
            what, goal, form(statistics.median(values)), form(max(values)), str(len(values)), "yes" if met else "NO"
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
