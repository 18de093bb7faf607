"""What a node's record says of it."""

from __future__ import annotations

from ngpu_node.advertiser import Machine, describe
from ngpu_protocol.capabilities import capabilities_of
from ngpu_protocol.control import DeploymentPhase, DeploymentState, GpuOffer, ServiceOffer
from ngpu_protocol.node_records import NodeRecord
from tests.vectors.generate import NETWORK, NODE


def state(workspace: str, phase: DeploymentPhase) -> DeploymentState:
    return DeploymentState(workspace, 1, phase, "", 1, bytes(32), ())


def test_a_record_names_what_is_ready_under_names_all_peers_share() -> None:
    record = describe(
        NODE,
        NETWORK,
        Machine(software="ngpu-node 1", slots=8, driver="580.65", region="EU"),
        addresses=["/ip4/192.0.2.1/tcp/4911"],
        gpus=[GpuOffer(bytes(32), "Tesla V100-SXM2-32GB", 32 << 30)],
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
