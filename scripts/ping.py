"""Reach a node through the DHT, measure the round trip, and show what it says about itself. Started by `scripts/ping`.

Reads the node's signed record, dials its addresses in turn, direct before relayed, pings over the connection, and asks
it to identify itself. A node behind NAT is reached through a relay, and `direct` says whether a direct connection came
about from there.

Exit code 0 when it answered, 1 otherwise.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import trio
from dht_guest import NobodyThere, add_arguments, guest

from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.node_records import SignedNodeRecord, dial_addresses
from ngpu_protocol.p2p import Host, P2PError
from ngpu_protocol.p2p.identify import identify, ping

DIAL_S = 5.0
#: How long a relayed connection may take to become a direct one before it is measured as it is.
DIRECT_S = 4.0


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/ping", description="Reach a node through the DHT.")
    parser.add_argument("node", help="its nodeAddr")
    parser.add_argument("--count", type=int, default=5, help="pings to send (default 5)")
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        report = trio.run(_run, parse_address(arguments.node), arguments)
    except (NobodyThere, AddressError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:12} {value}")
    return 0 if "error" not in report else 1


async def _run(node: Address, arguments: argparse.Namespace) -> dict[str, Any]:
    async with guest(arguments.network, arguments.peer) as (host, dht):
        signed = await dht.get(node)
        if signed is None or signed.record.withdrawn:
            return {"node": node, "error": "it has no record in the DHT" if signed is None else "it has withdrawn"}
        return await _reach(host, signed, arguments.count)


async def _reach(host: Host, signed: SignedNodeRecord, count: int) -> dict[str, Any]:
    record = signed.record
    report: dict[str, Any] = {"node": record.node, "peer_id": record.peer_id}
    problems = []
    began_s = time.perf_counter()
    for address in dial_addresses(record):
        try:
            await host.connect(address, timeout_s=DIAL_S)
        except P2PError as error:
            problems.append(str(error))
            continue
        report["address"] = address
        break
    else:
        return report | {"error": "; ".join(problems) or "its record has no address"}
    report["dialled_ms"] = round((time.perf_counter() - began_s) * 1000, 1)
    if not host.is_directly_connected(record.peer_id):
        # The node tries to come to us directly, where the NATs between allow it.
        with trio.move_on_after(DIRECT_S):
            while not host.is_directly_connected(record.peer_id):  # noqa: ASYNC110  the host tells of peers, not of this
                await trio.sleep(0.05)
        report["direct"] = host.is_directly_connected(record.peer_id)
    try:
        trips = [await ping(host, record.peer_id, timeout_s=DIAL_S) for _ in range(max(1, count))]
        said = await identify(host, record.peer_id, timeout_s=DIAL_S)
    except P2PError as error:
        return report | {"error": str(error)}
    report["ping_ms"] = round(statistics.median(trips) * 1000, 2)
    report["ping_max_ms"] = round(max(trips) * 1000, 2)
    report["says"] = record.software or said.agent
    report["protocols"] = sorted(said.protocols)
    report["gpus"] = [gpu.model for gpu in record.gpus]
    report["slots_free"] = record.slots_free
    return report


if __name__ == "__main__":
    sys.exit(main())
