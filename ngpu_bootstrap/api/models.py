"""What goes in and out of `/api/v1`: ids are strings, times UTC milliseconds, addresses EIP-55 text, hashes 0x text."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.workspaces import Workspace
from ngpu_bootstrap.store.records import NewReceipt, RolloutRow, TaskDetail
from ngpu_protocol.control import DeploymentPhase, DeploymentState
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
    """A workspace on a node, one revision of it."""

    node: str
    workspace: str
    revision: int
    state: str = Field(description="queued, pulling, starting, ready, unhealthy, failed, stopping or gone")
    detail: str = Field(description="for people; empty when all is well")
    slots_free: int
    image_digest: str
    progress: int = Field(default=0, description="of getting the image, in percent")
    bytes_done: int = 0
    bytes_total: int = Field(default=0, description="0 while unknown")
    seconds_left: int | None = None
    reason: str = Field(default="", description="a stable word for what is not as it should be")
    connected: bool = True


class ShortageView(BaseModel):
    """Fewer nodes fit than are wanted."""

    wanted: int
    placed: int
    reason: str = Field(description="what most of the other nodes lack")
    detail: str
    lacks: dict[str, int] = Field(description="how many nodes lack what")


class RolloutView(BaseModel):
    """A new revision on its way to the nodes, or one that failed."""

    state: str = Field(description="rolling or failed")
    base: int = Field(description="the revision clients are served by")
    target: int
    began_at_ms: int
    failed_at_ms: int | None = None
    node: str = Field(default="", description="where it failed")
    reason: str = ""
    detail: str = ""


class DeploymentsView(BaseModel):
    """How a workspace stands on each of its nodes."""

    workspace: str
    revision: int = Field(description="the one clients are served by")
    replicas: int | None
    ready: int = Field(description="nodes where it is ready")
    deployments: list[DeploymentView]
    shortage: ShortageView | None = None
    rollout: RolloutView | None = None


class WorkspaceView(BaseModel):
    """A workspace as its operator sees it."""

    spec: WorkspaceSpec
    replicas: int | None
    owner: str
    created_at_ms: int
    token_labels: list[str]
    deployments: list[DeploymentView]
    target: WorkspaceSpec | None = None
    rollout: RolloutView | None = None


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
    waits_for: str = Field(default="", description="while no node serves the workspace yet: what for")
    queue_position: int | None = Field(
        default=None, description="while it waits for a slot: how many of its workspace wait before it"
    )
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
    """Return what runs on a node on our account. What it has ready and may not serve is on its way out."""

    def may_serve(state: DeploymentState) -> bool:
        return state.state != DeploymentPhase.READY or state.revision in session.assigned.get(state.workspace, ())

    return [
        DeploymentView(
            node=session.node,
            workspace=state.workspace,
            revision=state.revision,
            state=state.state if may_serve(state) else DeploymentPhase.STOPPING,
            detail=state.detail if may_serve(state) else "the node has it, and gets no tasks of it",
            slots_free=state.slots_free if may_serve(state) else 0,
            image_digest="0x" + state.image_digest.hex(),
            progress=100 if state.state == DeploymentPhase.READY else state.progress,
            bytes_done=state.bytes_done,
            bytes_total=state.bytes_total,
            seconds_left=state.seconds_left,
            reason=state.reason if may_serve(state) else "not_assigned",
        )
        for state in session.reports
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


def deployments_of(workspace: Workspace, nodes: Nodes, deployments: DeploymentTable) -> list[DeploymentView]:
    """Return how a workspace stands on each node that has it or is to have it."""
    views = [view for session in nodes for view in deployment_views(session) if view.workspace == workspace.id]
    reported = {(view.node, view.revision) for view in views}
    for row in deployments.rows(workspace.id):
        session = nodes.get(row.node)
        if session is None:
            reason, detail = "node_away", "the node is not connected"
            if deployments.is_elsewhere(row.node):
                reason, detail = "node_elsewhere", "the node is connected to another bootstrap of this service"
        elif (row.node, row.revision) in reported:
            continue
        else:
            reason, detail = "", "the node was told to run it"
        views.append(
            DeploymentView(
                node=row.node,
                workspace=row.workspace,
                revision=row.revision,
                state=DeploymentPhase.QUEUED if session is not None else DeploymentPhase.GONE,
                detail=detail,
                slots_free=0,
                image_digest="0x" + bytes(32).hex(),
                reason=reason,
                connected=session is not None,
            )
        )
    return sorted(views, key=lambda view: (view.node, view.revision))


def deployments_view(workspace: Workspace, nodes: Nodes, deployments: DeploymentTable) -> DeploymentsView:
    """Return how a workspace stands altogether."""
    views = deployments_of(workspace, nodes, deployments)
    short = deployments.shortage(workspace)
    return DeploymentsView(
        workspace=workspace.id,
        revision=workspace.spec.revision,
        replicas=workspace.wanted.replicas,
        ready=len({view.node for view in views if view.state == DeploymentPhase.READY}),
        deployments=views,
        shortage=None
        if short is None
        else ShortageView(
            wanted=short.wanted,
            placed=short.fitting,
            reason=short.reason,
            detail=short.detail,
            lacks={str(lack): count for lack, count in short.lacks.items()},
        ),
        rollout=_rollout_view(workspace.rollout),
    )


def workspace_view(workspace: Workspace, deployments: list[DeploymentView]) -> WorkspaceView:
    """Return a workspace with where it is deployed."""
    return WorkspaceView(
        spec=workspace.spec,
        replicas=workspace.wanted.replicas,
        owner=workspace.owner,
        created_at_ms=workspace.created_at_ms,
        token_labels=[token.label for token in workspace.tokens],
        deployments=deployments,
        target=workspace.target,
        rollout=_rollout_view(workspace.rollout),
    )


def _rollout_view(rollout: RolloutRow | None) -> RolloutView | None:
    if rollout is None:
        return None
    return RolloutView(
        state="rolling" if rollout.failed_at_ms is None else "failed",
        base=rollout.base,
        target=rollout.target,
        began_at_ms=rollout.began_at_ms,
        failed_at_ms=rollout.failed_at_ms,
        node=rollout.node,
        reason=rollout.reason,
        detail=rollout.detail,
    )


def task_view(detail: TaskDetail, waits_for: str = "", queue_position: int | None = None) -> TaskView:
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
        waits_for=waits_for,
        queue_position=queue_position,
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
