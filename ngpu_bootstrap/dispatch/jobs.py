"""Jobs carried through: the client's call submits one, its node is asked for it until it is final, its result is got.

A job is one promised task. Each call made for it (the submission, questions, the file that is its result, a
cancellation) is an attempt of that task, with an order and a receipt of its own, and they are made one after another.
So everything a task has, a job has: it outlives this run of the daemon and moves to a sibling that lives, it is shown,
followed, cancelled and called back for by its task id, and `getDetailed` lists its calls with their receipts.

What to do next is `profiles.jobs`' to say. Owned here is when it is stored: the row says POLLING before the first
question leaves, so that whoever takes the task up knows the node and the id. Where the declaration says so, the
question is one order that the node repeats on its workspace until the answer is final (`Ngpu-Until`): that order lasts
as long as the job, holds a slot, and its receipt counts the job's GPU time. A node that does not know the field answers
at once, and is asked again after the interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import structlog
import trio

from ngpu_bootstrap.dispatch.attempt import Attempt, How
from ngpu_bootstrap.dispatch.calls import Call, WholeBody
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher, Progress, Result
from ngpu_bootstrap.dispatch.ends import Ending
from ngpu_bootstrap.profiles.jobs import (
    Failure,
    Fetch,
    Job,
    Over,
    Phase,
    Poll,
    Rest,
    Submit,
    busy,
    failed,
    fetched,
    missed,
    next_step,
    polled,
    submitted,
)
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.job_rows import JobRow
from ngpu_bootstrap.store.records import AttemptEnd, AttemptRecord
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.recovery import COLLECT_GRACE_MS, Collected
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.identity import Address
from ngpu_protocol.job_answers import MAX_ANSWER_BYTES, UNTIL_HEADER, PollUntil
from ngpu_protocol.job_terms import Ask, JobTerms
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.wire_errors import Reason

log = structlog.get_logger(__name__)

# How long one order that repeats its question lasts at most: a longer job is held by several in a row.
HOLD_S = 60.0
CANCEL_TIMEOUT_S = 10.0
ASK_AGAIN_S = 1.0
# Fields of the client's own request that its questions carry too; what describes the body is the question's own.
_NOT_REPEATED = frozenset({b"content-type", b"content-length", b"content-encoding", b"idempotency-key", b"accept"})
_UNPROVEN = frozenset({"receipt_disputed", "receipt_missing"})


class Submission:
    """What the workspace answered to a job's submission, for a client who waits for just that.

    Attributes:
        over: set once there is an answer, or none will come.
    """

    def __init__(self) -> None:
        self.over = trio.Event()
        self.answer: Collector | None = None


@dataclasses.dataclass(slots=True)
class _Course:
    """One job in hand.

    Attributes:
        attempts: calls made for it so far.
        last: the answer its last call brought.
    """

    call: Call
    row: JobRow
    attempts: int
    last: Collector | None = None

    @property
    def job(self) -> Job:
        return self.row.job

    @property
    def declared(self) -> JobTerms:
        return self.row.declared


class Jobs:
    """Carries jobs for `DetachedTasks`, which own each as the task it is.

    Args:
        answer_bytes: the largest answer kept.
    """

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        store: Store,
        nodes: Nodes,
        answer_bytes: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._nodes = nodes
        self._answer_bytes = answer_bytes
        self._now_ms = now_ms
        self._submissions: dict[str, Submission] = {}

    def expect(self, task_id: str) -> Submission:
        """Return where the answer to the submission of a job to come will be; `forget` ends it."""
        return self._submissions.setdefault(task_id, Submission())

    def forget(self, task_id: str) -> None:
        """Nobody waits for the answer to the submission of *task_id* any more."""
        self._submissions.pop(task_id, None)

    async def carry(self, call: Call, row: JobRow, attempts: int = 0, under_way: AttemptRecord | None = None) -> None:
        """Bring a job to its end, from wherever it stands, and record it.

        Args:
            call: the client's own request; it is made again only while the job is not submitted.
            attempts: calls that were made for it.
            under_way: the last of them, where its end is not recorded.
        """
        course = _Course(call, row, attempts)
        try:
            if under_way is not None:
                await self._take_up(course, under_way)
            await self._run(course)
        finally:
            submission = self._submissions.get(call.task_id)
            if submission is not None:
                submission.over.set()

    async def cancel(self, call: Call, attempts: int) -> int:
        """Have the workspace end a job, where its declaration says how; return how many calls were made for it by now.

        Whatever becomes of that, the task ends as cancelled: whoever calls this records it.
        """
        row = await self._store.look_up(lambda connection: job_rows.of_task(connection, call.task_id))
        if row is None or row.declared.cancel is None or row.job.phase is not Phase.POLLING:
            return attempts
        course = _Course(call, row, attempts)
        await self._ask(course, row.declared.cancel, CANCEL_TIMEOUT_S)
        return course.attempts

    async def _run(self, course: _Course) -> None:
        while True:
            step = next_step(course.job, course.declared, self._now_ms())
            match step:
                case Rest(until_ms):
                    await trio.sleep(max(0.0, (until_ms - self._now_ms()) / 1000))
                case Submit():
                    await self._submit(course)
                case Poll(last):
                    await self._poll(course, last=last)
                case Fetch(target):
                    await self._fetch(course, target)
                case Over():
                    await self._end(course)
                    return

    # -- the calls

    async def _submit(self, course: _Course) -> None:
        declared, call = course.declared, course.call
        now_ms = self._now_ms()
        deadline_ms = min(call.deadline_ms, now_ms + int(declared.duration_s * 1000))
        spec = call.spec.model_copy(
            update={"request_timeout_s": min(call.spec.request_timeout_s, declared.submit_timeout_s)}
        )
        own = dataclasses.replace(call, spec=spec, deadline_ms=deadline_ms)
        sink = Collector(self._answer_bytes)
        result: Result | None = await self._made(course, own, sink)
        if result is not None and result.attempt is not None and result.attempt.how in (How.LOST, How.DEADLINE):
            result = await self._collected(course, result.attempt, sink)
        await self._note_submitted(course, result, sink)

    async def _note_submitted(self, course: _Course, result: Result | None, sink: Collector) -> None:
        now_ms = self._now_ms()
        if result is None:
            lost = "the node was lost while it took the job; whether the workspace has it is unknown"
            await self._store_job(course, failed(course.job, Failure(502, "node_lost", lost)))
            return
        ending = result.ending
        if ending.state is not TaskState.FINISHED or result.attempt is None:
            await self._store_job(course, failed(course.job, Failure(ending.status, ending.reason, ending.message)))
            return
        node = result.attempt.signed.order.node
        after = submitted(course.job, course.declared, sink.status, sink.body, node, now_ms)
        if after.phase is Phase.POLLING:
            row = course.row.at(after)
            if await self._store.look_up(lambda connection: job_rows.key_is_taken(connection, row)):
                words = f"the workspace gave the job the id {after.key}, which another job of yours has on another node"
                after = failed(after, Failure(502, "job_id_taken", f"{words}; its ids must differ between nodes"))
        course.last = sink
        await self._store_job(course, after)
        if after.phase is Phase.POLLING:
            self._store.note_running(course.call.task_id, course.attempts)
            submission = self._submissions.get(course.call.task_id)
            if submission is not None:
                submission.answer = sink
                submission.over.set()

    async def _poll(self, course: _Course, *, last: bool) -> None:
        declared, job = course.declared, course.job
        assert declared.poll is not None
        hold_s = 0.0
        if declared.holds and not last:
            left_s = job.since_ms / 1000 + declared.duration_s - self._now_ms() / 1000
            hold_s = max(0.0, min(HOLD_S, left_s))
        until = PollUntil(
            signs=declared.signs,
            job_id=job.key,
            interval_ms=int(declared.interval_s * 1000),
            hold_ms=int(hold_s * 1000),
        )
        answer = await self._ask(course, declared.poll, declared.poll_timeout_s + hold_s, until if hold_s else None)
        now_ms = self._now_ms()
        if isinstance(answer, Collector):
            course.last = answer
            after = polled(job, declared, answer.status, answer.body, now_ms)
        else:
            after = self._not_answered(job, declared, answer, now_ms)
        if after.phase is not job.phase or after.state != job.state:
            await self._store_job(course, after)
        course.row = course.row.at(after)

    async def _fetch(self, course: _Course, target: str) -> None:
        declared, job = course.declared, course.job
        ask = Ask.model_construct(method="GET", target=target)
        limit = min(self._answer_bytes, declared.fetch_bytes)
        answer = await self._ask(course, ask, declared.fetch_timeout_s, limit=limit)
        now_ms = self._now_ms()
        if isinstance(answer, Collector):
            course.last = answer
            after = fetched(job, declared, answer.status, now_ms)
        else:
            after = self._not_answered(job, declared, answer, now_ms)
        course.row = course.row.at(after)

    def _not_answered(self, job: Job, declared: JobTerms, refusal: Ending, now_ms: int) -> Job:
        """Return *job* after a call that brought no answer of the workspace's that may be believed."""
        if refusal.reason == Reason.NO_FREE_SLOT:
            return busy(job, declared, now_ms)
        if refusal.reason in _UNPROVEN or refusal.reason == "answer_too_large":
            return failed(job, Failure(502, refusal.reason, refusal.message))
        return missed(job, declared, refusal.message, now_ms)

    async def _ask(
        self,
        course: _Course,
        ask: Ask,
        timeout_s: float,
        until: PollUntil | None = None,
        *,
        limit: int = MAX_ANSWER_BYTES,
    ) -> Collector | Ending:
        """Call the workspace about a job, on the job's own node; return its answer, or what came instead."""
        call, key = course.call, course.job.key
        body = ask.body_of(key)
        fields = [pair for pair in call.headers if pair[0] not in _NOT_REPEATED]
        if body:
            fields.append((b"content-type", b"application/json"))
        if until is not None:
            fields.append((UNTIL_HEADER.lower().encode(), until.encode()))
        own = dataclasses.replace(
            call,
            spec=call.spec.model_copy(update={"request_timeout_s": timeout_s}),
            method=ask.method,
            target=ask.target_of(key),
            headers=fields,
            body=WholeBody(body),
            deadline_ms=self._now_ms() + int(timeout_s * 1000),
            detach=False,
            only=Address(course.job.node),
        )
        sink = Collector(limit)
        result = await self._made(course, own, sink)
        return sink if result.ending.state is TaskState.FINISHED else result.ending

    async def _made(self, course: _Course, call: Call, sink: Collector) -> Result:
        """Make one of a job's calls."""
        progress = Progress(promised=True, attempts=course.attempts, is_part=True)
        result = await self._dispatcher.carry(call, sink, progress)
        if result.attempt is not None:
            course.attempts = result.attempt.number
        return result

    # -- what a restart left

    async def _take_up(self, course: _Course, under_way: AttemptRecord) -> None:
        """Bring the call that was being made when its bootstrap ended to an end."""
        if course.job.phase is not Phase.SUBMITTING or not under_way.order:
            end = AttemptEnd(
                course.call.task_id, under_way.attempt, "lost", self._now_ms(), "connection_lost", under_way.status
            )
            await self._store.end_attempt(end, requeue=False)
            return
        # the order was detached: its node finishes it, and keeps the answer
        signed = SignedOrder.from_bytes(under_way.order)
        attempt = Attempt(course.call, signed, under_way.attempt)
        attempt.sent_at_ms = signed.order.issued_at_ms
        sink = Collector(self._answer_bytes)
        await self._note_submitted(course, await self._collected(course, attempt, sink), sink)

    async def _collected(self, course: _Course, attempt: Attempt, sink: Collector) -> Result | None:
        """Ask the node for the answer to a submission that was lost on its way; None where there will be none."""
        order = attempt.signed.order
        until_ms = min(order.deadline_ms, course.call.deadline_ms) + min(
            COLLECT_GRACE_MS, int(course.declared.away_s * 1000)
        )
        while True:
            said = Collected.UNREACHABLE
            session = self._nodes.get(order.node)
            if session is not None:
                said = await attempt.collect(session.requests, sink, self._now_ms)
            if said is Collected.ANSWERED:
                return await self._dispatcher.collected(course.call, attempt, sink, is_part=True)
            if said in (Collected.UNKNOWN, Collected.UNKNOWN_SINCE_RESTART) or self._now_ms() >= until_ms:
                end = AttemptEnd(order.task_id, attempt.number, "lost", self._now_ms(), "connection_lost")
                await self._store.end_attempt(end, requeue=False)
                return None
            await trio.sleep(ASK_AGAIN_S)

    # -- what is stored

    async def _store_job(self, course: _Course, job: Job) -> None:
        course.row = row = course.row.at(job)
        await self._store.chore(lambda connection: job_rows.put(connection, row))

    async def _end(self, course: _Course) -> None:
        """Record the end of the job, and of the task it is."""
        job, answer = course.job, course.last
        failure = job.failure
        if failure is None or failure.passed_on:
            status = answer.status if answer is not None else 200
            ending = Ending(TaskState.FINISHED, status)
        else:
            state = TaskState.EXPIRED if job.phase is Phase.TIMED_OUT else TaskState.FAILED
            ending, answer = Ending(state, failure.status, failure.reason, failure.message), None
        row = course.row
        await self._store.chore(lambda connection: job_rows.put(connection, row))
        log.info(
            "job_ended",
            task_id=row.task_id,
            job=row.name,
            phase=job.phase.value,
            node=job.node,
            polls=job.polls,
            calls=course.attempts,
            reason=ending.reason,
        )
        await self._dispatcher.complete(course.call, ending, answer)
