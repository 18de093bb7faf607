"""Tasks carried through: placed, ordered, attempted, tried again where that is allowed, judged, recorded.

Owns the order of events of one task, and nothing else knows it:

    accepted and begun (one commit) -> order leaves -> answer comes -> receipt judged -> finished (one commit)
    -> acknowledged

The order is signed before the commit and leaves after it, so that no order is out that the store does not know. The
acknowledgement goes after the finish, so that no node forgets a receipt that we could still lose. A transparent answer
has reached its client by then; a wrapped one is released after it.

What may run again is `tasks.retry`'s to say, which node `scheduling`'s, what an end means `ends`'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import outcome
import structlog
import trio

from ngpu_bootstrap.dispatch.attempt import Attempt, How, Sink
from ngpu_bootstrap.dispatch.calls import Call
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.ends import Ending, ending_of, fared
from ngpu_bootstrap.dispatch.receipts import Awaited, ReceiptDesk
from ngpu_bootstrap.dispatch.verdicts import GpuTerms, Judge, Judged
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.kill_points import reached
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession, Slot
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import AttemptConflict, RecordRefused, StoreError, TaskIsFinal
from ngpu_bootstrap.store.records import AttemptEnd, AttemptStart, FiledReceipt, Filing, Finish
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.retry import may_retry, pause_s
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.http1 import HttpError
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import Network
from ngpu_protocol.orders import SignedOrder, TaskOrder, sign_order
from ngpu_protocol.receipts import Outcome, ReceiptLink
from ngpu_protocol.wire_errors import Reason

log = structlog.get_logger(__name__)

# Orders refused for want of a slot that do not count as one of a task's attempts.
FULL_REFUSALS = 16

# Ends of tasks being committed while their clients have their answers; beyond it new attempts wait for the store.
UNRECORDED_LIMIT = 2048

# A promised task that a node did not take waits this long, doubled each time, for another before it comes back.
OTHERS_FIRST_S = 0.25

# How long a node may take to end a cancelled attempt by itself, and how often it is told again.
STOP_GRACE_S = 5.0
STOP_AGAIN_S = 0.5
# What lasts longer than this is shown as running, once its node says so.
RUNNING_AFTER_S = 1.0
RUNNING_ASKED_AT_ONCE = 16

# How often a waiting client that asked for it hears its place in the queue, if that has changed.
PLACE_TOLD_S = 1.0
FIRST_PLACE_TOLD_S = 0.05

_NO_RECEIPT_FOLLOWS = frozenset({How.REFUSED, How.NOT_SENT})


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a task. `attempt` is None when no node was found, `judged` when no receipt has come."""

    ending: Ending
    attempt: Attempt | None = None
    judged: Judged | None = None


