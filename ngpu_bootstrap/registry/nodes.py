"""The live view of nodes: who is connected, what each serves, what runs there on our account, and who waits for it.

Owns the sessions (one per connected node), the slots handed out, and what moves when a node says something, an attempt
ends or time passes. Which node is chosen and who waits in which order is `scheduling`, which is pure; what a node says
is read by `control`. Everything here happens on one thread and changes between two awaits only, so no lock is needed.

The invariant: every `Slot` handed out is released exactly once, whatever happens to its caller, and a released slot
goes to a call that waits, before any that comes later.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random as random_module
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog
import trio

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.scheduling.affinity import AffinityTable
from ngpu_bootstrap.scheduling.history import Fared, NodeHistory, Trouble
from ngpu_bootstrap.scheduling.placement import PlacementLog
from ngpu_bootstrap.scheduling.pool import CONTENDED, SAMPLE, Choice, Entry, Load, Pool, Terms
from ngpu_bootstrap.scheduling.reasons import (
    NOTHING,
    DeploymentFacts,
    Exclusion,
    NodeFacts,
    Policy,
    gpu_rank,
    node_exclusion,
)
from ngpu_bootstrap.scheduling.waiting import Waiter
from ngpu_protocol.control import DeploymentPhase, DeploymentState, GpuOffer, Heartbeat, HostOffer, ServiceOffer
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

# How often time alone may change a choice (a pause that ends) for calls that wait.
TICK_S = 0.1
MEASURE_MS = 10_000
REMEMBERED_NODES = 50_000
RETRY_AFTER_LIMIT_S = 60
# What a task on its one node needs goes before what any client may ask for (`task_options.PRIORITY_MAX`).
PRIORITY_BEFORE_ALL = 10
LOOK_ANEW_S = 0.5
_WHY_FRESH_MS = 1_000
ANY_NODE = Policy()
# A machine has a dozen GPUs, and MIG makes new ones of them now and then; a stranger may say anything.
MOST_GPUS_SHOWN = 256


@dataclass(eq=False, slots=True)
class NodeSession:
    """One connected run of one node.

    Attributes:
        session: the 32 random bytes of this run of the node; every order carries them.
        requests: the pooled HTTP client over streams of the connection the node itself made.
        gpus: what it offers now.
        gpus_shown: model by id of all it has offered in this session, as said first: a receipt may name one that has
            become sick since. At most `MOST_GPUS_SHOWN`.
        reported: whether a heartbeat has come, so that the rest is known.
        assigned: by workspace id, the revisions it was told to run and may serve: the one wanted there now, and while
            it is replaced the one before. A node gets no task of another, whatever it claims to run.
        host: what its machine has for workspaces; None while unknown.
        reports: every deployment as last reported.
        deployments: of those, by workspace, the one that takes its tasks, or would.
        ip: where its connection comes from; empty where that is not known.
        round_trip_s: to the node and back; None while it is not measured.
        load: what scheduling knows of it.
        challenged: whether it is held back from tasks for a challenge.
    """

    node: Address
    peer_id: str
    session: bytes
    software: str
    gpus: tuple[GpuOffer, ...]
    slots: int
    admitted: bool
    connected_at_ms: int
    heard_at_ms: int
    requests: Client
    ip: str = ""
    gpus_shown: dict[bytes, str] = field(default_factory=dict)
    slots_free: int = 0
    reported: bool = False
    draining: bool = False
    deployments: dict[str, DeploymentState] = field(default_factory=dict)
    reports: tuple[DeploymentState, ...] = ()
    services: tuple[ServiceOffer, ...] = ()
    host: HostOffer | None = None
    assigned: Mapping[str, Collection[int]] = field(default_factory=dict)
    round_trip_s: float | None = None
    measure_at_ms: int = 0
    challenged: bool = False
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        self._show(self.gpus)
        self.load = Load(self.node, self, slots=self.slots, heard_at_ms=self.heard_at_ms, history=NodeHistory())

    @property
    def total_in_flight(self) -> int:
        """Our attempts running there now."""
        return self.load.room.in_flight

    @property
    def area(self) -> str:
        """Where the node is, in its owner's word."""
        return self.host.area if self.host is not None else ""

    def hear(self, heartbeat: Heartbeat, now_ms: int) -> None:
        """Take over what the node says of itself."""
        self.heard_at_ms = self.load.heard_at_ms = now_ms
        self.reported = True
        self.slots_free = heartbeat.slots_free
        self.draining = heartbeat.draining
        self.reports = heartbeat.deployments
        self._pick()
        self.services = tuple(heartbeat.services)
        self.host = heartbeat.host
        if heartbeat.gpus is not None:
            self.gpus = heartbeat.gpus
            self._show(heartbeat.gpus)
        self.load.room.hear(self.slots, heartbeat.slots_free, heartbeat.yours)

    def _show(self, gpus: Iterable[GpuOffer]) -> None:
        for gpu in gpus:
            if len(self.gpus_shown) < MOST_GPUS_SHOWN:
                self.gpus_shown.setdefault(gpu.id, canonical_gpu_model(gpu.model, gpu.memory_bytes))

    def assign(self, assigned: Mapping[str, Collection[int]]) -> None:
        """Take over which revisions of which workspaces the node may serve; for an attached one, `Nodes.assign`."""
        self.assigned = assigned
        self._pick()

    def _pick(self) -> None:
        """Choose, for each workspace, the deployment that takes its tasks: a ready one, of a revision that may serve,
        the newest."""
        best: dict[str, tuple[tuple[bool, bool, int], DeploymentState]] = {}
        for state in self.reports:
            allowed = state.revision in self.assigned.get(state.workspace, ())
            rank = (allowed, state.state == DeploymentPhase.READY, state.revision)
            if state.workspace not in best or rank > best[state.workspace][0]:
                best[state.workspace] = (rank, state)
        self.deployments = {workspace: state for workspace, (_, state) in best.items()}

    def held_gpus(self, workspace: str) -> list[tuple[str, int]]:
        """Return model and memory of the GPUs a workspace holds here, of all where it holds none of its own."""
        state = self.deployments.get(workspace)
        held = set(state.gpus) if state is not None else set()
        return [(gpu.model, gpu.memory_bytes) for gpu in self.gpus if not held or gpu.id in held]

    def facts(self, workspace: str, terms: Terms) -> tuple[DeploymentFacts, int, int | None]:
        """Return what is known of a workspace here, and what the node says of its slots: how many are free, and how
        many attempts of ours run there (None: it does not say)."""
        allowed = self.assigned.get(workspace)
        state = self.deployments.get(workspace)
        if state is None or not allowed:
            return NOTHING, 0, None
        gpus, healthy = self.gpus, True
        if state.gpus:
            held = set(state.gpus)
            gpus = tuple(gpu for gpu in self.gpus if gpu.id in held)
            healthy = len(gpus) == len(held)
        rank = gpu_rank(terms.gpu_types, [(gpu.model, gpu.memory_bytes) for gpu in gpus]) if terms.gpu_types else 0
        facts = DeploymentFacts(state.revision, state.state, rank, healthy, state.revision in allowed)
        return facts, state.slots_free, state.yours


