"""From records to what the writer executes: one Operation per promise made to a caller.

An operation is all or nothing. Its steps say how many rows they must touch; when one does not, or a constraint refuses
it, ``explain`` finds out why and the caller gets that error, while the other operations of the batch go through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from ngpu_bootstrap.scheduling.standing import Standing
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.errors import (
    AttemptConflict,
    IdempotencyKeyUsed,
    RecordRefused,
    StoreError,
    TaskExists,
    TaskIsFinal,
    UnknownTask,
    UnknownWorkspace,
    WorkspaceConflict,
)
from ngpu_bootstrap.store.handoff import Job
from ngpu_bootstrap.store.records import (
    AskedGap,
    AttemptEnd,
    AttemptStart,
    DeploymentRow,
    Finish,
    Gap,
    NewReceipt,
    NewTask,
    NodeRow,
    Part,
    RolloutRow,
    StoredBody,
    WorkspaceRow,
    WorkspaceToken,
)
from ngpu_bootstrap.store.statements import Prepared, Statements
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.gap_claims import numbers_text
from ngpu_protocol.identity import Address

_NO_BOXES: Mapping[str, bytes] = {}

Step = tuple[Prepared, tuple[Any, ...]]
Explain = Callable[[sa.Connection, BaseException | None], StoreError]


class Operation(Job):
    """What one caller asked for.

    Attributes:
        key: Operations of one key in one batch are executed in their order of arrival; others may be interleaved.
        steps: Statements with their parameters.
        receipt: A receipt to file along; where it goes in its chain is decided inside the transaction.
        given_up: Receipts of a chain (bootstrap, node) that it goes on without.
        explain: Called inside the transaction after the operation was undone; returns what the caller is told.
    """

    __slots__ = ("explain", "given_up", "key", "receipt", "steps")

    def __init__(self, key: str, steps: list[Step], explain: Explain, receipt: NewReceipt | None = None) -> None:
        super().__init__()
        self.key = key
        self.steps = steps
        self.explain = explain
        self.receipt = receipt
        self.given_up: tuple[str, str, Gap] | None = None


@dataclass(frozen=True, slots=True)
class Operations:
    """Makes operations; pure.

    Attributes:
        owner: the bootstrap that new tasks belong to.
    """

    statements: Statements
    owner: str = ""

    def accept(self, task: NewTask, start: AttemptStart | None = None) -> Operation:
        """A new task; with *start*, its first attempt in the same commit."""
        s = self.statements
        values = _task_values(task)
        values["bootstrap"] = self.owner
        steps: list[Step] = []
        if start is None:
            values["state"] = 0
            values["attempts"] = 0
            steps.append((s.insert_task, s.insert_task.bind(values)))
        else:
            values["state"] = 1
            values["attempts"] = start.attempt
            values["node"] = start.node
            values["node_ip"] = start.node_ip
            values["dispatched_at_ms"] = start.at_ms
            steps.append((s.insert_dispatched_task, s.insert_dispatched_task.bind(values)))
            steps.append(self._insert_attempt(start))
        if task.request is not None:
            steps.append(self._insert_body(task.task_id, Part.REQUEST, task.request))
        if task.webhook:
            webhook = {
                "task_id": task.task_id,
                "url": task.webhook,
                "token_label": task.token_label,
                "next_at_ms": task.accepted_at_ms,
            }
            steps.append((s.insert_webhook, s.insert_webhook.bind(webhook)))
        if task.job is not None:
            steps.append((s.put_job, s.put_job.bind(task.job)))
        return Operation(task.task_id, steps, lambda c, error: _why_not_accepted(c, task, error))

    def begin_attempt(
        self, start: AttemptStart, previous: AttemptEnd | None = None, *, goes_on: bool = False
    ) -> Operation:
        """A further attempt of a task; with *previous*, the end of the one before in the same commit.

        Args:
            goes_on: it is a further call of a job: one that runs stays running.
        """
        s = self.statements
        values = {
            "key": start.task_id,
            "attempt": start.attempt,
            "node": start.node,
            "node_ip": start.node_ip,
            "at_ms": start.at_ms,
        }
        dispatch = s.go_on_task if goes_on else s.dispatch_task
        steps = [(dispatch, dispatch.bind(values)), self._insert_attempt(start)]
        if previous is not None:
            steps.append(self._end_attempt(previous))
        return Operation(start.task_id, steps, _why_not(start.task_id, start.attempt))

    def end_attempt(self, end: AttemptEnd, *, requeue: bool, job: Mapping[str, Any] | None = None) -> Operation:
        """The end of an attempt whose task goes on: *requeue* puts the task back to ACCEPTED; *job* is what its job is
        from then on."""
        s = self.statements
        steps = [self._end_attempt(end)]
        if job is not None:
            steps.append((s.put_job, s.put_job.bind(job)))
        if requeue:
            steps.append((s.requeue_task, s.requeue_task.bind({"key": end.task_id})))
        return Operation(end.task_id, steps, _why_not(end.task_id, end.attempt))

    def ask_cancel(self, task_id: str, at_ms: int) -> Operation:
        """The client's wish that an unfinished task end."""
        s = self.statements.ask_cancel
        return Operation(task_id, [(s, s.bind({"key": task_id, "at_ms": at_ms}))], _why_not(task_id, 0))

    def run(self, task_id: str, attempt: int) -> Operation:
        """The node admitted the attempt's order."""
        s = self.statements
        steps = [(s.run_task, s.run_task.bind({"key": task_id, "attempt": attempt}))]
        return Operation(task_id, steps, _why_not(task_id, attempt))

    def finish(self, finish: Finish) -> Operation:
        """The end of a task with everything that came of it.

        Raises:
            RecordRefused: the receipt's sequence is none.
        """
        _check_sequence(finish.receipt)
        if not finish.state.is_final:
            raise ValueError(f"a task cannot finish in state {finish.state.name}")
        s = self.statements
        values = {
            "key": finish.task_id,
            "state": int(finish.state),
            "finished_at_ms": finish.at_ms,
            "result_code": finish.result_code,
            "message": finish.message,
            "reason": finish.reason,
            "status": finish.status,
            "content_type": finish.content_type,
            "encoding": finish.encoding,
            "verdict": finish.receipt.verdict if finish.receipt else None,
            "rule": finish.receipt.rule if finish.receipt else None,
        }
        steps = [(s.finish_task, s.finish_task.bind(values))]
        if finish.attempt is not None:
            end = AttemptEnd(finish.task_id, finish.attempt, finish.outcome, finish.at_ms, finish.reason, finish.status)
            steps.append(self._end_attempt(end))
        if finish.response is not None:
            steps.append(self._insert_body(finish.task_id, Part.RESPONSE, finish.response))
        if finish.job is not None:
            steps.append((s.put_job, s.put_job.bind(finish.job)))
        return Operation(finish.task_id, steps, _why_not(finish.task_id, finish.attempt or 0), finish.receipt)

    def late_receipt(self, receipt: NewReceipt) -> Operation:
        """A receipt that did not come with its answer.

        Its *order* stays with it where there is no attempt that has it.

        Raises:
            RecordRefused: its sequence is none.
        """
        _check_sequence(receipt)
        return Operation(receipt.task_id, [], _refused, receipt)

    def file_receipt(self, receipt: NewReceipt) -> Step:
        """The step that files *receipt* itself."""
        s = self.statements.insert_receipt
        return s, _receipt_values(s.names)(receipt)

    def keep_order(self, receipt: NewReceipt) -> Step:
        """The step that keeps the order of a filed receipt, where no attempt has it."""
        s = self.statements.keep_order
        values = {
            "of_bootstrap": receipt.bootstrap,
            "of_node": receipt.node,
            "at_sequence": receipt.sequence,
            "key": receipt.task_id,
            "number": receipt.attempt,
            "signed_order": receipt.order,
        }
        return s, s.bind(values)

    def judge(self, receipt: NewReceipt) -> Step:
        """The step that shows the verdict on *receipt* with its task, if it is the last attempt's."""
        s = self.statements.judge_task
        values = {
            "key": receipt.task_id,
            "attempt": receipt.attempt,
            "verdict": receipt.verdict,
            "rule": receipt.rule,
        }
        return s, s.bind(values)

    def move_head(self, bootstrap: str, node: str, sequence: int, hash: bytes) -> Step:
        """The step that records how far a chain is without gaps."""
        s = self.statements.move_head
        values = {"bootstrap": bootstrap, "node": node, "head_sequence": sequence, "head_hash": hash}
        return s, s.bind(values)

    def fault(self, receipt: NewReceipt, kind: str, offender: NewReceipt, *, expected: bytes, actual: bytes) -> Step:
        """The step that keeps *offender*, found out by the arrival of *receipt*, as evidence against its node."""
        return self.evidence(
            bootstrap=offender.bootstrap,
            node=offender.node,
            sequence=offender.sequence,
            kind=kind,
            hash=offender.hash,
            raw=offender.raw,
            expected=expected,
            actual=actual,
            found_at_ms=receipt.received_at_ms,
        )

    def evidence(self, **values: Any) -> Step:
        """The step that keeps a row of `chain_faults`, unless it is there."""
        s = self.statements.insert_fault
        return s, s.bind(values)

    def write_off(
        self, bootstrap: str, node: str, asked: AskedGap, missing_hash: bytes, claim: bytes, at_ms: int
    ) -> Operation:
        """Receipts that a node has owed for too long: evidence against it, and its chain goes on without them."""
        gap = asked.gap
        found = self.evidence(
            bootstrap=bootstrap,
            node=node,
            sequence=gap.from_sequence,
            kind="withheld",
            hash=missing_hash,
            raw=claim,
            expected=numbers_text(gap.from_sequence, gap.to_sequence).encode(),
            actual=b"",
            found_at_ms=at_ms,
        )
        steps = [found, self._ask_for(bootstrap, node, replace(asked, claim=claim))]
        operation = Operation(node, steps, _refused)
        operation.given_up = (bootstrap, node, gap)
        return operation

    def ask_for(self, bootstrap: str, node: str, asked: Iterable[AskedGap]) -> Operation:
        """The gaps a node is asked to fill now; those that were given up stay."""
        s = self.statements.drop_asked_gaps
        steps: list[Step] = [(s, s.bind({"of_bootstrap": bootstrap, "of_node": node}))]
        steps += [self._ask_for(bootstrap, node, one) for one in asked]
        return Operation(node, steps, _refused)

    def filled(self, bootstrap: str, node: str, first: Iterable[int]) -> Operation:
        """Gaps that were given up and came after all, by their first number: nothing more is asked."""
        s = self.statements.drop_asked_gap
        rows = [{"of_bootstrap": bootstrap, "of_node": node, "first": sequence} for sequence in first]
        return Operation(node, [(s, s.bind(row)) for row in rows], _refused)

    def _ask_for(self, bootstrap: str, node: str, asked: AskedGap) -> Step:
        s = self.statements.keep_asked_gap
        values = {
            "bootstrap": bootstrap,
            "node": node,
            "from_sequence": asked.gap.from_sequence,
            "to_sequence": asked.gap.to_sequence,
            "asked_at_ms": asked.asked_at_ms,
            "claim": asked.claim,
        }
        return s, s.bind(values)

    def see_node(self, node: NodeRow) -> Operation:
        """A node as it was last seen."""
        s = self.statements.see_node
        values = {name: getattr(node, name) for name in s.names}
        return Operation(node.address, [(s, s.bind(values))], _refused)

    def see_gpus(self, bootstrap: str, node: str, session: bytes, models: Mapping[bytes, str], at_ms: int) -> Operation:
        """The models of a node's GPUs, by their names in receipts; in a session, what it said first stands."""
        s, of_session = self.statements.see_gpu, self.statements.see_session_gpu
        steps: list[Step] = []
        for gpu, model in models.items():
            row = {"node": node, "gpu": gpu, "model": model, "seen_at_ms": at_ms}
            of_this = row | {"bootstrap": bootstrap, "session": session}
            steps += [(s, s.bind(row)), (of_session, of_session.bind(of_this))]
        return Operation(node, steps, _refused)

    def keep_price_list(self, bootstrap: Address, node: Address, session: bytes, wire: bytes, at_ms: int) -> Operation:
        """What a node asks in a session (*wire* is empty for nothing), unless that is on file."""
        s = self.statements.keep_price_list
        values = {
            "bootstrap": bootstrap,
            "node": node,
            "session": session,
            "signed_list": wire,
            "given_at_ms": at_ms,
        }
        return Operation(node, [(s, s.bind(values))], _refused)

    def observe(self, receipt: NewReceipt) -> Step:
        """The step that keeps what was seen of a disputed receipt."""
        s = self.statements.keep_observation
        values = {
            "bootstrap": receipt.bootstrap,
            "node": receipt.node,
            "receipt_hash": receipt.hash,
            "task_id": receipt.task_id,
            "attempt": receipt.attempt,
            "acknowledgement": receipt.acknowledgement,
            "signed_observation": receipt.observation,
        }
        return s, s.bind(values)

    def keep_standing(self, bootstrap: Address, node: Address, standing: Standing) -> Operation:
        """What a bootstrap makes of a node's receipts by now."""
        s = self.statements.keep_standing
        values = {name: getattr(standing, name) for name in s.names if name not in ("bootstrap", "node", "rules")}
        values |= {"bootstrap": bootstrap, "node": node, "rules": json.dumps(dict(standing.rules), sort_keys=True)}
        return Operation(f"standing {node}", [(s, s.bind(values))], _refused)

    def keep_placements(self, placements: Iterable[tuple[str, int, int, str]]) -> Operation:
        """Why attempts went where they did: task id, attempt, when, the packed placement."""
        s = self.statements.keep_placement
        steps = [(s, s.bind(dict(zip(s.names, one, strict=True)))) for one in placements]
        return Operation("placements", steps, _refused)

    def touch(self) -> Operation:
        """A write that changes nothing anyone reads: whether the database can be written again."""
        s = self.statements.touch
        return Operation("about", [(s, s.bind({"key": "checked", "value": ""}))], _refused)

    def add_workspace(self, row: WorkspaceRow, sealed: Mapping[str, bytes]) -> Operation:
        """A new workspace at its first revision here, with its tokens and secrets."""
        s = self.statements
        values = {
            "id": row.id,
            "owner": row.owner,
            "name": row.name,
            "revision": row.revision,
            "created_at_ms": row.created_at_ms,
            "updated_at_ms": row.updated_at_ms or row.created_at_ms,
            "removed_at_ms": None,
        }
        steps = [
            (s.insert_workspace, s.insert_workspace.bind(values)),
            self._insert_revision(row.id, row.revision, row.spec, row.created_at_ms),
        ]
        steps += self._set_secrets(row.id, row.revision, sealed)
        steps.extend(self._insert_token(row.id, token) for token in row.tokens)
        message = f"workspace {row.id}, or one of its tokens, exists already"
        return Operation(f"workspace {row.id}", steps, _why_not_workspace(row.id, message))

    def revise_workspace(
        self,
        id: str,
        revision: int,
        name: str,
        spec: Mapping[str, Any],
        at_ms: int,
        sealed: Mapping[str, bytes] = _NO_BOXES,
        rollout: RolloutRow | None = None,
    ) -> Operation:
        """The next revision of a workspace; *revision* must be one more than the stored one."""
        s = self.statements
        values = {
            "key": id,
            "from_revision": revision - 1,
            "revision": revision,
            "name": name,
            "updated_at_ms": at_ms,
        }
        steps = [
            (s.revise_workspace, s.revise_workspace.bind(values)),
            self._insert_revision(id, revision, spec, at_ms),
        ]
        steps += self._set_secrets(id, revision, sealed)
        if rollout is not None:
            steps.append((s.set_rollout, s.set_rollout.bind(asdict(rollout))))
        return Operation(f"workspace {id}", steps, _why_not_workspace(id, f"revision {revision} is not the next one"))

    def amend_workspace(self, id: str, revision: int, name: str, spec: Mapping[str, Any], at_ms: int) -> Operation:
        """The same revision of a workspace, where and how long it runs changed, or its image pinned."""
        s = self.statements
        steps = [
            (s.amend_revision, s.amend_revision.bind({"key": id, "amended": revision, "spec": _spec_text(spec)})),
            (s.amend_workspace, s.amend_workspace.bind({"key": id, "name": name, "updated_at_ms": at_ms})),
        ]
        return Operation(f"workspace {id}", steps, _why_not_workspace(id, f"there is no revision {revision}"))

    def end_rollout(self, rollout: RolloutRow) -> Operation:
        """The end of a roll: its row goes where it arrived everywhere, and says what happened where it failed."""
        s, id = self.statements, rollout.workspace
        values = {"key": id, "failed": rollout.target, "ended": rollout.target, **asdict(rollout)}
        statement = s.end_rollout if rollout.failed_at_ms is None else s.fail_rollout
        return Operation(f"workspace {id}", [(statement, statement.bind(values))], _refused)

    def place(self, rows: Iterable[DeploymentRow], dropped: Iterable[tuple[str, str]]) -> Operation:
        """Nodes that are to run a workspace, and (workspace, node) of those that are not any more."""
        s = self.statements
        steps = [(s.set_deployment, s.set_deployment.bind(asdict(row))) for row in rows]
        for id, node in dropped:
            steps.append((s.drop_deployment, s.drop_deployment.bind({"key": id, "dropped": node})))
        return Operation("deployments", steps, _refused)

    def remove_workspace(self, id: str, at_ms: int) -> Operation:
        """The end of a workspace: its credentials are gone, its tasks and revisions stay."""
        s = self.statements
        steps = [
            (s.remove_workspace, s.remove_workspace.bind({"key": id, "at_ms": at_ms})),
            (s.drop_tokens, s.drop_tokens.bind({"key": id})),
            *((drop, drop.bind({"key": id})) for drop in s.drop_of_workspace),
        ]
        return Operation(f"workspace {id}", steps, _why_not_workspace(id, f"workspace {id} is removed"))

    def revive_workspace(self, id: str, before_ms: int, at_ms: int) -> Operation:
        """A workspace without tokens that was removed by *before_ms* is there again, at its last revision."""
        statement = self.statements.revive_workspace
        bound = statement.bind({"key": id, "before_ms": before_ms, "at_ms": at_ms})
        return Operation(
            f"workspace {id}", [(statement, bound)], _why_not_workspace(id, f"workspace {id} was not removed")
        )

    def replace_token(self, id: str, token: WorkspaceToken, expire: Iterable[str], at_ms: int) -> Operation:
        """A further token of a workspace; those labelled *expire* end at *at_ms*."""
        s = self.statements
        steps = [self._insert_token(id, token)]
        for label in expire:
            values = {"key": id, "token_label": label, "at_ms": at_ms}
            steps.append((s.expire_token, s.expire_token.bind(values)))
        message = "the new token exists already, or a token to expire does not"
        return Operation(f"workspace {id}", steps, _why_not_workspace(id, message))

    def _insert_attempt(self, start: AttemptStart) -> Step:
        s = self.statements.insert_attempt
        values = {
            "task_id": start.task_id,
            "attempt": start.attempt,
            "node": start.node,
            "node_ip": start.node_ip,
            "session": start.session,
            "signed_order": start.order,
            "began_at_ms": start.at_ms,
        }
        return s, s.bind(values)

    def _end_attempt(self, end: AttemptEnd) -> Step:
        s = self.statements.end_attempt
        values = {
            "key": end.task_id,
            "number": end.attempt,
            "ended_at_ms": end.at_ms,
            "outcome": end.outcome,
            "reason": end.reason,
            "status": end.status,
        }
        return s, s.bind(values)

    def _insert_body(self, task_id: str, part: Part, body: bytes | StoredBody) -> Step:
        s = self.statements.insert_body
        if not isinstance(body, StoredBody):
            body = StoredBody(len(body), body)
        values = {
            "task_id": task_id,
            "part": part.value,
            "size": body.size,
            "content": body.content,
            "path": body.path,
        }
        return s, s.bind(values)

    def _insert_revision(self, id: str, revision: int, spec: Mapping[str, Any], at_ms: int) -> Step:
        s = self.statements.insert_revision
        return s, s.bind({"workspace": id, "revision": revision, "spec": _spec_text(spec), "created_at_ms": at_ms})

    def _set_secrets(self, id: str, revision: int, sealed: Mapping[str, bytes]) -> list[Step]:
        s = self.statements.set_secrets
        rows = [{"workspace": id, "revision": revision, "bootstrap": key, "sealed": box} for key, box in sealed.items()]
        return [(s, s.bind(row)) for row in rows]

    def _insert_token(self, id: str, token: WorkspaceToken) -> Step:
        s = self.statements.insert_token
        values = {
            "label": token.label,
            "workspace": id,
            "hash": token.hash,
            "created_at_ms": token.created_at_ms,
            "expires_at_ms": token.expires_at_ms,
        }
        return s, s.bind(values)


