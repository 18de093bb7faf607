"""What a node's record says of it."""

from __future__ import annotations

from dataclasses import replace

from ngpu_node.advertiser import Machine, describe, record_gpus
from ngpu_node.gpus.driver import DeviceReading, MigInstance
from ngpu_node.gpus.inventory import Gpu, Inventory, InventoryState
from ngpu_protocol.capabilities import capabilities_of
from ngpu_protocol.control import DeploymentPhase, DeploymentState, ServiceOffer
from ngpu_protocol.identity import gpu_id
from ngpu_protocol.node_records import MigSlice, NodeRecord
from tests.vectors.generate import NETWORK, NODE

V100 = DeviceReading("GPU-1", "Tesla V100-SXM2-32GB", 32 << 30, 32 << 30, compute_capability="7.0")
INVENTORY = Inventory(InventoryState.OK, gpus=(Gpu(V100, 31 << 30),))


def state(workspace: str, phase: DeploymentPhase) -> DeploymentState:
    return DeploymentState(workspace, 1, phase, "", 1, bytes(32), ())


def test_a_record_names_what_is_ready_under_names_all_peers_share() -> None:
    record = describe(
        NODE,
        NETWORK,
        Machine(software="ngpu-node 1", slots=8, driver="580.65", region="EU"),
        addresses=["/ip4/192.0.2.1/tcp/4911"],
        gpus=record_gpus(INVENTORY, NODE.address, against=lambda uuid: "", held=()),
        deployments=[state("1001", DeploymentPhase.READY), state("7", DeploymentPhase.READY)]
        + [state("1002", phase) for phase in DeploymentPhase if phase is not DeploymentPhase.READY],
        services=[ServiceOffer("acme", "llama", "chat", 2)],
        slots_free=5,
    )
    assert record.workspaces == ("7", "1001")
    assert {str(capability) for capability in capabilities_of(record)} == {
        "gpu:V100-32G",
        "gpu:V100",
        "workspace:7",
        "workspace:1001",
        "model:acme/llama",
        "region:eu",
        "role:node",
    }
    assert NodeRecord.decode(record.encode()) == record


def test_a_node_without_gpus_or_addresses_has_a_record_too() -> None:
    record = describe(
        NODE,
        NETWORK,
        Machine(software="x" * 500, slots=1),
        addresses=[],
        gpus=[],
        deployments=[],
        services=[ServiceOffer("p" * 1000, "m", "chat", 1)],
        slots_free=0,
    )
    assert NodeRecord.decode(record.encode()) == record


def test_gpus_stand_in_the_record_without_their_uuids_and_a_sick_one_is_found_by_nobody() -> None:
    a100 = DeviceReading("GPU-2", "NVIDIA A100-SXM4-40GB", 40 << 30, 40 << 30, compute_capability="8.0")
    slice_ = replace(a100, uuid="MIG-3", memory_total_bytes=10 << 30, mig=MigInstance("GPU-9", 1, 0, "1g.10gb"))
    kept = Gpu(replace(V100, uuid="GPU-4"), 1, withheld="the owner keeps it")
    inventory = Inventory(InventoryState.OK, gpus=(Gpu(V100, 1), Gpu(a100, 2), Gpu(slice_, 3), kept))
    sick = {"GPU-2": "xid", "MIG-3": "gpu_lost"}
    gpus = record_gpus(inventory, NODE.address, against=lambda uuid: sick.get(uuid, ""), held=["GPU-1"])
    assert [(gpu.health, gpu.shares_free, gpu.compute_capability) for gpu in gpus] == [
        ("ok", 0, "7.0"),
        ("xid", 1, "8.0"),
        ("gpu_lost", 1, "8.0"),
    ]
    shared = record_gpus(
        inventory, NODE.address, against=lambda uuid: "", held=["GPU-1", "GPU-2", "GPU-1", "GPU-1"], shares=3
    )
    assert [gpu.shares_free for gpu in shared] == [0, 2, 3]
    assert gpus[0].id == gpu_id(NODE.address, "GPU-1")
    assert gpus[2].mig == MigSlice(profile="1g.10gb", parent=gpu_id(NODE.address, "GPU-9"))
    record = describe(
        NODE,
        NETWORK,
        Machine(software="", slots=1),
        addresses=[],
        gpus=gpus,
        deployments=[],
        services=[],
        slots_free=0,
    )
    assert not any(uuid.encode() in record.encode() for uuid in ("GPU-", "MIG-"))
    assert {str(c) for c in capabilities_of(record)} == {"gpu:V100-32G", "gpu:V100", "role:node"}
