"""The store: what the rest of the bootstrap may do with its database. Everything else in this package is behind it.

Every method that writes returns after COMMIT: what it returned survives ``kill -9`` and power loss. Cancelling the
caller of a write never takes it back: cancelled before it was queued nothing happens, afterwards it happens and only
its outcome is unknown to the caller. Methods named ``note_…`` do not wait and promise nothing.

Errors are those of ``errors``; any method may raise StoreUnavailable (the medium failed) and StoreClosed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import outcome
import sqlalchemy as sa
import trio

from ngpu_bootstrap.kill_points import reached
from ngpu_bootstrap.scheduling.standing import Standing
from ngpu_bootstrap.store import leases, queries, retention, webhook_rows
from ngpu_bootstrap.store.bodies import BodyFiles, BodyLimits, BodyWriter
from ngpu_bootstrap.store.database import database_url, open_engine
from ngpu_bootstrap.store.errors import PlacementOutdated, StoreClosed, StoreError, StoreUnavailable
from ngpu_bootstrap.store.group_commit import CommitCounts, GroupCommit, execute_steps, load_chain
from ngpu_bootstrap.store.handoff import Handoff
from ngpu_bootstrap.store.leases import Sibling, Told
from ngpu_bootstrap.store.operations import Operation, Operations
from ngpu_bootstrap.store.readers import Reader
from ngpu_bootstrap.store.recent_links import RecentLinks
from ngpu_bootstrap.store.records import (
    AskedGap,
    AttemptEnd,
    AttemptRecord,
    AttemptStart,
    ChainFault,
    DeploymentRow,
    FiledReceipt,
    Finish,
    Missing,
    NewReceipt,
    NewTask,
    NodeRow,
    OpenTask,
    Part,
    ReceiptRecord,
    RolloutRow,
    StoredBody,
    TaskDetail,
    TaskFilter,
    TaskIdPage,
    TaskPage,
    TaskRecord,
    WorkspaceRow,
    WorkspaceToken,
)
from ngpu_bootstrap.store.schema import prepare_schema
from ngpu_bootstrap.store.statements import Statements
from ngpu_bootstrap.store.webhook_rows import DueWebhook, ToldWebhook, WebhookRecord
from ngpu_protocol.identity import Address
from ngpu_protocol.receipts import ReceiptLink

T = TypeVar("T")

_NO_BOXES: Mapping[str, bytes] = {}


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What an operator may tune.

    Attributes:
        linger_s: See GroupCommit.
        queue_limit: Writes waiting or being committed; beyond it callers wait for room.
        bodies: Sizes of bodies kept.
        migrate: Whether to migrate an outdated schema; None: on SQLite only.
    """

    linger_s: float = 0.002
    queue_limit: int = 4096
    bodies: BodyLimits = field(default_factory=BodyLimits)
    migrate: bool | None = None


