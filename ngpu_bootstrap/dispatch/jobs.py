"""Jobs carried through: the client's call submits one, its node is asked for it until it is final, its result is got.

A job is one promised task. Each call made for it (the submission, questions, the file that is its result, a
cancellation) is an attempt of that task, with an order and a receipt of its own, and they are made one after another.
So everything a task has, a job has: it outlives this run of the daemon and moves to a sibling that lives, it is shown,
followed, cancelled and called back for by its task id, and `getDetailed` lists its calls with their receipts.

What to do next is `profiles.jobs`' to say. Owned here is when it is stored. What a call made of the job is committed
with the end of that call, and the end of the job with the end of its task: whoever takes the task up finds a job that
is being submitted, or one with its node and id, and never one that has ended. A submission that was answered is not
made again, whatever became of the answer.

Where the declaration says so, the question is one order that the node repeats on its workspace until the answer is
final (`Ngpu-Until`): that order lasts as long as the job, holds a slot, and its receipt counts the job's GPU time. A
node that does not know the field answers at once, and is asked again after the interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import structlog
import trio

from ngpu_bootstrap.dispatch.attempt import Attempt, How
from ngpu_bootstrap.dispatch.calls import Call, WholeBody
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher, Note, Progress, Result
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
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.job_answers import MAX_ANSWER_BYTES, UNTIL_HEADER, PollUntil
from ngpu_protocol.job_terms import Ask, JobTerms
from ngpu_protocol.losses import JobLoss, sign_loss
from ngpu_protocol.networks import Network
from ngpu_protocol.orders import SignedOrder, TaskOrder
from ngpu_protocol.wire_errors import Reason

log = structlog.get_logger(__name__)

# How long one order that repeats its question lasts at most: a longer job is held by several in a row.
HOLD_S = 60.0
CANCEL_TIMEOUT_S = 10.0
ASK_AGAIN_S = 1.0
# Fields of the client's own request that its questions do not carry: what describes the body, and what would have the
# workspace answer with a part, or with nothing new.
_NOT_REPEATED = frozenset(
    {b"content-type", b"content-length", b"content-encoding", b"idempotency-key", b"accept", b"range", b"if-range"}
    | {b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"}
)
# Ends of a job about which its node signs nothing any more.
_LOSSES = frozenset({"job_node_gone", "node_lost"})
# Outcomes of a submission that say that no workspace has seen it.
_NOT_TAKEN = frozenset({"refused", "not_sent"})
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
        session: the run of its node that took it; empty while that is not known.
        heard_at_ms: when its workspace last answered.
    """

    call: Call
    row: JobRow
    attempts: int
    last: Collector | None = None
    session: bytes = b""
    heard_at_ms: int = 0

    @property
    def job(self) -> Job:
        return self.row.job

    @property
    def declared(self) -> JobTerms:
        return self.row.declared


