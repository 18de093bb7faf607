"""What programs on this machine may ask about other peers: who is there, what they offer, what their machines are.

Answered from what this node sees itself, its connections and the signed records in the DHT, and never on a peer's
unsigned word. No bootstrap is needed. A peer is named by its PeerId, or by its account address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ngpu_daemon.discovery import Discovery
from ngpu_node.errors import CallRefused
from ngpu_node.gateway import BAD_PARAMETER, NOBODY
from ngpu_node.gpus.machine import Machine
from ngpu_node.services import TYPES, ModelServers
from ngpu_protocol.capabilities import Capability, CapabilityKind
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import Address, address_of_peer_id, parse_address
from ngpu_protocol.node_records import NodeRecord
from ngpu_protocol.p2p import Host

# As go-libp2p counts them, for which these calls were written.
NOT_CONNECTED, CONNECTED, CAN_CONNECT = 0, 1, 2
_TYPE_NUMBERS = {name: number for number, name in TYPES.items()}


class PeerCalls:
    """The answers.

    Args:
        own_machine: what this machine is.
    """

    def __init__(
        self,
        host: Host,
        discovery: Discovery,
        servers: ModelServers,
        node: Address,
        own_machine: Callable[[], Machine],
        own_record: Callable[[], NodeRecord],
    ) -> None:
        self._host = host
        self._discovery = discovery
        self._servers = servers
        self._node = node
        self._own_machine = own_machine
        self._own_record = own_record

    def connected(self) -> dict[str, Any]:
        """Return who is connected: address, latency in microseconds, direction."""
        return {
            "data": [
                {
                    "node_id": peer.peer_id,
                    "address": peer.remote,
                    "latency": _microseconds(peer.rtt_s),
                    "direction": "inbound" if peer.inbound else "outbound",
                }
                for peer in self._host.peers()
            ]
        }

    def known(self) -> dict[str, Any]:
        """Return the ids of the peers this node knows, connected or not."""
        return {"data": sorted({*self._discovery.known_peers(), *(peer.peer_id for peer in self._host.peers())})}

    async def peer(self, node_id: str) -> dict[str, Any]:
        """Return what a peer says about itself in its record."""
        record = await self._record(node_id)
        return {
            "data": {
                "peer_id": record.peer_id,
                "node": record.node,
                "agent_version": record.software,
                "addresses": list(record.addresses),
                "roles": list(record.roles),
                "region": record.region,
                "connectivity": self._connectivity(record),
                "latency": _microseconds(self._host.round_trip_s(record.peer_id)),
            }
        }

    async def host_info(self, node_id: str) -> dict[str, Any]:
        """Return a peer's machine: its record holds no operating system and no CPU model, so those are this node's
        alone."""
        record = await self._record(node_id)
        # in a thread: it looks at files, and asks a program for its version
        here = await trio.to_thread.run_sync(self._own_machine) if record.node == self._node else None
        return {
            "data": {
                "node_id": record.peer_id,
                "os": "" if here is None else f"{here.system or 'Linux'}, {here.kernel}",
                "cpu": {"model": "" if here is None else here.cpu_model or "", "cores": record.cpus},
                "memory_bytes": record.memory_bytes,
                "disk_free_bytes": record.disk_free_bytes,
                "gpus": [
                    {"model": gpu.name or gpu.model, "memory_bytes": gpu.memory_bytes, "health": gpu.health}
                    for gpu in record.gpus
                ],
                "driver": record.driver,
                "cuda": record.cuda,
            }
        }

    async def peers_of(self, project: str, model: str, number: int) -> dict[str, Any]:
        """Return up to *number* nodes that serve a model, those that are connected and near first."""
        found = await self._discovery.find(Capability.of(CapabilityKind.MODEL, f"{project}/{model}"))
        records = {one.signed.record.peer_id: one.signed.record for one in found}
        shown = [
            {
                "node_id": peer_id,
                "connectivity": self._connectivity(record),
                "latency": _microseconds(self._host.round_trip_s(peer_id)),
            }
            for peer_id, record in records.items()
        ]
        if self._serves(project, model):
            shown = [one for one in shown if one["node_id"] != self._host.peer_id]
            shown.append({"node_id": self._host.peer_id, "connectivity": CONNECTED, "latency": 0})
        shown.sort(key=lambda one: (one["connectivity"] != CONNECTED, one["latency"], one["node_id"]))
        return {"data": shown[:number]}

    async def models_of(self, node_id: str) -> dict[str, Any]:
        """Return a peer's models by project. Where they listen and what tells copies apart is told of this node's own
        alone: a record does not publish it."""
        projects: dict[str, list[dict[str, Any]]] = {}
        address = _address(node_id)
        if address == self._node:
            for copy in self._servers.copies():
                one = copy.registration
                idle = int(copy.healthy and copy.upstream.running == 0)
                entry = {"model": one.model, "api": one.api, "type": one.type, "cid": one.cid, "idle": idle}
                projects.setdefault(one.project, []).append(entry)
            return {"data": projects}
        record = await self._record(node_id)
        for model in record.models:
            number = _TYPE_NUMBERS.get(model.type, 0)
            idle = min(model.copies, record.slots_free)
            entry = {"model": model.model, "api": "", "type": number, "cid": "", "idle": idle}
            projects.setdefault(model.project, []).append(entry)
        return {"data": projects}

    async def _record(self, node_id: str) -> NodeRecord:
        address = _address(node_id)
        if address == self._node:
            return self._own_record()
        directory = self._discovery.directory
        signed = await directory.record(address) if directory is not None else None
        if signed is None:
            raise CallRefused(404, NOBODY, f"no record of {node_id} is to be found: it is gone, or hides")
        return signed.record

    def _connectivity(self, record: NodeRecord) -> int:
        if record.node == self._node or self._host.is_connected(record.peer_id):
            return CONNECTED
        return CAN_CONNECT if record.addresses else NOT_CONNECTED

    def _serves(self, project: str, model: str) -> bool:
        return bool(self._servers.healthy(project, model))


def _address(node_id: str) -> Address:
    try:
        return parse_address(node_id) if node_id.startswith("0x") else address_of_peer_id(node_id)
    except AddressError as error:
        raise CallRefused(400, BAD_PARAMETER, f"node_id: {error}") from None


def _microseconds(seconds: float | None) -> int:
    return 0 if seconds is None else round(seconds * 1e6)
