"""`/api/v1/nodes`: who is connected, filtered and in pages, and why a node gets tasks or not.

Owns what a node's one-word state is and what the filters mean. Nodes are public, as their records in the DHT are, and
so is their standing: whoever trusts this bootstrap with work may know what it thinks of whom.
"""

# Annotations are evaluated here: FastAPI reads them.
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import FastAPI, Query
from pydantic import BaseModel, Field

from ngpu_bootstrap.api import models
from ngpu_bootstrap.api.challenges import ChallengeView, challenge_view
from ngpu_bootstrap.api.documented_calls import ERROR_SHOWN
from ngpu_bootstrap.api.rechecks import RecheckView, recheck_view
from ngpu_bootstrap.challenges.desk import ChallengeDesk
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.registry.workspaces import Workspaces
from ngpu_bootstrap.scheduling.reasons import SILENCE_LIMIT_MS, Exclusion
from ngpu_bootstrap.scheduling.standing import Standing
from ngpu_bootstrap.store import challenge_rows, recheck_rows
from ngpu_bootstrap.store.challenge_rows import ChallengeRow
from ngpu_bootstrap.store.recheck_rows import RecheckRow
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.errors import AddressError
from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names
from ngpu_protocol.identity import parse_address

PAGE_LIMIT = 1000
CHALLENGES_SHOWN = 16
LOST_SHOWN = 16

State = Literal[
    "serving",
    "pending",
    "draining",
    "silent",
    "set_aside",
    "distrusted",
    "version_too_old",
    "too_far",
    "challenged",
    "away",
]


class StandingView(BaseModel):
    """What this bootstrap makes of a node's receipts."""

    score: float = Field(description="0 to 1; a new node has 1")
    trusted: bool = Field(description="whether the node gets tasks")
    trusted_again_in_s: int = Field(description="for how long it gets none if nothing else comes; 0 when it is trusted")
    verified: int
    skewed: int = Field(description="right in all but their times")
    disputed: int
    rules: dict[str, int] = Field(description="how many disputes broke which rule")
    last_rule: str
    last_task: str
    last_disputed_at_ms: int


class ConnectedNodeView(models.NodeView):
    """A connected node, with how it is seen from here."""

    state: State = Field(description="why it gets no task of any workspace, `serving` when nothing speaks against it")
    region: str = Field(description="where it is, in its owner's word")
    round_trip_ms: float | None = Field(description="to the node and back; null while it is not measured")
    failure_rate: float = Field(description="0 to 1, of late: connections lost, orders refused")
    tried_again_at_ms: int | None = Field(description="when it is tried again, while it is set aside")
    last_challenge: str = Field(description="the worst of what its GPUs last showed; empty: never challenged")
    last_challenged_at_ms: int
    standing: StandingView


class NodeListView(BaseModel):
    """One page of the connected nodes, by address."""

    nodes: list[ConnectedNodeView]
    cursor: str = Field(description="`after` of the next page; empty on the last one")


class NodeWorkspaceView(BaseModel):
    """How a node stands with one workspace."""

    workspace: str
    excluded: str = Field(description="why it could not take a task of it now; empty when it could")
    slots: int
    in_use: int = Field(description="as this bootstrap believes, others' tasks included")
    tasks: int = Field(description="whose time was measured")
    speed: float = Field(description="its times over the workspace's typical ones; 2 takes twice as long")
    failure_rate: float
    tried_again_at_ms: int | None