class Slot:
    """The right to run one attempt of a workspace on a node, until `release`.

    Attributes:
        revision: of the deployment that runs it.
        choice: how it came to this node.
    """

    __slots__ = ("_nodes", "_released", "choice", "entry", "revision", "session")

    def __init__(self, nodes: Nodes, choice: Choice) -> None:
        entry = choice.entry
        self._nodes = nodes
        self._released = False
        self.choice = choice
        self.entry = entry
        self.session: NodeSession = entry.load.host
        self.revision: int = entry.facts.revision or 0
        entry.room.take()
        entry.load.room.take()
        nodes.slot_taken()

    @property
    def workspace(self) -> str:
        return self.entry.pool.workspace

    def release(self) -> None:
        """Give the slot back; a call that waits gets it. A second call changes nothing."""
        if self._released:
            return
        self._released = True
        self.entry.room.give_back()
        self.entry.load.room.give_back()
        self._nodes.slot_released(self.entry)


Waiting = Waiter[NodeSession, Slot]


class Nodes:
    """Every connected node, and the calls that wait for one.

    Attributes:
        placements: why the last attempts went where they did.

    Args:
        now_ms: the clock.
        queue_limit: calls of one workspace that may wait at once; the next is refused with 429.
        draw: chance, a number in [0, 1).
        policy: what the operator wants of nodes.
        affinity_keys: remembered for each workspace, each for `affinity_idle_s` after its last use.
        standing: a node's, from 0 to 1, and whether it is trusted.
        round_trip_s: measured to a peer, by its PeerId; None while it is not.
        sample: candidates compared in one choice.
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int],
        queue_limit: int,
        draw: Callable[[], float] = random_module.random,
        policy: Policy = ANY_NODE,
        affinity_keys: int = 8192,
        affinity_idle_s: float = 3600.0,
        standing: Callable[[Address], tuple[float, bool]] = lambda node: (1.0, True),
        round_trip_s: Callable[[str], float | None] = lambda peer_id: None,
        sample: int = SAMPLE,
    ) -> None:
        self._now_ms = now_ms
        self._queue_limit = queue_limit
        self._draw = draw
        self._policy = policy
        self._affinity_keys = affinity_keys
        self._affinity_idle_ms = int(affinity_idle_s * 1000)
        self._standing = standing
        self._round_trip_s = round_trip_s
        self._sample = sample
        self._sessions: dict[Address, NodeSession] = {}
        self._histories: OrderedDict[Address, NodeHistory] = OrderedDict()
        self._pools: dict[str, Pool] = {}
        self.placements = PlacementLog()
        self._due: list[tuple[int, int, Address, Trouble | None]] = []
        self._numbers = itertools.count(1)
        self._turns = itertools.count(1)
        self._why: dict[str, tuple[int, dict[str, int]]] = {}
        self._outvoted: dict[tuple[Address, str], int] = {}
        #: what a workspace that no node serves waits for, in words; empty where it waits for nothing
        self.on_the_way: Callable[[str], str] = lambda workspace: ""
        self._hold_promised = False
        self._began_at_ms = now_ms()
        # oldest first
        self._left_at_ms: dict[Address, int] = {}
        self._running = 0
        self._idle: trio.Event | None = None

    def __iter__(self) -> Iterator[NodeSession]:
        return iter(self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, node: Address) -> NodeSession | None:
        """Return the session of *node*, or None while it is not connected."""
        return self._sessions.get(node)

    # -- what nodes say

    def attach(self, session: NodeSession) -> NodeSession | None:
        """Make *session* the one of its node; return the one it replaces, which the caller ends."""
        replaced = self._sessions.get(session.node)
        if replaced is not None:
            self._leave_pools(replaced)
        self._sessions[session.node] = session
        self._left_at_ms.pop(session.node, None)
        session.load.history = self._history(session.node)
        for pool in self._pools.values():
            self._refresh_entry(pool, session, self._now_ms())
        self._refresh(session)
        self._serve(session.load)
        return replaced

    def detach(self, session: NodeSession) -> None:
        """Forget *session*, unless another has replaced it already."""
        if self._sessions.get(session.node) is session:
            del self._sessions[session.node]
            self._left_at_ms[session.node] = self._now_ms()
            if len(self._left_at_ms) > REMEMBERED_NODES:
                del self._left_at_ms[next(iter(self._left_at_ms))]
            self._leave_pools(session)

    def heard(self, session: NodeSession, heartbeat: Heartbeat) -> None:
        """Take over a heartbeat; calls that waited for what it brings go on."""
        session.hear(heartbeat, self._now_ms())
        if self._sessions.get(session.node) is session:
            self._refresh(session, heard=True)
            self._serve(session.load)

    def assign(self, session: NodeSession, assigned: Mapping[str, Collection[int]]) -> None:
        """Note which revisions of which workspaces the node may serve: during a roll-out two of one."""
        session.assign(assigned)
        if self._sessions.get(session.node) is session:
            self._refresh(session)
            self._serve(session.load)

    def retain(self, workspaces: Mapping[str, WorkspaceSpec]) -> None:
        """Take over what these workspaces want now; forget all others that nobody waits for."""
        for workspace, spec in workspaces.items():
            pool = self._pools.get(workspace)
            if pool is not None and pool.terms != (terms := _terms(spec)):
                self._set_terms(pool, terms)
        for workspace in [one for one, pool in self._pools.items() if one not in workspaces and not len(pool.lines)]:
            pool = self._pools.pop(workspace)
            for entry in list(pool):
                entry.load.entries.pop(workspace, None)
            self._why.pop(workspace, None)

    def standing_changed(self, node: Address) -> None:
        """Take over a node's new standing."""
        session = self._sessions.get(node)
        if session is not None:
            self._refresh(session)

    def hold(self, session: NodeSession, *, challenged: bool) -> None:
        """Keep tasks from *session* while it is challenged, or let them go there again. What runs there runs on."""
        session.challenged = challenged
        if self._sessions.get(session.node) is session:
            self._refresh(session)
            self._serve(session.load)

    def outvote(self, node: Address, workspace: str, until_ms: int) -> None:
        """Keep a workspace's tasks from a node until then: two others contradicted an answer from there."""
        now_ms = self._now_ms()
        self._outvoted = {key: at_ms for key, at_ms in self._outvoted.items() if at_ms > now_ms}
        self._outvoted[node, workspace] = max(until_ms, self._outvoted.get((node, workspace), 0))
        session = self._sessions.get(node)
        if session is not None:
            self._refresh(session)

    def outvoted_until_ms(self, node: Address, workspace: str) -> int:
        """Return until when a workspace's tasks are kept from a node for that; 0 when they are not."""
        until_ms = self._outvoted.get((node, workspace), 0)
        return until_ms if until_ms > self._now_ms() else 0

    def ready(self, spec: WorkspaceSpec, *, free: bool) -> list[NodeSession]:
        """Return the nodes that may take a task of *spec*; with *free* those that have a slot for it now."""
        pool, now_ms = self._pool(spec), self._now_ms()
        entries = [entry for entry in pool.entries.values() if entry.reason is None]
        return [entry.load.host for entry in entries if not free or entry.free(now_ms) > 0]

    # -- slots

    def take_to_check(self, session: NodeSession, spec: WorkspaceSpec) -> Slot | None:
        """Return a slot on *session* itself for a task of this bootstrap's own that looks into the node, or None.

        Nobody's turn is taken: the node is held back, or the workspace is one that clients do not call.
        """
        choice = self._pool(spec).choose_to_check(session, session.node, self._now_ms())
        return None if choice is None else Slot(self, choice)

    def take(
        self,
        spec: WorkspaceSpec,
        tried: Collection[NodeSession] = (),
        *,
        promised: bool = False,
        affinity: bytes = b"",
    ) -> Slot | None:
        """Return a slot when one is free now and nobody waits before the caller; else None. See `acquire`."""
        pool = self._pools.get(spec.id)
        if pool is None or pool.terms.revision < spec.revision:
            pool = self._pool(spec)
        if len(pool.lines) and pool.lines.has_head(promised=not self._hold_promised):
            return None
        if promised and self._hold_promised:
            return None
        now_ms = self._now_ms()
        if affinity:
            host = self._stuck_to(pool, affinity, tried, now_ms)
            if host is not None:
                choice = pool.choose_only(host, host.node, now_ms)
                return None if choice is None else self._granted(choice, affinity)
        choice = pool.choose(now_ms, self._draw, self._current(tried) if tried else ())
        return None if choice is None else self._granted(choice, affinity)

    def take_preferred(
        self,
        spec: WorkspaceSpec,
        gpu_types: Sequence[str],
        tried: Collection[NodeSession] = (),
        *,
        promised: bool = False,
    ) -> Slot | None:
        """Return a slot that is free now on the best of *gpu_types* that any node has free; None when none has.

        For calls with an order of their own: unlike the workspace's order this has no index, so it looks at every
        candidate.
        """
        pool = self._pool(spec)
        if len(pool.lines) and pool.lines.has_head(promised=not self._hold_promised):
            return None
        if promised and self._hold_promised:
            return None
        now_ms = self._now_ms()
        current = set(self._current(tried))
        by_rank: dict[int, list[NodeSession]] = {}
        hosts: list[NodeSession] = [entry.load.host for entry in pool]
        for host in hosts:
            rank = gpu_rank(gpu_types, host.held_gpus(spec.id)) if host not in current else None
            if rank is not None:
                by_rank.setdefault(rank, []).append(host)
        for rank in sorted(by_rank):
            wanted = set(by_rank[rank])
            choice = pool.choose(now_ms, self._draw, [host for host in hosts if host not in wanted])
            if choice is not None and choice.entry.load.host in wanted:
                return self._granted(choice, b"")
        return None

    async def acquire(
        self,
        spec: WorkspaceSpec,
        *,
        tried: Collection[NodeSession] = (),
        timeout_s: float,
        promised: bool = False,
        affinity: bytes = b"",
        task_id: str = "",
        priority: int = 0,
        caller: str = "",
    ) -> Slot:
        """Return a slot for one attempt of *spec*, waiting in a bounded queue: callers in turn, the calls of each by
        priority, then by coming.

        Args:
            tried: sessions that must not be asked again for this task.
            timeout_s: how long the call may wait.
            promised: the task is in the store: it waits too when no node serves the workspace now, takes no place of a
                client's in the queue, and gets nothing once this bootstrap stops.
            affinity: a key that sticks to a node; empty for none.
            task_id: under which its place in the queue is asked for.
            priority: higher goes before what else waits of the same caller.
            caller: the workspace whose token asked, where that is another than *spec*; else empty.

        Raises:
            NotServed: 503 when no node serves the workspace, 429 when the queue is full or the wait was too long.
        """
        slot = self.take(spec, tried, promised=promised, affinity=affinity)
        if slot is not None:
            return slot
        granted: list[Slot] = []
        ready = trio.Event()

        def take_turn(slot: Slot) -> None:
            granted.append(slot)
            ready.set()

        waiter = self.join(
            spec,
            take_turn,
            tried=tried,
            promised=promised,
            affinity=affinity,
            task_id=task_id,
            priority=priority,
            caller=caller,
        )
        place: int | None = None
        try:
            with trio.move_on_after(timeout_s):
                await ready.wait()
            if not granted:
                place = self.place_of(spec.id, task_id)
        except BaseException:
            for slot in granted:  # cancelled between being given a slot and waking up
                slot.release()
            raise
        finally:
            self.leave(spec, waiter)
        if granted:
            return granted[0]
        pool = self._pool(spec)
        if not pool.may_serve(self._current(tried)):
            raise self._no_node(spec)
        raise NotServed(
            429,
            "no_free_slot",
            f"no slot of workspace {spec.id} became free within {timeout_s:g} s; come again later",
            retry_after_s=self._retry_after_s(pool, caller),
            headers=self._queue_headers(pool, place),
        )

    def serves(self, spec: WorkspaceSpec, node: Address) -> bool:
        """Return whether *node* is here with the workspace and may be asked, be all its slots taken."""
        entry = self._pool(spec).entries.get(node)
        return entry is not None and entry.reason in (None, Exclusion.SET_ASIDE)

    def takes_calls(self, spec: WorkspaceSpec, node: Address) -> bool:
        """Return whether *node* is here with the workspace and among those that calls are given to, be all its slots
        taken."""
        entry = self._pool(spec).entries.get(node)
        return entry is not None and entry.reason is None

    def left_at_ms(self, node: Address) -> int | None:
        """Return when *node* left, this bootstrap's start where it was not here since; None while it is here."""
        return None if node in self._sessions else self._left_at_ms.get(node, self._began_at_ms)

    def stuck(self, spec: WorkspaceSpec, key: bytes) -> Address | None:
        """Return where *key* sticks, as far as is known here."""
        return self._pool(spec).affinity.node_of(key, self._now_ms())

    def stick(self, spec: WorkspaceSpec, key: bytes, node: Address) -> None:
        """Have calls under *key* go to *node*, while it is there."""
        self._pool(spec).affinity.stick(key, node, self._now_ms())

    async def acquire_on(
        self,
        spec: WorkspaceSpec,
        node: Address,
        *,
        timeout_s: float,
        promised: bool = False,
        task_id: str = "",
        caller: str = "",
        beside: bool = False,
    ) -> Slot:
        """Return a slot of *spec* on *node*, which has something that no other node has; waits before all others of
        its caller do.

        A node that failed of late is asked all the same: there is no other. See `acquire` for the arguments.

        Args:
            beside: where none is free, the node may let the call run in another's (`Ngpu-Beside`): it is asked at once.

        Raises:
            NotServed: 503 `node_away` when the node is not here or does not serve the workspace, 429 when no slot
                became free in time, or too many wait.
        """
        pool = self._pool(spec)
        waiter: Waiting | None = None
        granted: list[Slot] = []
        ready = trio.Event()

        def take_turn(slot: Slot) -> None:
            granted.append(slot)
            ready.set()

        try:
            with trio.move_on_after(timeout_s):
                while True:
                    entry = pool.entries.get(node)
                    if entry is None or entry.reason not in (None, Exclusion.SET_ASIDE):
                        why = "it is not connected" if entry is None or entry.reason is None else entry.reason.value
                        raise NotServed(503, "node_away", f"node {node} does not serve workspace {spec.id} now: {why}")
                    slot = self._free_on(pool, entry)
                    if slot is not None:
                        return slot
                    if beside:
                        return Slot(self, Choice(entry, self._now_ms(), (), "only_one", ()))
                    if waiter is None and not promised:
                        self._require_room(spec, pool, caller)
                    if waiter is None or waiter.only is not entry.load.host:  # its node left, and is back
                        if waiter is not None:
                            pool.lines.leave(waiter)
                        waiter = Waiter(
                            task_id, take_turn, (), entry.load.host, priority=PRIORITY_BEFORE_ALL, caller=caller
                        )
                        pool.lines.join(waiter)
                    with trio.move_on_after(LOOK_ANEW_S):
                        await ready.wait()
                    if granted:
                        slot = granted.pop()
                        if slot.session.node == node:
                            return slot
                        slot.release()  # its node left while this waited, and it was given another's
                        waiter, ready = None, trio.Event()
        finally:
            for slot in granted:
                slot.release()
            if waiter is not None:
                self.leave(spec, waiter)
        raise NotServed(
            429,
            "no_free_slot",
            f"no slot of workspace {spec.id} on node {node} became free within {timeout_s:g} s",
            retry_after_s=self._retry_after_s(pool, caller),
        )

    def _free_on(self, pool: Pool, entry: Entry) -> Slot | None:
        """Return a slot of a candidate that may be asked, were it set aside."""
        now_ms = self._now_ms()
        if entry.reason is None:
            choice = pool.choose_only(entry.load.host, entry.load.node, now_ms)
            return None if choice is None else Slot(self, choice)
        return Slot(self, Choice(entry, now_ms, (), "only_one", ())) if entry.free(now_ms) > 0 else None

    def join(
        self,
        spec: WorkspaceSpec,
        granted: Callable[[Slot], None],
        *,
        tried: Collection[NodeSession] = (),
        promised: bool = False,
        affinity: bytes = b"",
        task_id: str = "",
        priority: int = 0,
        caller: str = "",
    ) -> Waiting:
        """Put a call into the queue: *granted* is called with its slot when its turn came, perhaps at once.

        Raises:
            NotServed: as `acquire`; then it does not wait.
        """
        pool = self._pool(spec)
        now_ms = self._now_ms()
        current = self._current(tried)
        if not promised:
            if not pool.may_serve(current):
                raise self._no_node(spec)
            self._require_room(spec, pool, caller)
        only = self._stuck_to(pool, affinity, tried, now_ms) if affinity else None
        waiter: Waiting = Waiter(task_id, granted, tried, only, promised, priority, affinity, caller=caller)
        pool.lines.join(waiter)
        self._serve_pool(pool)
        return waiter

    def leave(self, spec: WorkspaceSpec, waiter: Waiting) -> None:
        """Take a call out of the queue, if it is still there."""
        pool = self._pools.get(spec.id)
        if pool is not None:
            pool.lines.leave(waiter)

    def refused_full(self, slot: Slot) -> None:
        """Note that the node had no slot after all: our estimate was too good."""
        entry = slot.entry
        entry.pool.full_after_all(entry, self._now_ms())
        heapq.heappush(self._due, (entry.full_until_ms, next(self._numbers), entry.load.node, None))

    def ended(self, slot: Slot, fared: Fared, seconds: float) -> None:
        """Learn from an attempt that ended: how long the node took, and whether it failed."""
        entry = slot.entry
        if fared is Fared.NO_MATTER:
            return
        own, node = entry.history.trouble, entry.load.history.trouble
        if fared is Fared.WELL:
            entry.known_ms = self._now_ms()
            if entry.full_until_ms > entry.known_ms:  # the slot this one had is free now
                entry.full_until_ms = 0
                entry.pool.settle(entry, entry.known_ms)
                self._serve(entry.load)
            entry.pool.took(entry, seconds)
            on_probation = own.succeeded() | node.succeeded()
            entry.reconsider()
            if on_probation:
                self._judge_all(entry.load)
            return
        trouble = node if fared is Fared.NODE_FAILED else own
        now_ms = self._now_ms()
        if trouble.failed(now_ms, self._draw()):
            log.info(
                "node_set_aside",
                node=entry.load.node,
                workspace="" if trouble is node else entry.pool.workspace,
                failures=round(trouble.rate, 2),
                for_s=round((trouble.until_ms - now_ms) / 1000, 1),
            )
            heapq.heappush(self._due, (trouble.until_ms, next(self._numbers), entry.load.node, trouble))
            self._judge_all(entry.load)
        entry.reconsider()

    def placed(self, task_id: str, attempt: int, slot: Slot, *, lasting: bool) -> None:
        """Keep why *attempt* went where it did; *lasting*: somebody may ask for it later."""
        self.placements.note(task_id, attempt, slot.choice, lasting=lasting)

    # -- who waits

    def waiting(self, workspace: str) -> int:
        """Return how many clients' calls of *workspace* wait for a slot."""
        pool = self._pools.get(workspace)
        return pool.lines.clients_waiting if pool is not None else 0

    def queue_length(self, workspace: str) -> int:
        """Return how many calls and promised tasks of *workspace* wait."""
        pool = self._pools.get(workspace)
        return len(pool.lines) if pool is not None else 0

    def place_of(self, workspace: str, task_id: str) -> int | None:
        """Return how many wait before a task does, as of a moment ago; None when it does not wait."""
        pool = self._pools.get(workspace)
        return pool.lines.place_of(task_id, self._now_ms()) if pool is not None and len(pool.lines) else None

    def require_served(self, spec: WorkspaceSpec) -> None:
        """Return if some node serves *spec* now, be it with every slot taken.

        Raises:
            NotServed: 503.
        """
        if not self._pool(spec).may_serve(()):
            raise self._no_node(spec)

    def exclusions(self, spec: WorkspaceSpec) -> Mapping[Address, Exclusion]:
        """Return why each node that could not take a task of *spec* now could not. Looks at every node."""
        pool, now_ms = self._pool(spec), self._now_ms()
        found: dict[Address, Exclusion] = {}
        for session in self._sessions.values():
            reason = self.exclusion_of(pool, session, now_ms)
            if reason is not None:
                found[session.node] = reason
        return found

    def why(self, session: NodeSession, spec: WorkspaceSpec) -> Exclusion | None:
        """Return why *session* could not take a task of *spec* now, None if it could."""
        return self.exclusion_of(self._pool(spec), session, self._now_ms())

    def exclusion_of(self, pool: Pool, session: NodeSession, now_ms: int) -> Exclusion | None:
        """Return why *session* could not take a task of the pool's workspace now, None if it could."""
        entry = pool.entries.get(session.node)
        if entry is None or entry.load is not session.load:
            return session.load.reason or Exclusion.NOT_DEPLOYED
        pool.judge(entry, now_ms)
        if entry.reason is not None:
            return entry.reason
        return Exclusion.NO_FREE_SLOT if entry.free(now_ms) <= 0 else None

    def hold_promised(self) -> None:
        """Give no more slots to tasks that wait in the store: this bootstrap stops, and the next run takes them up."""
        self._hold_promised = True

    async def wait_idle(self) -> None:
        """Return when no attempt runs anywhere."""
        while self._running:
            self._idle = self._idle or trio.Event()
            await self._idle.wait()

    async def run(self) -> None:
        """Serve waiting calls when nothing but time has passed; for ever."""
        while True:
            await trio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Do what is due: pauses that end, and photographs."""
        now_ms = self._now_ms()
        while self._due and self._due[0][0] <= now_ms:
            _, _, node, trouble = heapq.heappop(self._due)
            if trouble is not None and trouble.comes_back(now_ms):
                log.info("node_tried_again", node=node)
            session = self._sessions.get(node)
            if session is not None:
                self._judge_all(session.load)
                self._serve(session.load)
        for pool in self._pools.values():
            pool.photograph(now_ms)

    # -- told by slots

    def slot_taken(self) -> None:
        """Count an attempt that may begin."""
        self._running += 1

    def slot_released(self, freed: Entry) -> None:
        """Count an attempt that ended, and give its place on."""
        load = freed.load
        self._running -= 1
        if not self._running and self._idle is not None:
            self._idle.set()
            self._idle = None
        now_ms = 0
        if freed.pool.contention > CONTENDED and not freed.full_until_ms:
            now_ms = self._now_ms()
            freed.pool.freed(freed, now_ms)
        for entry in load.entries.values():
            if entry.place < 0 and entry.reason is None:
                now_ms = now_ms or self._now_ms()
                entry.pool.settle(entry, now_ms)
        self._serve(load)

    # -- within

    def _history(self, node: Address) -> NodeHistory:
        found = self._histories.get(node)
        if found is None:
            found = self._histories[node] = NodeHistory()
            if len(self._histories) > REMEMBERED_NODES:
                self._histories.popitem(last=False)
        self._histories.move_to_end(node)
        return found

    def _pool(self, spec: WorkspaceSpec) -> Pool:
        """Return the pool of the workspace at its newest revision known here."""
        pool = self._pools.get(spec.id)
        if pool is None:
            affinity = AffinityTable(self._affinity_keys, self._affinity_idle_ms)
            pool = self._pools[spec.id] = Pool(spec.id, _terms(spec), affinity, sample=self._sample)
            for session in self._sessions.values():
                self._refresh_entry(pool, session, self._now_ms())
        elif pool.terms.revision < spec.revision:
            self._set_terms(pool, _terms(spec))
        return pool

    def _set_terms(self, pool: Pool, terms: Terms) -> None:
        pool.terms = terms
        now_ms = self._now_ms()
        for session in self._sessions.values():
            self._refresh_entry(pool, session, now_ms)
        self._serve_pool(pool)

    def _refresh(self, session: NodeSession, *, heard: bool = False) -> None:
        """Work out anew what *session* may get, after it said something or something was decided about it."""
        load, now_ms = session.load, self._now_ms()
        load.history.trouble.fade(now_ms)
        if now_ms >= session.measure_at_ms:
            measured_s = self._round_trip_s(session.peer_id)
            session.measure_at_ms = now_ms + (MEASURE_MS if measured_s is not None else 0)
            if measured_s is not None:
                session.round_trip_s = load.rtt_s = measured_s
        load.score, is_trusted = self._standing(session.node)
        facts = NodeFacts(
            session.admitted, session.software, is_trusted, session.draining, session.round_trip_s, session.challenged
        )
        load.reason = node_exclusion(facts, self._policy)
        for workspace in session.deployments:
            if workspace not in load.entries and workspace in self._pools:
                self._pools[workspace].enter(load)
        for entry in load.entries.values():
            self._refresh_entry(entry.pool, session, now_ms, heard=heard)

    def _refresh_entry(self, pool: Pool, session: NodeSession, now_ms: int, *, heard: bool = False) -> None:
        facts, slots_free, ours = session.facts(pool.workspace, pool.terms)
        is_new = pool.workspace not in session.load.entries
        if is_new and facts is NOTHING:
            return  # most nodes have nothing to do with most workspaces
        if self._outvoted and self.outvoted_until_ms(session.node, pool.workspace):
            facts = replace(facts, outvoted=True)
        entry = pool.enter(session.load)
        entry.facts = facts
        if heard or is_new:
            entry.history.fade(now_ms)
            pool.heard(entry, now_ms, slots_free, ours)
        else:
            entry.room.resize(pool.terms.concurrency)
        entry.reconsider()
        pool.judge(entry, now_ms)

    def _leave_pools(self, session: NodeSession) -> None:
        for entry in session.load.entries.values():
            entry.pool.remove(session.load)
            self._serve_pool(entry.pool)  # those that stuck to it may go elsewhere now

    def _judge_all(self, load: Load) -> None:
        now_ms = self._now_ms()
        for entry in load.entries.values():
            if entry.pool.entries.get(load.node) is entry:
                entry.reconsider()
                entry.pool.judge(entry, now_ms)

    def _current(self, tried: Collection[NodeSession]) -> Collection[NodeSession]:
        """Return those of *tried* that still stand: a node that came back since is another session, and worth a try."""
        if not tried:
            return ()
        return [session for session in tried if self._sessions.get(session.node) is session]

    def _stuck_to(self, pool: Pool, key: bytes, tried: Collection[NodeSession], now_ms: int) -> NodeSession | None:
        """Return the session that *key* sticks to, if it may get tasks at all."""
        node = pool.affinity.node_of(key, now_ms)
        entry = pool.entries.get(node) if node is not None else None
        if entry is None or entry.reason is not None or entry.load.host in tried:
            return None
        session: NodeSession = entry.load.host
        return session

    def _granted(self, choice: Choice, affinity: bytes = b"") -> Slot:
        if affinity:
            pool, load = choice.entry.pool, choice.entry.load
            pool.affinity.stick(affinity, load.node, choice.at_ms)
            pool.lines.stick(affinity, load.host)
        return Slot(self, choice)

    def _serve(self, load: Load) -> None:
        """Give what is free on a node to calls that wait, workspaces in turn."""
        hungry = [entry.pool for entry in load.entries.values() if len(entry.pool.lines)]
        if not hungry:
            return
        if len(hungry) > 1:
            hungry.sort(key=_turn)
        while hungry:
            hungry = [pool for pool in hungry if self._serve_one(pool)]

    def _serve_pool(self, pool: Pool) -> None:
        while self._serve_one(pool):
            pass

    def _serve_one(self, pool: Pool) -> bool:
        """Give one slot to the call whose turn it is; return whether there was one to give, and somebody to take it."""
        lines = pool.lines
        if not len(lines) or not pool.is_open:
            return False
        now_ms = self._now_ms()
        promised = not self._hold_promised
        for line in lines.in_turn():
            head = line.head(promised=promised)
            for waiter in line.picky_before(head, promised=promised):
                if waiter.only is not None:
                    choice = pool.choose_only(waiter.only, waiter.only.node, now_ms)
                else:
                    choice = pool.choose(now_ms, self._draw, self._current(waiter.tried))
                if choice is not None:
                    self._grant(pool, waiter, choice)
                    return True
            if head is None:
                continue  # nobody in this line can take what is free
            choice = pool.choose(now_ms, self._draw)
            if choice is None:
                return False
            self._grant(pool, head, choice)
            return True
        return False

    def _grant(self, pool: Pool, waiter: Waiting, choice: Choice) -> None:
        pool.lines.serve(waiter)
        pool.lines.turn = next(self._turns)
        waiter.granted(self._granted(choice, waiter.affinity))

    def _require_room(self, spec: WorkspaceSpec, pool: Pool, caller: str) -> None:
        """Return if one more call of *caller* may wait.

        Raises:
            NotServed: 429.
        """
        lines = pool.lines
        if lines.has_room(caller, self._queue_limit):
            return
        raise NotServed(
            429,
            "queue_full",
            f"every slot of workspace {spec.id} is taken and {lines.clients_waiting} calls wait already"
            + (", as many of them yours as one caller may have; come again later" if caller else "; come again later"),
            retry_after_s=self._retry_after_s(pool, caller),
            headers=self._queue_headers(pool),
        )

    def _retry_after_s(self, pool: Pool, caller: str) -> int:
        """Return in how many seconds what goes before a call of *caller* should be gone, were it to move as of late."""
        slots = max(1, pool.slots(self._now_ms()))
        return min(RETRY_AFTER_LIMIT_S, max(1, math.ceil(pool.typical_s * (pool.lines.ahead_of(caller) + 1) / slots)))

    def _queue_headers(self, pool: Pool, place: int | None = None) -> dict[str, str]:
        headers = {"Ngpu-Queue-Length": str(len(pool.lines))}
        return headers if place is None else headers | {"Ngpu-Queue-Position": str(place)}

    def _no_node(self, spec: WorkspaceSpec) -> NotServed:
        """Return the refusal that says why no node can run *spec*; the nodes are looked at once a second at most."""
        now_ms = self._now_ms()
        at_ms, counts = self._why.get(spec.id, (-_WHY_FRESH_MS, {}))
        if now_ms - at_ms >= _WHY_FRESH_MS:
            counts = {}
            for reason in self.exclusions(spec).values():
                counts[reason.value] = counts.get(reason.value, 0) + 1
            self._why[spec.id] = (now_ms, counts)
        if waits_for := self.on_the_way(spec.id):
            text = f"no node serves workspace {spec.id} yet: {waits_for}; call again, or make it a task, which waits"
            return NotServed(503, "no_node", text, retry_after_s=2)
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no node is connected"
        return NotServed(503, "no_node", f"no node serves workspace {spec.id} now ({why})", retry_after_s=2)


def _terms(spec: WorkspaceSpec) -> Terms:
    return Terms(spec.revision, spec.concurrency, tuple(spec.gpu_types))


def _turn(pool: Pool) -> int:
    return pool.lines.turn
