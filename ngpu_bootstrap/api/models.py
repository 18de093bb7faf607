"""What goes in and out of `/api/v1`: ids are strings, times UTC milliseconds, addresses EIP-55 text, hashes 0x text."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.workspaces import Workspace
from ngpu_bootstrap.store.records import NewReceipt, TaskDetail
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import SignedReceipt
from ngpu_protocol.workspaces import WorkspaceSpec


class ErrorView(BaseModel):
    """Every error of this API."""

    reason: str = Field(description="stable and machine-readable")
    message: str = Field(description="for people: what happened and what to change")


class HealthView(BaseModel):
    """The process lives."""

    status: str = "ok"


class ReadyView(BaseModel):
    """Whether this bootstrap can serve tasks."""

    ready: bool
    reason: str = Field(default="", description="why not; empty when it can")
    peers: int = Field(description="nodes connected")


class DeploymentView(BaseModel):
    """A workspace on a node."""

    node: str
    workspace: str
    revision: int
    state: str
    detail: str
    slots_free: int
    image_digest: str


class WorkspaceView(BaseModel):
    """A workspace as its operator sees it."""

    spec: WorkspaceSpec
    replicas: int | None
    owner: str
    created_at_ms: int
    token_labels: list[str]
    deployments: list[DeploymentView]


class CreatedWorkspaceView(BaseModel):
    """A workspace just made. The token is shown this once."""

    workspace: WorkspaceView
    token: str


class Rotation(BaseModel):
    """How a token is replaced."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: float = Field(
        default=86_400.0, ge=0, le=30 * 86_400, description="how long the tokens before go on; 0 ends them at once"
    )


class NewTokenView(BaseModel):
    """A token just made, shown this once."""

    token: str
    label: str = Field(description="its public name, the `userkey` of task details")
    others_end_at_ms: int


class WorkspaceListView(BaseModel):
    """Every workspace, oldest first."""

    workspaces: list[WorkspaceView]


class GpuView(BaseModel):
    """A GPU; its id is the hash of the node's address and the GPU's UUID."""

    id: str
    model: str
    memory_bytes: int


class ServiceView(BaseModel):
    """A model server registered with a node."""

    project: str
    model: str
    type: str
    copies: int


class NodeView(BaseModel):
    """A connected node."""

    node_addr: str
    peer_id: str
    software: str
    admitted: bool
    draining: bool
    connected_at_ms: int
    heard_at_ms: int
    slots: int
    slots_free: int
    running: int = Field(description="attempts this bootstrap runs there now")
    gpus: list[GpuView]
    services: list[ServiceView]
    deployments: list[DeploymentView]


class NodeListView(BaseModel):
    """Every connected node, by address."""

    nodes: list[NodeView]


class AttemptView(BaseModel):
    """One run of a task on one node."""

    attempt: int
    node_addr: str
    began_at_ms: int
    ended_at_ms: int | None
    outcome: str
    reason: str
    status: int


class ReceiptView(BaseModel):
    """What a node's signed receipt says, and what this bootstrap says to it."""

    attempt: int
    node_addr: str
    sequence: int
    receipt_hash: str
    verdict: str
    rule: str
    expected: str
    actual: str
    outcome: str
    meter: str
    duration_ms: int
    reserved_gpu_ms: int
    busy_gpu_ms: int
    received_at_ms: int


class TaskView(BaseModel):
    """A task, its attempts and their receipts; bodies are not part of it."""

    task_id: str
    workspace: str
    api: str
    method: str
    port: int
    target: str
    detach: bool
    state: int
    state_name: str
    result_code: int
    reason: str
    message: str
    status: int = Field(description="the workspace's own status, 0 while there is none")
    node_addr: str | None
    verdict: str
    rule: str
    accepted_at_ms: int
    dispatched_at_ms: int | None
    finished_at_ms: int | None
    deadline_at_ms: int
    attempts: list[AttemptView]
    receipts: list[ReceiptView]


