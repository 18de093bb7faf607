"""Tasks that are run again: the queue, the runs, and what follows from different answers.

Owns everything after the client has its answer, which nothing here delays: an answered task is drawn or not at once and
put into a bounded queue, or passed over when that is full. Runs go to nodes with a free slot while no client waits for
the workspace, as tasks of this bootstrap's own that no client is charged for and none sees in their lists.

A node that two others contradict gets no more tasks of that workspace for a while, and one dispute: the answer to a
client who lies about a workspace is that his nodes leave it, not that they lose their trust.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping

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
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.store import recheck_rows
from ngpu_bootstrap.store.errors import BodyMissing, StoreError
from ngpu_bootstrap.store.recheck_rows import RecheckRow
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.identity import Address

log = structlog.get_logger(__name__)

API = "recheck"
CALLER = "bootstrap"
"""Who asked for these tasks: no workspace, so no client finds them among their own."""
RULE = "recheck"
WORKERS = 2
WAIT_LOOK_S = 0.5
RELOAD_S = 60.0
REMEMBERED_NODES = 50_000
# Runs on so many nodes at most when those that are asked do not answer.
TRIES = 3
# Three different answers so often: the workspace is not deterministic, and is looked at no more in this revision.
NOT_DETERMINISTIC_AT = 3


@dataclass(frozen=True, slots=True)
class _Item:
    """A task to be run again. *peer* is the node that ran it, as it was then."""

    call: Call
    peer: Peer
    answer: Answer
    size: int
    body: WholeBody | KeptBody


class RecheckDesk:
    """Has tasks run again. Its `run` must be running for as long as it is used.

    Attributes:
        passed_over: tasks that were drawn and not kept, for want of room or because their body was not kept.

    Args:
        own: this bootstrap's address.
        secret: 32 bytes of this bootstrap's own, which decide what is drawn.
        wallets: whom each node's work pays, by its own signature.
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
        self._answer_bytes = answer_bytes
        self._now_ms = now_ms
        self._wallets: Mapping[Address, str] = {}
        self._items: deque[_Item] = deque()
        self._bytes = 0
        self._filled = trio.Event()
        self._suspected: dict[Address, int] = {}
        self._last_ms: dict[Address, int] = {}
        self._unfit: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return len(self._items)

    # -- told by the dispatcher

    def answered(self, call: Call, attempt: Attempt, ending: Ending) -> None:
        """Draw whether a task of a deterministic workspace, which has just ended, is run again. At once, no waiting."""
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
        session, seen = self._nodes.get(node), attempt.observed()
        if session is None or seen.response_hash is None or not isinstance(call.body, WholeBody | KeptBody):
            self.passed_over += 1
            return
        size = len(call.body.content) if isinstance(call.body, WholeBody) else 0
        if size > settings.body_bytes or self._bytes + size > settings.queue_bytes or len(self) >= settings.queue:
            self.passed_over += 1
            return
        peer = self._peer(session, call.spec.id, attempt.signed.order.revision)
        answer = Answer(attempt.status or 0, seen.response_hash)
        self._items.append(_Item(call, peer, answer, size, call.body))
        self._bytes += size
        self._filled.set()

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
        """Run again what was drawn; for ever."""
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work)
            while True:
                await trio.sleep(RELOAD_S)
                try:
                    await self.load()
                except StoreError as error:
                    log.error("rechecks_not_read", reason=str(error))

    async def _work(self) -> None:
        while True:
            while not self._items:
                self._filled = trio.Event()
                await self._filled.wait()
            item = self._items.popleft()
            self._bytes -= item.size
            try:
                await self._look_again(item)
            except StoreError as error:
                log.error("recheck_not_recorded", task_id=item.call.task_id, reason=str(error))
            except Exception:
                log.exception("recheck_crashed", task_id=item.call.task_id)  # ours to mend; the daemon goes on

    # -- one task

    async def _look_again(self, item: _Item) -> None:
        try:
            body = await item.body.prepare()
        except BodyMissing:
            self.passed_over += 1
            return
        second, second_run = await self._run_elsewhere(item, body, [item.peer])
        if second is None or second_run is None:
            await self._record(item, Outcome.NO_SECOND)
            return
        outcome = decide(item.answer, _answer(second_run), None)
        third: Peer | None = None
        third_run: Errand | None = None
        if outcome is Outcome.UNDECIDED:
            third, third_run = await self._run_elsewhere(item, body, [item.peer, second])
            third_answer = _answer(third_run) if third_run is not None else None
            outcome = decide(item.answer, _answer(second_run), third_answer)
        await self._record(item, outcome, second, second_run, third, third_run)

    async def _run_elsewhere(self, item: _Item, body: bytes, judged: list[Peer]) -> tuple[Peer | None, Errand | None]:
        """Run the task on a node that may judge these; return it with its answer, or neither when none gave one."""
        asked: list[Peer] = []
        deadline_s = trio.current_time() + self._settings.wait_s
        while len(asked) < TRIES and trio.current_time() < deadline_s:
            found = self._free(item, [*judged, *asked])
            if found is None:
                if not self._may_come(item, [*judged, *asked]):
                    break
                await trio.sleep(WAIT_LOOK_S)
                continue
            session, peer = found
            asked.append(peer)
            call = item.call
            errand = await self._errands.run(
                session,
                call.spec,
                api=API,
                method=call.method,
                target=call.target,
                port=call.port,
                body=body,
                headers=call.headers,
                timeout_s=call.spec.request_timeout_s,
                answer_bytes=self._answer_bytes,
                caller=CALLER,
            )
            if errand.is_answered:
                return peer, errand
        return None, None

    def _free(self, item: _Item, judged: list[Peer]) -> tuple[NodeSession, Peer] | None:
        """Return a node with a free slot that may judge, drawn by chance; none while clients wait for the workspace."""
        if self._nodes.queue_length(item.call.spec.id):
            return None
        workspace = item.call.spec.id
        able = may_judge([self._peer(one, workspace) for one in self._nodes.ready(workspace, free=True)], judged)
        if not able:
            return None
        peer = secrets.choice(able)
        session = self._nodes.get(peer.node)
        return (session, peer) if session is not None else None

    def _may_come(self, item: _Item, judged: list[Peer]) -> bool:
        """Return whether waiting may help: a node that may judge serves the workspace, with every slot taken."""
        workspace = item.call.spec.id
        serving = self._nodes.ready(workspace, free=False)
        return bool(may_judge([self._peer(session, workspace) for session in serving], judged))

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
        item: _Item,
        outcome: Outcome,
        second: Peer | None = None,
        second_run: Errand | None = None,
        third: Peer | None = None,
        third_run: Errand | None = None,
    ) -> None:
        """Store what came of it, and let who lost feel it."""
        now_ms, workspace = self._now_ms(), item.call.spec.id
        loser: Peer | None = None
        if outcome is Outcome.FIRST_LOST:
            loser = item.peer
        elif outcome is Outcome.SECOND_LOST:
            loser = second
        row = RecheckRow(
            bootstrap=self._own,
            workspace=workspace,
            revision=item.peer.revision,
            task_id=item.call.task_id,
            at_ms=now_ms,
            outcome=outcome.value,
            first_node=item.peer.node,
            second_node=second.node if second is not None else "",
            third_node=third.node if third is not None else "",
            second_task=second_run.task_id if second_run is not None else "",
            third_task=third_run.task_id if third_run is not None else "",
            loser=loser.node if loser is not None else "",
        )
        self._metrics.rechecked(outcome.value)
        await self._store.chore(lambda connection: recheck_rows.add(connection, row))
        if loser is not None:
            self._standings.disputed(loser.node, rule=RULE, task_id=item.call.task_id)
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
                task_id=item.call.task_id,
                workspace=workspace,
                outcome=outcome.value,
                loser=row.loser,
                nodes=[node for node in (row.first_node, row.second_node, row.third_node) if node],
            )


def _answer(errand: Errand) -> Answer:
    """Return what was answered, as it was hashed on its way."""
    attempt = errand.attempt
    seen = attempt.observed() if attempt is not None else None
    return Answer(errand.status, seen.response_hash if seen is not None and seen.response_hash is not None else b"")
