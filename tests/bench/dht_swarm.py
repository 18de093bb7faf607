"""A swarm on one machine: how long lookups take, and what killing 30 % of all peers at once does to them.

    python -m tests.bench.dht_swarm [--peers 100] [--processes 10] [--json FILE]

Each process runs its share of the peers; those of the first are the bootstraps everybody else starts from. Then:

1. Three nodes advertise a GPU nobody else has; every peer looks for it, a few at a time (`found`, p50, p99).
2. The peers rest, which shows what an idle one costs. So do a real `ngpu-bootstrap` and a real `ngpu-node`, which
   joined the same DHT: what the node's whole process uses, and how much memory it has.
3. The first processes, with 30 % of all peers and every bootstrap, get SIGKILL at the same moment. From then on peers
   look for the rare GPU until all lookups of a round succeed (`recovered_s`), and one more round is measured.
4. A new peer joins, knowing only two survivors, and looks.

All on loopback and sharing the machine's cores, so the figures are those of a busy machine, not of a network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import trio

from ngpu_node.admin import ask_status
from ngpu_protocol.capabilities import Capability, capabilities_of
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_records import DEFAULT_LIFETIME_MS, NodeRecord, RecordGpu, Role, sign_node_record
from ngpu_protocol.p2p import Host, HostLimits, open_host
from ngpu_protocol.p2p.dht import Dht, DhtSettings, open_dht, wall_ms
from ngpu_protocol.p2p.directory import Directory
from tests.integration.whole_path.rig import free_port, prepare

RARE = Capability.parse("gpu:H200")
LOCAL = network_named("local")
# All peers have the same IP address here.
LIMITS = HostLimits(connections_per_ip=1024, upgrades_per_ip=256, upgrades=512)
AT_ONCE = 2
REST_S = 45.0
IDLE_S = 20.0
RECOVERY_LIMIT_S = 60.0


@dataclass
class SwarmPeer:
    account: Account
    host: Host
    dht: Dht


# -- a process of the swarm --------------------------------------------------------------------------------------------


async def serve_peers(count: int) -> None:
    """Run *count* peers and do what standard input says, a JSON line each way."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    async with contextlib.AsyncExitStack() as stack:
        peers: list[SwarmPeer] = []
        lines = trio.wrap_file(sys.stdin)
        while line := await lines.readline():
            job = json.loads(line)
            match job["do"]:
                case "start":
                    for _ in range(count):
                        seeds = job["seeds"] or [address for peer in peers[:1] for address in peer.host.addresses[:1]]
                        peers.append(await _start(stack, seeds))
                    answer: Any = [peer.host.addresses[0] for peer in peers]
                case "seeded":
                    with trio.move_on_after(30):
                        for peer in peers:
                            await peer.dht.wait_seeded()
                    answer = [len(peer.dht.table) for peer in peers]
                case "refresh":
                    for peer in peers:
                        await peer.dht.refresh()
                    answer = [len(peer.dht.table) for peer in peers]
                case "advertise":
                    answer = [await _advertise(peer) for peer in peers[: job["count"]]]
                case "look":
                    answer = [await _look(peer, job["timeout_s"]) for peer in peers]
                case _:
                    answer = {"cpu_s": time.process_time(), "rss_bytes": _rss_bytes()}
            print(json.dumps(answer), flush=True)


async def _start(stack: contextlib.AsyncExitStack, seeds: list[str]) -> SwarmPeer:
    account = Account.from_key(os.urandom(32))
    host = await stack.enter_async_context(
        open_host(account, listen=["/ip4/127.0.0.1/tcp/0"], network=LOCAL, limits=LIMITS)
    )
    dht = await stack.enter_async_context(open_dht(host, DhtSettings(seeds=tuple(seeds))))
    return SwarmPeer(account, host, dht)


async def _advertise(peer: SwarmPeer) -> str:
    now_ms = wall_ms()
    record = NodeRecord(
        network=LOCAL.name,
        node=peer.account.address,
        peer_id=peer.account.peer_id,
        sequence=now_ms,
        issued_at_ms=now_ms,
        expires_at_ms=now_ms + DEFAULT_LIFETIME_MS,
        roles=(Role.NODE,),
        addresses=tuple(peer.host.addresses),
        gpus=(RecordGpu(id=bytes(32), model=RARE.value, memory_bytes=141 << 30),),
    )
    await peer.dht.put(sign_node_record(record, peer.account, LOCAL))
    await Directory(peer.host, peer.dht).announce(capabilities_of(record))
    return peer.account.address


async def _look(peer: SwarmPeer, timeout_s: float) -> tuple[float, int]:
    began_s = time.perf_counter()
    found = await Directory(peer.host, peer.dht).find(RARE, timeout_s=timeout_s)
    return time.perf_counter() - began_s, len(found)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the coordinator ---------------------------------------------------------------------------------------------------