class Store:
    """One open database. Use it in the trio run that opened it, and close it."""

    def __init__(
        self,
        engine: sa.Engine,
        bootstrap: Address,
        writes: Handoff[Operation],
        commits: GroupCommit,
        operations: Operations,
        files: BodyFiles,
    ) -> None:
        self._engine = engine
        self._bootstrap = bootstrap
        self._writes = writes
        self._commits = commits
        self._operations = operations
        self._files = files
        self._lookups = Reader(engine, "lookups", capacity=1024)
        self._lists = Reader(engine, "lists", capacity=64)
        self._chores = Reader(engine, "chores", capacity=64, writes=True)
        self._links = RecentLinks()

    @classmethod
    async def open(
        cls,
        location: str | Path,
        *,
        network: str,
        bootstrap: Address,
        bodies: Path | None = None,
        options: StoreOptions = StoreOptions(),
    ) -> Store:
        """Open the database at *location*, creating or migrating its schema.

        Args:
            location: Path of a SQLite file (its directory exists), or a database URL.
            network: Name of the network; a database remembers the first one.
            bootstrap: Whose receipts chains are meant where a method is told only a node.
            bodies: Directory for large bodies; None: ``bodies`` beside the SQLite file.

        Raises:
            StoreMismatch: see ``schema.prepare_schema``.
            StoreUnavailable: the database cannot be opened.
        """
        if bodies is None:
            database = database_url(location).database
            if database_url(location).get_backend_name() != "sqlite" or not database:
                raise ValueError("a database that is not a file needs a directory for bodies")
            bodies = Path(database).parent / "bodies"
        engine = open_engine(location)
        files = BodyFiles(bodies, options.bodies)
        try:
            await trio.to_thread.run_sync(_prepare, engine, network, options.migrate, files)
        except BaseException:
            engine.dispose()
            raise
        writes: Handoff[Operation] = Handoff(options.queue_limit)
        operations = Operations(Statements(engine.dialect), bootstrap)
        commits = GroupCommit(engine, operations, writes, linger_s=options.linger_s)
        store = cls(engine, bootstrap, writes, commits, operations, files)
        if engine.dialect.name == "sqlite":  # no network and no other writer to wait for
            writes.serve_here(commits.serve)
        commits.start()
        store._lookups.start()
        store._lists.start()
        store._chores.start()
        return store

    async def aclose(self) -> None:
        """Write what is queued, then close. Callers still waiting are answered. Runs to its end even when cancelled."""
        self._writes.close()
        self._lookups.close()
        self._lists.close()
        self._chores.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._shut)
            # the wake-ups of the last batch are in trio's queue before this returns to it
            await trio.lowlevel.checkpoint()

    def _shut(self) -> None:
        self._commits.join()
        self._lookups.join()
        self._lists.join()
        self._chores.join()
        self._engine.dispose()

    @property
    def counts(self) -> CommitCounts:
        """What the writer has done so far, for metrics."""
        return self._commits.counts

    @property
    def waiting(self) -> int:
        """Writes queued or being committed."""
        return self._writes.waiting

    @property
    def body_bytes(self) -> int:
        """Bytes on disk in bodies."""
        return self._files.used_bytes

    async def check(self) -> None:
        """Return if the database can be read, and written should the last commit have failed; else raise."""
        await self._lookups.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
        if self._commits.counts.failing:
            await self._writes.submit(self._operations.touch())

    # --- workspaces

    async def add_workspace(self, row: WorkspaceRow, *, sealed: Mapping[str, bytes] = _NO_BOXES) -> None:
        """Store a new workspace with its tokens, and with *sealed* what its client confided, by who can read it.

        Raises:
            WorkspaceConflict: the id, a token's label or its hash is taken.
        """
        await self._writes.submit(self._operations.add_workspace(row, sealed))

    async def revise_workspace(
        self,
        workspace: str,
        revision: int,
        *,
        name: str,
        spec: Mapping[str, Any],
        at_ms: int,
        sealed: Mapping[str, bytes] = _NO_BOXES,
        rollout: RolloutRow | None = None,
    ) -> None:
        """Store the next revision of a workspace; earlier ones stay readable.

        Args:
            sealed: its secrets, by the bootstrap that can read them.
            rollout: how it is on its way; replaces an earlier one.

        Raises:
            UnknownWorkspace: there is none.
            WorkspaceConflict: *revision* is not one more than the stored one.
        """
        operation = self._operations.revise_workspace(workspace, revision, name, spec, at_ms, sealed, rollout)
        await self._writes.submit(operation)

    async def amend_workspace(
        self, workspace: str, revision: int, *, name: str, spec: Mapping[str, Any], at_ms: int
    ) -> None:
        """Store another specification under the same revision: one that runs alike.

        Raises:
            UnknownWorkspace: there is none, or no such revision.
        """
        await self._writes.submit(self._operations.amend_workspace(workspace, revision, name, spec, at_ms))

    async def end_rollout(self, rollout: RolloutRow) -> None:
        """Store that a new revision is everywhere, or with `failed_at_ms` that it failed."""
        await self._writes.submit(self._operations.end_rollout(rollout))

    async def rollouts(self) -> list[RolloutRow]:
        """Return every new revision that is on its way, or failed."""
        return await self._lists.read(queries.rollouts)

    async def sealed_secrets(self, workspace: str, revision: int, reader: Address) -> tuple[bytes | None, bool]:
        """Return what was confided for one revision as *reader* can read it, None where it cannot, and whether anything
        was confided."""
        return await self._lookups.read(
            lambda connection: queries.sealed_secrets(connection, workspace, revision, reader)
        )

    async def place(self, rows: Iterable[DeploymentRow], dropped: Iterable[tuple[str, str]]) -> None:
        """Store that nodes are to run a workspace, and (workspace, node) of those that are not any more."""
        await self._writes.submit(self._operations.place(rows, dropped))

    async def place_after(
        self, mark: tuple[Any, ...], rows: Iterable[DeploymentRow], dropped: Iterable[tuple[str, str]]
    ) -> tuple[tuple[Any, ...], int]:
        """As ``place``, where other bootstraps may do the same; return the mark afterwards, and the database's time
        while nobody else could place anything.

        Args:
            mark: of what this was decided on (``workspaces_mark``).

        Raises:
            PlacementOutdated: somebody has changed that since; nothing was stored.
        """
        steps = self._operations.place(rows, dropped).steps

        def work(connection: sa.Connection) -> tuple[tuple[Any, ...], int]:
            leases.lock_placement(connection)
            now_ms = leases.database_now_ms(connection)
            if leases.workspaces_mark(connection) != mark:
                raise PlacementOutdated("another bootstrap changed workspaces or where they run")
            execute_steps(connection, steps)
            return leases.workspaces_mark(connection), now_ms

        return await self._chores.read(work)

    async def deployments(self) -> list[DeploymentRow]:
        """Return which nodes are to run what."""
        return await self._lists.read(queries.deployments)

    async def remove_workspace(self, workspace: str, at_ms: int) -> None:
        """Remove a workspace and its tokens; its tasks, receipts and specifications stay on record.

        Raises:
            UnknownWorkspace: there is none, or it was removed before.
        """
        await self._writes.submit(self._operations.remove_workspace(workspace, at_ms))

    async def revive_workspace(self, workspace: str, *, before_ms: int, at_ms: int) -> None:
        """Undo the removal of a workspace that has no tokens.

        Raises:
            UnknownWorkspace: it never was, or was removed after *before_ms*.
            WorkspaceConflict: it is there.
        """
        await self._writes.submit(self._operations.revive_workspace(workspace, before_ms, at_ms))

    async def replace_token(
        self, workspace: str, token: WorkspaceToken, *, expire: Iterable[str] = (), at_ms: int
    ) -> None:
        """Add a token; those with the labels *expire* are valid until *at_ms* (later than now: an overlap).

        Raises:
            WorkspaceConflict: the token exists, or one to expire does not.
        """
        await self._writes.submit(self._operations.replace_token(workspace, token, expire, at_ms))

    async def list_workspaces(self, *, removed: bool = False) -> list[WorkspaceRow]:
        """Return the workspaces, oldest first; with *removed*, those removed as well."""
        return await self._lists.read(lambda connection: queries.workspaces(connection, removed=removed))

    async def workspace_spec(self, workspace: str, revision: int) -> dict[str, Any] | None:
        """Return one revision's specification, of a removed workspace too; None when there is none."""
        return await self._lookups.read(lambda connection: queries.workspace_spec(connection, workspace, revision))

    # --- tasks

    def new_body(self, task_id: str, part: Part) -> BodyWriter:
        """Begin a body in pieces: ``async with``, ``write``, ``commit``; then ``accept`` or ``finish`` with it."""
        return self._files.new(task_id, part)

    async def accept(self, task: NewTask) -> None:
        """Commit a new task in state ACCEPTED. From here on it is never lost. Cancelled, as ``accept_and_begin``.

        Raises:
            IdempotencyKeyUsed: answer with the task it names.
            TaskExists: choose another id.
            RecordRefused: a value cannot be stored.
        """
        request = await self._kept(task.task_id, Part.REQUEST, task.request)
        operation = self._operations.accept(_with_request(task, request))
        reached("accept.before_commit")
        await self._submit(operation, task.request, request, to_the_end=True)
        reached("accept.after_commit")

    async def accept_and_begin(self, task: NewTask, start: AttemptStart) -> None:
        """Commit a new task with its first attempt, in state DISPATCHED: the one commit before the order leaves.

        Cancelled, it raises before anything is queued, or not at all: the caller knows whether there is a task to end.

        Raises:
            As ``accept``.
        """
        request = await self._kept(task.task_id, Part.REQUEST, task.request)
        operation = self._operations.accept(_with_request(task, request), start)
        await self._submit(operation, task.request, request, to_the_end=True)

    async def begin_attempt(
        self, start: AttemptStart, *, previous: AttemptEnd | None = None, goes_on: bool = False
    ) -> None:
        """Commit a further attempt, and with *previous* the end of the one before; call it before the order leaves.

        Cancelled, as ``accept_and_begin``.

        Args:
            goes_on: it is a further call of a job: one that runs stays running.

        Raises:
            UnknownTask, TaskIsFinal: nothing to begin.
            AttemptConflict: an attempt of this number or a later one was begun, or *previous* is not running.
        """
        await self._writes.submit(self._operations.begin_attempt(start, previous, goes_on=goes_on), to_the_end=True)

    async def end_attempt(self, end: AttemptEnd, *, requeue: bool, job: Mapping[str, Any] | None = None) -> None:
        """Commit the end of an attempt whose task goes on; *requeue* puts the task back to ACCEPTED.

        Args:
            job: what is kept of the task's job from then on (``job_rows.values``).

        Raises:
            UnknownTask, TaskIsFinal, AttemptConflict: as ``begin_attempt``.
        """
        await self._writes.submit(self._operations.end_attempt(end, requeue=requeue, job=job))

    def note_running(self, task_id: str, attempt: int) -> None:
        """Let the task be shown as RUNNING: the node admitted the attempt. Lost in a crash; no decision rests on it."""
        self._writes.post(self._operations.run(task_id, attempt))

    async def finish(self, finish: Finish) -> FiledReceipt | None:
        """Commit a task's end (state, attempt, answer, receipt, chain head) and return what became of the receipt.

        A receipt its node did not sign (rule ``signer``) must say ``authentic=False``: it would take its sequence
        number from the true one.

        Raises:
            UnknownTask: there is none.
            TaskIsFinal: it ended before; nothing was changed and the receipt was not filed: use ``late_receipt``.
            AttemptConflict: the attempt is not running.
            RecordRefused: a value cannot be stored, such as a receipt's sequence of 0: finish without it.
        """
        response = await self._kept(finish.task_id, Part.RESPONSE, finish.response)
        kept = finish if response is finish.response else replace(finish, response=response)
        operation = self._operations.finish(kept)
        self._note_link(finish.receipt)
        filed: FiledReceipt | None = await self._submit(operation, finish.response, response)
        return filed

    def post_finish(
        self, finish: Finish, tell: Callable[[outcome.Value[FiledReceipt | None] | outcome.Error], None]
    ) -> bool:
        """As ``finish``, for a task whose answer is not kept, and without waiting; False: nothing was queued.

        Args:
            tell: called with the outcome after COMMIT, within trio's loop: it must be short and not raise.

        Raises:
            RecordRefused: as ``finish``.
        """
        if finish.response is not None:
            raise ValueError("an answer that is kept is worth waiting for")
        operation = self._operations.finish(finish)
        self._note_link(finish.receipt)
        return self._writes.post(operation, tell)

    async def late_receipt(self, receipt: NewReceipt) -> FiledReceipt:
        """File a receipt that did not come with its answer, and show its verdict with the task's last attempt.

        Idempotent: the same receipt again changes nothing and returns the acknowledgement given first.
        """
        self._note_link(receipt)
        filed: FiledReceipt = await self._writes.submit(self._operations.late_receipt(receipt))
        return filed

    async def task(self, task_id: str) -> TaskRecord | None:
        """Return a task with its bodies (large ones as a path, see ``read_body``), None when there is none."""
        return await self._lookups.read(lambda connection: queries.task(connection, task_id))

    async def task_state(self, task_id: str) -> TaskRecord | None:
        """Return a task without its bodies, None when there is none."""
        return await self._lookups.read(lambda connection: queries.task_state(connection, task_id))

    async def detail(self, task_id: str) -> TaskDetail:
        """Return a task with its attempts and receipts.

        Raises:
            UnknownTask: there is none.
        """
        return await self._lookups.read(lambda connection: queries.detail(connection, task_id))

    async def attempts(self, task_id: str) -> list[AttemptRecord]:
        """Return a task's attempts, first one first; empty for an unknown task."""
        return await self._lookups.read(lambda connection: queries.attempts(connection, task_id))

    async def task_by_key(self, workspace: str, key: str) -> str | None:
        """Return the id of the task that *workspace* asked for under this idempotency key."""
        return await self._lookups.read(lambda connection: queries.task_by_key(connection, workspace, key))

    async def tasks(self, wanted: TaskFilter) -> TaskPage:
        """Return one page of tasks, newest first, without bodies.

        Raises:
            RecordRefused: the cursor is not one of ours.
        """
        return await self._lists.read(lambda connection: queries.tasks(connection, wanted))

    async def task_ids(self, wanted: TaskFilter) -> TaskIdPage:
        """Return one page of task ids, newest first.

        Raises:
            RecordRefused: the cursor is not one of ours.
        """
        return await self._lists.read(lambda connection: queries.task_ids(connection, wanted))

    async def ask_cancel(self, task_id: str, at_ms: int) -> None:
        """Commit the wish that a task end; whose it is carries it out, and after a crash whoever takes it up.

        Raises:
            UnknownTask, TaskIsFinal: there is nothing to end.
        """
        await self._writes.submit(self._operations.ask_cancel(task_id, at_ms))
        reached("cancel.after_commit")

    async def cancels_asked(self) -> list[str]:
        """Return the unfinished tasks of this bootstrap that were asked to end, wherever that was said."""
        return await self._lookups.read(lambda connection: leases.cancels_asked(connection, self._bootstrap))

    async def unfinished(self, among: Collection[str] | None = None) -> list[OpenTask]:
        """Return every task of this bootstrap that is not final, oldest first, without bodies; of the ids *among*.

        What a restart has to deal with; call ``claim_own`` before.
        """
        return await self._lists.read(lambda connection: queries.unfinished(connection, self._bootstrap, among))

    # --- several bootstraps on one database

    @property
    def is_shared(self) -> bool:
        """Whether other bootstraps may work on this database."""
        return self._engine.dialect.name != "sqlite"

    async def claim_own(self) -> int:
        """Take over the unfinished tasks that no other bootstrap can own, and return how many those were.

        On a SQLite file that is every one, since one process has it; elsewhere those of before there were several.
        """
        return await self._chores.read(lambda connection: leases.claim(connection, self._bootstrap, self.is_shared))

    async def renew_lease(self, lease_ms: int, about: Mapping[str, Any], *, anew: bool = False) -> bool:
        """Say that this bootstrap lives for *lease_ms* more; return False when its lease had ended before.

        Args:
            about: what siblings and operators may know of it.
            anew: this run begins.
        """
        own = self._bootstrap
        return await self._chores.read(lambda connection: leases.renew(connection, own, lease_ms, about, anew))

    async def end_lease(self) -> None:
        """Say that this bootstrap stops: its siblings need not wait for its lease to end."""
        await self._chores.read(lambda connection: leases.end(connection, self._bootstrap))

    async def siblings(self) -> list[Sibling]:
        """Return every bootstrap that ever worked on this database, this one included."""
        return await self._lists.read(leases.all_bootstraps)

    async def take_over(self, limit: int = 500) -> list[OpenTask]:
        """Make at most *limit* unfinished tasks of bootstraps whose lease has ended this one's, and return them."""
        return await self._chores.read(lambda connection: leases.take_over(connection, self._bootstrap, limit))

    async def owned(self) -> set[str]:
        """Return the ids of the unfinished tasks of this bootstrap."""
        return await self._lists.read(lambda connection: leases.owned(connection, self._bootstrap))

    async def keep_presence(self, gone: Collection[Address] | None, came: Mapping[Address, Mapping[str, Told]]) -> None:
        """Store which nodes have left this bootstrap (None: all there were), which have come and what they report."""
        own, reports = self._bootstrap, {str(node): told for node, told in came.items()}
        await self._chores.read(lambda connection: leases.keep_presence(connection, own, gone, reports))

    async def present_elsewhere(self, nodes: Collection[Address]) -> set[Address]:
        """Return those of *nodes* that are connected to another bootstrap that lives."""
        if not nodes or not self.is_shared:
            return set()
        own = self._bootstrap
        return {
            Address(node)
            for node in await self._lookups.read(lambda connection: leases.present_elsewhere(connection, own, nodes))
        }

    async def told_elsewhere(self, workspace: str) -> dict[Address, Told]:
        """Return what nodes that are connected to another bootstrap that lives told that one of *workspace*."""
        if not self.is_shared:
            return {}
        own = self._bootstrap
        found = await self._lookups.read(lambda connection: leases.told_elsewhere(connection, own, workspace))
        return {Address(node): told for node, told in found.items()}

    async def workspaces_mark(self) -> tuple[Any, ...]:
        """Return a value that differs once any workspace or token, or where one runs, has changed."""
        return await self._lookups.read(leases.workspaces_mark)

    async def workspaces_marked(self) -> tuple[tuple[Any, ...], int]:
        """Return ``workspaces_mark`` and the database's time before it was read."""

        def work(connection: sa.Connection) -> tuple[tuple[Any, ...], int]:
            now_ms = leases.database_now_ms(connection)
            return leases.workspaces_mark(connection), now_ms

        return await self._lookups.read(work)

    # --- what is rare

    async def chore(self, work: Callable[[sa.Connection], T]) -> T:
        """Return what *work* does in a transaction of its own, apart from the writer's batches; for what is rare."""
        return await self._chores.read(work)

    async def look_up(self, work: Callable[[sa.Connection], T]) -> T:
        """Return what *work* reads; it must be short."""
        return await self._lookups.read(work)

    async def look_over(self, work: Callable[[sa.Connection], T]) -> T:
        """Return what *work* reads, however long that takes."""
        return await self._lists.read(work)

    # --- retention

    async def remove_old(self, *, before_ms: int | None, bodies_bytes: int | None, limit: int = 500) -> int:
        """Remove at most *limit* final tasks, oldest first, with their bodies and attempts; return how many.

        Their receipts stay, each with the order it answers.

        Args:
            before_ms: those accepted before this.
            bodies_bytes: and those beyond what all bodies together may take; None: no such bound.
        """
        removed, paths = await self._chores.read(
            lambda connection: retention.remove(connection, before_ms, bodies_bytes, limit)
        )
        await self._files.remove(paths)
        return removed

    async def forget_gpus(self, before_ms: int) -> None:
        """Remove what nodes that never worked offered before, but for the last session of each."""
        await self._chores.read(lambda connection: retention.forget_gpus(connection, before_ms))

    # --- webhooks

    async def due_webhooks(self, now_ms: int, limit: int) -> list[DueWebhook]:
        """Return calls to make now, their tasks being final, and keep them from siblings for a while."""
        return await self._chores.read(lambda connection: webhook_rows.take_due(connection, now_ms, limit))

    async def note_webhook(self, told: ToldWebhook) -> None:
        """Commit what became of a call."""
        await self._chores.read(lambda connection: webhook_rows.note(connection, told))

    async def webhook(self, task_id: str) -> WebhookRecord | None:
        """Return how the calling back of a task goes; None when nobody is to be called."""
        return await self._lookups.read(lambda connection: webhook_rows.of_task(connection, task_id))

    async def read_body(self, task_id: str, part: Part, body: StoredBody) -> bytes:
        """Return a whole body as ``task`` named it.

        Raises:
            BodyMissing: its file is gone.
        """
        return await self._files.read(task_id, part, body)

    def body_chunks(self, task_id: str, part: Part, body: StoredBody) -> AsyncIterator[bytes]:
        """Return the pieces of a body; see ``read_body``. BodyMissing may come after some pieces."""
        return self._files.chunks(task_id, part, body)

    # --- receipts and chains

    async def receipts(self, task_id: str, attempt: int) -> list[ReceiptRecord]:
        """Return what is filed of a task's attempt, in the order of the chain: one receipt, unless its node lied."""
        return await self._lookups.read(lambda connection: queries.receipts(connection, task_id, attempt))

    async def receipt(self, task_id: str, attempt: int | None = None) -> ReceiptRecord | None:
        """Return the receipt of a task's attempt, of the last receipted one when *attempt* is None."""
        found = await self._lookups.read(lambda connection: queries.receipts(connection, task_id, attempt))
        return found[-1] if found else None

    async def chain_head(self, node: Address, bootstrap: Address | None = None) -> ReceiptLink | None:
        """Return the last receipt up to which none of *node*'s is missing; None when there is none yet."""
        owner = bootstrap or self._bootstrap
        chain = await self._lookups.read(lambda connection: load_chain(connection, owner, node))
        if chain.sequence == 0:
            return None
        self._links.note(owner, node, chain.sequence, chain.hash)
        return ReceiptLink(chain.sequence, chain.hash)

    async def chain_top(self, node: Address) -> ReceiptLink | None:
        """Return the highest receipt of *node*, whatever is missing below; None when there is none yet.

        What its chain must continue from, so that no number is given twice.
        """
        owner = self._bootstrap
        chain = await self._lookups.read(lambda connection: load_chain(connection, owner, node))
        if chain.sequence:
            self._links.note(owner, node, chain.sequence, chain.hash)
        sequence, hash = chain.top
        return ReceiptLink(sequence, hash) if sequence else None

    async def missing(self, node: Address) -> Missing:
        """Return what the chain of *node* lacks below its highest receipt."""
        chain = await self._lookups.read(lambda connection: load_chain(connection, self._bootstrap, node))
        gaps = tuple(chain.gaps())
        after = (gap.to_sequence + 1 for gap in gaps)
        return Missing(gaps, len(chain.ahead), {sequence: bytes(chain.ahead[sequence][1]) for sequence in after})

    async def asked_gaps(self, node: Address) -> list[AskedGap]:
        """Return what *node* is asked for, lowest first; with a claim, what was given up and did not all come since."""
        found = await self._lookups.read(lambda connection: queries.asked_gaps(connection, self._bootstrap, node))
        filled = [one.gap.from_sequence for one, came in found if one.claim and came]
        if filled:
            await self._writes.submit(self._operations.filled(self._bootstrap, node, filled))
        return [one for one, came in found if not (one.claim and came)]

    async def keep_asked_gaps(self, node: Address, asked: Iterable[AskedGap]) -> None:
        """Store what *node* is asked for now, in place of what it was asked for; what was given up stays."""
        await self._writes.submit(self._operations.ask_for(self._bootstrap, node, asked))

    def link_before(self, node: Address, sequence: int, bootstrap: Address | None = None) -> ReceiptLink | None:
        """Return the receipt just before *sequence* if it is at hand, else None: then its link cannot be judged now.

        At once, from memory: receipts handed in lately, committed or not, and the head last asked for. A break that is
        found later comes back as FiledReceipt.broken.
        """
        return self._links.before(bootstrap or self._bootstrap, node, sequence)

    async def write_off(self, node: Address, asked: AskedGap, missing_hash: bytes, claim: bytes, at_ms: int) -> None:
        """Keep as evidence that *node* has owed receipts for too long, and let its chain go on without them.

        Args:
            missing_hash: of the last one missing.
            claim: that they are, signed.
        """
        await self._writes.submit(self._operations.write_off(self._bootstrap, node, asked, missing_hash, claim, at_ms))

    async def faults(self, node: Address) -> list[ChainFault]:
        """Return the evidence kept against *node*."""
        return await self._lists.read(lambda connection: queries.faults(connection, node))

    # --- nodes

    async def see_node(self, row: NodeRow) -> None:
        """Store a node as last seen; its first sight stays."""
        await self._writes.submit(self._operations.see_node(row))

    def note_node(self, row: NodeRow) -> None:
        """As ``see_node``, without waiting."""
        self._writes.post(self._operations.see_node(row))

    def note_gpus(self, node: Address, session: bytes, models: Mapping[bytes, str], at_ms: int) -> None:
        """Keep the model of each GPU a node offers in a session, by its name in receipts; does not wait.

        What is written later, an order to use one of them included, is not on file before it.
        """
        if models:
            self._writes.post(self._operations.see_gpus(self._bootstrap, node, session, models, at_ms))

    async def session_gpus(
        self, node: Address, session: bytes, bootstrap: Address | None = None, since_ms: int | None = None
    ) -> dict[bytes, str]:
        """Return the model of each GPU that *node* offered in a session, to this bootstrap or to *bootstrap*.

        Args:
            since_ms: nothing is returned unless the session's GPUs were being kept by then.
        """
        to = bootstrap or self._bootstrap
        return await self._lookups.read(
            lambda connection: queries.session_gpus(connection, to, node, session, since_ms)
        )

    async def keep_price_list(self, node: Address, session: bytes, wire: bytes, at_ms: int) -> bytes:
        """Store what *node* asks in a session, and return what holds: the first it said, empty for nothing.

        That it asked nothing is stored too, so that it cannot ask later for what was ordered before. A session that is
        on file is only looked up: when thousands of nodes come again at once, none of them waits for a write.
        """

        def on_file(connection: sa.Connection) -> bytes | None:
            return queries.price_list(connection, self._bootstrap, node, session)

        held = await self._lookups.read(on_file)
        if held is None:
            await self._writes.submit(self._operations.keep_price_list(self._bootstrap, node, session, wire, at_ms))
            # not what was written: a second hello of the session may have been faster
            held = await self._lookups.read(on_file)
        return held or b""

    async def observation(self, bootstrap: Address, node: Address, receipt_hash: bytes) -> bytes:
        """Return what was seen of a disputed receipt, signed; empty where nothing is on file."""
        return await self._lookups.read(
            lambda connection: queries.observation(connection, bootstrap, node, receipt_hash)
        )

    async def keep_standing(self, node: Address, standing: Standing) -> None:
        """Store what this bootstrap makes of a node's receipts by now."""
        await self._writes.submit(self._operations.keep_standing(self._bootstrap, node, standing))

    async def standings(self) -> list[tuple[Address, Address, Standing]]:
        """Return what each bootstrap on this database makes of each node: bootstrap, node, standing."""
        return await self._lists.read(queries.standings)

    async def keep_placements(self, placements: Iterable[tuple[str, int, int, str]]) -> None:
        """Store why attempts went where they did: task id, attempt, when, the packed placement."""
        await self._writes.submit(self._operations.keep_placements(placements))

    async def placements(self, task_id: str) -> list[tuple[int, str]]:
        """Return what is kept of why a task's attempts went where they did: attempt, packed placement."""
        return await self._lookups.read(lambda connection: queries.placements(connection, task_id))

    async def trim_placements(self, limit: int) -> None:
        """Forget all but the last *limit* placements."""
        await self._chores.read(lambda connection: retention.trim_placements(connection, limit))

    async def nodes(self) -> list[NodeRow]:
        """Return every node ever seen, first seen first."""
        return await self._lists.read(queries.nodes)

    def _note_link(self, receipt: NewReceipt | None) -> None:
        if receipt is not None and receipt.authentic:
            self._links.note(receipt.bootstrap, receipt.node, receipt.sequence, receipt.hash)

    async def _kept(self, task_id: str, part: Part, body: bytes | StoredBody | None) -> bytes | StoredBody | None:
        """Return *body* as it goes to its row: a long one given as bytes is put on disk first."""
        if not isinstance(body, bytes) or len(body) <= self._files.limits.inline_bytes:
            return body
        async with self._files.new(task_id, part) as writer:
            await writer.write(body)
            return await writer.commit()

    async def _submit(
        self,
        operation: Operation,
        given: bytes | StoredBody | None,
        kept: bytes | StoredBody | None,
        *,
        to_the_end: bool = False,
    ) -> Any:
        """Return what *operation* gives; when it is refused, remove the file *kept* that was made for it of *given*."""
        try:
            return await self._writes.submit(operation, to_the_end=to_the_end)
        except (StoreUnavailable, StoreClosed):
            raise  # its row may be there after all: the next open looks
        except StoreError:
            if isinstance(kept, StoredBody) and kept is not given:
                with trio.CancelScope(shield=True):
                    await self._files.remove([kept])
            raise


@asynccontextmanager
async def open_store(
    location: str | Path,
    *,
    network: str,
    bootstrap: Address,
    bodies: Path | None = None,
    options: StoreOptions = StoreOptions(),
) -> AsyncIterator[Store]:
    """Open a store (see ``Store.open``) and close it at the end."""
    store = await Store.open(location, network=network, bootstrap=bootstrap, bodies=bodies, options=options)
    try:
        yield store
    finally:
        await store.aclose()


def _with_request(task: NewTask, request: bytes | StoredBody | None) -> NewTask:
    return task if request is task.request else replace(task, request=request)


def _prepare(engine: sa.Engine, network: str, migrate: bool | None, files: BodyFiles) -> None:
    try:
        with engine.connect() as connection:
            prepare_schema(connection, network=network, migrate=migrate)
            files.open()
            files.sweep(lambda paths: queries.named_paths(connection, paths))
    except sa.exc.DBAPIError as error:
        raise StoreUnavailable(f"the store cannot be opened: {error.orig}") from error
    except OSError as error:
        raise StoreUnavailable(f"the bodies directory cannot be used: {error}") from error
