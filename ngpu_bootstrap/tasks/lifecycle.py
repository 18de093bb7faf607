"""A task's life as a state machine: an event goes in, the new state and what to do about it come out.

Theory: a task has at most one attempt under way. Events about an attempt that is not the one under way are late (its
answer was given up, the task was cancelled) and change nothing. A final state never changes. What happens:

    ============  =====================================================================  ==================
    state         event                                                                  new state
    ============  =====================================================================  ==================
    ACCEPTED      Begun                                                                  DISPATCHED
    DISPATCHED    Admitted                                                               RUNNING
    ACCEPTED      Unplaced                                                               FAILED
    DISPATCHED +  Answered                                                               FINISHED or FAILED
    DISPATCHED +  Ended, and the retry rule allows another attempt                       ACCEPTED
    DISPATCHED +  Ended, and it does not                                                 FAILED
    any           CancelAsked                                                            CANCELLED
    any           ClientGone, the task being attached                                    CANCELLED
    any           DeadlineReached                                                        EXPIRED
    ============  =====================================================================  ==================

(DISPATCHED + means DISPATCHED or RUNNING, of the attempt under way.)

Pure: the shell commits the new state and carries the instructions out, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ngpu_bootstrap.tasks.retry import may_retry
from ngpu_bootstrap.tasks.states import TaskState


@dataclass(frozen=True, slots=True)
class Life:
    """What decides a task's way.

    Attributes:
        attempts: Attempts begun so far; the last one's number.
        under_way: Whether that attempt has not ended.
        detach: The client does not wait on its connection.
    """

    method: str
    deadline_at_ms: int
    cap: int
    idempotency_key: str | None = None
    detach: bool = False
    upgrade: bool = False
    state: TaskState = TaskState.ACCEPTED
    attempts: int = 0
    under_way: bool = False


# --- events


@dataclass(frozen=True, slots=True)
class Begun:
    """Attempt *attempt* is committed; its order leaves now."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """The node admitted the order of *attempt*."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The workspace's answer to *attempt* is whole. *stands* False: its receipt says it is not what was answered."""

    attempt: int
    stands: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """*attempt* ended without a whole answer. See ``may_retry`` for the flags."""

    attempt: int
    reason: str
    bytes_sent: bool
    bytes_to_client: bool = False
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Unplaced:
    """No node can take the task, and it may not wait longer for one."""

    reason: str = "no_node"


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The client asks for an end."""


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The connection the client waited on is gone."""


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The task's deadline is past."""


Event = Begun | Admitted | Answered | Ended | Unplaced | CancelAsked | ClientGone | DeadlineReached


# --- instructions


@dataclass(frozen=True, slots=True)
class Place:
    """Choose a node and begin the next attempt."""


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Cancel the attempt at its node: reset its stream; a detached one is cancelled by order."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CommitEnd:
    """Commit the final state with *reason* and tell whoever waits."""

    state: TaskState
    reason: str = ""


Instruction = Place | StopAttempt | CommitEnd


class OutOfOrder(Exception):
    """An event that cannot happen in this state: our mistake, not the world's."""


def advance(life: Life, event: Event, *, now_ms: int) -> tuple[Life, tuple[Instruction, ...]]:
    """Return the task's life after *event*, and what to do.

    Raises:
        OutOfOrder: the event contradicts the state (two attempts at once, an attempt out of turn).
    """
    if life.state.is_final:
        if isinstance(event, Begun):
            raise OutOfOrder(f"attempt {event.attempt} begun in state {life.state.name}")
        return life, ()
    match event:
        case Begun():
            return _begin(life, event), ()
        case Admitted():
            if not _is_current(life, event.attempt):
                return life, ()
            return replace(life, state=TaskState.RUNNING), ()
        case Answered():
            if not _is_current(life, event.attempt):
                return life, ()
            if event.stands:
                return _end(life, TaskState.FINISHED)
            return _end(life, TaskState.FAILED, "receipt_disputed")
        case Ended():
            return _after_attempt(life, event, now_ms) if _is_current(life, event.attempt) else (life, ())
        case Unplaced():
            if life.under_way:
                raise OutOfOrder("no node found for a task that is on one")
            return _end(life, TaskState.FAILED, event.reason)
        case CancelAsked():
            return _stop(life, TaskState.CANCELLED, "cancelled")
        case ClientGone():
            return (life, ()) if life.detach else _stop(life, TaskState.CANCELLED, "client_gone")
        case DeadlineReached():
            return _stop(life, TaskState.EXPIRED, "deadline")


def _begin(life: Life, event: Begun) -> Life:
    if life.under_way or event.attempt <= life.attempts:
        raise OutOfOrder(f"attempt {event.attempt} begun after attempt {life.attempts}")
    return replace(life, state=TaskState.DISPATCHED, attempts=event.attempt, under_way=True)


def _after_attempt(life: Life, event: Ended, now_ms: int) -> tuple[Life, tuple[Instruction, ...]]:
    decision = may_retry(
        life.method,
        life.idempotency_key,
        bytes_sent=event.bytes_sent,
        bytes_to_client=event.bytes_to_client,
        refused=event.refused,
        upgrade=life.upgrade,
        attempts=life.attempts,
        cap=life.cap,
        deadline_at_ms=life.deadline_at_ms,
        now_ms=now_ms,
    )
    if decision:
        return replace(life, state=TaskState.ACCEPTED, under_way=False), (Place(),)
    if now_ms >= life.deadline_at_ms:
        return _end(life, TaskState.EXPIRED, "deadline")
    return _end(life, TaskState.FAILED, event.reason)


def _stop(life: Life, state: TaskState, reason: str) -> tuple[Life, tuple[Instruction, ...]]:
    stopped: tuple[Instruction, ...] = (StopAttempt(life.attempts),) if life.under_way else ()
    ended, instructions = _end(life, state, reason)
    return ended, stopped + instructions


def _end(life: Life, state: TaskState, reason: str = "") -> tuple[Life, tuple[Instruction, ...]]:
    return replace(life, state=state, under_way=False), (CommitEnd(state, reason),)


def _is_current(life: Life, attempt: int) -> bool:
    return life.under_way and attempt == life.attempts