def deployment_views(session: NodeSession) -> list[DeploymentView]:
    """Return what runs on a node on our account."""
    return [
        DeploymentView(
            node=session.node,
            workspace=state.workspace,
            revision=state.revision,
            state=state.state,
            detail=state.detail,
            slots_free=state.slots_free,
            image_digest="0x" + state.image_digest.hex(),
        )
        for state in session.deployments.values()
    ]


def node_view(session: NodeSession) -> NodeView:
    """Return a connected node."""
    return NodeView(
        node_addr=session.node,
        peer_id=session.peer_id,
        software=session.software,
        admitted=session.admitted,
        draining=session.draining,
        connected_at_ms=session.connected_at_ms,
        heard_at_ms=session.heard_at_ms,
        slots=session.slots,
        slots_free=session.slots_free,
        running=session.total_in_flight,
        gpus=[GpuView(id="0x" + gpu.id.hex(), model=gpu.model, memory_bytes=gpu.memory_bytes) for gpu in session.gpus],
        services=[
            ServiceView(project=offer.project, model=offer.model, type=offer.type, copies=offer.copies)
            for offer in session.services
        ],
        deployments=deployment_views(session),
    )


def workspace_view(workspace: Workspace, nodes: Nodes) -> WorkspaceView:
    """Return a workspace with where it is deployed."""
    deployments = [view for session in nodes for view in deployment_views(session) if view.workspace == workspace.id]
    return WorkspaceView(
        spec=workspace.spec,
        replicas=workspace.spec.replicas,
        owner=workspace.owner,
        created_at_ms=workspace.created_at_ms,
        token_labels=[token.label for token in workspace.tokens],
        deployments=deployments,
    )


def task_view(detail: TaskDetail) -> TaskView:
    """Return everything known of a task but its bodies."""
    task = detail.task
    return TaskView(
        task_id=task.task_id,
        workspace=task.workspace,
        api=task.api,
        method=task.method,
        port=task.port,
        target=task.target,
        detach=task.detach,
        state=task.state,
        state_name=task.state.name.lower(),
        result_code=task.result_code,
        reason=task.reason,
        message=task.message,
        status=task.status,
        node_addr=task.node,
        verdict=task.verdict,
        rule=task.rule,
        accepted_at_ms=task.accepted_at_ms,
        dispatched_at_ms=task.dispatched_at_ms,
        finished_at_ms=task.finished_at_ms,
        deadline_at_ms=task.deadline_at_ms,
        attempts=[
            AttemptView(
                attempt=attempt.attempt,
                node_addr=attempt.node,
                began_at_ms=attempt.began_at_ms,
                ended_at_ms=attempt.ended_at_ms,
                outcome=attempt.outcome,
                reason=attempt.reason,
                status=attempt.status,
            )
            for attempt in detail.attempts
        ],
        receipts=[_receipt_view(filed.receipt) for filed in detail.receipts],
    )


def receipt_document(order: bytes, receipt: NewReceipt, chain_id: int) -> dict[str, Any]:
    """Return the receipt file of a filed receipt, as JSON values (`scripts/verify-receipt` reads it)."""
    acknowledged = receipt.acknowledgement
    return ReceiptFile(
        order=SignedOrder.from_bytes(order),
        receipt=SignedReceipt.from_bytes(receipt.raw),
        acknowledgement=SignedAcknowledgement.from_bytes(acknowledged) if acknowledged else None,
        chain_id=chain_id,
    ).to_document()


def _receipt_view(receipt: NewReceipt) -> ReceiptView:
    return ReceiptView(
        attempt=receipt.attempt,
        node_addr=receipt.node,
        sequence=receipt.sequence,
        receipt_hash="0x" + receipt.hash.hex(),
        verdict=receipt.verdict,
        rule=receipt.rule,
        expected=receipt.expected,
        actual=receipt.actual,
        outcome=receipt.outcome,
        meter=receipt.meter,
        duration_ms=receipt.duration_ms,
        reserved_gpu_ms=receipt.reserved_gpu_ms,
        busy_gpu_ms=receipt.busy_gpu_ms,
        received_at_ms=receipt.received_at_ms,
    )