Note = Callable[[Result], Awaitable[Mapping[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a task stands when it is taken up: as new, or as a restart found it.

    Attributes:
        promised: it is in the store and no client waits on a connection for it: it waits while no node serves it,
            and outlives this run of the daemon.
        attempts: made so far.
        is_part: the call is one of several that the task is made of: its end is recorded, the task goes on.
        note: of a part: told how it ended, returns what is kept of the task's job from then on, in the same commit.
    """

    promised: bool = False
    attempts: int = 0
    is_part: bool = False
    note: Note | None = None


NEW = Progress()

LookAgain = Callable[[Call, Attempt, Ending, NodeSession | None], None]


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How far a task is carried: orders signed for it at most, and seconds one call waits for a slot."""

    attempts: int
    queue_wait_s: float


class Dispatcher:
    """Runs tasks. Its `run` must be running for as long as it is used.

    Attributes:
        under_way: by task id, the attempt that runs.

    Args:
        watch: told of every change of a task.
        look_again: told of every task of a deterministic workspace that ended; must be short and not raise.
        now_ms: the wall clock.
    """

    def __init__(
        self,
        *,
        account: Account,
        network: Network,
        store: Store,
        nodes: Nodes,
        judge: Judge,
        standings: Standings,
        desk: ReceiptDesk,
        metrics: Metrics,
        limits: DispatchLimits,
        watch: TaskWatch,
        now_ms: Callable[[], int],
        look_again: LookAgain = lambda call, attempt, ending, session: None,
    ) -> None:
        self._look_again = look_again
        self.under_way: dict[str, Attempt] = {}
        self._watch = watch
        self._account = account
        self._chain_id = network.chain_id
        self._store = store
        self._nodes = nodes
        self._judge = judge
        self._standings = standings
        self._desk = desk
        self._metrics = metrics
        self._limits = limits
        self._now_ms = now_ms
        self._recorders: trio.Nursery | None = None
        self._unrecorded = 0
        self._recorded = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the tasks that record ends; for ever. Cancelled, ends not yet committed are left to recovery."""
        async with trio.open_nursery() as nursery:
            self._recorders = nursery
            task_status.started()
            await trio.sleep_forever()

    async def settle(self) -> None:
        """Return when every end of a task so far is committed."""
        while self._unrecorded:
            await self._recorded.wait()

    async def carry(self, call: Call, sink: Sink, progress: Progress = NEW, given: Slot | None = None) -> Result:
        """Run *call* until it ended, its answer going to *sink* as it comes.

        The end of a wrapped call is committed when this returns; that of another one is being committed. A detached
        call whose attempt was lost ends with `How.LOST` or `How.DEADLINE` and nothing recorded: its answer is still
        to be collected.

        Cancelled (the client left), the attempt is stopped and the task recorded as cancelled; a detached one stays as
        it is.

        Args:
            given: the slot for the only attempt there shall be; it is released.

        Raises:
            NotServed: no node took the call, and nothing was promised or recorded.
            ClientFault: the client's request broke; recorded as cancelled.
            StoreError: the task could not be committed; nothing was sent.
        """
        tried: set[NodeSession] = set()
        number = progress.attempts
        full = 0  # orders refused for want of a slot
        before: Attempt | None = None
        client_waits = not (call.detach or progress.promised)
        while True:
            try:
                slot = given or await self._place(call, tried, number, full, promised=progress.promised)
            except NotServed as refusal:
                if before is None and not progress.promised:
                    raise
                if progress.promised and tried and not self._is_late(call):
                    tried.clear()  # nobody else took it: those who did not may by now
                    continue
                ending = ending_of(before, None) if before is not None else self._unplaced(call, refusal)
                result = Result(ending, before)
                if progress.is_part:
                    await self._end_part(result, progress.note)
                else:
                    await self._end(call, ending, before, None)
                return result
            except BaseException:
                if before is not None and client_waits:
                    self._record_left(call, before)
                raise
            number += 1
            is_new = before is None and not progress.promised
            attempt, judged = await self._attempt(call, sink, slot, number, before, is_new, client_waits)
            if attempt.reason == Reason.NO_FREE_SLOT:
                full += 1
            made = number - progress.attempts if progress.is_part else number
            is_last = attempt.how is How.ANSWERED or given is not None
            if is_last or not self._may_repeat(call, sink, attempt, made - min(full, FULL_REFUSALS)):
                if call.detach and attempt.how in (How.LOST, How.DEADLINE):
                    return Result(ending_of(attempt, None), attempt)
                ending = ending_of(attempt, judged)
                result = Result(ending, attempt, judged)
                if progress.is_part:
                    await self._end_part(result, progress.note)
                else:
                    await self._end(call, ending, attempt, judged, sink=sink)
                    if call.spec.deterministic and given is None:
                        self._look_again(call, attempt, ending, slot.session)
                return result
            if attempt.reason != Reason.NO_FREE_SLOT:
                tried.add(slot.session)
            if judged is not None:  # the node answered in the workspace's place: its receipt counts all the same
                self._record_soon(self._file, judged)
            before = attempt

    async def collected(self, call: Call, attempt: Attempt, sink: Collector, *, progress: Progress = NEW) -> Result:
        """Judge and record the answer of a detached *attempt* that was collected later (`Attempt.collect`)."""
        judged = self._judged(attempt)
        ending = ending_of(attempt, judged)
        result = Result(ending, attempt, judged)
        session = self._nodes.get(attempt.signed.order.node)
        if progress.is_part:
            await self._end_part(result, progress.note)
        else:
            await self._end(call, ending, attempt, judged, sink=sink)
            if call.spec.deterministic:
                self._look_again(call, attempt, ending, session)
        return result

    async def give_up(self, call: Call, ending: Ending, attempt: Attempt | None) -> None:
        """Record the end of a task that gets no answer any more."""
        await self._end(call, ending, attempt, None)

    async def close(self, task_id: str, ending: Ending, attempt: int | None) -> None:
        """Record the end of a task that a restart found and nothing can be done for; *attempt* was under way."""
        await self._store.finish(
            Finish(
                task_id=task_id,
                state=ending.state,
                at_ms=self._now_ms(),
                attempt=attempt,
                result_code=ending.status,
                message=ending.message,
                reason=ending.reason,
                outcome=ending.outcome,
            )
        )
        self._watch.changed(task_id)

    async def complete(self, call: Call, ending: Ending, answer: Collector | None) -> None:
        """Record the end of a task whose parts are all recorded, with the *answer* that is its result."""
        self._metrics.task_ended("job", ending.state.name.lower(), (self._now_ms() - call.accepted_at_ms) / 1000)
        finish = Finish(
            task_id=call.task_id,
            state=ending.state,
            at_ms=self._now_ms(),
            result_code=200 if 200 <= ending.status < 300 else ending.status,
            message=ending.message,
            reason=ending.reason,
            status=answer.status if answer is not None else 0,
            response=answer.body if answer is not None else None,
            content_type=answer.content_type if answer is not None else "",
            job=None if call.job is None else job_rows.values(call.job),
        )
        with trio.CancelScope(shield=True):
            await self._commit_end(finish, None)

    async def cancel(self, task_id: str) -> bool:
        """Have the node end the attempt of *task_id* that runs here; False when none does.

        Its client gets what the node says, and the receipt says `cancelled`. A node that does not end it in time loses
        the stream, which ends an attached attempt as well.
        """
        attempt = self.under_way.get(task_id)
        if attempt is None or self._recorders is None:
            return False
        attempt.cancel_asked = True
        self._recorders.start_soon(self._stop, task_id, attempt)
        return True

    async def _stop(self, task_id: str, attempt: Attempt) -> None:
        with trio.move_on_after(STOP_GRACE_S):
            while self.under_way.get(task_id) is attempt:
                session = self._nodes.get(attempt.signed.order.node)
                if session is None:
                    break
                await attempt.stop(session.requests)
                await trio.sleep(STOP_AGAIN_S)
        if self.under_way.get(task_id) is attempt:
            attempt.cut()

    async def show_running(self) -> None:
        """Note which attempts their nodes run, for ever: those that last, so that short ones cost nothing."""
        places = trio.Semaphore(RUNNING_ASKED_AT_ONCE)

        async def ask(attempt: Attempt, session: NodeSession) -> None:
            async with places:
                with trio.move_on_after(RUNNING_AFTER_S):
                    if await attempt.is_running(session.requests):
                        order = attempt.signed.order
                        self._store.note_running(order.task_id, order.attempt)
                        attempt.shown_running = True
                        self._watch.changed(order.task_id)

        while True:
            await trio.sleep(RUNNING_AFTER_S)
            async with trio.open_nursery() as nursery:
                for attempt in list(self.under_way.values()):
                    session = self._nodes.get(attempt.signed.order.node)
                    if session is not None and not attempt.shown_running and attempt.elapsed_s >= RUNNING_AFTER_S:
                        nursery.start_soon(ask, attempt, session)

    # -- one attempt

    async def _place(self, call: Call, tried: set[NodeSession], number: int, full: int, *, promised: bool) -> Slot:
        if call.only is not None:
            # half of its time at most: the other half is the call's own
            timeout_s = max(0.0, (call.deadline_ms - self._now_ms()) / 2000)
            return await self._nodes.acquire_on(
                call.spec,
                call.only,
                timeout_s=timeout_s,
                promised=promised,
                task_id=call.task_id,
                caller=call.caller,
                beside=bool(call.beside) and not full,
            )
        if wait_s := pause_s(full):
            await trio.sleep(max(0.0, min(wait_s, (call.deadline_ms - self._now_ms()) / 1000)))
        if call.gpu_types and not call.affinity:
            slot = self._nodes.take_preferred(call.spec, call.gpu_types, tried, promised=promised)
            if slot is not None:
                return slot
        slot = self._nodes.take(call.spec, tried, promised=promised, affinity=call.affinity)
        if slot is not None:
            return slot
        timeout_s = (call.deadline_ms - self._now_ms()) / 1000
        if not promised:
            timeout_s = min(timeout_s, self._limits.queue_wait_s)
        elif tried:
            timeout_s = min(timeout_s, OTHERS_FIRST_S * 2 ** min(number, 8))
        async with self._telling_place(call):
            return await self._nodes.acquire(
                call.spec,
                tried=tried,
                timeout_s=max(0.0, timeout_s),
                promised=promised,
                affinity=call.affinity,
                task_id=call.task_id,
                priority=call.priority,
                caller=call.caller,
            )

    @asynccontextmanager
    async def _telling_place(self, call: Call) -> AsyncIterator[None]:
        """Tell the client of *call* its place in the queue, where it asked for it; nothing is on its way afterwards."""
        if call.tell_place is None or self._recorders is None:
            yield
            return
        scope, ended = trio.CancelScope(), trio.Event()
        self._recorders.start_soon(self._tell_place, call, call.tell_place, scope, ended)
        try:
            yield
        finally:
            scope.cancel()
            with trio.CancelScope(shield=True):
                await ended.wait()

    async def _tell_place(
        self, call: Call, tell: Callable[[int], Awaitable[None]], scope: trio.CancelScope, ended: trio.Event
    ) -> None:
        told: int | None = None
        try:
            with scope:
                while True:
                    place = self._nodes.place_of(call.spec.id, call.task_id)
                    if place is not None and place != told:
                        await tell(place)
                        told = place
                    # soon after it began to wait; then no oftener than anybody reads
                    await trio.sleep(PLACE_TOLD_S if told is not None else FIRST_PLACE_TOLD_S)
        except HttpError as error:  # its connection's own task sees to the client that left
            log.debug("place_not_told", task_id=call.task_id, reason=str(error))
        finally:
            ended.set()

    async def _attempt(
        self,
        call: Call,
        sink: Sink,
        slot: Slot,
        number: int,
        before: Attempt | None,
        is_new: bool,
        client_waits: bool,
    ) -> tuple[Attempt, Judged | None]:
        session = slot.session
        attempt: Attempt | None = None
        try:
            while self._unrecorded >= UNRECORDED_LIMIT:
                await self._recorded.wait()
            signed = self._order(call, slot, number)
            # Cancelled, it raises only where nothing was queued: what was must be ended by somebody.
            await self._commit_start(call, session, signed, before, is_new=is_new)
            attempt = Attempt(call, signed, number)
            self._desk.attempt_began(signed.order)
            self.under_way[call.task_id] = attempt
            self._watch.changed(call.task_id)
            self._nodes.placed(call.task_id, number, slot, lasting=not is_new)
            await attempt.run(session.requests, sink, self._now_ms())
        except BaseException:
            # The client left or broke its request: what runs on the node has been told to stop.
            if client_waits and (attempt is not None or before is not None):
                self._record_left(call, attempt or before)
            raise
        finally:
            if attempt is not None and attempt.reason == Reason.NO_FREE_SLOT:
                self._nodes.refused_full(slot)  # before the slot goes to somebody who waits
            slot.release()
            if attempt is not None:
                self.under_way.pop(call.task_id, None)
                self._account_for(attempt, session)
        reached("order.answered")
        judged = self._judged(attempt)
        self._nodes.ended(slot, fared(attempt, judged), (attempt.ended_at_ms - attempt.sent_at_ms) / 1000)
        self._log(attempt, judged)
        return attempt, judged

    def _account_for(self, attempt: Attempt, session: NodeSession) -> None:
        """Tell who must know that an attempt ended."""
        awaited = None
        if attempt.receipt is None and attempt.how not in _NO_RECEIPT_FOLLOWS:
            awaited = Awaited(attempt.observed(), _gpu_terms(attempt, session))
        self._desk.attempt_ended(attempt.signed.order, awaited)
        self._metrics.attempt_ended(attempt.how.value, attempt.first_byte_s)

    def _record_left(self, call: Call, attempt: Attempt | None) -> None:
        """Have the end of a task recorded whose client left."""
        ending = Ending(TaskState.CANCELLED, 499, "client_gone", "the client closed its connection", "client_gone")
        self._record_soon(self._commit_end, self._finish(call, ending, attempt, None, None), None)

    def _is_late(self, call: Call) -> bool:
        return self._now_ms() >= call.deadline_ms

    def _unplaced(self, call: Call, refusal: NotServed) -> Ending:
        if self._is_late(call):
            return Ending(TaskState.EXPIRED, 504, "deadline", f"the deadline passed; {refusal.message}")
        return Ending(TaskState.FAILED, refusal.status, refusal.reason, refusal.message)

    def _order(self, call: Call, slot: Slot, number: int) -> SignedOrder:
        session = slot.session
        now_ms = self._now_ms()
        order = TaskOrder(
            task_id=call.task_id,
            attempt=number,
            bootstrap=self._account.address,
            node=session.node,
            session=session.session,
            workspace=call.spec.id,
            revision=slot.revision,
            port=call.port,
            method=call.method,
            target=call.target,
            detach=call.detach,
            issued_at_ms=now_ms,
            deadline_ms=min(call.deadline_ms, now_ms + int(call.spec.request_timeout_s * 1000)),
        )
        return sign_order(order, self._account, self._chain_id)

    async def _commit_start(
        self, call: Call, session: NodeSession, signed: SignedOrder, before: Attempt | None, *, is_new: bool
    ) -> None:
        order = signed.order
        start = AttemptStart(
            task_id=order.task_id,
            attempt=order.attempt,
            node=order.node,
            session=order.session,
            order=signed.wire,
            at_ms=order.issued_at_ms,
            node_ip=session.ip,
        )
        reached("begin.before_commit")
        if is_new:
            await self._store.accept_and_begin(call.new_task(), start)
            reached("begin.after_commit")
            return
        previous = None
        if before is not None:
            ended = ending_of(before, None)
            previous = AttemptEnd(
                before.call.task_id, before.number, ended.outcome, before.ended_at_ms, before.reason, before.status or 0
            )
        await self._store.begin_attempt(start, previous=previous, goes_on=call.job is not None)
        reached("begin.after_commit")

    def _may_repeat(self, call: Call, sink: Sink, attempt: Attempt, attempts: int) -> bool:
        # Where several bootstraps share busy nodes, others are there first again and again: that costs a round trip
        # each time and nobody's work, so it has a bound of its own, and is not among *attempts*.
        if call.only is not None:
            # There is no other node, and whoever made the call knows when asking again is of use. Only a slot that was
            # to do for two may be gone: then the call waits for one of its own.
            return bool(call.beside) and attempt.reason == Reason.NO_FREE_SLOT and attempts == 0
        if attempt.cancel_asked or not call.body.can_be_sent or attempt.how in (How.OVERSIZE, How.SWITCHED):
            return False
        if attempt.reason == Outcome.DEADLINE:
            return False  # its time was up: another run would have no other time
        if call.detach and attempt.how in (How.LOST, How.DEADLINE):
            return False  # the node goes on without us: the answer is collected, not asked for again
        return bool(
            may_retry(
                call.method,
                call.idempotency_key,
                bytes_sent=attempt.how is not How.NOT_SENT,
                bytes_to_client=sink.reached_client,
                refused=attempt.reason if attempt.how is How.REFUSED else "",
                upgrade=call.upgrade,
                attempts=attempts,
                cap=self._limits.attempts,
                deadline_at_ms=call.deadline_ms,
                now_ms=self._now_ms(),
            )
        )

    def _judged(self, attempt: Attempt) -> Judged | None:
        if attempt.receipt is None:
            return None
        session = self._nodes.get(attempt.signed.order.node)
        gpus = _gpu_terms(attempt, session)
        judged = self._judge.judge(attempt.receipt, attempt.signed.order, attempt.observed(), gpus=gpus)
        self._metrics.judged(judged.verdict.kind.value, judged.verdict.rule)
        self._standings.judged(
            judged.record.node, judged.verdict.kind, rule=judged.verdict.rule, task_id=judged.record.task_id
        )
        return judged

    # -- what is recorded

    async def _end(
        self, call: Call, ending: Ending, attempt: Attempt | None, judged: Judged | None, *, sink: Sink | None = None
    ) -> None:
        """Record the end of a task; wait for the commit where the answer is released after it."""
        finish = self._finish(call, ending, attempt, judged, sink)
        if call.wrapped:
            # The client leaving now must not lose an answer that is here.
            with trio.CancelScope(shield=True):
                await self._commit_end(finish, judged)
        else:
            self._post_end(finish, judged)

    async def _end_part(self, result: Result, note: Note | None) -> None:
        """Record the end of one of the calls a task is made of, and its receipt; the task goes on."""
        attempt, judged = result.attempt, result.judged
        if attempt is None:
            return
        task_id = attempt.signed.order.task_id
        outcome = result.ending.outcome
        end = AttemptEnd(task_id, attempt.number, outcome, attempt.ended_at_ms, attempt.reason, attempt.status or 0)
        with trio.CancelScope(shield=True):
            job = await note(result) if note is not None else None
            try:
                await self._store.end_attempt(end, requeue=False, job=job)
            finally:
                self._watch.changed(task_id)
            if judged is not None:
                await self._file(judged)

    def _finish(
        self, call: Call, ending: Ending, attempt: Attempt | None, judged: Judged | None, sink: Sink | None
    ) -> Finish:
        kept = sink if isinstance(sink, Collector) and ending.state is TaskState.FINISHED else None
        now_ms = self._now_ms()
        api = "async" if call.detach else "sync" if call.wrapped else "proxy"
        self._metrics.task_ended(api, ending.state.name.lower(), (now_ms - call.accepted_at_ms) / 1000)
        return Finish(
            task_id=call.task_id,
            state=ending.state,
            at_ms=now_ms,
            attempt=attempt.number if attempt is not None else None,
            result_code=200 if 200 <= ending.status < 300 else ending.status,
            message=ending.message,
            reason=ending.reason,
            status=attempt.status or 0 if attempt is not None else 0,
            response=kept.body if kept is not None else None,
            content_type=attempt.content_type if attempt is not None else "",
            outcome=ending.outcome,
            receipt=judged.record if judged is not None and judged.record.authentic else None,
        )

    async def _commit_end(self, finish: Finish, judged: Judged | None) -> None:
        """Commit the end of a task, then acknowledge its receipt. What fails here is taken up by recovery."""
        reached("finish.before_commit")
        try:
            filed = await self._store.finish(finish)
        except (TaskIsFinal, AttemptConflict):
            filed = None  # ended on another way meanwhile; the receipt is filed below
        except RecordRefused as error:
            log.warning("receipt_not_storable", task_id=finish.task_id, reason=str(error))
            finish = dataclasses.replace(finish, receipt=None)
            judged = None
            await self._store.finish(finish)
            return
        finally:
            self._watch.changed(finish.task_id)
        reached("finish.after_commit")
        if judged is None:
            return
        if filed is None:
            await self._file(judged)
        else:
            self._acknowledge(filed, judged)

    def _post_end(self, finish: Finish, judged: Judged | None) -> None:
        """Do what `_commit_end` does, without a task for it: that comes only where the commit failed."""

        def told(result: outcome.Value[FiledReceipt | None] | outcome.Error) -> None:
            if isinstance(result, outcome.Error):
                self._record_soon(self._commit_end, finish, judged)
            elif judged is not None and result.value is None:
                self._record_soon(self._file, judged)
            elif judged is not None and result.value is not None:
                self._acknowledge(result.value, judged)
            self._watch.changed(finish.task_id)
            self._one_recorded()

        try:
            posted = self._store.post_finish(finish, told)
        except RecordRefused:
            posted = False
        if posted:
            self._unrecorded += 1
        else:
            self._record_soon(self._commit_end, finish, judged)

    def _acknowledge(self, filed: FiledReceipt, judged: Judged) -> None:
        """Tell the node what became of its receipt, which is filed."""
        if filed.filing is Filing.EQUIVOCATION:
            judged = self._contradicted(judged, filed)
        if filed.broken:
            self._desk.note_breaks(filed, judged)
        self._desk.acknowledge_judged(judged)

    def _contradicted(self, judged: Judged, filed: FiledReceipt) -> Judged:
        """Return *judged* as what it is, the second receipt for one number, which its node answers for."""
        judged = self._judge.contradicted(judged, filed.first_hash)
        self._note_dispute(judged)
        return judged

    def _note_dispute(self, judged: Judged) -> None:
        record = judged.record
        self._metrics.judged(VerdictKind.DISPUTED.value, judged.verdict.rule)
        self._standings.judged(record.node, VerdictKind.DISPUTED, rule=judged.verdict.rule, task_id=record.task_id)

    async def _file(self, judged: Judged) -> None:
        """File a receipt whose task ended otherwise, and acknowledge it."""
        filed = await self._store.late_receipt(judged.record)
        if filed.filing is Filing.REPEATED:
            judged = self._judge.repeated(judged, ReceiptLink(filed.first_sequence, filed.first_hash))
            self._note_dispute(judged)
            filed = await self._store.late_receipt(judged.record)
        if filed.filing is Filing.EQUIVOCATION:
            judged = self._contradicted(judged, filed)
        if filed.broken:
            self._desk.note_breaks(filed, judged)
        if filed.filing is Filing.DUPLICATE:
            self._desk.acknowledge(judged.record.node, judged.record.bootstrap, filed.acknowledgement)
        else:
            self._desk.acknowledge_judged(judged)

    def _record_soon(self, record: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Commit something while its task's client goes on."""
        if self._recorders is None:
            raise RuntimeError("the dispatcher is not running")
        self._unrecorded += 1
        self._recorders.start_soon(self._record, record, *arguments)

    async def _record(self, record: Callable[..., Awaitable[None]], *arguments: object) -> None:
        try:
            await record(*arguments)
        except StoreError as error:
            log.error("end_not_recorded", reason=str(error))
        except Exception:
            log.exception("end_not_recorded")  # ours to mend, and no reason to end every other task
        finally:
            self._one_recorded()

    def _one_recorded(self) -> None:
        self._unrecorded -= 1
        if self._unrecorded in (0, UNRECORDED_LIMIT - 1):
            self._recorded.set()
            self._recorded = trio.Event()

    def _log(self, attempt: Attempt, judged: Judged | None) -> None:
        order = attempt.signed.order
        log.info(
            "attempt",
            task_id=order.task_id,
            attempt=order.attempt,
            workspace=order.workspace,
            node=order.node,
            how=attempt.how.value,
            status=attempt.status,
            reason=attempt.reason,
            outcome=judged.record.outcome if judged is not None else "",
            verdict=judged.verdict.kind.value if judged is not None else "",
            rule=judged.verdict.rule if judged is not None else "",
            ms=attempt.ended_at_ms - attempt.sent_at_ms,
        )


def _gpu_terms(attempt: Attempt, session: NodeSession | None) -> GpuTerms:
    """Return which GPUs the receipt of *attempt* may name, as far as this bootstrap holds it in memory."""
    order, spec = attempt.signed.order, attempt.call.spec
    # a session that is another run of the node says nothing about what it offered then
    known = session is not None and session.session == order.session
    return GpuTerms(
        frozenset(session.gpus_shown) if known and session is not None else None,
        spec.gpu_count if spec.revision == order.revision else None,
    )