def _spec_text(spec: Mapping[str, Any]) -> str:
    return json.dumps(dict(spec), ensure_ascii=False, separators=(",", ":"))


def _check_sequence(receipt: NewReceipt | None) -> None:
    """Refuse a place that no chain has: sequences come from nodes, count from 1, and fit the column."""
    if receipt is not None and not 1 <= receipt.sequence < 2**63:
        raise RecordRefused(f"a receipt cannot have the sequence {receipt.sequence}")


def _task_values(task: NewTask) -> dict[str, Any]:
    return {
        "task_id": task.task_id,
        "workspace": task.workspace,
        "revision": task.revision,
        "api": task.api,
        "method": task.method,
        "port": task.port,
        "target": task.target,
        "headers": json.dumps(task.headers, ensure_ascii=False, separators=(",", ":")) if task.headers else "[]",
        "request_url": task.request_url,
        "token_label": task.token_label,
        "btc_address": task.btc_address,
        "user_ip": task.user_ip,
        "caller": task.caller,
        "idempotency_key": task.idempotency_key,
        "detach": int(task.detach),
        "wrapped": int(task.wrapped),
        "priority": task.priority,
        "accepted_at_ms": task.accepted_at_ms,
        "deadline_at_ms": task.deadline_at_ms,
        "affinity": task.affinity,
    }


