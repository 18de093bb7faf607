"""Look into the DHT of a network. Started by `scripts/dht`.

Joins as a client with a key of its own, asks, and leaves. `record` shows a node's verified record; `find` the nodes
that offer something (`gpu:RTX4090`, `workspace:1001`, `model:acme/llama`, `region:eu`, `role:bootstrap`); `table` the
peers that were learnt; `check` whether a node is advertised as its record says, seen from here.

Exit code 0 when something was found, 1 otherwise.
"""

import argparse
import json
import sys
import time
from typing import Any

import trio
from dht_guest import NobodyThere, add_arguments, guest

from ngpu_protocol.capabilities import Capability, capabilities_of
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.node_records import SignedNodeRecord
from ngpu_protocol.p2p.dht import Dht
from ngpu_protocol.p2p.directory import Directory
from ngpu_protocol.p2p.kad_messages import multiaddr_text, peer_id_text


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/dht", description="Look into the DHT of a network.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, argument, about in (
        ("record", "node", "show a node's record"),
        ("find", "capability", "find the nodes that offer kind:value"),
        ("check", "node", "check that a node is found by everything its record says it offers"),
        ("table", "", "show the peers known after joining"),
    ):
        command = commands.add_parser(name, help=about)
        if argument:
            command.add_argument(argument)
        add_arguments(command)
    arguments = parser.parse_args()
    try:
        found, lines = trio.run(_run, arguments)
    except (NobodyThere, ValueError, AddressError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if arguments.json else "\n".join(lines))
    return 0 if found else 1


async def _run(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    wanted = None
    if arguments.command == "find":
        wanted = Capability.parse(arguments.capability)
    node = parse_address(arguments.node) if arguments.command in ("record", "check") else None
    async with guest(arguments.network, arguments.peer) as (host, dht):
        directory = Directory(host, dht)
        if wanted is not None:
            nodes = await directory.find(wanted)
            found = [as_json(entry.signed) for entry in nodes]
            return found, [_line(entry.signed) for entry in nodes] or [f"nobody offers {wanted}"]
        if node is None:
            await dht.refresh()
            return _table(dht)
        signed = await dht.get(node)
        if signed is None:
            return None, [f"no peer has a record of {node}"]
        if arguments.command == "record":
            return as_json(signed), _lines(signed)
        return await _check(directory, node, signed)


async def _check(directory: Directory, node: Address, signed: SignedNodeRecord) -> tuple[Any, list[str]]:
    results = {}
    for capability in sorted(capabilities_of(signed.record)):
        nodes = await directory.find(capability)
        results[str(capability)] = any(entry.node == node for entry in nodes)
    lines = [f"{'found' if ok else 'NOT FOUND'} by {capability}" for capability, ok in results.items()]
    complete = bool(results) and all(results.values())
    return (results if complete else None), lines or ["its record offers nothing (withdrawn?)"]


def _table(dht: Dht) -> tuple[Any, list[str]]:
    entries = [
        {"peer_id": peer_id_text(contact.peer.id), "addresses": [multiaddr_text(a) for a in contact.peer.addresses]}
        for contact in dht.table.contacts()
    ]
    return entries, [f"{entry['peer_id']}  {' '.join(str(a) for a in entry['addresses'])}" for entry in entries]


def as_json(signed: SignedNodeRecord) -> dict[str, Any]:
    """Return a record as JSON: bytes as 0x text."""
    plain: dict[str, Any] = json.loads(json.dumps(signed.record.model_dump(), default=lambda b: "0x" + bytes(b).hex()))
    plain["node"] = signed.record.node
    return plain


def _line(signed: SignedNodeRecord) -> str:
    record = signed.record
    gpus = ", ".join(gpu.model for gpu in record.gpus) or "no GPU"
    return f"{record.node}  {gpus}  {record.slots_free} of {record.slots} slots free  {' '.join(record.addresses)}"


def _lines(signed: SignedNodeRecord) -> list[str]:
    record = signed.record
    now_ms = time.time() * 1000
    lines = [
        f"node       {record.node}{'  WITHDRAWN' if record.withdrawn else ''}",
        f"peer       {record.peer_id}",
        f"sequence   {record.sequence}",
        f"issued     {(now_ms - record.issued_at_ms) / 1000:.0f} s ago",
        f"expires    in {(record.expires_at_ms - now_ms) / 1000:.0f} s",
        f"roles      {', '.join(record.roles)}",
        f"slots      {record.slots_free} of {record.slots} free",
        f"software   {record.software}",
    ]
    lines += [f"address    {address}" for address in record.addresses]
    lines += [f"GPU        {gpu.model}, {gpu.memory_bytes / 2**30:.0f} GiB, {gpu.health}" for gpu in record.gpus]
    lines += [f"workspace  {workspace}" for workspace in record.workspaces]
    lines += [f"model      {model.project}/{model.model} x{model.copies}" for model in record.models]
    return lines


if __name__ == "__main__":
    sys.exit(main())
