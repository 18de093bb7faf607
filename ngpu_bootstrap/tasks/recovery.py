"""What a restarted bootstrap does with each unfinished task of its store. Pure; the shell is in ``dispatch``.

Two questions decide. May the workspace have acted? Yes as soon as an attempt was begun, since it is committed before
its order leaves. Can anyone still take the answer? For a detached task always: it is polled for. For an attached one
only when the client gave an ``Idempotency-Key`` and so can come back for it, and the request was kept.

    ======================  ==========================  ==========================================================
    task                    no attempt under way        an attempt under way
    ======================  ==========================  ==========================================================
    detached                queue it again              collect the answer from its node
    attached, resumable     queue it again              queue it again (the key allows another run)
    attached                failed, bootstrap_lost      failed, bootstrap_lost
    ======================  ==========================  ==========================================================

Past the deadline nothing is queued again: the task is expired; a detached one is collected for as long as its node may
hold the answer, since the work may be done and owed for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ngpu_bootstrap.store.records import OpenTask
from ngpu_bootstrap.tasks.retry import is_idempotent
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.identity import Address

# How long past a task's deadline its answer is still asked for at a node that does not answer us. The node would hold
# it for a day; a client should hear before that.
COLLECT_GRACE_MS: Final = 10 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A task as it was found.

    Attributes:
        request_kept: Headers and body are in the store, so that the request can be made again.
        node: Where the last attempt went; None before the first.
        under_way: The last attempt was begun and no end of it was recorded.
        session: The node's run that attempt was made for.
    """

    task_id: str
    method: str
    detach: bool
    deadline_at_ms: int
    idempotency_key: str | None = None
    request_kept: bool = False
    attempts: int = 0
    node: Address | None = None
    under_way: bool = False
    session: bytes = b""

    @classmethod
    def from_store(cls, found: OpenTask) -> Unfinished:
        """Return what decides about a task of ``Store.unfinished``."""
        task, last = found.task, found.last
        return cls(
            task_id=task.task_id,
            method=task.method,
            detach=task.detach,
            deadline_at_ms=task.deadline_at_ms,
            idempotency_key=task.idempotency_key,
            request_kept=found.request_kept,
            attempts=task.attempts,
            node=last.node if last else None,
            under_way=last is not None and last.ended_at_ms is None,
            session=last.session if last else b"",
        )


@dataclass(frozen=True, slots=True)
class Requeue:
    """Put it back to ACCEPTED and schedule it; *ends_attempt*: the one under way is first recorded as lost."""

    ends_attempt: bool = False


@dataclass(frozen=True, slots=True)
class Collect:
    """Ask *node* for the answer of *attempt* until *until_ms*."""

    node: Address
    attempt: int
    session: bytes
    until_ms: int


@dataclass(frozen=True, slots=True)
class End:
    """Commit the final *state*; *ends_attempt*: with the attempt under way as lost."""

    state: TaskState
    reason: str
    ends_attempt: bool = False


@dataclass(frozen=True, slots=True)
class KeepAsking:
    """Nothing is decided: ask again later."""


Decision = Requeue | Collect | End | KeepAsking


class Collected(StrEnum):
    """What a node said about an attempt it was asked for."""

    ANSWERED = "answered"
    """Its answer is here: finish the task with it (not decided here)."""
    RUNNING = "running"
    """It is at it."""
    UNKNOWN = "unknown"
    """It knows of no such attempt, and runs in the session the order was made for."""
    UNKNOWN_SINCE_RESTART = "unknown_since_restart"
    """It knows of no such attempt, but was restarted since."""
    UNREACHABLE = "unreachable"
    """It is not connected, or did not answer."""


def decide(task: Unfinished, *, now_ms: int) -> Decision:
    """Return what to do with *task* at a restart."""
    if task.detach and task.under_way and task.node is not None:
        return Collect(task.node, task.attempts, task.session, task.deadline_at_ms + COLLECT_GRACE_MS)
    if now_ms >= task.deadline_at_ms:
        return End(TaskState.EXPIRED, "deadline", task.under_way)
    if task.detach or (task.idempotency_key is not None and task.request_kept):
        return Requeue(task.under_way)
    return End(TaskState.FAILED, "bootstrap_lost", task.under_way)


def after_asking(task: Unfinished, said: Collected, *, now_ms: int, attempt_cap: int) -> Decision:
    """Return what to do with a detached *task* after its node was asked for the attempt under way.

    A node that runs in the order's own session and does not know the attempt never admitted it: orders are admitted
    once and remembered until their deadline. After a restart it may have been running and be lost.

    Raises:
        ValueError: for ANSWERED, which is no decision.
    """
    late = now_ms >= task.deadline_at_ms
    match said:
        case Collected.ANSWERED:
            raise ValueError("an answer is to be stored, not decided about")
        case Collected.RUNNING | Collected.UNREACHABLE:
            if now_ms < task.deadline_at_ms + COLLECT_GRACE_MS:
                return KeepAsking()
            return End(TaskState.EXPIRED, "deadline", ends_attempt=True)
        case Collected.UNKNOWN:
            may_run = True
        case Collected.UNKNOWN_SINCE_RESTART:
            may_run = is_idempotent(task.method, task.idempotency_key)
    if late:
        return End(TaskState.EXPIRED, "deadline", ends_attempt=True)
    if may_run and task.attempts < attempt_cap:
        return Requeue(ends_attempt=True)
    return End(TaskState.FAILED, "node_lost" if not may_run else "attempt_cap", ends_attempt=True)
