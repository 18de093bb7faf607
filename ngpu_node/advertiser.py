"""What this node's record in the DHT says: the values its heartbeat is made of, and what the owner adds.

Pure. `ngpu_daemon.advertiser` signs it, puts it into the DHT and takes it back; this decides its words. Only what is
ready is named, only GPUs the node offers are listed, and a workspace's id is public by design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ngpu_protocol.control import DeploymentPhase, DeploymentState, GpuOffer, ServiceOffer
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import Network
from ngpu_protocol.node_records import (
    MAX_ADDRESSES,
    MAX_GPUS,
    MAX_SERVED,
    NodeRecord,
    RecordGpu,
    RecordModel,
    Role,
)

__all__ = ["Machine", "describe"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while the node runs.

    Attributes:
        region: the owner's word for where it is.
        terms: the owner's terms, or where to read them.
    """

    software: str
    slots: int
    driver: str = ""
    cuda: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    region: str = ""
    terms: str = ""


def describe(
    account: Account,
    network: Network,
    machine: Machine,
    *,
    addresses: Sequence[str],
    gpus: Sequence[GpuOffer],
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
        gpus=tuple(
            RecordGpu(
                id=gpu.id,
                model=canonical_gpu_model(gpu.model, gpu.memory_bytes),
                name=gpu.model[:256],
                memory_bytes=gpu.memory_bytes,
            )
            for gpu in gpus[:MAX_GPUS]
        ),
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
        software=machine.software[:64],
    )
