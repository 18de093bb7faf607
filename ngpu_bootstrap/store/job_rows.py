"""Jobs that workspaces run by themselves, and keys that stick to a node for good, as stored.

A job is a task (it goes, with its row, when its task goes); the row says where in its life it stands and which node
has it, so that any bootstrap of this database can ask that node, and go on with the job when its owner is gone. Calls
by which clients ask for a job are tasks of their own: `job_calls` links them.

A sticky key is kept as a hash: it may be somebody's session. Blocking; runs in the store's threads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from ngpu_bootstrap.profiles.jobs import Job, Phase
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import upsert
from ngpu_protocol.identity import Address
from ngpu_protocol.job_terms import JobTerms

MAX_CALLS_SHOWN = 100
MAX_SUBMISSION_BYTES = 64 * 1024
_TERMS = set(JobTerms.model_fields)


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as stored.

    Attributes:
        task_id: of the task it is.
        workspace: that runs it; *caller*: the client's own, whose token may ask for it.
        name: its declaration's, with its profile's: keys of different kinds of jobs never meet.
        declared: how it is asked for: as declared when it was submitted, whatever the profile says since.
        submission: the workspace's answer to its submission (`packed`); empty where nobody can come for it again.
        loss: what its bootstrap signed of its loss (`ngpu_protocol.losses`); empty for every other.
    """

    task_id: str
    workspace: str
    caller: str
    name: str
    declared: JobTerms
    job: Job
    submission: bytes = b""
    loss: bytes = b""

    def at(self, job: Job) -> JobRow:
        """Return the row of the same job a step later."""
        return replace(self, job=job)


def packed(status: int, body: bytes, content_type: str) -> bytes:
    """Return an answer as it is kept, b"" where it is too long for that."""
    return b"%d %b\n%b" % (status, content_type.encode(), body) if len(body) <= MAX_SUBMISSION_BYTES else b""


def unpacked(kept: bytes) -> tuple[int, bytes, str]:
    """Return status, body and content type of an answer that is kept."""
    head, _, body = kept.partition(b"\n")
    status, _, content_type = head.decode().partition(" ")
    return int(status), body, content_type


def values(row: JobRow) -> dict[str, Any]:
    """Return the columns of *row*."""
    job = row.job
    return {
        "task_id": row.task_id,
        "workspace": row.workspace,
        "caller": row.caller,
        "name": row.name,
        "declared": row.declared.model_dump_json(by_alias=True, exclude_defaults=True, include=_TERMS),
        "key": job.key,
        "node": job.node,
        "phase": job.phase.value,
        "since_ms": job.since_ms,
        "state": job.state,
        "result": job.result,
        "submission": row.submission or None,
        "loss": row.loss or None,
    }


def put(connection: sa.Connection, row: JobRow) -> None:
    """Write a job as it is now."""
    columns = values(row)
    connection.execute(upsert(connection.dialect.name, tables.jobs, columns), columns)


def of_task(connection: sa.Connection, task_id: str) -> JobRow | None:
    """Return the job that a task is; None when it is none."""
    j = tables.jobs
    found = connection.execute(sa.select(j).where(j.c.task_id == task_id)).one_or_none()
    return None if found is None else _row(found)


def unfinished(connection: sa.Connection, task_ids: list[str]) -> list[JobRow]:
    """Return those of the tasks that are jobs."""
    j = tables.jobs
    return [_row(found) for found in connection.execute(sa.select(j).where(j.c.task_id.in_(task_ids)))]


def of_key(connection: sa.Connection, workspace: str | None, caller: str, name: str, key: str) -> JobRow | None:
    """Return the newest job of a client under the workspace's own id of it; None where it has none.

    Args:
        workspace: that runs it; None: any.
        caller: the client's own workspace: the id of another client's job is as unknown as one that never was.
    """
    j, t = tables.jobs, tables.tasks
    query = (
        sa.select(j)
        .select_from(j.join(t, t.c.task_id == j.c.task_id))
        .where(j.c.caller == caller, j.c.name == name, j.c.key == key)
        .order_by(t.c.number.desc())
        .limit(1)
    )
    if workspace is not None:
        query = query.where(j.c.workspace == workspace)
    found = connection.execute(query).one_or_none()
    return None if found is None else _row(found)


