"""What an attempt's end means: for the task's state, for the client's status, and as a stable reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ngpu_bootstrap.dispatch.attempt import How
from ngpu_bootstrap.dispatch.ends import ending_of
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.wire_errors import Reason


def attempt(how: How, **values: Any) -> Any:
    return SimpleNamespace(**{"how": how, "reason": "", "failed": "", "status": 200, **values})


def judged(outcome: str = "complete", *, stands: bool = True) -> Any:
    rule = "" if stands else "response_hash"
    return SimpleNamespace(
        record=SimpleNamespace(outcome=outcome), answer_stands=stands, verdict=SimpleNamespace(rule=rule)
    )


@pytest.mark.parametrize(
    ("ended", "verdict", "state", "status", "reason"),
    [
        (attempt(How.ANSWERED), judged(), TaskState.FINISHED, 200, ""),
        (attempt(How.ANSWERED, status=500), judged(), TaskState.FINISHED, 500, ""),
        (attempt(How.ANSWERED), None, TaskState.FAILED, 502, "receipt_missing"),
        (attempt(How.ANSWERED), judged(stands=False), TaskState.FAILED, 502, "receipt_disputed"),
        (attempt(How.ANSWERED), judged("workspace_broke"), TaskState.FAILED, 502, "workspace_broke"),
        (attempt(How.ANSWERED), judged("deadline"), TaskState.EXPIRED, 504, "deadline"),
        (attempt(How.ANSWERED), judged("from_the_future"), TaskState.FAILED, 502, "from_the_future"),
        (attempt(How.SWITCHED, status=101), None, TaskState.FINISHED, 101, ""),
        (attempt(How.REPLACED, reason="workspace_broke"), judged(), TaskState.FAILED, 502, "workspace_broke"),
        (attempt(How.REPLACED, reason="deadline"), judged(), TaskState.EXPIRED, 504, "deadline"),
        (attempt(How.REFUSED, reason="no_free_slot"), None, TaskState.FAILED, 429, "no_free_slot"),
        (attempt(How.REFUSED, reason="path_not_served"), None, TaskState.FAILED, 404, "path_not_served"),
        (attempt(How.REFUSED, reason="deadline_passed"), None, TaskState.EXPIRED, 504, "deadline_passed"),
        (attempt(How.REFUSED, reason="bad_signature"), None, TaskState.FAILED, 502, "node_refused"),
        (attempt(How.NOT_SENT), None, TaskState.FAILED, 503, "node_unreachable"),
        (attempt(How.LOST), None, TaskState.FAILED, 502, "node_lost"),
        (attempt(How.DEADLINE), None, TaskState.EXPIRED, 504, "deadline"),
        (attempt(How.OVERSIZE, failed="too large"), None, TaskState.FAILED, 502, "answer_too_large"),
        (attempt(How.GONE), None, TaskState.CANCELLED, 499, "client_gone"),
    ],
)
def test_each_end(ended: Any, verdict: Any, state: TaskState, status: int, reason: str) -> None:
    ending = ending_of(ended, verdict)
    assert (ending.state, ending.status, ending.reason) == (state, status, reason)
    assert (ending.message == "") is (state is TaskState.FINISHED)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.COMPLETE])
def test_no_outcome_but_complete_finishes_a_task(outcome: Outcome) -> None:
    assert ending_of(attempt(How.ANSWERED), judged(outcome)).state is not TaskState.FINISHED


@pytest.mark.parametrize("reason", list(Reason))
def test_every_refusal_is_told_with_the_nodes_word(reason: Reason) -> None:
    refusal = ending_of(attempt(How.REFUSED, reason=reason.value, failed="because"), None).refusal()
    assert refusal.status >= 400
    assert reason.value in refusal.message
    assert "because" in refusal.message
    assert ("Retry-After" in refusal.headers) is (refusal.status in (429, 503))