class Member:
    """One process of the swarm."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.dht_swarm", "--serve", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **job: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def said(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, **job: object) -> Any:
        self.tell(**job)
        return self.said()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def look_round(members: list[Member], wanted: int, timeout_s: float = 5.0) -> dict[str, Any]:
    """Have every peer look, `AT_ONCE` processes at a time; return what came of it."""
    results: list[tuple[float, int]] = []
    for at in range(0, len(members), AT_ONCE):
        group = members[at : at + AT_ONCE]
        for member in group:
            member.tell(do="look", timeout_s=timeout_s)
        for member in group:
            results.extend(member.said())
    return summary(results, wanted)


def summary(results: list[tuple[float, int]], wanted: int) -> dict[str, Any]:
    """Return the figures of a round of lookups, each ``(seconds, nodes found)``."""
    times = sorted(took_s for took_s, _ in results)
    return {
        "lookups": len(results),
        "complete": sum(found >= wanted for _, found in results),
        "p50_ms": round(statistics.median(times) * 1000, 1),
        "p99_ms": round(times[min(len(times) - 1, int(len(times) * 0.99))] * 1000, 1),
    }


class Daemons:
    """A real bootstrap and a real node in the swarm's DHT, with nothing to do."""

    def __init__(self, folder: Path, seeds: list[str]) -> None:
        discovery = ["[discovery]", f"peers = {json.dumps(seeds)}"]
        port = free_port()
        listen = [f'listen = ["/ip4/127.0.0.1/tcp/{port}"]', f'http_listen = "127.0.0.1:{free_port()}"']
        peer_id = prepare(folder / "bootstrap", [*listen, *discovery])
        bootstrap = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"
        lines = [
            'listen = ["/ip4/127.0.0.1/tcp/0"]',
            'model_listen = "127.0.0.1:0"',
            'engine = "none"',
            'region = "eu"',
        ]
        lines += ["[[bootstraps]]", f"multiaddrs = [{json.dumps(bootstrap)}]", *discovery]
        prepare(folder / "node", lines)
        self.node_folder = folder / "node"
        self._processes = [
            _started("ngpu_bootstrap", folder / "bootstrap"),
            _started("ngpu_node.cli", folder / "node"),
        ]

    def node_usage(self) -> dict[str, float]:
        """Return the node's processor time and memory so far."""
        pid = self._processes[1].pid
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        cpu_s = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
        return {"cpu_s": cpu_s, "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE")}

    def node_discovery(self) -> dict[str, Any]:
        """Return what the node says of its part in the DHT."""
        shown: dict[str, Any] = trio.run(ask_status, self.node_folder / "data" / "admin.sock")["discovery"]
        return {name: shown[name] for name in ("server", "peers_known", "record_copies")}

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _started(module: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "run", "--config", str(folder / "config.toml")]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def run_swarm(peers: int, processes: int) -> dict[str, Any]:
    """Return the figures of one run."""
    share = max(1, peers // processes)
    victims = max(1, round(processes * 0.3))
    members = [Member(share) for _ in range(processes)]
    figures: dict[str, Any] = {"peers": share * processes, "processes": processes}
    ended = contextlib.ExitStack()
    try:
        began_s = time.perf_counter()
        seeds = members[0].do(do="start", seeds=[])
        for member in members[1:]:
            member.tell(do="start", seeds=seeds[:3])
        addresses = [address for member in members[1:] for address in member.said()]
        tables = [size for member in members for size in member.do(do="seeded")]
        for member in members:
            member.do(do="refresh")
        figures["joined_s"] = round(time.perf_counter() - began_s, 1)
        figures["table_entries_at_join"] = {"least": min(tables), "median": statistics.median(tables)}
        wanted = len(members[-1].do(do="advertise", count=3))
        figures["first_lookups"] = look_round(members, wanted)
        figures["lookups"] = look_round(members, wanted)

        daemons = Daemons(Path(ended.enter_context(tempfile.TemporaryDirectory())), seeds[:3])
        ended.callback(daemons.end)
        time.sleep(REST_S)
        node_before = daemons.node_usage()
        before = [member.do(do="usage") for member in members]
        time.sleep(IDLE_S)
        after = [member.do(do="usage") for member in members]
        node_after = daemons.node_usage()
        figures["idle_ngpu_node"] = {
            "percent_of_a_core": round(100 * (node_after["cpu_s"] - node_before["cpu_s"]) / IDLE_S, 2),
            "rss_mb": round(node_after["rss_bytes"] / 1e6),
            **daemons.node_discovery(),
        }
        used_s = sum(b["cpu_s"] - a["cpu_s"] for a, b in zip(before, after, strict=True))
        figures["idle_peer_percent_of_a_core"] = round(100 * used_s / IDLE_S / (share * processes), 3)
        figures["process_rss_mb"] = round(max(usage["rss_bytes"] for usage in after) / 1e6)

        for member in members[:victims]:
            member.process.send_signal(signal.SIGKILL)
        killed_s = time.perf_counter()
        survivors = members[victims:]
        figures["killed"] = victims * share
        while True:
            after_kill = look_round(survivors, wanted)
            figures.setdefault("lookups_right_after", after_kill)
            if after_kill["complete"] == after_kill["lookups"]:
                break
            if time.perf_counter() - killed_s > RECOVERY_LIMIT_S:
                break
        figures["recovered_s"] = round(time.perf_counter() - killed_s, 1)
        figures["lookups_after_recovery"] = look_round(survivors, wanted)

        late = Member(1)
        members.append(late)
        late.do(do="start", seeds=addresses[-2:])
        late.do(do="seeded")
        figures["late_joiner"] = summary([tuple(result) for result in late.do(do="look", timeout_s=5)], wanted)
    finally:
        ended.close()
        for member in members:
            member.end()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dht_swarm", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=int, default=100)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve_peers, arguments.serve)
        return
    text = json.dumps(run_swarm(arguments.peers, arguments.processes), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
