"""Which nodes run what, kept in the store: assignment and rollout applied to who is there.

Owns the table of deployments (workspace, node, the revision that node was told), for how long a node that is away keeps
its place, and what a workspace lacks. `work_out` brings all of it up to date; whoever tells nodes (`control`) reads
`desired` and `serving` after it. The decisions themselves are pure: `assignment` and `rollout`.

The rule: nothing is told to a node that is not in the store, so that a restart moves nothing.

Several bootstraps on one database share the table. Each works it out by the nodes it sees and stores what it came to
only if nobody else changed anything since it last read (`Store.place_after`); else it reads again first. A node is away
when none of them has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import trio

from ngpu_bootstrap.registry.archives import Archives, needs_sum
from ngpu_bootstrap.registry.assignment import Host, Shortage, Wanted, assign
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.rollout import Place, Step, step
from ngpu_bootstrap.registry.workspaces import Workspace, Workspaces
from ngpu_bootstrap.store.errors import PlacementOutdated
from ngpu_bootstrap.store.leases import Told
from ngpu_bootstrap.store.records import DeploymentRow
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.control import DeploymentPhase, DeploymentState, without_last_words
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

# A node where a workspace failed for the node's own fault is tried again after this, and sooner when nothing is better.
FAILED_ON_MS = 600_000

# For so long after the start a workspace's nodes are taken to be on their way: they dial again after some seconds.
COMING_BACK_MS = 15_000

# How often it is worked out anew at once because another bootstrap of the database was faster.
TRIES = 4

# Reasons of a failed deployment that are the node's, so that another node may do better with the same revision.
NODE_FAULTS = frozenset(
    {
        "disk_full",
        "image_too_large",
        "images_total",
        "image_wrong_platform",
        "registry_not_allowed",
        "address_not_allowed",
        "no_room",
        "egress_unguarded",
    }
)
#: A node's registry has another image under the reference than the revision is pinned to, and not that one.
PIN_CONFLICT = "image_pin_conflict"
_NODE_FAULT_PREFIXES = ("gpu", "engine")

# What was read is known to be as new as this long before: a change made then may not have been committed.
UNSURE_MS = 2_000

_COMING = (DeploymentPhase.QUEUED, DeploymentPhase.PULLING, DeploymentPhase.STARTING)
_NO_DIGEST = bytes(32)
_PINNING = frozenset({DeploymentPhase.STARTING, DeploymentPhase.READY})


@dataclass(frozen=True, slots=True)
class Deployed:
    """How a workspace stands on one node, in the revision that counts there.

    Attributes:
        since_ms: when the node was given it, or for a service when the node connected.
    """

    node: Address
    state: str
    progress: int
    since_ms: int


class DeploymentTable:
    """The table of deployments, and what follows from it.

    Args:
        archives: reads images' files whose checksum nobody gave; a revision waits for that.
        replace_after_s: how long a node that is away, or draining, keeps its place.
        only_on: the nodes a workspace visits now, by its id; None for one that is to stay where it is put.
    """

    def __init__(
        self,
        *,
        workspaces: Workspaces,
        nodes: Nodes,
        store: Store,
        archives: Archives,
        replace_after_s: float,
        now_ms: Callable[[], int],
        only_on: Callable[[str], Collection[Address] | None] = lambda workspace: None,
    ) -> None:
        self._only_on = only_on
        self._workspaces = workspaces
        self._nodes = nodes
        self._store = store
        self._archives = archives
        self._replace_after_ms = int(replace_after_s * 1000)
        self._now_ms = now_ms
        # one at a time: a table read anew must not be older than what is being stored
        self._working = trio.Lock()
        self._rows: dict[str, dict[Address, DeploymentRow]] = {}
        self._before: dict[tuple[str, Address], int] = {}
        self._away_since: dict[Address, int] = {}
        self._elsewhere: frozenset[Address] = frozenset()
        self._mark: tuple[Any, ...] = ()
        #: as of when `desired` is known, by the database's clock; 0 where no other bootstrap has it
        self.as_of_ms = 0
        self._loaded_at_ms = 0
        #: by workspace and revision: the nodes that said they have its image, and those its registry told otherwise
        self._have_pin: dict[tuple[str, int], set[Address]] = {}
        self._disputed: dict[tuple[str, int], set[Address]] = {}
        self._failed_on: dict[tuple[str, int], dict[Address, tuple[str, int]]] = {}
        self._short: Mapping[str, Shortage] = {}
        self.desired: Mapping[Address, Sequence[WorkspaceSpec]] = {}
        self.serving: Mapping[Address, Mapping[str, Collection[int]]] = {}

    async def load(self) -> None:
        """Read workspaces and the table from the store."""
        # the mark first: what changes while the rest is read is read again
        mark, as_of_ms = await self._store.workspaces_marked() if self._store.is_shared else ((), UNSURE_MS)
        async with self._working:
            rows: dict[str, dict[Address, DeploymentRow]] = {}
            for row in await self._store.deployments():
                rows.setdefault(row.workspace, {})[row.node] = row
            self._rows, self._mark = rows, mark
            self.as_of_ms = max(self.as_of_ms, as_of_ms - UNSURE_MS)
            self._loaded_at_ms = self._loaded_at_ms or self._now_ms()
        await self._workspaces.load()

    async def catch_up(self) -> None:
        """Read workspaces and the table again if another bootstrap of this database has changed any of it.

        Raises:
            StoreError: it cannot be read; what was known stays.
        """
        if not self._store.is_shared:
            return
        mark, as_of_ms = await self._store.workspaces_marked()
        if mark != self._mark:
            await self.load()
        else:
            self.as_of_ms = max(self.as_of_ms, as_of_ms - UNSURE_MS)

    @property
    def waits(self) -> bool:
        """Whether the passing of time alone may change who should run what."""
        ends = any(workspace.spec.end_at is not None for workspace in self._workspaces)
        return bool(ends or self._away_since or self._elsewhere or self._failed_on or self._short)

    def rows(self, workspace_id: str) -> Sequence[DeploymentRow]:
        """Return which nodes are to run an image workspace, by address."""
        return sorted(self._rows.get(workspace_id, {}).values(), key=lambda row: row.node)

    def is_elsewhere(self, node: Address) -> bool:
        """Return whether a node that is not connected here was seen connected to another bootstrap of this database."""
        return node in self._elsewhere and self._nodes.get(node) is None

    def shortage(self, workspace: Workspace) -> Shortage | None:
        """Return what keeps a workspace from having all its replicas; None when it has them."""
        if needs_sum(workspace.wanted):  # how far that is changes without anything being worked out anew
            return self._unread(workspace)
        return self._short.get(workspace.id)

    def told(self) -> dict[Address, dict[str, Told]]:
        """Return what the nodes connected here report of the workspaces they may serve."""
        return {
            session.node: {
                workspace: Told(state.state, state.progress, session.connected_at_ms)
                for workspace, state in session.deployments.items()
                if workspace in session.assigned
            }
            for session in self._nodes
        }

    async def deployed(self, workspace: Workspace) -> list[Deployed]:
        """Return how *workspace* stands on every node that has it or is to have it, by address; of one that is not
        connected here, as it told another bootstrap of this database.

        Raises:
            StoreError: that cannot be read.
        """
        told = await self._store.told_elsewhere(workspace.id)
        rows = self._rows.get(workspace.id, {})
        found: list[Deployed] = []
        for node in {*rows, *told, *(session.node for session in self._nodes if workspace.id in session.assigned)}:
            session = self._nodes.get(node)
            if session is None and node in told:
                said = told[node]
                since_ms = rows[node].assigned_at_ms if node in rows else said.since_ms
                found.append(Deployed(node, said.state, said.progress, since_ms))
                continue
            state = session.deployments.get(workspace.id) if session is not None else None
            since_ms = rows[node].assigned_at_ms if node in rows else session.connected_at_ms if session else 0
            phase = state.state if state else DeploymentPhase.QUEUED if session else DeploymentPhase.GONE
            found.append(Deployed(node, phase, state.progress if state else 0, since_ms))
        return sorted(found, key=lambda one: one.node)

    def on_the_way(self, workspace: Workspace) -> str:
        """Return, in words, what a task of *workspace* waits for while no node serves it yet; empty when it is not
        that: some node serves it, or none is going to."""
        coming: list[tuple[int, str]] = []
        for session in self._nodes:
            state = session.deployments.get(workspace.id) if workspace.id in session.assigned else None
            if state is None:
                continue
            if state.state == DeploymentPhase.READY:
                return ""
            if state.state in _COMING:
                coming.append((_COMING.index(DeploymentPhase(state.state)) * 101 + state.progress, _words(state)))
        if coming:
            return max(coming)[1]
        rows = self._rows.get(workspace.id, {})
        if any(self._nodes.get(node) is not None for node in rows):
            return "a node was told to run the workspace"
        if rows and self._now_ms() - self._loaded_at_ms < COMING_BACK_MS:
            return "this bootstrap has just started, and the workspace's nodes are coming back"
        return ""

    def presumed(self, session: NodeSession) -> dict[str, Collection[int]]:
        """Return which revisions of which workspaces a node that has just reported may serve by what is known already.

        A node that comes back serves from its first word on; what it should run is worked out a moment later.
        """
        now_ms, found = self._now_ms(), dict[str, Collection[int]]()
        offered = {f"{offer.project}/{offer.model}" for offer in session.services if offer.copies > 0}
        for workspace in self._workspaces:
            spec = workspace.spec
            if not session.admitted or workspace.has_ended(now_ms):
                continue
            if not spec.is_image:
                if spec.service in offered:
                    found[workspace.id] = _served(workspace, spec.revision)
            elif (row := self._rows.get(workspace.id, {}).get(session.node)) is not None:
                found[workspace.id] = _served(workspace, row.revision)
        return found

    async def work_out(self) -> None:
        """Decide anew who should run what, and store it.

        Raises:
            StoreError: it could not be stored; `desired` is what it was.
        """
        for _ in range(TRIES - 1):
            await self.catch_up()
            try:
                async with self._working:
                    await self._work_out()
                return
            except PlacementOutdated:
                continue  # another bootstrap was faster
        await self.catch_up()
        async with self._working:
            await self._work_out()

    async def _work_out(self) -> None:
        now_ms = self._now_ms()
        sessions = {session.node: session for session in self._nodes if session.reported}
        await self._pin(sessions)
        missing = {node for rows in self._rows.values() for node in rows if node not in sessions}
        self._elsewhere = frozenset(await self._store.present_elsewhere(missing))
        self._notice(sessions, now_ms)
        current = [workspace for workspace in self._workspaces if not workspace.has_ended(now_ms)]
        # An image that is not known to be one and the same everywhere goes nowhere, and stops no earlier revision.
        unread = {workspace.id for workspace in current if needs_sum(workspace.wanted)}
        assigned = assign(
            [self._wanted(workspace, sessions, now_ms) for workspace in current if workspace.id not in unread],
            [self._host(session, now_ms) for session in sessions.values()],
        )
        told: dict[str, Mapping[Address, int]] = {}
        rolls: list[tuple[Workspace, Step]] = []
        for workspace in current:
            if workspace.id in unread:
                told[workspace.id] = {row.node: row.revision for row in self.rows(workspace.id)}
                continue
            placed = assigned.placed[workspace.id]
            if workspace.is_rolling and workspace.target is not None:
                decided = step(
                    [self._place(workspace, node, sessions.get(node)) for node in placed],
                    base=workspace.spec.revision,
                    target=workspace.target.revision,
                )
                told[workspace.id] = decided.revisions
                rolls.append((workspace, decided))
            else:
                told[workspace.id] = dict.fromkeys(placed, workspace.spec.revision)
        await self._keep({one.id: told[one.id] for one in current if one.spec.is_image}, now_ms)
        self._short = {**assigned.short, **{one.id: self._unread(one) for one in current if one.id in unread}}
        self._publish(current, told, sessions)
        for workspace, decided in rolls:
            if decided.failure is not None:
                log.warning(
                    "rollout_failed",
                    workspace=workspace.id,
                    revision=workspace.wanted.revision,
                    node=decided.failure.node,
                    reason=decided.failure.reason,
                    detail=without_last_words(decided.failure.detail),
                )
                await self._workspaces.roll_failed(workspace, decided.failure)
            elif decided.finished:
                log.info("rollout_finished", workspace=workspace.id, revision=workspace.wanted.revision)
                await self._workspaces.rolled_out(workspace)

    def _unread(self, workspace: Workspace) -> Shortage:
        """Return the shortage of a workspace whose image's file is still to be read."""
        spec = workspace.wanted
        hindrance = self._archives.hindrance(spec)
        held = len(self._rows.get(workspace.id, {}))
        return Shortage(spec.replicas or 1, held, {}, hindrance.reason, hindrance.detail)

    async def _pin(self, sessions: Mapping[Address, NodeSession]) -> None:
        """Fix the image of each revision to what the first node that has it found it to be."""
        for node, session in sessions.items():
            for state in session.reports:
                workspace = self._workspaces.get(state.workspace)
                if (
                    workspace is None
                    or state.image_digest == _NO_DIGEST
                    or state.state not in _PINNING
                    or node not in self._rows.get(workspace.id, {})
                ):
                    continue
                spec = workspace.of_revision(state.revision)
                has_it = self._have_pin.setdefault((spec.id, spec.revision), set())
                has_it.add(node)
                if spec.revision == state.revision and spec.is_image and spec.image_digest is None:
                    digest = f"sha256:{state.image_digest.hex()}"
                    log.info("image_pinned", workspace=spec.id, revision=spec.revision, node=node, digest=digest)
                    await self._workspaces.pin(spec.id, spec.revision, digest=digest)

    def _dispute(self, node: Address, state: DeploymentState) -> None:
        """Tell the operator, once for each node, that a revision's pin is not what its registry says."""
        key = (state.workspace, state.revision)
        disputed = self._disputed.setdefault(key, set())
        if node not in disputed:
            disputed.add(node)
            log.warning(
                "image_pin_disputed",
                workspace=state.workspace,
                revision=state.revision,
                node=node,
                have_it=sorted(self._have_pin.get(key, ())),
                detail=state.detail,
            )

    def _notice(self, sessions: Mapping[Address, NodeSession], now_ms: int) -> None:
        """Note since when nodes that have something are away or draining, and where workspaces failed."""
        holders = {node for rows in self._rows.values() for node in rows}
        away = {
            node for node in holders if (sessions[node].draining if node in sessions else node not in self._elsewhere)
        }
        self._away_since = {node: self._away_since.get(node, now_ms) for node in away}
        for node, session in sessions.items():
            for state in session.reports:
                if state.state == DeploymentPhase.FAILED and state.reason == PIN_CONFLICT:
                    self._dispute(node, state)
                if state.state == DeploymentPhase.FAILED and _is_nodes_fault(state.reason):
                    failed = self._failed_on.setdefault((state.workspace, state.revision), {})
                    failed[node] = (state.reason, now_ms + FAILED_ON_MS)
        for kept in (self._have_pin, self._disputed):
            for key in list(kept):
                workspace = self._workspaces.get(key[0])
                if workspace is None or key[1] not in (workspace.spec.revision, workspace.wanted.revision):
                    del kept[key]
        for key in list(self._failed_on):
            workspace = self._workspaces.get(key[0])
            if workspace is None or workspace.wanted.revision != key[1]:
                del self._failed_on[key]

    def _wanted(self, workspace: Workspace, sessions: Mapping[Address, NodeSession], now_ms: int) -> Wanted:
        held = self._rows.get(workspace.id, {})
        spec = workspace.wanted
        sizes = [
            state.bytes_total
            for session in sessions.values()
            for state in session.reports
            if state.workspace == spec.id and state.revision == spec.revision
        ]
        failed = self._failed_on.get((spec.id, spec.revision), {})
        return Wanted(
            spec,
            held=held,
            waited_for=[node for node in held if node not in sessions and not self._is_gone(node, now_ms)],
            image_bytes=max(sizes, default=0),
            failed_on={node: reason for node, (reason, until_ms) in failed.items() if now_ms < until_ms},
            only=self._only_on(spec.id),
        )

    def _host(self, session: NodeSession, now_ms: int) -> Host:
        return Host(
            node=session.node,
            admitted=session.admitted,
            draining=session.draining,
            leaving=session.draining and self._is_gone(session.node, now_ms),
            gpus=session.gpus,
            services={f"{offer.project}/{offer.model}" for offer in session.services if offer.copies > 0},
            offer=session.host,
        )

    def _is_gone(self, node: Address, now_ms: int) -> bool:
        return now_ms - self._away_since.get(node, now_ms) >= self._replace_after_ms

    def _place(self, workspace: Workspace, node: Address, session: NodeSession | None) -> Place:
        row = self._rows.get(workspace.id, {}).get(node)
        return Place(
            node=node,
            told=row.revision if row is not None else workspace.spec.revision,
            is_here=session is not None,
            states={
                state.revision: state
                for state in (session.reports if session is not None else ())
                if state.workspace == workspace.id
            },
        )

    async def _keep(self, told: Mapping[str, Mapping[Address, int]], now_ms: int) -> None:
        """Store what changed in the table."""
        changed: list[DeploymentRow] = []
        for workspace_id, revisions in told.items():
            rows = self._rows.get(workspace_id, {})
            for node, revision in revisions.items():
                row = rows.get(node)
                if row is None or row.revision != revision:
                    assigned_at_ms = row.assigned_at_ms if row is not None else now_ms
                    changed.append(DeploymentRow(workspace_id, node, revision, assigned_at_ms))
        dropped = [
            (workspace_id, node)
            for workspace_id, rows in self._rows.items()
            for node in rows
            if node not in told.get(workspace_id, {}) and workspace_id not in self._workspaces.strange
        ]
        if (changed or dropped) and self._store.is_shared:
            self._mark, placed_at_ms = await self._store.place_after(self._mark, changed, dropped)
            self.as_of_ms = max(self.as_of_ms, placed_at_ms)
        elif changed or dropped:
            await self._store.place(changed, dropped)
        for workspace_id, node in dropped:
            row = self._rows[workspace_id].pop(node)
            self._before.pop((workspace_id, row.node), None)
            log.info("unassigned", workspace=workspace_id, node=node)
            if not self._rows[workspace_id]:
                del self._rows[workspace_id]
        for row in changed:
            held = self._rows.setdefault(row.workspace, {})
            if row.node in held:
                self._before[row.workspace, row.node] = held[row.node].revision
            held[row.node] = row
            log.info("assigned", workspace=row.workspace, node=row.node, revision=row.revision)

    def _publish(
        self,
        current: Sequence[Workspace],
        told: Mapping[str, Mapping[Address, int]],
        sessions: Mapping[Address, NodeSession],
    ) -> None:
        desired: dict[Address, list[WorkspaceSpec]] = {node: [] for node in sessions}
        serving: dict[Address, dict[str, Collection[int]]] = {node: {} for node in sessions}
        for workspace in current:
            for node, revision in told[workspace.id].items():
                if node not in sessions:
                    continue
                desired[node].append(workspace.of_revision(revision))
                before = self._before.get((workspace.id, node), revision)
                serving[node][workspace.id] = _served(workspace, revision, before)
        self.desired, self.serving = desired, serving
        self._nodes.retain({workspace.id: workspace.spec for workspace in current})


def _served(workspace: Workspace, *revisions: int) -> frozenset[int]:
    """Return the revisions a node may serve that was told to run *revisions*, the newest first."""
    serves = {*revisions, workspace.spec.revision}
    if not workspace.spec.is_image:
        serves.add(revisions[0] - 1)  # the same model server, by its name before the change
    return frozenset(serves)


def _words(state: DeploymentState) -> str:
    if state.state == DeploymentPhase.PULLING:
        left = f", about {state.seconds_left} s left" if state.seconds_left is not None else ""
        return f"the workspace's image is being pulled: {state.progress} %{left}"
    if state.state == DeploymentPhase.STARTING:
        return "the workspace is starting"
    return "the workspace is queued on its node"


def _is_nodes_fault(reason: str) -> bool:
    return reason in NODE_FAULTS or reason.startswith(_NODE_FAULT_PREFIXES)