class Jobs:
    """Carries jobs for `DetachedTasks`, which own each as the task it is.

    Args:
        account, network: what losses are signed with.
        answer_bytes: the largest answer kept.
    """

    def __init__(
        self,
        *,
        account: Account,
        network: Network,
        dispatcher: Dispatcher,
        store: Store,
        nodes: Nodes,
        answer_bytes: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._account = account
        self._chain_id = network.chain_id
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

    async def carry(self, call: Call, row: JobRow, attempts: int = 0, last: AttemptRecord | None = None) -> None:
        """Bring a job to its end, from wherever it stands, and record it.

        Args:
            call: the client's own request; it is made again only while no node can have the job.
            attempts: calls that were made for it.
            last: the last of them, where a run before made it.
        """
        course = _Course(call, row, attempts)
        try:
            if last is not None:
                await self._take_up(course, last)
            if course.job.phase is not Phase.SUBMITTING and not course.session:
                order = await self._submission_order(course)
                course.session = order.session if order is not None else b""
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
        await self._ask(course, row.declared.cancel, CANCEL_TIMEOUT_S, heard=lambda answer: row.job)
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
        result = await self._made(course, own, sink, partial(self._note_submitted, course, sink))
        if result.attempt is not None and result.attempt.how in (How.LOST, How.DEADLINE):
            await self._collect(course, result.attempt, sink)
        elif result.attempt is None:  # no node took it
            await self._note_submitted(course, sink, result)
        self._tell_submitted(course, sink)

    async def _note_submitted(self, course: _Course, sink: Collector, result: Result) -> Mapping[str, Any] | None:
        """Take in what became of the submission; return what is kept of it."""
        ending = result.ending
        if ending.state is not TaskState.FINISHED or result.attempt is None:
            failure = Failure(ending.status, ending.reason, ending.message)
            return self._taken_in(course, failed(course.job, failure))
        node, course.session = result.attempt.signed.order.node, result.attempt.signed.order.session
        course.heard_at_ms = self._now_ms()
        after = submitted(course.job, course.declared, sink.status, sink.body, node, self._now_ms())
        if after.phase is Phase.POLLING:
            row = course.row.at(after)
            if await self._store.look_up(lambda connection: job_rows.key_is_taken(connection, row)):
                words = f"the workspace gave the job the id {after.key}, which another job of yours has on another node"
                after = failed(after, Failure(502, "job_id_taken", f"{words}; its ids must differ between nodes"))
        course.last = sink
        if course.call.idempotency_key is not None and not course.declared.wait:
            kept = job_rows.packed(sink.status, sink.body, sink.content_type)
            course.row = dataclasses.replace(course.row, submission=kept)
        return self._taken_in(course, after)

    def _tell_submitted(self, course: _Course, sink: Collector) -> None:
        """Have it known that a job was taken."""
        if course.job.phase is not Phase.POLLING:
            return
        self._store.note_running(course.call.task_id, course.attempts)
        submission = self._submissions.get(course.call.task_id)
        if submission is not None:
            submission.answer = sink
            submission.over.set()

    def _taken_in(self, course: _Course, after: Job) -> Mapping[str, Any] | None:
        """Go on with a job as *after*; return what is to be kept of it, None where that is what is kept.

        What has ended is kept with the end of its task.
        """
        before = course.job
        course.row = course.row.at(after)
        if after.phase.is_final or (after.phase is before.phase and after.state == before.state):
            return None
        return job_rows.values(course.row)

    async def _poll(self, course: _Course, *, last: bool) -> None:
        declared, job = course.declared, course.job
        assert declared.poll is not None
        hold_s = 0.0
        if declared.hold and not last:
            left_s = job.since_ms / 1000 + declared.duration_s - self._now_ms() / 1000
            hold_s = max(0.0, min(HOLD_S, left_s))
        until = PollUntil(
            signs=declared.signs,
            job_id=job.key,
            interval_ms=int(declared.interval_s * 1000),
            hold_ms=int(hold_s * 1000),
            ask_ms=max(10, min(3_600_000, int(declared.poll_timeout_s * 1000))),
        )
        asked_at_ms = self._now_ms()

        def heard(answer: Collector | Ending) -> Job:
            now_ms = self._now_ms()
            if isinstance(answer, Collector):
                course.heard_at_ms = now_ms
                return polled(job, declared, answer.status, answer.body, now_ms, asked_at_ms=asked_at_ms)
            return self._not_answered(course, job, answer, now_ms)

        timeout_s = declared.poll_timeout_s + hold_s
        await self._ask(course, declared.poll, timeout_s, until if hold_s else None, heard=heard)

    async def _fetch(self, course: _Course, target: str) -> None:
        declared, job = course.declared, course.job
        ask = Ask.model_construct(method="GET", target=target)
        limit = min(self._answer_bytes, declared.fetch_bytes)

        def heard(answer: Collector | Ending) -> Job:
            now_ms = self._now_ms()
            if isinstance(answer, Collector):
                course.heard_at_ms = now_ms
                return fetched(job, declared, answer.status, now_ms)
            return self._not_answered(course, job, answer, now_ms)

        await self._ask(course, ask, declared.fetch_timeout_s, heard=heard, limit=limit)

    def _not_answered(self, course: _Course, job: Job, refusal: Ending, now_ms: int) -> Job:
        """Return *job* after a call that brought no answer of the workspace's that may be believed."""
        declared = course.declared
        if refusal.reason == Reason.NO_FREE_SLOT:
            course.heard_at_ms = now_ms
            return busy(job, declared, now_ms)
        if refusal.reason in _UNPROVEN or refusal.reason == "answer_too_large":
            return failed(job, Failure(502, refusal.reason, refusal.message))
        here = self._nodes.get(Address(job.node))
        # one that left and came back as another run has lost the job itself, whenever it is looked at
        stayed = here is not None and (here.session == course.session or here.connected_at_ms <= course.heard_at_ms)
        return missed(job, declared, refusal.message, now_ms, node_stayed=stayed)

    async def _ask(
        self,
        course: _Course,
        ask: Ask,
        timeout_s: float,
        until: PollUntil | None = None,
        *,
        heard: Callable[[Collector | Ending], Job],
        limit: int = MAX_ANSWER_BYTES,
    ) -> None:
        """Call the workspace about a job, on the job's own node.

        Args:
            heard: from its answer, or what came instead, to the job as it is then.
        """
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

        async def note(result: Result) -> Mapping[str, Any] | None:
            answered = result.ending.state is TaskState.FINISHED
            if answered:
                course.last = sink
            return self._taken_in(course, heard(sink if answered else result.ending))

        result = await self._made(course, own, sink, note)
        if result.attempt is None:
            await note(result)

    async def _made(self, course: _Course, call: Call, sink: Collector, note: Note) -> Result:
        """Make one of a job's calls.

        Args:
            note: told how it ended, unless no node took it, or its answer is still to be collected.
        """
        progress = Progress(promised=True, attempts=course.attempts, is_part=True, note=note)
        result = await self._dispatcher.carry(call, sink, progress)
        if result.attempt is not None:
            course.attempts = result.attempt.number
        return result

    # -- what a restart left

    async def _take_up(self, course: _Course, last: AttemptRecord) -> None:
        """Bring the call that was being made when its bootstrap ended to an end."""
        submitting = course.job.phase is Phase.SUBMITTING
        if last.ended_at_ms is not None:
            if submitting and last.outcome not in _NOT_TAKEN:
                words = "the bootstrap died before it could keep what came of the submission; it is not made again"
                course.row = course.row.at(failed(course.job, Failure(502, "bootstrap_lost", words)))
            return
        if not submitting or not last.order:
            end = AttemptEnd(course.call.task_id, last.attempt, "lost", self._now_ms(), "connection_lost", last.status)
            await self._store.end_attempt(end, requeue=False)
            return
        # the order was detached: its node finishes it, and keeps the answer
        signed = SignedOrder.from_bytes(last.order)
        attempt = Attempt(course.call, signed, last.attempt)
        attempt.sent_at_ms = signed.order.issued_at_ms
        sink = Collector(self._answer_bytes)
        await self._collect(course, attempt, sink)
        self._tell_submitted(course, sink)

    async def _collect(self, course: _Course, attempt: Attempt, sink: Collector) -> None:
        """Ask the node for the answer to a submission that was lost on its way, until it is here or cannot come."""
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
                progress = Progress(is_part=True, note=partial(self._note_submitted, course, sink))
                await self._dispatcher.collected(course.call, attempt, sink, progress=progress)
                return
            if said in (Collected.UNKNOWN, Collected.UNKNOWN_SINCE_RESTART) or self._now_ms() >= until_ms:
                end = AttemptEnd(order.task_id, attempt.number, "lost", self._now_ms(), "connection_lost")
                await self._store.end_attempt(end, requeue=False)
                words = "the node was lost while it took the job; whether the workspace has it is unknown"
                course.row = course.row.at(failed(course.job, Failure(502, "node_lost", words)))
                return
            await trio.sleep(ASK_AGAIN_S)

    async def _submission_order(self, course: _Course) -> TaskOrder | None:
        """Return the order by which the job's node took it; None where none is on file."""
        for attempt in reversed(await self._store.attempts(course.call.task_id)):
            if attempt.order:
                order = SignedOrder.from_bytes(attempt.order).order
                if order.detach:  # the submission: questions are not
                    return order
        return None

    async def _loss(self, course: _Course, reason: str) -> bytes:
        """Return, signed, that a job cannot end since its node is gone; b"" where no order says which node took it."""
        job, now_ms = course.job, self._now_ms()
        order = await self._submission_order(course)
        if order is None:
            return b""
        loss = JobLoss(
            task_id=course.call.task_id,
            order_hash=order.digest(self._chain_id),
            node=order.node,
            bootstrap=self._account.address,
            job_id=job.key,
            reason=reason,
            away_since_ms=max(order.issued_at_ms, min(job.away_since_ms or now_ms, now_ms)),
            at_ms=max(order.issued_at_ms, now_ms),
        )
        return sign_loss(loss, self._account, self._chain_id).wire

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
        if failure is not None and failure.reason in _LOSSES:
            course.row = dataclasses.replace(course.row, loss=await self._loss(course, failure.reason))
        row = course.row
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
        await self._dispatcher.complete(dataclasses.replace(course.call, job=row), ending, answer)
