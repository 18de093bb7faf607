"""The live view of nodes: who is connected, what each serves, what runs there on our account.

Owns the sessions (one per connected node), the count of running attempts per deployment, and the bounded queue of
calls that wait for a slot. The choice itself is `scheduling`; what a node says is read by `control`. Everything here
happens on one thread and changes between two awaits only, so no lock is needed.

The invariant: every `Slot` handed out is released exactly once, whatever happens to its caller, and a released slot
goes to the call that waited longest.
"""

from __future__ import annotations

import math
import random as random_module
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import trio

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.scheduling import Candidate, Choice, Exclusion, choose
from ngpu_protocol.control import DeploymentPhase, DeploymentState, GpuOffer, Heartbeat, HostOffer, ServiceOffer
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

# A node that refused for want of a slot is not asked again before this, unless it says something or we release one.
FULL_PAUSE_MS = 50
# How often time alone may change a choice (a pause that ends) for calls that wait.
TICK_S = 0.1


@dataclass(eq=False, slots=True)
class NodeSession:
    """One connected run of one node.

    Attributes:
        session: the 32 random bytes of this run of the node; every order carries them.
        requests: the pooled HTTP client over streams of the connection the node itself made.
        gpus: what it offers now.
        gpus_shown: ids of all it has offered in this session: a receipt may name one that has become sick since.
        reported: whether a heartbeat has come, so that the rest is known.
        assigned: by workspace id, the revisions it was told to run and may serve: the one wanted there now, and while
            it is replaced the one before. A node gets no task of another, whatever it claims to run.
        host: what its machine has for workspaces; None while unknown.
        reports: every deployment as last reported.
        deployments: of those, by workspace, the one that takes its tasks, or would.
        ip: where its connection comes from; empty where that is not known.
        in_flight: our attempts running there now, by workspace id.
        peak: the most of them at once since the last heartbeat.
        counted: `peak` when the last heartbeat came: what its `slots_free` may count of ours.
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
    gpus_shown: set[bytes] = field(default_factory=set)
    slots_free: int = 0
    reported: bool = False
    draining: bool = False
    host: HostOffer | None = None
    reports: tuple[DeploymentState, ...] = ()
    deployments: dict[str, DeploymentState] = field(default_factory=dict)
    services: tuple[ServiceOffer, ...] = ()
    assigned: Mapping[str, Collection[int]] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    total_in_flight: int = 0
    peak: dict[str, int] = field(default_factory=dict)
    total_peak: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    total_counted: int = 0
    full_until_ms: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gpus_shown |= {gpu.id for gpu in self.gpus}

    def hear(self, heartbeat: Heartbeat, now_ms: int) -> None:
        """Take over what the node says of itself."""
        self.heard_at_ms = now_ms
        self.reported = True
        self.slots_free = heartbeat.slots_free
        self.draining = heartbeat.draining
        self.host = heartbeat.host
        self.reports = heartbeat.deployments
        self._pick()
        self.services = tuple(heartbeat.services)
        if heartbeat.gpus is not None:
            self.gpus = heartbeat.gpus
            self.gpus_shown |= {gpu.id for gpu in heartbeat.gpus}
        self.counted, self.peak = self.peak, dict(self.in_flight)
        self.total_counted, self.total_peak = self.total_peak, self.total_in_flight
        self.full_until_ms.clear()

    def assign(self, assigned: Mapping[str, Collection[int]]) -> None:
        """Take over which revisions of which workspaces the node may serve."""
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

    def candidate(self, spec: WorkspaceSpec, now_ms: int) -> Candidate:
        """Return what scheduling needs to know of this node for the workspace *spec*.

        While a new revision is rolled out, a deployment of either counts as one of *spec*: the order names the one
        that is there (`Slot.revision`).
        """
        allowed = self.assigned.get(spec.id, ())
        state = self.deployments.get(spec.id) if allowed else None
        capacity, in_use = 0, 0
        if state is not None:
            capacity = spec.concurrency
            mine = self.in_flight.get(spec.id, 0)
            # What others run there is what the node says is taken, less what may be ours.
            others = max(0, capacity - state.slots_free - self.counted.get(spec.id, 0))
            node_others = max(0, self.slots - self.slots_free - self.total_counted)
            free = min(capacity - mine - others, self.slots - self.total_in_flight - node_others)
            if self.full_until_ms.get(spec.id, 0) > now_ms:
                free = 0
            in_use = capacity - max(0, min(free, capacity))
        return Candidate(
            node=self.node,
            admitted=self.admitted,
            heard_at_ms=self.heard_at_ms,
            draining=self.draining,
            revision=None if state is None else spec.revision if state.revision in allowed else state.revision,
            ready=state is not None and state.state == "ready",
            capacity=capacity,
            in_use=in_use,
        )


class Slot:
    """The right to run one attempt of a workspace on a node, until `release`.

    Attributes:
        revision: of the deployment that is to run it.
    """

    __slots__ = ("_nodes", "_released", "revision", "session", "workspace")

    def __init__(self, nodes: Nodes, session: NodeSession, workspace: str) -> None:
        self._nodes = nodes
        self._released = False
        self.session = session
        self.workspace = workspace
        self.revision = session.deployments[workspace].revision
        count = session.in_flight.get(workspace, 0) + 1
        session.in_flight[workspace] = count
        session.total_in_flight += 1
        nodes.slot_taken()
        if count > session.peak.get(workspace, 0):
            session.peak[workspace] = count
        session.total_peak = max(session.total_peak, session.total_in_flight)

    def release(self) -> None:
        """Give the slot back; the longest waiting call gets it. A second call changes nothing."""
        if self._released:
            return
        self._released = True
        left = self.session.in_flight.get(self.workspace, 0) - 1
        if left > 0:
            self.session.in_flight[self.workspace] = left
        else:
            self.session.in_flight.pop(self.workspace, None)
        self.session.total_in_flight -= 1
        self._nodes.slot_released()


@dataclass(eq=False, slots=True)
class _Waiter:
    spec: WorkspaceSpec
    tried: Collection[NodeSession]
    promised: bool
    ready: trio.Event = field(default_factory=trio.Event)
    slot: Slot | None = None
    gone: bool = False


class Nodes:
    """Every connected node, and the calls that wait for one.

    Args:
        now_ms: the clock.
        queue_limit: calls of one workspace that may wait at once; the next is refused with 429.
        draw: chance, a number in [0, 1).
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int],
        queue_limit: int,
        draw: Callable[[], float] = random_module.random,
    ) -> None:
        self._now_ms = now_ms
        self._queue_limit = queue_limit
        self._draw = draw
        self._sessions: dict[Address, NodeSession] = {}
        self._waiting: dict[str, deque[_Waiter]] = {}
        self._clients_waiting: Counter[str] = Counter()
        self._hold_promised = False
        self._running = 0
        self._idle = trio.Event()

    def __iter__(self) -> Iterator[NodeSession]:
        return iter(self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, node: Address) -> NodeSession | None:
        """Return the session of *node*, or None while it is not connected."""
        return self._sessions.get(node)

    def attach(self, session: NodeSession) -> NodeSession | None:
        """Make *session* the one of its node; return the one it replaces, which the caller ends."""
        replaced = self._sessions.get(session.node)
        self._sessions[session.node] = session
        return replaced

    def detach(self, session: NodeSession) -> None:
        """Forget *session*, unless another has replaced it already."""
        if self._sessions.get(session.node) is session:
            del self._sessions[session.node]

    def heard(self, session: NodeSession, heartbeat: Heartbeat) -> None:
        """Take over a heartbeat; calls that waited for what it brings go on."""
        session.hear(heartbeat, self._now_ms())
        self.serve_waiting()

    def choice(self, spec: WorkspaceSpec, tried: Collection[NodeSession] = ()) -> Choice:
        """Return where an attempt of *spec* would run now, and why not elsewhere; reserves nothing."""
        now_ms = self._now_ms()
        candidates = [session.candidate(spec, now_ms) for session in self._sessions.values()]
        # A node that was restarted or came back since is another session, and worth another try.
        nodes = [session.node for session in tried if self._sessions.get(session.node) is session] if tried else ()
        return choose(candidates, revision=spec.revision, now_ms=now_ms, draw=self._draw(), tried=nodes)

    def require_served(self, spec: WorkspaceSpec) -> None:
        """Return if some node serves *spec* now, be it with every slot taken.

        Raises:
            NotServed: 503.
        """
        choice = self.choice(spec)
        if choice.node is None and not choice.waitable:
            raise no_node(spec, choice.excluded)

    def hold_promised(self) -> None:
        """Give no more slots to tasks that wait in the store: this bootstrap stops, and the next run takes them up."""
        self._hold_promised = True

    def waiting(self, workspace: str) -> int:
        """Return how many clients' calls of *workspace* wait for a slot."""
        return self._clients_waiting[workspace]

    def take(self, spec: WorkspaceSpec, tried: Collection[NodeSession] = (), *, promised: bool = False) -> Slot | None:
        """Return a slot when one is free now and nobody waits before the caller; else None. See `acquire`."""
        if self._waiting.get(spec.id) or (promised and self._hold_promised):
            return None
        node = self.choice(spec, tried).node
        return Slot(self, self._sessions[node], spec.id) if node is not None else None

    async def acquire(
        self,
        spec: WorkspaceSpec,
        *,
        tried: Collection[NodeSession] = (),
        timeout_s: float,
        promised: bool = False,
    ) -> Slot:
        """Return a slot for one attempt of *spec*, waiting for one in a bounded queue, first come first served.

        Args:
            tried: sessions that must not be asked again for this task.
            timeout_s: how long the call may wait.
            promised: the task is in the store: it waits too when no node serves the workspace now, takes no place of a
                client's in the queue, and gets nothing once this bootstrap stops.

        Raises:
            NotServed: 503 when no node serves the workspace, 429 when the queue is full or the wait was too long.
        """
        slot = self.take(spec, tried, promised=promised)
        if slot is not None:
            return slot
        choice = self.choice(spec, tried)
        if not choice.waitable and not promised:
            raise no_node(spec, choice.excluded)
        queue = self._waiting.setdefault(spec.id, deque())
        if not promised and (waiting := self.waiting(spec.id)) >= self._queue_limit:
            raise NotServed(
                429,
                "queue_full",
                f"every slot of workspace {spec.id} is taken and {waiting} calls wait already; come again later",
                retry_after_s=1,
            )
        waiter = _Waiter(spec, tried, promised)
        queue.append(waiter)
        self._count(waiter, 1)
        try:
            self.serve_waiting()
            with trio.move_on_after(timeout_s):
                await waiter.ready.wait()
            slot, waiter.slot = waiter.slot, None
        finally:
            waiter.gone = True
            if not waiter.ready.is_set():
                self._count(waiter, -1)
            if waiter.slot is not None:  # cancelled between being given a slot and waking up
                waiter.slot.release()
            self._drop_gone(spec.id, queue)
        if slot is not None:
            return slot
        choice = self.choice(spec, tried)
        if not choice.waitable:
            raise no_node(spec, choice.excluded)
        raise NotServed(
            429,
            "no_free_slot",
            f"no slot of workspace {spec.id} became free within {timeout_s:g} s; come again later",
            retry_after_s=max(1, math.ceil(timeout_s / 10)),
        )

    async def run(self) -> None:
        """Serve waiting calls when nothing but time has passed; for ever."""
        while True:
            await trio.sleep(TICK_S)
            if self._waiting:
                self.serve_waiting()

    def _drop_gone(self, workspace: str, queue: deque[_Waiter]) -> None:
        """Forget those at the front of a queue who left; those further back are passed over when their turn comes."""
        while queue and queue[0].gone:
            queue.popleft()
        if not queue and self._waiting.get(workspace) is queue:
            del self._waiting[workspace]

    def _count(self, waiter: _Waiter, change: int) -> None:
        if not waiter.promised:
            self._clients_waiting[waiter.spec.id] += change
            if not self._clients_waiting[waiter.spec.id]:
                del self._clients_waiting[waiter.spec.id]

    def refused_full(self, session: NodeSession, workspace: str) -> None:
        """Note that the node had no slot after all: our estimate was too good."""
        session.full_until_ms[workspace] = self._now_ms() + FULL_PAUSE_MS

    async def wait_idle(self) -> None:
        """Return when no attempt runs anywhere."""
        while self._running:
            await self._idle.wait()

    def slot_taken(self) -> None:
        """Count an attempt that may begin (told by `Slot`)."""
        self._running += 1

    def slot_released(self) -> None:
        """Count an attempt that ended (told by `Slot`), and give its place on."""
        self._running -= 1
        if not self._running:
            self._idle.set()
            self._idle = trio.Event()
        if self._waiting:
            self.serve_waiting()

    def serve_waiting(self) -> None:
        """Give free slots to waiting calls, longest waiting first.

        A call whose task tried some nodes already may be unable to take the slot that is free; those behind it are
        looked at then, and no others, so that one picky call does not hold up its queue.
        """
        for workspace, queue in list(self._waiting.items()):
            passed: list[_Waiter] = []
            while queue:
                waiter = queue.popleft()
                if waiter.gone:
                    continue
                if waiter.promised and self._hold_promised:
                    passed.append(waiter)
                    continue
                node = self.choice(waiter.spec, waiter.tried).node
                if node is None:
                    passed.append(waiter)
                    if not waiter.tried:
                        break
                    continue
                waiter.slot = Slot(self, self._sessions[node], workspace)
                waiter.ready.set()
                self._count(waiter, -1)
            queue.extendleft(reversed(passed))


def no_node(spec: WorkspaceSpec, excluded: Mapping[Address, Exclusion]) -> NotServed:
    """Return the refusal that says why no node can run *spec*."""
    counts: dict[str, int] = {}
    for reason in excluded.values():
        counts[reason.value] = counts.get(reason.value, 0) + 1
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no node is connected"
    return NotServed(503, "no_node", f"no node serves workspace {spec.id} now ({why})", retry_after_s=2)