@lru_cache(maxsize=4)
def _receipt_values(names: tuple[str, ...]) -> Callable[[NewReceipt], tuple[Any, ...]]:
    return attrgetter(*names)


def _refused(_connection: sa.Connection, error: BaseException | None) -> StoreError:
    # the driver's text, not SQLAlchemy's: that one quotes the values
    return RecordRefused(f"the record cannot be stored: {getattr(error, 'orig', None) or error}")


def _why_not_accepted(connection: sa.Connection, task: NewTask, error: BaseException | None) -> StoreError:
    t = tables.tasks
    if not isinstance(error, sa.exc.IntegrityError):
        return _refused(connection, error)
    if task.idempotency_key is not None:
        same = sa.select(t.c.task_id).where(
            t.c.workspace == task.workspace, t.c.idempotency_key == task.idempotency_key
        )
        first = connection.execute(same).scalar()
        if first is not None and first != task.task_id:
            return IdempotencyKeyUsed(task.workspace, task.idempotency_key, first)
    if connection.execute(sa.select(t.c.task_id).where(t.c.task_id == task.task_id)).scalar() is not None:
        return TaskExists(task.task_id)
    return _refused(connection, error)


def _why_not(task_id: str, attempt: int) -> Explain:
    """Return the explanation for operations on a task that must exist and be unfinished."""

    def explain(connection: sa.Connection, error: BaseException | None) -> StoreError:
        if error is not None and not isinstance(error, sa.exc.IntegrityError):
            return _refused(connection, error)
        t = tables.tasks
        state = connection.execute(sa.select(t.c.state).where(t.c.task_id == task_id)).scalar()
        if state is None:
            return UnknownTask(task_id)
        if TaskState(state).is_final:
            return TaskIsFinal(task_id, state)
        return AttemptConflict(task_id, attempt)

    return explain


def _why_not_workspace(id: str, message: str) -> Explain:
    def explain(connection: sa.Connection, error: BaseException | None) -> StoreError:
        if error is not None and not isinstance(error, sa.exc.IntegrityError):
            return _refused(connection, error)
        w = tables.workspaces
        known = connection.execute(sa.select(w.c.id).where(w.c.id == id, w.c.removed_at_ms.is_(None))).scalar()
        if known is None and error is None:
            return UnknownWorkspace(id)
        return WorkspaceConflict(id, message)

    return explain
