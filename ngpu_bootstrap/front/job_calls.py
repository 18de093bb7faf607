"""A client's calls about jobs that its workspace runs: submitting one, and asking for it.

Owns what the client gets. A submission is answered once with the result, where its declaration says `wait`, or with
the workspace's own answer; either way the job goes on and is kept under its task id. A question goes to the node that
took the job and to no other, whichever bootstrap of the database is asked and however often it was restarted since;
the id of another client's job is as unknown as one that never was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import trio

from ngpu_bootstrap.dispatch.calls import Call
from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.dispatch.jobs import Jobs
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import NotServed, Refusal
from ngpu_bootstrap.front.answers import WorkspaceAnswer
from ngpu_bootstrap.front.promised import LATE_MS, Promises, TaskEnded
from ngpu_bootstrap.profiles.jobs import RESUBMIT, Job
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import TaskIsFinal, UnknownTask
from ngpu_bootstrap.store.job_rows import JobRow
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.identity import Address
from ngpu_protocol.job_answers import MAX_ID_CHARS
from ngpu_protocol.job_terms import JobTerms
from ngpu_protocol.workspaces import WorkspaceSpec


class JobCalls:
    """Answers calls about jobs."""

    def __init__(
        self,
        *,
        detached: DetachedTasks,
        promises: Promises,
        jobs: Jobs,
        nodes: Nodes,
        store: Store,
        watch: TaskWatch,
        now_ms: Callable[[], int],
    ) -> None:
        self._detached = detached
        self._promises = promises
        self._jobs = jobs
        self._nodes = nodes
        self._store = store
        self._watch = watch
        self._now_ms = now_ms

    async def submit(
        self, call: Call, name: str, declared: JobTerms, caller: str, refused: Refusal | None = None
    ) -> tuple[str, WorkspaceAnswer]:
        """Submit a job and return its task's id and what its client gets.

        Args:
            call: with a whole body; becomes the job's task, unless its client submitted the same under its key before.
            name: of the declaration, with its profile's.
            caller: the client's own workspace.
            refused: why it may not be taken now, unless it was before.

        Raises:
            Refusal: it was not taken, and there is no task; or another call was made under its key.
            TaskEnded: it was, and ended without a result.
        """
        row = JobRow(call.task_id, call.spec.id, caller, name, declared, Job(since_ms=self._now_ms()))
        call = dataclasses.replace(call, detach=True, wrapped=True, tell_place=None, job=row)
        submission = self._jobs.expect(call.task_id)
        try:
            task_id = await self._promises.submit(call, refused)
            if declared.wait:
                return task_id, await self._result(call, task_id, declared)
            if task_id != call.task_id:
                return task_id, await self._first_submission(call, task_id, declared)
            await submission.over.wait()
            if submission.answer is not None:
                return task_id, WorkspaceAnswer(
                    submission.answer.status, submission.answer.body, submission.answer.content_type
                )
            return task_id, await self._result(call, task_id, declared)
        finally:
            self._jobs.forget(call.task_id)

    async def _first_submission(self, call: Call, task_id: str, declared: JobTerms) -> WorkspaceAnswer:
        """Return what the workspace answered when a job was submitted under this key before; wait until it has."""
        deadline_ms = call.deadline_ms + int(declared.submit_timeout_s * 1000) + LATE_MS
        while True:
            row = await self._store.look_up(lambda connection: job_rows.of_task(connection, task_id))
            if row is not None and row.submission:
                return WorkspaceAnswer(*job_rows.unpacked(row.submission))
            record = await self._store.task_state(task_id)
            if record is None or (record.state is TaskState.FINISHED and row is not None and row.job.key):
                raise Refusal(410, "answer_gone", f"the answer to the submission of task {task_id} is not kept")
            if record.state.is_final:
                return await self._promises.answer(task_id, deadline_ms)
            if self._now_ms() >= deadline_ms:
                raise TaskEnded(task_id, Refusal(504, "deadline", f"task {task_id} is not submitted yet; ask for it"))
            self._promises.check_goes_on(task_id)
            await self._watch.wait(task_id)

    async def _result(self, call: Call, task_id: str, declared: JobTerms) -> WorkspaceAnswer:
        """Return the answer of a job that has ended, waiting until it has."""
        try:
            return await self._promises.answer(task_id, call.deadline_ms + int(declared.duration_s * 1000))
        except trio.Cancelled:
            # its client left: nobody waits for what the workspace would go on making, unless a key lets it come again.
            # (A store that cannot be asked for a moment is no such wish: the job goes on.)
            if declared.cancel is not None and call.idempotency_key is None:
                self._detached.cancel(task_id)
            raise

    async def node_of(self, task_id: str) -> Address | None:
        """Return the node that has a job, None while none has."""
        row = await self._store.look_up(lambda connection: job_rows.of_task(connection, task_id))
        return Address(row.job.node) if row is not None and row.job.node else None

    async def find(self, caller: str, name: str, key: str) -> JobRow:
        """Return the job a client means by the workspace's own id of it.

        Raises:
            Refusal: 404, it has no such job, whoever else may have.
        """
        row = None
        if key and len(key) <= MAX_ID_CHARS and key.isprintable():
            row = await self._store.look_up(lambda connection: job_rows.of_key(connection, None, caller, name, key))
        if row is None:
            shown = "".join(character for character in key[:64] if character.isprintable())
            raise Refusal(404, "job_unknown", f"there is no job {shown!r}; use the id that its submission answered")
        return row

    async def answer_kept(self, row: JobRow, spec: WorkspaceSpec) -> WorkspaceAnswer | None:
        """Return the last answer about a job that is done and whose node is not here any more; None: ask the node.

        Raises:
            TaskEnded: the node is gone and nothing is known of a result, or it is away and may come back.
        """
        node = Address(row.job.node)
        if node and self._nodes.serves(spec, node):
            return None
        record = await self._store.task(row.task_id)
        if record is None:
            raise Refusal(404, "job_unknown", f"job {row.job.key} is no longer kept")
        if record.state is TaskState.FINISHED and not row.declared.fetch:
            return await self._promises.kept(record)
        if record.state is TaskState.FINISHED:
            words = f"job {row.job.key} was done, and its node is gone; its result is kept as task {row.task_id}"
            raise TaskEnded(row.task_id, Refusal(410, "job_node_gone", words))
        if record.state.is_final:
            words = record.message if RESUBMIT in record.message else f"{record.message}; {RESUBMIT}"
            raise TaskEnded(row.task_id, Refusal(410, record.reason, words))
        if not node:
            words = f"job {row.job.key} is being submitted; ask again"
            raise TaskEnded(row.task_id, NotServed(503, "job_not_submitted", words, retry_after_s=1))
        is_here = self._nodes.get(node) is not None
        what = f"the workspace on node {node}" if is_here else f"the node {node}"
        words = (
            f"{what} that took job {row.job.key} is away; ask again, and if it is not back within "
            f"{row.declared.away_s:g} s the job counts as lost and is to be submitted again"
        )
        reason = "job_workspace_away" if is_here else "job_node_away"
        raise TaskEnded(row.task_id, NotServed(503, reason, words, retry_after_s=2))

    async def note(self, row: JobRow, call_id: str) -> None:
        """Link a client's question, which was a task of its own, with its job."""
        await self._store.chore(lambda connection: job_rows.note_call(connection, row.task_id, call_id))

    async def end(self, row: JobRow) -> None:
        """End a job because its client had the workspace end it."""
        try:
            await self._store.ask_cancel(row.task_id, self._now_ms())
        except (TaskIsFinal, UnknownTask):
            return
        self._detached.cancel(row.task_id)
