"""Tasks that are run again: the queue, the runs, and what follows from different answers.

Owns everything after the client has its answer, which nothing here delays: an answered task is drawn or not at once and
put into a bounded queue, or passed over when that is full. Runs go to nodes with a free slot while no client waits for
the workspace, as tasks of this bootstrap's own that no client is charged for and none sees in their lists.

What waits is in the store within moments, and there until what came of it is recorded, in one transaction: a restart
takes it up again, and so does a sibling after this bootstrap's death, where the task's own record has the request. Only
who still holds it records.

A node that two others contradict gets no more tasks of that workspace for a while, and one dispute: the answer to a
client who lies about a workspace is that his nodes leave it, not that they lose their trust.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import sqlalchemy as sa
import structlog
import trio

from ngpu_bootstrap.config import RechecksSection
from ngpu_bootstrap.dispatch.attempt import Attempt, How
from ngpu_bootstrap.dispatch.calls import Call, KeptBody, WholeBody
from ngpu_bootstrap.dispatch.ends import Ending
from ngpu_bootstrap.dispatch.errands import Errand, Errands
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.rechecks.deciding import Answer, Outcome, Peer, decide, may_judge
from ngpu_bootstrap.rechecks.sampling import Rates, is_drawn, rate
from ngpu_bootstrap.rechecks.waiting import Asked, Sealer, Waiting, restored, waiting
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.store import recheck_rows, waiting_rechecks
from ngpu_bootstrap.store.errors import BodyMissing, StoreError
from ngpu_bootstrap.store.recheck_rows import RecheckRow
from ngpu_bootstrap.store.records import Part, TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.store.waiting_rechecks import WaitingRow
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

API = "recheck"
CALLER = "bootstrap"
"""Who asked for these tasks: no workspace, so no client finds them among their own."""
RULE = "recheck"
WORKERS = 2
WAIT_LOOK_S = 0.5
RELOAD_S = 60.0
TAKE_OVER_S = 5.0
# After the start nodes come back one by one: for so long nobody is said to be missing.
NODES_COME_S = 60.0
# What has waited for so long, over restarts, is not run again: nodes and workspaces are others by then.
KEPT_MS = 24 * 3600 * 1000
# Verified receipts, faded, from which a node's word goes before that of one nobody knows.
KNOWN_FROM = 32.0
REMEMBERED_NODES = 50_000
# Runs on so many nodes at most when those that are asked do not answer.
TRIES = 3
# Three different answers so often: the workspace is not deterministic, and is looked at no more in this revision.
NOT_DETERMINISTIC_AT = 3


class RecheckDesk:
    """Has tasks run again. Its `run` must be running for as long as it is used.

    Attributes:
        passed_over: tasks that were drawn and not run again, for want of room or because their request is not known.

    Args:
        own: this bootstrap's address.
        secret: 32 bytes of this bootstrap's own, which decide what is drawn.
        wallets: whom each node's work pays, by its own signature.
        spec_of: what a workspace runs now, by its id; None where there is none.
    """

    def __init__(
        self,
        settings: RechecksSection,
        *,
        own: Address,
        secret: bytes,
        nodes: Nodes,
        standings: Standings,
        store: Store,
        errands: Errands,
        metrics: Metrics,
        wallets: Callable[[], Awaitable[Mapping[Address, str]]],
        spec_of: Callable[[str], WorkspaceSpec | None],
        answer_bytes: int,
        now_ms: Callable[[], int],
    ) -> None:
        self.passed_over = 0
        self._settings = settings
        self._rates = Rates(settings.often, settings.rare, settings.disputed, settings.least_a_day)
        self._own = own
        self._secret = secret
        self._nodes = nodes
        self._standings = standings
        self._store = store
        self._errands = errands
        self._metrics = metrics
        self._read_wallets = wallets
        self._spec_of = spec_of
        self._answer_bytes = answer_bytes
        self._now_ms = now_ms
        self._wallets: Mapping[Address, str] = {}
        self._sealer = Sealer(own, secret)
        self._nodes_are_here_s = 0.0
        self._fresh: list[tuple[Waiting, bool]] = []
        self._came = trio.Event()
        self._items: deque[Waiting] = deque()
        self._bytes = 0
        self._filled = trio.Event()
        self._suspected: dict[Address, int] = {}
        self._last_ms: dict[Address, int] = {}
        self._unfit: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._items)

    # -- told by the dispatcher

    def answered(self, call: Call, attempt: Attempt, ending: Ending, session: NodeSession | None) -> None:
        """Draw whether a task of a deterministic workspace, which has just ended, is run again. At once, no waiting.

        Args:
            session: of the node that ran it, be it gone by now: leaving is no way out.
        """
        settings, node = self._settings, attempt.signed.order.node
        if not settings.enabled or ending.state is not TaskState.FINISHED or attempt.how is not How.ANSWERED:
            return
        now_ms = self._now_ms()
        suspected = self._suspected.get(node, 0) > now_ms
        gap_ms = now_ms - self._last_ms.pop(node, now_ms)
        self._last_ms[node] = now_ms
        if len(self._last_ms) > REMEMBERED_NODES:
            del self._last_ms[next(iter(self._last_ms))]
        share = rate(self._standings.of(node), self._rates, now_ms, gap_ms=gap_ms, suspected=suspected)
        if not is_drawn(self._secret, call.task_id, share):
            return
        if self._unfit[call.spec.id, attempt.signed.order.revision] >= NOT_DETERMINISTIC_AT:
            return
        seen = attempt.observed()
        if session is None or seen.response_hash is None or not isinstance(call.body, WholeBody | KeptBody):
            self.passed_over += 1
            return
        peer = self._peer(session, call.spec.id, attempt.signed.order.revision)
        answer = Answer(attempt.status or 0, seen.response_hash)
        item = waiting(call, call.body, peer, answer, now_ms)
        if item.size > settings.body_bytes or not self._has_room(item):
            self.passed_over += 1
            return
        self._bytes += item.size
        self._fresh.append((item, call.wrapped))
        self._came.set()

    # -- the service

    async def load(self) -> None:
        """Read from the store who lost what lately, and whose workspaces are unfit."""
        now_ms = self._now_ms()
        period_ms = int(self._settings.outvoted_s * 1000)
        unfit: Counter[tuple[str, int]] = Counter()
        rows = await self._store.look_over(lambda connection: recheck_rows.since(connection, now_ms - period_ms))
        for row in rows:
            if row.loser:
                self._nodes.outvote(Address(row.loser), row.workspace, row.at_ms + period_ms)
            elif row.outcome == Outcome.NOT_DETERMINISTIC:
                unfit[row.workspace, row.revision] += 1
        self._unfit |= unfit
        self._wallets = await self._read_wallets()

    async def run(self) -> None:
        """Run again what was drawn, what the run before left and what dead siblings left; for ever."""
        own, limit = self._own, self._settings.queue
        self._nodes_are_here_s = trio.current_time() + NODES_COME_S
        try:
            left = await self._store.chore(partial(waiting_rechecks.of_bootstrap, own=own, limit=limit))
            await self._take_up(left)
        except StoreError as error:
            log.error("rechecks_not_taken_up", reason=str(error))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep)
            for _ in range(WORKERS):
                nursery.start_soon(self._work)
            reload_at_s = trio.current_time() + RELOAD_S
            while True:
                await trio.sleep(TAKE_OVER_S)
                try:
                    if self._store.is_shared and len(self) < limit:
                        room = limit - len(self)
                        left = await self._store.chore(partial(waiting_rechecks.take_over, own=own, limit=room))
                        await self._take_up(left)
                    if trio.current_time() >= reload_at_s:
                        reload_at_s = trio.current_time() + RELOAD_S
                        await self.load()
                except StoreError as error:
                    log.error("rechecks_not_read", reason=str(error))

    def _has_room(self, item: Waiting) -> bool:
        return self._bytes + item.size <= self._settings.queue_bytes and len(self) < self._settings.queue

    async def _keep(self) -> None:
        """Have the store keep what was drawn, and then have it run: what ran must be there to be dropped."""
        while True:
            while not self._fresh:
                self._came = trio.Event()
                await self._came.wait()
            fresh, self._fresh = self._fresh, []
            rows = [self._sealer.row_of(item, is_recorded=is_recorded) for item, is_recorded in fresh]
            kept = True
            try:
                await self._store.chore(partial(waiting_rechecks.put, rows=rows))
            except StoreError as error:
                log.error("rechecks_not_kept", reason=str(error))
                kept = False
            self._items.extend(replace(item, kept=kept) for item, _ in fresh)
            self._filled.set()

    async def _take_up(self, rows: Sequence[WaitingRow]) -> None:
        """Have run what another run of a bootstrap left, as far as that is of use."""
        for row in rows:
            item = await self._restored(row)
            if item is None or not self._has_room(item):
                self.passed_over += 1
                await self._store.chore(partial(waiting_rechecks.drop, own=self._own, task_id=row.task_id))
                continue
            self._bytes += item.size
            self._items.append(item)
            self._filled.set()
        if rows:
            log.info("rechecks_taken_up", tasks=len(rows))

    async def _restored(self, row: WaitingRow) -> Waiting | None:
        spec = self._spec_of(row.workspace)
        if spec is None or spec.revision != row.revision or not spec.deterministic:
            return None
        if row.at_ms + KEPT_MS < self._now_ms():
            return None
        if row.request:
            asked = self._sealer.asked_of(row)
        else:
            task = await self._store.task(row.task_id)
            asked = None if task is None else self._recorded(task)
        return restored(row, asked) if asked is not None else None

    def _recorded(self, task: TaskRecord) -> Asked:
        async def read() -> bytes:
            if task.request is None:
                return b""
            return await self._store.read_body(task.task_id, Part.REQUEST, task.request)

        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in task.headers]
        return Asked(task.method, task.target, task.port, headers, KeptBody(read), task.detach)

    async def _work(self) -> None:
        while True:
            while not self._items:
                if self._filled.is_set():  # one event for all who wait
                    self._filled = trio.Event()
                await self._filled.wait()
            item = self._items.popleft()
            self._bytes -= item.size
            try:
                await self._look_again(item)
            except StoreError as error:
                log.error("recheck_not_recorded", task_id=item.task_id, reason=str(error))
            except Exception:
                log.exception("recheck_crashed", task_id=item.task_id)  # ours to mend; the daemon goes on

    # -- one task

    async def _look_again(self, item: Waiting) -> None:
        own, task_id = self._own, item.task_id
        holds = partial(waiting_rechecks.holds, own=own, task_id=task_id)
        if item.kept and self._store.is_shared and not await self._store.look_up(holds):
            return  # a sibling took this bootstrap for dead, and has it now
        spec = self._spec_of(item.workspace)
        try:
            body = await item.asked.body.prepare() if spec is not None else None
        except BodyMissing:
            body = None
        if spec is None or body is None:
            self.passed_over += 1
            await self._store.chore(partial(waiting_rechecks.drop, own=own, task_id=task_id))
            return
        second, second_run = await self._run_elsewhere(item, spec, body, [item.peer])
        if second is None or second_run is None:
            await self._record(item, Outcome.NO_SECOND)
            return
        outcome = decide(item.answer, _answer(second_run), None)
        third: Peer | None = None
        third_run: Errand | None = None
        if outcome is Outcome.UNDECIDED:
            third, third_run = await self._run_elsewhere(item, spec, body, [item.peer, second])
            third_answer = _answer(third_run) if third_run is not None else None
            outcome = decide(item.answer, _answer(second_run), third_answer)
        await self._record(item, outcome, second, second_run, third, third_run)

    async def _run_elsewhere(
        self, item: Waiting, spec: WorkspaceSpec, body: bytes, judged: list[Peer]
    ) -> tuple[Peer | None, Errand | None]:
        """Run the task on a node that may judge these; return it with its answer, or neither when none gave one."""
        asked: list[Peer] = []
        deadline_s = trio.current_time() + self._settings.wait_s
        while len(asked) < TRIES and trio.current_time() < deadline_s:
            found = self._free(spec, [*judged, *asked])
            if found is None:
                is_early = item.taken_up and trio.current_time() < self._nodes_are_here_s
                if not is_early and not self._may_come(spec, [*judged, *asked]):
                    break
                await trio.sleep(WAIT_LOOK_S)
                continue
            session, peer = found
            asked.append(peer)
            call = item.asked
            errand = await self._errands.run(
                session,
                spec,
                api=API,
                method=call.method,
                target=call.target,
                port=call.port,
                body=body,
                headers=call.headers,
                timeout_s=spec.request_timeout_s,
                answer_bytes=self._answer_bytes,
                caller=CALLER,
                detach=call.detach,
            )
            if errand.is_answered:
                return peer, errand
        return None, None

    def _free(self, spec: WorkspaceSpec, judged: list[Peer]) -> tuple[NodeSession, Peer] | None:
        """Return a node with a free slot that may judge, drawn by chance; none while clients wait for the workspace.

        Nodes with a past go before new ones, of which anybody can have as many as he likes.
        """
        workspace = spec.id
        if self._nodes.queue_length(workspace):
            return None
        able = may_judge([self._peer(one, workspace) for one in self._nodes.ready(spec, free=True)], judged)
        if not able:
            return None
        peer = secrets.choice([one for one in able if self._standings.of(one.node).good >= KNOWN_FROM] or able)
        session = self._nodes.get(peer.node)
        return (session, peer) if session is not None else None

    def _may_come(self, spec: WorkspaceSpec, judged: list[Peer]) -> bool:
        """Return whether waiting may help: a node that may judge serves the workspace, with every slot taken."""
        serving = self._nodes.ready(spec, free=False)
        return bool(may_judge([self._peer(session, spec.id) for session in serving], judged))

    def _peer(self, session: NodeSession, workspace: str, revision: int = 0) -> Peer:
        """Return a node as far as *workspace* goes: in the *revision* it ran, 0 for the one it runs now."""
        state = session.deployments.get(workspace)
        held = set(state.gpus) if state is not None and state.gpus else None
        return Peer(
            node=session.node,
            ip=session.ip,
            wallet=self._wallets.get(session.node, ""),
            models=frozenset(
                canonical_gpu_model(gpu.model, gpu.memory_bytes)
                for gpu in session.gpus
                if held is None or gpu.id in held
            ),
            revision=revision or (state.revision if state is not None else 0),
        )

    async def _record(
        self,
        item: Waiting,
        outcome: Outcome,
        second: Peer | None = None,
        second_run: Errand | None = None,
        third: Peer | None = None,
        third_run: Errand | None = None,
    ) -> None:
        """Store what came of it, and let who lost feel it."""
        now_ms, workspace = self._now_ms(), item.workspace
        loser: Peer | None = None
        if outcome is Outcome.FIRST_LOST:
            loser = item.peer
        elif outcome is Outcome.SECOND_LOST:
            loser = second
        row = RecheckRow(
            bootstrap=self._own,
            workspace=workspace,
            revision=item.peer.revision,
            task_id=item.task_id,
            at_ms=now_ms,
            outcome=outcome.value,
            first_node=item.peer.node,
            second_node=second.node if second is not None else "",
            third_node=third.node if third is not None else "",
            second_task=second_run.task_id if second_run is not None else "",
            third_task=third_run.task_id if third_run is not None else "",
            loser=loser.node if loser is not None else "",
        )
        if not await self._store.chore(lambda connection: _recorded_by(connection, item, row)):
            return  # a sibling took it over and records it
        self._metrics.rechecked(outcome.value)
        if loser is not None:
            self._standings.disputed(loser.node, rule=RULE, task_id=item.task_id)
            self._nodes.outvote(loser.node, workspace, now_ms + int(self._settings.outvoted_s * 1000))
        elif outcome is Outcome.UNDECIDED and second is not None:
            until_ms = now_ms + int(self._settings.outvoted_s * 1000)
            self._suspected = {node: at_ms for node, at_ms in self._suspected.items() if at_ms > now_ms}
            self._suspected |= {item.peer.node: until_ms, second.node: until_ms}
        elif outcome is Outcome.NOT_DETERMINISTIC:
            self._unfit[workspace, item.peer.revision] += 1
        if outcome not in (Outcome.AGREED, Outcome.NO_SECOND):
            log.warning(
                "answers_differ",
                task_id=item.task_id,
                workspace=workspace,
                outcome=outcome.value,
                loser=row.loser,
                nodes=[node for node in (row.first_node, row.second_node, row.third_node) if node],
            )


def _recorded_by(connection: sa.Connection, item: Waiting, row: RecheckRow) -> bool:
    """Record *row* unless what waited was somebody else's by now; return whether that was done."""
    if item.kept and not waiting_rechecks.drop(connection, Address(row.bootstrap), item.task_id):
        return False
    recheck_rows.add(connection, row)
    return True


def _answer(errand: Errand) -> Answer:
    """Return what was answered, as it was hashed on its way."""
    attempt = errand.attempt
    seen = attempt.observed() if attempt is not None else None
    return Answer(errand.status, seen.response_hash if seen is not None and seen.response_hash is not None else b"")
