"""Asynchronous tasks: promised, carried out without their client, taken up again after a restart or a lost node.

Owns every task that nobody waits on a connection for. Each is a trio task of its own that waits for a slot, runs, and
where its node was lost asks for the answer until it is known to come or not. What to do in each case is
`tasks.recovery`'s decision; this carries it out. Bodies of waiting tasks stay in the store but for small ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

import structlog
import trio

from ngpu_bootstrap.dispatch.attempt import Attempt, How
from ngpu_bootstrap.dispatch.calls import Call, KeptBody, WholeBody
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher, Progress
from ngpu_bootstrap.dispatch.ends import CANCELLED, Ending
from ngpu_bootstrap.dispatch.jobs import Jobs
from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.fair_share import may_take
from ngpu_bootstrap.kill_points import reached
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import AttemptConflict, BodyMissing, StoreError, TaskIsFinal
from ngpu_bootstrap.store.job_rows import JobRow
from ngpu_bootstrap.store.records import AttemptEnd, AttemptRecord, OpenTask, Part, TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.recovery import (
    Collected,
    Decision,
    End,
    KeepAsking,
    Requeue,
    Unfinished,
    after_asking,
    decide,
)
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

# What ends a task from outside its own course.
CANCEL, LET_GO = "cancel", "let_go"

K = TypeVar("K")

KEEP_IN_MEMORY_BYTES = 16 * 1024
# How often a node is asked for an answer: soon at first, then ever more rarely.
ASK_FIRST_S = 0.25
ASK_LAST_S = 5.0
# How long a node may take to hear that it shall end a job's submission.
STOP_S = 5.0
# When a task that the store failed is looked at again, and how many of those at once.
LEFT_S = 5.0
LEFT_AT_ONCE = 500

_WORDS = {
    "bootstrap_lost": "the bootstrap was restarted while the call ran; whether the workspace acted is unknown",
    "node_lost": "the node was lost while it ran the task; whether the workspace acted is unknown",
    "attempt_cap": "no node could finish the task within the allowed attempts",
    "deadline": "the deadline passed before there was an answer",
    "internal_error": "the bootstrap failed to carry the task out; its operator's log says why",
    "request_lost": "the request can no longer be read from the store",
    "workspace_removed": "the workspace was removed before the task ran",
}
_STATUS = {"deadline": 504, "workspace_removed": 410, "internal_error": 500}


@dataclasses.dataclass(eq=False, slots=True)
class _Run:
    """One task in hand.

    Attributes:
        order: its place among those taken in hand here.
        ends_for: CANCEL, or LET_GO when another bootstrap has it now; empty while it takes its course.
    """

    call: Call
    order: int
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)
    ends_for: str = ""


class DetachedTasks:
    """Every asynchronous task of this bootstrap that is not final.

    Args:
        is_coming: whether a node is about to serve a workspace that none serves yet: its tasks wait for that.
        limit: unfinished tasks of one workspace at most; of a caller that is not its own client as many as
            `fair_share` says.
        answer_bytes: the largest answer kept.
        attempts: orders signed for one task at most.
        call_back: told when a task has ended whose client wants to be called.
    """

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        jobs: Jobs,
        store: Store,
        nodes: Nodes,
        is_coming: Callable[[str], bool],
        limit: int,
        answer_bytes: int,
        attempts: int,
        now_ms: Callable[[], int],
        call_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._call_back = call_back
        self._dispatcher = dispatcher
        self._jobs = jobs
        self._store = store
        self._nodes = nodes
        self._is_coming = is_coming
        self._limit = limit
        self._answer_bytes = answer_bytes
        self._attempts = attempts
        self._now_ms = now_ms
        self._nursery: trio.Nursery | None = None
        self._unfinished: Counter[str] = Counter()
        self._unfinished_of: Counter[tuple[str, str]] = Counter()
        self._runs: dict[str, _Run] = {}
        self._started = 0
        self._left: set[str] = set()
        self._specs: Callable[[TaskRecord], WorkspaceSpec | None] | None = None

    def __len__(self) -> int:
        return self._unfinished.total()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the running tasks, and take up again what the store failed; for ever. Cancelled, they stay in the store
        for the next start."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(LEFT_S)
                if self._left and self._specs is not None:
                    await self._take_up_left(self._specs)

    async def _take_up_left(self, specs: Callable[[TaskRecord], WorkspaceSpec | None]) -> None:
        """Decide about the tasks that the store failed, as a restart would: a promise outlives a fault of the store."""
        left = list(self._left)[:LEFT_AT_ONCE]
        try:
            tasks = await self._store.unfinished(left)
        except StoreError as error:
            log.info("tasks_still_left", tasks=len(self._left), reason=str(error))
            return
        self._left.difference_update(left)
        await self.adopt(tasks, specs)

    async def submit(self, call: Call) -> None:
        """Promise *call*: when this returns it is committed, and will be finished or failed with a reason.

        Raises:
            NotServed: too many tasks of the workspace are unfinished, or no node serves it.
            IdempotencyKeyUsed: the workspace asked for this before.
            StoreError: it could not be committed; nothing is promised.
        """
        workspace = call.spec.id
        waiting, own = self._unfinished[workspace], self._unfinished_of[workspace, call.caller]
        has_room = may_take(self._limit, waiting, own) if call.caller else waiting < self._limit
        if not has_room:
            yours = f", {own} of them yours" if call.caller else ""
            raise NotServed(
                429,
                "queue_full",
                f"{waiting} asynchronous tasks of workspace {workspace} are unfinished{yours}; come again later",
                retry_after_s=5,
            )
        if not self._is_coming(workspace):
            self._nodes.require_served(call.spec)
        self._count(call)  # before it is committed: calls that come together wait for one commit
        try:
            await self._store.accept(call.new_task())
            if isinstance(call.body, WholeBody) and len(call.body.content) > KEEP_IN_MEMORY_BYTES:
                call = dataclasses.replace(call, body=KeptBody(functools.partial(self._read_request, call.task_id)))
            self._start(self._carry, call, Progress(promised=True))
        finally:
            self._uncount(call)

    def cancel(self, task_id: str) -> bool:
        """End a task because its client asks for it; False when it is not in hand here. See `_withdraw`."""
        run = self._runs.get(task_id)
        if run is None:
            return False
        if not run.ends_for:
            run.ends_for = CANCEL
            run.scope.cancel()
        return True

    def keep_only(self, owned: Collection[str]) -> int:
        """Let go of every task that is not among *owned*: another bootstrap has it. Return how many those were."""
        lost = [run for task_id, run in self._runs.items() if task_id not in owned]
        for run in lost:
            run.ends_for = LET_GO
            run.scope.cancel()
        return len(lost)

    def in_hand(self) -> list[str]:
        """Return the ids of the tasks in hand, as a moment has them."""
        return list(self._runs)

    def position(self, task_id: str) -> int | None:
        """Return how many tasks of the same workspace were taken in hand before and wait too; None: not waiting."""
        run = self._runs.get(task_id)
        if run is None or task_id in self._dispatcher.under_way:
            return None
        workspace, before = run.call.spec.id, 0
        for other in self._runs.values():  # they are in their order
            if other is run:
                return before
            if other.call.spec.id == workspace and other.call.task_id not in self._dispatcher.under_way:
                before += 1
        return None

    # -- taking up what a restart left

    async def recover(self, specs: Callable[[TaskRecord], WorkspaceSpec | None]) -> int:
        """Decide about every unfinished task of the store; return how many there were.

        Args:
            specs: the workspace a task is of; None when it was removed.
        """
        self._specs = specs
        await self._store.claim_own()
        tasks = await self._store.unfinished()
        await self.adopt(tasks, specs)
        return len(tasks)

    async def adopt(self, tasks: Sequence[OpenTask], specs: Callable[[TaskRecord], WorkspaceSpec | None]) -> None:
        """Decide about unfinished tasks that a run before, or another bootstrap, left."""
        jobs = await self._job_rows([task.task.task_id for task in tasks])
        for task in tasks:
            found = Unfinished.from_store(task)
            decision = decide(found, now_ms=self._now_ms())
            spec = specs(task.task)
            log.debug("task_taken_up", task_id=found.task_id, decision=type(decision).__name__.lower())
            reached("recover.decided")
            if found.task_id in self._runs:
                continue
            job = jobs.get(found.task_id)
            if task.task.cancel_asked_at_ms is not None and spec is not None:
                self._start(self._withdraw, self._call(task.task, spec, job))
            elif job is not None and spec is not None:
                call = self._call(task.task, spec, job)
                self._start(self._jobs.carry, call, job, found.attempts, task.last)
            elif isinstance(decision, End):
                await self._close(found, decision)
            elif spec is None:
                await self._close(found, End(TaskState.FAILED, "workspace_removed", found.under_way))
            else:
                call = self._call(task.task, spec)
                self._start(self._take_up, call, found, task.last, decision)

    async def _job_rows(self, task_ids: Sequence[str]) -> dict[str, JobRow]:
        """Return those of the tasks that are jobs, by task id."""
        rows: dict[str, JobRow] = {}
        for first in range(0, len(task_ids), LEFT_AT_ONCE):
            some = list(task_ids[first : first + LEFT_AT_ONCE])
            found = await self._store.look_over(functools.partial(job_rows.unfinished, task_ids=some))
            rows |= {row.task_id: row for row in found}
        return rows

    async def _take_up(self, call: Call, found: Unfinished, last: AttemptRecord | None, decision: Decision) -> None:
        if isinstance(decision, Requeue):
            await self._requeue(call, found, decision)
        elif last is not None:
            signed = SignedOrder.from_bytes(last.order)
            attempt = Attempt(call, signed, found.attempts)
            attempt.sent_at_ms = signed.order.issued_at_ms
            await self._collect(call, attempt, found)

    async def _close(self, found: Unfinished, end: End) -> None:
        under_way = found.attempts if found.under_way else None
        try:
            await self._dispatcher.close(found.task_id, _ending(end), under_way)
        except (TaskIsFinal, AttemptConflict) as error:
            log.info("task_let_go", task_id=found.task_id, reason=str(error))
        except StoreError as error:
            self._leave(found.task_id, error)

    def _leave(self, task_id: str, error: StoreError) -> None:
        """Leave a task that the store failed for `LEFT_S`."""
        log.error("task_left_unfinished", task_id=task_id, reason=str(error))
        self._left.add(task_id)

    # -- one task

    async def _carry(self, call: Call, progress: Progress) -> None:
        if call.job is not None:
            await self._jobs.carry(call, call.job, progress.attempts)
            return
        sink = Collector(self._answer_bytes)
        result = await self._dispatcher.carry(call, sink, progress)
        attempt = result.attempt
        if attempt is None or attempt.how not in (How.LOST, How.DEADLINE):
            return
        await self._collect(call, attempt, _found(call, attempt))

    async def _withdraw(self, call: Call) -> None:
        """End a cancelled task: at once where none of its attempts is under way, else as its node says.

        A node that ended the attempt by then has its say: an answer that was complete is the task's result. One that
        cannot be reached is asked until it can, or until the task's deadline and some more.
        """
        if call.job is not None:
            await self._withdraw_job(call)
            return
        for _ in range(3):
            last = next(reversed(await self._store.attempts(call.task_id)), None)
            under_way = last if last is not None and last.ended_at_ms is None else None
            if under_way is not None and under_way.order and call.detach:
                signed = SignedOrder.from_bytes(under_way.order)
                attempt = Attempt(call, signed, under_way.attempt)
                attempt.sent_at_ms = signed.order.issued_at_ms
                attempt.cancel_asked = True
                await self._collect(call, attempt, _found(call, attempt), stop=True)
                return
            with contextlib.suppress(AttemptConflict):  # a write of the course just ended was still on its way
                number = under_way.attempt if under_way is not None else None
                await self._dispatcher.close(call.task_id, CANCELLED, number)
                return

    async def _withdraw_job(self, call: Call) -> None:
        """End a cancelled job: its workspace is told where that is declared, and the call under way was cut."""
        last = next(reversed(await self._store.attempts(call.task_id)), None)
        if last is not None and last.ended_at_ms is None:
            await self._stop_submission(call, last)
            end = AttemptEnd(call.task_id, last.attempt, "cancelled", self._now_ms(), "cancelled", last.status)
            await self._store.end_attempt(end, requeue=False)
        await self._jobs.cancel(call, last.attempt if last is not None else 0)
        await self._dispatcher.close(call.task_id, CANCELLED, None)

    async def _stop_submission(self, call: Call, last: AttemptRecord) -> None:
        """Have the node end a submission that is under way: it is detached, so the end of its stream did not."""
        signed = SignedOrder.from_bytes(last.order) if last.order else None
        session = None if signed is None else self._nodes.get(signed.order.node)
        if signed is not None and signed.order.detach and session is not None:
            with trio.move_on_after(STOP_S):
                await Attempt(call, signed, last.attempt).stop(session.requests)

    async def _collect(self, call: Call, attempt: Attempt, found: Unfinished, *, stop: bool = False) -> None:
        """Ask the attempt's node for its answer until there is one, or a decision.

        Args:
            stop: have the node end it, and end the task as cancelled where there is no answer.
        """
        pause_s = ASK_FIRST_S
        while True:
            said = Collected.UNREACHABLE
            sink = Collector(self._answer_bytes)
            session = self._nodes.get(attempt.signed.order.node)
            if session is not None:
                said = await attempt.collect(session.requests, sink, self._now_ms, stop=stop)
            if said is Collected.ANSWERED:
                reached("collect.answered")
                await self._dispatcher.collected(call, attempt, sink)
                return
            decision = after_asking(found, said, now_ms=self._now_ms(), attempt_cap=self._attempts)
            if stop and not isinstance(decision, KeepAsking):
                await self._dispatcher.give_up(call, CANCELLED, attempt)
                return
            if said is Collected.RUNNING and not attempt.shown_running:
                attempt.shown_running = True
                self._store.note_running(call.task_id, attempt.number)
            if isinstance(decision, KeepAsking):
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, ASK_LAST_S)
                continue
            log.info("answer_not_collected", task_id=call.task_id, node=attempt.signed.order.node, said=said.value)
            if isinstance(decision, End):
                await self._dispatcher.give_up(call, _ending(decision), attempt)
            elif isinstance(decision, Requeue):
                await self._requeue(call, found, decision)
            return

    async def _requeue(self, call: Call, found: Unfinished, decision: Requeue) -> None:
        if decision.ends_attempt:
            end = AttemptEnd(call.task_id, found.attempts, "lost", self._now_ms(), "connection_lost")
            await self._store.end_attempt(end, requeue=True)
        await self._carry(call, Progress(promised=True, attempts=found.attempts))

    def _call(self, record: TaskRecord, spec: WorkspaceSpec, job: JobRow | None = None) -> Call:
        body = KeptBody(functools.partial(self._read_request, record.task_id))
        return Call(
            task_id=record.task_id,
            spec=spec,
            api=record.api,
            method=record.method,
            port=record.port,
            target=record.target,
            headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in record.headers],
            body=body,
            accepted_at_ms=record.accepted_at_ms,
            deadline_ms=record.deadline_at_ms,
            detach=record.detach,
            wrapped=True,
            idempotency_key=record.idempotency_key,
            priority=record.priority,
            job=job,
            affinity=record.affinity.encode("latin-1"),
            caller=record.caller,
        )

    async def _read_request(self, task_id: str) -> bytes:
        record = await self._store.task(task_id)
        if record is None or record.request is None:
            return b""
        return await self._store.read_body(task_id, Part.REQUEST, record.request)

    def _count(self, call: Call) -> None:
        """Have *call* be one more unfinished task of its workspace, and of its caller there, until `_uncount`."""
        self._unfinished[call.spec.id] += 1
        self._unfinished_of[call.spec.id, call.caller] += 1

    def _uncount(self, call: Call) -> None:
        _count_down(self._unfinished, call.spec.id)
        _count_down(self._unfinished_of, (call.spec.id, call.caller))

    def _start(self, work: Callable[..., Awaitable[None]], call: Call, *arguments: object) -> None:
        if self._nursery is None:
            raise RuntimeError("asynchronous tasks are not running")
        self._count(call)
        self._started += 1
        run = self._runs[call.task_id] = _Run(call, self._started)
        self._nursery.start_soon(self._contained, run, work, *arguments)

    async def _contained(self, run: _Run, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run *work* for one task; what goes wrong with it stays with it. What the store failed is taken up again."""
        call = run.call
        try:
            with run.scope:
                await work(call, *arguments)
            if run.scope.cancelled_caught and run.ends_for == CANCEL:
                await self._withdraw(call)
        except (TaskIsFinal, AttemptConflict) as error:
            # another bootstrap took it over while this one could not be heard
            log.info("task_let_go", task_id=call.task_id, reason=str(error))
        except BodyMissing:
            await self._abandon(call, "request_lost")
        except StoreError as error:
            self._leave(call.task_id, error)
        except Exception:
            # Ours to mend; a daemon that ends for it would take the same task up again, for ever.
            log.exception("task_crashed", task_id=call.task_id)
            await self._abandon(call, "internal_error")
        finally:
            self._runs.pop(call.task_id, None)
            if call.webhook:
                self._call_back()
            self._uncount(call)

    async def _abandon(self, call: Call, reason: str) -> None:
        """End a task that cannot be carried further, whatever it was at."""
        try:
            last = next(reversed(await self._store.attempts(call.task_id)), None)
            under_way = last.attempt if last is not None and last.ended_at_ms is None else None
            await self._dispatcher.close(call.task_id, _ending(End(TaskState.FAILED, reason)), under_way)
        except StoreError as error:
            self._leave(call.task_id, error)


def _found(call: Call, attempt: Attempt) -> Unfinished:
    """Return what decides about a detached task whose attempt is under way at its node."""
    return Unfinished(
        task_id=call.task_id,
        method=call.method,
        detach=True,
        deadline_at_ms=call.deadline_ms,
        idempotency_key=call.idempotency_key,
        request_kept=True,
        attempts=attempt.number,
        node=attempt.signed.order.node,
        under_way=True,
        session=attempt.signed.order.session,
    )


def _ending(end: End) -> Ending:
    message = _WORDS.get(end.reason, end.reason.replace("_", " "))
    return Ending(end.state, _STATUS.get(end.reason, 502), end.reason, message, "lost" if end.ends_attempt else "")


def _count_down(counted: Counter[K], key: K) -> None:
    counted[key] -= 1
    if not counted[key]:
        del counted[key]
