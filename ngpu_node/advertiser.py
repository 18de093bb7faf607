"""What this node's record in the DHT says: its GPUs and what it serves, and what the owner adds.

Pure. `ngpu_daemon.advertiser` signs it, puts it into the DHT and takes it back; this decides its words. Only what is
ready is named, GPUs the owner withholds are not listed, and a workspace's id is public by design. A GPU that is sick is
listed with a word for why, and nobody finds the node by it (`capabilities`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ngpu_node.gpus.inventory import Inventory
from ngpu_protocol.control import DeploymentPhase, DeploymentState, ServiceOffer
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.identity import Account, Address, gpu_id
from ngpu_protocol.networks import Network
from ngpu_protocol.node_records import (
    MAX_ADDRESSES,
    MAX_GPUS,
    MAX_SERVED,
    WELL,
    MigSlice,
    NodeRecord,
    RecordGpu,
    RecordModel,
    RecordPrice,
    Role,
)
from ngpu_protocol.prices import Prices, amount_text

__all__ = ["Machine", "describe", "record_gpus"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while the node runs.

    Attributes:
        region: the owner's word for where it is.
        terms: the owner's terms, or where to read them.
        prices: what the owner asks for a second of each model.
    """

    software: str
    slots: int
    driver: str = ""
    cuda: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    region: str = ""
    terms: str = ""
    prices: Prices | None = None


def record_gpus(
    inventory: Inventory, node: Address, *, against: Callable[[str], str], held: Sequence[str], shares: int = 1
) -> tuple[RecordGpu, ...]:
    """Return the devices of *inventory* that the owner offers, by their public names.

    Args:
        against: returns one word for why the device with this UUID must not be used, empty where it may.
        held: UUIDs of devices that workspaces have: one as often as workspaces have it.
        shares: how many workspaces the owner lends one device to.
    """
    given = Counter(held)
    return tuple(
        RecordGpu(
            id=gpu_id(node, gpu.uuid),
            model=canonical_gpu_model(gpu.reading.model, gpu.reading.memory_total_bytes)[:64],
            name=gpu.reading.model[:256],
            memory_bytes=gpu.offered_bytes,
            compute_capability=gpu.reading.compute_capability[:64],
            health=against(gpu.uuid)[:64] or WELL,
            mig=None
            if gpu.reading.mig is None
            else MigSlice(profile=gpu.reading.mig.profile[:64], parent=gpu_id(node, gpu.reading.mig.parent_uuid)),
            shares_free=max(0, shares - given[gpu.uuid]),
        )
        for gpu in inventory.gpus
        if not gpu.withheld
    )[:MAX_GPUS]


def describe(
    account: Account,
    network: Network,
    machine: Machine,
    *,
    addresses: Sequence[str],
    gpus: Sequence[RecordGpu],
    deployments: Sequence[DeploymentState],
    services: Sequence[ServiceOffer],
    slots_free: int,
    disk_free_bytes: int = 0,
) -> NodeRecord:
    """Return the node's record, without sequence and times, which the advertiser fills in.

    Args:
        addresses: multiaddrs where others reach the node; empty for one behind NAT.
    """
    ready = {d.workspace for d in deployments if d.state == DeploymentPhase.READY}
    return NodeRecord(
        network=network.name,
        node=account.address,
        peer_id=account.peer_id,
        sequence=0,
        issued_at_ms=0,
        expires_at_ms=0,
        roles=(Role.NODE,),
        addresses=tuple(addresses[:MAX_ADDRESSES]),
        gpus=tuple(gpus[:MAX_GPUS]),
        driver=machine.driver[:64],
        cuda=machine.cuda[:64],
        slots=machine.slots,
        slots_free=slots_free,
        cpus=machine.cpus,
        memory_bytes=machine.memory_bytes,
        disk_free_bytes=disk_free_bytes,
        workspaces=tuple(sorted(ready, key=lambda id_: (len(id_), id_))[:MAX_SERVED]),
        models=tuple(
            RecordModel(project=s.project[:256], model=s.model[:256], type=s.type[:256], copies=s.copies)
            for s in services[:MAX_SERVED]
        ),
        region=machine.region[:64],
        terms=machine.terms[:256],
        currency=machine.prices.currency if machine.prices else "",
        prices=tuple(
            RecordPrice(model=model, per_second=amount_text(amount))
            for model, amount in (machine.prices.per_second.items() if machine.prices else ())
        ),
        software=machine.software[:64],
    )
