"""What an attempt's end means for its task and its client: state, status, reason and words. Pure."""

from __future__ import annotations

from ngpu_bootstrap.dispatch.attempt import Attempt, How
from ngpu_bootstrap.dispatch.verdicts import Judged
from ngpu_bootstrap.errors import NodeFault
from ngpu_bootstrap.scheduling.history import Fared
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.wire_errors import Reason


@dataclass(frozen=True, slots=True)
class Ending:
    """How a task ended.

    Attributes:
        status: what the client gets: the workspace's own status, or ours where it gave none.
        reason: empty when the task finished.
        outcome: of the last attempt, as recorded: a receipt's outcome, or `refused`, `not_sent`, `lost`.
    """

    state: TaskState
    status: int
    reason: str = ""
    message: str = ""
    outcome: str = ""

    def refusal(self) -> NodeFault:
        """Return the answer for a client who waits and got nothing of the workspace's yet."""
        retry_after_s = 1 if self.status in (429, 503) else None
        return NodeFault(self.status, self.reason, self.message, retry_after_s=retry_after_s)


CANCELLED = Ending(TaskState.CANCELLED, 499, "cancelled", "the task was cancelled", "cancelled")

# A node's refusal as the client sees it. What is not here is between the node and us: 502.
_REFUSED_STATUS = {
    Reason.NO_FREE_SLOT.value: 429,
    Reason.DRAINING.value: 503,
    Reason.WORKSPACE_NOT_READY.value: 503,
    Reason.WORKSPACE_UNKNOWN.value: 503,
    Reason.WRONG_SESSION.value: 503,
    Reason.PATH_NOT_SERVED.value: 404,
    Reason.BODY_TOO_LARGE.value: 413,
    Reason.DEADLINE_PASSED.value: 504,
}

# An answer that came whole by its framing, and whose receipt says that it is not the workspace's whole answer.
_BROKEN_OUTCOMES = {
    Outcome.DEADLINE.value: (TaskState.EXPIRED, 504, "the deadline passed while the answer was on its way"),
    Outcome.CANCELLED.value: (TaskState.CANCELLED, 499, "the task was cancelled"),
    Outcome.CLIENT_GONE.value: (TaskState.FAILED, 502, "the connection to the node was lost"),
    Outcome.LIMIT.value: (TaskState.FAILED, 502, "a limit of the node cut the answer"),
    Outcome.WORKSPACE_BROKE.value: (TaskState.FAILED, 502, "the workspace broke off its answer"),
    Outcome.NODE_STOPPING.value: (TaskState.FAILED, 502, "the node stopped before the answer was complete"),
}


def ending_of(attempt: Attempt, judged: Judged | None) -> Ending:
    """Return what *attempt* means for its task if no other attempt follows."""
    match attempt.how:
        case How.ANSWERED:
            return _answered(attempt, judged)
        case How.SWITCHED:
            return Ending(TaskState.FINISHED, 101, outcome="switched")
        case How.CANCELLED:
            return CANCELLED
        case How.REPLACED if attempt.reason == Outcome.CANCELLED:
            return CANCELLED
        case How.REPLACED:
            late = attempt.reason == Outcome.DEADLINE
            words = "the workspace did not answer in time" if late else "the workspace could not be reached or broke"
            return Ending(
                TaskState.EXPIRED if late else TaskState.FAILED,
                504 if late else 502,
                attempt.reason,
                _because(words, attempt.failed),
                attempt.reason,
            )
        case How.REFUSED:
            status = _REFUSED_STATUS.get(attempt.reason, 502)
            state = TaskState.EXPIRED if status == 504 else TaskState.FAILED
            reason = attempt.reason if status != 502 else "node_refused"
            words = f"the node refused the order: {attempt.reason}"
            return Ending(state, status, reason, _because(words, attempt.failed), "refused")
        case How.NOT_SENT:
            message = _because("no connection to the node", attempt.failed)
            return Ending(TaskState.FAILED, 503, "node_unreachable", message, "not_sent")
        case How.LOST:
            message = _because("the connection to the node was lost before its answer was whole", attempt.failed)
            return Ending(TaskState.FAILED, 502, "node_lost", message, "lost")
        case How.DEADLINE:
            return Ending(TaskState.EXPIRED, 504, "deadline", "no answer came before the deadline", "deadline")
        case How.OVERSIZE:
            return Ending(TaskState.FAILED, 502, "answer_too_large", attempt.failed, "limit")
        case How.GONE:
            return Ending(TaskState.CANCELLED, 499, "client_gone", "the client closed its connection", "client_gone")


# Refusals that say nothing against the node: our news was old, or the call itself does not fit.
_NO_FAULT = frozenset(
    {
        Reason.NO_FREE_SLOT,
        Reason.DRAINING,
        Reason.DEADLINE_PASSED,
        Reason.BODY_TOO_LARGE,
        Reason.WRONG_SESSION,
        Reason.PATH_NOT_SERVED,
    }
)
_DEPLOYMENTS_FAULT = frozenset({Reason.WORKSPACE_NOT_READY, Reason.WORKSPACE_UNKNOWN})
# The node's owner stopped it or set the limit; a client that left or cancelled is nobody's failure.
_NO_FAULT_OUTCOMES = frozenset({Outcome.NODE_STOPPING, Outcome.LIMIT, Outcome.CLIENT_GONE, Outcome.CANCELLED})


def fared(attempt: Attempt, judged: Judged | None) -> Fared:
    """Return what *attempt* says about the node it ran on, for the choice of nodes to come."""
    match attempt.how:
        case How.ANSWERED:
            if judged is None or not judged.answer_stands:
                return Fared.NODE_FAILED
            if judged.record.outcome == Outcome.COMPLETE:
                return Fared.WELL
            return Fared.NO_MATTER if judged.record.outcome in _NO_FAULT_OUTCOMES else Fared.DEPLOYMENT_FAILED
        case How.REPLACED | How.DEADLINE:
            return Fared.DEPLOYMENT_FAILED
        case How.REFUSED:
            if attempt.reason in _NO_FAULT:
                return Fared.NO_MATTER
            return Fared.DEPLOYMENT_FAILED if attempt.reason in _DEPLOYMENTS_FAULT else Fared.NODE_FAILED
        case How.NOT_SENT | How.LOST:
            return Fared.NODE_FAILED
        case _:  # the client left, cancelled, went on in another protocol, or asked for more than is kept
            return Fared.NO_MATTER


def _answered(attempt: Attempt, judged: Judged | None) -> Ending:
    if judged is None:
        message = _because("the node gave no receipt with its answer", attempt.failed)
        return Ending(TaskState.FAILED, 502, "receipt_missing", message, "lost")
    outcome = judged.record.outcome
    if not judged.answer_stands:
        message = f"the node's receipt does not fit its answer (rule {judged.verdict.rule}); the answer is not released"
        return Ending(TaskState.FAILED, 502, "receipt_disputed", message, outcome)
    if outcome != Outcome.COMPLETE:
        state, status, message = _BROKEN_OUTCOMES.get(outcome, (TaskState.FAILED, 502, "the answer is not complete"))
        return Ending(state, status, outcome or "incomplete", message, outcome)
    return Ending(TaskState.FINISHED, attempt.status or 0, outcome=outcome)


def _because(words: str, detail: str) -> str:
    return f"{words}: {detail}" if detail else words