class NodeDetailView(BaseModel):
    """A node and why it gets tasks or not; `node` is null while it is not connected."""

    node_addr: str
    state: State
    node: ConnectedNodeView | None
    first_seen_ms: int
    last_seen_ms: int
    standing: StandingView
    why: list[str] = Field(description="sentences for people")
    workspaces: list[NodeWorkspaceView]
    challenges: list[ChallengeView] = Field(description="the last ones, newest first")
    rechecks_lost: list[RecheckView] = Field(
        description="answers of its that two other nodes contradicted, newest first"
    )


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What these calls work on."""

    nodes: Nodes
    workspaces: Workspaces
    standings: Standings
    store: Store
    challenges: ChallengeDesk
    now_ms: Callable[[], int]


def add_node_calls(app: FastAPI, parts: NodeParts) -> None:
    """Give *app* the calls about nodes."""

    @app.get("/api/v1/nodes", tags=["nodes"])
    async def list_nodes(
        gpu: Annotated[str, Query(max_length=128, description="a GPU model, however spelled")] = "",
        workspace: Annotated[str, Query(max_length=32, description="id of a workspace deployed there")] = "",
        region: Annotated[str, Query(max_length=64, description="where the node says it is")] = "",
        state: Annotated[State | None, Query(description="its state")] = None,
        limit: Annotated[int, Query(ge=1, le=PAGE_LIMIT)] = PAGE_LIMIT,
        after: Annotated[str, Query(max_length=64, description="`cursor` of the page before")] = "",
    ) -> NodeListView:
        """Connected nodes: what each offers, what runs there, how loaded, how far and how trusted it is."""
        now_ms = parts.now_ms()
        found: list[ConnectedNodeView] = []
        for session in sorted(parts.nodes, key=lambda session: session.node.lower()):
            if session.node.lower() <= after.lower() or not _matches(session, gpu, workspace, region):
                continue
            if state is not None and state_of(session, now_ms) != state:
                continue
            if len(found) == limit:
                return NodeListView(nodes=found, cursor=found[-1].node_addr)
            found.append(connected_view(session, parts, now_ms))
        return NodeListView(nodes=found, cursor="")

    @app.get("/api/v1/nodes/{node_addr}", tags=["nodes"], responses={404: {**ERROR_SHOWN, "description": "Not Found"}})
    async def get_node(node_addr: str) -> NodeDetailView:
        """One node, connected or not, and why it gets tasks or not."""
        try:
            node = parse_address(node_addr)
        except AddressError as error:
            raise Refusal(400, "bad_node_addr", f"not a nodeAddr: {error}") from None
        session = parts.nodes.get(node)
        row = next((row for row in await parts.store.nodes() if row.address == node), None)
        if session is None and row is None:
            raise Refusal(404, "node_unknown", f"no node {node} was ever here")
        challenges = await parts.store.look_up(
            lambda connection: challenge_rows.of_node(connection, node, CHALLENGES_SHOWN)
        )
        lost = await parts.store.look_up(lambda connection: recheck_rows.lost_by(connection, node, LOST_SHOWN))
        now_ms = parts.now_ms()
        standing = parts.standings.of(node)
        return NodeDetailView(
            node_addr=node,
            state=state_of(session, now_ms) if session is not None else "away",
            node=connected_view(session, parts, now_ms) if session is not None else None,
            first_seen_ms=row.first_seen_ms if row is not None else now_ms,
            last_seen_ms=session.heard_at_ms if session is not None else row.last_seen_ms if row is not None else 0,
            standing=standing_view(standing, now_ms),
            why=[
                *_sentences(session, now_ms),
                standing.explained(now_ms),
                *_challenged(challenges, now_ms),
                *_lost(lost, now_ms),
            ],
            workspaces=list(_with_workspaces(parts, session)) if session is not None else [],
            challenges=[challenge_view(row) for row in challenges],
            rechecks_lost=[recheck_view(row) for row in lost],
        )


def state_of(session: NodeSession, now_ms: int) -> State:
    """Return a node's state in one word."""
    if session.load.reason is Exclusion.NOT_ADMITTED:
        return "pending"
    if now_ms - session.heard_at_ms > SILENCE_LIMIT_MS:
        return "silent"
    match session.load.reason:
        case Exclusion.VERSION_TOO_OLD:
            return "version_too_old"
        case Exclusion.DISTRUSTED:
            return "distrusted"
        case Exclusion.DRAINING:
            return "draining"
        case Exclusion.TOO_FAR:
            return "too_far"
        case Exclusion.CHALLENGED:
            return "challenged"
        case _:
            return "set_aside" if session.load.history.trouble.until_ms else "serving"


def connected_view(session: NodeSession, parts: NodeParts, now_ms: int) -> ConnectedNodeView:
    """Return a connected node."""
    trouble = session.load.history.trouble
    round_trip_s = session.round_trip_s
    finding, challenged_at_ms = parts.challenges.last(session.node)
    return ConnectedNodeView(
        **models.node_view(session).model_dump(),
        state=state_of(session, now_ms),
        region=session.area,
        round_trip_ms=round(round_trip_s * 1000, 2) if round_trip_s is not None else None,
        failure_rate=round(trouble.rate, 3),
        tried_again_at_ms=trouble.until_ms or None,
        last_challenge=finding,
        last_challenged_at_ms=challenged_at_ms,
        standing=standing_view(parts.standings.of(session.node), now_ms),
    )