def key_is_taken(connection: sa.Connection, row: JobRow) -> bool:
    """Return whether another job of the same client goes by the same id on another node: which was meant is unclear."""
    j, t = tables.jobs, tables.tasks
    others = (
        sa.select(j.c.task_id)
        .select_from(j.join(t, t.c.task_id == j.c.task_id))
        .where(j.c.caller == row.caller, j.c.name == row.name, j.c.key == row.job.key, sa.text("tasks.state < 3"))
        .where(j.c.workspace == row.workspace, j.c.task_id != row.task_id, j.c.node != row.job.node)
    )
    return connection.execute(others.limit(1)).one_or_none() is not None


def note_call(connection: sa.Connection, job: str, call: str) -> None:
    """Write that the task *call* asked for *job*, if it is still there."""
    t, c = tables.tasks, tables.job_calls
    both = sa.select(sa.func.count()).select_from(t).where(t.c.task_id.in_([job, call]))
    if connection.execute(both).scalar_one() == 2:
        connection.execute(sa.insert(c).values(task_id=call, job=job))


def calls_of(connection: sa.Connection, job: str) -> list[str]:
    """Return the tasks by which its client asked for *job*, newest first, `MAX_CALLS_SHOWN` at most."""
    c = tables.job_calls
    query = sa.select(c.c.task_id).where(c.c.job == job).order_by(c.c.task_id.desc()).limit(MAX_CALLS_SHOWN)
    return list(connection.execute(query).scalars())


# -- keys that stick to a node


def key_hash(workspace: str, caller: str, source: str, value: str) -> bytes:
    """Return what a client's key is known by: alike only for one workspace, client, place and value."""
    return hashlib.sha256(json.dumps([workspace, caller, source, value]).encode()).digest()


def node_of_key(connection: sa.Connection, key: bytes, since_ms: int) -> Address | None:
    """Return where a key sticks, if it was used since."""
    s = tables.sticky_keys
    query = sa.select(s.c.node).where(s.c.key == key, s.c.used_at_ms >= since_ms)
    node = connection.execute(query).scalar_one_or_none()
    return None if node is None else Address(node)


def stick(connection: sa.Connection, key: bytes, workspace: str, node: Address, now_ms: int) -> None:
    """Have a key stick to *node* from now on."""
    values = {"key": key, "workspace": workspace, "node": node, "used_at_ms": now_ms}
    connection.execute(upsert(connection.dialect.name, tables.sticky_keys, values), values)


def forget_keys(connection: sa.Connection, before_ms: int, limit: int) -> int:
    """Remove keys that were not used since *before_ms*, and of each workspace all but the *limit* used last."""
    s = tables.sticky_keys
    gone = connection.execute(sa.delete(s).where(s.c.used_at_ms < before_ms)).rowcount
    counts = sa.select(s.c.workspace).group_by(s.c.workspace).having(sa.func.count() > limit)
    for workspace in list(connection.execute(counts).scalars()):
        newest = sa.select(s.c.used_at_ms).where(s.c.workspace == workspace).order_by(s.c.used_at_ms.desc())
        bound = connection.execute(newest.offset(limit).limit(1)).scalar_one()
        gone += connection.execute(sa.delete(s).where(s.c.workspace == workspace, s.c.used_at_ms <= bound)).rowcount
    return gone


def _row(found: Any) -> JobRow:
    job = Job(
        since_ms=found.since_ms,
        phase=Phase(found.phase),
        key=found.key,
        node=found.node,
        state=found.state,
        result=found.result,
    )
    # another version may have written it, which may have more to say
    declared = JobTerms.model_validate_json(found.declared, extra="ignore")
    kept = (found.submission or b"", found.loss or b"")
    return JobRow(found.task_id, found.workspace, found.caller, found.name, declared, job, *kept)