def standing_view(standing: Standing, now_ms: int) -> StandingView:
    """Return a standing with what follows from it now."""
    return StandingView(
        score=round(standing.score(now_ms), 4),
        trusted=standing.is_trusted(now_ms),
        trusted_again_in_s=-(-standing.trusted_again_in_ms(now_ms) // 1000),
        verified=standing.verified,
        skewed=standing.skewed,
        disputed=standing.disputed,
        rules=dict(standing.rules),
        last_rule=standing.last_rule,
        last_task=standing.last_task,
        last_disputed_at_ms=standing.last_disputed_at_ms,
    )


def _matches(session: NodeSession, gpu: str, workspace: str, region: str) -> bool:
    if gpu:
        wanted = canonical_gpu_model(gpu)
        if not any(wanted in gpu_model_names(one.model, one.memory_bytes) for one in session.gpus):
            return False
    if workspace and workspace not in session.deployments:
        return False
    return not region or session.area.lower() == region.lower()


def _with_workspaces(parts: NodeParts, session: NodeSession) -> Iterable[NodeWorkspaceView]:
    now_ms = parts.now_ms()
    for workspace in parts.workspaces:
        if workspace.id not in session.deployments and workspace.id not in session.assigned:
            continue
        excluded = parts.nodes.why(session, workspace.spec)
        entry = session.load.entries.get(workspace.id)
        yield NodeWorkspaceView(
            workspace=workspace.id,
            excluded=excluded.value if excluded is not None else "",
            slots=entry.room.slots if entry is not None else 0,
            in_use=entry.in_use(now_ms) if entry is not None else 0,
            tasks=entry.history.tasks if entry is not None else 0,
            speed=round(entry.history.speed, 3) if entry is not None else 1.0,
            failure_rate=round(entry.history.trouble.rate, 3) if entry is not None else 0.0,
            tried_again_at_ms=(entry.history.trouble.until_ms or None) if entry is not None else None,
        )


_WORDS = {
    "serving": "it gets tasks of the workspaces that are ready there",
    "pending": "the operator has not approved it: add its nodeAddr to [admission] approved",
    "draining": "it takes no new orders: its owner is stopping or pausing it",
    "version_too_old": "its software is older than [scheduling] minimum_version",
    "distrusted": "too many of its receipts were disputed, or its challenges failed",
    "challenged": "it is being challenged, and gets no tasks until that is over",
    "too_far": "its round trip is beyond [scheduling] max_round_trip_ms",
    "away": "it is not connected",
}


def _challenged(rows: Sequence[ChallengeRow], now_ms: int) -> Iterable[str]:
    """Yield a sentence about the last challenge of each GPU."""
    seen: set[bytes] = set()
    for row in rows:
        if row.gpu not in seen:
            seen.add(row.gpu)
            ago_h = (now_ms - row.at_ms) / 3600_000
            said = f"{row.finding.replace('_', ' ')}{': ' + row.detail if row.detail else ''}"
            yield f"its {row.model} was challenged {ago_h:.1f} h ago: {said}"


def _lost(rows: Sequence[RecheckRow], now_ms: int) -> Iterable[str]:
    """Yield a sentence about the last answer that was contradicted."""
    if rows:
        ago_h = (now_ms - rows[0].at_ms) / 3600_000
        which = f"task {rows[0].task_id} of workspace {rows[0].workspace}"
        yield f"two nodes contradicted its answer to {which} {ago_h:.1f} h ago"


def _sentences(session: NodeSession | None, now_ms: int) -> list[str]:
    if session is None:
        return [_WORDS["away"]]
    state = state_of(session, now_ms)
    trouble = session.load.history.trouble
    if state == "silent":
        return [f"nothing was heard of it for {(now_ms - session.heard_at_ms) / 1000:.1f} s"]
    if state == "set_aside":
        left_s = max(0, trouble.until_ms - now_ms) / 1000
        return [f"{trouble.rate:.0%} of its attempts failed of late: it is tried again in {left_s:.1f} s"]
    sentences = [_WORDS[state]]
    if trouble.probing:
        sentences.append("it failed often and is on probation: one task at a time until one succeeds")
    return sentences
